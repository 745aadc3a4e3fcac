"""GPU memory of training SD 1.5, on the simulated GPU: no GPU and no weights needed.

    python benchmarks/simulated_gpu.py benchmarks/memory_budget.py

SD 1.5's UNet and autoencoder lie on the simulated GPU: shapes and types are real, numbers are not. Passes are those of
the scripts, with flash attention, and every tensor that PyTorch allocates counts; workspaces of kernels, the CUDA
context and fragmentation do not: leave them two GB or a tenth. The last line is JSON.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import dgx  # noqa: E402
from ddpo_pytorch.generator.lora import ATTENTION, add_lora, cast_adapters  # noqa: E402
from ddpo_pytorch.generator.pipeline import decode_latents, guided_noise_prediction  # noqa: E402
from ddpo_pytorch.training.rollout_gradients import per_sample_gradients  # noqa: E402

logger = logging.getLogger(__name__)
GIB = 2**30
FROZEN = 83_653_863 + 123_060_480  # parameters of SD 1.5's autoencoder and text encoder
DDPO = "prompt_image_alignment_classifier_isic"


def new_unet(dtype: torch.dtype, lora: bool) -> UNet2DConditionModel:
    """SD 1.5's UNet as train.py prepares it."""
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(dtype).eval()
    if lora:
        unet.requires_grad_(False)
        add_lora(unet, 4, ATTENTION, seed=0)
        cast_adapters(unet)
    return unet


def predict(unet: UNet2DConditionModel, batch: int, size: int, guidance: float) -> torch.Tensor:
    half = dict(device="cuda", dtype=torch.half)
    latents, prompts = torch.randn(batch, 4, size // 8, size // 8, **half), torch.randn(batch, 77, 768, **half)
    return guided_noise_prediction(unet, latents, torch.ones(batch, device="cuda"), prompts, prompts, guidance)


def peak_of(function) -> float:
    """GiB on the device at most while `function()` runs."""
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / GIB


def ddpo(batch: int, checkpointing: bool) -> dict[str, float]:
    """GiB of a rollout without gradients and of one that takes them, of an update, and of decoding, at 512 px."""
    unet = new_unet(torch.half, lora=True)
    with torch.device("cuda"):
        channels = (128, 256, 512, 512)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **blocks).half()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]

    def recorded() -> None:
        with per_sample_gradients(unet, 2 * batch):
            torch.autograd.grad(predict(unet, batch, 512, 5.0).sum(), weights, allow_unused=True)

    found = {"resident": torch.cuda.memory_allocated() / GIB}
    found["update"] = peak_of(lambda: predict(unet, batch, 512, 5.0).sum().backward())
    found["rollout"] = peak_of(recorded)
    with torch.no_grad():
        found["plain rollout"] = peak_of(lambda: predict(unet, batch, 512, 5.0))
        latents = torch.randn(batch, 4, 64, 64, device="cuda", dtype=torch.half)
        found["decoding"] = peak_of(lambda: decode_latents(vae.requires_grad_(False), latents))
    return found


def activations(size: int, lora: bool, checkpointing: bool) -> float:
    """GiB of one UNet input more, kept until the backward pass or needed in it."""
    unet = new_unet(torch.half if lora else torch.float32, lora)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()

    def step(batch: int) -> None:
        with torch.autocast("cuda", torch.half, enabled=not lora):
            predict(unet, batch, size, 1.0).sum().backward()

    step(1)  # gradients exist from the second pass on
    return peak_of(lambda: step(3)) - peak_of(lambda: step(2))


def finetuning(batch: int, checkpointing: bool, adam_bytes: int) -> float:
    """GiB of a full fine-tune (train_sd.py): weights, gradients and average in float32, AdamW, activations."""
    unet = new_unet(torch.float32, lora=False)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    count = sum(weight.numel() for weight in unet.parameters())
    kept = 4 * count + adam_bytes * count + 4 * FROZEN  # average, moments, autoencoder and text encoder

    def step() -> None:
        with torch.autocast("cuda", torch.half):
            predict(unet, batch, 512, 1.0).sum().backward()

    step()  # as above
    return peak_of(step) + kept / GIB


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not torch.cuda.is_available():
        sys.exit("run it through benchmarks/simulated_gpu.py, or where there is a GPU")
    presets = {}
    for name in (DDPO, f"{DDPO}_16gb", f"{DDPO}_24gb", f"{DDPO}_80gb"):
        train = dgx.get_config(name).train
        presets[name] = ddpo(train.batch_size * train.timesteps_per_forward, train.gradient_checkpointing)
        logger.info("%s: %s", name, ", ".join(f"{what} {gib:.2f} GiB" for what, gib in presets[name].items()))
    for size, lora in ((256, True), (512, True), (768, True), (512, False)):
        kept = [activations(size, lora, checkpointing) for checkpointing in (False, True)]
        how = "LoRA" if lora else "all weights"
        logger.info("%d px, %s: %.2f GiB a UNet input, %.2f with checkpointing", size, how, *kept)
    for how, adam_bytes in (("AdamW", 8), ("8-bit AdamW", 2)):
        logger.info("full fine-tune, batches of 4, checkpointing, %s: %.1f GiB", how, finetuning(4, True, adam_bytes))
    logger.info("%s", json.dumps(presets))


if __name__ == "__main__":
    main()

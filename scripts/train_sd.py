"""Stage (i): a Stable Diffusion that draws the data set, to be improved by scripts/train.py.

    accelerate launch scripts/train_sd.py --config config/dgx.py:finetune_sd

`sd.stage` chooses what is trained: "finetune" the UNet of SD 1.5 (VAE and text encoder frozen), or, from nothing and in
this order, "vae" and "unet" (with tokenizer and text encoder). The objective is the usual one: predict the noise.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict, config_flags
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import ImageFiles, image_grid
from ddpo_pytorch.data.isic import CAPTIONS, load_split
from ddpo_pytorch.data.splits import drop_broken
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator import scratch
from ddpo_pytorch.generator.pipeline import encode_prompts, load_pipeline
from ddpo_pytorch.run import DTYPES, JsonLines, cli, make_accelerator

config_flags.DEFINE_config_file("config", "config/base.py", "experiment, e.g. config/dgx.py:finetune_sd")
logger = logging.getLogger(__name__)


class AutoencoderLoss(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> reconstruction error plus the weighted KL of the posterior, a scalar.

    The error is L1 plus twice the mean square: L1 alone is slow to notice hairs and ruler ticks, which are few pixels.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(images).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        error = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return error + self.kl_weight * posterior.kl().mean()


class NoiseLoss(nn.Module):
    """Latents (B, C, h, w) and caption tokens (B, L) -> mean squared error of the predicted noise (Ho et al. 2020)."""

    def __init__(self, pipe: StableDiffusionPipeline):
        super().__init__()
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, latents.shape[:1], device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample
        target = {"epsilon": noise, "sample": latents}.get(self.schedule.config.prediction_type)
        if target is None:
            target = self.schedule.get_velocity(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target.float())


def optimize(
    accelerator: Accelerator,
    sd: ConfigDict,
    loss_model: nn.Module,
    loader: DataLoader,
    to_loss: Callable[[nn.Module, list[torch.Tensor]], torch.Tensor],
    log: JsonLines,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with warm-up and cosine decay for sd.num_steps steps; `to_loss` feeds one batch to the (wrapped) model."""
    parameters = [p for p in loss_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=sd.learning_rate, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, sd.warmup_steps, sd.num_steps)
    model, optimizer, loader = accelerator.prepare(loss_model, optimizer, loader)
    losses, started, batches = [], time.perf_counter(), endless(loader)
    for step in tqdm(range(1, sd.num_steps + 1), disable=None):
        loss = to_loss(model, next(batches))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % sd.log_every == 0 or step == sd.num_steps:
            mean, elapsed = torch.stack(losses).mean().item(), time.perf_counter() - started
            log.write({"step": step, "loss": mean, "seconds": round(elapsed, 1)})
            logger.info("step %d/%d  loss %.4f  %.3f s a step", step, sd.num_steps, mean, elapsed / step)
            losses.clear()
        after_step(step)


def endless(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def train_vae(accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, files: ImageFiles, output: Path) -> None:
    """Train the autoencoder; vae.png shows reconstructions below their images."""
    loader = DataLoader(files, sd.batch_size, shuffle=True, drop_last=True)
    log = JsonLines(output / "vae.jsonl", accelerator.is_main_process)
    images = None

    def to_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        nonlocal images
        images = batch[0].float() / 127.5 - 1
        return model(images)

    optimize(accelerator, sd, AutoencoderLoss(vae, sd.vae_kl_weight), loader, to_loss, log)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        pairs = torch.cat([images[:8], vae.decode(latents[:8]).sample]) / 2 + 0.5
    # latents of unit variance, as SD's diffusion expects them
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    if accelerator.is_main_process:
        vae.save_pretrained(output / "vae")
        image_grid(pairs.clamp(0, 1), columns=8).save(output / "vae.png")


@torch.no_grad()
def encode_images(vae: AutoencoderKL, files: ImageFiles) -> torch.Tensor:
    """Latent mean and log-variance of every image, (N, 2 C, h, w) in half precision, so that none is encoded twice."""
    moments = []
    for images, _ in tqdm(DataLoader(files, 16), desc="encoding", disable=None):
        pixels = (images.float() / 127.5 - 1).to(vae.device, vae.dtype)
        moments.append(vae.encode(pixels).latent_dist.parameters.half().cpu())
    return torch.cat(moments)


def tokenize(pipe: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def build_from_scratch(sd: ConfigDict, output: Path) -> StableDiffusionPipeline:
    """Fresh tokenizer, text encoder and UNet beside the VAE that stage "vae" left in `output`."""
    if not (output / "vae" / "config.json").is_file():
        raise UserError(f"{str(output / 'vae')!r} holds no VAE; train it first with --config.sd.stage=vae")
    vae = AutoencoderKL.from_pretrained(output / "vae").requires_grad_(False).eval()
    tokenizer = scratch.build_tokenizer(CAPTIONS)
    text_encoder = scratch.build_text_encoder(tokenizer, sd.text_width, sd.text_layers)
    latent_size = sd.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    unet = scratch.build_unet(sd.unet_channels, sd.unet_attention, sd.text_width, latent_size)
    return scratch.assemble(vae, text_encoder, tokenizer, unet)


def train_unet(
    accelerator: Accelerator, config: ConfigDict, pipe: StableDiffusionPipeline, files: ImageFiles, captions: list[str]
) -> None:
    """Train the UNet (and, from nothing, the text encoder) on latents encoded once; save the weight average."""
    sd, output = config.sd, Path(config.sd.output)
    # in float32: SD's autoencoder overflows in half precision.
    moments = encode_images(pipe.vae.to(accelerator.device, torch.float32), files)
    loader = DataLoader(TensorDataset(moments, tokenize(pipe, captions)), sd.batch_size, shuffle=True, drop_last=True)
    empty = tokenize(pipe, [""])[0].to(accelerator.device)
    loss_model = NoiseLoss(pipe)
    average = EMAModel([p for p in loss_model.parameters() if p.requires_grad], decay=sd.ema_decay)
    average.to(accelerator.device)

    def to_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        mean, logvar = batch[0].float().chunk(2, dim=1)
        latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar.clamp(-30, 20))
        dropped = torch.rand(len(latents), device=latents.device) < sd.caption_dropout
        tokens = torch.where(dropped[:, None], empty, batch[1])
        return model(latents * pipe.vae.config.scaling_factor, tokens)

    def after_step(step: int) -> None:
        parameters = [p for p in loss_model.parameters() if p.requires_grad]
        average.step(parameters)
        if accelerator.is_main_process and sd.grid_every and step % sd.grid_every == 0:
            average.store(parameters)
            average.copy_to(parameters)
            draw_grid(pipe, config, output / f"grid_{step:06d}.png")
            average.restore(parameters)

    log = JsonLines(output / f"{sd.stage}.jsonl", accelerator.is_main_process)
    optimize(accelerator, sd, loss_model, loader, to_loss, log, after_step)
    if sd.ema_decay > 0:
        average.copy_to([p for p in loss_model.parameters() if p.requires_grad])
    if accelerator.is_main_process:
        if sd.stage == "unet":
            pipe.save_pretrained(output)
        state = {name: value.detach().cpu().contiguous() for name, value in pipe.unet.state_dict().items()}
        save_file(state, output / "pretrained_unet.safetensors")
        logger.info("UNet in %s", output / "pretrained_unet.safetensors")


@torch.no_grad()
def draw_grid(pipe: StableDiffusionPipeline, config: ConfigDict, path: Path) -> None:
    """One image for each of the 32 captions, from fixed noise."""
    was_training = pipe.unet.training
    pipe.unet.eval()
    images, *_ = pipeline_with_logprob(
        pipe,
        prompt_embeds=encode_prompts(pipe, CAPTIONS),
        negative_prompt_embeds=encode_prompts(pipe, [""]),
        num_inference_steps=config.sample.num_steps,
        guidance_scale=config.sample.guidance_scale,
        eta=config.sample.eta,
        generator=torch.Generator(pipe.device).manual_seed(config.seed),
        keep_trajectory=False,
    )
    pipe.unet.train(was_training)
    image_grid(images, columns=8).save(path)


def main(_) -> None:
    config = flags.FLAGS.config
    sd, output = config.sd, Path(config.sd.output)
    outcomes = {
        "vae": "vae",
        "unet": "pretrained_unet.safetensors",
        "finetune": "pretrained_unet.safetensors",
    }
    if sd.stage not in outcomes:
        raise UserError(f"sd.stage is {sd.stage!r}; allowed are {', '.join(outcomes)}")
    outcome = output / outcomes[sd.stage]
    if not sd.output or outcome.exists():
        problem = f"{str(outcome)!r} exists already" if sd.output else "sd.output is empty"
        raise UserError(f"{problem}; give another folder with --config.sd.output=DIR")
    if min(sd.num_steps, sd.batch_size, sd.image_size, sd.log_every) < 1 or sd.limit < 0:
        raise UserError("sd.num_steps, sd.batch_size, sd.image_size and sd.log_every must be 1 or more, sd.limit 0")
    rows, paths, missing = load_split(sd.csv, sd.data_path, sd.limit)
    if sd.skip_broken:
        rows, paths = drop_broken(rows, paths)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32)
    step_images = sd.batch_size * accelerator.num_processes
    if len(rows) < step_images:
        raise UserError(f"{len(rows)} images are fewer than the {step_images} of one step; lower sd.batch_size")
    if len(sd.unet_channels) != len(sd.unet_attention) or any(n % 8 for n in (*sd.unet_channels, *sd.vae_channels)):
        raise UserError("sd.unet_channels and sd.unet_attention must be equally long, and channels multiples of 8")
    logger.info("%d images, %d rows without one are skipped", len(rows), missing)
    set_seed(config.seed, device_specific=True)
    files = ImageFiles(paths, torch.arange(len(paths)), sd.image_size)
    captions = [row.caption for row in rows]
    pretrained, dtype = config.pretrained, DTYPES[config.mixed_precision]

    if sd.stage == "vae":
        train_vae(accelerator, sd, scratch.build_vae(sd.vae_channels, sd.image_size), files, output)
    elif sd.stage == "unet":
        train_unet(accelerator, config, build_from_scratch(sd, output), files, captions)
    else:
        pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, accelerator.device)
        pipe.unet.float().requires_grad_(True).train()
        train_unet(accelerator, config, pipe, files, captions)
    logger.info("finished; the outcome is in %s", output)


if __name__ == "__main__":
    cli(main)

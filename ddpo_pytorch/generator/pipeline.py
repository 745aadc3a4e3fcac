"""Stable Diffusion: strict loading, cached prompt embeddings, guided noise prediction, decoding."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig

from ddpo_pytorch.generator.conditioning import check_model, check_unet_file
from ddpo_pytorch.generator.parts import check_tokenizer, check_tokenizer_files, first_line, load_part, quiet
from ddpo_pytorch.generator.text import check_tokens, embed, load_encoder, mask_padding
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.weights import check_finite, read_safetensors

logger = logging.getLogger(__name__)
# where the files of ids that left the hub are now
MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_pipeline(
    model: str | Path,
    revision: str = "main",
    unet_path: str | Path = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Load Stable Diffusion in diffusers format with DDIM sampling, frozen and in evaluation mode.

    The safety checker is off: it misfires on medical images, and its black images would corrupt rewards and metrics
    unnoticed. The DDIM scheduler keeps the model's own betas, prediction type and offsets.

    Args:
        model: local folder, or Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        unet_path: safetensors file in diffusers names that replaces the UNet's weights; "" keeps the model's own.
        dtype: of VAE, text encoder and UNet.

    Raises:
        UserError: no such model, an incomplete part (see `load_part`), or parts or a UNet file that do not match.
    """
    pipe = _from_pretrained(str(model), revision, dtype)
    check_tokenizer(pipe.tokenizer, pipe.text_encoder, str(model))
    width, expected = pipe.text_encoder.config.hidden_size, pipe.unet.config.cross_attention_dim
    if width != expected:
        raise UserError(f"{model}: the UNet expects embeddings of width {expected}, the text encoder has {width}")
    if unet_path:
        replace_unet_weights(pipe.unet, unet_path)
        check_finite(pipe.unet.state_dict(), unet_path)  # its dtype may be narrower than the file's
        check_unet_file(pipe, model, unet_path)
    mask_padding(pipe.unet, pipe.text_encoder)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval().to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # spares a transfer at each step
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: a bar on terminals only
    return pipe


def _from_pretrained(model: str, revision: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    if model in MIRRORS:
        logger.warning("%s left the Hugging Face hub; loading its mirror %s", model, MIRRORS[model])
        model = MIRRORS[model]
    folder = Path(model).expanduser()
    if not (local := folder.is_dir()):
        if not HUB_ID.fullmatch(model):
            raise UserError(f"no model folder {model}; give a folder in diffusers format or a Hugging Face id")
        try:
            AutoConfig.from_pretrained(model, subfolder="text_encoder", revision=revision, trust_remote_code=False)
            with quiet():  # no retry warnings while offline
                folder = Path(StableDiffusionPipeline.download(model, revision=revision, safety_checker=None))
        except (OSError, ValueError) as error:
            raise UserError(f"model {model} is neither a local folder nor reachable on the hub; check both") from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{model} has no model_index.json; expected a Stable Diffusion folder in diffusers format")
    for name in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        if not (folder / name).is_dir():
            raise UserError(f"{model} has no folder {name}; copy or fetch the whole model again")
    check_tokenizer_files(folder / "tokenizer")
    parts = {
        "unet": load_part(UNet2DConditionModel, folder, "unet", dtype),
        "vae": load_part(AutoencoderKL, folder, "vae", dtype),
    }
    try:
        parts["text_encoder"] = load_encoder(str(folder), "text_encoder", dtype)
        with quiet():  # diffusers warns of text encoders other than CLIP
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, safety_checker=None, requires_safety_checker=False, **parts
            )
    except UserError:
        raise
    except Exception as error:  # the JSON files of scheduler and tokenizer may hold anything
        raise UserError(f"{model} is no complete Stable Diffusion ({first_line(error)}); save it again") from error
    if local:
        check_model(pipe, folder)
    return pipe


def replace_unet_weights(unet: nn.Module, path: str | Path) -> None:
    """Replace all weights of the UNet by those of a safetensors file in diffusers names.

    Raises UserError for a missing or unreadable file, and for an unknown key, a missing one, or another shape.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no UNet weights at {path}; give a safetensors file with a UNet state dict in diffusers names")
    weights, _ = read_safetensors(path)
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    problem = ""
    for key in (*weights, *shapes):
        if key not in shapes:
            problem = f"has the key {key}, which the UNet lacks"
        elif key not in weights:
            problem = f"lacks the key {key} of the UNet"
        elif (shape := tuple(weights[key].shape)) != shapes[key]:
            problem = f"holds {key} of shape {shape}, the UNet wants {shapes[key]}"
        if problem:
            raise UserError(f"{path} {problem}; use weights of the same architecture")
    unet.load_state_dict(weights)


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Iterable[str]) -> torch.Tensor:
    """Return embeddings (N, L, D) of N prompts in the text encoder's dtype (see `text.embed`)."""
    return embed(pipe.tokenizer, pipe.text_encoder, prompts)


class PromptEmbeddings:
    """Cache of prompt embeddings.

    Each prompt is encoded alone: in a batch the last bits would depend on its neighbours, and a resumed run, which
    encodes the prompts in another order, would differ from an uninterrupted one.
    """

    def __init__(self, pipe: StableDiffusionPipeline):
        self._pipe = pipe
        self._embeddings: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Iterable[str]) -> torch.Tensor:
        """Return embeddings (N, L, D) of N prompts."""
        return torch.stack([self._embedding(prompt) for prompt in prompts])

    @property
    def negative(self) -> torch.Tensor:
        """Return the embedding (1, L, D) of the empty prompt, for the unconditional side of guidance."""
        return self._embedding("")[None]

    def precompute(self, prompts: Iterable[str]) -> None:
        """Embed these and the empty prompt, then drop the text encoder: any other prompt raises KeyError.

        Warns of truncated prompts (see `check_tokens`).
        """
        prompts = list(dict.fromkeys(prompts))
        check_tokens(self._pipe.tokenizer, prompts)
        for prompt in ("", *prompts):
            self._embedding(prompt)
        self._pipe.text_encoder = None

    def _embedding(self, prompt: str) -> torch.Tensor:
        if prompt not in self._embeddings:
            if self._pipe.text_encoder is None:
                raise KeyError(f"{prompt!r} was not precomputed, and the text encoder is gone")
            self._embeddings[prompt] = encode_prompts(self._pipe, [prompt])[0]
        return self._embeddings[prompt]


def guided_noise_prediction(
    unet: nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    guidance_scale: float,
) -> torch.Tensor:
    """Predict noise with classifier-free guidance: e(neg) + w (e(prompt) - e(neg)), Ho and Salimans 2022, eq. 6.

    Rollout and update both use this function, so that their arithmetic is the same and the PPO ratio before the first
    update is exactly 1.

    Args:
        unet: the UNet, wrapped (DDP, autocast) or not.
        latents: (B, C, H, W).
        timesteps: int, 0-d or (B,).
        prompt_embeds: (B, L, D).
        negative_prompt_embeds: (1, L, D) or (B, L, D); may be None if guidance_scale <= 1.
        guidance_scale: weight w; 1 or less uses the prompt alone, at half the cost.

    Returns:
        (B, C, H, W) in float32, in which the small difference of the two predictions is taken.
    """
    batch = latents.shape[0]
    dtype = next(unet.parameters()).dtype
    timesteps = torch.as_tensor(timesteps, device=latents.device).expand(batch)
    latents, prompt_embeds = latents.to(dtype), prompt_embeds.to(dtype)
    if guidance_scale <= 1:
        return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0].float()
    if negative_prompt_embeds is None:
        raise ValueError(f"guidance_scale is {guidance_scale}; guidance above 1 needs negative_prompt_embeds")

    negative = negative_prompt_embeds.to(dtype).expand(batch, -1, -1)
    both = unet(  # (2B, C, H, W): one pass for both predictions
        torch.cat([latents, latents]),
        torch.cat([timesteps, timesteps]),
        encoder_hidden_states=torch.cat([negative, prompt_embeds]),
        return_dict=False,
    )[0]
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


@torch.no_grad()
def decode_latents(pipe: StableDiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1]."""
    scaled = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(scaled, return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def set_schedule(pipe: StableDiffusionPipeline, num_steps: int) -> None:
    """Set the number of DDIM steps. Raises UserError outside 1 ... the schedule's training timesteps."""
    longest = pipe.scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= longest:
        raise UserError(f"sample.num_steps is {num_steps}; this model's schedule allows 1 to {longest}")
    pipe.scheduler.set_timesteps(num_steps, device=pipe.device)


def latent_shape(pipe: StableDiffusionPipeline) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of one image's latents at the UNet's own resolution."""
    config = getattr(pipe.unet, "module", pipe.unet).config  # .module: of DistributedDataParallel
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width

"""Stable Diffusion: strict loading, saving, prompt embeddings, guided noise prediction, decoding.

A UNet trained with CLIP accepts BERT's embeddings, which have the same width, and draws meaningless images. A model
with BERT therefore has conditioning.json next to model_index.json, with hashes of UNet, text encoder and tokenizer;
separate UNet weights name their text encoder in their metadata, a loaded UNet has its name as attribute `KEY`.
"""

import copy
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig

from ddpo_pytorch.generator.parts import check_fit, check_tokenizer, check_tokenizer_files, load_part, quiet
from ddpo_pytorch.generator.text import check_tokens, embed, has_mask, load_encoder, load_text_encoder, mask_padding
from ddpo_pytorch.utils.distributed import load_weights_into
from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import room_for, sha256, write_json
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import COUNT, read_json
from ddpo_pytorch.utils.weights import check_finite, read_safetensors

logger = logging.getLogger(__name__)
# mirrors of ids that left the hub
MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
RECORD = "conditioning.json"
KEY = "text_encoder_sha256"
SCHEDULE = {"num_train_timesteps": COUNT, "beta_start": float, "beta_end": float, "beta_schedule": str}
DECODED_AT_ONCE = 4 * 64 * 64  # in latent pixels: SD's autoencoder takes 2.5 GiB for 4 images of 512 px under autocast


def load_pipeline(
    model: str | Path,
    revision: str = "main",
    unet_path: str | Path = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Load Stable Diffusion in diffusers format with DDIM sampling, frozen and in evaluation mode.

    The safety checker is off: it misfires on medical images, and its black images would corrupt rewards and metrics.
    The DDIM scheduler keeps the model's own betas, prediction type and offsets. Raises UserError if there is no such
    model, a part is incomplete (see `load_part`), or parts or the UNet file do not match.

    Args:
        model, revision: local folder, or Hugging Face id and its branch, tag or commit.
        unet_path: safetensors file in diffusers names that replaces the UNet's weights; "" keeps the model's own.
        dtype: of VAE, text encoder and UNet.
    """
    pipe = _from_pretrained(str(model), revision, dtype)
    check_tokenizer(pipe.tokenizer, pipe.text_encoder, str(model))
    width, expected = pipe.text_encoder.config.hidden_size, pipe.unet.config.cross_attention_dim
    if width != expected:
        raise UserError(f"{model}: the UNet expects embeddings of width {expected}, the text encoder has {width}")
    if unet_path:
        replace_unet_weights(pipe.unet, unet_path, required=True)
        check_finite(pipe.unet.state_dict(), unet_path)  # its dtype may be narrower than the file's
    mask_padding(pipe.unet, pipe.text_encoder)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval().to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # saves a transfer at each step
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: a bar on terminals only
    return pipe


def _from_pretrained(model: str, revision: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    if model in MIRRORS:
        logger.warning("%s left the Hugging Face hub; loading its mirror %s", model, MIRRORS[model])
        model = MIRRORS[model]
    folder = Path(model).expanduser()
    if not (local := folder.is_dir()):
        try:
            if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
                raise ValueError(f"{model} is not a Hugging Face id")
            AutoConfig.from_pretrained(model, subfolder="text_encoder", revision=revision, trust_remote_code=False)
            with quiet():  # no retry warnings while offline
                folder = Path(StableDiffusionPipeline.download(model, revision=revision, safety_checker=None))
        except (OSError, ValueError) as error:
            raise UserError(f"model {model} is neither a local folder nor reachable on the hub; check both") from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{model} has no model_index.json; expected a Stable Diffusion folder in diffusers format")
    check_tokenizer_files(folder / "tokenizer")
    if (schedule := folder / "scheduler" / "scheduler_config.json").is_file():  # else diffusers names it
        # diffusers would fill in what is missing, with other noise
        read_json(schedule, SCHEDULE, "save or fetch the whole model again")
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    parts = {name: load_part(kind, folder, name, dtype) for name, kind in kinds.items()}
    try:
        parts["text_encoder"] = load_encoder(str(folder), "text_encoder", dtype)
        with quiet():  # diffusers warns of text encoders other than CLIP
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, safety_checker=None, requires_safety_checker=False, **parts
            )
    except UserError:
        raise
    except Exception as error:  # the JSON files of scheduler and tokenizer may hold anything
        problem = f"text_encoder, tokenizer or scheduler cannot be loaded ({one_line(error)})"
        raise UserError(f"{model}: {problem}; save or fetch the whole model again") from error
    if has_mask(pipe.text_encoder) and local:
        record, files = _read_record(folder), _hashes(folder)
        for name, expected in record["files"].items():
            if files.get(name) != expected:
                raise UserError(f"{str(folder / name)!r} is missing or does not match {RECORD}; copy the folder again")
        setattr(pipe.unet, KEY, record[KEY])
    elif has_mask(pipe.text_encoder):
        setattr(pipe.unet, KEY, fingerprint(pipe.text_encoder))
    return pipe


def replace_unet_weights(unet: nn.Module, path: str | Path, required: bool = False) -> None:
    """Replace the weights of a UNet, sharded or not, by a safetensors file's. Raises UserError if it does not fit.

    Its metadata must not name another text encoder or, if `required`, omit a BERT.
    """
    path = Path(path).expanduser()
    weights, metadata = read_safetensors(path)
    check_fit(weights, unet.state_dict(), path, "give a safetensors file of the same UNet in diffusers' names")
    stated, own = metadata.get(KEY), getattr(unet, KEY, None)
    if stated != own and (stated or required):
        theirs, ours = (f"BERT {one[:12]}" if one else "CLIP (or one not recorded)" for one in (stated, own))
        problem = f"UNet weights {str(path)!r} are for text encoder {theirs}, the model has {ours}"
        raise UserError(f"{problem}; give the model that they were trained with as pretrained.model")
    load_weights_into(unet, weights)


def unet_metadata(unet: nn.Module) -> dict[str, str]:
    """Return metadata for a file of this UNet's weights: one entry, since safetensors writes several in any order."""
    return {KEY: getattr(unet, KEY)} if getattr(unet, KEY, None) else {"format": "pt"}


def save_model(pipe: StableDiffusionPipeline, folder: str | Path) -> None:
    """Write the pipeline in diffusers format, with conditioning.json (last) for a BERT. Raises DiskFull."""
    folder = Path(folder)
    with room_for(folder / "model_index.json"):
        pipe.save_pretrained(folder)
    if has_mask(pipe.text_encoder):
        # a frozen one keeps its name, although it may be saved in another dtype
        trained = any(weight.requires_grad for weight in pipe.text_encoder.parameters())
        own = "" if trained else getattr(pipe.unet, KEY, "")
        setattr(pipe.unet, KEY, own or fingerprint(pipe.text_encoder))
        record = {KEY: getattr(pipe.unet, KEY), "tokens": pipe.tokenizer.model_max_length}
        write_json(folder / RECORD, record | {"files": _hashes(folder)})


def with_bert(pipe: StableDiffusionPipeline, model: str | Path, tokens: int) -> StableDiffusionPipeline:
    """Return the pipeline with `model` (see `load_text_encoder`), a BERT of the UNet's width, as its text encoder."""
    tokenizer, encoder = load_text_encoder(model, tokens, pipe.device)
    width, expected = encoder.config.hidden_size, pipe.unet.config.cross_attention_dim
    if not has_mask(encoder) or width != expected:
        found = f"a BERT of width {width}" if has_mask(encoder) else "no BERT"
        raise UserError(f"sd.bert {str(model)!r} is {found}; give one of width {expected}, or sd.text_encoder=clip")
    parts = pipe.components | {"tokenizer": tokenizer, "text_encoder": encoder.to(pipe.text_encoder.dtype)}
    mask_padding(pipe.unet, encoder)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _read_record(folder: Path) -> dict:
    try:
        return read_json(folder / RECORD, {KEY: str, "files": {str: str}})
    except (OSError, UserError) as error:
        raise UserError(f"{str(folder)!r} has a BERT but no readable {RECORD}; copy the whole folder again") from error


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the recorded parts' files, by path relative to the folder."""
    paths = sorted(path for part in ("unet", "text_encoder", "tokenizer") for path in (folder / part).glob("*"))
    return {str(path.relative_to(folder)): sha256(path) for path in paths if path.is_file()}


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Iterable[str]) -> torch.Tensor:
    """Return embeddings (N, L, D) of N prompts in the text encoder's dtype."""
    return embed(pipe.tokenizer, pipe.text_encoder, prompts)


class PromptEmbeddings:
    """Cache of prompt embeddings, each encoded on its own: in a batch, its last bits would depend on the others.

    A resumed run, which encodes prompts in another order, would then differ from an uninterrupted one.
    """

    def __init__(self, pipe: StableDiffusionPipeline):
        self._pipe = pipe
        self._embeddings: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Iterable[str]) -> torch.Tensor:
        """Return embeddings (N, L, D) of N prompts. Raises UserError for one that was not given to `precompute`."""
        prompts = list(prompts)
        for prompt in prompts:
            if prompt not in self._embeddings:
                if self._pipe.text_encoder is None:
                    raise UserError(f"{prompt!r} is not in the list of prompts; add it to PROMPT_LISTS")
                self._embeddings[prompt] = encode_prompts(self._pipe, [prompt])[0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    @property
    def negative(self) -> torch.Tensor:
        """Return the embedding (1, L, D) of the empty prompt, for the unconditional side of guidance."""
        return self([""])

    def precompute(self, prompts: Iterable[str]) -> None:
        """Check and embed these and the empty prompt, then drop the text encoder."""
        prompts = list(dict.fromkeys(prompts))
        check_tokens(self._pipe.tokenizer, prompts)
        for prompt in ("", *prompts):
            self([prompt])
        self._pipe.text_encoder = None


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
    update is exactly 1. Returns (B, C, H, W) in float32, since the difference of the two predictions is small.

    Args:
        unet: the UNet, wrapped (DDP, autocast) or not.
        latents: (B, C, H, W).
        timesteps: int, 0-d or (B,).
        prompt_embeds: (B, L, D).
        negative_prompt_embeds: (1, L, D) or (B, L, D); may be None if guidance_scale <= 1.
        guidance_scale: weight w; 1 or less uses the prompt alone, at half the cost.
    """
    batch, dtype = len(latents), next(unet.parameters()).dtype
    timesteps = torch.as_tensor(timesteps, device=latents.device).expand(batch)
    latents, prompt_embeds = latents.to(dtype), prompt_embeds.to(dtype)
    if guidance_scale <= 1:
        return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0].float()
    if negative_prompt_embeds is None:
        raise ValueError(f"guidance_scale is {guidance_scale}; guidance above 1 needs negative_prompt_embeds")
    negative = negative_prompt_embeds.to(dtype).expand(batch, -1, -1)
    inputs = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
    embeds = torch.cat([negative, prompt_embeds])
    both = unet(*inputs, encoder_hidden_states=embeds, return_dict=False)[0]  # (2B, C, H, W): one pass for both
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1], a few at a time to limit memory."""
    scaled, (height, width) = latents.to(vae.dtype) / vae.config.scaling_factor, latents.shape[-2:]
    parts = scaled.split(max(DECODED_AT_ONCE // (height * width), 1))
    decoded = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def finite_images(vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) of latents (B, C, h, w), decoded in float32 if half precision overflowed."""
    if images.isfinite().all():  # waits for the device
        return images
    with torch.autocast(images.device.type, enabled=False):
        return decode_latents(copy.deepcopy(vae).float(), latents)  # a copy: another thread may be decoding


def set_schedule(pipe: StableDiffusionPipeline, num_steps: int) -> None:
    """Set the number of DDIM steps. Raises UserError unless all of them are among the schedule's training timesteps."""
    config = pipe.scheduler.config
    longest = config.num_train_timesteps - config.steps_offset  # which is added to every timestep
    if not 1 <= num_steps <= longest:
        raise UserError(f"sample.num_steps is {num_steps}; this model's schedule allows 1 to {longest}")
    pipe.scheduler.set_timesteps(num_steps, device=pipe.device)


def latent_shape(pipe: StableDiffusionPipeline) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of one image's latents at the UNet's own resolution."""
    config = getattr(pipe.unet, "module", pipe.unet).config  # .module: of DistributedDataParallel
    size = config.sample_size
    return config.in_channels, *((size, size) if isinstance(size, int) else size)


def image_size(pipe: StableDiffusionPipeline) -> tuple[int, int]:
    """Return height and width in pixels of the images at the UNet's own resolution."""
    _, height, width = latent_shape(pipe)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor

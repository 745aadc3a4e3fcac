"""Text to image as in diffusers, returning the denoising trajectory and the log-probability of each step.

The last step of schedules with set_alpha_to_one=True (not SD 1.5's) is not that of diffusers: as in the official code,
it goes to the schedule's first alpha, so that it has a density.
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import Generators, ddim_step_with_logprob
from ddpo_pytorch.generator.pipeline import decode_latents, encode_prompts, guided_noise_prediction, image_size

OUTPUT_TYPES = ("pt", "np", "pil", "latent")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, those of `config.sample` by `of`."""

    num_steps: int
    guidance_scale: float
    eta: float

    @classmethod
    def of(cls, sample: ConfigDict) -> "Sampling":
        return cls(sample.num_steps, sample.guidance_scale, sample.eta)


class GradMode:
    """Consumer of log-prob gradients during sampling; this one enables gradients at every step but takes none."""

    def wants(self, step: int) -> bool:
        """Return whether step `step` (0 starts from noise) must be sampled with gradients enabled."""
        return True

    def take(self, log_probs: torch.Tensor) -> None:
        """Take the gradients of a step's log-probs (B,), whose graph is freed afterwards."""


@torch.no_grad()
def pipeline_with_logprob(
    pipeline: StableDiffusionPipeline,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    eta: float = 0.0,
    generator: Generators = None,
    latents: torch.Tensor | None = None,
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    output_type: str = "pt",
    keep_trajectory: bool = True,
    gradients: GradMode | None = None,
) -> tuple[torch.Tensor | list, None, list[torch.Tensor], list[torch.Tensor | None]]:
    """Generate images in T = num_inference_steps DDIM steps; return them with the trajectory and its log-probs.

    Latents have the dtype of the prompt embeddings. They are rounded to it before log-probs are computed, so that
    scoring the stored latents later gives the same log-probs.

    Args (the others are those of diffusers' pipeline):
        prompt, prompt_embeds: exactly one of text and embeddings (B, L, D).
        guidance_scale: weight of classifier-free guidance; 1 or less disables it.
        negative_prompt, negative_prompt_embeds: at most one; default: the empty prompt. A single one is broadcast to B.
        output_type: "pt" (float32 tensor (B, 3, H, W) in [0, 1]), "np", "pil", or "latent".
        keep_trajectory: False returns empty lists of latents and log-probs.
        gradients: receives log-probs with their graph.

    Returns:
        images; None (there is no safety checker); T + 1 latents (B, C, h, w), from noise to image; T log-probs (B,),
        each None where eta is 0.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; it can be one of {', '.join(OUTPUT_TYPES)}")
    channels, default = pipeline.unet.config.in_channels, image_size(pipeline)
    size = height or default[0], width or default[1]
    if negative_prompt_embeds is not None and prompt_embeds is not None:
        negative_prompt_embeds = negative_prompt_embeds.expand_as(prompt_embeds)
    pipeline.check_inputs(prompt, *size, None, negative_prompt, prompt_embeds, negative_prompt_embeds)
    if prompt_embeds is None:
        prompt_embeds = encode_prompts(pipeline, [prompt] if isinstance(prompt, str) else prompt)  # (B, L, D)
    if guidance_scale > 1 and negative_prompt_embeds is None:
        negative = negative_prompt or ""
        negative_prompt_embeds = encode_prompts(pipeline, [negative] if isinstance(negative, str) else negative)

    batch, device, scheduler = len(prompt_embeds), prompt_embeds.device, pipeline.scheduler
    # drawn in float32, so that a seed gives the same noise in every dtype
    latents = pipeline.prepare_latents(batch, channels, *size, torch.float32, device, generator, latents)
    latents = latents.to(prompt_embeds.dtype)  # (B, C, h, w)
    if (scheduler.num_inference_steps, scheduler.timesteps.device) != (num_inference_steps, device):
        scheduler.set_timesteps(num_inference_steps, device=device)  # waits for the device

    all_latents, all_log_probs = [latents], []
    for step, timestep in enumerate(pipeline.progress_bar(scheduler.timesteps)):  # T, from noise to image
        wanted = gradients is not None and gradients.wants(step)
        with torch.set_grad_enabled(wanted):
            noise_prediction = guided_noise_prediction(  # (B, C, h, w) float32
                pipeline.unet, latents, timestep, prompt_embeds, negative_prompt_embeds, guidance_scale
            )
            latents, log_prob = ddim_step_with_logprob(scheduler, noise_prediction, timestep, latents, eta, generator)
            if wanted:
                gradients.take(log_prob)
                latents, log_prob = latents.detach(), log_prob.detach()
            del noise_prediction  # frees the graph before the next pass
        if keep_trajectory:
            all_latents.append(latents)
            all_log_probs.append(log_prob)

    images = latents if output_type == "latent" else decode_latents(pipeline.vae, latents)  # (B, 3, H, W) in [0, 1]
    images = pipeline.image_processor.postprocess(images, output_type, do_denormalize=[False] * batch)
    return images, None, all_latents if keep_trajectory else [], all_log_probs

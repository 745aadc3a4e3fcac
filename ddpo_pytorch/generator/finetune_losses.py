"""Losses of stage (i), the autoencoder's and the diffusion model's, with all random numbers from `BatchDraws`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import nn

from ddpo_pytorch.generator.latents import sample_posterior
from ddpo_pytorch.generator.pipeline import encode_prompts
from ddpo_pytorch.generator.text import encode_tokens, tokenize
from ddpo_pytorch.utils.randomness import BatchDraws


class AutoencoderLoss(nn.Module):
    """L1 plus twice the mean squared error, as L1 alone is slow to notice hairs and ruler ticks, plus weighted KL."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the scalar loss of a batch (uint8 images (B, 3, H, W), ...)."""
        images = batch[0].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        noise = draws.normal(*posterior.mean.shape[1:])
        reconstruction = self.vae.decode(sample_posterior(posterior.mean, posterior.logvar, noise)).sample
        error = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return error + self.kl_weight * posterior.kl().mean()


class CaptionTable(nn.Module):
    """Prompt embeddings (B, L, D) by caption number (B,); number len(captions) is the empty caption.

    A frozen text encoder embeds every caption once and is not needed again. A trained one is part of this module.
    """

    def __init__(self, pipe: StableDiffusionPipeline, captions: Sequence[str], trained: bool):
        super().__init__()
        self.empty, texts = len(captions), [*captions, ""]
        self.text_encoder = pipe.text_encoder if trained else None
        table = tokenize(pipe.tokenizer, texts) if trained else encode_prompts(pipe, texts)
        self.register_buffer("table", table, persistent=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = self.table[numbers]
        return encode_tokens(self.text_encoder, rows) if self.text_encoder else rows


class NoiseLoss(nn.Module):
    """Mean squared error of the UNet's prediction (Ho et al. 2020): the noise, or whatever the schedule predicts.

    With `min_snr_gamma` > 0, samples are weighted in training mode as by Hang et al. 2023: min(snr, gamma) / snr for
    noise prediction, / (snr + 1) for velocity, / 1 for the sample itself. Evaluation is unweighted, so that validation
    losses of different weightings compare.
    """

    def __init__(self, pipe: StableDiffusionPipeline, captions: CaptionTable, caption_dropout=0.0, min_snr_gamma=0.0):
        super().__init__()
        self.unet, self.captions = pipe.unet, captions
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.scaling_factor = pipe.vae.config.scaling_factor
        self.caption_dropout, self.min_snr_gamma = caption_dropout, min_snr_gamma

    def forward(self, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the scalar loss of a batch (mean, logvar (B, C, h, w), caption number (B,), optional weight (B,)).

        In training mode, captions are dropped with probability `caption_dropout`: guidance needs a model without.
        """
        mean, logvar, numbers, *weights = batch
        latents = sample_posterior(mean, logvar, draws.normal(*mean.shape[1:])) * self.scaling_factor
        noise, timesteps = draws.normal(*mean.shape[1:]), draws.integers(self.schedule.config.num_train_timesteps)
        if self.training:
            numbers = torch.where(draws.uniform() < self.caption_dropout, self.captions.empty, numbers)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, self.captions(numbers)).sample
        target = {"epsilon": noise, "sample": latents}.get(self.schedule.config.prediction_type)
        if target is None:
            target = self.schedule.get_velocity(latents, noise, timesteps)
        errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
        if self.training and self.min_snr_gamma > 0:
            snr = compute_snr(self.schedule, timesteps)  # alpha_bar / (1 - alpha_bar)
            divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
            errors = errors * (snr.clamp(max=self.min_snr_gamma) / divisor[self.schedule.config.prediction_type])
        for weight in weights:
            errors = errors * weight
        return errors.mean()

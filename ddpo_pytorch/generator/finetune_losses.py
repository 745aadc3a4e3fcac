"""Losses of stage (i), the autoencoder's and the diffusion model's, with all random numbers passed in."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import nn

from ddpo_pytorch.generator.latents import sample_posterior
from ddpo_pytorch.generator.pipeline import encode_prompts
from ddpo_pytorch.generator.text import encode_tokens, tokenize
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import BatchDraws


class AutoencoderLoss(nn.Module):
    """Reconstruction error plus weighted KL of the posterior.

    The error is L1 plus twice the mean square: L1 alone is slow to notice hairs and ruler ticks, which are few pixels.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of images (B, 3, H, W) in [-1, 1], with standard normal noise (B, C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        reconstruction = self.vae.decode(sample_posterior(posterior.mean, posterior.logvar, noise)).sample
        error = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return error + self.kl_weight * posterior.kl().mean()

    def batch_loss(self, model: nn.Module, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the loss of a batch (uint8 images, ...) by `model`, which is this module or its DDP wrapper."""
        images = batch[0].float() / 127.5 - 1
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = images.shape[-2] // factor, images.shape[-1] // factor
        return model(images, draws.normal(self.vae.config.latent_channels, height, width))


class CaptionTable(nn.Module):
    """Prompt embeddings (B, L, D) by caption number (B,); number len(captions) is the empty caption.

    A frozen text encoder embeds every caption once and is not needed again. A trained one is part of this module.
    """

    def __init__(self, pipe: StableDiffusionPipeline, captions: Sequence[str], trained: bool):
        super().__init__()
        self.empty = len(captions)
        self.text_encoder = pipe.text_encoder if trained else None
        if trained:
            self.register_buffer("tokens", tokenize(pipe.tokenizer, [*captions, ""]), persistent=False)
        else:
            self.register_buffer("embeddings", encode_prompts(pipe, [*captions, ""]), persistent=False)

    def digest(self) -> str:
        """Return a hash of the frozen embeddings, or of the tokens for a trained text encoder."""
        return fingerprint({"table": self.tokens if self.text_encoder else self.embeddings})

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.text_encoder is None:
            return self.embeddings[numbers]
        return encode_tokens(self.text_encoder, self.tokens[numbers])


class NoiseLoss(nn.Module):
    """Mean squared error of the UNet's prediction (Ho et al. 2020): the noise, or whatever the schedule predicts.

    With `min_snr_gamma` > 0, samples are weighted in training mode as by Hang et al. 2023: min(snr, gamma) / snr for
    noise prediction, / (snr + 1) for velocity, / 1 for the sample itself. Evaluation is unweighted, so that validation
    losses of different weightings compare.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        captions: CaptionTable,
        caption_dropout: float = 0.0,
        min_snr_gamma: float = 0.0,
    ):
        super().__init__()
        self.unet, self.captions = pipe.unet, captions
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.scaling_factor = pipe.vae.config.scaling_factor
        self.caption_dropout, self.min_snr_gamma = caption_dropout, min_snr_gamma

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        caption_numbers: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the scalar loss of scaled latents and noise (B, C, h, w), with the other arguments (B,)."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, self.captions(caption_numbers)).sample
        target = {"epsilon": noise, "sample": latents}.get(self.schedule.config.prediction_type)
        if target is None:
            target = self.schedule.get_velocity(latents, noise, timesteps)
        errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
        if self.training and self.min_snr_gamma > 0:
            errors = errors * min_snr_weights(self.schedule, timesteps, self.min_snr_gamma)
        if weights is not None:
            errors = errors * weights
        return errors.mean()

    def batch_loss(self, model: nn.Module, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the loss of a batch (mean, logvar, caption number, optional weight) by `model`, as above.

        In training mode, captions are dropped with probability `caption_dropout`: guidance needs a model without.
        """
        mean, logvar, numbers, *weights = batch
        latents = sample_posterior(mean, logvar, draws.normal(*mean.shape[1:])) * self.scaling_factor
        noise, timesteps = draws.normal(*mean.shape[1:]), draws.integers(self.schedule.config.num_train_timesteps)
        if self.training:
            numbers = torch.where(draws.uniform() < self.caption_dropout, self.captions.empty, numbers)
        return model(latents, noise, timesteps, numbers, *weights)


def min_snr_weights(schedule: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return weights (B,) of the squared error at timesteps (B,); snr = alpha_bar / (1 - alpha_bar)."""
    snr = compute_snr(schedule, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisor[schedule.config.prediction_type]

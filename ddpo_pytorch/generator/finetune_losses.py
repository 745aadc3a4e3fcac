"""Losses of stage (i), for autoencoder and diffusion model; all random numbers come from `BatchDraws`."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import nn
from torch.func import functional_call

from ddpo_pytorch.generator.latents import sample_posterior
from ddpo_pytorch.generator.parts import check_fit
from ddpo_pytorch.generator.pipeline import encode_prompts
from ddpo_pytorch.generator.text import encode_tokens, tokenize
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import BatchDraws
from ddpo_pytorch.utils.weights import read_tensors


class PerceptualDistance(nn.Module):
    """Distance of images in the features of a frozen ImageNet network: LPIPS (Zhang et al. 2018) with equal weights.

    `network` is a timm model, whose weights are downloaded, or a weight file named after one. Raises UserError for
    weights that cannot be downloaded, and for a file of another model.
    """

    def __init__(self, network: str):
        super().__init__()
        path, advice = Path(network), "give a timm model, or a file named after one such as resnet18.safetensors"
        name = path.stem if path.is_file() else network
        if not timm.is_model(name):
            raise UserError(f"sd.perceptual_net is {network!r}; {advice}")
        try:
            self.network = timm.create_model(name, pretrained=not path.is_file(), num_classes=0)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"weights of sd.perceptual_net={network!r} cannot be fetched; give a file") from error
        if path.is_file():
            expected, weights = self.network.state_dict(), read_tensors(path)[0]
            check_fit({key: weights[key] for key in weights.keys() & expected.keys()}, expected, path, advice)
            self.network.load_state_dict(weights, strict=False)
        self.requires_grad_(False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.network.pretrained_cfg[key]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)  # batch norm keeps the statistics of ImageNet

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return the mean distance of two batches (B, 3, H, W) in [-1, 1], summed over depths."""
        options = {"indices": (0, 1, 2, 3), "intermediates_only": True, "stop_early": True}  # to 1/16 of the side
        normalised = [(batch / 2 + 0.5 - self.mean) / self.std for batch in (images, others)]
        pairs = zip(*(self.network.forward_intermediates(batch, **options) for batch in normalised), strict=True)
        return sum((F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean() for a, b in pairs)


class PatchDiscriminator(nn.Sequential):
    """Realism of patches, (B, 3, H, W) to (B, 1, H / 8 - 2, W / 8 - 2): PatchGAN of 3 layers (Isola et al. 2017)."""

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for channels, stride in ((64, 2), (128, 2), (256, 1)):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride, 1)]
            # not batch norm, which would depend on the number of processes
            layers += [nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(512, 1, 4, 1, 1))


class AutoencoderLoss(nn.Module):
    """L1 plus twice the mean squared error, as L1 alone is slow to learn hairs and ruler ticks, plus weighted KL.

    Training uses random crops of `crop` pixels, 0: whole images. `PerceptualDistance` by `perceptual_net` is added with
    weight `perceptual_coef`. With `adversarial_coef` above 0, the encoder is frozen, and the decoder is also trained
    against a discriminator that learns along with it (hinge loss). As in latent diffusion (Rombach et al. 2022), that
    loss is scaled so that the norm of its gradient at the decoder's last layer is this share of the other losses'.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        kl_weight: float,
        crop: int = 0,
        perceptual_net: str = "",
        perceptual_coef: float = 0.0,
        adversarial_coef: float = 0.0,
    ):
        super().__init__()
        self.vae, self.kl_weight, self.crop = vae, kl_weight, crop
        self.perceptual_coef, self.adversarial_coef = perceptual_coef, adversarial_coef
        self.perceptual = PerceptualDistance(perceptual_net) if perceptual_coef else None
        self.discriminator = PatchDiscriminator() if adversarial_coef else None
        if adversarial_coef:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)

    def forward(self, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the scalar loss of a batch (uint8 images (B, 3, H, W), ...).

        In evaluation mode return (2,): that of whole images without the adversarial part, and the mean PSNR in dB.
        """
        images = batch[0].float() / 127.5 - 1
        if self.training and self.crop:
            images = self._cut(images, draws)
        posterior = self.vae.encode(images).latent_dist
        noise = draws.normal(*posterior.mean.shape[1:])
        reconstruction = self.vae.decode(sample_posterior(posterior.mean, posterior.logvar, noise)).sample
        error = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        if self.perceptual:
            error = error + self.perceptual_coef * self.perceptual(reconstruction, images)
        loss = error + self.kl_weight * posterior.kl().mean()
        if not self.training:
            errors = (reconstruction.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
            return torch.stack([loss, 10 * torch.log10(4 / errors).mean()])  # 4: the square of the range
        return loss + self._adversarial(images, reconstruction, error) if self.discriminator else loss

    def _cut(self, images: torch.Tensor, draws: BatchDraws) -> torch.Tensor:
        room = [side - self.crop + 1 for side in images.shape[-2:]]
        corners = zip(*((draws.uniform() * places).long().tolist() for places in room), strict=True)
        size = self.crop
        return torch.stack([x[:, i : i + size, j : j + size] for x, (i, j) in zip(images, corners, strict=True)])

    def _adversarial(self, images: torch.Tensor, reconstruction: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Return the sum of decoder and discriminator loss, each of which has gradients for its own weights only."""
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        fooled = -functional_call(self.discriminator, frozen, reconstruction).mean()
        last = self.vae.decoder.conv_out.weight
        gradients = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (error, fooled)]
        wanted, given = reduce(torch.stack(gradients), "mean").flatten(1).norm(dim=1)
        scale = (wanted / (given + 1e-4)).clamp(max=1e4)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return self.adversarial_coef * scale * fooled + hinge


class CaptionTable(nn.Module):
    """Table of prompt embeddings (B, L, D) by caption number (B,), of which `empty` is the empty caption's."""

    def __init__(self, pipe: StableDiffusionPipeline, captions: Sequence[str], trained: bool):
        super().__init__()
        self.empty, texts = len(captions), [*captions, ""]
        self.text_encoder = pipe.text_encoder if trained else None
        table = tokenize(pipe.tokenizer, texts) if trained else encode_prompts(pipe, texts)
        self.register_buffer("table", table, persistent=False)

    def train(self, mode: bool = True) -> "CaptionTable":
        return super().train(False)  # a published BERT's dropout would draw from global random state

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = self.table[numbers]
        return encode_tokens(self.text_encoder, rows) if self.text_encoder else rows


class NoiseLoss(nn.Module):
    """Mean squared error of the UNet's prediction (Ho et al. 2020): the noise, or whatever the schedule predicts.

    With `min_snr_gamma` > 0, samples are weighted in training mode as by Hang et al. 2023: min(snr, gamma) / snr for
    noise prediction, / (snr + 1) for velocity, / 1 for the sample itself. Evaluation is unweighted, so that validation
    losses of different weightings are comparable.
    """

    def __init__(self, pipe: StableDiffusionPipeline, captions: CaptionTable, caption_dropout=0.0, min_snr_gamma=0.0):
        super().__init__()
        self.unet, self.captions = pipe.unet, captions
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.scaling_factor = pipe.vae.config.scaling_factor
        self.caption_dropout, self.min_snr_gamma = caption_dropout, min_snr_gamma

    def forward(self, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the scalar loss of a batch (mean, logvar (B, C, h, w), caption number (B,), optional weight (B,))."""
        return self.errors(batch, draws).mean()

    def errors(self, batch: Sequence[torch.Tensor], draws: BatchDraws) -> torch.Tensor:
        """Return the loss (B,) of each image; captions dropped in training mode train the unconditional model."""
        mean, logvar, numbers, *weights = batch
        latents = sample_posterior(mean, logvar, draws.normal(*mean.shape[1:])) * self.scaling_factor
        noise, timesteps = draws.normal(*mean.shape[1:]), draws.integers(self.schedule.config.num_train_timesteps)
        if self.training:
            numbers = torch.where(draws.uniform() < self.caption_dropout, self.captions.empty, numbers)
        noisy = self.schedule.add_noise(latents, noise, timesteps).to(next(self.unet.parameters()).dtype)
        prediction = self.unet(noisy, timesteps, self.captions(numbers), return_dict=False)[0]
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
        return errors

"""Diffusion loss on real images, which keeps a policy near them where the reward is blind (DDRL, arXiv 2512.04332)."""

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict
from torch.utils.data import default_collate

from ddpo_pytorch.generator.finetune_losses import CaptionTable, NoiseLoss
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.pipeline import latent_shape
from ddpo_pytorch.utils.distributed import to_device
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import BatchDraws, Stream, derived_seed, generator_of


class DataLoss:
    """Diffusion loss of random batches of the latents in `train.data_latents`, as large as those of the policy loss.

    Raises UserError as `LatentShards` does, and for latents of another autoencoder.
    """

    def __init__(self, accelerator: Accelerator, config: ConfigDict, pipe: StableDiffusionPipeline):
        self.accelerator, self.seed, train = accelerator, config.seed, config.train
        self.share = accelerator.process_index, accelerator.num_processes
        self.rows, self.latents = train.batch_size * train.timesteps_per_forward, LatentShards(train.data_latents)
        made = self.latents.shape, self.latents.index.get("scaling_factor")
        if made != (expected := (latent_shape(pipe), pipe.vae.config.scaling_factor)):
            raise UserError(f"train.data_latents have shape and scale {made}, the model {expected}; extract them again")
        table = CaptionTable(pipe, self.latents.captions, trained=False)
        self.loss = NoiseLoss(pipe, table, config.sd.caption_dropout)

    def __call__(self, *progress: int) -> torch.Tensor:
        """Return the scalar loss of a batch that depends on the seed and `progress` alone."""
        rank, processes, device = *self.share, self.accelerator.device
        # on the CPU, so that nothing waits for the device
        generator = generator_of(self.seed, Stream.DATA, *progress)
        chosen = torch.randint(len(self.latents), (processes, self.rows), generator=generator)[rank].tolist()
        batch = [to_device(part, device) for part in default_collate([self.latents[row] for row in chosen])]
        number = derived_seed(self.seed, Stream.DATA, *progress)
        draws = BatchDraws(self.seed, Stream.DATA, number, self.rows, *self.share, device=device)
        with self.accelerator.autocast():
            return self.loss(batch, draws)

"""Estimated duration of an epoch, logged before the first one."""

import math
import time
from datetime import timedelta

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.generator.pipeline import PromptEmbeddings, guided_noise_prediction, latent_shape
from ddpo_pytorch.training.rollout_gradients import RolloutGradients
from ddpo_pytorch.training.setup import BatchSizes

# Duration of a training step's forward and backward pass in UNet passes, measured: with LoRA, of the whole UNet.
TRAINING_PASSES = {True: 2, False: 3}


def epoch_time(
    pipe: StableDiffusionPipeline,
    table: PromptEmbeddings,
    config: ConfigDict,
    sizes: BatchSizes,
    gradients: RolloutGradients | None,
) -> str:
    """Return hours:minutes:seconds of an epoch's rollout and update, without decoding, rewards and evaluations.

    Measured on one noise prediction of `sample.batch_size` images. Under FSDP every process calls it.
    """
    size = config.sample.batch_size
    seconds = _pass_seconds(pipe, table.negative.expand(size, -1, -1), table.negative, config.sample)
    trained = TRAINING_PASSES[config.use_lora] * config.train.num_inner_epochs * sizes.train_timesteps
    passes = sizes.local_samples / size * (config.sample.num_steps + trained)
    if gradients:  # which spare the first update its forward passes
        passes -= gradients.samples / size * sizes.train_timesteps
    return str(timedelta(seconds=math.ceil(seconds * passes)))


@torch.no_grad()
def _pass_seconds(
    pipe: StableDiffusionPipeline, prompt_embeds: torch.Tensor, negative: torch.Tensor, sample: ConfigDict
) -> float:
    latents = torch.zeros(len(prompt_embeds), *latent_shape(pipe), device=prompt_embeds.device)
    timestep = pipe.scheduler.timesteps[0]
    for _ in range(2):  # the first is a warm-up
        started = time.perf_counter()
        noise = guided_noise_prediction(pipe.unet, latents, timestep, prompt_embeds, negative, sample.guidance_scale)
        noise.sum().item()  # waits for the device
    return time.perf_counter() - started

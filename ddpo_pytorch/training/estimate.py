"""How long an epoch will take, told before the first one."""

import math
import time
from datetime import timedelta

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.generator.pipeline import PromptEmbeddings, guided_noise_prediction, latent_shape
from ddpo_pytorch.training.rollout_gradients import ScoreGradients
from ddpo_pytorch.training.setup import Geometry

# Passes that the forward and backward pass of a training step last, measured: of adapters, of the whole UNet.
TRAINING_PASSES = {True: 2, False: 3}


def epoch_time(
    pipe: StableDiffusionPipeline,
    table: PromptEmbeddings,
    config: ConfigDict,
    geometry: Geometry,
    gradients: ScoreGradients | None,
) -> str:
    """Hours:minutes:seconds of an epoch's rollout and update; decoding, rewards and evaluations come on top.

    Measured on a noise prediction of `sample.batch_size` images, after a first one which is not timed. Every process
    of a divided UNet has to call this. `gradients` taken while sampling spare a pass each.
    """
    size = config.sample.batch_size
    seconds = _pass_seconds(pipe, table.negative.expand(size, -1, -1), table.negative, config.sample)
    trained = TRAINING_PASSES[config.use_lora] * config.train.num_inner_epochs * geometry.train_timesteps
    passes = geometry.local_samples / size * (config.sample.num_steps + trained)
    if gradients:
        passes -= gradients.samples / size * geometry.train_timesteps
    return str(timedelta(seconds=math.ceil(seconds * passes)))


@torch.no_grad()
def _pass_seconds(
    pipe: StableDiffusionPipeline, prompt_embeds: torch.Tensor, negative: torch.Tensor, sample: ConfigDict
) -> float:
    latents = torch.zeros(len(prompt_embeds), *latent_shape(pipe), device=prompt_embeds.device)
    timestep = pipe.scheduler.timesteps[0]
    for _ in range(2):
        started = time.perf_counter()
        noise = guided_noise_prediction(pipe.unet, latents, timestep, prompt_embeds, negative, sample.guidance_scale)
        noise.sum().item()  # waits for the device
    return time.perf_counter() - started

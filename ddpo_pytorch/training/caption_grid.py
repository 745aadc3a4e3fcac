"""Sample grids during stage (i)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.data.images import image_grid, save_picture
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.sampling import Sampling, draw_images
from ddpo_pytorch.utils.randomness import Stream, generator_of

BATCH = 4  # images drawn at once: SD's autoencoder needs 3 GiB to decode four of 512 px


@torch.no_grad()
def draw_captions(
    accelerator: Accelerator,
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    sample: ConfigDict,
    seed: int,
    path: Path,
) -> None:
    """Save a grid of one image per caption at fixed noise, drawn by all processes; `sample` is `config.sample`."""
    was_training, embeddings, images = pipe.unet.training, PromptEmbeddings(pipe), []
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    own = list(range(len(captions)))[accelerator.process_index :: accelerator.num_processes]
    for numbers in (own[start : start + BATCH] for start in range(0, len(own), BATCH)):
        noise = [generator_of(seed, Stream.GRID, number) for number in numbers]
        drawn = draw_images(pipe, embeddings, [captions[number] for number in numbers], noise, Sampling.of(sample))
        images += zip(numbers, drawn.float().cpu(), strict=True)
    pipe.unet.train(was_training)
    images = gather_object(images)
    if accelerator.is_main_process:
        grid = image_grid(torch.stack([image for _, image in sorted(images, key=lambda item: item[0])]), 8)
        save_picture(path, grid)

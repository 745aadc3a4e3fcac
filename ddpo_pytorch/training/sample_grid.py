"""A picture of what the policy draws."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from ddpo_pytorch.data.images import image_grid, save_picture
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.rollout import generators
from ddpo_pytorch.sampling import Sampling, draw_images
from ddpo_pytorch.utils.randomness import Stream


def save_grid(
    accelerator: Accelerator,
    pipe: StableDiffusionPipeline,
    table: PromptEmbeddings,
    prompts: list[str],
    seed: int,
    sampling: Sampling,
    batch_size: int,
    path: Path,
) -> None:
    """Images of `prompts`, of noise that is a function of the seed alone, eight in a row.

    Every process draws all of them, because a UNet that is divided among processes needs all, and the main one writes.
    """
    noise = generators(accelerator.device, seed, Stream.GRID, 0, range(len(prompts)))
    parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    with accelerator.autocast():
        images = [draw_images(pipe, table, prompts[part], noise[part], sampling) for part in parts]
    if accelerator.is_main_process:
        save_picture(path, image_grid(torch.cat(images), columns=8))
    accelerator.wait_for_everyone()

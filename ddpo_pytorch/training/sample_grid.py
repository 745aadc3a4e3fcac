"""Grids of sample images, drawn from fixed prompts and noise while a model trains."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from PIL import Image

from ddpo_pytorch.data.images import image_grid, save_picture
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.sampling import draw_images
from ddpo_pytorch.utils.randomness import Stream, generator_of

COLUMNS = 8


def save_grid(
    accelerator: Accelerator,
    pipe: StableDiffusionPipeline,
    embeddings: PromptEmbeddings,
    prompts: Sequence[str],
    seed: int,
    sampling: Sampling,
    batch_size: int,
    path: Path,
) -> Image.Image | None:
    """Draw one image per prompt, whose noise depends on the seed alone, and save them as a grid.

    Batches are dealt to the processes, equally many to each: a UNet divided by FSDP needs all of them in every pass.
    Returns the picture on the main process.
    """
    was_training = pipe.unet.training
    pipe.unet.eval()
    starts = list(range(0, len(prompts), batch_size))
    rounds = -(-len(starts) // accelerator.num_processes)
    mine = (starts * accelerator.num_processes)[accelerator.process_index :: accelerator.num_processes][:rounds]
    images = []
    for start in mine:
        indices = range(start, min(start + batch_size, len(prompts)))
        noise = [generator_of(seed, Stream.GRID, 0, index) for index in indices]  # on the CPU: equal on every device
        with torch.no_grad(), accelerator.autocast():
            drawn = draw_images(pipe, embeddings, [prompts[index] for index in indices], noise, sampling)
        images += zip(indices, drawn.float().cpu(), strict=True)
    pipe.unet.train(was_training)
    gathered = dict(gather_object(images))
    if not accelerator.is_main_process:
        return None
    grid = image_grid(torch.stack([gathered[index] for index in range(len(prompts))]), COLUMNS)
    save_picture(path, grid)
    return grid

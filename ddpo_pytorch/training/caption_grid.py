"""A picture of what a model draws for its captions, while it is trained."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.data.images import image_grid, save_picture
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import encode_prompts
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
    """One image for each caption, each from its own fixed noise; dealt to the processes, a few at a time.

    `sample` is the configuration's block: num_steps, guidance_scale, eta. The UNet keeps its mode.
    """
    was_training, images = pipe.unet.training, []
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    own = list(range(len(captions)))[accelerator.process_index :: accelerator.num_processes]
    for numbers in (own[start : start + BATCH] for start in range(0, len(own), BATCH)):
        drawn, *_ = pipeline_with_logprob(
            pipe,
            prompt_embeds=encode_prompts(pipe, [captions[number] for number in numbers]),
            negative_prompt_embeds=encode_prompts(pipe, [""]),
            num_inference_steps=sample.num_steps,
            guidance_scale=sample.guidance_scale,
            eta=sample.eta,
            generator=[generator_of(seed, Stream.GRID, number) for number in numbers],
            keep_trajectory=False,
        )
        images += zip(numbers, drawn.float().cpu(), strict=True)
    pipe.unet.train(was_training)
    images = gather_object(images)
    if accelerator.is_main_process:
        grid = image_grid(torch.stack([image for _, image in sorted(images, key=lambda item: item[0])]), 8)
        save_picture(path, grid)

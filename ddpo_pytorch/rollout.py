"""Rollouts: prompts and noise as functions of (seed, epoch, sample index), and batches of trajectories.

Sample i of epoch e is the same image for any batch size, number of processes, and history of interruptions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import GradMode, Sampling, pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.prompts import draw_prompt
from ddpo_pytorch.utils.distributed import to_device
from ddpo_pytorch.utils.randomness import Stream, derived_seed


def draw_prompts(
    prompt_fn: Callable[..., Any], seed: int, epoch: int, count: int, images_per_prompt: int = 1
) -> tuple[list[str], list[Any]]:
    """Return prompts and metadata of an epoch's `count` samples over all processes.

    Every `images_per_prompt` consecutive samples share a prompt. Raises UserError if `prompt_fn` returns no prompt.
    """
    drawn = []
    for group in range(-(-count // images_per_prompt)):
        drawn += [draw_prompt(prompt_fn, derived_seed(seed, Stream.PROMPTS, epoch, group))] * images_per_prompt
    prompts, metadata = zip(*drawn[:count], strict=True)
    return list(prompts), list(metadata)


@dataclass
class Trajectories:
    """B denoising trajectories of T steps. Step t goes from latents[:, t] to latents[:, t + 1]."""

    prompts: list[str]  # B
    timesteps: torch.Tensor  # (T,) int64, from noise to image
    latents: torch.Tensor  # (B, T + 1, C, h, w), in the dtype from which log-probs were computed
    log_probs: torch.Tensor  # (B, T) float32, under the policy that sampled

    @classmethod
    def like(cls, batch: "Trajectories", count: int) -> "Trajectories":
        """Allocate `count` trajectories of the same steps, shapes and dtypes, to be filled by `put`."""
        latents, log_probs = (array.new_empty(count, *array.shape[1:]) for array in (batch.latents, batch.log_probs))
        return cls([""] * count, batch.timesteps, latents, log_probs)

    def put(self, indices: list[int], batch: "Trajectories") -> None:
        """Store the trajectories of a batch at these indices."""
        for index, prompt in zip(indices, batch.prompts, strict=True):
            self.prompts[index] = prompt
        rows = to_device(torch.tensor(indices), self.latents.device)
        self.latents[rows], self.log_probs[rows] = batch.latents, batch.log_probs


def sample_trajectories(
    pipe: StableDiffusionPipeline,
    embeddings: PromptEmbeddings,
    prompts: Sequence[str],
    noise: list[torch.Generator],
    sampling: Sampling,
    gradients: GradMode | None = None,
) -> tuple[torch.Tensor, Trajectories]:
    """Sample one image per prompt; return images (B, 3, H, W), float32 in [0, 1], and their trajectories.

    gradients: takes gradients of the log-probs with respect to the policy's weights while sampling.
    """
    images, _, latents, log_probs = pipeline_with_logprob(
        pipe,
        prompt_embeds=embeddings(prompts),
        negative_prompt_embeds=embeddings.negative,
        num_inference_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        eta=sampling.eta,
        generator=noise,
        gradients=gradients,
    )
    timesteps = pipe.scheduler.timesteps
    return images, Trajectories(list(prompts), timesteps, torch.stack(latents, dim=1), torch.stack(log_probs, dim=1))


def update_order(
    seed: int, epoch: int, inner_epoch: int, samples: int, updates: int, first: int, processes: int
) -> list[int]:
    """Return the order in which the process whose first sample is `first` takes its samples, as local indices.

    Every block of `updates` consecutive global samples is dealt to the updates at random, one sample each. Over all
    processes, the samples of an update therefore do not depend on the number of processes; each process contributes
    equally many; and images of one prompt, which are consecutive, are spread over the updates.
    """
    piles: list[list[int]] = [[] for _ in range(updates)]
    for start in range(first, first + samples // processes, updates):
        rng = np.random.default_rng(derived_seed(seed, Stream.ORDER, epoch, inner_epoch, start))
        for offset, pile in enumerate(rng.permutation(updates)):
            piles[pile].append(start + offset - first)
    return [index for pile in piles for index in pile]


def timestep_order(
    seed: int, epoch: int, inner_epoch: int, indices: Sequence[int], window: tuple[int, int], count: int
) -> torch.Tensor:
    """Return `count` distinct steps within the window, shuffled, for each of B global sample indices: (B, count)."""
    orders = []
    for index in indices:
        rng = np.random.default_rng(derived_seed(seed, Stream.TIMESTEPS, epoch, inner_epoch, index))
        orders.append(window[0] + rng.permutation(window[1] - window[0])[:count])
    return torch.from_numpy(np.stack(orders))

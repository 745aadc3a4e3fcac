"""Rewards of an epoch's images, computed beside the drawing of the next ones."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ddpo_pytorch.errors import UserError
from ddpo_pytorch.rewards import RewardFn


class Scorer:
    """A reward function with a queue of batches.

    On a GPU it works in a thread and on a CUDA stream of its own, so that neither waits for the denoising of the next
    batch. On a CPU, where both would only take each other's cores, a batch is scored when it is submitted.

    Args:
        reward_fn: see rewards.py.
        device: on which images come.
    """

    def __init__(self, reward_fn: RewardFn, device: torch.device):
        self.reward_fn = reward_fn
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(max_workers=1) if self._stream else None
        self._scores: list[np.ndarray | Future] = []

    def submit(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Score images (B, 3, H, W), float32 in [0, 1]. Raises what `collect` would if an earlier batch has failed."""
        if not self._executor:
            self._scores.append(self._score(images, prompts, metadata))
            return
        for score in self._scores:
            if score.done():
                score.result()
        ready = torch.cuda.current_stream(images.device).record_event()
        self._scores.append(self._executor.submit(self._score_on_stream, ready, images, prompts, metadata))

    def collect(self) -> np.ndarray:
        """Rewards (N,), float64, of all images since the last call, in their order.

        Raises UserError for a reward that is not finite, naming its prompt; RuntimeError, naming the prompts of the
        batch, from whatever else the reward function raises.
        """
        scores, self._scores = self._scores, []
        return np.concatenate([score.result() if isinstance(score, Future) else score for score in scores])

    def close(self) -> None:
        """End the thread; what is still queued is dropped."""
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def _score_on_stream(self, ready: torch.cuda.Event, images: torch.Tensor, *about) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            images.record_stream(self._stream)  # or its memory could be reused before it was read
            return self._score(images, *about)

    def _score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence) -> np.ndarray:
        try:
            rewards = np.asarray(self.reward_fn(images, prompts, metadata)[0], dtype=np.float64)
        except UserError:
            raise
        except Exception as error:
            about = ", ".join(map(repr, dict.fromkeys(prompts)))
            raise RuntimeError(f"the reward failed on images of {about}") from error
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not np.isfinite(reward):
                raise UserError(f"the reward of an image of {prompt!r} is {reward}; rewards must be finite numbers")
        return rewards

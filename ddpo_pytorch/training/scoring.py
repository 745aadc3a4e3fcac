"""Rewards of an epoch's images, computed while the next ones are sampled."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ddpo_pytorch.rewards import RewardFn, as_reward

Scores = dict[str, np.ndarray]  # (B,) float64: rewards under TOTAL, those of a sum's parts under their names
TOTAL = ""


class Scorer:
    """A reward function with a queue of batches.

    On a GPU it runs in its own thread and CUDA stream, in parallel with the denoising of the next batch. On a CPU,
    where both would compete for the same cores, a batch is scored when it is submitted.

    Args:
        reward_fn: see rewards.py.
        device: of the images.
    """

    def __init__(self, reward_fn: RewardFn, device: torch.device):
        self.reward_fn = as_reward(reward_fn)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(max_workers=1) if self._stream else None
        self._scores: list[Scores | Future[Scores]] = []

    def submit(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Score images (B, 3, H, W), float32 in [0, 1]. Raises the error of an earlier batch, if any."""
        if not self._executor:
            self._scores.append(self._score(images, prompts, metadata))
            return
        for score in self._scores:
            if score.done():
                score.result()
        ready = torch.cuda.current_stream(images.device).record_event()
        self._scores.append(self._executor.submit(self._score_on_stream, ready, images, prompts, metadata))

    def collect(self) -> Scores:
        """Return the scores (N,) of all images since the last call, in order of submission. Raises as `Reward` does."""
        pending, self._scores = self._scores, []
        scores = [one.result() if isinstance(one, Future) else one for one in pending]
        return {name: np.concatenate([one[name] for one in scores]) for name in (TOTAL, *self.reward_fn.parts)}

    def close(self) -> None:
        """End the thread, dropping what is queued."""
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def _score_on_stream(self, ready: torch.cuda.Event, images: torch.Tensor, *about) -> Scores:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            images.record_stream(self._stream)  # keeps the memory from being reused too early
            return self._score(images, *about)

    def _score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence) -> Scores:
        rewards, info = self.reward_fn(images, prompts, metadata)
        return {TOTAL: rewards} | {name: info[name] for name in self.reward_fn.parts}

"""Warnings of a training that runs but learns nothing, or that is about to break down. Each is given once."""

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
# Advantages are rewards in units of their standard deviation, so their usual size is 1.
SMALL_ADVANTAGE = 1e-3
# Share of an epoch's ratios that PPO clipped. A healthy run is near 0; the mini world at 20 times its learning rate,
# whose policy collapses within epochs, is at 0.5, the most that two updates an epoch allow.
LARGE_CLIPFRAC = 0.25
# Times the median gradient norm of the epochs before, of which at least GRAD_NORM_EPOCHS are needed.
LARGE_GRAD_NORM = 10.0
GRAD_NORM_EPOCHS = 3


def singles(prompts: Sequence[str]) -> int:
    """Return how many prompts occur once."""
    return sum(count == 1 for count in Counter(prompts).values())


def check_groups(advantage: str, prompts: Sequence[str]) -> None:
    """Raise UserError where each of the first epoch's prompts (N,) is alone and advantages are taken within prompts."""
    if advantage == "group" and singles(prompts) == len(prompts):
        raise UserError(
            f"train.advantage is 'group', but none of the first epoch's {len(prompts)} samples shares its prompt with "
            "another, so every advantage would be 0 and nothing would be learned; set sample.images_per_prompt to 2 or "
            "more, or train.advantage=per_prompt"
        )


class HealthCheck:
    """Looks at each epoch's prompts and numbers, and logs what is wrong with them.

    Args:
        train: `config.train`.
        active: whether this process logs.
    """

    def __init__(self, train: ConfigDict, active: bool = True):
        self._train, self._active = train, active
        self._grad_norms: list[float] = []
        self._given: set[str] = set()

    def check_prompts(self, epoch: int, prompts: Sequence[str]) -> None:
        """Warn of prompts that were drawn once, where advantages are relative to the samples of the same prompt."""
        if self._train.advantage == "group" and (alone := singles(prompts)):
            self._warn(
                "singles",
                f"epoch {epoch}: {alone} of {len(set(prompts))} prompts were drawn once; with train.advantage=group a "
                "sample that is alone gets advantage 0 and teaches nothing: set sample.images_per_prompt to 2 or more",
            )

    def check_epoch(self, epoch: int, advantages: np.ndarray, entry: Mapping[str, float]) -> None:
        """Warn of an epoch without a gradient, of many clipped ratios, and of a gradient that explodes.

        advantages: (N,) before clipping. entry: what metrics.jsonl says of the epoch.
        """
        largest = min(np.abs(advantages).max(), self._train.adv_clip_max)
        grad_norm, clipfrac = entry["grad_norm"], entry["clipfrac"]
        if largest < SMALL_ADVANTAGE or grad_norm == 0:
            self._warn(
                "nothing",
                f"epoch {epoch} taught next to nothing: the largest advantage is {largest:.1e}, the gradient norm "
                f"{grad_norm:.1e}; rewards were {entry['reward_mean']:.4g} +- {entry['reward_std']:.1e}, and all equal "
                f"for {entry['zero_std_share']:.0%} of the prompts: check that the reward tells images of a prompt "
                "apart, and its scale",
            )
        if clipfrac > LARGE_CLIPFRAC:
            self._warn(
                "clipfrac",
                f"epoch {epoch}: {clipfrac:.0%} of the ratios were clipped, so updates move the policy much further "
                f"than train.clip_range={self._train.clip_range:g} allows, and it may collapse; lower "
                f"train.learning_rate (it is {self._train.learning_rate:g})",
            )
        before = self._grad_norms
        if len(before) >= GRAD_NORM_EPOCHS and grad_norm > LARGE_GRAD_NORM * (usual := statistics.median(before)) > 0:
            self._warn(
                "grad_norm",
                f"epoch {epoch}: the gradient norm is {grad_norm:.3g}, the median of the epochs before {usual:.3g}; "
                "training may diverge: lower train.learning_rate or train.max_grad_norm, and start again from an "
                "earlier checkpoint",
            )
        if np.isfinite(grad_norm):
            before.append(grad_norm)

    def _warn(self, cause: str, message: str) -> None:
        if self._active and cause not in self._given:
            logger.warning("%s", message)
        self._given.add(cause)

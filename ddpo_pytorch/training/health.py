"""Warnings about training that learns nothing or is about to diverge. Each is logged once."""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
# Advantages are in units of standard deviations, usually around 1.
SMALL_ADVANTAGE = 1e-3
# Share of an epoch's ratios clipped by PPO, near 0 in a healthy run. The mini world at 20 times its learning rate
# collapses within epochs and reaches 0.5, the maximum for two updates per epoch.
LARGE_CLIPFRAC = 0.25
# Multiple of the median gradient norm of earlier epochs, once there are GRAD_NORM_EPOCHS of them.
LARGE_GRAD_NORM = 10.0
GRAD_NORM_EPOCHS = 3


def singles(prompts: Sequence[str]) -> int:
    """Return the number of prompts that occur once."""
    return sum(count == 1 for count in Counter(prompts).values())


def check_groups(advantage: str, prompts: Sequence[str]) -> None:
    """Raise UserError if advantages are relative to the prompt's group but every prompt occurs only once."""
    if advantage == "group" and singles(prompts) == len(prompts):
        raise UserError(
            f"train.advantage is {advantage!r}, but no two of the first epoch's {len(prompts)} samples share a prompt, "
            "so every advantage would be 0; set sample.images_per_prompt to 2 or more, or train.advantage=per_prompt"
        )


class HealthCheck:
    """Checks each epoch of a run with settings `config.train`; logs each kind of problem once, if `active`."""

    def __init__(self, train: ConfigDict, active: bool = True):
        self._train, self._active = train, active
        self._grad_norms: list[float] = []
        self._given: set[str] = set()

    def check_epoch(
        self, epoch: int, prompts: Sequence[str], advantages: np.ndarray, entry: Mapping[str, float]
    ) -> None:
        """Warn about prompts that teach nothing, vanishing or exploding gradients, and many clipped ratios.

        prompts, advantages: (N,), before clipping. entry: the epoch's line in metrics.jsonl.
        """
        largest = min(np.abs(advantages).max(), self._train.adv_clip_max)
        grad_norm, clipfrac, before = entry["grad_norm"], entry["clipfrac"], self._grad_norms
        usual = statistics.median(before) if len(before) >= GRAD_NORM_EPOCHS else math.inf
        problems = {}
        if self._train.advantage == "group" and (alone := singles(prompts)):
            problems["singles"] = (
                f"epoch {epoch}: {alone} of {len(set(prompts))} prompts were drawn once and teach nothing with "
                f"train.advantage={self._train.advantage}: set sample.images_per_prompt to 2 or more"
            )
        if largest < SMALL_ADVANTAGE or grad_norm == 0:
            problems["nothing"] = (
                f"epoch {epoch} taught almost nothing: the largest advantage is {largest:.1e}, the gradient norm "
                f"{grad_norm:.1e}, rewards are {entry['reward_mean']:.4g} +- {entry['reward_std']:.1e}, equal within "
                f"{entry['zero_std_share']:.0%} of the prompts: check the reward's scale"
            )
        if clipfrac > LARGE_CLIPFRAC:
            problems["clipfrac"] = (
                f"epoch {epoch}: {clipfrac:.0%} of the ratios were clipped at {self._train.clip_range:g}: the policy "
                f"may collapse; lower train.learning_rate ({self._train.learning_rate:g})"
            )
        if grad_norm > LARGE_GRAD_NORM * usual > 0:
            problems["grad_norm"] = (
                f"epoch {epoch}: the gradient norm is {grad_norm:.3g}, the median of earlier epochs {usual:.3g}; "
                "lower train.learning_rate or train.max_grad_norm and resume from an earlier checkpoint"
            )
        for cause in problems if self._active else ():
            if cause not in self._given:
                logger.warning("%s", problems[cause])
        self._given |= problems.keys()
        if np.isfinite(grad_norm):
            before.append(grad_norm)

"""Warnings about training that learns nothing or is about to diverge. Each is logged once."""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
SMALL_ADVANTAGE = 1e-3  # in units of standard deviations; usual are about 1
# Share of an epoch's ratios outside the clip range, near 0 in a healthy run. A collapsing mini world reaches 0.5.
LARGE_CLIPFRAC = 0.25
LARGE_GRAD_NORM = 10.0  # multiple of the median of earlier epochs, once there are GRAD_NORM_EPOCHS of them
GRAD_NORM_EPOCHS = 3


def singles(prompts: Sequence[str]) -> int:
    """Return the number of prompts that occur once."""
    return sum(count == 1 for count in Counter(prompts).values())


def check_groups(advantage: str, prompts: Sequence[str]) -> None:
    """Raise UserError if advantages are relative to the prompt's group but every prompt occurs only once."""
    if advantage == "group" and singles(prompts) == len(prompts):
        problem = f"no two of the first epoch's {len(prompts)} samples share a prompt, so every advantage would be 0"
        advice = "set sample.images_per_prompt to 2 or more, or train.advantage=per_prompt"
        raise UserError(f"train.advantage is 'group', but {problem}; {advice}")


class HealthCheck:
    """Checks each epoch of a run with settings `config.train`; logs each kind of problem once, if `active`."""

    def __init__(self, train: ConfigDict, active: bool = True):
        self._train, self._active = train, active
        self._grad_norms: list[float] = []
        self._logged: set[str] = set()

    def check_epoch(self, epoch: int, prompts: Sequence[str], advantages: np.ndarray, entry: dict[str, float]) -> None:
        """Warn about prompts that teach nothing, vanishing or exploding gradients, and many ratios far from 1.

        prompts, advantages: (N,), before clipping. entry: the epoch's line in metrics.jsonl.
        """
        train, grad_norm, clipfrac, before = self._train, entry["grad_norm"], entry["clipfrac"], self._grad_norms
        rate = f"train.learning_rate ({train.learning_rate:g})"
        if train.advantage == "group" and (alone := singles(prompts)):
            drawn = f"epoch {epoch} drew {alone} of {len(set(prompts))} prompts once, which teach nothing"
            self._warn("singles", f"{drawn} with train.advantage=group: set sample.images_per_prompt to 2 or more")
        largest = min(np.abs(advantages).max(), train.adv_clip_max)
        if largest < SMALL_ADVANTAGE or grad_norm == 0:
            sizes = f"the largest advantage is {largest:.1e}, the gradient norm {grad_norm:.1e}"
            rewards = f"rewards are {entry['reward_mean']:.4g} +- {entry['reward_std']:.1e}"
            equal = f"equal within {entry['zero_std_share']:.0%} of the prompts: check the reward's scale"
            self._warn("nothing", f"epoch {epoch} taught almost nothing: {sizes}, {rewards}, {equal}")
        if clipfrac > LARGE_CLIPFRAC:
            outside = f"in epoch {epoch}, {clipfrac:.0%} of the ratios are beyond 1 +- {train.clip_range:g}"
            self._warn("clipfrac", f"{outside}: the policy may collapse; lower {rate}")
        usual = statistics.median(before) if len(before) >= GRAD_NORM_EPOCHS else math.inf
        if grad_norm > LARGE_GRAD_NORM * usual > 0:
            norms = f"epoch {epoch} had a gradient norm of {grad_norm:.3g}, the median of earlier ones is {usual:.3g}"
            self._warn("norm", f"{norms}: lower {rate} or train.max_grad_norm and resume from an earlier checkpoint")
        if np.isfinite(grad_norm):
            before.append(grad_norm)

    def _warn(self, cause: str, message: str) -> None:
        if self._active and cause not in self._logged:
            logger.warning("%s", message)
            self._logged.add(cause)

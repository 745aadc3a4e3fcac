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
# Share of an epoch's clipped ratios, near 0 in a healthy run. A collapsing mini world reaches 0.5, its maximum.
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
        raise UserError(f"train.advantage is 'group', but {problem}; raise sample.images_per_prompt, or use per_prompt")


class HealthCheck:
    """Checks each epoch of a run with settings `config.train`; logs each kind of problem once, if `active`."""

    def __init__(self, train: ConfigDict, active: bool = True):
        self._train, self._active = train, active
        self._grad_norms: list[float] = []
        self._logged: set[int] = set()

    def check_epoch(self, epoch: int, prompts: Sequence[str], advantages: np.ndarray, entry: dict[str, float]) -> None:
        """Warn about an epoch, given prompts and unclipped advantages, each (N,), and its `entry` in metrics.jsonl."""
        train, grad_norm, clipfrac, before = self._train, entry["grad_norm"], entry["clipfrac"], self._grad_norms
        alone = singles(prompts) if train.advantage == "group" else 0
        largest = min(np.abs(advantages).max(), train.adv_clip_max)
        nothing = largest < SMALL_ADVANTAGE or grad_norm == 0
        usual = statistics.median(before) if len(before) >= GRAD_NORM_EPOCHS else math.inf
        rewards = f"{entry['reward_mean']:.4g} +- {entry['reward_std']:.1e}, equal in {entry['zero_std_share']:.0%}"
        teaching = f"largest advantage {largest:.1e}, gradient norm {grad_norm:.1e}, rewards {rewards} of the prompts"
        growth = f"gradient norm of {grad_norm:.3g}, after a median of {usual:.3g}"
        rate = f"train.learning_rate ({train.learning_rate:g})"
        problems = (  # condition, and what the epoch did
            (alone, f"drew {alone} of {len(set(prompts))} prompts once, in vain: raise sample.images_per_prompt"),
            (nothing, f"taught almost nothing ({teaching}): check the reward's scale"),
            (clipfrac > LARGE_CLIPFRAC, f"clipped {clipfrac:.0%} of the ratios, the policy may collapse: lower {rate}"),
            (grad_norm > LARGE_GRAD_NORM * usual > 0, f"had a {growth}: lower {rate} and resume from before it"),
        )
        for number, (found, problem) in enumerate(problems):
            if found and self._active and number not in self._logged:
                logger.warning("epoch %d %s", epoch, problem)
                self._logged.add(number)
        if np.isfinite(grad_norm):
            before.append(grad_norm)

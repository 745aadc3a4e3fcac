"""Advantages: rewards standardized per prompt, per group or per epoch, in float64."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

# Added to standard deviations, so that equal rewards give advantage 0 instead of 0/0.
STD_FLOOR = 1e-6


def _as_arrays(prompts: Sequence[Hashable], rewards: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
    if prompts.ndim != 1 or prompts.shape != rewards.shape:
        raise ValueError(f"prompts {prompts.shape} and rewards {rewards.shape} must be two lists of equal length")
    return prompts, rewards


def _standardize(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return (rewards - reference.mean()) / (reference.std() + STD_FLOOR)


def group_advantages(prompts: Sequence[Hashable], rewards: Sequence[float]) -> np.ndarray:
    """Return rewards (N,) standardized over those of the same prompt (GRPO, Shao et al. 2024, section 4.1.2)."""
    prompts, rewards = _as_arrays(prompts, rewards)
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        members = prompts == prompt
        advantages[members] = _standardize(rewards[members], rewards[members])
    return advantages


class PerPromptStatTracker:
    """Standardize rewards by the recent rewards of the same prompt (DDPO, section 5, "per-prompt normalization").

    Args:
        buffer_size: recent rewards remembered per prompt.
        min_count: rewards that a prompt needs before its own statistics replace those of the batch.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[Hashable], rewards: Sequence[float]) -> np.ndarray:
        """Remember rewards (N,) of prompts (N,) and return their advantages (N,), float64.

        A prompt's statistics include the new rewards.
        """
        prompts, rewards = _as_arrays(prompts, rewards)
        advantages = np.empty_like(rewards)
        for key in np.unique(prompts):
            members = prompts == key
            # .item() converts NumPy scalars to str and int, for JSON
            buffer = self._rewards.setdefault(key.item(), deque(maxlen=self.buffer_size))
            buffer.extend(rewards[members].tolist())
            reference = rewards if len(buffer) < self.min_count else np.array(buffer)
            advantages[members] = _standardize(rewards[members], reference)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards as JSON-able pairs, since JSON would turn integer keys into strings."""
        return {"rewards": [[prompt, list(buffer)] for prompt, buffer in self._rewards.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the remembered rewards, keeping the newest buffer_size."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state["rewards"]}


def reward_statistics(
    prompts: Sequence[Hashable], rewards: Sequence[float], parts: Mapping[str, Sequence[float]] | None = None
) -> dict[str, float]:
    """Return logged statistics of an epoch's rewards (N,) and of the unweighted parts (N,) of a weighted sum.

    reward_mean, reward_std, reward_min, reward_max; reward_<name>_mean and reward_<name>_std of each part;
    per_prompt_reward_std, the mean standard deviation within prompts drawn at least twice; zero_std_share, the share of
    prompts with equal rewards, including those drawn once.
    """
    prompts, rewards = _as_arrays(prompts, rewards)
    groups = [rewards[prompts == prompt] for prompt in np.unique(prompts)]
    spreads = [group.std() for group in groups if len(group) > 1]
    statistics = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "per_prompt_reward_std": float(np.mean(spreads)) if spreads else 0.0,
        # ptp, since std() of equal rewards may be rounded to a tiny positive number
        "zero_std_share": float(np.mean([np.ptp(group) == 0 for group in groups])),
    }
    for name, values in (parts or {}).items():
        statistics |= {f"reward_{name}_mean": float(np.mean(values)), f"reward_{name}_std": float(np.std(values))}
    return statistics


def compute_advantages(
    kind: str, tracker: PerPromptStatTracker, prompts: Sequence[Hashable], rewards: Sequence[float]
) -> np.ndarray:
    """Return an epoch's advantages (N,): "per_prompt" (running statistics of `tracker`), "group" or "global"."""
    if kind == "group":
        return group_advantages(prompts, rewards)
    if kind == "global":
        rewards = np.asarray(rewards, dtype=np.float64)
        return _standardize(rewards, rewards)
    return tracker.update(prompts, rewards)

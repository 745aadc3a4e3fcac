"""Advantages: rewards standardized per prompt, per group or per epoch, in float64."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

STD_FLOOR = 1e-6  # added to standard deviations, so that equal rewards give advantage 0 instead of 0/0


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
    """Standardize rewards by the last `buffer_size` ones of the same prompt (DDPO, section 5).

    Prompts with fewer than `min_count` remembered rewards are standardized by those of the batch.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size, self.min_count = buffer_size, min_count
        self._rewards: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[Hashable], rewards: Sequence[float]) -> np.ndarray:
        """Remember rewards (N,) of prompts (N,); return their advantages (N,), float64, relative to all so far."""
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
    """Return logged statistics of an epoch's rewards (N,) and of the unweighted parts (N,) of a weighted sum."""
    prompts, rewards = _as_arrays(prompts, rewards)
    groups = [rewards[prompts == prompt] for prompt in np.unique(prompts)]
    spreads = [group.std() for group in groups if len(group) > 1]  # within prompts drawn at least twice
    statistics = {f"reward_{name}": getattr(rewards, name)() for name in ("mean", "std", "min", "max")}
    statistics["per_prompt_reward_std"] = np.mean(spreads) if spreads else 0.0
    # share of prompts with equal rewards, including those drawn once; ptp, since std() may be rounded to above 0
    statistics["zero_std_share"] = np.mean([np.ptp(group) == 0 for group in groups])
    for name, values in (parts or {}).items():
        statistics |= {f"reward_{name}_mean": np.mean(values), f"reward_{name}_std": np.std(values)}
    return {name: float(value) for name, value in statistics.items()}


def compute_advantages(
    kind: str, tracker: PerPromptStatTracker, prompts: Sequence[Hashable], rewards: Sequence[float]
) -> np.ndarray:
    """Return an epoch's advantages (N,): "per_prompt" (running statistics of `tracker`), "group" or "global"."""
    if kind == "per_prompt":
        return tracker.update(prompts, rewards)
    return group_advantages(prompts if kind == "group" else ["all"] * len(rewards), rewards)

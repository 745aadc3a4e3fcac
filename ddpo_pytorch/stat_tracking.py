"""Advantages: rewards relative to what is usual for the prompt, for the group, or for the epoch. All in float64."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

# Added to every standard deviation: equal rewards give advantage 0 instead of 0/0.
STD_FLOOR = 1e-6


def _as_arrays(prompts: Sequence[Hashable], rewards: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
    if prompts.ndim != 1 or prompts.shape != rewards.shape:
        raise ValueError(f"prompts {prompts.shape} and rewards {rewards.shape} must be two lists of one length")
    return prompts, rewards


def _standardize(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return (rewards - reference.mean()) / (reference.std() + STD_FLOOR)


def global_advantages(rewards: Sequence[float]) -> np.ndarray:
    """Rewards (N,) standardized over all of them, float64."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return _standardize(rewards, rewards)


def group_advantages(prompts: Sequence[Hashable], rewards: Sequence[float]) -> np.ndarray:
    """Rewards (N,) standardized over those of the same prompt, float64 (GRPO, Shao et al. 2024, section 4.1.2)."""
    prompts, rewards = _as_arrays(prompts, rewards)
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        members = prompts == prompt
        advantages[members] = _standardize(rewards[members], rewards[members])
    return advantages


class PerPromptStatTracker:
    """Standardizes rewards by the recent rewards of the same prompt (DDPO, section 5, "per-prompt normalization").

    Args:
        buffer_size: newest rewards remembered for each prompt.
        min_count: rewards a prompt needs before its own statistics are used; until then those of the batch are.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[Hashable], rewards: Sequence[float]) -> np.ndarray:
        """Remember rewards (N,) of prompts (N,) and return their advantages (N,), float64.

        A prompt's statistics include the rewards just given. Rewards may be integers.
        """
        prompts, rewards = _as_arrays(prompts, rewards)
        advantages = np.empty_like(rewards)
        for key in np.unique(prompts):
            members = prompts == key
            # .item() makes plain str and int of numpy scalars, which JSON cannot write.
            buffer = self._rewards.setdefault(key.item(), deque(maxlen=self.buffer_size))
            buffer.extend(rewards[members].tolist())
            reference = rewards if len(buffer) < self.min_count else np.array(buffer)
            advantages[members] = _standardize(rewards[members], reference)
        return advantages

    def get_stats(self) -> dict[Hashable, dict[str, float]]:
        """Mean, standard deviation and number of remembered rewards of each prompt."""
        return {
            prompt: {"mean": float(np.mean(buffer)), "std": float(np.std(buffer)), "count": len(buffer)}
            for prompt, buffer in self._rewards.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Remembered rewards, fit for JSON; as pairs, because JSON would turn integer keys into strings."""
        return {"rewards": [[prompt, list(buffer)] for prompt, buffer in self._rewards.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the remembered rewards; of more than buffer_size the newest are kept."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state["rewards"]}


def reward_statistics(
    prompts: Sequence[Hashable], rewards: Sequence[float], parts: Mapping[str, Sequence[float]] | None = None
) -> dict[str, float]:
    """Return what is logged about an epoch's rewards (N,), and about the parts (N,) of a weighted sum by name.

    reward_mean, reward_std, reward_min, reward_max; reward_<name>_mean and reward_<name>_std of each part, unweighted;
    per_prompt_reward_std, the standard deviation within a prompt, averaged over prompts that were drawn at least twice;
    and zero_std_share, the share of prompts whose rewards were all equal, which includes those that were drawn once.
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
        # not std() == 0, which rounding can miss
        "zero_std_share": float(np.mean([np.ptp(group) == 0 for group in groups])),
    }
    for name, values in (parts or {}).items():
        statistics |= {f"reward_{name}_mean": float(np.mean(values)), f"reward_{name}_std": float(np.std(values))}
    return statistics


def compute_advantages(
    kind: str, tracker: PerPromptStatTracker, prompts: Sequence[Hashable], rewards: Sequence[float]
) -> np.ndarray:
    """Advantages (N,) of an epoch: "per_prompt" (running statistics of `tracker`), "group" or "global"."""
    if kind == "group":
        return group_advantages(prompts, rewards)
    if kind == "global":
        return global_advantages(rewards)
    return tracker.update(prompts, rewards)

"""Advantages, against plain numpy."""

import json

import numpy as np
import pytest

from ddpo_pytorch.stat_tracking import (
    PerPromptStatTracker,
    global_advantages,
    group_advantages,
    reward_statistics,
)


def standardized(values, reference) -> np.ndarray:
    reference = np.asarray(reference, dtype=np.float64)
    return (np.asarray(values, dtype=np.float64) - np.mean(reference)) / (np.std(reference) + 1e-6)


def test_batch_statistics_until_min_count_then_the_prompts_own():
    tracker = PerPromptStatTracker(buffer_size=4, min_count=3)
    first = tracker.update(["a", "b", "a"], [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(first, standardized([1.0, 0.0, 0.5], [1.0, 0.0, 0.5]))
    # "a" now has 4 rewards, "b" 2
    second = tracker.update(["a", "a", "b"], [0.25, 0.75, 1.0])
    np.testing.assert_array_equal(second[:2], standardized([0.25, 0.75], [1.0, 0.5, 0.25, 0.75]))
    np.testing.assert_array_equal(second[2:], standardized([1.0], [0.25, 0.75, 1.0]))
    # the buffer of "a" is full: its oldest reward, 1.0, gives way
    third = tracker.update(["a"], [0.0])
    np.testing.assert_array_equal(third, standardized([0.0], [0.5, 0.25, 0.75, 0.0]))


def test_get_stats():
    tracker = PerPromptStatTracker(buffer_size=2, min_count=1)
    tracker.update(["a", "a", "a", "b"], [9.0, 1.0, 3.0, 5.0])
    assert tracker.get_stats() == {
        "a": {"mean": 2.0, "std": 1.0, "count": 2},
        "b": {"mean": 5.0, "std": 0.0, "count": 1},
    }


def test_integer_and_float32_rewards_are_not_truncated():
    for rewards in ([0, 1, 1, 1], np.array([0, 1, 1, 1], dtype=np.float32)):
        advantages = PerPromptStatTracker(8, 8).update(["a"] * 4, rewards)
        assert advantages.dtype == np.float64
        np.testing.assert_array_equal(advantages, standardized([0, 1, 1, 1], [0, 1, 1, 1]))


def test_equal_rewards_give_zero_advantage():
    assert not PerPromptStatTracker(8, 1).update(["a"] * 3, [0.5] * 3).any()
    assert not group_advantages(["a", "a", "b"], [0.5, 0.5, 1.0]).any()
    assert not global_advantages([1.0, 1.0]).any()


@pytest.mark.parametrize("prompts", [["a", "b", "a", "c"], [3, 1, 3, 2]], ids=["text", "integers"])
def test_state_survives_json(prompts):
    rewards = [0.1, 1 / 3, 0.7, 0.2]
    original = PerPromptStatTracker(8, 2)
    original.update(prompts, rewards)
    restored = PerPromptStatTracker(8, 2)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.get_stats() == original.get_stats()
    np.testing.assert_array_equal(restored.update(prompts, rewards[::-1]), original.update(prompts, rewards[::-1]))


def test_smaller_buffer_keeps_the_newest():
    original = PerPromptStatTracker(8, 1)
    original.update(["a"] * 4, [1.0, 2.0, 3.0, 5.0])
    smaller = PerPromptStatTracker(2, 1)
    smaller.load_state_dict(original.state_dict())
    assert smaller.get_stats()["a"] == {"mean": 4.0, "std": 1.0, "count": 2}


def test_group_and_global_advantages():
    prompts, rewards = ["a", "b", "a", "b", "a"], [1.0, 5.0, 2.0, 9.0, 6.0]
    grouped = group_advantages(prompts, rewards)
    np.testing.assert_array_equal(grouped[[0, 2, 4]], standardized([1.0, 2.0, 6.0], [1.0, 2.0, 6.0]))
    np.testing.assert_array_equal(grouped[[1, 3]], standardized([5.0, 9.0], [5.0, 9.0]))
    np.testing.assert_array_equal(global_advantages(rewards), standardized(rewards, rewards))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one length"):
        PerPromptStatTracker(8, 1).update(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="one length"):
        group_advantages(["a"], [1.0, 2.0])


def test_statistics_count_prompts_that_taught_nothing():
    # "a" differs, "b" is equal (0.1 three times: std() is not exactly 0), "c" and "d" were drawn once
    prompts, rewards = ["a", "b", "a", "b", "c", "b", "d"], [1.0, 0.1, 0.0, 0.1, 0.7, 0.1, 0.2]
    statistics = reward_statistics(prompts, rewards, {"jpeg": [1, 2, 3, 4, 5, 6, 7]})
    assert statistics["zero_std_share"] == 3 / 4
    assert statistics["per_prompt_reward_std"] == pytest.approx(0.25)  # of "a" and "b"
    assert (statistics["reward_min"], statistics["reward_max"]) == (0.0, 1.0)
    assert (statistics["reward_jpeg_mean"], statistics["reward_jpeg_std"]) == (4.0, 2.0)
    assert reward_statistics(["a", "b"], [1.0, 2.0])["zero_std_share"] == 1.0
    assert reward_statistics(["a", "a"], [1.0, 2.0])["zero_std_share"] == 0.0

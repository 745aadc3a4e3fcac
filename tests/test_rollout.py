"""Randomness as a function of progress, the order of updates, batch sizes, advantages and stopping criteria."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from refusals import refused

from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.prompts import get_prompt_fn
from ddpo_pytorch.rollout import Trajectories, draw_prompts, sample_trajectories, timestep_order, update_order
from ddpo_pytorch.stat_tracking import PerPromptStatTracker, compute_advantages, group_advantages, reward_statistics
from ddpo_pytorch.training.run_state import BestAndCollapse, RewardPlateau
from ddpo_pytorch.training.setup import batch_sizes
from ddpo_pytorch.utils.randomness import Stream, derived_seed, generator_of


def test_seeds_differ_by_stream_and_progress_and_repeat():
    arguments = [(s, stream, e, i) for s in (0, 1) for stream in Stream for e in range(3) for i in range(5)]
    seeds = [derived_seed(*a) for a in arguments]
    assert len(set(seeds)) == len(seeds) and seeds == [derived_seed(*a) for a in arguments]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_are_a_function_of_seed_epoch_and_index():
    prompt_fn = get_prompt_fn("isic_all")
    prompts, metadata = draw_prompts(prompt_fn, 7, 3, 64)
    assert draw_prompts(prompt_fn, 7, 3, 64) == (prompts, metadata)
    assert draw_prompts(prompt_fn, 7, 3, 32)[0] == prompts[:32]  # fewer samples, same beginning
    assert draw_prompts(prompt_fn, 7, 4, 64)[0] != prompts and draw_prompts(prompt_fn, 8, 3, 64)[0] != prompts
    assert len(set(prompts)) > 16 and all(len(about["label"]) == 6 for about in metadata)
    together, _ = draw_prompts(prompt_fn, 0, 0, 24, images_per_prompt=8)
    assert len(together) == 24 and all(len(set(together[i : i + 8])) == 1 for i in (0, 8, 16))


@pytest.mark.parametrize(("samples", "updates"), [(32, 2), (24, 3), (16, 1)])
def test_updates_hold_the_same_samples_for_any_number_of_processes(samples, updates):
    def members(processes):
        local = samples // processes
        piles = [set() for _ in range(updates)]
        for rank in range(processes):
            order = update_order(5, 1, 0, samples, updates, rank * local, processes)
            assert sorted(order) == list(range(local))
            for position, index in enumerate(order):
                piles[position // (local // updates)].add(rank * local + index)
        return piles

    assert members(1) == members(2) == members(4)
    other = update_order(5, 1, 1, samples, updates, 0, 1)
    assert updates == 1 or other != update_order(5, 1, 0, samples, updates, 0, 1)


def test_timesteps_are_shuffled_within_the_window_and_never_repeated():
    order = timestep_order(0, 0, 0, range(50), (2, 8), 4)
    assert order.shape == (50, 4) and order.min() == 2 and order.max() == 7
    assert all(len(set(row.tolist())) == 4 for row in order)
    assert torch.equal(order[10:12], timestep_order(0, 0, 0, [10, 11], (2, 8), 4))


def test_a_sample_does_not_depend_on_its_batch(pipe):
    pipe.set_progress_bar_config(disable=True)
    table = PromptEmbeddings(pipe)
    prompts, _ = draw_prompts(get_prompt_fn("isic_all"), 0, 0, 4)

    def draw(indices):
        noise = [generator_of(0, Stream.NOISE, 0, index) for index in indices]
        return sample_trajectories(pipe, table, [prompts[i] for i in indices], noise, Sampling(3, 2.0, 1.0))

    images, whole = draw(range(4))
    parts = {(0, 1): draw([0, 1])[1], (2, 3): draw([2, 3])[1]}
    joined = Trajectories.like(parts[0, 1], 4)
    for places, part in parts.items():
        joined.put(list(places), part)
    assert whole.latents.shape == (4, 4, 4, 16, 16) and whole.log_probs.shape == (4, 3)
    assert joined.prompts == whole.prompts and images.shape == (4, 3, 64, 64)
    assert torch.allclose(joined.latents, whole.latents, atol=1e-5)
    assert torch.allclose(joined.log_probs, whole.log_probs, atol=1e-5)


def geometry(**overrides):
    sample = ConfigDict({"batch_size": 8, "num_batches_per_epoch": 4, "images_per_prompt": 1, "num_steps": 10})
    train = {"batch_size": 4, "gradient_accumulation_steps": 4, "num_inner_epochs": 1, "timesteps_per_forward": 1}
    train = ConfigDict(train | {"timestep_window": (0.0, 1.0), "timestep_fraction": 1.0})
    for key, value in overrides.items():
        (sample if key in sample else train)[key] = value
    return batch_sizes(sample, train, 2)


def test_geometry_counts():
    found = geometry()
    assert (found.samples, found.local_samples, found.updates, found.train_timesteps) == (64, 32, 2, 10)
    assert "64 samples per epoch" in found.describe() and "2 updates of 32 samples" in found.describe()
    part = geometry(timestep_window=(0.2, 0.75), timestep_fraction=0.5)
    assert (part.timestep_window, part.train_timesteps) == ((2, 8), 3)
    assert geometry(num_steps=50, timestep_fraction=0.58).train_timesteps == 29  # 28.999999999999996
    for overrides, expected in (
        ({"gradient_accumulation_steps": 3}, "= 32 samples .* = 12"),
        ({"images_per_prompt": 5}, "does not divide the 32"),
        ({"timestep_window": (0.5, 0.5)}, "timestep_window"),
        ({"timestep_fraction": 0.05}, "less than one"),
    ):
        refused(expected, geometry, **overrides)


def test_reward_plateau():
    plateau = RewardPlateau(tolerance=0.01, patience=2)
    assert [plateau.update(reward) for reward in (0.5, 0.505, 0.6, 0.605, 0.601)] == [*[False] * 4, True]
    resumed = RewardPlateau(0.01, 2)
    resumed.load_state_dict({"previous": 0.6, "quiet_epochs": 1})
    assert resumed.update(0.6)
    never = RewardPlateau(tolerance=1.0, patience=0)
    assert not any(never.update(0.5) for _ in range(10))


@pytest.mark.parametrize(
    ("patience", "tolerance", "values", "expected"),
    [
        (1, 0.1, [(0.5, 0.5), (0.375, 0.6)], (1, True)),
        (1, 0.125, [(0.5, 0.5), (0.375, 0.6)], None),  # a fall by the tolerance itself is not more than it
        (1, 0.1, [(0.5, 0.5), (0.3, 0.5)], (1, False)),
        (1, 0.1, [(0.5, 0.5), (0.3, 0.4)], (1, False)),  # both fell
        (0, 0.1, [(0.5, 0.5)] + [(0.1, 0.9)] * 5, None),
        (2, 0.1, [(0.5, 0.5), (0.3, 0.6), (0.45, 0.7), (0.3, 0.8), (0.3, 0.9)], (4, True)),  # in a row
        (2, 0.1, [(0.5, 0.5), (0.3, 0.6), (0.6, 0.7), (0.55, 0.65), (0.4, 0.9), (0.4, 0.8)], (5, True)),  # new best
    ],
)
def test_collapse_stops_also_after_a_restart(patience, tolerance, values, expected):
    """The judge sees less of what was asked for: hacking if the reward rises meanwhile, but it stops in any case."""
    watch, stopped = BestAndCollapse(tolerance, patience), []
    for epoch, (apr, reward) in enumerate(values):
        watch.update(epoch, apr, reward)
        stopped += [(epoch, watch.hacked)] if watch.stop else []
        state, watch = watch.state_dict(), BestAndCollapse(tolerance, patience)
        watch.load_state_dict(json.loads(json.dumps(state)))
    assert stopped[:1] == ([] if expected is None else [expected])


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
    np.testing.assert_array_equal(tracker.update(["a"], [0.0]), standardized([0.0], [0.5, 0.25, 0.75, 0.0]))
    # integers and float32 are not truncated, and equal rewards give no advantage
    for rewards in ([0, 1, 1, 1], np.array([0, 1, 1, 1], dtype=np.float32)):
        advantages = PerPromptStatTracker(8, 8).update(["a"] * 4, rewards)
        assert advantages.dtype == np.float64
        np.testing.assert_array_equal(advantages, standardized([0, 1, 1, 1], [0, 1, 1, 1]))
    assert not PerPromptStatTracker(8, 1).update(["a"] * 3, [0.5] * 3).any()
    assert not group_advantages(["a", "a", "b"], [0.5, 0.5, 1.0]).any()
    assert not compute_advantages("global", None, ["a", "b"], [1.0, 1.0]).any()


@pytest.mark.parametrize("prompts", [["a", "b", "a", "c"], [3, 1, 3, 2]], ids=["text", "integers"])
def test_state_survives_json(prompts):
    rewards = [0.1, 1 / 3, 0.7, 0.2]
    original = PerPromptStatTracker(8, 2)
    original.update(prompts, rewards)
    restored = PerPromptStatTracker(8, 2)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    np.testing.assert_array_equal(restored.update(prompts, rewards[::-1]), original.update(prompts, rewards[::-1]))
    smaller = PerPromptStatTracker(2, 1)  # keeps the newest
    smaller.load_state_dict({"rewards": [["a", [1.0, 2.0, 3.0, 5.0]]]})
    assert smaller.state_dict() == {"rewards": [["a", [3.0, 5.0]]]}


def test_group_and_global_advantages():
    prompts, rewards = ["a", "b", "a", "b", "a"], np.array([1.0, 5.0, 2.0, 9.0, 6.0])
    grouped = group_advantages(prompts, rewards.tolist())
    for own in ([0, 2, 4], [1, 3]):
        np.testing.assert_array_equal(grouped[own], standardized(rewards[own], rewards[own]))
    over_all = compute_advantages("global", None, prompts, rewards.tolist())
    np.testing.assert_array_equal(over_all, standardized(rewards, rewards))


def test_a_column_of_rewards_is_refused():
    """(N, 1) against N prompts would be broadcast to (N, N)."""
    prompts, column, tracker = ["a", "b"], np.array([[1.0], [2.0]]), PerPromptStatTracker(8, 1)
    for call in (tracker.update, group_advantages, reward_statistics, partial(compute_advantages, "global", None)):
        with pytest.raises(ValueError, match="equal length"):
            call(prompts, column)
    assert tracker.state_dict() == {"rewards": []}


def test_statistics_count_prompts_that_taught_nothing():
    # "a" differs, "b" is equal (0.1 three times: std() is not exactly 0), "c" and "d" were drawn once
    prompts, rewards = ["a", "b", "a", "b", "c", "b", "d"], [1.0, 0.1, 0.0, 0.1, 0.7, 0.1, 0.2]
    statistics = reward_statistics(prompts, rewards, {"jpeg": [1, 2, 3, 4, 5, 6, 7]})
    names = "zero_std_share", "reward_min", "reward_max", "reward_jpeg_mean", "reward_jpeg_std"
    assert [statistics[name] for name in names] == [3 / 4, 0.0, 1.0, 4.0, 2.0]
    assert statistics["per_prompt_reward_std"] == pytest.approx(0.25)  # of "a" and "b"
    assert reward_statistics(["a", "b"], [1.0, 2.0])["zero_std_share"] == 1.0
    assert reward_statistics(["a", "a"], [1.0, 2.0])["zero_std_share"] == 0.0

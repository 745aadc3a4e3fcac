"""Randomness as a function of progress, the order of updates, batch geometry and the stopping criterion."""

import pytest
import torch
from ml_collections import ConfigDict

from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.prompts import get_prompt_fn
from ddpo_pytorch.rollout import (
    Trajectories,
    draw_prompts,
    generators,
    sample_trajectories,
    timestep_order,
    update_order,
)
from ddpo_pytorch.training.run_state import RewardPlateau
from ddpo_pytorch.training.setup import batch_sizes
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, derived_seed


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


def test_images_of_a_prompt_come_together():
    prompts, _ = draw_prompts(get_prompt_fn("isic_all"), 0, 0, 24, images_per_prompt=8)
    assert len(prompts) == 24 and all(len(set(prompts[i : i + 8])) == 1 for i in (0, 8, 16))


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


def test_a_sample_does_not_depend_on_its_batch(tiny_pipeline_dir):
    pipe = load_pipeline(tiny_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    table = PromptEmbeddings(pipe)
    prompts, _ = draw_prompts(get_prompt_fn("isic_all"), 0, 0, 4)

    def draw(indices):
        noise = generators(torch.device("cpu"), 0, Stream.NOISE, 0, indices)
        return sample_trajectories(pipe, table, [prompts[i] for i in indices], noise, Sampling(3, 2.0, 1.0))

    images, whole = draw(range(4))
    parts = [draw([0, 1]), draw([2, 3])]
    joined = Trajectories.like(parts[0][1], 4)
    for places, (_, part) in zip(([0, 1], [2, 3]), parts, strict=True):
        joined.put(places, part)
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
    assert geometry(timestep_window=(0.2, 0.75), timestep_fraction=0.5).timestep_window == (2, 8)
    assert geometry(timestep_window=(0.2, 0.75), timestep_fraction=0.5).train_timesteps == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"gradient_accumulation_steps": 3}, "= 32 samples .* = 12"),
        ({"images_per_prompt": 5}, "does not divide the 32"),
        ({"num_batches_per_epoch": 0}, "sample.num_batches_per_epoch is 0"),
        ({"timestep_window": (0.5, 0.5)}, "timestep_window"),
        ({"timestep_fraction": 0.05}, "less than one"),
    ],
)
def test_geometry_that_does_not_fit(overrides, expected):
    with pytest.raises(UserError, match=expected):
        geometry(**overrides)


def test_reward_plateau():
    plateau = RewardPlateau(tolerance=0.01, patience=2)
    assert [plateau.update(reward) for reward in (0.5, 0.505, 0.6, 0.605, 0.601)] == [False, False, False, False, True]
    resumed = RewardPlateau(0.01, 2)
    resumed.load_state_dict({"previous": 0.6, "quiet_epochs": 1})
    assert resumed.update(0.6)
    never = RewardPlateau(tolerance=1.0, patience=0)
    assert not any(never.update(0.5) for _ in range(10))

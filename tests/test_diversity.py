"""Vendi score and pairwise distance against definitions, their intervals, and pairs within prompts."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from ddpo_pytorch.metrics.diversity import within_pairs, within_prompt_diversity
from ddpo_pytorch.utils.errors import UserError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def of_one_prompt(features):
    """(Vendi score, pairwise distance) of all rows."""
    result = within_prompt_diversity(features, np.zeros(len(features)), len(features), 0)
    assert all(estimate.low is None and estimate.high is None for estimate in result.values())
    return result["vendi"].value, result["pairwise_distance"].value


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (2, 4)])
def test_scores_equal_their_definitions(shape):
    features = normal(1, *shape) + 0.5
    kernel = np.array([[1 - scipy.spatial.distance.cosine(a, b) for a in features] for b in features])
    values = np.clip(np.linalg.eigvalsh(kernel / len(features)), 0, None)
    vendi, distance = of_one_prompt(features)
    assert vendi == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-9)
    assert distance == pytest.approx(scipy.spatial.distance.pdist(features, "cosine").mean(), rel=1e-10)


def test_scores_that_are_known():
    assert of_one_prompt(np.ones((40, 6))) == pytest.approx((1, 0), abs=1e-9)
    assert of_one_prompt(np.eye(12) * 7) == pytest.approx((12, 1))  # all different
    assert of_one_prompt(np.repeat(np.eye(5), 8, axis=0))[0] == pytest.approx(5)  # five kinds
    assert of_one_prompt(np.repeat(np.eye(2), [1, 3], axis=0))[0] == pytest.approx(4 / 3**0.75)
    assert of_one_prompt(np.array([[1.0, 0], [-2, 0]]))[1] == pytest.approx(2)
    features = normal(2, 25, 8) + 0.3
    assert of_one_prompt(features.astype(np.float32) * 1e25) == pytest.approx(of_one_prompt(features), rel=1e-6)


def test_features_and_prompts_that_are_not_usable():
    features = normal(3, 6, 4)
    features[4] = 0
    with pytest.raises(ValueError, match="features: row 4 is zero"):
        of_one_prompt(features)
    with pytest.raises(ValueError, match="features: row 2 holds NaN"):
        of_one_prompt(np.where(np.arange(6)[:, None] == 2, np.nan, 1.0))
    for groups, per_group, message in ((np.repeat([0, 1], 3), 4, "4 images each.* 3"), (np.arange(6), 1, "2 images")):
        with pytest.raises(UserError, match=message):
            within_prompt_diversity(normal(6, 6, 3), groups, per_group, 0)


def test_complete_prompts_are_averaged():
    features, groups = normal(4, 60, 10) + 0.5, np.random.default_rng(0).permutation(np.repeat([2, 5, 7], 20))
    result = within_prompt_diversity(features, groups, 20, 0)
    for number, name in enumerate(("vendi", "pairwise_distance")):
        scores = [of_one_prompt(features[groups == group])[number] for group in (2, 5, 7)]
        estimate = result[name]
        assert estimate.value == pytest.approx(np.mean(scores), rel=1e-12) and estimate.n == 60
        # some of 200 draws of three prompts hold one of them three times
        assert (estimate.low, estimate.high) == pytest.approx((min(scores), max(scores)), rel=1e-9)
    assert within_prompt_diversity(features, groups, 20, 0) == result


def test_prompts_enter_with_equally_many_images_and_small_ones_are_left_out():
    features, groups = normal(5, 100, 300), np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
    result = within_prompt_diversity(features, groups, 15, 1)["vendi"]
    # nearly orthogonal rows count about once each, whatever the size of their prompt
    assert 13 < result.value < 15 and result.n == 45 and "3 prompts (1 prompts" in result.how
    assert within_prompt_diversity(features, groups, 15, 2)["vendi"].value != result.value


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    def prompts(rng, count, images):
        # images of a prompt scatter around its direction, more or less from prompt to prompt
        centres, scatter = rng.normal(size=(count, 1, 6)), rng.uniform(0.3, 1.0, (count, 1, 1))
        features = centres + scatter * rng.normal(size=(count, images, 6))
        return features.reshape(-1, 6), np.repeat(np.arange(count), images)

    def distance(rng, count, images, **options):
        return within_prompt_diversity(*prompts(rng, count, images), 10, 0, **options)["pairwise_distance"]

    truth = distance(np.random.default_rng(0), 3000, 10, replicates=1).value
    estimates = [distance(np.random.default_rng([seed, 1]), 24, 12, replicates=100) for seed in range(120)]
    assert 0.90 < np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) < 0.99


# --- pairs ---


def test_pairs_form_a_circle_within_each_prompt():
    groups = np.array([0] * 6 + [1] * 2 + [2] + [3] * 3)
    pairs = within_pairs(groups, 0, [f"{group}/{i}" for i, group in enumerate(groups)])
    assert all(groups[a] == groups[b] and a != b for a, b in pairs)
    assert [sum(groups[a] == group for a, _ in pairs) for group in range(4)] == [6, 1, 0, 3]
    partner, position, visited = dict(pairs), 0, set()
    while position not in visited:  # one circle, not two smaller ones
        visited.add(position)
        position = partner[position]
    assert visited == set(range(6))


def test_pairs_depend_on_the_seed_and_the_keys_alone():
    groups = np.repeat([0, 1, 2], 20)
    keys = [f"caption {group}/{i % 20}" for i, group in enumerate(groups)]
    pairs = [(keys[a], keys[b]) for a, b in within_pairs(groups, 3, keys)]
    order = np.random.default_rng(0).permutation(60)
    moved = [keys[i] for i in order]
    # another order of the files and other numbers for the prompts
    again = [(moved[a], moved[b]) for a, b in within_pairs(9 - groups[order], 3, moved)]
    assert again == pairs
    assert [(keys[a], keys[b]) for a, b in within_pairs(groups, 4, keys)] != pairs
    with pytest.raises(ValueError, match="different keys"):
        within_pairs(groups, 0, keys[:-1] + keys[:1])

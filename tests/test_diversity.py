"""Vendi score and pairwise distance against definitions, their intervals, and pairs within prompts."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from ddpo_pytorch.metrics.diversity import mean_pairwise_distance, spread, vendi_score, within_pairs
from ddpo_pytorch.utils.errors import UserError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# --- scores ---


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (1, 4)])
def test_the_vendi_score_is_the_exponential_of_the_eigenvalues_entropy(shape):
    features = normal(1, *shape) + 0.5
    kernel = np.array([[1 - scipy.spatial.distance.cosine(a, b) for a in features] for b in features])
    values = np.clip(np.linalg.eigvalsh(kernel / len(features)), 0, None)
    assert vendi_score(features) == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-9)


def test_vendi_scores_that_are_known():
    assert vendi_score(np.ones((40, 6))) == pytest.approx(1)
    assert vendi_score(np.eye(12) * 7) == pytest.approx(12)  # all different
    assert vendi_score(np.repeat(np.eye(5), 8, axis=0)) == pytest.approx(5)  # five kinds
    assert vendi_score(np.repeat(np.eye(2), [1, 3], axis=0)) == pytest.approx(4 / 3**0.75)


def test_the_pairwise_distance_is_the_mean_over_pairs():
    features = normal(2, 25, 8) + 0.3
    expected = scipy.spatial.distance.pdist(features, "cosine").mean()
    assert mean_pairwise_distance(features) == pytest.approx(expected, rel=1e-10)
    assert mean_pairwise_distance(features.astype(np.float32) * 1e25) == pytest.approx(expected, rel=1e-6)
    assert mean_pairwise_distance(np.ones((9, 3))) < 1e-12
    assert mean_pairwise_distance(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(2)


def test_features_that_are_not_usable():
    features = normal(3, 6, 4)
    features[4] = 0
    for measure in (vendi_score, mean_pairwise_distance):
        with pytest.raises(ValueError, match="features: row 4 is zero"):
            measure(features)
        with pytest.raises(ValueError, match="features: row 2 holds NaN"):
            measure(np.where(np.arange(6)[:, None] == 2, np.nan, 1.0))
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_pairwise_distance(np.ones((1, 3)))
    with pytest.raises(ValueError, match="features: row 4 is zero"):
        spread(features, np.zeros(6), 2, 0)


# --- spread over prompts ---


def test_spread_of_whole_prompts_is_the_mean_of_their_scores():
    features, groups = normal(4, 60, 10) + 0.5, np.random.default_rng(0).permutation(np.repeat([2, 5, 7], 20))
    result = spread(features, groups, 20, 0)
    for name, measure in (("vendi", vendi_score), ("pairwise_distance", mean_pairwise_distance)):
        scores = [measure(features[groups == group]) for group in (2, 5, 7)]
        quantity = result[name]
        assert quantity.value == pytest.approx(np.mean(scores), rel=1e-12) and quantity.n == 60
        # some of 200 draws of three prompts hold one of them three times
        assert (quantity.low, quantity.high) == pytest.approx((min(scores), max(scores)), rel=1e-9)
    assert spread(features, groups, 20, 0) == result


def test_spread_uses_equally_many_images_and_says_which_prompts_it_leaves_out():
    features, groups = normal(5, 100, 300), np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
    result = spread(features, groups, 15, 1)["vendi"]
    # nearly orthogonal rows count about once each, whatever the size of their prompt
    assert 13 < result.value < 15 and result.n == 45
    assert "15 images of each of 3 prompts (1 prompts with fewer left out)" in result.how
    assert spread(features, groups, 15, 2)["vendi"].value != result.value
    lone = spread(features, groups, 50, 0)["pairwise_distance"]
    assert lone.value > 0 and lone.low is None and lone.high is None


@pytest.mark.slow
def test_the_interval_of_the_spread_covers_the_truth():
    def prompts(rng, count, images):
        # images of a prompt scatter around its direction, more or less from prompt to prompt
        centres, scatter = rng.normal(size=(count, 1, 6)), rng.uniform(0.3, 1.0, (count, 1, 1))
        features = centres + scatter * rng.normal(size=(count, images, 6))
        return features.reshape(-1, 6), np.repeat(np.arange(count), images)

    truth = spread(*prompts(np.random.default_rng(0), 5000, 10), 10, 0, replicates=1)["pairwise_distance"].value
    held = []
    for seed in range(300):
        quantity = spread(*prompts(np.random.default_rng([seed, 1]), 24, 12), 10, seed)["pairwise_distance"]
        held.append(quantity.low <= truth <= quantity.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_prompts_that_are_too_small():
    with pytest.raises(UserError, match="prompts with 4 images each, the largest has 3"):
        spread(normal(6, 6, 3), np.repeat([0, 1], 3), 4, 0)
    with pytest.raises(UserError, match="prompts with 2 images each"):
        spread(normal(6, 6, 3), np.arange(6), 1, 0)


# --- pairs ---


def test_pairs_form_a_circle_within_each_prompt():
    groups = np.array([0] * 6 + [1] * 2 + [2] + [3] * 3)
    pairs = within_pairs(groups, 0, [f"{group}/{i}" for i, group in enumerate(groups)])
    assert all(groups[a] == groups[b] and a != b for a, b in pairs)
    assert [sum(groups[a] == group for a, _ in pairs) for group in range(4)] == [6, 1, 0, 3]
    assert sorted(a for a, _ in pairs if groups[a] == 0) == sorted(b for _, b in pairs if groups[b] == 0)
    partner = dict(pairs)
    position, visited = 0, set()
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

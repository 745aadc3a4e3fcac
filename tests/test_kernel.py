"""The kernel distance against torch-fidelity, plain loops and simulations."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.utils.errors import UserError


def normal(seed, count, width, scale=1.0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, scale, (count, width))


def theirs(x, y, seed, subsets, size):
    result = kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]


def by_loops(x, y):
    """Unbiased squared MMD, pair by pair."""
    width, total = len(x[0]), 0.0
    for sign, a, b in ((1, x, x), (1, y, y), (-2, x, y)):
        values = [
            (sum(p * q for p, q in zip(one, other, strict=True)) / width + 1) ** 3
            for i, one in enumerate(a)
            for j, other in enumerate(b)
            if a is not b or i != j
        ]
        total += sign * sum(values) / len(values)
    return total


@pytest.mark.parametrize("seed", [0, 2020])
def test_it_equals_torch_fidelity_on_the_same_subsets(seed):
    x, y = normal(1, 300, 40, 2.0, 0.5), normal(2, 250, 40, 1.5)
    mean, deviation = theirs(x, y, seed, 20, 100)
    quantity = kernel_distance(x, y, seed, subsets=20, subset_size=100)
    assert quantity.value == pytest.approx(mean, abs=1e-9, rel=1e-9)
    assert f"sd {deviation:.3g} over 20 subsets of 100" in quantity.how and quantity.n == 300


def test_it_equals_plain_loops():
    x, y = normal(3, 17, 6), normal(4, 17, 6, 1.4, 0.2)
    quantity = kernel_distance(x, y, 0, subsets=3)  # subsets of all 17
    assert quantity.value == pytest.approx(by_loops(x.tolist(), y.tolist()), rel=1e-12)
    assert "3 subsets of 17" in quantity.how


def test_single_precision_features_are_computed_in_double():
    x, y = normal(5, 200, 64).astype(np.float32), normal(6, 200, 64, 1.1).astype(np.float32)
    value = kernel_distance(x, y, 0, 5, 50).value
    assert value == pytest.approx(theirs(x.astype(np.float64), y.astype(np.float64), 0, 5, 50)[0], rel=1e-12)


def test_it_is_unbiased():
    values = np.array([kernel_distance(*normal(seed, 80, 8).reshape(2, 40, 8), 0, 2).value for seed in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20 and values.min() < 0 < values.max()


@pytest.mark.slow
@pytest.mark.parametrize("scale, offset", [(1.3, 0.3), (1.0, 0.2)])
@pytest.mark.parametrize("count, size", [(120, 40), (120, 1000)])
def test_the_interval_covers_the_truth(scale, offset, count, size):
    truth = np.mean(
        [
            kernel_distance(normal(s, 2000, 6), normal(s + 99, 2000, 6, scale, offset), 0, 1, 2000).value
            for s in range(8)
        ]
    )
    held = []
    for seed in range(300):
        x, y = normal([seed, 1], count, 6), normal([seed, 2], count + 30, 6, scale, offset)
        quantity = kernel_distance(x, y, seed, subsets=30, subset_size=size)
        held.append(quantity.low <= truth <= quantity.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_the_interval_holds_zero_where_the_sets_are_alike():
    held = []
    for seed in range(300):
        quantity = kernel_distance(normal([seed, 1], 100, 6), normal([seed, 2], 100, 6), seed, 5, 50)
        held.append(quantity.low <= 0 <= quantity.high)
    assert 0.95 <= np.mean(held) < 1


def test_three_images_have_no_interval():
    quantity = kernel_distance(normal(0, 3, 4), normal(1, 9, 4), 0)
    assert quantity.value is not None and quantity.low is None and quantity.high is None


def test_sets_that_are_too_small_or_not_finite():
    with pytest.raises(UserError, match="at least 2 images in each set, got 5 and 1"):
        kernel_distance(normal(0, 5, 3), normal(1, 1, 3), 0)
    y = normal(1, 9, 3)
    y[[4, 6], 2] = np.nan
    with pytest.raises(ValueError, match="second set: row 4 holds NaN"):
        kernel_distance(normal(0, 9, 3), y, 0)

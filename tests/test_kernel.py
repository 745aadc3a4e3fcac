"""The kernel distance against torch-fidelity, plain loops and simulations."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.utils.errors import UserError


def normal(seed, count, width, scale=1.0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, scale, (count, width))


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_equals_torch_fidelity_on_the_same_subsets(dtype):
    x, y = normal(1, 300, 40, 2.0, 0.5).astype(dtype), normal(2, 250, 40, 1.5).astype(dtype)
    theirs = kid_features_to_metric(
        *(torch.from_numpy(rows.astype(np.float64)) for rows in (x, y)),
        kid_subsets=20,
        kid_subset_size=100,
        rng_seed=2020,
        verbose=False,
    )
    estimate = kernel_distance(x, y, 2020, subsets=20, subset_size=100)
    assert estimate.value == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-9, rel=1e-9)
    deviation = theirs["kernel_inception_distance_std"]
    assert f"sd {deviation:.3g} over 20 subsets of 100" in estimate.how and estimate.n == 300


def test_it_equals_plain_loops():
    x, y = normal(3, 17, 6), normal(4, 17, 6, 1.4, 0.2)
    estimate = kernel_distance(x, y, 0, subsets=3)  # subsets of all 17
    assert estimate.value == pytest.approx(by_loops(x.tolist(), y.tolist()), rel=1e-12)


def test_it_is_unbiased():
    values = np.array([kernel_distance(*normal(seed, 80, 8).reshape(2, 40, 8), 0, 2).value for seed in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20 and values.min() < 0 < values.max()


@pytest.mark.slow
@pytest.mark.parametrize("scale, offset, size", [(1.3, 0.3, 40), (1.0, 0.2, 1000)])
def test_the_interval_covers_the_truth(scale, offset, size):
    truth = np.mean(
        [
            kernel_distance(normal(s, 2000, 6), normal(s + 99, 2000, 6, scale, offset), 0, 1, 2000).value
            for s in range(8)
        ]
    )
    held = []
    for seed in range(150):
        x, y = normal([seed, 1], 120, 6), normal([seed, 2], 150, 6, scale, offset)
        estimate = kernel_distance(x, y, seed, subsets=10, subset_size=size)
        held.append(estimate.low <= truth <= estimate.high)
    assert 0.90 < np.mean(held) < 0.99


def test_the_interval_holds_zero_for_equal_distributions():
    held = []
    for seed in range(300):
        estimate = kernel_distance(normal([seed, 1], 100, 6), normal([seed, 2], 100, 6), seed, 5, 50)
        held.append(estimate.low <= 0 <= estimate.high)
    assert 0.95 < np.mean(held) < 1


def test_sets_that_are_too_small_or_not_finite():
    three = kernel_distance(normal(0, 3, 4), normal(1, 9, 4), 0)
    assert three.value is not None and three.low is None and three.high is None
    with pytest.raises(UserError, match="at least 2 images.* 5 and 1"):
        kernel_distance(normal(0, 5, 3), normal(1, 1, 3), 0)
    y = normal(1, 9, 3)
    y[[4, 6], 2] = np.nan
    with pytest.raises(ValueError, match="second set: row 4"):
        kernel_distance(normal(0, 9, 3), y, 0)

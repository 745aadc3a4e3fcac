"""Precision and arithmetic of moments, and the jackknife interval of the Frechet distance."""

import numpy as np
import pytest
import torch

from ddpo_pytorch.metrics.fidelity import Moments, frechet_distance, frechet_jackknife, moments
from ddpo_pytorch.metrics.intervals import t_quantile


def normal(seed, count, width, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scale + offset


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e6])
def test_covariances_keep_their_precision_far_from_zero(offset):
    features = normal(0, 400, 12, offset=offset)
    # the reference takes the offset away first, which is exact but for the rounding of the features themselves
    expected = np.cov((features - offset).numpy(), rowvar=False)
    parts = Moments.zeros(12, shift=features[0])
    for part in features.split([3, 190, 207]):
        parts.add(part)
    for result in (moments(features), parts, moments(features[:100]) + moments(features[100:])):
        mean, covariance = result.gaussian()
        np.testing.assert_allclose(covariance, expected, atol=1e-9)
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14, atol=1e-14)


def test_without_a_shift_the_sums_are_the_plain_ones():
    features, plain = normal(1, 50, 4), Moments.zeros(4)
    plain.add(features)
    torch.testing.assert_close(plain.total, features.sum(0))
    torch.testing.assert_close(plain.outer, features.T @ features)
    moved = moments(features).shifted(0.0)
    torch.testing.assert_close(moved.total, plain.total)
    torch.testing.assert_close(moved.outer, plain.outer)


def test_moments_add_and_subtract_about_different_shifts():
    x, y = normal(2, 60, 5, offset=100.0), normal(3, 31, 5, offset=-40.0)
    both = moments(x) + moments(y)
    for one, other in zip(both.gaussian(), moments(torch.cat([x, y])).gaussian(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert int(both.count) == 91
    for one, other in zip((both - moments(y)).gaussian(), moments(x).gaussian(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert int(moments(x).count) == 60  # the operands stay as they were


def test_a_row_that_is_not_finite_is_named():
    features, collected = normal(4, 20, 3), Moments.zeros(3)
    collected.add(features)
    features[7, 1] = torch.inf
    with pytest.raises(ValueError, match="features: row 27 holds NaN or infinity"):
        collected.add(features)
    assert int(collected.count) == 20


# --- jackknife ---


def test_the_jackknife_equals_its_definition():
    fake, real = normal(5, 120, 6, 1.3), moments(normal(6, 200, 6))
    quantity = frechet_jackknife([moments(part) for part in fake.split(20)], real)
    left = [frechet_distance(moments(torch.cat([fake[: 20 * i], fake[20 * i + 20 :]])), real) for i in range(6)]
    error = np.sqrt(5 / 6 * np.square(left - np.mean(left)).sum())
    assert quantity.value == pytest.approx(frechet_distance(moments(fake), real), rel=1e-10) and quantity.n == 120
    assert quantity.high - quantity.value == pytest.approx(t_quantile(5) * error, rel=1e-6)
    assert quantity.low == pytest.approx(max(0.0, 2 * quantity.value - quantity.high), abs=1e-9)


def test_unequal_groups_change_little():
    fake, real = normal(7, 1000, 4, 1.5), moments(normal(8, 1000, 4))
    widths = []
    for sizes in ([100] * 10, [90, 110] * 5, [60, 140] * 5):
        quantity = frechet_jackknife([moments(part) for part in fake.split(sizes)], real)
        widths.append(quantity.high - quantity.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.3) and widths[2] == pytest.approx(widths[0], rel=0.5)


def test_one_group_has_no_interval_and_empty_groups_are_refused():
    fake, real = moments(normal(9, 30, 4)), moments(normal(10, 30, 4))
    quantity = frechet_jackknife([fake], real)
    assert quantity.value == pytest.approx(frechet_distance(fake, real)) and quantity.low is None
    with pytest.raises(ValueError, match="images in every group"):
        frechet_jackknife([fake, Moments.zeros(4)], real)


@pytest.mark.slow
def test_the_jackknife_covers_what_the_distance_would_be_on_average():
    # the truth is the mean distance of sets of this size, as the interval is that of the images' randomness
    real = moments(normal(11, 2000, 4))
    distances, held = [], []
    quantities = []
    for seed in range(300):
        fake = normal(1000 + seed, 300, 4, 1.2, 0.3)
        quantities.append(frechet_jackknife([moments(part) for part in fake.split(30)], real))
        distances.append(quantities[-1].value)
    held = [quantity.low <= np.mean(distances) <= quantity.high for quantity in quantities]
    assert 0.90 <= np.mean(held) <= 0.99
    # and a bootstrap, which this is instead of, is off: its distances are all too large
    fake = normal(999, 40, 16)
    rng = np.random.default_rng(0)
    own = frechet_distance(moments(fake), moments(normal(12, 2000, 16)))
    resampled = [
        frechet_distance(moments(fake[rng.integers(0, 40, 40)]), moments(normal(12, 2000, 16))) for _ in range(50)
    ]
    assert min(resampled) > own

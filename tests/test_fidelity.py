"""Frechet distances against closed forms, scipy and torchmetrics, their jackknife interval, and LPIPS pairs."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.metrics.fidelity import Moments, frechet_distance, frechet_jackknife, pair_images
from ddpo_pytorch.utils.errors import UserError


def normal(seed, count, width, scale=1.0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, scale, (count, width))


def gaussian_moments(mean, covariance, count=1000):
    """Moments of a set with exactly this mean and unbiased covariance."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


@pytest.mark.parametrize(("count", "width"), [(500, 16), (20, 64), (2, 8)])
def test_the_distance_of_a_set_to_itself_is_zero_even_when_singular(count, width):
    own = Moments.of(normal(count, count, width, 3, 5))
    assert frechet_distance(own, own) < 1e-9 * float(own.outer.trace()) / count


@pytest.mark.parametrize("count", [12, 300])
def test_the_distance_is_symmetric(count):
    x, y = Moments.of(normal(1, count, 32)), Moments.of(normal(2, count + 5, 32, 2, 1))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)


def test_the_distance_is_the_closed_form_of_diagonal_gaussians():
    mean_x, mean_y = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    std_x, std_y = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, 0.5, 0.1])
    expected = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    got = frechet_distance(gaussian_moments(mean_x, std_x.diag() ** 2), gaussian_moments(mean_y, std_y.diag() ** 2))
    assert got == pytest.approx(float(expected), rel=1e-6)


class Features(torch.nn.Module):
    """Torchmetrics' extractor of features that are given as they are."""

    num_features = 24

    def forward(self, x):
        return x


def test_the_distance_equals_scipy_and_torchmetrics():
    x, y = normal(3, 200, 24) @ normal(4, 24, 24), normal(5, 150, 24) @ normal(6, 24, 24) + 0.3
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    traces = np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root.real)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + traces, rel=1e-8)
    metric = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert distance == pytest.approx(float(metric.compute()), rel=1e-10)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_moments_add_up_and_are_taken_away(offset):
    x, y = normal(7, 137, 8, offset=offset), normal(8, 31, 8, offset=-40)
    parts = sum((Moments.of(part) for part in np.split(x, [1, 21])[1:]), start=Moments.of(x[:1]))
    for result in (parts, Moments.of(np.concatenate([x, y])) - Moments.of(y)):
        mean, covariance = result.gaussian()
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), atol=1e-9)
        assert result.count == 137


def test_features_that_are_not_usable():
    with pytest.raises(UserError, match="at least 2 images in each set, got 1"):
        Moments.of(normal(9, 1, 3)).gaussian()
    features = normal(9, 20, 3)
    features[7, 1] = np.inf
    with pytest.raises(ValueError, match="row 27"):
        Moments.of(features, first=20)


# --- jackknife ---


def test_the_jackknife_equals_its_definition():
    fake, real = normal(5, 120, 6, 1.3), Moments.of(normal(6, 200, 6))
    estimate = frechet_jackknife([Moments.of(part) for part in np.split(fake, 6)], real)
    left = [frechet_distance(Moments.of(np.delete(fake, slice(20 * i, 20 * i + 20), 0)), real) for i in range(6)]
    error = np.sqrt(5 / 6 * np.square(left - np.mean(left)).sum())
    assert estimate.value == pytest.approx(frechet_distance(Moments.of(fake), real), rel=1e-10) and estimate.n == 120
    assert estimate.high - estimate.value == pytest.approx(scipy.stats.t.ppf(0.975, 5) * error, rel=1e-6)
    assert estimate.low == pytest.approx(max(0.0, 2 * estimate.value - estimate.high), abs=1e-9)


def test_unequal_groups_change_little_and_empty_ones_are_refused():
    fake, real = normal(7, 1000, 4, 1.5), Moments.of(normal(8, 1000, 4))
    widths = []
    for sizes in ([100] * 10, [90, 110] * 5, [60, 140] * 5):
        groups = [Moments.of(part) for part in np.split(fake, np.cumsum(sizes)[:-1])]
        estimate = frechet_jackknife(groups, real)
        widths.append(estimate.high - estimate.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.3) and widths[2] == pytest.approx(widths[0], rel=0.5)
    with pytest.raises(ValueError, match="images in every group"):
        frechet_jackknife([groups[0], groups[0] - groups[0]], real)


@pytest.mark.slow
def test_the_jackknife_covers_what_the_distance_would_be_on_average():
    # the truth is the mean distance of sets of this size, as the interval is that of the images' randomness
    real = Moments.of(normal(11, 2000, 4))
    estimates = []
    for seed in range(200):
        fake = normal(1000 + seed, 300, 4, 1.2, 0.3)
        estimates.append(frechet_jackknife([Moments.of(part) for part in np.split(fake, 10)], real))
    truth = np.mean([estimate.value for estimate in estimates])
    assert 0.90 < np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) < 0.99
    # and a bootstrap, which this is instead of, is off: its distances are all too large
    fake, real = normal(999, 40, 16), Moments.of(normal(12, 2000, 16))
    rng = np.random.default_rng(0)
    resampled = [frechet_distance(Moments.of(fake[rng.integers(0, 40, 40)]), real) for _ in range(50)]
    assert min(resampled) > frechet_distance(Moments.of(fake), real)


# --- LPIPS pairs ---


def samples(name, counts):
    return [(Path(name) / f"{i:03d}.png", caption) for caption, count in counts.items() for i in range(count)]


def test_pairs_cover_every_generated_image_and_deal_reals_evenly():
    a, b, c, d = CAPTIONS[:4]
    fake, real = samples("fake", {a: 7, b: 2, c: 3}), samples("real", {a: 3, b: 5, d: 4})
    pairs = pair_images(fake, real, seed=0)
    assert sorted((fake_path, caption) for fake_path, _, caption in pairs) == sorted(fake[:9])
    used = [real_path for _, real_path, caption in pairs if caption == a]
    assert sorted(used.count(path) for path in set(used)) == [2, 2, 3]
    assert len({real_path for _, real_path, caption in pairs if caption == b}) == 2


def test_pairs_depend_on_the_seed_and_on_nothing_else():
    fake, real = samples("fake", {c: 30 for c in CAPTIONS[:3]}), samples("real", {c: 30 for c in CAPTIONS[:3]})
    pairs = pair_images(fake, real, 1)
    assert pair_images(list(reversed(fake)), list(reversed(real)), 1) == pairs
    assert pair_images(fake, real, 2) != pairs
    first = [pair for pair in pairs if pair[2] == CAPTIONS[0]]
    assert pair_images(fake[:30], real[:30], 1) == first
    assert [p[1].name for p in first] != [p[1].name for p in pairs if p[2] == CAPTIONS[1]]

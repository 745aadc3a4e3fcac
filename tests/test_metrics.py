"""APR by hand, Frechet distances against closed forms and other implementations, LPIPS pairing."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.metrics.alignment import count_alignment
from ddpo_pytorch.metrics.fidelity import (
    Moments,
    frechet_distance,
    moments,
    pair_images,
)
from ddpo_pytorch.utils.errors import UserError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- APR ---


def test_apr_by_hand():
    hair, gel_ruler, none = CAPTIONS[8], CAPTIONS[16 + 6], CAPTIONS[0]
    captions = [hair, hair, gel_ruler, gel_ruler, none]
    predictions = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    counts = count_alignment(captions, predictions, LABELS[:4])
    assert counts.total == 5 and counts.apr() == 3 / 5
    assert counts.apr_by_prompt() == {none: 1.0, hair: 0.5, gel_ruler: 0.5}
    single = counts.apr_single_artifact()
    assert len(single) == 8 and single["MEL", "hair"] == 0.5 and single["NV", "hair"] is None
    assert counts.images_by_prompt()[gel_ruler] == 2 and sum(counts.images_by_prompt().values()) == 5
    assert counts.label_accuracy() == {"hair": 1.0, "gel_bubble": 1.0, "ruler": 0.8, "ink": 0.8}


def test_apr_counts_every_label_the_judge_has():
    # six heads: the same artifacts but the wrong disease is not aligned
    predictions = torch.tensor([[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    assert count_alignment([CAPTIONS[8]] * 2, predictions, LABELS).apr() == 0.5
    # columns are found by name, not by position
    assert count_alignment([CAPTIONS[1]], torch.tensor([[1, 0]]), ("ink", "hair")).apr() == 1.0


def test_apr_sums_over_uneven_shares():
    captions = [CAPTIONS[i % 32] for i in range(101)]
    predictions = torch.randint(0, 2, (101, 4), generator=seeded(0))
    whole = count_alignment(captions, predictions, LABELS[:4])
    parts = [count_alignment(captions[i::3], predictions[i::3], LABELS[:4]) for i in range(3)]
    empty = count_alignment([], torch.empty(0), LABELS[:4])
    assert torch.equal((parts[0] + parts[1] + parts[2] + empty).table, whole.table)
    stated = np.array([labels_of(caption)[:4] for caption in captions])
    assert whole.apr() == np.mean((predictions.numpy() == stated).all(1))
    assert empty.apr() is None and empty.apr_by_prompt() == {} and empty.label_accuracy() == {}


# --- Frechet distance ---


def test_frechet_distance_of_a_set_to_itself_is_zero_even_when_singular():
    for count, width in ((500, 16), (20, 64), (2, 8)):
        features = torch.randn(count, width, generator=seeded(count)) * 3 + 5
        own = moments(features)
        assert frechet_distance(own, own) < 1e-9 * float(own.outer.trace()) / count


def test_frechet_distance_is_symmetric():
    for count in (12, 300):
        x = moments(torch.randn(count, 32, generator=seeded(1)))
        y = moments(torch.randn(count + 5, 32, generator=seeded(2)) * 2 + 1)
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)


def gaussian_moments(mean, covariance, count=1000):
    """Moments of a set with exactly this mean and unbiased covariance."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments(
        torch.tensor(float(count)).double(), count * mean, (count - 1) * covariance + count * torch.outer(mean, mean)
    )


def test_frechet_distance_matches_the_closed_form_of_diagonal_gaussians():
    mean_x, mean_y = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    std_x, std_y = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, 0.5, 0.1])
    expected = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    got = frechet_distance(gaussian_moments(mean_x, std_x.diag() ** 2), gaussian_moments(mean_y, std_y.diag() ** 2))
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_matches_scipy():
    x = torch.randn(200, 24, generator=seeded(3)) @ torch.randn(24, 24, generator=seeded(4))
    y = torch.randn(150, 24, generator=seeded(5)) @ torch.randn(24, 24, generator=seeded(6)) + 0.3
    a, b = x.double().numpy(), y.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-8)


def test_moments_add_up_over_uneven_batches_and_refuse_one_sample():
    features = torch.randn(37, 8, generator=seeded(7))
    whole, parts = moments(features), Moments.zeros(8)
    for part in features.split([1, 20, 16]):
        parts.add(part)
    for one, other in zip(whole.gaussian(), parts.gaussian(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.gaussian()[1], np.cov(features.double().numpy(), rowvar=False), atol=1e-12)
    with pytest.raises(UserError, match="at least 2 images in each set, got 1"):
        moments(features[:1]).gaussian()


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

"""Precision, recall, density and coverage against plain loops and torch-fidelity, and where the answer is known."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpo_pytorch.metrics.manifold import manifold_metrics
from ddpo_pytorch.utils.errors import UserError


def normal(seed, count, width, scale=1.0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, scale, (count, width))


def by_loops(real, fake, k):
    """The definitions, one distance at a time."""

    def radii(rows):
        return [sorted(np.linalg.norm(a - b) for j, b in enumerate(rows) if i != j)[k - 1] for i, a in enumerate(rows)]

    real_radii, fake_radii = radii(real), radii(fake)
    inside = [[np.linalg.norm(f - r) < radius for r, radius in zip(real, real_radii, strict=True)] for f in fake]
    recalled = [any(np.linalg.norm(r - f) <= s for f, s in zip(fake, fake_radii, strict=True)) for r in real]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean(recalled),
        "density": np.mean([sum(row) for row in inside]) / k,
        "coverage": np.mean([any(column) for column in zip(*inside, strict=True)]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 1000])
def test_it_equals_plain_loops(k, block):
    real, fake = normal(1, 45, 4), normal(2, 38, 4, 0.8, 0.5)
    expected = by_loops(real, fake, k)
    assert len({round(value, 6) for value in expected.values()}) == 4 and 0 < expected["recall"] < 1
    assert manifold_metrics(real, fake, k, block) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 5000.0])
def test_it_equals_torch_fidelity(offset):
    # far from the origin squared distances would cancel; single precision is what torch-fidelity is given elsewhere
    real, fake = normal(3, 400, 10), normal(4, 300, 10, 0.9, 0.3)
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    ours = manifold_metrics(real + offset, fake + offset, k=3, block=128)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0.1 < ours["recall"] < ours["precision"] < 1


@pytest.mark.parametrize("width", [3, 500])
def test_a_set_compared_with_itself(width):
    real = normal(5, 150, width, offset=100.0).astype(np.float32)
    # a ball holds its centre and k - 1 neighbours; the k-th lies on its edge, however the distance is rounded
    for block in (16, 150):
        expected = {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}
        assert manifold_metrics(real, real.copy(), 5, block) == expected


def test_sets_far_apart_and_sets_that_collapsed():
    real = normal(6, 100, 5)
    apart = manifold_metrics(real, normal(7, 100, 5, offset=50.0))
    assert set(apart.values()) == {0.0}
    collapsed = manifold_metrics(real, normal(8, 100, 5, 0.01))
    assert collapsed["precision"] == 1 and collapsed["density"] > 1.2
    assert collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.5
    similar = manifold_metrics(normal(9, 1000, 5), normal(10, 1000, 5))
    assert similar["density"] == pytest.approx(1, abs=0.1) and similar["coverage"] == pytest.approx(
        1 - 0.5**5, abs=0.03
    )


def test_an_outlier_among_the_real_images_adds_precision_but_little_density():
    real, fake = normal(11, 100, 2), normal(12, 100, 2, 0.1, 6.0)
    with_outlier = np.concatenate([real, np.full((1, 2), 12.0)])
    before, after = manifold_metrics(real, fake), manifold_metrics(with_outlier, fake)
    assert before["precision"] == 0 and after["precision"] == 1 and after["density"] <= 1 / 5


def test_sets_that_are_too_small_or_not_finite():
    with pytest.raises(UserError, match="k=5 need at least 6 images in each set, got 9 real and 5 generated"):
        manifold_metrics(normal(0, 9, 3), normal(1, 5, 3))
    fake = normal(1, 20, 3)
    fake[13, 0] = np.inf
    with pytest.raises(ValueError, match="generated features: row 13 holds NaN"):
        manifold_metrics(normal(0, 9, 3), fake, block=4)

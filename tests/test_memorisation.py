"""Nearest training images against plain loops, copies, ties, and the share that is closer than the baseline."""

import numpy as np
import pytest
import scipy.spatial.distance

from ddpo_pytorch.metrics.memorisation import closest, nearest, share_closer
from ddpo_pytorch.utils.errors import UserError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


class Store:
    """Rows that can only be read in slices, as a store on disk; remembers the longest slice."""

    def __init__(self, rows):
        self.rows, self.longest = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        assert isinstance(key, slice)
        self.longest = max(self.longest, len(self.rows[key]))
        return self.rows[key]


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_it_equals_scipy_and_reads_blocks(block):
    query, reference = Store(normal(1, 45, 12) + 0.2), Store(normal(2, 131, 12) + 0.2)
    distances, indices = nearest(query, reference, block)
    table = scipy.spatial.distance.cdist(query.rows, reference.rows, "cosine")
    np.testing.assert_allclose(distances, table.min(axis=1), atol=1e-13)
    np.testing.assert_array_equal(indices, table.argmin(axis=1))
    assert (query.longest, reference.longest) == (min(block, 45), min(block, 131))


@pytest.mark.parametrize("width", [4, 2048])
def test_copies_are_at_distance_zero_and_ties_go_to_the_first(width):
    reference = np.abs(normal(5, 300, width)).astype(np.float32)
    reference[200:] = reference[:100]  # every one of these is there twice
    copies = [3, 250, 99, 150, 210]
    query = reference[copies] * np.array([[1], [1], [1000], [1], [1e-30]], dtype=np.float32)
    for block in (1, 90, 1000):
        distances, indices = nearest(query, reference, block)
        assert distances.min() >= 0 and distances.max() < 1e-12
        assert indices.tolist() == [3, 50, 99, 150, 10]


def test_opposite_rows_and_rows_without_a_direction():
    assert nearest(np.array([[1.0, 1]]), np.array([[-2.0, -2]]))[0] == pytest.approx(2)
    reference = normal(6, 30, 3)
    reference[17] = 0
    with pytest.raises(ValueError, match="reference features: row 17 is zero"):
        nearest(normal(7, 3, 3), reference, 8)
    reference[17, 0] = np.nan
    with pytest.raises(ValueError, match="reference features: row 17 holds NaN"):
        nearest(normal(7, 3, 3), reference, 8)
    with pytest.raises(ValueError, match="query features: row 17 holds NaN"):
        nearest(reference, normal(7, 3, 3), 8)
    with pytest.raises(UserError, match="at least one training image"):
        nearest(normal(7, 3, 3), np.empty((0, 3)))
    with pytest.raises(UserError, match="baseline"):
        share_closer(np.ones(3), np.empty(0), np.zeros(3), 0)


# --- shares ---


def test_the_share_is_of_samples_strictly_closer_than_the_quantile():
    baseline = np.linspace(0.1, 1.1, 101)
    groups = np.array([0, 0, 1, 1, 1])
    share, threshold = share_closer(np.array([0.05, 0.11, 0.1099, 0.5, 0.6]), baseline, groups, 0)
    assert threshold == pytest.approx(0.11) and share.value == pytest.approx(2 / 5) and share.n == 5
    share, threshold = share_closer(np.array([threshold, 0.5]), baseline, np.zeros(2), 0)
    assert share.value == 0 and share.low == 0 and 0 < share.high < 1
    assert share_closer(baseline, baseline, np.zeros(101), 0, quantile=0.5)[1] == pytest.approx(0.6)


def test_samples_like_the_baseline_have_a_share_of_the_quantile_and_copies_raise_it():
    train, features = normal(8, 400, 5), normal(9, 6000, 5)
    distances = nearest(features, train)[0]
    groups = np.arange(3000) % 4
    similar, _ = share_closer(distances[3000:], distances[:3000], groups, 0)
    assert similar.value == pytest.approx(0.01, abs=0.008)
    copied = distances[3000:].copy()
    copied[::10] = nearest(train[:300] * 2, train)[0]
    more, _ = share_closer(copied, distances[:3000], groups, 0)
    assert more.value == pytest.approx(0.1 + 0.9 * similar.value, abs=0.002) and more.low > similar.high


def test_the_closest_show_each_training_image_once():
    distances = np.array([0.5, 0.1, 0.3, 0.1, 0.2, 0.0])
    indices = np.array([7, 4, 9, 8, 4, 7])
    assert closest(distances, indices, 3) == [5, 1, 3]
    assert closest(distances, indices, 16) == [5, 1, 3, 2]
    assert closest(np.empty(0), np.empty(0, dtype=int), 4) == []

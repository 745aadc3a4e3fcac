"""Pictures of the skin phantom: functions of labels and generator, in which every artifact is seen."""

from collections import Counter

import numpy as np
import pytest

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.phantoms import skin
from ddpo_pytorch.utils.errors import UserError

ISIC_FREQUENCIES = {"hair": 0.376, "gel_bubble": 0.1083, "ruler": 0.134, "ink": 0.0167, "MEL": 0.2291, "NV": 0.7709}
CLEAN_NEVUS = (0, 0, 0, 0, 0, 1)


def picture(labels, seed=0, size=64):
    return skin.draw(labels, np.random.default_rng(seed), size).astype(float)


def test_labels_are_nearly_as_frequent_as_in_isic():
    """Against shares that were counted in ISIC's table; one image in ten is of a combination drawn from all alike."""
    rng = np.random.default_rng(5)
    labels = np.array([skin.sample_labels(rng) for _ in range(20000)])
    rare = {"hair": 14 / 29, "gel_bubble": 13 / 29, "ruler": 15 / 29, "ink": 13 / 29, "MEL": 13 / 29, "NV": 16 / 29}
    wanted = np.array([0.9 * ISIC_FREQUENCIES[name] + 0.1 * rare[name] for name in LABELS])
    assert (np.abs(labels.mean(axis=0) - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(labels))).all()
    counts = Counter(map(tuple, labels.tolist()))
    assert len(counts) == 29 and min(counts.values()) > 30  # 70 expected of the rarest
    never = {(0, 1, 0, 1, 1, 0), (1, 1, 0, 1, 1, 0), (1, 1, 1, 1, 1, 0)}
    assert not never & set(counts)


def test_balanced_labels_are_equally_frequent():
    rng = np.random.default_rng(5)
    counts = Counter(skin.sample_labels(rng, balanced=True) for _ in range(32000))
    assert len(counts) == 32
    assert all(850 < count < 1150 for count in counts.values())  # 1000 expected, standard deviation 31


@pytest.mark.parametrize("index", range(4), ids=LABELS[:4])
def test_an_artifact_is_seen_and_leaves_the_rest_unchanged(index):
    """With and without, same patient: at least 1 % of the pixels change plainly, and at most 60 % at all."""
    labels = tuple(int(k == index) if k < 4 else value for k, value in enumerate(CLEAN_NEVUS))
    for seed, size in zip(range(10), (64, 96) * 5, strict=True):
        change = np.abs(picture(labels, seed, size) - picture(CLEAN_NEVUS, seed, size)).max(axis=2)
        assert (change > 40).mean() > 0.01 and (change > 0).mean() < 0.6


def test_only_ink_is_violet_and_melanoma_has_more_colours_than_a_nevus():
    def violet_share(labels, seed):
        red, green, blue = np.moveaxis(picture(labels, seed), 2, 0)
        return ((blue > red + 20) & (blue > green + 50)).mean()

    def median_spread(labels):  # in the middle of the picture, where the lesion always is
        return np.median([picture(labels, seed)[26:38, 26:38].std(axis=(0, 1)).mean() for seed in range(40)])

    for seed in range(20):
        assert violet_share((0, 0, 0, 1, 0, 1), seed) > 0.005
        assert violet_share((1, 1, 1, 0, 1, 0), seed) == 0
    assert median_spread((0, 0, 0, 0, 1, 0)) > 2 * median_spread(CLEAN_NEVUS)


@pytest.mark.parametrize("labels", [(0, 0, 0, 0, 1, 1), (2, 0, 0, 0, 0, 1), (0, 0, 0, 1)])
def test_labels_that_describe_no_picture_are_refused(labels):
    with pytest.raises(UserError, match="one of MEL, NV set"):
        skin.draw(labels, np.random.default_rng(0))

"""Pictures of the skin phantom: functions of labels and generator, in which every artifact is seen."""

import itertools
from collections import Counter

import numpy as np
import pytest

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.phantoms import skin
from ddpo_pytorch.utils.errors import UserError

ISIC_FREQUENCIES = {"hair": 0.38, "gel_bubble": 0.11, "ruler": 0.14, "ink": 0.016, "MEL": 0.225, "NV": 0.775}
CLEAN_NEVUS = (0, 0, 0, 0, 0, 1)


def picture(labels, seed=0, size=64):
    return skin.draw(labels, np.random.default_rng(seed), size).astype(float)


def test_labels_are_as_frequent_as_in_isic_without_the_unseen_combinations():
    """The rarest seen combination has probability 0.0014: 20000 draws miss it with probability 1e-12."""
    rng = np.random.default_rng(5)
    labels = np.array([skin.sample_labels(rng) for _ in range(20000)])
    wanted = np.array([ISIC_FREQUENCIES[name] for name in LABELS])
    assert (np.abs(labels.mean(axis=0) - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(labels))).all()
    everything = {(*four, mel, 1 - mel) for four in itertools.product((0, 1), repeat=4) for mel in (0, 1)}
    assert len(skin.UNSEEN) == 14 and {tuple(one) for one in labels.tolist()} == everything - skin.UNSEEN
    counts = Counter(skin.sample_labels(rng, balanced=True) for _ in range(18000))
    assert len(counts) == 18 and not skin.UNSEEN & set(counts)
    assert all(850 < count < 1150 for count in counts.values())  # 1000 expected, standard deviation 31
    assert len({skin.sample_labels(rng, balanced=True, unseen=True) for _ in range(1000)}) == 32


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

"""Diversity of the images of one prompt: Vendi score and mean pairwise distance; pairing of a set's images."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ddpo_pytorch.metrics.intervals import Estimate, unit_rows
from ddpo_pytorch.utils.cores import eigenvalues, product

DIVERSITY_IMAGES = 64  # per prompt


def within_prompt_diversity(
    features: Any, groups: np.ndarray, per_group: int, seed: int, replicates: int = 200
) -> dict[str, Estimate] | None:
    """Return {"vendi", "pairwise_distance"} of a prompt's images, averaged over prompts; features: (N, F) or `Rows`.

    The Vendi score (Friedman and Dieng 2023), the effective number of different images, is exp of the entropy of the
    eigenvalues of K / n with cosine similarities K (n, n). The pairwise distance is the mean of 1 - cosine similarity.
    Each prompt contributes `per_group` random images, since the Vendi score grows with their number; prompts with fewer
    are skipped; returns None if none is left. Intervals: percentiles over replicates that draw prompts with
    replacement and images, from up to 2 `per_group` of a prompt, without it, as duplicates would lower the diversity.
    """
    numbers, counts = np.unique(groups, return_counts=True)
    used = numbers[counts >= per_group]
    if per_group < 2 or not len(used):
        return None
    rng = np.random.default_rng(seed)
    # row 0 is the value, with every prompt once; the others are replicates
    drawn = np.stack([np.arange(len(used)), *rng.integers(0, len(used), (replicates, len(used)))])
    scores = np.empty((*drawn.shape, 2))
    for prompt, number in enumerate(used):
        indices = np.flatnonzero(groups == number)
        order = np.random.default_rng([seed, int(number), 3]).permutation(len(indices))[: 2 * per_group]
        rows = unit_rows(features[np.sort(indices[order])], "features")
        gram, uses = product(rows, rows), drawn == prompt
        if len(rows) == per_group:  # there is no other subset
            scores[uses] = _scores(gram[None])
            continue
        subsets = np.stack([rng.choice(len(rows), per_group, replace=False) for _ in range(int(uses.sum()))])
        chunks = np.array_split(subsets, 1 + subsets.size * per_group // 2_000_000)
        scores[uses] = np.concatenate([_scores(gram[chunk[:, :, None], chunk[:, None]]) for chunk in chunks])
    value, draws = scores[0].mean(axis=0), scores[1:].mean(axis=1)
    how = f"{per_group} images of each of {len(used)} prompts"
    ends = [(None, None)] * 2
    if len(used) > 1:
        ends = np.percentile(draws, [2.5, 97.5], axis=0).T.tolist()
        how += f"; {replicates} replicates over prompts and, without duplicates, their images"
    both = zip(("vendi", "pairwise_distance"), value.tolist(), ends, strict=True)
    return {name: Estimate(number, *interval, per_group * len(used), how) for name, number, interval in both}


def _scores(grams: np.ndarray) -> np.ndarray:
    """Return (vendi, pairwise distance) (k, 2) from cosine similarities (k, n, n)."""
    size = grams.shape[-1]
    vendi = np.exp(stats.entropy(eigenvalues(grams / size).clip(min=0), axis=-1))  # below 0 by rounding only
    distances = 1 - (grams.sum(axis=(1, 2)) - size) / (size * (size - 1))
    return np.stack([vendi, np.maximum(distances, 0)], axis=1)


def within_pairs(groups: Sequence[int], seed: int, keys: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of indices of images of the same prompt; groups: prompts (N,), keys: N distinct names.

    The images of a prompt form a circle in which each is paired with the next: n > 2 images give n pairs, two give one,
    one gives none. The order depends only on the seed and the keys, not on the order of the images.
    """
    circles: dict[int, list[int]] = {}
    for position in sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed} {keys[i]}".encode()).digest()):
        circles.setdefault(int(groups[position]), []).append(position)
    pairs = []
    for circle in circles.values():
        following = circle[1:] + circle[:1] if len(circle) > 2 else circle[1:]
        pairs += list(zip(circle, following, strict=False))
    return pairs

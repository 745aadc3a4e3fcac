"""Diversity of the images of one prompt: Vendi score and mean pairwise distance; pairing of a set's images."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import Estimate, unit_rows
from ddpo_pytorch.utils.cores import eigenvalues, product
from ddpo_pytorch.utils.errors import UserError

DIVERSITY_IMAGES = 64  # per prompt


def within_prompt_diversity(
    features: Any, groups: np.ndarray, per_group: int, seed: int, replicates: int = 200
) -> dict[str, Estimate]:
    """Return {"vendi", "pairwise_distance"} of a prompt's images, averaged over prompts; features: (N, F) or `Rows`.

    The Vendi score (Friedman and Dieng 2023) is the effective number of different images, from 1 to `per_group`:
    exp(-sum l log l) over the eigenvalues l of K / n with cosine similarities K (n, n). The pairwise distance is the
    mean of 1 - cosine similarity over distinct pairs.

    Each prompt contributes `per_group` random images, since the Vendi score grows with their number. Prompts with fewer
    are skipped; raises UserError if none is left. Intervals are percentiles over replicates that draw prompts with
    replacement and images, from up to 2 `per_group` of a prompt, without it, as duplicates would lower the diversity.
    """
    numbers, counts = np.unique(groups, return_counts=True)
    used = numbers[counts >= per_group]
    if per_group < 2 or not len(used):
        most = counts.max(initial=0)
        raise UserError(f"diversity needs prompts with {max(2, per_group)} images each, the largest has {most}")
    rng = np.random.default_rng(seed)
    # row 0 is the value, with every prompt once; the others are replicates
    drawn = np.stack([np.arange(len(used)), *rng.integers(0, len(used), (replicates, len(used)))])
    scores = np.empty((*drawn.shape, 2))
    for prompt, number in enumerate(used):
        indices = np.flatnonzero(groups == number)
        order = np.random.default_rng([seed, int(number), 3]).permutation(len(indices))[: 2 * per_group]
        rows = unit_rows(features[np.sort(indices[order])], "features")
        scores[drawn == prompt] = _subset_scores(product(rows, rows), per_group, int((drawn == prompt).sum()), rng)
    value, draws = scores[0].mean(axis=0), scores[1:].mean(axis=1)
    how = f"{per_group} images of each of {len(used)} prompts"
    low = high = (None, None)
    if len(used) > 1:
        low, high = np.percentile(draws, [2.5, 97.5], axis=0).tolist()
        how += f"; {replicates} replicates over prompts and, without duplicates, their images"
    return {
        name: Estimate(float(value[i]), low[i], high[i], per_group * len(used), how)
        for i, name in enumerate(("vendi", "pairwise_distance"))
    }


def _subset_scores(gram: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (vendi, pairwise distance) (count, 2) of random subsets of `size` images with similarities gram (n, n)."""
    if len(gram) == size:
        return np.broadcast_to(_scores(gram[None]), (count, 2))
    results, chunk = [], max(1, 2_000_000 // size**2)
    for start in range(0, count, chunk):
        rows = np.stack([rng.choice(len(gram), size, replace=False) for _ in range(min(chunk, count - start))])
        results.append(_scores(gram[rows[:, :, None], rows[:, None, :]]))
    return np.concatenate(results)


def _scores(grams: np.ndarray) -> np.ndarray:
    """Return (vendi, pairwise distance) (k, 2) from cosine similarities (k, n, n)."""
    size = grams.shape[-1]
    values = eigenvalues(grams / size)
    values = np.where(values > 0, values, 1)  # rounding noise below 0 counts as 0, and 1 log 1 = 0
    vendi = np.exp(-(values * np.log(values)).sum(axis=-1))
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


def diversity_size(models: Sequence[ImageSet]) -> int:
    """Return the number of images per prompt to measure diversity of all sets with, or 0; ignores prompts below 2."""
    counts = [Counter(images.captions) for images in models]
    common = [min(count[caption] for count in counts) for caption in models[0].all_captions]
    return min([DIVERSITY_IMAGES, *(number for number in common if number > 1)]) if max(common) > 1 else 0

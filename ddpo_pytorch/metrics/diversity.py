"""How much the images of one prompt differ: Vendi score, mean pairwise distance, and pairs for within-prompt LPIPS."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ddpo_pytorch.metrics.arrays import blocks, finite, unit_rows
from ddpo_pytorch.metrics.intervals import Quantity
from ddpo_pytorch.utils.cores import eigenvalues, product
from ddpo_pytorch.utils.errors import UserError


def vendi_score(features: np.ndarray) -> float:
    """Effective number of different samples among (n, F), from 1 (all alike) to n (Friedman and Dieng 2023).

    exp(-sum l log l) over the eigenvalues l of K / n, K the cosine similarities. The (F, F) Gram matrix has the same
    eigenvalues but zeros, so the smaller one is used. Raises ValueError for no rows, NaN, infinity or a row of zeros.
    """
    unit = _directions(features, 1)
    rows = unit if len(unit) <= unit.shape[1] else unit.T
    return float(_effective_number(eigenvalues(product(rows, rows) / len(unit))))


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean of 1 - cosine similarity over the distinct pairs of (n, F), in [0, n / (n - 1)].

    1 - (|sum of the unit rows|^2 - n) / (n (n - 1)), without the pairs themselves. Raises ValueError below two rows and
    as `vendi_score` does.
    """
    unit = _directions(features, 2)
    count = len(unit)
    return max(0.0, float(1 - (np.square(unit.sum(axis=0)).sum() - count) / (count * (count - 1))))


def spread(
    features: np.ndarray, groups: np.ndarray, per_group: int, seed: int, replicates: int = 200
) -> dict[str, Quantity]:
    """{"vendi", "pairwise_distance"} of the images of one prompt, mean over the prompts; features (N, F), groups (N,).

    Every prompt enters with `per_group` images drawn by the seed, since the Vendi score grows with their number;
    prompts with fewer are left out, as `how` says, and n counts the images that enter. Intervals are percentiles over
    replicates that draw prompts with replacement and, for each, another `per_group` of its images without: an image
    drawn twice would count as two that do not differ at all, which no real sample has. A prompt with just `per_group`
    images always has the same ones, whose randomness is then in the interval through that of the prompts only. Time is
    replicates x prompts x per_group^3: choose `per_group` below a few hundred.

    Raises UserError where `per_group` is below 2 or no prompt has so many images.
    """
    groups = np.asarray(groups)
    if len(features) != len(groups):
        raise ValueError(f"features and groups must be equally long, got {len(features)} and {len(groups)}")
    numbers, counts = np.unique(groups, return_counts=True)
    used = numbers[counts >= per_group]
    if per_group < 2 or not len(used):
        most = counts.max(initial=0)
        raise UserError(f"diversity needs prompts with {max(2, per_group)} images each, the largest has {most}")
    for start, rows in blocks(features, 1000, "features"):
        unit_rows(rows, "features", start)  # names a row that is not usable before any work is done
    rng = np.random.default_rng(seed)
    # row 0 is the value, with every prompt once; the others are replicates
    drawn = np.stack([np.arange(len(used)), *rng.integers(0, len(used), (replicates, len(used)))])
    scores = np.empty((*drawn.shape, 2))
    for prompt, number in enumerate(used):
        unit = _directions(features[np.flatnonzero(groups == number)], 2)
        scores[drawn == prompt] = _subset_scores(unit, per_group, int((drawn == prompt).sum()), rng)
    value, draws = scores[0].mean(axis=0), scores[1:].mean(axis=1)
    how = f"{per_group} images of each of {len(used)} prompts"
    if len(used) < len(numbers):
        how += f" ({len(numbers) - len(used)} prompts with fewer left out)"
    low = high = (None, None)
    if len(used) > 1:
        low, high = np.percentile(draws, [2.5, 97.5], axis=0).tolist()
        how += f"; {replicates} replicates over prompts and, without duplicates, their images"
    return {
        name: Quantity(float(value[i]), low[i], high[i], per_group * len(used), how)
        for i, name in enumerate(("vendi", "pairwise_distance"))
    }


def within_pairs(groups: np.ndarray, seed: int, keys: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of positions of images of the same prompt; groups (N,) prompts, keys N different stable names.

    The images of a prompt form a circle in which each is paired with the next, so that n > 2 images give n pairs, each
    image being in two; two give one pair, one gives none. The order hangs on the seed and the images' own keys alone:
    folders with the same keys have the same pairs in the same order, wherever their images stand in the list.
    """
    if not len(groups) == len(keys) == len(set(keys)):
        raise ValueError(f"pairs need {len(groups)} different keys, got {len(keys)}, of which {len(set(keys))} differ")
    circles: dict[int, list[int]] = {}
    for position in sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed} {keys[i]}".encode()).digest()):
        circles.setdefault(int(groups[position]), []).append(position)
    pairs = []
    for circle in circles.values():
        following = circle[1:] + circle[:1] if len(circle) > 2 else circle[1:]
        pairs += list(zip(circle, following, strict=False))
    return pairs


def _directions(features: np.ndarray, least: int) -> np.ndarray:
    features = finite(features, "features")
    if len(features) < least:
        raise ValueError(f"diversity needs at least {least} rows of features, got {len(features)}")
    return unit_rows(features, "features")


def _subset_scores(unit: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(vendi, pairwise distance) (count, 2) of `count` random subsets of `size` different rows of unit (n, F)."""
    gram, results = product(unit, unit), []
    if len(unit) == size:
        return np.broadcast_to(_of_grams(gram[None]), (count, 2))
    chunk = max(1, 2_000_000 // size**2)
    for start in range(0, count, chunk):
        rows = np.stack([rng.choice(len(unit), size, replace=False) for _ in range(min(chunk, count - start))])
        results.append(_of_grams(gram[rows[:, :, None], rows[:, None, :]]))
    return np.concatenate(results)


def _of_grams(grams: np.ndarray) -> np.ndarray:
    """(vendi, pairwise distance) (k, 2) from cosine similarities (k, m, m)."""
    size = grams.shape[-1]
    distances = 1 - (grams.sum(axis=(1, 2)) - size) / (size * (size - 1))
    return np.stack([_effective_number(eigenvalues(grams / size)), np.maximum(distances, 0)], axis=1)


def _effective_number(eigenvalues: np.ndarray) -> np.ndarray:
    """exp of the entropy of eigenvalues (..., m); those that rounding has put below 0 are 0."""
    values = np.where(eigenvalues > 0, eigenvalues, 1)  # 1 log 1 = 0
    return np.exp(-(values * np.log(values)).sum(axis=-1))

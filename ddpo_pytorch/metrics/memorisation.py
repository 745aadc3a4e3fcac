"""Generated images that are suspiciously close to a training image, compared with real images outside that set.

This misses copies that are distant in the features (crops, recoloured or partial copies); look at the closest pairs.
"""

from typing import Any

import numpy as np

from ddpo_pytorch.metrics.feature_store import THUMBNAIL, THUMBNAILS
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, unit_rows
from ddpo_pytorch.utils.cores import on_all_cores, product

Neighbours = tuple[np.ndarray, np.ndarray]  # distance and index (N,) of each image's nearest one in another set
TIE = 1e-13  # similarities of equal rows differ by about 1e-15, depending on their position in a block
CLOSEST = 16
# Cosine distance of thumbnails below which images are near copies. On ISIC 2019 at 64 px, 95 % of training images that
# were compressed (JPEG, quality 90) or made 5 % brighter are within 0.001, 0.6 % of validation images are near copies.
NEAR_COPY = 0.003


def nearest(query: Any, reference: Any, block: int = 1000, excluded: np.ndarray | None = None) -> Neighbours:
    """Return cosine distance (N,) and index (N,) of the row of reference (M, F) nearest to each row of query (N, F).

    Both are arrays or `Rows`, read `block` rows at a time. Distances 1 - cos lie in [0, 2]; ties go to the smallest
    index. excluded (N,): for each row of query, a row of reference to ignore. Raises ValueError as `unit_rows`.
    """

    def find(start: int) -> Neighbours:
        rows = unit_rows(query[start : start + block], "query features", start)
        best, where = np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
        for first in range(0, len(reference), block):
            others = unit_rows(reference[first : first + block], "reference features", first)
            similarity = product(rows, others)  # (block, block)
            if excluded is not None:
                itself = excluded[start : start + block] - first
                inside = (itself >= 0) & (itself < len(others))
                similarity[inside, itself[inside]] = -np.inf
            top = similarity.max(axis=1)
            column = (similarity >= top[:, None] - TIE).argmax(axis=1)
            closer = top > best + TIE
            best[closer], where[closer] = top[closer], first + column[closer]
        return np.clip(1 - best, 0, 2), where

    distances, indices = zip(*on_all_cores(find, range(0, len(query), block)), strict=True)
    return np.concatenate(distances), np.concatenate(indices)


def authenticity(train: Any, distances: np.ndarray, indices: np.ndarray, groups: np.ndarray, seed: int) -> Estimate:
    """Return the share of samples farther from the nearest training image than it is from another (Alaa et al. 2022).

    distances, indices (N,): `nearest` of samples in train, `Rows` (M, F), taken as given; groups (N,): prompts.
    """
    if len(train) < 2:
        return Estimate.missing("fewer than 2 training images")
    used, position = np.unique(indices, return_inverse=True)
    gaps, _ = nearest(train[used], train, excluded=used)
    return bootstrap_mean(distances > gaps[position] + TIE, groups, seed, resample_groups=False)


def membership_auc(train: np.ndarray, val: np.ndarray, base: tuple[np.ndarray, np.ndarray] | None = None) -> Estimate:
    """Return the probability that a training image has a lower loss than a validation image; 0.5 is chance.

    train (N,) and val (M,): losses of one model, at least 2 each. `base`: losses of the same images under another
    model, whose probability is subtracted. Intervals of DeLong et al. (1988), for independent images.
    """

    def above(losses: np.ndarray, others: np.ndarray) -> np.ndarray:  # share of others above each; ties count half
        ordered = np.sort(others)
        return 1 - (np.searchsorted(ordered, losses) + np.searchsorted(ordered, losses, "right")) / (2 * len(others))

    parts = above(train, val), 1 - above(val, train)
    if base is not None:
        parts = parts[0] - above(*base), parts[1] - 1 + above(*base[::-1])
    value, images = float(parts[0].mean()), len(train) + len(val)
    error = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))
    if not error:
        return Estimate(value, None, None, images, "no interval: all images agree")
    bounds = (0, 1) if base is None else (-np.inf, np.inf)
    return Estimate.around(value, 1.96 * error, images, "DeLong's standard error, independent images", bounds)


def find_neighbours(extractor: str, images: ImageSet, train: ImageSet) -> Neighbours:
    """Return cosine distance (N,) and index (N,) of the nearest training image; thumbnails match mirrored ones, too."""
    rows, reference = images.rows[extractor], train.rows[extractor]
    best, where = nearest(rows, reference)
    if extractor == THUMBNAILS.name:
        grids = rows[:].reshape(-1, THUMBNAIL, THUMBNAIL)
        for mirrored in (grids[:, :, ::-1], grids[:, ::-1]):
            distances, indices = nearest(mirrored.reshape(len(grids), -1), reference)
            closer = distances < best
            best[closer], where[closer] = distances[closer], indices[closer]
    return best, where


def near_copies(images: ImageSet, other: ImageSet) -> np.ndarray:
    """Return a mask (N,) of images that are near copies, by thumbnail, of an image of the other set."""
    return find_neighbours(THUMBNAILS.name, images, other)[0] < NEAR_COPY


def copies(images: ImageSet, other: ImageSet) -> np.ndarray:
    """Return a mask (N,) of images whose pixels equal those of an image of the other set."""
    known = set(pixel_hashes(other))
    return np.array([digest in known for digest in pixel_hashes(images)])


def pixel_hashes(images: ImageSet) -> list[bytes]:
    """Return a hash of each image's pixels."""
    return [row[1:].tobytes() for row in images.rows["pixels"][:]]


def measure_memorisation(
    extractor: str, fake: ImageSet, train: ImageSet, neighbours: Neighbours, baseline: np.ndarray | None, seed: int
) -> dict:
    """Return the closest pairs, each of another training image, authenticity, and the share of unusually close samples.

    These are closer to the training set than 99 % of real images outside it, whose distances are `baseline` (K,).
    """
    distances, indices = neighbours
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(indices[order], return_index=True)  # of each nearest training image the closest sample
    pairs = [
        {"path": str(fake.paths[i].resolve()), "caption": fake.captions[i]}
        | {"train": str(train.paths[indices[i]].resolve()), "distance": float(distances[i])}
        for i in order[np.sort(first)][:CLOSEST]
    ]
    result = {"closest": pairs}
    if extractor != THUMBNAILS.name:  # they also match mirrored images, which would bias it
        result["authenticity"] = authenticity(train.rows[extractor], distances, indices, fake.groups, seed)
    if baseline is not None and len(baseline):
        threshold = float(np.quantile(baseline, 0.01))  # the interval takes it as given
        result["share_closer"] = bootstrap_mean(distances < threshold, fake.groups, seed, resample_groups=False)
        result["threshold"] = threshold
    return result

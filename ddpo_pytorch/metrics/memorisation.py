"""Generated images that are suspiciously close to a training image.

Distances are cosine distances in a feature space, set against those that real images outside the training set have to
it. What they cannot show: a copy that the features do not see as one (crops, mirrored or recoloured copies, a small
copied region), and nearness that is no copy (a prompt whose images all look alike in this space). A share above the
baseline says that samples crowd around training images; whether one is a copy is for the eye, on the closest pairs.
"""

from typing import Any

import numpy as np

from ddpo_pytorch.metrics.arrays import blocks, finite, unit_rows
from ddpo_pytorch.metrics.intervals import Quantity, bootstrap_mean
from ddpo_pytorch.utils.cores import on_all_cores, product
from ddpo_pytorch.utils.errors import UserError

# Similarities of equal rows differ by about 1e-15, depending on where the rows stand in a block.
TIE = 1e-13


def nearest(query: Any, reference: Any, block: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Cosine distance 1 - cos (N,) of every row of query (N, F) to the nearest row of reference (M, F), and its number.

    Both are feature stores (`arrays`), read in blocks, so memory is about 3 x block x (block + F) numbers for
    each core. Distances
    lie in [0, 2]; equal rows are at most 1e-12 apart; ties go to the smallest number. Time grows with N M F. Raises
    UserError without references, ValueError for NaN, infinity or a row of zeros.
    """
    if not len(reference):
        raise UserError("the nearest training image needs at least one training image, got none")
    distances, indices = np.empty(len(query)), np.empty(len(query), dtype=np.int64)

    def find(start: int) -> None:
        rows = finite(query[start : start + block], "query features", start)
        rows = unit_rows(rows, "query features", start)
        best, where = np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
        for first, others in blocks(reference, block, "reference features"):
            similarity = product(rows, unit_rows(others, "reference features", first))
            top = similarity.max(axis=1)
            column = (similarity >= top[:, None] - TIE).argmax(axis=1)
            closer = top > best + TIE
            best[closer], where[closer] = top[closer], first + column[closer]
        distances[start : start + len(rows)] = np.clip(1 - best, 0, 2)
        indices[start : start + len(rows)] = where

    on_all_cores(find, range(0, len(query), block))
    return distances, indices


def memorisation(
    distances: np.ndarray, baseline: np.ndarray, groups: np.ndarray, seed: int, quantile: float = 0.01
) -> tuple[Quantity, float]:
    """Share of samples strictly closer to the training set than the baseline's quantile, and that distance.

    distances (N,) of the samples and baseline (K,) of real images outside the training set to their nearest training
    image, groups (N,) prompts. Samples like the baseline have a share of about `quantile`. The interval resamples
    images within prompts; the threshold is taken as given, so models compared by one threshold share its error. Where
    `quantile` of the baseline are themselves copies of training images the threshold is 0, and no sample is closer.
    """
    baseline = finite(np.asarray(baseline).reshape(-1), "baseline distances")
    if not len(baseline):
        raise UserError("memorisation needs real images outside the training set as a baseline, got none")
    threshold = float(np.quantile(baseline, quantile))
    closer = finite(np.asarray(distances).reshape(-1), "distances") < threshold
    return bootstrap_mean(closer, groups, seed, resample_groups=False), threshold


def closest(distances: np.ndarray, indices: np.ndarray, count: int) -> list[int]:
    """Positions of up to `count` samples, closest first, each with another training image (`indices`, from `nearest`).

    A training image that many samples copy shows up once, with its closest sample, and leaves room for others. Equal
    distances keep the order of the samples.
    """
    distances, indices = finite(np.asarray(distances).reshape(-1), "distances"), np.asarray(indices)
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(indices[order], return_index=True)
    return order[np.sort(first)][:count].tolist()

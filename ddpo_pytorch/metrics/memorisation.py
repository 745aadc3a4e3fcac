"""Generated images that are suspiciously close to a training image.

Cosine distances to the nearest training image are compared with those of real images outside the training set. They
miss copies that the features do not see as such (crops, recoloured or partial copies), and may find nearness that is no
copy. A share above the baseline says that samples crowd around training images; look at the closest pairs to judge.
"""

from typing import Any

import numpy as np

from ddpo_pytorch.metrics.arrays import finite, unit_rows
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean
from ddpo_pytorch.utils.cores import on_all_cores, product
from ddpo_pytorch.utils.errors import UserError

# similarities of equal rows differ by about 1e-15, depending on their position in a block
TIE = 1e-13


def nearest(query: Any, reference: Any, block: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine distance (N,) and index (N,) of the row of reference (M, F) nearest to each row of query (N, F).

    Both are arrays or `Rows`, read `block` rows at a time. Distances 1 - cos lie in [0, 2]; ties go to the smallest
    index. Raises UserError for an empty reference, ValueError for NaN, infinity or a row of zeros.
    """
    if not len(reference):
        raise UserError("the nearest training image needs at least one training image, got none")

    def find(start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = unit_rows(query[start : start + block], "query features", start)
        best, where = np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
        for first in range(0, len(reference), block):
            others = unit_rows(reference[first : first + block], "reference features", first)
            similarity = product(rows, others)  # (block, block)
            top = similarity.max(axis=1)
            column = (similarity >= top[:, None] - TIE).argmax(axis=1)
            closer = top > best + TIE
            best[closer], where[closer] = top[closer], first + column[closer]
        return np.clip(1 - best, 0, 2), where

    parts = on_all_cores(find, range(0, len(query), block))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def share_closer(
    distances: np.ndarray, baseline: np.ndarray, groups: np.ndarray, seed: int, quantile: float = 0.01
) -> tuple[Estimate, float]:
    """Return the share of samples closer to the training set than the baseline's quantile, and that threshold.

    distances (N,) of samples and baseline (K,) of real images outside the training set to their nearest training image;
    groups (N,) prompts. Samples like the baseline have a share of about `quantile`. The interval resamples images
    within prompts and takes the threshold as given.
    """
    baseline = finite(baseline, "baseline distances")
    if not len(baseline):
        raise UserError("memorisation needs real images outside the training set as a baseline, got none")
    threshold = float(np.quantile(baseline, quantile))
    closer = finite(distances, "distances") < threshold
    return bootstrap_mean(closer, groups, seed, resample_groups=False), threshold


def closest(distances: np.ndarray, indices: np.ndarray, count: int) -> list[int]:
    """Return positions of up to `count` samples, closest first, each with another nearest training image.

    distances and indices (N,) come from `nearest`. A training image that many samples copy appears once.
    """
    order = np.argsort(distances, kind="stable")
    _, first = np.unique(np.asarray(indices)[order], return_index=True)
    return order[np.sort(first)][:count].tolist()

"""Checks and blocks of feature arrays that the metrics share.

A feature store is anything with `len()` and slices `[a:b]` that are (rows, F) arrays of a float type: a numpy array, a
memory map, a CPU tensor. It is read in blocks, so that its size does not decide the memory that is needed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np


def finite(features: Any, what: str, first: int = 0) -> np.ndarray:
    """`features` (N, ...) as float64. Raises ValueError naming the first row with NaN or infinity.

    `what` names the array in the message; `first` is the number of the array's first row, where it is a block of more.
    """
    features = np.asarray(features, dtype=np.float64)
    good = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not good.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(good))} holds NaN or infinity")
    return features


def blocks(store: Any, size: int, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, up to `size` rows as finite float64) over a feature store."""
    for start in range(0, len(store), size):
        yield start, finite(store[start : min(start + size, len(store))], what, start)


def unit_rows(features: np.ndarray, what: str, first: int = 0) -> np.ndarray:
    """Rows (N, F) scaled to length 1. Raises ValueError for a row of zeros, which has no direction."""
    scale = np.abs(features).max(axis=1, keepdims=True, initial=0)
    if not scale.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(scale))} is zero, so it has no cosine distance")
    features = features / scale  # squares of very large or small numbers would leave the range of floats
    return features / np.linalg.norm(features, axis=1, keepdims=True)

"""Checks and normalisation of feature arrays, shared by the metrics."""

from typing import Any

import numpy as np


def finite(features: Any, what: str, first: int = 0) -> np.ndarray:
    """Return `features` (N, ...) as float64. Raises ValueError naming the first row with NaN or infinity.

    `what` names the array in the message; `first` is the number of its first row if it is a block of a larger array.
    """
    features = np.asarray(features, dtype=np.float64)
    good = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not good.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(good))} holds NaN or infinity")
    return features


def unit_rows(features: np.ndarray, what: str, first: int = 0) -> np.ndarray:
    """Return finite rows (N, F) scaled to length 1. Raises ValueError for NaN, infinity and a row of zeros."""
    features = finite(features, what, first)
    scale = np.abs(features).max(axis=1, keepdims=True, initial=0)
    if not scale.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(scale))} is zero, so it has no cosine distance")
    features = features / scale  # squares of very large or small numbers would overflow
    return features / np.linalg.norm(features, axis=1, keepdims=True)

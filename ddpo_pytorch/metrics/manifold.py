"""Precision, recall, density and coverage of generated images from nearest neighbours in a feature space."""

import numpy as np

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.utils.cores import on_all_cores, product
from ddpo_pytorch.utils.errors import UserError

# Squared distances closer than this share of the largest squared norm count as equal: an image that is in both sets
# lies exactly on the edge of some balls.
ROUNDING = 1e-12


def manifold_metrics(real: np.ndarray, fake: np.ndarray, k: int = 5, block: int = 250) -> dict[str, float]:
    """Return {"precision", "recall", "density", "coverage"} of fake (M, F) features against real (N, F) ones.

    The ball of a sample reaches to its k-th nearest other sample of its own set.

    - precision: share of fake samples inside the ball of any real one; recall: of real samples inside the ball of any
      fake one (Kynkaanniemi et al. 2019, k = 3; the edge belongs to the ball).
    - density: mean number of real balls around a fake sample, divided by k; about 1 for equal distributions, and not
      bounded by it. coverage: share of real balls that hold a fake sample (Naeem et al. 2020, k = 5; the edge does not
      belong to the ball).

    Recall and coverage depend on the numbers of samples, so compare equal numbers only. Each core holds a few times
    `block` x max(N, M) distances. Raises UserError if a set has no k neighbours, ValueError for NaN or infinity.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(
            f"precision, recall, density and coverage with k={k} need at least {k + 1} images in each set,"
            f" got {len(real)} real and {len(fake)} generated: give more images"
        )
    real, fake = finite(real, "real features"), finite(fake, "generated features")
    centre = real.mean(axis=0)  # keeps |a|^2 + |b|^2 - 2 a.b from cancelling if all features lie far from 0
    real, fake = real - centre, fake - centre
    slack = ROUNDING * max(np.square(features).sum(axis=1).max() for features in (real, fake))
    real_radius, fake_radius = _radii(real, k, block), _radii(fake, k, block)

    def count(start: int) -> tuple[np.ndarray, ...]:
        distance = _squared_distances(fake[start : start + block], real)  # (block, N)
        inside = distance < real_radius - slack
        recalled = distance <= fake_radius[start : start + block, None] + slack
        precise = (distance <= real_radius + slack).any(axis=1)
        return precise.sum(), recalled.any(axis=0), inside.sum(), inside.any(axis=0)

    precise, recalled, inside, covered = zip(*on_all_cores(count, range(0, len(fake), block)), strict=True)
    return {
        "precision": float(sum(precise) / len(fake)),
        "recall": float(np.any(recalled, axis=0).mean()),
        "density": float(sum(inside) / (k * len(fake))),
        "coverage": float(np.any(covered, axis=0).mean()),
    }


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared distances (A, B) of rows of a (A, F) to rows of b (B, F)."""
    return np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * product(a, b)


def _radii(features: np.ndarray, k: int, block: int) -> np.ndarray:
    """Return the squared distance (N,) of every row to its k-th nearest other row."""

    def radii(start: int) -> np.ndarray:
        distance = _squared_distances(features[start : start + block], features)
        rows = np.arange(len(distance))
        distance[rows, start + rows] = np.inf
        return np.partition(distance, k - 1, axis=1)[:, k - 1]

    return np.concatenate(on_all_cores(radii, range(0, len(features), block)))

"""Precision and recall, density and coverage of generated images, from nearest neighbours in a feature space."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ddpo_pytorch.metrics.arrays import blocks, finite
from ddpo_pytorch.utils.cores import on_all_cores, product
from ddpo_pytorch.utils.errors import UserError

# Distances that differ by less than this share of the largest squared norm are the same distance, rounded differently:
# an image that is in both sets lies exactly on the edge of some balls.
ROUNDING = 1e-12


def manifold_metrics(real: Any, fake: Any, k: int = 5, block: int = 1000) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of fake (M, F) features against real (N, F) ones.

    The ball of a sample reaches to its k-th nearest neighbour in its own set, itself not counted.

    - precision: share of fake samples in the ball of any real one; recall: of real samples in the ball of any fake one
      (Kynkaanniemi et al. 2019, with k = 3; the edge belongs to the ball).
    - density: number of real balls around a fake sample, mean over these, divided by k; about 1 for the same
      distribution and not bounded by it. coverage: share of real balls with a fake sample in them (Naeem et al. 2020,
      with k = 5; the edge does not belong to the ball).

    All but density lie in [0, 1]; recall and coverage depend on the numbers of samples, so compare equal n only. Time
    grows with (N + M)^2 F; memory is `block` x max(N, M) distances. Raises UserError where a set has no k neighbours,
    ValueError for NaN or infinity.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(
            f"precision, recall, density and coverage with k={k} need at least {k + 1} images in each set,"
            f" got {len(real)} real and {len(fake)} generated: give more images"
        )
    centre, slack = _centre_and_slack(real, fake, block)
    real_radius, fake_radius = (_radii(features, centre, k, block) for features in (real, fake))
    covered = np.zeros(len(real), dtype=bool)
    recalled = np.zeros(len(real), dtype=bool)
    precise = balls = 0
    for start, distance in _distances(fake, real, centre, block):
        radius = fake_radius[start : start + len(distance), None]
        precise += int((distance <= real_radius + slack).any(axis=1).sum())
        inside = distance < real_radius - slack
        balls += int(inside.sum())
        covered |= inside.any(axis=0)
        recalled |= (distance <= radius + slack).any(axis=0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.mean()),
        "density": balls / (k * len(fake)),
        "coverage": float(covered.mean()),
    }


def _centre_and_slack(real: Any, fake: Any, block: int) -> tuple[np.ndarray, float]:
    """Mean of real (F,), and the squared distance that counts as rounding noise."""
    centre = sum(part.sum(axis=0) for _, part in blocks(real, block, "real features")) / len(real)
    norms = [
        np.square(part - centre).sum(axis=1).max()
        for features, what in ((real, "real features"), (fake, "generated features"))
        for _, part in blocks(features, block, what)
    ]
    return centre, ROUNDING * float(max(norms))


def _distances(a: Any, b: Any, centre: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances (up to `block`, len(b))) of rows of a to all rows of b."""
    for start, rows in blocks(a, block, "features"):
        rows = rows - centre  # keeps |a|^2 + |b|^2 - 2 a.b from cancelling where all features lie far from 0
        result = np.empty((len(rows), len(b)))
        on_all_cores(partial(_fill, result, rows, b, centre, block), range(0, len(b), block))
        yield start, result


def _fill(result: np.ndarray, rows: np.ndarray, b: Any, centre: np.ndarray, block: int, first: int) -> None:
    """Write squared distances of centred rows to rows `first` ... of b into their columns of result (R, len(b))."""
    columns = finite(b[first : first + block], "features", first) - centre
    part = result[:, first : first + len(columns)]
    np.multiply(product(rows, columns), -2, out=part)
    part += np.square(rows).sum(axis=1)[:, None]
    part += np.square(columns).sum(axis=1)


def _radii(features: Any, centre: np.ndarray, k: int, block: int) -> np.ndarray:
    """Squared distance (N,) of every row to its k-th nearest other row."""
    radii = np.empty(len(features))
    for start, distance in _distances(features, features, centre, block):
        own = np.arange(len(distance))
        distance[own, start + own] = np.inf
        distance.partition(k - 1, axis=1)
        radii[start : start + len(distance)] = distance[:, k - 1]
    return radii

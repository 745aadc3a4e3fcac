"""Kernel distance (KID) between two sets of features (Binkowski et al. 2018)."""

from typing import Any

import numpy as np

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.metrics.intervals import Quantity
from ddpo_pytorch.utils.cores import on_all_cores, product
from ddpo_pytorch.utils.errors import UserError


def kernel_distance(x: Any, y: Any, seed: int, subsets: int = 100, subset_size: int = 1000) -> Quantity:
    """Squared MMD of features x (N, F) and y (M, F) with the kernel k(a, b) = (a.b / F + 1)^3, averaged over subsets.

    Each subset takes m = min(subset_size, N, M) rows of either set without replacement, drawn as torch-fidelity draws
    them from the same seed, and yields the unbiased estimate: means over distinct pairs within x and within y, less
    twice that over all pairs between them. It may be below 0 where the sets are alike. n = N.

    The spread over subsets, which published tables print behind +- (here in `how`), is no interval of the number: it
    depends on m, and is 0 where m = N = M. The interval here is value +- 1.96 se, the randomness of both sets of images
    and of the choice of subsets, from Hoeffding's decomposition of this U-statistic (1948):

        se^2 = 4 z_x / N + 4 z_y / M + 2 w_x / N^2 + 2 w_y / M^2 + spread^2 / subsets

    With h(a) the expected kernel of an image a with the other x less that with y, z_x = var h(x) (near 0 where the sets
    are alike) and w_x the variance that single pairs add, see `_variances`. No interval below 4 rows in a set.

    Raises UserError below two rows in a set, ValueError for NaN or infinity.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images in each set, got {len(x)} and {len(y)}")
    rng = np.random.RandomState(seed % 2**32)  # the old generator, for the same subsets as torch-fidelity
    picked = [[rng.choice(len(rows), size, replace=False) for rows in (x, y)] for _ in range(subsets)]
    found = on_all_cores(lambda own: _estimate(_rows(x, own[0], "first set"), _rows(y, own[1], "second set")), picked)
    estimates, variances = (np.array(column) for column in zip(*found, strict=True))
    value, spread = float(estimates.mean()), float(estimates.std())
    how = f"U-statistic standard error; sd {spread:.3g} over {subsets} subsets of {size}"
    if size < 4:
        return Quantity(value, None, None, len(x), f"fewer than 4 images: no interval; {how}")
    counts = np.array([len(x), len(y)])
    images, pairs = np.maximum(variances.mean(axis=0), 0).T
    half = 1.96 * float(np.sqrt((4 * images / counts + 2 * pairs / counts**2).sum() + spread**2 / subsets))
    return Quantity(value, value - half, value + half, len(x), how)


def _rows(features: Any, picked: np.ndarray, what: str) -> np.ndarray:
    try:
        return finite(features[picked], what)
    except ValueError:
        for row in np.sort(picked):  # the row's number in the set, not in the subset
            finite(features[row : row + 1], what, int(row))
        raise


def _estimate(x: np.ndarray, y: np.ndarray) -> tuple[float, list[tuple[float, float]]]:
    """Unbiased squared MMD of x and y (m, F), and the variances of either side."""
    size = len(x)
    within_x, within_y, between = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(within_x, 0)
    np.fill_diagonal(within_y, 0)
    value = (within_x.sum() + within_y.sum()) / (size * (size - 1)) - 2 * between.mean()
    if size < 4:
        return float(value), [(0.0, 0.0)] * 2
    return float(value), [_variances(within_x, between), _variances(within_y, between.T)]


def _variances(within: np.ndarray, between: np.ndarray) -> tuple[float, float]:
    """(z, w) of one side from its kernels (m, m), the diagonal 0, and those with the other side.

    h as estimated from m images has the variance z + w / m, where w is that of a single pair. Estimated twice, from
    either half of the images, the errors are independent, so that the covariance of the two is z alone.
    """
    size = len(within)
    halves = []
    for columns in (slice(0, size // 2), slice(size // 2, size)):
        itself = np.zeros(size)
        itself[columns] = 1
        partners = itself.sum() - itself
        halves.append(within[:, columns].sum(axis=1) / partners - between[:, columns].mean(axis=1))
    centred = [half - half.mean() for half in halves]
    shared = (centred[0] * centred[1]).sum() / (size - 1)
    whole = within.sum(axis=1) / (size - 1) - between.mean(axis=1)
    return float(shared), float(size * (whole.var(ddof=1) - shared))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = product(a, b)
    base /= a.shape[1]
    base += 1
    return base * base * base

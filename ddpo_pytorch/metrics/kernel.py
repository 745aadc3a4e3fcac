"""Kernel Inception distance (KID) between two sets of features (Binkowski et al. 2018), with a standard error."""

from typing import Any

import numpy as np
import torch
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.metrics.intervals import Estimate
from ddpo_pytorch.utils.cores import on_all_cores
from ddpo_pytorch.utils.errors import UserError


def kernel_distance(x: Any, y: Any, seed: int, subsets: int = 100, subset_size: int = 1000) -> Estimate:
    """Return the squared MMD of features x (N, F) and y (M, F) with kernel (a.b / F + 1)^3, averaged over subsets.

    Each subset draws m = min(subset_size, N, M) rows of both sets without replacement, the same rows as torch-fidelity
    for this seed, and gives the unbiased estimate, which may be negative for similar sets.

    The standard deviation over subsets, which published tables print behind +- (here in `how`), is no confidence
    interval: it depends on m, and is 0 if m = N = M. The interval here is value +- 1.96 se from Hoeffding's
    decomposition of this U-statistic (1948), including the choice of subsets:

        se^2 = 4 z_x / N + 4 z_y / M + 2 w_x / N^2 + 2 w_y / M^2 + sd^2 / subsets

    With h(a) the mean kernel of image a with the other x minus that with y, z_x is var h(x) (near 0 for similar sets)
    and w_x the variance that single pairs add, see `_variances`. No interval below 4 rows in a set.

    Raises UserError below two rows in a set, ValueError for NaN or infinity.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images in each set, got {len(x)} and {len(y)}")
    x, y = finite(x, "first set"), finite(y, "second set")
    rng = np.random.RandomState(seed % 2**32)  # the legacy generator, as in torch-fidelity
    drawn = [[rng.choice(len(rows), size, replace=False) for rows in (x, y)] for _ in range(subsets)]
    results = on_all_cores(lambda rows: _subset_estimate(x[rows[0]], y[rows[1]]), drawn)
    values, variances = (np.array(column) for column in zip(*results, strict=True))
    value, deviation = float(values.mean()), float(values.std())
    how = f"U-statistic standard error; sd {deviation:.3g} over {subsets} subsets of {size}"
    if size < 4:
        return Estimate(value, None, None, len(x), f"fewer than 4 images: no interval; {how}")
    counts = np.array([len(x), len(y)])
    images, pairs = np.maximum(variances.mean(axis=0), 0).T
    half = 1.96 * float(np.sqrt((4 * images / counts + 2 * pairs / counts**2).sum() + deviation**2 / subsets))
    return Estimate(value, value - half, value + half, len(x), how)


def _subset_estimate(x: np.ndarray, y: np.ndarray) -> tuple[float, list[tuple[float, float]]]:
    """Return the unbiased squared MMD of x and y (m, F), and the variances (z, w) of both sets."""
    a, b = torch.tensor(x), torch.tensor(y)  # copies: memory alignment can change the last bits of a product
    within_x, within_y, between = poly_kernel(a, a), poly_kernel(b, b), poly_kernel(a, b)  # (m, m) each
    value = float(maximum_mean_discrepancy(within_x, between, within_y))
    if len(x) < 4:
        return value, [(0.0, 0.0)] * 2
    return value, [_variances(within_x.numpy(), between.numpy()), _variances(within_y.numpy(), between.numpy().T)]


def _variances(within: np.ndarray, between: np.ndarray) -> tuple[float, float]:
    """Return (z, w) of one set from its kernels (m, m) and those with the other set.

    h estimated from m images has the variance z + w / m. Estimated from each half of the images, its errors are
    independent, so the covariance of the two estimates is z alone.
    """
    size = len(within)
    np.fill_diagonal(within, 0)
    halves = []
    for columns in (slice(0, size // 2), slice(size // 2, size)):
        own = np.zeros(size)
        own[columns] = 1
        halves.append(within[:, columns].sum(axis=1) / (own.sum() - own) - between[:, columns].mean(axis=1))
    first, second = (half - half.mean() for half in halves)
    shared = (first * second).sum() / (size - 1)
    total = within.sum(axis=1) / (size - 1) - between.mean(axis=1)
    return float(shared), float(size * (total.var(ddof=1) - shared))

"""Frechet distance between sets of features, and pairs of generated and real images for LPIPS.

torchmetrics' formula (eigenvalues of Cx Cy) gives the same numbers for regular covariances. With fewer images than
features it puts a set at a distance of about -1e-5 from itself and is not symmetric, so the distance is computed here
from singular values, which are exact to rounding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.metrics.intervals import Estimate
from ddpo_pytorch.utils.cores import on_all_cores, one_thread
from ddpo_pytorch.utils.errors import UserError

JACKKNIFE_GROUPS = 10


@dataclass(frozen=True)
class Moments:
    """Additive moments of features in float64: count, total (F,) = sum of f, outer (F, F) = sum of f f^T."""

    count: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    @one_thread()
    def of(cls, features: np.ndarray, first: int = 0) -> "Moments":
        """Return the moments of (N, F) features. Raises ValueError for NaN or infinity, see `finite`."""
        features = torch.from_numpy(finite(features, "features", first))
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        """Return the moments without those of a subset."""
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def gaussian(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean (F,) and unbiased covariance (F, F). Raises UserError below two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images in each set, got {self.count}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


@one_thread()
def frechet_distance(x: Moments, y: Moments) -> float:
    """Return |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), the Frechet distance of two Gaussians (Heusel et al. 2017).

    With C = A A^T from an eigendecomposition, tr (Cx Cy)^(1/2) is the sum of the singular values of Ax^T Ay.
    """
    return _distance(x, *_mean_and_root(y))


def _distance(x: Moments, mean_y: torch.Tensor, root_y: torch.Tensor) -> float:
    mean_x, root_x = _mean_and_root(x)
    cross = torch.linalg.svdvals(root_x.T @ root_y).sum()
    traces = root_x.square().sum() + root_y.square().sum() - 2 * cross
    return max(0.0, float((mean_x - mean_y).square().sum() + traces))


def _quick_distance(x: Moments, mean_y: torch.Tensor, root_y: torch.Tensor) -> float:
    """Return the distance to about 1e-8 of the variances from the eigenvalues of Ay^T Cx Ay, ten times as fast."""
    mean_x, covariance = x.gaussian()
    cross = torch.linalg.eigvalsh(root_y.T @ covariance @ root_y).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + root_y.square().sum() - 2 * cross
    return float((mean_x - mean_y).square().sum() + traces)


def _mean_and_root(x: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (F,) and A (F, r) with A A^T = the covariance, without directions of rounding noise."""
    mean, covariance = x.gaussian()
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return mean, vectors[:, keep] * values[keep].sqrt()


@one_thread()
def frechet_jackknife(groups: Sequence[Moments], real: Moments) -> Estimate:
    """Return the Frechet distance of all groups together to real, with an interval for the generated images.

    groups: moments of about 10 random parts of the generated images, of similar size; real is taken as given. The
    interval is value +- t se (G - 1 degrees of freedom, se from leaving out one group at a time with weights for
    unequal sizes: Busing, Meijer and van der Leeden 1999), cut at 0. A bootstrap would repeat images, so that all its
    distances are larger than the one they should surround. The bias of few images is not in the interval.
    """
    root = _mean_and_root(real)
    total = sum(groups[1:], groups[0])
    value = _distance(total, *root)
    shares = np.array([group.count / total.count for group in groups])
    if shares.min() <= 0 or total.count * (1 - shares.max()) < 2:
        raise ValueError(f"a jackknife needs images in every group, and 2 outside each: {shares * total.count} images")
    quick = on_all_cores(lambda part: _quick_distance(part, *root), [*(total - group for group in groups), total])
    left_out, same = np.array(quick[:-1]), quick[-1]
    centre = len(groups) * same - ((1 - shares) * left_out).sum()
    pseudo = (same - (1 - shares) * left_out) / shares
    error = np.sqrt(((pseudo - centre) ** 2 * shares / (1 - shares)).mean())
    half = float(stats.t.ppf(0.975, len(groups) - 1) * error)
    how = f"jackknife over {len(groups)} random groups of the generated images"
    return Estimate(value, max(0.0, value - half), value + half, total.count, how)


def moments_of_rows(rows, indices: np.ndarray, block: int = 4096) -> Moments:
    """Return the moments of the chosen `Rows` (at least one), read a block at a time."""
    parts = (Moments.of(rows.take(indices[at : at + block]), at) for at in range(0, len(indices), block))
    return sum(parts, start=next(parts))


def frechet(real: Moments, fake, indices: np.ndarray, seed: int) -> Estimate:
    """Return the Frechet distance of the chosen `Rows` of generated images to real ones, with a jackknife interval."""
    if len(indices) < 2 * JACKKNIFE_GROUPS:
        value = frechet_distance(moments_of_rows(fake, indices), real)
        estimate = Estimate(value, None, None, len(indices), f"no interval below {2 * JACKKNIFE_GROUPS} images")
    else:
        order = np.random.default_rng([seed, 1]).permutation(indices)
        groups = [moments_of_rows(fake, part) for part in np.array_split(order, JACKKNIFE_GROUPS)]
        estimate = frechet_jackknife(groups, real)
    fewest, features = min(len(indices), real.count), len(real.total)
    if fewest <= features:  # a covariance is singular
        return replace(estimate, how=f"{estimate.how}; {fewest} images of {features} features: biased upwards")
    return estimate


def pair_images(
    fake: Sequence[tuple[Path, str]], real: Sequence[tuple[Path, str]], seed: int
) -> list[tuple[Path, Path, str]]:
    """Return (fake, real, caption) for every generated image whose caption has a real one: the pairs of table 3.

    Within a caption, real images are dealt in a shuffled order, repeatedly if they run out. The order depends on the
    seed and the caption alone.
    """
    real_by_caption, pairs = _by_caption(real), []
    for caption, fakes in _by_caption(fake).items():
        reals = real_by_caption.get(caption, [])
        random.Random(f"{seed} {caption}").shuffle(reals)
        pairs += [(path, reals[i % len(reals)], caption) for i, path in enumerate(fakes) if reals]
    return pairs


def _by_caption(samples: Sequence[tuple[Path, str]]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path, caption in sorted(samples):
        groups.setdefault(caption, []).append(path)
    return groups

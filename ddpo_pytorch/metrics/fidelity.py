"""Frechet distance between sets of features, and LPIPS between generated and real images of the same caption.

Metrics take features or images and know nothing of files and processes: moments and sums are float64 and additive, so
that shares of several processes are summed and evaluated once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.metrics.intervals import Quantity, t_quantile
from ddpo_pytorch.utils.cores import on_all_cores, one_thread
from ddpo_pytorch.utils.errors import UserError


@dataclass
class Moments:
    """Additive first and second moments of F features in float64: count (), total (F,), outer (F, F).

    total and outer are sums of (f - shift) and (f - shift)(f - shift)^T. With a shift near the mean, a covariance does
    not come out as the difference of two large numbers. It is zero unless given; sums of single fields, as over
    processes, are those of the whole only if all parts have one shift, while + and - take care of it.
    """

    count: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor
    shift: torch.Tensor | float = 0.0

    @classmethod
    def zeros(cls, width: int, device: str | torch.device = "cpu", shift: torch.Tensor | float = 0.0) -> "Moments":
        """No samples yet; `shift` (F,) is a guess of their mean."""
        sums = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), width, (width, width)))
        return cls(*sums, shift.to(device, torch.float64) if isinstance(shift, torch.Tensor) else shift)

    @one_thread()
    def add(self, features: torch.Tensor) -> None:
        """Add (B, F) features of any float type. Raises ValueError for NaN or infinity."""
        features = features.to(self.total)
        if not features.isfinite().all():
            finite(features.cpu(), "features", int(self.count))  # which names the row
        features = features - self.shift
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of samples together."""
        moved = other.shifted(self.shift)
        return Moments(self.count + moved.count, self.total + moved.total, self.outer + moved.outer, self.shift)

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments without those of a set of samples that is part of this one."""
        moved = other.shifted(self.shift)
        return Moments(self.count - moved.count, self.total - moved.total, self.outer - moved.outer, self.shift)

    def shifted(self, shift: torch.Tensor | float) -> "Moments":
        """The same moments about another shift."""
        if shift is self.shift:
            return self
        step = torch.zeros_like(self.total) + self.shift - shift
        cross = torch.outer(self.total, step)
        outer = self.outer + cross + cross.T + self.count * torch.outer(step, step)
        return Moments(self.count, self.total + self.count * step, outer, shift)

    def gaussian(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F,) and unbiased covariance (F, F). Raises UserError below two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images in each set, got {int(self.count)}")
        mean = self.total / self.count
        return mean + self.shift, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


@one_thread()
def moments(features: torch.Tensor) -> Moments:
    """Moments of one (N, F) feature set, about its mean."""
    shift = features.double().mean(0) if len(features) else 0.0
    result = Moments.zeros(features.shape[1], features.device, shift)
    result.add(features)
    return result


@one_thread()
def frechet_distance(x: Moments, y: Moments) -> float:
    """|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Heusel 2017).

    With C = A A^T from an eigendecomposition, tr (Cx Cy)^(1/2) is the sum of the singular values of Ax^T Ay. Unlike the
    eigenvalues of Cx Cy these are exact to rounding where covariances are singular (fewer samples than features): a set
    is at distance 0 from itself, and the distance is symmetric.
    """
    return _distance(x, *_mean_and_root(y))


@one_thread()
def frechet_jackknife(groups: Sequence[Moments], real: Moments) -> Quantity:
    """Frechet distance of all groups together to real, with an interval for the randomness of the generated images.

    groups: moments of about 10 random parts of the generated images, of about the same size; real is taken as given.
    The interval is value +- t se (t of G - 1 degrees of freedom, se from leaving out one group at a time, with weights
    for unequal sizes: Busing, Meijer and van der Leeden 1999), cut at 0. It is not a bootstrap because a resample holds
    some images several times: it has the covariance of fewer images, so its distances are all larger than the one they
    should surround. The distance's own bias, larger for fewer images, is not in the interval: compare equal n only.
    """
    root = _mean_and_root(real)
    whole = sum(groups[1:], groups[0])
    value, images = _distance(whole, *root), int(whole.count)
    if len(groups) < 2:
        return Quantity(value, None, None, images, "one group: no interval")
    shares = np.array([float(group.count / whole.count) for group in groups])
    if shares.min() <= 0 or images * (1 - shares.max()) < 2:
        raise ValueError(f"a jackknife needs images in every group, and 2 outside each: {shares * images} images")
    *left, same = on_all_cores(lambda part: _quick_distance(part, *root), [*(whole - group for group in groups), whole])
    left = np.array(left)
    centre = len(groups) * same - ((1 - shares) * left).sum()
    pseudo = (same - (1 - shares) * left) / shares
    error = float(np.sqrt(((pseudo - centre) ** 2 * shares / (1 - shares)).mean()))
    half = t_quantile(len(groups) - 1) * error
    how = f"jackknife over {len(groups)} random groups of the generated images"
    return Quantity(value, max(0.0, value - half), value + half, images, how)


def _distance(x: Moments, mean_y: torch.Tensor, root_y: torch.Tensor) -> float:
    mean_x, root_x = _mean_and_root(x)
    cross = torch.linalg.svdvals(root_x.T @ root_y).sum()
    spread = root_x.square().sum() + root_y.square().sum() - 2 * cross
    return max(0.0, float((mean_x - mean_y).square().sum() + spread))


def _quick_distance(x: Moments, mean_y: torch.Tensor, root_y: torch.Tensor) -> float:
    """The same to about 1e-8 of the variances, by the eigenvalues of Ay^T Cx Ay: ten times as fast, not 0 for x = y."""
    mean_x, covariance = x.gaussian()
    cross = torch.linalg.eigvalsh(root_y.T @ covariance @ root_y).clamp(min=0).sqrt().sum()
    spread = covariance.trace() + root_y.square().sum() - 2 * cross
    return float((mean_x - mean_y).square().sum() + spread)


def _mean_and_root(x: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and A (F, r) with A A^T = the covariance, directions of rounding noise left out."""
    mean, covariance = x.gaussian()
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return mean, vectors[:, keep] * values[keep].sqrt()


def pair_images(
    fake: Sequence[tuple[Path, str]], real: Sequence[tuple[Path, str]], seed: int
) -> list[tuple[Path, Path, str]]:
    """(fake, real, caption) for every generated image whose caption has a real one: the comparisons of table 3.

    Within a caption, real images are dealt out in a shuffled order and again from the start when they run out, so the
    captions weigh as much as they have generated images. The order depends on the seed and the caption alone.
    """
    real_by_caption, fake_by_caption = _by_caption(real), _by_caption(fake)
    pairs = []
    for caption, fakes in fake_by_caption.items():
        reals = real_by_caption.get(caption, [])
        random.Random(f"{seed} {caption}").shuffle(reals)
        pairs += [(path, reals[i % len(reals)], caption) for i, path in enumerate(fakes) if reals]
    return pairs


def _by_caption(samples: Sequence[tuple[Path, str]]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path, caption in sorted(samples):
        groups.setdefault(caption, []).append(path)
    return groups

"""Frechet distance between sets of features, and LPIPS between generated and real images of the same caption.

Metrics take features or images and know nothing of files and processes: moments and sums are float64 and additive, so
that shares of several processes are summed and evaluated once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpo_pytorch.errors import UserError


@dataclass
class Moments:
    """Additive first and second moments of F features in float64: count (), total (F,), outer (F, F)."""

    count: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: str | torch.device = "cpu") -> "Moments":
        """No samples yet."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), width, (width, width))))

    def add(self, features: torch.Tensor) -> None:
        """Add (B, F) features of any float type."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def gaussian(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F,) and unbiased covariance (F, F). Raises UserError below two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images in each set, got {int(self.count)}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def moments(features: torch.Tensor) -> Moments:
    """Moments of one (N, F) feature set."""
    result = Moments.zeros(features.shape[1], features.device)
    result.add(features)
    return result


def frechet_distance(x: Moments, y: Moments) -> float:
    """|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Heusel 2017).

    With C = A A^T from an eigendecomposition, tr (Cx Cy)^(1/2) is the sum of the singular values of Ax^T Ay. Unlike the
    eigenvalues of Cx Cy these are exact to rounding where covariances are singular (fewer samples than features): a set
    is at distance 0 from itself, and the distance is symmetric.
    """
    (mean_x, cov_x), (mean_y, cov_y) = x.gaussian(), y.gaussian()
    root_x, root_y = _root(cov_x), _root(cov_y)
    cross = torch.linalg.svdvals(root_x.T @ root_y).sum()
    spread = root_x.square().sum() + root_y.square().sum() - 2 * cross
    return max(0.0, float((mean_x - mean_y).square().sum() + spread))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """A (F, r) with A A^T = covariance, directions of rounding noise left out."""
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


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


def add_distances(
    sums: torch.Tensor,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    fake: torch.Tensor,
    real: torch.Tensor,
    rows: Sequence[int],
) -> None:
    """Add LPIPS of B pairs of images in [0, 1] to sums (P, 2) float64 of (distance, pairs), pair b in row rows[b]."""
    values = distance(fake * 2 - 1, real * 2 - 1).flatten().double().cpu()
    sums.index_add_(0, torch.tensor(rows), torch.stack([values, torch.ones_like(values)], dim=1))


def weighted_mean(sums: torch.Tensor) -> float | None:
    """Mean over all pairs of (P, 2) sums of (distance, pairs); None without pairs."""
    distance, pairs = sums.sum(0).tolist()
    return distance / pairs if pairs else None


def lpips_by_prompt(sums: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean of each caption that has pairs."""
    return {caption: float(row[0] / row[1]) for caption, row in zip(captions, sums, strict=True) if row[1]}

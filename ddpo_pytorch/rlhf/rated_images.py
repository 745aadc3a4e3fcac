"""Rated images in memory, and what a judge's scores of held-out ones are worth: all measures alike for any order."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ddpo_pytorch.data.fundus import names_side
from ddpo_pytorch.data.images import fov_square, read_rgb, to_uint8
from ddpo_pytorch.data.ratings import RatedImage
from ddpo_pytorch.generator.latents import reconstruct
from ddpo_pytorch.judges.vit import resized
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, generator_of

COLUMNS = ("quality", "alignment")  # what the Selector learns, and the Policy
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class RatedSet:
    """N rated images, decoded: 3 S^2 bytes each.

    Attributes:
        images: uint8 (N, 3, S, S).
        prompts: of each.
        rewards: (N,) in [0, 1] for each of COLUMNS.
        weights: (N,) in (0, 1], of the raters.
        mirrored: bool (N,), whether its mirror image is as good: not if the prompt names an eye or a side.
        digest: hash of names, prompts, ratings, weights and size.
    """

    images: torch.Tensor
    prompts: tuple[str, ...]
    rewards: dict[str, torch.Tensor]
    weights: torch.Tensor
    mirrored: torch.Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: torch.Tensor) -> "RatedSet":
        """The images of these numbers, in their order."""
        rewards = {name: values[indices] for name, values in self.rewards.items()}
        digest = hashlib.sha256(json.dumps([self.digest, indices.tolist()]).encode()).hexdigest()[:12]
        prompts = tuple(self.prompts[index] for index in indices.tolist())
        return RatedSet(self.images[indices], prompts, rewards, self.weights[indices], self.mirrored[indices], digest)

    def flips(self, seed: int, epoch: int) -> torch.Tensor:
        """Which images (N,) epoch number `epoch` shows mirrored: each that may be with probability 1/2."""
        return (torch.rand(len(self), generator=generator_of(seed, Stream.NOISE, epoch)) < 0.5) & self.mirrored


def read_rated(rated: Sequence[RatedImage], size: int) -> RatedSet:
    """Decode images to size x size pixels, as a judge does that scores them (`vision.resized`).

    One that is no square is first cut to its field of view and padded with black. Raises UserError for a file that
    cannot be read.
    """
    with ThreadPoolExecutor(thread_limit()) as pool:
        images = torch.stack(list(pool.map(lambda image: _pixels(image.path, size), rated)))
    about = [[Path(one.image).name, one.prompt, one.quality, one.alignment, one.weight] for one in rated]
    return RatedSet(
        images,
        tuple(one.prompt for one in rated),
        {name: torch.tensor([one.reward(name) for one in rated], dtype=torch.float32) for name in COLUMNS},
        torch.tensor([one.weight for one in rated], dtype=torch.float32),
        torch.tensor([not names_side(one.prompt) for one in rated]),
        hashlib.sha256(json.dumps([size, about]).encode()).hexdigest()[:12],
    )


def through_autoencoder(rated: RatedSet, vae: AutoencoderKL, batch_size: int) -> RatedSet:
    """The set with its images encoded and decoded once, as the generator would draw them at its best."""
    images = torch.cat([reconstruct(vae, part) for part in rated.images.split(batch_size)])
    digest = fingerprint(rated.digest, vae)[:12]
    return replace(rated, images=images, digest=digest)


def _pixels(path: str | Path, size: int) -> torch.Tensor:
    picture = read_rgb(path)
    if picture.width != picture.height:
        picture = fov_square(picture)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return to_uint8(resized(pixels[None].float() / 255, size)[0])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (N,) from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(scores: np.ndarray, rewards: np.ndarray) -> float | None:
    """Correlation of ranks; None where either is constant."""
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (scores, rewards))
    spread = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread > 0 else None


def auc(scores: np.ndarray, good: np.ndarray) -> float | None:
    """Chance that a good image scores above a bad one, ties counting half; None where either kind is absent."""
    positives, negatives = int(good.sum()), int((~good).sum())
    if not positives or not negatives:
        return None
    return float((ranks(scores)[good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(scores: np.ndarray, rewards: np.ndarray) -> float:
    """Mean distance of mean score and mean reward over ten equal bins of the score, weighted by their images."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, scores - rewards, BINS)).sum() / len(scores))


def measures(scores: torch.Tensor, rewards: torch.Tensor, threshold: float | None = None) -> dict[str, float | None]:
    """What scores (N,) say of rewards (N,), both in [0, 1].

    mae (mean absolute error), spearman, auc (of a rating of 2 or more), calibration_error and, for a threshold,
    pass_rate (share of scores at or above it).
    """
    x, y = (values.double().numpy() for values in (scores, rewards))
    found = {
        "mae": float(np.abs(x - y).mean()),
        "spearman": spearman(x, y),
        "auc": auc(x, y >= 0.5),
        "calibration_error": calibration_error(x, y),
    }
    return found if threshold is None else found | {"pass_rate": (scores >= threshold).double().mean().item()}


def best_threshold(scores: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """Threshold with the highest Youden's J, and J = sensitivity + specificity - 1 for a rating of 2 or more.

    It is the middle between two neighbouring scores, so that neither depends on its last bits; of equal J the lowest.
    One that passes everything is taken only where all scores are equal. Raises UserError without images of both kinds.
    """
    x, good = scores.double().numpy(), rewards.numpy() >= 0.5
    if good.all() or not good.any():
        raise UserError("a threshold needs ratings below 2 and of 2 or more among the validation images; add some")
    levels = np.unique(x)
    if len(levels) == 1:
        return float(levels[0]), 0.0
    middles = (levels[:-1] + levels[1:]) / 2
    youden = np.array([(x[good] >= middle).mean() - (x[~good] >= middle).mean() for middle in middles])
    best = int(np.argmax(youden.round(12)))  # equal but for the last bits is equal
    threshold = float(np.float32(middles[best]))  # scores are compared in float32
    return (threshold if threshold > levels[best] else float(levels[best + 1])), float(youden[best])

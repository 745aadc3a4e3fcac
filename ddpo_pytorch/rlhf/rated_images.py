"""Rated images in memory, and measures of a judge's scores on held-out ones."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scipy.stats import rankdata, spearmanr

from ddpo_pytorch.data.fundus import names_side
from ddpo_pytorch.data.images import fov_square, read_rgb, to_uint8
from ddpo_pytorch.data.ratings import RatedImage
from ddpo_pytorch.generator.latents import reconstruct
from ddpo_pytorch.judges.vit import resized
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, generator_of

COLUMNS = ("quality", "alignment")  # learned by the Selector and the Policy
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class RatedSet:
    """N rated images, decoded: 3 S^2 bytes each.

    Attributes:
        images: uint8 (N, 3, S, S).
        prompts: N texts.
        rewards: (N,) in [0, 1] for each of COLUMNS.
        weights: (N,) in (0, 1], of the raters.
        mirrored: bool (N,), whether the mirror image is as good: not if the prompt names an eye or a side.
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
        """Return the images with these indices, in that order."""
        rewards = {name: values[indices] for name, values in self.rewards.items()}
        digest = hashlib.sha256(json.dumps([self.digest, indices.tolist()]).encode()).hexdigest()[:12]
        prompts = tuple(self.prompts[index] for index in indices.tolist())
        return RatedSet(self.images[indices], prompts, rewards, self.weights[indices], self.mirrored[indices], digest)

    def flips(self, seed: int, epoch: int) -> torch.Tensor:
        """Draw the images (bool (N,)) to mirror in an epoch: each `mirrored` one with probability 1/2."""
        return (torch.rand(len(self), generator=generator_of(seed, Stream.NOISE, epoch)) < 0.5) & self.mirrored


def read_rated(rated: Sequence[RatedImage], size: int) -> RatedSet:
    """Decode images to size x size pixels with the judges' own resizing (`judges.vit.resized`).

    Images that are not square are first cut to their field of view and padded with black. Raises UserError for a file
    that cannot be read.
    """

    def pixels(path: Path) -> torch.Tensor:
        picture = read_rgb(path)
        if picture.width != picture.height:
            picture = fov_square(picture)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return to_uint8(resized(image[None].float() / 255, size)[0])

    with ThreadPoolExecutor(thread_limit()) as pool:
        images = torch.stack(list(pool.map(lambda one: pixels(one.path), rated)))
    rows = [[Path(one.image).name, one.prompt, one.quality, one.alignment, one.weight] for one in rated]
    return RatedSet(
        images,
        tuple(one.prompt for one in rated),
        {name: torch.tensor([one.reward(name) for one in rated], dtype=torch.float32) for name in COLUMNS},
        torch.tensor([one.weight for one in rated], dtype=torch.float32),
        torch.tensor([not names_side(one.prompt) for one in rated]),
        hashlib.sha256(json.dumps([size, rows]).encode()).hexdigest()[:12],
    )


def through_autoencoder(rated: RatedSet, vae: AutoencoderKL, batch_size: int) -> RatedSet:
    """Encode and decode the images once, which gives them the softness of generated ones."""
    images = torch.cat([reconstruct(vae, part) for part in rated.images.split(batch_size)])
    return replace(rated, images=images, digest=fingerprint(rated.digest, vae)[:12])


def auc(scores: np.ndarray, good: np.ndarray) -> float | None:
    """Return the probability that a good image scores above a bad one, ties counting half; None if one kind is absent.

    float64, which torchmetrics' binary_auroc is not.
    """
    positives, negatives = int(good.sum()), int((~good).sum())
    if not positives or not negatives:
        return None
    rank_sum = rankdata(scores)[good].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(scores: np.ndarray, rewards: np.ndarray) -> float:
    """Return the mean of |mean score - mean reward| over ten equal bins of the score, weighted by their images."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, scores - rewards, BINS)).sum() / len(scores))


def measures(scores: torch.Tensor, rewards: torch.Tensor, threshold: float | None = None) -> dict[str, float | None]:
    """Compare scores (N,) with rewards (N,), both in [0, 1].

    Returns mae (mean absolute error), spearman (None if either is constant), auc (of a rating of 2 or more),
    calibration_error and, given a threshold, pass_rate (share of scores at or above it).
    """
    x, y = (values.double().numpy() for values in (scores, rewards))
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    result = {
        "mae": float(np.abs(x - y).mean()),
        "spearman": None if constant else float(spearmanr(x, y).statistic),
        "auc": auc(x, y >= 0.5),
        "calibration_error": calibration_error(x, y),
    }
    return result if threshold is None else result | {"pass_rate": (scores >= threshold).double().mean().item()}


def best_threshold(scores: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """Return the threshold with the highest J, and J = sensitivity + specificity - 1 (Youden) for ratings of 2 or more.

    It lies in the middle between two neighbouring scores, so that neither depends on its last bits; among equal J the
    lowest is taken. It passes everything only if all scores are equal. Raises UserError without both kinds of images.
    """
    x, good = scores.double().numpy(), rewards.numpy() >= 0.5
    if good.all() or not good.any():
        raise UserError("a threshold needs ratings below 2 and of 2 or more among the validation images; add some")
    levels = np.unique(x)
    if len(levels) == 1:
        return float(levels[0]), 0.0
    middles = (levels[:-1] + levels[1:]) / 2
    youden = np.array([(x[good] >= middle).mean() - (x[~good] >= middle).mean() for middle in middles])
    best = int(np.argmax(youden.round(12)))  # differences in the last bits are ties
    threshold = float(np.float32(middles[best]))  # scores are compared in float32
    return (threshold if threshold > levels[best] else float(levels[best + 1])), float(youden[best])

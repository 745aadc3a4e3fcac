"""Rated images in memory, and metrics of a judge's scores on held-out images."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from scipy.stats import spearmanr

from ddpo_pytorch.data import sample_folder
from ddpo_pytorch.data.fundus import findings_of, mirrored_caption
from ddpo_pytorch.data.images import content_numbers, load_image, to_uint8
from ddpo_pytorch.data.ratings import CRITERIA, RatedImage
from ddpo_pytorch.data.sample_folder import is_framed
from ddpo_pytorch.generator.latents import reconstruct
from ddpo_pytorch.judges.classifier_report import calibration_error, ranking
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.judges.vit import resized
from ddpo_pytorch.phantoms.damage import BANDS, KINDS, STRUCTURAL, VISIBLE, degrade, vessel_contrast
from ddpo_pytorch.utils.cores import on_all_cores
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, generator_of

COLUMNS = ("quality", "alignment")  # learned by the Selector and the Policy
BINS = 10  # of the calibration error
PROBED = 100  # images to derive the Selector's probes from
FEWEST = 10  # images that show a finding, and that do not, for an AUC of the finding


@dataclass
class RatedSet:
    """N rated images, decoded: uint8 (N, 3, S, S).

    The ratings determine prompts; rewards in [0, 1] (N,) for each of COLUMNS and of the rated `criteria` (NaN if an
    image lacks one); the raters' weights in (0, 1] (N,); and `mirrored`, the prompts of the mirror images, or None.
    `digest` is a hash of names, `content_numbers`, prompts, ratings, weights and size.
    """

    images: torch.Tensor
    rated: Sequence[RatedImage]
    digest: str

    def __post_init__(self):
        self.prompts = tuple(image.prompt for image in self.rated)
        self.criteria = tuple(name for name in CRITERIA if any(name in image.criteria for image in self.rated))
        columns = COLUMNS + self.criteria
        self.rewards = {name: torch.tensor([image.reward(name) for image in self.rated]) for name in columns}
        self.weights = torch.tensor([image.weight for image in self.rated])
        self.mirrored = tuple(mirrored_caption(prompt) for prompt in self.prompts)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: torch.Tensor) -> "RatedSet":
        """Return the images at these indices, in this order."""
        digest = fingerprint(self.digest, indices.tolist())[:12]
        return RatedSet(self.images[indices], [self.rated[index] for index in indices], digest)

    def __add__(self, other: "RatedSet") -> "RatedSet":
        digest = fingerprint(self.digest, other.digest)[:12]
        return RatedSet(torch.cat([self.images, other.images]), [*self.rated, *other.rated], digest)

    def flips(self, seed: int, epoch: int) -> torch.Tensor:
        """Draw a mask (N,) of images to mirror in an epoch: with probability 1/2, unless `mirrored` is None."""
        possible = torch.tensor([prompt is not None for prompt in self.mirrored])
        return (torch.rand(len(self), generator=generator_of(seed, Stream.NOISE, epoch)) < 0.5) & possible

    def caption_sources(self, share: float, seed: int, epoch: int) -> torch.Tensor:
        """Draw which image's caption each image has in an epoch: indices (N,), mostly its own.

        A `share` of the images rated 3 in alignment get the caption of a random image with no finding in common, unless
        there is none whose caption can be mirrored.
        """
        random = generator_of(seed, Stream.PROMPTS, epoch)
        matching = (self.rewards["alignment"] > 0.75) & (torch.rand(len(self), generator=random) < share)
        findings = [findings_of(prompt) for prompt in self.prompts]
        possible = [index for index, prompt in enumerate(self.mirrored) if prompt is not None]
        sources = torch.arange(len(self))
        for index in matching.nonzero().flatten().tolist() if possible else ():
            others = [possible[one] for one in torch.randperm(len(possible), generator=random).tolist()]
            sources[index] = next((one for one in others if not findings[one] & findings[index]), index)
        return sources


def read_rated(rated: Sequence[RatedImage], size: int, resize: str = "fov") -> RatedSet:
    """Decode images to size x size pixels with the judges' own resizing (`judges.vit.resized`).

    Photographs are first framed by `resize`, as they are before judges score them; images of sample folders and rating
    sets already are. Raises UserError for a file that cannot be read.
    """

    def pixels(image: RatedImage) -> torch.Tensor:
        loaded = load_image(image.path, resize="stretch" if is_framed(image.path) else resize)
        return to_uint8(resized(loaded[None], size)[0])

    images = torch.stack(on_all_cores(pixels, rated))
    names = ("prompt", "quality", "alignment", "weight", "criteria")
    rows = [[Path(image.image).name, *(getattr(image, name) for name in names)] for image in rated]
    # files rather than resized pixels, whose last bits depend on the processor
    described = [size, resize, rows, content_numbers([image.path for image in rated])]
    return RatedSet(images, rated, hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12])


def read_pool(folder: str | Path, size: int) -> RatedSet:
    """Decode the images of generate.py's folder, rated by the Selector's score s as r = 1 + 2 s.

    Raises UserError as `sample_folder.read_pool` does.
    """
    rated = []
    for entry in sample_folder.read_pool(folder, "rlhf.pool"):
        path, rating = entry["path_to_img"], 1 + 2 * entry["selector"]
        rated.append(RatedImage(path, Path(folder, path), entry["prompt"], rating, rating, 1.0, path))
    return read_rated(rated, size)


def through_autoencoder(rated: RatedSet, vae: AutoencoderKL, batch_size: int) -> RatedSet:
    """Encode and decode the images once, which makes them as soft as generated ones."""
    images = torch.cat([reconstruct(vae, part) for part in rated.images.split(batch_size)])
    return replace(rated, images=images, digest=fingerprint(rated.digest, vae)[:12])


def measures(scores: torch.Tensor, rewards: torch.Tensor, threshold: float | None = None) -> dict[str, float | None]:
    """Compare scores (N,) with rewards (N,), both in [0, 1]; undefined values are None.

    Returns mae (mean absolute error), spearman, auc (of a rating of at least 2), calibration_error (over ten bins) and,
    given a threshold, pass_rate (share of scores at or above it).
    """
    x, y, ones = scores.double().numpy(), rewards.double().numpy(), np.ones((1, len(scores)))
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    result = {"mae": np.abs(x - y).mean(), "spearman": np.nan if constant else spearmanr(x, y).statistic}
    result["auc"] = ranking(ones, x, y >= 0.5)[0].item()
    result["calibration_error"] = calibration_error(ones, x, y, BINS).item()
    if threshold is not None:
        result["pass_rate"] = (scores >= threshold).double().mean().item()
    return {name: None if np.isnan(value) else float(value) for name, value in result.items()}


def probe(selector: Selector, rated: RatedSet, batch_size: int) -> pd.DataFrame:
    """Score images that a Selector should reject: images rated 3 after severe or structural damage, or without vessels.

    Returns a row for the images rated 3, for each kind of damage, and for images without visible vessels: number of
    images, mean score, share that passes, and AUC against the images rated 3.
    """
    pictures = rated.images.permute(0, 2, 3, 1).numpy()
    shown = pictures[(rated.rewards["quality"] > 0.75).numpy()][:PROBED]
    sets = {"rated 3": shown}
    for kind in (*KINDS, *STRUCTURAL):
        sets[kind] = [degrade(image, kind, BANDS[1][0], np.random.default_rng(n)) for n, image in enumerate(shown)]
    sets["no visible vessels"] = [image for image in pictures if vessel_contrast(image) < VISIBLE]
    rows, first = [], torch.zeros(0)
    for name, images in sets.items() if len(shown) else ():
        if len(images):
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
            scores = torch.cat([selector.score(part).cpu() for part in pixels.split(batch_size)])
            first = scores if name == "rated 3" else first
            targets = torch.cat([torch.ones(len(first)), torch.zeros(len(scores))])
            auc = measures(torch.cat([first, scores]), targets)["auc"]
            values = scores.mean(), selector.accepts(scores).double().mean(), auc
            rows.append([name, str(len(images)), *(f"{float(value):.3f}" for value in values)])
    return pd.DataFrame(rows, columns=["kind", "images", "score", "passed", "AUC"])


def by_finding(scores: torch.Tensor, rated: RatedSet) -> pd.DataFrame:
    """Return how well a Policy's scores (N,) tell images that show what their caption says from others, by finding.

    A row has all images whose caption names the finding: their number, and the AUC of an alignment of at least 2. The
    first row has all images; findings with fewer than FEWEST images on either side are left out.
    """
    findings, rewards = [findings_of(prompt) for prompt in rated.prompts], rated.rewards["alignment"]
    counts = Counter(finding for one in findings for finding in one)
    rows = []
    for finding in ("all", *(name for name, _ in counts.most_common())):
        named = torch.tensor([finding == "all" or finding in one for one in findings])
        good = int((rewards[named] >= 0.5).sum())
        if finding == "all" or FEWEST <= good <= int(named.sum()) - FEWEST:
            auc = measures(scores[named], rewards[named])["auc"]
            rows.append([finding, str(int(named.sum())), "-" if auc is None else f"{auc:.3f}"])
    return pd.DataFrame(rows, columns=["finding", "images", "AUC"])


def best_threshold(scores: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """Return the threshold with the highest J, and J = sensitivity + specificity - 1 (Youden), for ratings >= 2.

    It is the lowest such midpoint of two neighbouring scores, so that it does not depend on last bits; it passes all
    images only if all scores are equal. Raises UserError unless there are ratings below 2 and of at least 2.
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

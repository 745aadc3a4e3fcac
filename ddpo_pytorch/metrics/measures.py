"""What is measured on one sample folder: alignment, fidelity, perception, diversity, memorisation.

Each function takes what networks said about the images (`store`) and returns a part of metrics.json, in which a
`Quantity` is a number with its 95 % interval. Nothing here reads images.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.metrics.diversity import spread
from ddpo_pytorch.metrics.feature_store import THUMBNAIL, THUMBNAILS, Rows
from ddpo_pytorch.metrics.fidelity import Moments, frechet_distance, frechet_jackknife
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import Quantity, bootstrap_mean, bootstrap_ratio
from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.metrics.manifold import manifold_metrics
from ddpo_pytorch.metrics.memorisation import closest, memorisation, nearest

# sets above this are reduced to a seeded draw of so many for KID, precision, recall, density and coverage, whose cost
# or memory grows with the square.
PAIRWISE_IMAGES = 10_000
NEIGHBOURS = 5
JACKKNIFE_GROUPS = 10
# images a prompt that diversity is computed from: Vendi's score grows with their number.
SPREAD_IMAGES = 64
CLOSEST = 16
# cosine distance of thumbnails below which an image is called a near copy. On ISIC 2019 at 64 px, 95 % of training
# images that were compressed (JPEG, quality 90) or made 5 % brighter are within .001; of the validation split's images
# .6 % are near a training image.
NEAR_COPY = 0.003


@dataclass
class Side:
    """An image set with what was found out about it: rows by network, and the moments of all its features."""

    images: ImageSet
    rows: Mapping[str, Rows]
    moments: dict[str, Moments] = field(default_factory=dict)

    @property
    def groups(self) -> np.ndarray:
        return np.array(self.images.groups, dtype=np.int64)

    def all_moments(self, extractor: str) -> Moments:
        """Moments over all images, computed once."""
        if extractor not in self.moments:
            rows = self.rows[extractor]
            self.moments[extractor] = sum_moments(rows, [np.arange(len(rows))])[0]
        return self.moments[extractor]


def aligned_images(labels: Sequence[str], logits: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Stated and seen labels (N, H) of N images, bool; an image is aligned when its rows are equal (equation (3))."""
    columns = [LABELS.index(name) for name in labels]
    stated = np.array([labels_of(caption) for caption in captions], dtype=bool)[:, columns]
    return stated, logits > 0


def alignment(labels: Sequence[str], logits: np.ndarray, captions: Sequence[str], seed: int) -> dict:
    """APR over all and by prompt, and precision and recall of each attribute.

    Recall is the share of images asked to show an attribute in which the judge sees it, precision the share of images
    in which it sees it that were asked to.
    """
    stated, seen = aligned_images(labels, logits, captions)
    hits = (stated == seen).all(axis=1).astype(float)
    groups = np.array([CAPTIONS.index(caption) for caption in captions])
    result = {"APR": bootstrap_mean(hits, groups, seed, resample_groups=True), "by_prompt": {}, "attributes": {}}
    for number in np.unique(groups):
        own = groups == number
        quantity = bootstrap_mean(hits[own], groups[own], seed, resample_groups=False)
        result["by_prompt"][CAPTIONS[number]] = quantity
    for column, name in enumerate(labels):
        asked, found = stated[:, column].astype(float), seen[:, column].astype(float)
        result["attributes"][name] = {
            "precision": bootstrap_ratio(asked * found, found, groups, seed),
            "recall": bootstrap_ratio(asked * found, asked, groups, seed),
            "accuracy": float((asked == found).mean()),
            "requested": int(asked.sum()),
            "seen": int(found.sum()),
        }
    return result


def matched(sides: Sequence[ImageSet], seed: int) -> list[np.ndarray]:
    """Indices into each set such that all hold equally many images of every caption: the fewest that any set has."""
    return same_counts([np.array(images.groups) for images in sides], seed)


def same_counts(groups: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Indices into each array of prompts (N,) such that all have equally many of every prompt.

    Which ones is drawn by (seed, prompt) from the images in their order, so that sets made from the same noise keep the
    same noise.
    """
    chosen: list[list[np.ndarray]] = [[] for _ in groups]
    for prompt in range(1 + max((int(column.max()) for column in groups if len(column)), default=0)):
        own = [np.flatnonzero(column == prompt) for column in groups]
        count = min(len(indices) for indices in own)
        for part, indices in zip(chosen, own, strict=True):
            order = np.random.default_rng([seed, prompt, 0]).permutation(len(indices))[:count]
            part.append(np.sort(indices[order]))
    return [np.concatenate(part) for part in chosen]


def sum_moments(rows: Rows, groups: Sequence[np.ndarray], block: int = 4096) -> list[Moments]:
    """Moments of each group of indices, read a block at a time."""
    result = []
    for indices in groups:
        total = None
        for start in range(0, len(indices), block):
            values = torch.from_numpy(rows.take(indices[start : start + block]))
            total = Moments.zeros(values.shape[1]) if total is None else total
            total.add(values)
        result.append(total)
    return result


def frechet(real: Moments, fake: Rows, indices: np.ndarray, seed: int) -> Quantity:
    """Frechet distance of the chosen generated images to real ones, with its jackknife interval."""
    if len(indices) < 2 * JACKKNIFE_GROUPS:
        own = sum_moments(fake, [indices])[0]
        why = f"no interval below {2 * JACKKNIFE_GROUPS} images"
        quantity = Quantity(frechet_distance(own, real), None, None, len(indices), why)
    else:
        order = np.random.default_rng([seed, 1]).permutation(indices)
        quantity = frechet_jackknife(sum_moments(fake, np.array_split(order, JACKKNIFE_GROUPS)), real)
    fewest, features = min(len(indices), int(real.count)), len(real.total)
    if fewest <= features:  # a covariance is singular
        return replace(quantity, how=f"{quantity.how}; {fewest} images of {features} features: biased upwards")
    return quantity


def fidelity(
    extractor: str, real: Side, fake: Side, real_part: np.ndarray, fake_part: np.ndarray, seed: int
) -> dict[str, dict]:
    """Distances between features of real and generated images, in the same prompt mix and, beside it, of all images."""
    ours, theirs = fake.rows[extractor], real.rows[extractor]
    result = {"unmatched": {"n": len(ours), "n_real": len(theirs)}, "matched": {"n": len(fake_part)}}
    if min(len(ours), len(theirs)) > 1:
        x, y = _few(theirs, np.arange(len(theirs)), seed), _few(ours, np.arange(len(ours)), seed)
        result["unmatched"]["FID"] = frechet(real.all_moments(extractor), ours, np.arange(len(ours)), seed)
        result["unmatched"]["KID"] = _of_draw(kernel_distance(x, y, seed), len(theirs), len(ours))
    if len(fake_part) > 1:
        x, y = _few(theirs, real_part, seed), _few(ours, fake_part, seed)
        result["matched"]["FID"] = frechet(sum_moments(theirs, [real_part])[0], ours, fake_part, seed)
        result["matched"]["KID"] = _of_draw(kernel_distance(x, y, seed), len(real_part), len(fake_part))
        if len(x) > NEIGHBOURS:
            how = f"k = {NEIGHBOURS}; no interval"
            for key, value in manifold_metrics(x, y, NEIGHBOURS).items():
                quantity = Quantity(value, None, None, len(y), how)
                result["matched"][key] = _of_draw(quantity, len(real_part), len(fake_part))
    return result


def _of_draw(quantity: Quantity, *counts: int) -> Quantity:
    """Return the quantity, which says so if it rests on a draw of these many images."""
    if max(counts) <= PAIRWISE_IMAGES:
        return quantity
    return replace(quantity, how=f"{quantity.how}; {PAIRWISE_IMAGES} images drawn by the seed from each larger set")


def _few(rows: Rows, indices: np.ndarray, seed: int) -> np.ndarray:
    if len(indices) > PAIRWISE_IMAGES:
        indices = np.sort(np.random.default_rng([seed, 2]).permutation(indices)[:PAIRWISE_IMAGES])
    return rows.take(indices)


def spread_size(models: Sequence[ImageSet]) -> int:
    """Images a prompt from which the diversity of all sets is computed; 0 where no prompt has two in every set.

    Prompts of which a set has one image do not count.
    """
    counts = [Counter(images.captions) for images in models]
    common = [min(count[caption] for count in counts) for caption in models[0].vocabulary]
    return min([SPREAD_IMAGES, *(number for number in common if number > 1)]) if max(common) > 1 else 0


def diversity(extractor: str, side: Side, per_group: int, seed: int) -> dict[str, Quantity] | None:
    """Spread of the features within prompts that have at least `per_group` images; None where there is no such."""
    groups, kept = side.groups, []
    for number in np.unique(groups):
        own = np.flatnonzero(groups == number)
        if len(own) >= max(2, per_group):
            order = np.random.default_rng([seed, int(number), 3]).permutation(len(own))[: 2 * per_group]
            kept.append(np.sort(own[order]))
    if per_group < 2 or not kept:
        return None
    indices = np.concatenate(kept)
    return spread(side.rows[extractor].take(indices), groups[indices], per_group, seed)


@dataclass
class Neighbours:
    """For N images: distance to and index of the nearest training image."""

    distances: np.ndarray
    indices: np.ndarray

    def where(self, kept: np.ndarray) -> "Neighbours | None":
        """Those of the images for which kept (N,) is True; None if there are none."""
        return Neighbours(self.distances[kept], self.indices[kept]) if kept.any() else None


def neighbours(extractor: str, side: Side, train: Side) -> Neighbours:
    """Nearest training image of every image, by the cosine distance of features; of thumbnails, mirrored ones too."""
    best = Neighbours(*nearest(side.rows[extractor], train.rows[extractor]))
    if extractor == THUMBNAILS.name:
        grids = np.concatenate(list(side.rows[extractor].chunks())).reshape(-1, THUMBNAIL, THUMBNAIL)
        for mirrored in (grids[:, :, ::-1], grids[:, ::-1]):
            other = Neighbours(*nearest(mirrored.reshape(len(grids), -1), train.rows[extractor]))
            closer = other.distances < best.distances
            best.distances[closer], best.indices[closer] = other.distances[closer], other.indices[closer]
    return best


def memorised(fake: Side, train: Side, own: Neighbours, baseline: Neighbours | None, seed: int) -> dict:
    """Share of samples closer to a training image than 99 % of real images are, pixel copies, and the closest pairs."""
    result = {
        "copies": int(copies(fake, train).sum()),
        "closest": [
            {
                "path": str(fake.images.paths[i].resolve()),
                "caption": fake.images.captions[i],
                "train": str(train.images.paths[own.indices[i]].resolve()),
                "distance": float(own.distances[i]),
            }
            for i in closest(own.distances, own.indices, CLOSEST)
        ],
    }
    if baseline is not None:
        share, threshold = memorisation(own.distances, baseline.distances, fake.groups, seed)
        result |= {"share_closer": share, "threshold": threshold}
    return result


def copies(side: Side, train: Side) -> np.ndarray:
    """(N,) bool: images whose pixels are those of a training image."""
    known = {row.tobytes() for row in pixels(train)[:, 1:]}
    return np.array([row.tobytes() in known for row in pixels(side)[:, 1:]])


def pixels(side: Side) -> np.ndarray:
    """`pixel_facts` (N, 5) of all images."""
    return np.concatenate(list(side.rows["pixels"].chunks()))

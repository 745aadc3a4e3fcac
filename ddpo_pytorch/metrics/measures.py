"""The blocks of metrics.json for one set of images: fidelity, diversity, memorisation, structure, image statistics.

Each function takes what networks said about the images (`MeasuredSet`) and reads no image itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ddpo_pytorch.metrics.diversity import within_prompt_diversity
from ddpo_pytorch.metrics.feature_store import THUMBNAIL, THUMBNAILS, Rows
from ddpo_pytorch.metrics.fidelity import Moments, frechet, moments_of_rows
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.image_statistics import (
    IS_SPLIT_IMAGES,
    SETS,
    distances,
    inception_score,
    split_count,
    summary,
)
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean
from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.metrics.manifold import manifold_metrics
from ddpo_pytorch.metrics.memorisation import closest, nearest, share_closer
from ddpo_pytorch.metrics.networks import LOGITS, quality_name

# larger sets are reduced to this many random images for KID, precision, recall, density and coverage, whose cost grows
# with the square
PAIRWISE_IMAGES = 10_000
NEIGHBOURS = 5
DIVERSITY_IMAGES = 64  # of a prompt
CLOSEST = 16
# Cosine distance of thumbnails below which an image is called a near copy. On ISIC 2019 at 64 px, 95 % of training
# images that were compressed (JPEG, quality 90) or made 5 % brighter are within .001; of the validation split's images
# .6 % are near a training image.
NEAR_COPY = 0.003


@dataclass
class MeasuredSet:
    """An image set with the networks' results: rows by network, and pairs by measure.

    `pairs`: indices (P, 2) into this set and its partner's, and values (P,), under "LPIPS" (to real images),
    "LPIPS_within" (a prompt's own images), "SSIM" (to images of equal names), "MS_SSIM" and "MS_SSIM_within".
    """

    images: ImageSet
    rows: Mapping[str, Rows]
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    @property
    def groups(self) -> np.ndarray:
        return self.images.groups

    def all_moments(self, extractor: str) -> Moments:
        """Return the moments of all images' features, computed once."""
        if extractor not in self.moments:
            rows = self.rows[extractor]
            self.moments[extractor] = moments_of_rows(rows, np.arange(len(rows)))
        return self.moments[extractor]


def match_prompts(groups: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return indices into each array of prompts (N,) such that all have equally many images of every prompt.

    They are drawn by (seed, prompt) from the images in their order, so sets of the same noise keep the same noise.
    """
    chosen: list[list[np.ndarray]] = [[] for _ in groups]
    for prompt in range(1 + max((int(column.max()) for column in groups if len(column)), default=0)):
        own = [np.flatnonzero(column == prompt) for column in groups]
        count = min(len(indices) for indices in own)
        for part, indices in zip(chosen, own, strict=True):
            order = np.random.default_rng([seed, prompt, 0]).permutation(len(indices))[:count]
            part.append(np.sort(indices[order]))
    return [np.concatenate(part) for part in chosen]


# --- fidelity ---


def measure_fidelity(
    extractor: str, real: MeasuredSet, fake: MeasuredSet, parts: tuple[np.ndarray, np.ndarray], seed: int
) -> dict[str, dict]:
    """Return distances between features of real and generated images: of all, and of `parts` with equal prompt mixes.

    `parts`: indices of real and of generated images.
    """
    ours, theirs = fake.rows[extractor], real.rows[extractor]
    everything = np.arange(len(theirs)), np.arange(len(ours))
    result = {"unmatched": {"n": len(ours), "n_real": len(theirs)}, "matched": {"n": len(parts[1])}}
    for name, (real_part, fake_part) in (("unmatched", everything), ("matched", parts)):
        if min(len(real_part), len(fake_part)) < 2:
            continue
        x, y = _subsample(theirs, real_part, seed), _subsample(ours, fake_part, seed)
        reduced = max(len(real_part), len(fake_part)) > PAIRWISE_IMAGES
        note = f"; {PAIRWISE_IMAGES} images drawn by the seed from each larger set" if reduced else ""
        moments = real.all_moments(extractor) if name == "unmatched" else moments_of_rows(theirs, real_part)
        kid = kernel_distance(x, y, seed)
        result[name]["FID"] = frechet(moments, ours, fake_part, seed)
        result[name]["KID"] = replace(kid, how=kid.how + note)
        if name == "matched" and len(x) > NEIGHBOURS:
            how = f"k = {NEIGHBOURS}; no interval{note}"
            for key, value in manifold_metrics(x, y, NEIGHBOURS).items():
                result[name][key] = Estimate(value, None, None, len(y), how)
    return result


def _subsample(rows: Rows, indices: np.ndarray, seed: int) -> np.ndarray:
    if len(indices) > PAIRWISE_IMAGES:
        indices = np.sort(np.random.default_rng([seed, 2]).permutation(indices)[:PAIRWISE_IMAGES])
    return rows.take(indices)


# --- diversity ---


def diversity_size(models: Sequence[ImageSet]) -> int:
    """Return the images per prompt from which the diversity of all sets is computed, or 0.

    Prompts of which a set has fewer than two images do not count.
    """
    counts = [Counter(images.captions) for images in models]
    common = [min(count[caption] for count in counts) for caption in models[0].all_captions]
    return min([DIVERSITY_IMAGES, *(number for number in common if number > 1)]) if max(common) > 1 else 0


def measure_diversity(extractor: str, own: MeasuredSet, per_group: int, seed: int) -> dict[str, Estimate] | None:
    """Return `within_prompt_diversity` of prompts with at least `per_group` images; None if there are none."""
    chosen = []
    for number in np.unique(own.groups):
        indices = np.flatnonzero(own.groups == number)
        if len(indices) >= max(2, per_group):
            order = np.random.default_rng([seed, int(number), 3]).permutation(len(indices))[: 2 * per_group]
            chosen.append(np.sort(indices[order]))
    if per_group < 2 or not chosen:
        return None
    indices = np.concatenate(chosen)
    return within_prompt_diversity(own.rows[extractor].take(indices), own.groups[indices], per_group, seed)


# --- memorisation ---


@dataclass
class Neighbours:
    """Distance to and index of the nearest training image, for N images."""

    distances: np.ndarray
    indices: np.ndarray


def find_neighbours(extractor: str, own: MeasuredSet, train: MeasuredSet) -> Neighbours:
    """Return the nearest training images by cosine distance of features; thumbnails are also tried mirrored."""
    rows, reference = own.rows[extractor], train.rows[extractor]
    best = Neighbours(*nearest(rows, reference))
    if extractor == THUMBNAILS.name:
        grids = rows.all().reshape(-1, THUMBNAIL, THUMBNAIL)
        for mirrored in (grids[:, :, ::-1], grids[:, ::-1]):
            distances, indices = nearest(mirrored.reshape(len(grids), -1), reference)
            closer = distances < best.distances
            best.distances[closer], best.indices[closer] = distances[closer], indices[closer]
    return best


def measure_memorisation(
    fake: MeasuredSet, train: MeasuredSet, own: Neighbours, baseline: np.ndarray | None, seed: int
) -> dict:
    """Return the number of pixel copies, the closest pairs, and the share closer to training images than real ones.

    baseline (K,): distances of unseen real images to training images.
    """
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
    if baseline is not None and len(baseline):
        share, threshold = share_closer(own.distances, baseline, fake.groups, seed)
        result |= {"share_closer": share, "threshold": threshold}
    return result


def copies(own: MeasuredSet, other: MeasuredSet) -> np.ndarray:
    """Return which images (N,) have exactly the pixels of an image of the other set."""
    known = {row.tobytes() for row in other.rows["pixels"].all()[:, 1:]}
    return np.array([row.tobytes() in known for row in own.rows["pixels"].all()[:, 1:]])


# --- structure and image statistics ---


def measure_structure(own: MeasuredSet, seed: int) -> dict[str, Estimate]:
    """Return mean SSIM of the given pairs, mean MS-SSIM of pairs of any prompts and of the same prompt.

    Intervals resample pairs as if independent, though an image is in two of them, and for pairs within prompts also the
    prompts.
    """
    result = {}
    for name in ("SSIM", "MS_SSIM", "MS_SSIM_within"):
        if name in own.pairs:
            pairs, values = own.pairs[name]
            groups = np.zeros(len(pairs), dtype=int) if name == "MS_SSIM" else own.groups[pairs[:, 0]]
            result[name] = bootstrap_mean(values, groups, seed, resample_groups=name != "MS_SSIM", share=False)
    return result


def measure_quality(
    own: MeasuredSet, real: MeasuredSet | None, names: Sequence[str], seed: int
) -> tuple[dict, dict[str, list]]:
    """Return blocks by set of statistics (`image_statistics.SETS`), and the columns of per_image.csv.

    A block holds the numbers of images with and without a field of view, and for each statistic mean, standard
    deviation and, if `real` is given, distances to the real images.
    """
    blocks, columns = {}, {}
    for name in names:
        visible, values = _statistics(own, name)
        block = {"images": int(visible.sum()), "no_field": int((~visible).sum()), "statistics": {}}
        for number, statistic in enumerate(SETS[name].columns):
            column, groups = values[visible, number], own.groups[visible]
            numbers = summary(column, groups, seed)
            if real is not None:
                real_visible, real_values = _statistics(real, name)
                numbers |= distances(column, groups, real_values[real_visible, number], real.groups[real_visible], seed)
            block["statistics"][statistic] = numbers
            shown = zip(visible, values[:, number], strict=True)
            columns[f"{name} {statistic}"] = [float(value) if good else None for good, value in shown]
        blocks[name] = block
    return blocks, columns


def _statistics(own: MeasuredSet, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which images have a field of view (N,) bool, and their statistics (N, F), 0 without one."""
    rows = own.rows[quality_name(name)].all()
    return rows[:, 0] > 0, rows[:, 1:]


def measure_inception_score(own: MeasuredSet, seed: int) -> dict | None:
    """Return the inception score of all images in a seeded order, and its standard deviation over the parts."""
    if LOGITS not in own.rows:
        return None
    order = np.random.default_rng([seed, 4]).permutation(len(own.images))
    parts = split_count(len(order))
    mean, deviation = inception_score(own.rows[LOGITS].take(order), parts)
    how = f"{parts} part{'s' * (parts > 1)} of {len(order) // parts} images"
    if parts > 1:
        how += f", standard deviation {deviation:.3g}"
    elif len(order) < IS_SPLIT_IMAGES:
        how += f": below {IS_SPLIT_IMAGES} the score grows with the number of images, compare equal numbers only"
    return {"IS": Estimate(mean, None, None, len(order), how), "sd": deviation if parts > 1 else None, "parts": parts}

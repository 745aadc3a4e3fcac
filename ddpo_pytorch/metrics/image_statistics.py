"""Statistics of images: the five of Mittal et al.'s table 1 (`legacy`), those inside the retina (`fov`), and IS.

They describe images rather than grade them: noise raises Sharpness and Vessel Visibility, a black surround raises
Uniformity. Compare them with real images of the same resolution (`distances`).
"""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
from PIL import Image
from scipy import ndimage, special, stats

from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import REPLICATES, Estimate, bootstrap_mean, difference_interval, finite, jackknife

LEGACY = ("SNR", "Contrast", "Sharpness", "Vessel Visibility", "Uniformity")
FOV = ("SNR", "RMS contrast", "Michelson contrast", "Sharpness", "Vessel visibility", "Uniformity", "Entropy")
LUMINANCE = (0.299, 0.587, 0.114)  # BT.601
Array = np.ndarray
ROUNDING = 1 / (255 * 12**0.5)  # standard deviation of rounding to 8 bits, the minimum noise of an image
CELLS = 8
MIN_CELL = 0.8  # minimum share of a cell's pixels in the field
LOGITS = "inception logits"  # name of the network
IS_SPLITS = 10
IS_SPLIT_IMAGES = 1000  # number of classes; the score of fewer images grows with their number


def legacy_quality(pixels: np.ndarray) -> tuple[float, ...]:
    """Return Mittal et al.'s five statistics of an image uint8 (H, W, 3), H and W at least 4, over the whole frame.

    With I = PIL's "L" / 255: SNR = mean / (std + 1e-8); Contrast = max - min; Sharpness = mean |Sobel along the last
    axis|; Vessel Visibility = std(I - Gaussian of sigma 2); Uniformity = mean of the central box of half the sides -
    mean of the four quarter bands at the borders, whose common corners count twice.
    """
    if min(pixels.shape[:2]) < 4:
        raise ValueError(f"quarter bands need 4 x 4 pixels, got {pixels.shape[1]} x {pixels.shape[0]}")
    grey = (np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) / 255).astype(np.float64)
    height, width = grey.shape
    top, bottom, left, right = height // 4, 3 * height // 4, width // 4, 3 * width // 4
    bands = (grey[:top], grey[bottom:], grey[:, :left], grey[:, right:])
    border = sum(band.sum() for band in bands) / sum(band.size for band in bands)
    return (
        float(grey.mean() / (grey.std() + 1e-8)),
        float(grey.max() - grey.min()),
        float(np.abs(ndimage.sobel(grey)).mean()),
        float((grey - ndimage.gaussian_filter(grey, 2)).std()),
        float(grey[top:bottom, left:right].mean() - border),
    )


def fov_quality(pixels: np.ndarray) -> tuple[float, ...] | None:
    """Return seven statistics of an image uint8 (H, W, 3) inside its field of view; None if it has none.

    The field (`images.fov_mask`) is eroded by W / 128 pixels, at least 3. Of the green channel G in [0, 1]: RMS
    contrast = std; Michelson contrast = (p95 - p5) / (p95 + p5); Sharpness = mean squared Sobel gradient (Tenengrad);
    Vessel visibility = mean black top-hat (closing - G) with a square of 15 W / 512 pixels; Uniformity = 1 - std / mean
    over the means of the cells of an 8 x 8 grid on the field's box with at least 80 % in the field; Entropy of its 256
    levels, in bits. SNR = mean / (1.4826 MAD(Y - median of 3 x 3)) of the luminance Y, where the noise is at least that
    of rounding to 8 bits.
    """
    height, width = pixels.shape[:2]
    radius = max(3, round(width / 128))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    field = ndimage.binary_erosion(fov_mask(pixels), x**2 + y**2 <= radius**2)
    if field.sum() < 0.01 * field.size:  # too small for a retina
        return None
    green = pixels[..., 1] / 255.0
    rows, columns = (np.flatnonzero(field.any(axis=axis)) for axis in (1, 0))
    edges = [np.linspace(used[0], used[-1] + 1, CELLS + 1).round().astype(int) for used in (rows, columns)]
    cells = [tuple(slice(*ends) for ends in cell) for cell in product(*map(pairwise, edges))]
    cells = [cell for cell in cells if field[cell].size and field[cell].mean() >= MIN_CELL]
    means = np.array([green[cell][field[cell]].mean() for cell in cells])
    if len(means) < 2:
        return None
    luminance = pixels @ np.array(LUMINANCE) / 255
    residual = (luminance - ndimage.median_filter(luminance, 3))[field]
    noise = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    inside = green[field]
    vessel = max(3, 2 * round((15 * width / 512 - 1) / 2) + 1)  # the nearest odd number
    low, high = np.percentile(inside, [5, 95])
    gradient = ndimage.sobel(green, 0) ** 2 + ndimage.sobel(green, 1) ** 2
    return (
        float(luminance[field].mean() / max(noise, ROUNDING)),
        float(inside.std()),
        float((high - low) / (high + low or 1)),
        float(gradient[field].mean()),
        float(ndimage.black_tophat(green, size=vessel)[field].mean()),
        float(1 - means.std() / (means.mean() or 1)),
        float(stats.entropy(np.bincount(pixels[..., 1][field]), base=2)),
    )


# by name: columns; function from uint8 (H, W, 3) to a number per column, or None without a field of view; description
SETS = {
    "legacy": (LEGACY, legacy_quality, "whole frame, grey levels in [0, 1], as in Mittal et al.'s table 1"),
    "fov": (FOV, fov_quality, "inside the eroded field of view; green channel in [0, 1]"),
}


def distances(generated: Array, groups: Array, real: Array, real_groups: Array, seed: int) -> dict[str, Estimate]:
    """Return distances between a statistic of generated images (N,) and of real ones (M,); groups are prompts.

    - "difference": mean of generated - mean of real images; both sides resample prompts and their images.
    - "standardised": the difference divided by the real images' standard deviation, which is taken as given.
    - "wasserstein": 1-Wasserstein distance in the same unit, with a jackknife over generated images alone.
    """
    if not len(generated) or not len(real):
        return dict.fromkeys(("difference", "standardised", "wasserstein"), Estimate.missing("no images"))
    value, number = float(generated.mean() - real.mean()), len(generated) + len(real)
    ends, how = [None, None], "one image: no interval"
    if min(len(generated), len(real)) > 1:
        sides = (real, real_groups), (generated, groups)
        ends = difference_interval(*sides, [[seed, 1], [seed, 0]], resample_groups=True)
        how = f"percentile bootstrap, {REPLICATES} replicates over prompts and images of each side"
    difference = Estimate(value, *ends, number, how)
    deviation = float(real.std(ddof=1)) if len(real) > 1 else 0.0
    if not deviation:
        missing = dict.fromkeys(("standardised", "wasserstein"), Estimate.missing("real images do not differ"))
        return missing | {"difference": difference}

    def wasserstein(rows: np.ndarray) -> float:
        return float(stats.wasserstein_distance(generated[rows], real) / deviation)

    ends = [None if end is None else end / deviation for end in ends]
    standardised = Estimate(value / deviation, *ends, number, how)
    distance = jackknife(wasserstein, len(generated), seed, (0, np.inf))
    return {"difference": difference, "standardised": standardised, "wasserstein": distance}


def inception_score(logits: np.ndarray, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Return mean and standard deviation over parts of exp(E KL(p(y|x) || p(y))), from 1 to C (Salimans et al. 2016).

    logits (N, C) of N images in random order; parts are consecutive rows, p(y) is the mean of p(y|x) over a part. Not
    torchmetrics', which is NaN for classes of probability 0.
    """
    logits, scores = finite(logits, "logits"), []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        log_given = special.log_softmax(rows, axis=1)
        given = np.exp(log_given)
        log_marginal = np.log(np.maximum(given.mean(axis=0), np.finfo(float).tiny))
        divergence = (given * (log_given - log_marginal)).sum(axis=1).mean()
        scores.append(max(1.0, float(np.exp(divergence))))  # below 1 by rounding only
    return float(np.mean(scores)), float(np.std(scores))


def split_count(images: int) -> int:
    """Return the number of parts of an inception score: up to ten of at least 1,000 images each, or one."""
    return max(1, min(IS_SPLITS, images // IS_SPLIT_IMAGES))


def measure_quality(images: ImageSet, real: ImageSet | None, names: Sequence[str], seed: int) -> tuple[dict, dict]:
    """Return blocks by set of statistics (`SETS`), and the columns of per_image.csv."""

    def statistics(own: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        """Return a mask (N,) of images with a field of view, and their statistics (N, F), 0 without one."""
        rows = own.rows[f"quality {name}"][:]
        return rows[:, 0] > 0, rows[:, 1:]

    blocks, columns = {}, {}
    for name in names:
        visible, values = statistics(images)
        blocks[name] = {"images": int(visible.sum()), "no_field": int((~visible).sum()), "statistics": {}}
        for number, statistic in enumerate(SETS[name][0]):
            column, groups = values[visible, number], images.groups[visible]
            mean = bootstrap_mean(column, groups, seed, resample_groups=True, share=False)
            numbers = {"mean": mean, "sd": float(column.std(ddof=1)) if len(column) > 1 else None}
            if real is not None:
                seen, theirs = statistics(real)
                numbers |= distances(column, groups, theirs[seen, number], real.groups[seen], seed)
            blocks[name]["statistics"][statistic] = numbers
            columns[f"{name} {statistic}"] = np.where(visible, values[:, number], None).tolist()
    return blocks, columns


def measure_inception_score(images: ImageSet, seed: int) -> dict | None:
    """Return the inception score of all images in a seeded order, and its standard deviation over the parts."""
    if LOGITS not in images.rows:
        return None
    order = np.random.default_rng([seed, 4]).permutation(len(images))
    parts = split_count(len(order))
    mean, deviation = inception_score(images.rows[LOGITS][order], parts)
    how, ends = f"{parts} part{'s' * (parts > 1)} of {len(order) // parts} images", (None, None)
    if parts > 2:
        half = float(stats.t.ppf(0.975, parts - 1)) * deviation / (parts - 1) ** 0.5
        ends, how = (max(1.0, mean - half), mean + half), f"t interval over {how}, standard deviation {deviation:.3g}"
    else:
        how += f": an interval needs 3 of {IS_SPLIT_IMAGES}"
    if len(order) < IS_SPLIT_IMAGES:
        how += "; the score grows with the number of images, compare equal numbers only"
    return {"IS": Estimate(mean, *ends, len(order), how), "sd": deviation if parts > 1 else None, "parts": parts}

"""Statistics of single images: the five of the document's table 1 (`legacy`), and those inside the retina (`fov`).

They describe images and do not grade them: noise raises Sharpness and Vessel Visibility, a black surround alone raises
Uniformity. Most depend on the resolution. What tells something is how far a set is from real images of the same
resolution (`distances`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage, stats

from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.metrics.intervals import REPLICATES, Quantity, bootstrap_mean
from ddpo_pytorch.metrics.resampling import Sample, replicate_means

LEGACY = ("SNR", "Contrast", "Sharpness", "Vessel Visibility", "Uniformity")
FOV = ("SNR", "RMS contrast", "Michelson contrast", "Sharpness", "Vessel visibility", "Uniformity", "Entropy")
LUMINANCE = (0.299, 0.587, 0.114)  # BT.601
# standard deviation of rounding to 8 bits: no image's noise is known to be less
ROUNDING = 1 / (255 * 12**0.5)
CELLS = 8
WHOLE_CELL = 0.8  # of its pixels in the field, from which on a cell counts
LEAST_FIELD = 0.01  # of the frame: what is left of smaller fields is no retina


@dataclass(frozen=True)
class QualitySet:
    """Some statistics: their names, the function of an image that gives them, and what they are, in a line.

    `measure` maps uint8 (H, W, 3) to one number a name; None where the image has no field of view.
    """

    name: str
    columns: tuple[str, ...]
    measure: Callable[[np.ndarray], tuple[float, ...] | None]
    about: str


def legacy_quality(pixels: np.ndarray) -> tuple[float, ...]:
    """The document's five numbers of an image uint8 (H, W, 3), H and W at least 4, over the whole frame.

    I is PIL's "L" over 255: SNR = mean / (std + 1e-8); Contrast = max - min; Sharpness = mean |Sobel along the last
    axis|; Vessel Visibility = std(I - Gaussian of sigma 2); Uniformity = mean of the central box of half the sides -
    mean of the four quarter bands at the borders, whose common corners count twice. Filters mirror I at its borders
    (scipy's "reflect"). Raises ValueError for smaller images, which have no bands.
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
    """Seven numbers of an image uint8 (H, W, 3) inside its field of view; None where it has none.

    The field (`images.fov_mask`) is eroded by W / 128 pixels, at least 3, so that its rim is not measured. Of
    the green channel G in [0, 1]: RMS contrast = std; Michelson contrast = (p95 - p5) / (p95 + p5); Sharpness = mean
    squared Sobel gradient (Tenengrad); Vessel visibility = mean black top-hat (closing - G) with a square of 15 W / 512
    pixels, which is what is dark and narrower; Uniformity = 1 - std / mean over the means of the cells of an 8 x 8 grid
    on the field's box with at least 80 % of their pixels in the field; Entropy of its 256 levels, in bits. SNR = mean /
    (1.4826 MAD(Y - median of 3 x 3)) of the luminance Y, whose residuals, unlike those of G, are no multiples of
    1 / 255; the noise counts as at least that of rounding to 8 bits.
    """
    height, width = pixels.shape[:2]
    field = ndimage.binary_erosion(fov_mask(pixels), _disc(max(3, round(width / 128))))
    if field.sum() < LEAST_FIELD * field.size:
        return None
    green = pixels[..., 1] / 255.0
    means = _cell_means(green, field)
    if len(means) < 2:
        return None
    luminance = pixels @ np.array(LUMINANCE) / 255
    residual = (luminance - ndimage.median_filter(luminance, 3))[field]
    noise = 1.4826 * np.median(np.abs(residual - np.median(residual)))
    inside = green[field]
    low, high = np.percentile(inside, [5, 95])
    gradient = ndimage.sobel(green, 0) ** 2 + ndimage.sobel(green, 1) ** 2
    shares = np.bincount(pixels[..., 1][field], minlength=256) / len(inside)
    return (
        float(luminance[field].mean() / max(noise, ROUNDING)),
        float(inside.std()),
        _ratio(high - low, high + low),
        float(gradient[field].mean()),
        float(ndimage.black_tophat(green, size=_odd(15 * width / 512))[field].mean()),
        1 - _ratio(means.std(), means.mean()),
        float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum() + 0.0),
    )


SETS = {
    "legacy": QualitySet(
        "legacy", LEGACY, legacy_quality, "whole frame, grey levels in [0, 1], as in the document's table 1"
    ),
    "fov": QualitySet("fov", FOV, fov_quality, "inside the eroded field of view; green channel in [0, 1]"),
}


def distances(
    generated: np.ndarray, own_groups: np.ndarray, real: np.ndarray, real_groups: np.ndarray, seed: int
) -> dict[str, Quantity | float | None]:
    """How far a statistic of generated images (N,) is from that of real ones (M,); groups are the images' prompts.

    "difference": mean of the generated - mean of the real images, its interval from resampling prompts and their images
    on each side by itself. "standardised": that over the real images' standard deviation, taken as given.
    "wasserstein": the 1-Wasserstein distance of the two distributions in the same unit. The last two are None where
    real images do not differ.
    """
    if not len(generated) or not len(real):
        return {"difference": Quantity.missing("no images"), "standardised": Quantity.missing("no images")} | {
            "wasserstein": None
        }
    value, spread = float(generated.mean() - real.mean()), float(real.std(ddof=1)) if len(real) > 1 else 0.0
    low = high = None
    how = "one image: no interval"
    if min(len(generated), len(real)) > 1:
        own, theirs = (
            replicate_means([Sample(values[:, None], groups)], number, resample_groups=True, replicates=REPLICATES)[0]
            for number, values, groups in (([seed, 0], generated, own_groups), ([seed, 1], real, real_groups))
        )
        low, high = np.percentile((own - theirs)[:, 0], [2.5, 97.5]).tolist()
        how = f"percentile bootstrap, {REPLICATES} replicates over prompts and images of each side"
    number = len(generated) + len(real)
    if not spread:
        missing = Quantity.missing("real images do not differ")
        return {"difference": Quantity(value, low, high, number, how), "standardised": missing, "wasserstein": None}
    scaled = [None if end is None else end / spread for end in (low, high)]
    return {
        "difference": Quantity(value, low, high, number, how),
        "standardised": Quantity(value / spread, *scaled, number, how),
        "wasserstein": float(stats.wasserstein_distance(generated, real) / spread),
    }


def summary(values: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Quantity | float | None]:
    """ "mean" of a statistic (N,) over images with its interval, and their standard deviation "sd"."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": bootstrap_mean(values, groups, seed, resample_groups=True, share=False), "sd": spread}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _odd(size: float) -> int:
    """The odd number nearest to `size`, at least 3."""
    return max(3, 2 * round((size - 1) / 2) + 1)


def _disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def _cell_means(green: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Means over the pixels in the field of the cells that lie in it, of 8 x 8 cells on the field's box."""
    rows, columns = (np.flatnonzero(field.any(axis=axis)) for axis in (1, 0))
    edges = [np.linspace(one[0], one[-1] + 1, CELLS + 1).round().astype(int) for one in (rows, columns)]
    found = []
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            inside = field[top:bottom, left:right]
            if inside.size and inside.mean() >= WHOLE_CELL:
                found.append(green[top:bottom, left:right][inside].mean())
    return np.array(found)

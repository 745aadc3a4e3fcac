"""Degradations of fundus images with known strength; lengths are shares of the width, to look the same at any size."""

import math

import numpy as np
from scipy import ndimage

from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.utils.errors import UserError

# strengths that an expert would rate 2 (mild but visible) and 1 (of little use), with a gap between them
BANDS = {2: (0.25, 0.4), 1: (0.8, 1.0)}
# minimum `vessel_contrast` of an image that can be rated 3, and of one in which vessels can be erased
VISIBLE, ERASABLE = 0.005, 0.015


def degrade(image: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Degrade a uint8 (H, W, 3) fundus image inside its field of view, by one of KINDS with a strength in (0, 1].

    STRUCTURAL kinds are allowed, too; they make it unlike any retina, whatever the strength. UserError for others.
    """
    if kind not in _DEGRADE or not 0 < strength <= 1:
        raise UserError(f"degradation {kind!r} of {strength}: kinds are {', '.join(_DEGRADE)}; strengths in (0, 1]")
    field = fov_mask(image)
    degraded = _DEGRADE[kind](image.astype(np.float32), field, float(strength), rng)
    return np.where(field[..., None], np.clip(np.rint(degraded), 0, 255), image).astype(np.uint8)


def vessel_contrast(image: np.ndarray) -> float:
    """Return the contrast between vessels and surround of a uint8 (H, W, 3) image, as a mean over the field.

    About 0.05 for phantoms, 0.02 for photographs, and below 0.005 if haze or darkness hides everything.
    """
    field = fov_mask(image)
    vessel, fill = _find_vessels(image.astype(np.float32), field)
    darker = vessel * (fill - image)[..., 1] / np.maximum(fill[..., 1], 20)
    return float(darker[field].mean()) if field.any() else 0.0


def has_one_disc(image: np.ndarray) -> bool:
    """Return whether a uint8 (H, W, 3) image has exactly one optic disc: a bright blob of a disc's size in the field.

    Blobs are maxima of a difference of Gaussians that reach 0.7 of the highest. True for 77 % of ODIR's photographs,
    for none with mirrored halves, and for 18 % of shuffled ones.
    """
    field, width = fov_mask(image), image.shape[1]
    light = image[..., :2].astype(np.float32).mean(axis=2, keepdims=True)
    near, far = (_smooth(light, field.astype(np.float32), sigma * width)[..., 0] for sigma in (0.025, 0.12))
    blobs = np.where(ndimage.distance_transform_edt(np.pad(field, 1))[1:-1, 1:-1] > 0.04 * width, near - far, -np.inf)
    peaks = blobs == ndimage.maximum_filter(blobs, size=max(3, round(0.16 * width) | 1))
    return int((peaks & (blobs > max(4, 0.7 * blobs.max()))).sum()) == 1


def draw_damage(grade: int, rng: np.random.Generator, vessels: bool = True) -> tuple[str, float]:
    """Draw a kind and a strength for the grade 2 or 1; without `vessels`, never erase them."""
    kinds = KINDS if vessels else tuple(kind for kind in KINDS if kind != "vessels")
    return str(rng.choice(kinds)), float(rng.uniform(*BANDS[grade]))


def _smooth(values: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """Return the Gaussian mean of (H, W, 3) values, weighted by (H, W); sigma in pixels."""
    total = ndimage.gaussian_filter(weight, sigma)
    sums = ndimage.gaussian_filter(values * weight[..., None], (sigma, sigma, 0))
    return sums / np.maximum(total, 1e-6)[..., None]


def _blur(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Defocus the retina but not the aperture's rim, which is behind the lens."""
    soft = _smooth(image, field.astype(np.float32), 0.04 * strength**1.25 * image.shape[1])
    return image + (soft - image) * _inside(field, 0.015)[..., None]


def _noise(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add high-gain noise: grain that grows with the square root of the light, and coarse colour specks."""
    height, width, _ = image.shape
    grain = ndimage.gaussian_filter(rng.standard_normal((height, width), np.float32), width / 256)
    specks = ndimage.gaussian_filter(rng.standard_normal((height, width, 3), np.float32), (width / 100, width / 100, 0))
    light = 0.2 + 0.8 * np.sqrt(image.mean(axis=2, keepdims=True) / 128)
    return image + strength * light * (34 * (grain / grain.std())[..., None] + 24 * specks / specks.std())


def _exposure(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Over- or underexpose by gamma, then gain; bright fields are more likely overexposed, dark fields underexposed."""
    brightness = image[field].mean() if field.any() else 0
    over = rng.random() < np.clip((brightness - 60) / 80, 0, 1)
    gamma, gain = (1 / (1 + 1.6 * strength), 1 + 0.45 * strength) if over else (1 + 1.4 * strength, 1 - 0.45 * strength)
    return 255 * gain * (image / 255) ** gamma


def _crop(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Blacken one side of the field, as an off-axis camera does."""
    height, width, _ = image.shape
    angle, radius = rng.uniform(0, 2 * math.pi), 0.5 * width
    x, y = np.arange(width) + 0.5 - width / 2, np.arange(height)[:, None] + 0.5 - height / 2
    shift = 0.9 * strength * width * 0.5
    distance = np.hypot(x - shift * math.cos(angle), y - shift * math.sin(angle))
    return image * np.clip((radius - distance) / (0.02 * width) + 0.5, 0, 1)[..., None]


def _vessels(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Fill vessels from their surround in a part of the field that grows with the strength: half at 0.4, all at 0.8."""
    height, width, _ = image.shape
    vessel, fill = _find_vessels(image, field)
    patches = ndimage.gaussian_filter(rng.standard_normal((height, width), np.float32), 0.07 * width)
    order = patches.argsort(axis=None)
    before = np.cumsum(vessel.flat[order])  # vessels in patches that are erased earlier
    share = np.empty(before.size)
    share[order] = before / max(before[-1], 1e-6)
    lost = np.clip((1.25 * strength - share.reshape(height, width)) / 0.06, 0, 1)
    return image + (fill - image) * (vessel * lost)[..., None]


def _find_vessels(image: np.ndarray, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return dark and narrow structures in green (black top-hat), (H, W) in [0, 1], and the image without them."""
    width = image.shape[1]
    around = _smooth(image[..., 1:2], field.astype(np.float32), 0.05 * width)[..., 0]
    # capped, so that gaps between bright spots are not dark; filled outside the field, so that its rim is not an edge
    green = np.where(field, np.minimum(ndimage.gaussian_filter(image[..., 1], width / 250), around + 4), around)
    reach = max(3, round(0.06 * width))
    depth = ndimage.black_tophat(green, size=(reach, reach)) / np.maximum(around, 20)
    vessel = ndimage.maximum_filter(np.clip((depth - 0.02) / 0.04, 0, 1), size=max(1, round(width / 64)))
    vessel *= _inside(field, 0.03)
    fill = _smooth(image, field * (1 - vessel), 0.03 * width)
    return vessel * np.clip((fill[..., 1] - image[..., 1]) / 3, 0, 1), fill


def _inside(field: np.ndarray, ramp: float) -> np.ndarray:
    """Return (H, W): 0 outside the field and at its half-dark rim, rising to 1 over `ramp` times the width."""
    return np.clip((ndimage.distance_transform_edt(field) - 1) / (ramp * field.shape[1]) - 0.5, 0, 1)


def _flat(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Fill the field with its mean colour, inside its own rim."""
    return image + (image[field].mean(0) - image) * _inside(field, 0.03)[..., None] if field.any() else image


def _shuffled(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Permute 8 x 8 patches."""
    height, width = (length // 8 for length in image.shape[:2])
    shuffled, patches = image.copy(), (8, height, 8, width, 3)
    grid = image[: 8 * height, : 8 * width].reshape(patches).swapaxes(1, 2)  # (8, 8, height, width, 3)
    grid = grid.reshape(64, height, width, 3)[rng.permutation(64)].reshape(grid.shape)
    shuffled[: 8 * height, : 8 * width] = grid.swapaxes(1, 2).reshape(8 * height, 8 * width, 3)
    return shuffled


def _mirrored(image: np.ndarray, field: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Replace one half by the mirror image of the other, which leaves two discs or none."""
    image = image if rng.random() < 0.5 else image[:, ::-1]
    half = image.shape[1] // 2
    return np.concatenate([image[:, : image.shape[1] - half], image[:, :half][:, ::-1]], axis=1)


_DEGRADE = {"blur": _blur, "noise": _noise, "exposure": _exposure, "crop": _crop, "vessels": _vessels}
KINDS = tuple(_DEGRADE)
_DEGRADE |= {"flat": _flat, "shuffled": _shuffled, "mirrored": _mirrored}
_DEGRADE |= {"swapped": lambda image, *_: image[..., [1, 0, 2]]}  # red and green
STRUCTURAL = tuple(_DEGRADE)[len(KINDS) :]

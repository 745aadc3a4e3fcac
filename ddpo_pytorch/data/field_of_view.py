"""The field of view of a fundus photograph: the lit disc, often cut off at top and bottom, in a black surround."""

import numpy as np
from PIL import Image
from scipy import ndimage

# levels of 255. The surround of JPEG files reaches about 10; the darkest retina is red alone, hence the largest channel
# and not green or grey, which miss a third and more of underexposed fields.
THRESHOLD = 15
# parts of an underexposed field that hang apart count from this share of the picture; stamped letters are smaller.
SMALLEST_PART = 1 / 500


def fov_mask(rgb: np.ndarray) -> np.ndarray:
    """The field of view of a uint8 (H, W, 3) image: bool (H, W), true inside.

    The largest connected region whose largest channel exceeds THRESHOLD, without holes. All false for a black image.
    """
    regions, sizes = _regions(rgb)
    if not sizes.any():
        return np.zeros(regions.shape, bool)
    return ndimage.binary_fill_holes(regions == sizes.argmax())


def fov_square(image: Image.Image) -> Image.Image:
    """An RGB image cut to the box of its field of view and padded with black to a square, centred.

    No pixel is scaled. The box holds every lit region of at least SMALLEST_PART of the picture, so that a dark band
    through the field loses no part of it. A picture without any such region, or lit to all four edges, is only padded.
    """
    regions, sizes = _regions(np.asarray(image))
    sizeable = sizes >= SMALLEST_PART * regions.size
    sizeable[0] = False
    if sizeable.any():
        rows, columns = (np.flatnonzero(sizeable[regions].any(axis)) for axis in (1, 0))
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _regions(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) numbers of the connected lit regions from 1, 0 elsewhere; pixels of each, 0 for the dark."""
    regions, _ = ndimage.label(rgb.max(2) > THRESHOLD)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return regions, sizes

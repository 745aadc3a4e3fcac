"""The field of view of drawn discs and real fundus photographs."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ddpo_pytorch.data.images import fov_mask, fov_square


def disc(height, width, centre, radius, level=90):
    y, x = np.mgrid[:height, :width]
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    noise = np.random.default_rng(0).integers(0, 11, (height, width, 3))  # of the camera, or JPEG
    return np.where(inside[..., None], np.array([level, level // 3, 5]) + noise, noise).astype(np.uint8), inside


@pytest.mark.parametrize(
    ("shape", "centre", "radius"),
    [((90, 140), (60, 45), 40), ((80, 140), (75, 40), 55), ((64, 64), (20, 30), 30), ((300, 200), (99, 160), 98)],
)
@pytest.mark.parametrize("level", [30, 200])
def test_mask_and_square_of_a_disc_off_centre_or_cut_off(shape, centre, radius, level):
    pixels, inside = disc(*shape, centre, radius, level)
    holed = pixels.copy()
    holed[centre[1] - 3 : centre[1] + 3, centre[0] - 9 : centre[0] + 9] = 0
    holed[1:4, -4:-1] = 255  # a letter in the corner
    assert np.array_equal(fov_mask(holed), inside)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    square = np.asarray(fov_square(Image.fromarray(pixels)))
    side = max(height, width)
    assert square.shape == (side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert np.array_equal(square[top : top + height, left : left + width], box)
    assert square.sum() == box.sum()  # black around it
    assert np.array_equal(np.asarray(fov_square(Image.fromarray(square))), square)


def test_a_dark_band_loses_no_part_of_the_field():
    pixels, inside = disc(100, 160, (80, 50), 45)
    pixels[:, 70:84] //= 20
    square = np.asarray(fov_square(Image.fromarray(pixels)))
    assert square.shape == (91, 91, 3)
    assert fov_mask(pixels).sum() < inside.sum() / 2  # the mask is the larger part


def test_pictures_without_a_surround_are_only_padded():
    assert not fov_mask(np.zeros((20, 30, 3), np.uint8)).any()
    full = np.random.default_rng(0).integers(40, 255, (20, 30, 3), np.uint8)
    assert fov_mask(full).all()
    for pixels in (full, np.zeros_like(full)):
        square = np.asarray(fov_square(Image.fromarray(pixels)))
        assert square.shape == (30, 30, 3)
        assert np.array_equal(square[5:25], pixels) and not square[:5].any() and not square[25:].any()


def test_real_photographs_lose_no_pixel_of_the_field(shared):
    with zipfile.ZipFile(shared / "data" / "odir-128" / "images.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::10]:
            image = Image.open(io.BytesIO(archive.read(name)))
            pixels = np.asarray(image)
            square = np.asarray(fov_square(image))
            # an independent field: lit after smoothing, without single pixels of compression noise
            field = (ndimage.uniform_filter(pixels.astype(float), (5, 5, 1)) > 15).any(2) & (pixels.max(2) > 15)
            assert square.shape[0] == square.shape[1] <= 128, name
            assert square.sum() >= pixels[field].sum() and (square.max(2) > 15).sum() >= field.sum(), name

"""Drawing tools of phantoms. Geometry is in *points*: pictures of any size are POINTS wide. Colours are in [0, 255]."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ddpo_pytorch.data.sample_folder import WORLD
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import atomic_folder, locked, write_json
from ddpo_pytorch.utils.json_files import read_json

POINTS = 64


def plane(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' centres in points: x (1, pixels) and y (pixels, 1)."""
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * (POINTS / pixels)
    return axis[None, :], axis[:, None]


def clouds(rng: np.random.Generator, pixels: int, cells: int, octaves: int = 3) -> np.ndarray:
    """Return smooth noise (pixels, pixels) with a standard deviation near 0.5 and largest structures 1/cells wide."""
    field = np.zeros((pixels, pixels), np.float32)
    for octave in range(octaves):
        coarse = rng.standard_normal((cells * 2**octave,) * 2, dtype=np.float32)
        field += np.asarray(Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)) * 0.5**octave
    return 0.6 * field


def step(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Return a smooth step from 0 to 1 around distance 0, `width` points wide."""
    ramp = np.clip(distance / width + 0.5, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def blend(image: np.ndarray, colour: np.ndarray | Sequence[float], alpha: np.ndarray) -> np.ndarray:
    """Return the (H, W, 3) image covered by a colour with opacity (H, W)."""
    return image + (np.asarray(colour, np.float32) - image) * alpha[..., None]


def direction(angle: float) -> np.ndarray:
    """Return the unit vector (x, y) at this angle, in radians."""
    return np.array([math.cos(angle), math.sin(angle)], np.float32)


class Sheet:
    """A transparent sheet at four times the picture's resolution; `alpha` is its antialiased coverage."""

    def __init__(self, size: int):
        self.scale, self.sheet = 4 * size / POINTS, Image.new("L", (4 * size, 4 * size))
        self.pen = ImageDraw.Draw(self.sheet)

    def stroke(self, start: np.ndarray, bend: np.ndarray, end: np.ndarray, width: float) -> None:
        """Draw a quadratic Bezier curve with round ends."""
        t = np.linspace(0, 1, 16)[:, None]
        path = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end) * self.scale
        self.pen.line([tuple(point) for point in path], 255, round(width * self.scale), "curve")
        self.disc(start, width / 2)
        self.disc(end, width / 2)

    def disc(self, centre: np.ndarray, radius: float, strength: float = 1.0) -> None:
        """Draw a filled circle that replaces what is below."""
        (x, y), reach = centre * self.scale, radius * self.scale
        self.pen.ellipse((x - reach, y - reach, x + reach, y + reach), round(255 * strength))

    def alpha(self, blur: float = 0.0) -> np.ndarray:
        """Return the coverage in [0, 1], (size, size), softened by a Gaussian of `blur` points."""
        radius = blur * self.scale / 4
        return np.asarray(self.sheet.reduce(4).filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def complete_world(
    folder: Path,
    world: Mapping[str, Any],
    tables: str,
    columns: Sequence[str],
    draw_images: Callable[[], Mapping[str, Sequence[Mapping[str, Any]]]],
) -> None:
    """Write the splits/<tables>_<split>.csv of a world, unless it has them, with the rows by split of `draw_images`.

    `world`: settings that identify it, recorded in WORLD. Raises UserError if the folder holds anything else.
    """
    with locked(folder, "another --out"):
        occupied = any((folder / name).exists() for name in ("images", "splits", "captions.csv"))
        check_record(folder / WORLD, world, occupied)
        if (folder / "splits").exists():  # the last files to be written
            return
        write_json(folder / WORLD, world)
        rows = draw_images()
        with atomic_folder(folder / "splits") as unfinished:
            for split, part in rows.items():
                write_table(unfinished / f"{tables}_{split}.csv", columns, part)


def check_record(record: Path, settings: Mapping[str, Any], occupied: bool) -> None:
    """Raise UserError if a folder's record has other settings, or if it has none and is `occupied` by other files."""
    if changed := record.exists() and difference(read_json(record, advice="give a new folder"), settings):
        raise UserError(f"{str(record.parent)!r} was drawn with {changed}; give a new folder")
    if occupied and not record.exists():
        raise UserError(f"{str(record.parent)!r} already holds other files; give a new folder")

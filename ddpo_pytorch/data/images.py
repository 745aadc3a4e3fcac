"""Images: between tensors and files, the one reader, fields of view, and the files that tables name."""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch.utils.data import Dataset

from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, open_regular, path_inside

logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
LARGEST_SIDE = 4096  # pixels of a judge's input
# allowed contents, whatever the suffix: Pillow would hand others to programs (PostScript to Ghostscript)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# raised with every change of the pixels that `read_rgb` returns, so that no cache serves those of older rules
READER_VERSION = 2
# ways to a square: scale the sides independently, as in the paper; crop to the middle; pad with black; or crop a fundus
# photograph to its field of view and pad
RESIZES = ("stretch", "crop", "pad", "fov")
# modes with one conversion to RGB; CMYK, LAB and HSV depend on a profile
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FILTER = Image.Resampling.BICUBIC  # what Image.resize takes by default


class TableRow(Protocol):
    """Row of a table with the name of an image."""

    @property
    def image(self) -> str: ...


T = TypeVar("T", bound=TableRow)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert float images in [0, 1] to uint8, rounded and clamped: 1.0 is 255 and every 8-bit level survives."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert a (3, H, W) image, uint8 or float in [0, 1], to a PIL image."""
    levels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def load_image(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """Read an image as (3, H, W) float in [0, 1], resized to a square of `size` pixels (bicubic).

    `resize` is one of RESIZES. Raises UserError as `read_rgb` does.
    """
    return load_pixels(path, size, resize).float() / 255


def load_pixels(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """Read an image as `load_image` does, as uint8."""
    return torch.from_numpy(np.array(_squared(read_rgb(path), size, resize))).permute(2, 0, 1).contiguous()


def _squared(image: Image.Image, size: int | None, resize: str) -> Image.Image:
    if resize not in RESIZES:
        raise UserError(f"resize is {resize!r}; allowed are {', '.join(RESIZES)}")
    if resize == "fov":
        image = fov_square(image)
    if size is None or image.size == (size, size):
        return image
    if resize == "stretch":
        return image.resize((size, size), _FILTER)
    if resize == "crop":
        return ImageOps.fit(image, (size, size), _FILTER)
    return ImageOps.pad(image, (size, size), _FILTER)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file of FORMATS, whatever its suffix; pixels are decoded on access.

    Raises UserError, also for errors inside the block: a missing, truncated, huge, non-regular or non-image file, and
    one whose levels have no certain meaning in 8 bits (`_ambiguity`).
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            if reason := _ambiguity(image):
                raise _refusal(path, reason)
            yield image
    except UserError:
        raise
    except Exception as error:  # of damaged files Pillow's decoders raise nearly anything
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UserError(f"{str(path)!r} cannot be read as an image; remove it or fetch it again ({reason})") from error


def read_rgb(path: str | Path) -> Image.Image:
    """Decode a file to its last pixel as 8-bit RGB.

    Grey levels, palettes and YCbCr become RGB; an opaque alpha channel is dropped; 16-bit grey levels are divided by
    257 and rounded, 16-bit RGB keeps the upper byte. Raises UserError as `open_image` does, for transparent pixels, and
    for 16-bit images that use only the lowest twelve bits and would be nearly black.
    """
    with open_image(path) as image:
        white = _white(image)  # before decoding, which forgets it
        if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            straight = image.convert("LA") if image.mode == "La" else image
            if straight.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise _refusal(path, "has transparent pixels, whose colour is not defined")
        if white and image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.int64)
            if 0 < levels.max() <= white // 16:
                raise _refusal(path, f"has no grey level above {levels.max()}, where white is {white}")
            return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
        picture = image.convert("RGB")
        if white and max(high for _, high in picture.getextrema()) < 16:
            raise _refusal(path, f"has no level above {white // 16}, where white is {white}")
        return picture


def _refusal(path: str | Path, reason: str) -> UserError:
    return UserError(f"{str(path)!r} {reason}; convert it to 8-bit RGB as you mean it")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the layout of the levels in the file, e.g. "RGB;16B", or ""."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _white(image: Image.Image) -> int:
    """Return the highest level of an image with more than 8 bits a channel, else 0."""
    deep = re.search(r";(12|16)", _raw_mode(image))
    return 2 ** int(deep[1]) - 1 if deep else 0


def _ambiguity(image: Image.Image) -> str | None:
    """Return why the levels of an image have no certain meaning in 8 bits, from its header, or None."""
    if image.format in ("PNG", "TIFF", "WEBP") and (frames := getattr(image, "n_frames", 1)) > 1:
        return f"holds {frames} images"
    tags = getattr(image, "tag_v2", {})
    samples = tags.get(339, (1,))  # SampleFormat: 1 is unsigned, 2 signed, 3 floating point
    if image.mode == "F" or set(samples if isinstance(samples, tuple) else (samples,)) != {1}:
        return "has signed or floating-point levels of unknown black and white"
    white = _white(image)
    if image.mode.startswith("I") and not (white and re.fullmatch(r"I;(12|16)[BLNR]?", _raw_mode(image))):
        return "has 32-bit or signed levels of unknown black and white"
    if white and tags.get(262) == 0:  # PhotometricInterpretation: Pillow inverts 8-bit images only
        return "has 16-bit levels in which white is 0"
    if "transparency" in image.info and image.mode != "P" and _raw_mode(image) not in ("L", "RGB"):
        return "declares one of its levels transparent"
    if image.mode not in _MODES and not image.mode.startswith("I"):
        return f"has mode {image.mode}"
    return None


def find_damage(paths: Sequence[Path]) -> list[str | None]:
    """Decode images on all cores; return for each the error of `read_rgb`, or None."""

    def fault(path: Path) -> str | None:
        try:
            read_rgb(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(thread_limit()) as pool:
        return list(pool.map(fault, paths))


def is_intact(path: str | Path) -> bool:
    """Return whether an image exists and is undamaged: PNG by its checksums, others by decoding."""
    try:
        with open_image(path) as image:
            if image.format != "PNG":
                image.load()
                return True
            image.fp.seek(-len(_PNG_END), os.SEEK_END)
            ended = image.fp.read() == _PNG_END
            image.verify()
            return ended
    except UserError:
        return False


def save_image(path: str | Path, image: torch.Tensor) -> None:
    """Write a (3, H, W) image, uint8 or float in [0, 1], as PNG, or by `save_jpeg` if the path ends in .jpg."""
    save = save_jpeg if Path(path).suffix == ".jpg" else save_picture
    save(path, to_pil(image))


def save_jpeg(path: str | Path, picture: Image.Image) -> None:
    """Write a PIL image as JPEG of quality 95 without chroma subsampling (4:4:4)."""
    save_picture(path, picture, format="JPEG", quality=95, subsampling=0)


def save_picture(path: str | Path, picture: Image.Image, **options: Any) -> None:
    """Write a PIL image atomically, by default as PNG; `options` are those of its method `save`.

    It is encoded in memory, because Pillow's JPEG encoder does not notice a full disk.
    """
    encoded = io.BytesIO()
    picture.save(encoded, **{"format": "PNG"} | options)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


class ImageFiles(Dataset):
    """Image files as uint8 (3, size, size) with a label vector or index each, decoded on access.

    `image_cache.decoded` returns the same items from a cache.
    """

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, size: int, resize: str = "stretch"):
        self.paths, self.targets, self.size, self.resize = list(paths), targets, size, resize

    def digest(self) -> str:
        """Hash names without folders, targets, size and resizing, but no pixels."""
        described = [self.size, self.resize, [Path(path).name for path in self.paths], self.targets.tolist()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return load_pixels(self.paths[index], self.size, self.resize), self.targets[index]


def image_grid(images: torch.Tensor, columns: int, padding: int = 2) -> Image.Image:
    """Arrange (B, 3, H, W) images in [0, 1] in rows on white."""
    count, _, height, width = images.shape
    height, width = height + padding, width + padding
    sheet = Image.new("RGB", (columns * width + padding, math.ceil(count / columns) * height + padding), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(to_pil(image), (padding + column * width, padding + row * height))
    return sheet


# levels of 255: the surround of JPEG files reaches about 10. The largest channel is compared, not green or grey: the
# darkest retina is red only
FOV_THRESHOLD = 15
# share of the picture from which a separate lit region belongs to the field; stamped letters are smaller
SMALLEST_PART = 1 / 500


def fov_mask(rgb: np.ndarray) -> np.ndarray:
    """Return the field of view of a uint8 (H, W, 3) fundus photograph, the lit disc in a black surround: bool (H, W).

    It is the largest connected region above FOV_THRESHOLD, without holes; all false for a black image.
    """
    regions, sizes = _lit_regions(rgb)
    if not sizes.any():
        return np.zeros(regions.shape, bool)
    return ndimage.binary_fill_holes(regions == sizes.argmax())


def fov_square(image: Image.Image) -> Image.Image:
    """Crop an RGB image to the box of its field of view and pad it with black to a centred square, without scaling.

    The box holds every lit region of at least SMALLEST_PART of the picture, so that a dark band through the field loses
    no part of it. A picture without such a region is only padded.
    """
    regions, sizes = _lit_regions(np.asarray(image))
    large = sizes >= SMALLEST_PART * regions.size
    large[0] = False
    if large.any():
        rows, columns = (np.flatnonzero(large[regions].any(axis)) for axis in (1, 0))
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _lit_regions(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (H, W) numbers of the connected lit regions, 0 for dark pixels, and the size of each, 0 for the dark."""
    regions, _ = ndimage.label(rgb.max(2) > FOV_THRESHOLD)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return regions, sizes


def stem_of(name: str) -> str:
    """Return a name without its suffix, if that is one of SUFFIXES in any case."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def find_images(
    folder: str | Path, names: Sequence[str], key: Callable[[str], str] = str.casefold
) -> list[Path | None]:
    """Return the image file of each name, a path from `folder`, or None.

    A name with a suffix is that file, else the only one that differs from it by the case of letters or the spelling of
    the suffix (.jpeg for .jpg). A name without a suffix is the only image file with the same `key` of its stem. Names
    that differ by case alone must match exactly. Raises UserError for a name that leads out of the folder and for two
    files of one name.
    """
    folder = Path(folder)
    exact = {name: path_inside(folder, name, "image table") for name in names}
    paths = {name: path for name, path in exact.items() if stem_of(name) != name and path.is_file()}
    taken = set(paths.values())

    def group(name: str) -> tuple[str, str, str]:
        path = PurePosixPath(name)
        return str(path.parent).casefold(), key(stem_of(path.name)), _format(name)

    @cache
    def files(parent: PurePosixPath) -> tuple[Path, dict[str, list[Path]]] | None:
        place = _find_directory(folder, parent)
        return None if place is None else (place, _images_by_key(place, key))

    groups = Counter(map(group, names))
    for name in names:
        path = PurePosixPath(name)
        if name in paths or (listing := files(path.parent)) is None:
            continue
        place, by_key = listing
        _, stem_key, wanted = group(name)
        candidates = [file for file in by_key.get(stem_key, ()) if file not in taken]
        candidates = [file for file in candidates if wanted in ("", _format(file.name))]
        if groups[group(name)] > 1:
            candidates = [file for file in candidates if file.stem == stem_of(path.name)]
        if len(candidates) > 1:
            one, other = sorted(candidates)[:2]
            raise UserError(f"{str(one)!r} and {str(other)!r} are both the image {name!r}; keep one of them")
        if not candidates and (place / path.name).is_file():  # without a suffix, or with one not in SUFFIXES
            candidates = [place / path.name]
        if candidates:
            paths[name] = candidates[0]
            taken.add(candidates[0])
    return [paths.get(name) for name in names]


def _format(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix) if suffix in SUFFIXES else ""


def _images_by_key(folder: Path, key: Callable[[str], str]) -> dict[str, list[Path]]:
    by_key = defaultdict(list)
    with os.scandir(folder) as entries:
        for entry in entries:  # pipes and devices are listed too: `open_image` refuses them by name
            if _format(entry.name) and not entry.is_dir() and os.path.exists(entry.path):
                by_key[key(stem_of(entry.name))].append(folder / entry.name)
    return by_key


def _find_directory(folder: Path, parent: PurePosixPath) -> Path | None:
    """Return `folder / parent` with the case of its names on disk, or None unless exactly one matches."""
    for part in parent.parts:
        if not (folder / part).is_dir():
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            matches = [name for name in names if name.casefold() == part.casefold()]
            if len(matches) != 1:
                return None
            part = matches[0]
        folder = folder / part
    return folder


def rows_with_image(
    rows: Sequence[T],
    table: str | Path,
    folder: str | Path,
    limit: int = 0,
    find: Callable[[str | Path, Sequence[str]], list[Path | None]] = find_images,
) -> tuple[list[T], list[Path], int]:
    """Return the rows of a table of which `find` finds the image, its file, and the number of other rows.

    `limit` > 0 keeps the first rows with an image. Missing images are listed in a warning.
    Raises UserError if the folder or every image is missing, and as `find_images` does.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give that of the images in {str(table)!r}")
    if not rows:
        raise UserError(f"{str(table)!r} has a header and no rows; give one image a line")
    pairs, missing = [], []
    for row, path in zip(rows, find(folder, [row.image for row in rows]), strict=True):
        if limit and len(pairs) == limit:
            break
        if path is None:
            missing.append(row.image)
        else:
            pairs.append((row, path))
    if not pairs:
        raise UserError(
            f"none of the {len(missing)} images of {str(table)!r} is in {str(folder)!r}, where the first would be "
            f"{str(Path(folder) / missing[0])!r}; give the folder that the names start from"
        )
    if missing:
        listed = f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
        message = "%d of %d images of %s are not in %s, their rows are skipped: %s"
        logger.warning(message, len(missing), len(pairs) + len(missing), table, folder, listed)
    return [row for row, _ in pairs], [path for _, path in pairs], len(missing)

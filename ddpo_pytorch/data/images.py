"""Images between tensors and files, and the sample folder that eval.py writes and metric.py reads.

A sample folder holds `images/<caption with _ for spaces>/<name>.png|jpg` and `image_log.json`, a list with one entry an
image (at least prompt and path_to_img, relative to the folder).
"""

import hashlib
import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch.utils.data import Dataset

from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, open_regular, path_inside

LARGEST_SIDE = 4096  # pixels of the squares that a judge looks at
# what files may hold, whatever they are called: Pillow would hand others to programs (PostScript to Ghostscript)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# raised with every change of the pixels that `read_rgb` makes of a file, so that no cache serves those of older rules
READER_VERSION = 2
# how a picture becomes a square: as in the paper, sides scaled apart; its middle; with black bars; or a fundus
# photograph's circle, with black bars.
RESIZES = ("stretch", "crop", "pad", "fov")
# what RGB can be made of without a choice; CMYK, LAB and HSV depend on a profile
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FILTER = Image.Resampling.BICUBIC  # what Image.resize takes by default


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1] as uint8: rounded and clamped, so that 1.0 is 255 and every 8-bit level survives."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """One (3, H, W) image in [0, 1] as a PIL image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def load_image(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """Read an image as (3, H, W) float in [0, 1], made a square of size x size pixels (PIL's default filter).

    `resize` is one of RESIZES. Raises UserError as `read_rgb` does.
    """
    return load_pixels(path, size, resize).float() / 255


def load_pixels(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """The same image as uint8."""
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
    """Open an image file of FORMATS, whatever its name says; pixels are decoded when they are asked for.

    Raises UserError, also for what is met inside the block: a missing, truncated, huge or non-image file, one that is
    not regular, and one of which the levels have no certain meaning in 8 bits (see `_ambiguity`).
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
    """Decode a file to its last pixel, as 8-bit RGB: the one reader of skin, fundus and generated images.

    Grey levels, palettes and YCbCr become RGB; a fully opaque alpha channel is dropped; 16-bit grey levels are divided
    by 257 and rounded, of 16-bit RGB the upper byte is kept. Raises UserError as `open_image` does, and for transparent
    pixels and images of 16 bits that use only the lowest twelve, which would come out nearly black.
    """
    with open_image(path) as image:
        white = _white(image)  # known until pixels are decoded
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
    """Return how the levels lie in the file, in Pillow's words, e.g. "RGB;16B"; "" where that is not stated."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _white(image: Image.Image) -> int:
    """Return the highest level of an image of more than 8 bits a channel, else 0."""
    deep = re.search(r";(12|16)", _raw_mode(image))
    return 2 ** int(deep[1]) - 1 if deep else 0


def _ambiguity(image: Image.Image) -> str | None:
    """Return why the levels of an opened image have no certain meaning in 8 bits, from its header, or None."""
    if image.format in ("PNG", "TIFF", "WEBP") and (frames := getattr(image, "n_frames", 1)) > 1:
        return f"holds {frames} images"
    tags = getattr(image, "tag_v2", {})
    samples = tags.get(339, (1,))  # SampleFormat: 1 is unsigned, 2 signed, 3 floating point
    if image.mode == "F" or set(samples if isinstance(samples, tuple) else (samples,)) != {1}:
        return "has signed or floating-point levels, of which black and white are unknown"
    white = _white(image)
    if image.mode.startswith("I") and not (white and re.fullmatch(r"I;(12|16)[BLNR]?", _raw_mode(image))):
        return "has 32-bit or signed levels, of which black and white are unknown"
    if white and tags.get(262) == 0:  # PhotometricInterpretation: white is zero, which Pillow heeds for 8 bits only
        return "has 16-bit levels in which white is 0"
    if "transparency" in image.info and image.mode != "P" and _raw_mode(image) not in ("L", "RGB"):
        return "declares one of its levels transparent"
    if image.mode not in _MODES and not image.mode.startswith("I"):
        return f"has mode {image.mode}"
    return None


def find_damage(paths: Sequence[Path]) -> list[str | None]:
    """Decode images on all cores; return for each why `read_rgb` refuses it, or None."""

    def fault(path: Path) -> str | None:
        try:
            read_rgb(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(thread_limit()) as pool:
        return list(pool.map(fault, paths))


def is_whole(path: str | Path) -> bool:
    """Return whether an image that was written here is there and undamaged: PNG by its checksums, others decoded."""
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
    """Write a (3, H, W) image, uint8 or float in [0, 1], as lossless PNG, or as JPEG where the path ends in .jpg.

    JPEG has quality 95 and no chroma subsampling (4:4:4). The file appears whole or not at all.
    """
    levels = image if image.dtype == torch.uint8 else to_uint8(image)
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
    if Path(path).suffix == ".jpg":
        save_picture(path, picture, format="JPEG", quality=95, subsampling=0)
    else:
        save_picture(path, picture)


def save_picture(path: str | Path, picture: Image.Image, **options: Any) -> None:
    """Write a PIL image whole or not at all, by default as PNG; `options` are those of its method `save`.

    It is encoded in memory: Pillow's JPEG encoder does not notice when a full disk takes only a part of its bytes.
    """
    encoded = io.BytesIO()
    picture.save(encoded, **{"format": "PNG"} | options)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


class ImageFiles(Dataset):
    """Image files as uint8 (3, size, size), with a vector of labels or an index beside each; decoded at each access.

    `image_cache.decoded` gives the same items without the decoding.
    """

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, size: int, resize: str = "stretch"):
        self.paths, self.targets, self.size, self.resize = list(paths), targets, size, resize

    def digest(self) -> str:
        """Hash of the images' names, targets, size and way of resizing, wherever they lie; not of their pixels."""
        about = [self.size, self.resize, [Path(path).name for path in self.paths], self.targets.tolist()]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return load_pixels(self.paths[index], self.size, self.resize), self.targets[index]


def image_grid(images: torch.Tensor, columns: int, padding: int = 2) -> Image.Image:
    """(B, 3, H, W) images in [0, 1] side by side on white, row by row."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = Image.new(
        "RGB", (columns * (width + padding) + padding, rows * (height + padding) + padding), (255, 255, 255)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(to_pil(image), (padding + column * (width + padding), padding + row * (height + padding)))
    return sheet


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


logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
T = TypeVar("T")
_LISTED = 5  # missing images that a warning names


def stem_of(name: str) -> str:
    """Return a name without its suffix, if that is one of SUFFIXES in any case."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def find_images(
    folder: str | Path, names: Sequence[str], key: Callable[[str], str] = str.casefold
) -> list[Path | None]:
    """Return the image file of each name, a path from `folder`; None where there is none.

    A name with a suffix is that file, else the only one that differs from it in the case of letters or the spelling of
    the suffix (.jpeg for .jpg). A name without a suffix is the only file with any of SUFFIXES whose stem has the same
    `key`. Where names differ by case alone, it has to agree. Raises UserError for a name that leads out of the folder
    and for two files of one name.
    """
    folder, names = Path(folder), list(names)
    found = {name: path_inside(folder, name, "image table") for name in names}
    found = {name: path for name, path in found.items() if stem_of(name) != name and path.is_file()}
    taken = set(found.values())

    def group(name: str) -> tuple[str, str, str]:
        path = PurePosixPath(name)
        return str(path.parent).casefold(), key(stem_of(path.name)), _format(name)

    @cache
    def directory(parent: PurePosixPath) -> Path | None:
        return _directory(folder, parent)

    @cache
    def files(place: Path) -> dict[str, list[Path]]:
        by_key: dict[str, list[Path]] = {}
        with os.scandir(place) as entries:
            for entry in entries:  # a pipe or device is kept here, for the reader to refuse by name
                if _format(entry.name) and not entry.is_dir() and os.path.exists(entry.path):
                    by_key.setdefault(key(stem_of(entry.name)), []).append(place / entry.name)
        return by_key

    groups = Counter(map(group, names))
    for name in names:
        path = PurePosixPath(name)
        if name in found or (place := directory(path.parent)) is None:
            continue
        _, stem_key, wanted = group(name)
        candidates = [file for file in files(place).get(stem_key, ()) if file not in taken]
        candidates = [file for file in candidates if wanted in ("", _format(file.name))]
        if groups[group(name)] > 1:
            candidates = [file for file in candidates if file.stem == stem_of(path.name)]
        if len(candidates) > 1:
            one, other = sorted(candidates)[:2]
            raise UserError(f"{str(one)!r} and {str(other)!r} are both the image {name!r}; keep one of them")
        if not candidates and (place / path.name).is_file():  # with no suffix, or with one not in SUFFIXES
            candidates = [place / path.name]
        if candidates:
            found[name] = candidates[0]
            taken.add(candidates[0])
    return [found.get(name) for name in names]


def _format(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix) if suffix in SUFFIXES else ""


def _directory(folder: Path, parent: PurePosixPath) -> Path | None:
    for part in parent.parts:
        if not (folder / part).is_dir():
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            twins = [name for name in names if name.casefold() == part.casefold()]
            if len(twins) != 1:
                return None
            (part,) = twins
        folder = folder / part
    return folder


def rows_with_image(
    rows: Sequence[T],
    names: Sequence[str],
    table: str | Path,
    folder: str | Path,
    limit: int = 0,
    key: Callable[[str], str] = str.casefold,
) -> tuple[list[T], list[Path], int]:
    """Return the rows of a table whose image is found, its file, and the number of rows without one (a warning).

    `names` are those of the rows' images, for `find_images`, whose errors it raises. `limit` > 0 keeps the first that
    many rows with an image. Raises UserError where the folder or every image is missing.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give that of the images in {str(table)!r}")
    if not rows:
        raise UserError(f"{str(table)!r} has a header and no rows; give one image a line")
    kept, paths, missing = [], [], []
    for row, name, path in zip(rows, names, find_images(folder, names, key), strict=True):
        if limit and len(kept) == limit:
            break
        if path is None:
            missing.append(name)
        else:
            kept.append(row)
            paths.append(path)
    if not kept:
        raise UserError(
            f"none of the {len(missing)} images of {str(table)!r} is in {str(folder)!r}, where the first would be "
            f"{str(Path(folder) / names[0])!r}; give the folder that the names start from"
        )
    if missing:
        named = f"{', '.join(missing[:_LISTED])}{', ...' if missing[_LISTED:] else ''}"
        total = len(kept) + len(missing)
        said = "%d of %d images of %s are not in %s, their rows are skipped: %s"
        logger.warning(said, len(missing), total, table, folder, named)
    return kept, paths, len(missing)

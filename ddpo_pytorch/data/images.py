"""Images: the only reader, writers, a cache of decoded images, fields of view, and lookup of files named in tables."""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage
from torch.utils.data import Dataset
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from ddpo_pytorch.data.dicom import read_dicom
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, open_regular, path_inside, remove_leftovers, write_file

logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
LARGEST_SIDE = 4096  # pixels of a judge's input
# allowed contents besides DICOM, whatever the suffix: Pillow would pass others to programs (PostScript to Ghostscript)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# incremented whenever `read_rgb` returns other pixels for a file, which invalidates caches
READER_VERSION = 3
# how to make images square: scale the sides independently, as in the paper; crop to the middle; pad with black; or crop
# a fundus photograph to its field of view and pad
RESIZES = ("stretch", "crop", "pad", "fov")
# modes with an unambiguous conversion to RGB; CMYK, LAB and HSV depend on a profile
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_SPARE_BYTES = 2**30  # that a cache leaves free on the disk
_WINDOW = 256  # images decoded at a time for a cache
# comment in every generated file; trainedAlgorithmicMedia is IPTC's term for such images
SYNTHETIC = "synthetic image by rl4med-ddpo, no photograph of a patient; DigitalSourceType: trainedAlgorithmicMedia"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert float images in [0, 1] to uint8, rounded and clamped, so that 1.0 is 255 and 8-bit levels round-trip."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert a (3, H, W) image, uint8 or float in [0, 1], to a PIL image."""
    levels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def load_image(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """Read an image as (3, H, W) float in [0, 1], resized as by `load_pixels`. Raises UserError as `read_rgb` does."""
    return load_pixels(path, size, resize).float() / 255


def load_pixels(path: str | Path, size: int | None = None, resize: str = "stretch") -> torch.Tensor:
    """Read an image as uint8 (3, H, W), resized (bicubic) to a square of `size` pixels by one of RESIZES.

    Raises UserError as `read_rgb` does, and for another `resize`.
    """
    image = read_rgb(path)
    if resize not in RESIZES:
        raise UserError(f"resize is {resize!r}; allowed are {', '.join(RESIZES)}")
    if resize == "fov":
        image = fov_square(image)
    if size is not None and image.size != (size, size):
        squares = {"stretch": Image.Image.resize, "crop": ImageOps.fit}
        image = squares.get(resize, ImageOps.pad)(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class _AmbiguousImage(ValueError):
    """An image of which the colours in 8-bit RGB are not determined; the text follows its path."""


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image of FORMATS, whatever its suffix; errors while opening and in the block become UserError.

    DICOM files are decoded immediately.
    """
    try:
        with open_regular(path) as file:
            dicom = file.read(132)[128:] == b"DICM"
            file.seek(0)
            with read_dicom(file, path) if dicom else Image.open(file, formats=FORMATS) as image:
                if not dicom:
                    _check_meaning(image)
                yield image
    except UserError:
        raise
    except _AmbiguousImage as error:
        raise UserError(f"{str(path)!r} {error}; convert it to 8-bit RGB yourself") from error
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UserError(f"{str(path)!r} cannot be read as an image; remove it or fetch it again ({reason})") from error


def read_rgb(path: str | Path) -> Image.Image:
    """Decode a complete image file as 8-bit RGB, oriented as its EXIF tag says.

    16-bit grey levels are divided by 257 and rounded, 16-bit RGB keeps the upper byte. Raises UserError as `open_image`
    does, for transparent pixels, and for 16-bit images that use only the lowest twelve bits and would be nearly black.
    """
    with open_image(path) as image:
        _, white = _layout(image)  # before decoding, which discards it
        ImageOps.exif_transpose(image, in_place=True)
        if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            straight = image.convert("LA") if image.mode == "La" else image
            if straight.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise _AmbiguousImage("has transparent pixels, whose colour is not defined")
        if white and image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.int64)
            if 0 < levels.max() <= white // 16:
                raise _AmbiguousImage(f"has no grey level above {levels.max()}, where white is {white}")
            return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
        picture = image.convert("RGB")
        if white and max(high for _, high in picture.getextrema()) < 16:
            raise _AmbiguousImage(f"has no level above {white // 16}, where white is {white}")
        return picture


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that `read_rgb` gives an image from `open_image`, without decoding it."""
    tag = ExifTags.Base.Orientation  # which Pillow itself applies to TIFF
    turned = "exif" in image.info and image.format != "TIFF" and image.getexif().get(tag, 1) in range(5, 9)
    return image.size[::-1] if turned else image.size


def _layout(image: Image.Image) -> tuple[str, int]:
    """Return Pillow's name of the file's layout, e.g. "RGB;16B", or "", and the highest level beyond 8 bits, or 0."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""  # a DICOM file's image has none
    name = arguments if isinstance(arguments, str) else str(arguments[0])
    deep = re.search(r";(12|16)", name)
    return name, 2 ** int(deep[1]) - 1 if deep else 0


def _check_meaning(image: Image.Image) -> None:
    """Raise _AmbiguousImage if an image's header does not determine its meaning in 8 bits."""
    layout, white = _layout(image)
    if image.format in ("PNG", "TIFF", "WEBP") and (frames := getattr(image, "n_frames", 1)) > 1:
        raise _AmbiguousImage(f"holds {frames} images")
    tags = getattr(image, "tag_v2", {})
    samples = tags.get(339, (1,))  # SampleFormat: 1 is unsigned, 2 signed, 3 floating point
    if image.mode == "F" or set(samples if isinstance(samples, tuple) else (samples,)) != {1}:
        raise _AmbiguousImage("has signed or floating-point levels with unknown black and white")
    if image.mode.startswith("I") and not re.fullmatch(r"I;(12|16)[BLNR]?", layout):
        raise _AmbiguousImage("has 32-bit or signed levels with unknown black and white")
    if white and tags.get(262) == 0:  # PhotometricInterpretation: Pillow inverts 8-bit images only
        raise _AmbiguousImage("has 16-bit levels in which white is 0")
    if "transparency" in image.info and image.mode != "P" and layout not in ("L", "RGB"):
        raise _AmbiguousImage("declares one of its levels transparent")
    if image.mode not in _MODES and not image.mode.startswith("I"):
        raise _AmbiguousImage(f"has mode {image.mode}")


def find_damage(paths: Sequence[Path]) -> list[str | None]:
    """Decode images on all cores; return the error of `read_rgb` for each, or None."""

    def fault(path: Path) -> str | None:
        try:
            read_rgb(path)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(thread_limit()) as pool:
        return list(pool.map(fault, paths))


def is_intact(path: str | Path) -> bool:
    """Return whether an image exists and is intact, by checksums for PNG and by decoding for others."""
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


def save_image(path: str | Path, image: torch.Tensor, comment: str = "") -> None:
    """Write a (3, H, W) image, uint8 or float in [0, 1], as JPEG if the path ends in .jpg, else as PNG."""
    save_picture(path, to_pil(image), comment)


def save_picture(path: str | Path, picture: Image.Image, comment: str = "") -> None:
    """Write a PIL image atomically: .jpg as JPEG of quality 95 without chroma subsampling (4:4:4), others as PNG.

    A comment is stored in PNG's text chunk "Comment" or as JPEG's comment.
    """
    encoded, note = io.BytesIO(), PngInfo()  # in memory, since Pillow's JPEG encoder does not report a full disk
    note.add_text("Comment", comment)
    if Path(path).suffix == ".jpg":
        picture.save(encoded, "JPEG", quality=95, subsampling=0, comment=comment or None)
    else:
        picture.save(encoded, "PNG", pnginfo=note if comment else None)
    write_file(path, encoded.getvalue())


def comment_of(path: str | Path) -> str:
    """Return the comment in an image that `save_picture` wrote, or ""."""
    with open_image(path) as image:
        return str(image.info.get("Comment") or image.info.get("comment") or "")


def is_synthetic(path: str | Path) -> bool:
    """Return whether an image's comment marks it as generated."""
    return SYNTHETIC in comment_of(path)


def content_numbers(paths: Sequence[str | Path]) -> list[int]:
    """Return a 64-bit number for each file, from its size and 4 KiB in its middle and at its end.

    The numbers distinguish images of the same name; reading all bytes of a data set would take minutes.
    """

    def number(path: str | Path) -> int:
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.sha256(str(size).encode())
                for start in (size // 2, max(size - 4096, 0)):
                    file.seek(start)
                    digest.update(file.read(4096))
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read ({error.strerror}); remove it or fetch it again") from error
        return int.from_bytes(digest.digest()[:8], signed=True)

    with ThreadPoolExecutor(thread_limit()) as pool:
        return list(pool.map(number, paths))


class ImageFiles(Dataset):
    """Image files as uint8 (3, size, size) with a label vector or index each, decoded on access."""

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, size: int, resize: str = "stretch"):
        self.paths, self.targets, self.size, self.resize = list(paths), targets, size, resize

    def digest(self) -> str:
        """Hash file names without folders, `content_numbers`, targets, size and resizing."""
        names, numbers = [Path(path).name for path in self.paths], content_numbers(self.paths)
        described = [self.size, self.resize, names, numbers, self.targets.tolist()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return load_pixels(self.paths[index], self.size, self.resize), self.targets[index]


class DecodedImages(ImageFiles):
    """The items of an `ImageFiles`, with pixels from a cache file of `decoded`."""

    def __init__(self, files: ImageFiles, path: Path):
        super().__init__(files.paths, files.targets, files.size, files.resize)
        self.path, self._pixels = path, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None}  # a worker maps the file itself; pickling would copy all of it

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pixels is None:
            try:
                self._pixels = np.lib.format.open_memmap(self.path, mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{str(self.path)!r} is damaged ({error}); delete it to recreate it") from error
        # a copy is writable and does not reference the memory map
        return torch.from_numpy(self._pixels[index].copy()), self.targets[index]


def decoded(files: ImageFiles, folder: str | Path) -> Dataset:
    """Return a data set that reads a cache in `folder`, written if absent, or `files` if `folder` is "" or full.

    The cache depends on paths, sizes and modification times of the files, the resizing and the reader's version. With
    several processes per node, call it within `accelerator.local_main_process_first()`.
    """
    if not str(folder):
        return files
    shape = (len(files), 3, files.size, files.size)
    stats = [(str(path.resolve()), path.stat()) for path in map(Path, files.paths)]
    described = [READER_VERSION, files.size, files.resize, [(path, s.st_size, s.st_mtime_ns) for path, s in stats]]
    path = Path(folder) / f"images_{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}.npy"
    if path.is_file():
        if path.stat().st_size < np.prod(shape):
            raise UserError(f"{str(path)!r} is shorter than its {len(files)} images; delete it to recreate it")
        return DecodedImages(files, path)
    gigabytes, started = np.prod(shape) / 1e9, time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, depth=0)
        if np.prod(shape) + _SPARE_BYTES > shutil.disk_usage(path.parent).free:
            raise OSError("no room on the disk")
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            # written sequentially, so that a full disk raises an error; with a memory map it would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            bar = tqdm(total=len(files), desc="decoding", unit="image", disable=None)
            with bar, ThreadPoolExecutor(thread_limit()) as pool:
                for start in range(0, len(files), _WINDOW):  # bounds the memory
                    for image, _ in pool.map(files.__getitem__, range(start, min(start + _WINDOW, len(files)))):
                        file.write(image.numpy().tobytes())
                        bar.update()
    except OSError as error:
        logger.warning("no cache of %.1f GB in %s (%s); images are decoded on every access", gigabytes, folder, error)
        return files
    speed = len(files) / (time.perf_counter() - started)
    logger.info("%d images decoded at %.0f images/s into %s (%.2f GB)", len(files), speed, path, gigabytes)
    return DecodedImages(files, path)


def loader_options(num_workers: int) -> dict[str, Any]:
    """Return DataLoader arguments for persistent workers, and for pinned memory if there is a GPU."""
    return dict(num_workers=num_workers, persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available())


def image_grid(images: torch.Tensor, columns: int, padding: int = 2) -> Image.Image:
    """Arrange (B, 3, H, W) images in [0, 1] in rows on a white background."""
    return to_pil(make_grid(images, columns, padding, pad_value=1.0))


# Of 255 levels; the surround in JPEG files reaches about 10. Applied to the largest channel: the darkest retina is only
# red.
FOV_THRESHOLD = 15
# Minimum size of a separate lit region of the field, as a share of the picture; stamped letters are smaller.
SMALLEST_PART = 1 / 500


def fov_mask(rgb: np.ndarray) -> np.ndarray:
    """Return the lit disc of a uint8 (H, W, 3) fundus photograph, its largest region with holes filled: bool (H, W)."""
    regions, sizes = _lit_regions(rgb)
    return ndimage.binary_fill_holes(regions == sizes.argmax()) & sizes.any()


def fov_square(image: Image.Image) -> Image.Image:
    """Crop an RGB image to the box of its field of view and pad it with black to a centred square, without scaling.

    The box contains every lit region of at least SMALLEST_PART of the picture, since a dark band may divide the field.
    A picture without such a region is only padded.
    """
    regions, sizes = _lit_regions(np.asarray(image))
    large = (sizes >= SMALLEST_PART * regions.size) & (sizes > 0)
    image = image.crop(Image.fromarray(large[regions]).getbbox())  # None, without a region, crops nothing
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _lit_regions(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers (H, W) of the connected lit regions, 0 for dark pixels, and their sizes, 0 for the dark one."""
    regions, _ = ndimage.label(rgb.max(2) > FOV_THRESHOLD)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return regions, sizes


def stem_of(name: str) -> str:
    """Return a name without its suffix if that is one of SUFFIXES, ignoring case."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def find_images(
    folder: str | Path, names: Sequence[str], key: Callable[[str], str] = str.casefold
) -> list[Path | None]:
    """Return the image file of each name (a path relative to `folder`), or None.

    If that file does not exist, take the only image whose stem has the same `key`; it may differ in case, the spelling
    of the suffix (.jpeg for .jpg) or, if the name has none, the suffix. Raises UserError if there are two.
    """
    folder = Path(folder)
    paths = {name: path for name in names if (path := path_inside(folder, name, "image table")).is_file()}
    taken = set(paths.values())

    @cache
    def files(parent: PurePosixPath) -> dict[str, list[Path]]:
        directory, by_key = folder, defaultdict(list)
        for part in parent.parts:
            if not (directory / part).is_dir():
                alike = [one for one in os.listdir(directory) if one.casefold() == part.casefold()]
                part, *others = [one for one in alike if (directory / one).is_dir()] or [""]
                if not part or others:
                    return {}
            directory = directory / part
        for entry in os.scandir(directory):  # pipes and devices too, so that `open_image` refuses them by name
            if _format(entry.name) and os.path.exists(entry) and not entry.is_dir():
                by_key[key(stem_of(entry.name))].append(directory / entry.name)
        return by_key

    for name in [name for name in dict.fromkeys(names) if name not in paths]:
        path, wanted = PurePosixPath(name), _format(name)
        candidates = [file for file in files(path.parent).get(key(stem_of(path.name)), ()) if file not in taken]
        candidates = [file for file in candidates if wanted in ("", _format(file.name))]
        if len(candidates) > 1:
            one, other = sorted(candidates)[:2]
            raise UserError(f"{str(one)!r} and {str(other)!r} are both the image {name!r}; keep one of them")
        if candidates:
            paths[name] = candidates[0]
            taken.add(candidates[0])
    return [paths.get(name) for name in names]


def _format(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix) if suffix in SUFFIXES else ""


def rows_with_image(
    rows: Sequence[Any],
    table: str | Path,
    folder: str | Path,
    limit: int = 0,
    find: Callable[[str | Path, Sequence[str]], list[Path | None]] = find_images,
) -> tuple[list[Any], list[Path], int]:
    """Return the rows with an image (the first `limit` unless 0), their files, and the number of rows without one."""
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give that of the images in {str(table)!r}")
    if not rows:
        raise UserError(f"{str(table)!r} has a header and no rows; list one image per line")
    pairs = list(zip(rows, find(folder, [row.image for row in rows]), strict=True))
    present = [index for index, (_, path) in enumerate(pairs) if path]
    if limit and len(present) >= limit:
        pairs = pairs[: present[limit - 1] + 1]
    missing = [row.image for row, path in pairs if not path]
    if not present:
        expected = f"in {str(folder)!r}, where the first would be {str(Path(folder) / missing[0])!r}"
        advice = "give the folder that the names are relative to"
        raise UserError(f"none of the {len(missing)} images of {str(table)!r} is {expected}; {advice}")
    if missing:
        listed = f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
        message = "%d of %d images of %s are not in %s; skipping their rows: %s"
        logger.warning(message, len(missing), len(pairs), table, folder, listed)
    return [row for row, path in pairs if path], [path for _, path in pairs if path], len(missing)

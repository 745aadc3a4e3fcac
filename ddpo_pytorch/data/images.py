"""Images between tensors and files, and the sample folder that eval.py writes and metric.py reads.

A sample folder holds `images/<caption with _ for spaces>/<name>.png|jpg` and `image_log.json`, a list with one entry an
image (at least prompt and path_to_img, relative to the folder).
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from ddpo_pytorch.data.field_of_view import fov_square
from ddpo_pytorch.data.folder_names import folder_name
from ddpo_pytorch.data.isic import caption_of_folder
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, open_regular, path_inside, write_json
from ddpo_pytorch.utils.json_files import OneOf, read_json

LOG = "image_log.json"
LARGEST_SIDE = 4096  # pixels of the squares that a judge looks at
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
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


def list_samples(folder: str | Path, prompts: Sequence[str] = ()) -> list[tuple[Path, str]]:
    """(file, caption) of every image of a sample folder, sorted; only the given captions when `prompts` is not empty.

    A caption is the ISIC caption that the images' folder is named after, or else the prompt of image_log.json that it
    is named after. Hidden entries are passed over. Raises UserError when the folder is missing, is not a sample folder,
    holds no image of these captions, or anything but images of captions.
    """
    root = Path(folder) / "images"
    if not root.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a sample folder (no images/ inside); "
            "scripts/eval.py and scripts/extract_dataset_latents.py write them"
        )
    wanted = set(prompts)
    samples = []
    directories = sorted(entry for entry in root.iterdir() if entry.name[0] != ".")
    captions = _captions_of(folder, [entry.name for entry in directories if entry.is_dir()])
    for directory in directories:
        if not directory.is_dir():
            raise _not_read(directory)
        caption = captions[directory.name]
        if not wanted or caption in wanted:
            for path in sorted(entry for entry in directory.iterdir() if entry.name[0] != "."):
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    raise _not_read(path)
                samples.append((path, caption))
    if not samples:
        raise UserError(f"{str(folder)!r} holds no images" + (f" of the prompts {sorted(wanted)}" if wanted else ""))
    return samples


def captions_without_images(
    folder: str | Path, samples: Sequence[tuple[Path, str]], prompts: Sequence[str] = ()
) -> list[str]:
    """Return the captions that a sample folder should hold an image of and does not, sorted; `samples` are its images.

    Those are the captions that a folder in images/ is named after, the prompts of image_log.json, and `prompts`, which
    are the only ones if there are any.
    """
    names = [entry.name for entry in (Path(folder) / "images").iterdir() if entry.is_dir() and entry.name[0] != "."]
    logged = (entry.get("prompt") for entry in read_log(folder))
    named = {*_captions_of(folder, names).values(), *(prompt for prompt in logged if isinstance(prompt, str))}
    return sorted((set(prompts) or named) - {caption for _, caption in samples})


def _captions_of(folder: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Return the caption of each folder of images, from the table of ISIC or else from the log.

    The log maps the folders of its images, whatever they are called, to its prompts.
    """
    found, logged = {}, None
    for name in names:
        try:
            found[name] = caption_of_folder(name)
        except UserError as error:
            if logged is None:
                entries = [entry for entry in read_log(folder) if isinstance(entry.get("prompt"), str)]
                logged = {folder_name(entry["prompt"]): entry["prompt"] for entry in entries}
                logged |= {Path(str(entry.get("path_to_img"))).parent.name: entry["prompt"] for entry in entries}
            if name not in logged:
                raise UserError(f"{str(folder)!r}: {error}, nor after a prompt of image_log.json") from error
            found[name] = logged[name]
    return found


def _not_read(path: Path) -> UserError:
    allowed = f"images/<caption with _ for spaces>/ holds only {', '.join(IMAGE_SUFFIXES)} files"
    return UserError(f"{str(path)!r} is not read: {allowed}; convert it, or move it away")


def write_log(folder: str | Path, entries: list[dict]) -> None:
    """Write `image_log.json` atomically."""
    write_json(Path(folder) / LOG, entries)


def read_log(folder: str | Path) -> list[dict]:
    """Entries of `image_log.json`; an empty list when there is none.

    Raises UserError if it cannot be read, is no list of JSON objects, or names an image outside the folder.
    """
    path, shape = Path(folder) / LOG, [{"path_to_img?": str, "prompt?": OneOf((str, None))}]
    entries = read_json(path, shape, "make the samples again elsewhere") if path.is_file() else []
    for number, entry in enumerate(entries, 1):
        if isinstance(name := entry.get("path_to_img"), str):
            path_inside(folder, name, f"{str(path)!r} entry {number}")
    return entries

"""Images between tensors and files, and the sample folder that eval.py writes and metric.py reads.

A sample folder holds `images/<caption with _ for spaces>/<name>.png|jpg` and `image_log.json`, a list with one entry an
image (at least prompt and path_to_img, relative to the folder).
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ddpo_pytorch.data.isic import caption_of_folder
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.files import whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1] as uint8: rounded and clamped, so that 1.0 is 255 and every 8-bit level survives."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """One (3, H, W) image in [0, 1] as a PIL image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def load_image(path: str | Path, size: int | None = None) -> torch.Tensor:
    """Read an image as (3, H, W) float in [0, 1], resized to size x size (PIL's default filter, aspect not kept).

    Raises UserError as `read_rgb` does.
    """
    image = read_rgb(path)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_rgb(path: str | Path) -> Image.Image:
    """A file decoded to its last pixel, as RGB. Raises UserError for a missing, truncated, huge or non-image file."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error  # whose text repeats the path
        raise UserError(f"{str(path)!r} cannot be read as an image ({reason}); remove it or fetch it again") from error


def save_image(path: str | Path, image: torch.Tensor) -> None:
    """Write a (3, H, W) image in [0, 1] as lossless PNG; the file appears whole or not at all."""
    with whole(path) as temporary:
        to_pil(image).save(temporary, format="PNG")


class ImageFiles(Dataset):
    """Image files as uint8 (3, size, size), with a vector of labels or an index beside each.

    Decoded images are kept in memory as long as all of them fit in `cache_bytes`.
    """

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, size: int, cache_bytes: int = 4 * 2**30):
        self.paths, self.targets, self.size = list(paths), targets, size
        self._cache: dict[int, torch.Tensor] | None = {} if len(self.paths) * 3 * size * size <= cache_bytes else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cache is None:
            return to_uint8(load_image(self.paths[index], self.size)), self.targets[index]
        if index not in self._cache:
            self._cache[index] = to_uint8(load_image(self.paths[index], self.size))
        return self._cache[index], self.targets[index]


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

    Raises UserError when the folder is missing, is not a sample folder, or holds no image of these captions.
    """
    root = Path(folder) / "images"
    if not root.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a sample folder (no images/ inside); "
            "scripts/eval.py and scripts/extract_dataset_latents.py write them"
        )
    wanted = set(prompts)
    samples = []
    for directory in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        caption = caption_of_folder(directory.name)
        if not wanted or caption in wanted:
            files = sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
            samples += [(path, caption) for path in files]
    if not samples:
        raise UserError(f"{str(folder)!r} holds no images" + (f" of the prompts {sorted(wanted)}" if wanted else ""))
    return samples


def write_log(folder: str | Path, entries: list[dict]) -> None:
    """Write `image_log.json` atomically."""
    path = Path(folder) / "image_log.json"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(temporary, path)


def read_log(folder: str | Path) -> list[dict]:
    """Entries of `image_log.json`; an empty list when there is none. Raises UserError if it cannot be read."""
    path = Path(folder) / "image_log.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{str(path)!r} is torn or no JSON ({error}); make the samples again elsewhere") from error

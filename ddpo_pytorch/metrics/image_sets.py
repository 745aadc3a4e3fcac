"""Sets of image files to measure, checked before anything is computed and identified by their content.

A *model* is a column of the tables: one sample folder, or several that differ only in their generation seed.
"""

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ddpo_pytorch.data.images import SUFFIXES, open_image, upright_size
from ddpo_pytorch.data.isic import CAPTIONS, short_caption
from ddpo_pytorch.data.metadata import METADATA, of_caption, read_metadata
from ddpo_pytorch.data.sample_folder import captions_without_images, read_log, read_settings
from ddpo_pytorch.data.tables import number
from ddpo_pytorch.utils.cli import expand
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256

logger = logging.getLogger(__name__)

MAX_LISTED = 8  # captions in a message
Samples = list[tuple[Path, str]]  # (file, caption)


@dataclass
class ImageSet:
    """Images of a folder: files, captions ("" if unknown) and SHA-256 of each file.

    Once networks have run, `rows` holds their results by network, and `pairs` those on pairs of images by measure:
    indices (P, 2) into this set and its partner, and values (P,). Measures are "LPIPS" (to real images), "LPIPS_within"
    (within a prompt), "SSIM" (to images of the same name), "MS_SSIM" and "MS_SSIM_within".
    """

    folder: Path
    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]
    entries: Mapping[str, Mapping] = field(default_factory=dict)  # of image_log.json, by path relative to the folder
    made_with: Mapping = field(default_factory=dict)  # the folder's settings
    # each image's row of metadata.csv, else the columns that its caption determines in other sets' tables, else {}
    table: tuple[Mapping[str, str], ...] = ()
    all_captions: tuple[str, ...] = CAPTIONS  # of all sets of the report
    lacking: tuple[str, ...] = ()  # captions of this folder without an image
    names: dict[str, np.ndarray] = field(default_factory=dict)  # each image's group (N,) by column of `table`
    rows: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def keys(self) -> list[str]:
        """Names of the images, "<caption>/<stem>" or, if repeated, "<caption>/<path>"; equal noise, equal name."""
        names = [f"{caption}/{path.stem}" for path, caption in self.samples]
        counts = Counter(names)
        return [
            f"{caption}/{path.relative_to(self.folder).with_suffix('')}" if counts[name] > 1 else name
            for name, (path, caption) in zip(names, self.samples, strict=True)
        ]

    @property
    def samples(self) -> Samples:
        """(file, caption) of every image."""
        return list(zip(self.paths, self.captions, strict=True))

    @property
    def groups(self) -> np.ndarray:
        """Index (N,) of each image's caption in `all_captions`."""
        numbers = {caption: number for number, caption in enumerate(self.all_captions)}
        return np.array([numbers[caption] for caption in self.captions], dtype=np.int64)

    def entry(self, index: int) -> Mapping:
        """Return an image's entry in image_log.json, or {}."""
        return self.entries.get(str(self.paths[index].relative_to(self.folder)), {})

    def describe(self) -> dict:
        """Return path, number of images, content hash and images by prompt, for metrics.json."""
        content = "\n".join(sorted(map("{} {}".format, self.keys, self.digests)))
        counts, digest = Counter(self.captions), hashlib.sha256(content.encode()).hexdigest()
        by_prompt = {caption: counts[caption] for caption in self.all_captions}
        return {"path": str(self.folder), "images": len(self), "sha256": digest, "images_by_prompt": by_prompt}


def sort_captions(captions: Iterable[str]) -> list[str]:
    """Return each caption once: ISIC's in the official order, then others by name."""
    held = set(captions)
    return [caption for caption in CAPTIONS if caption in held] + sorted(held - set(CAPTIONS))


def list_captions(captions: Sequence[str]) -> str:
    """Format captions for a message: ISIC captions in short form, or the first few of any others."""
    if set(captions) <= set(CAPTIONS):
        return ", ".join(map(short_caption, captions))
    more = f" and {len(captions) - MAX_LISTED} more" if len(captions) > MAX_LISTED else ""
    return ", ".join(map(repr, captions[:MAX_LISTED])) + more


def lacking_images(folder: str | Path, captions: Iterable[str]) -> str:
    """Return the warning that a folder has no image of these captions."""
    ordered = sort_captions(captions)
    return f"{folder} has no image of {len(ordered)} of its captions: {list_captions(ordered)}"


def named_paths(text: str, field_name: str) -> list[tuple[str, str]]:
    """Return (name, path) pairs of "SD=a,SD=b,SD+RL=c". Raises UserError for a part without name or path, or none."""
    pairs = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, path = (piece.strip() for piece in part.partition("="))
        if not name or not path:
            raise UserError(f"{part!r} in {field_name}={text!r} is not NAME=PATH; separate several by commas")
        pairs.append((name, expand(path)))
    if text and not pairs:
        raise UserError(f"{field_name}={text!r} names nothing; give NAME=PATH, or an empty text")
    return pairs


def any_files(folder: str | Path) -> tuple[Path, Samples]:
    """Return a folder and every image at or below it, without captions. Raises UserError if there is none."""
    folder, files, seen = Path(folder), [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(parent, name) for name in names if name[0] != ".")
        files += [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{str(folder)!r} is not a folder with images; give one with {', '.join(SUFFIXES)} files")
    return folder, [(path, "") for path in sorted(files)]


def inspect_files(
    folders: Sequence[tuple[Path, Samples]], rank: int, processes: int, prompts: Sequence[str] = ()
) -> list[ImageSet]:
    """Check and hash every file of `folders` (path, samples), divided among processes; all of them get the sets.

    Raises UserError with the first image that is not RGB or differs in size from most, and the number of such images.
    """
    files = [path for _, samples in folders for path, _ in samples]
    inspected = [(number, *_inspect(files[number])) for number in range(rank, len(files), processes)]
    _, digests, faults, sizes = zip(*sorted(gather_object(inspected)), strict=True)
    usual = Counter(sizes).most_common(1)[0][0]
    advice = "metrics compare images of one size: use --config.dataset.image_size for the real ones"
    faults = [fault for fault in faults if fault] or [
        f"{str(path)!r} is {width} x {height} px, most images are {usual[0]} x {usual[1]}; {advice}"
        for path, (width, height) in zip(files, sizes, strict=True)
        if (width, height) != usual
    ]
    if faults:
        more = f" ({len(faults) - 1} more files are affected)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    held = {caption for _, samples in folders for _, caption in samples if caption}
    all_captions = CAPTIONS if held <= set(CAPTIONS) else tuple(sorted(held))
    files = [folder / METADATA if any(caption for _, caption in samples) else None for folder, samples in folders]
    tables = [read_metadata(file) if file and file.is_file() else [] for file in files]
    of_text, rest, sets = of_caption([row for rows in tables for row in rows]), iter(digests), []
    for (folder, samples), rows in zip(folders, tables, strict=True):
        paths, captions = zip(*samples, strict=True)
        entries = _log_entries(folder, samples) if any(captions) else {}
        lacking = tuple(captions_without_images(folder, samples, prompts)) if any(captions) else ()
        own_digests = tuple(next(rest) for _ in samples)
        made_with, own_rows = read_settings(folder), {folder / row.image: row.fields for row in rows}
        table = tuple(own_rows.get(path) or of_text.get(caption, {}) for path, caption in samples)
        sets.append(ImageSet(folder, paths, captions, own_digests, entries, made_with, table, all_captions, lacking))
    return sets


def _inspect(path: Path) -> tuple[str, str, tuple[int, int]]:
    """Return a file's SHA-256, its fault or "", and (width, height)."""
    try:
        with open_image(path) as image:
            mode, size = image.mode, upright_size(image)
            if "transparency" in image.info:
                mode += " with transparency"
        digest = sha256(path)
    except UserError as error:
        return "", str(error), (0, 0)
    fault = f"{str(path)!r} has mode {mode}, not RGB; convert it to RGB without transparency" if mode != "RGB" else ""
    return digest, fault, size


def _log_entries(folder: Path, samples: Samples) -> dict[str, dict]:
    """Return the entries of image_log.json by path. Raises UserError if they contradict the files."""
    where, entries = repr(str(folder / "image_log.json")), {entry["path_to_img"]: entry for entry in read_log(folder)}
    captions, stems = {str(path.relative_to(folder)): caption for path, caption in samples}, {}
    for path, _ in samples:
        if (other := stems.setdefault(path.with_suffix(""), path)) is not path:
            raise UserError(f"{str(other)!r} and {str(path)!r} share a name; keep one of them")
    for path, entry in entries.items():
        if path in captions and entry.get("prompt") not in (None, captions[path]):
            raise UserError(f"{where}, {path}: the prompt {entry['prompt']!r} is not its folder's; correct one of them")
        reward = 0.0 if entry.get("reward") is None else number(str(entry["reward"]))
        if reward is None or not math.isfinite(reward):
            raise UserError(f"{where}, {path}: the reward {entry['reward']!r} is not a finite number; remove it")
    if absent := [path for path in entries if not (folder / path).is_file()]:
        logger.warning("%s: image_log.json lists %d missing images, first %s", folder, len(absent), absent[0])
    return entries


def shape_of(images: ImageSet) -> tuple[int, int]:
    """Return (height, width) in pixels, which `inspect_files` ensures to be the same for all images."""
    with open_image(images.paths[0]) as image:
        return upright_size(image)[::-1]


def match_prompts(groups: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return indices into each array of prompts (N,) that select the same number of images per prompt from each.

    The draw depends only on (seed, prompt) and the order of images, so sets sampled from the same noise stay paired.
    """
    chosen: list[list[np.ndarray]] = [[np.empty(0, int)] for _ in groups]
    for prompt in np.unique(np.concatenate(groups)).tolist():
        members = [np.flatnonzero(column == prompt) for column in groups]
        count = min(map(len, members))
        for part, indices in zip(chosen, members, strict=True):
            order = np.random.default_rng([seed, prompt, 0]).permutation(len(indices))[:count]
            part.append(np.sort(indices[order]))
    return [np.concatenate(part) for part in chosen]

"""Sample folders, which eval.py, generate.py and extract_dataset_latents.py write and metric.py reads.

A sample folder holds `images/<folder_name of the caption>/<name>.png|jpg`, `settings.json` (settings of its images, so
that no folder mixes two origins) and `image_log.json`, a list with one entry an image (at least prompt and path_to_img,
relative to the folder). Several processes may write it, be killed, and complete it with the same command: each appends
one JSON line an image to `image_log.part<rank>.jsonl`; at the end the parts are merged into `image_log.json`.
"""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_pytorch.data.images import is_intact
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import append, path_fault, path_inside, write_json
from ddpo_pytorch.utils.json_files import OneOf, parse_json, read_json

SETTINGS = "settings.json"
LOG = "image_log.json"
PARTS = "image_log.part*.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LONGEST_NAME = 255  # bytes of a file name on common file systems


def folder_name(caption: str) -> str:
    """Return the name of a caption's folder, a function of the caption that is injective and reversible.

    Spaces become underscores, as in the official code. "_", "/", "\\", unprintable characters, a leading dot, and a "%"
    that looks like an escape are written as % and the hex digits of their UTF-8 bytes, so that
    `urllib.parse.unquote(name.replace("_", " "))` returns the caption. A name beyond 255 bytes, and that of the empty
    caption, is cut and ends in %FF, which no escape contains, and a hash of the caption; image_log.json maps it.
    """
    pieces = []
    for position, character in enumerate(caption):
        unsafe = character in "_/\\" or not character.isprintable() or (character == "." and position == 0)
        if unsafe or re.match("%[0-9A-Fa-f]{2}", caption[position : position + 3]):
            pieces.append("".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass")))
        else:
            pieces.append("_" if character == " " else character)
    name = "".join(pieces)
    if name and len(name.encode()) <= LONGEST_NAME:
        return name
    ending = "%FF" + hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()[:16]
    sizes = accumulate(len(piece.encode()) for piece in pieces)
    room = LONGEST_NAME - len(ending)
    return "".join(piece for piece, size in zip(pieces, sizes, strict=True) if size <= room) + ending


_ISIC_FOLDERS = {folder_name(caption): caption for caption in CAPTIONS}


def caption_of_folder(name: str) -> str:
    """Return the ISIC caption with this `folder_name`. Raises UserError for any other name."""
    if name not in _ISIC_FOLDERS:
        raise UserError(f"folder {name!r} is not named after one of the 32 ISIC captions (spaces as underscores)")
    return _ISIC_FOLDERS[name]


def claim_folder(folder: str | Path, settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Reserve a folder for images of these `settings` (JSON-able), or accept one reserved for them.

    `metadata` is recorded but not compared. Raises UserError, without writing, for a folder of other settings, of which
    it names the first difference, or of images with unknown settings.
    """
    folder = Path(folder)
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.is_file():
        if changed := difference(read_settings(folder), settings):
            name, before, now = changed
            raise UserError(
                f"{str(folder)!r} holds images made with {name} {before}, now it is {now}; choose another logdir or "
                "move the folder away"
            )
        return
    if (folder / "images").is_dir():
        raise UserError(f"{str(folder)!r} holds images but no {SETTINGS}; choose another logdir or move it away")
    write_json(path, {"settings": settings, "about": metadata})


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the recorded settings of a folder's images, or {}. Raises UserError if they are unreadable."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return {}
    return read_json(path, {"settings": dict}, "choose another folder or move this one away")["settings"]


def write_log(folder: str | Path, entries: list[dict]) -> None:
    """Write `image_log.json` atomically."""
    write_json(Path(folder) / LOG, entries)


def read_log(folder: str | Path) -> list[dict]:
    """Return the entries of `image_log.json`, or [].

    Raises UserError if it cannot be read, is no list of JSON objects, or names an image outside the folder.
    """
    path, shape = Path(folder) / LOG, [{"path_to_img?": str, "prompt?": OneOf((str, None))}]
    entries = read_json(path, shape, "make the samples again elsewhere") if path.is_file() else []
    for number, entry in enumerate(entries, 1):
        if "path_to_img" in entry:
            path_inside(folder, entry["path_to_img"], f"{str(path)!r} entry {number}")
    return entries


class PartLog:
    """Context manager around one process's part of the log; its threads may share it."""

    def __init__(self, folder: str | Path, rank: int):
        self._path = Path(folder) / PARTS.replace("*", str(rank))
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "PartLog":
        torn = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        self._file = open(self._path, "ab", buffering=0)
        if torn:  # a kill cut the last line, to which the next must not be joined
            append(self._file, b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries, with at least path_to_img relative to the folder; they survive a kill right after."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        with self._lock:
            append(self._file, lines)


def read_entries(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return the entries of the merged log and of every part by path_to_img, without those of absent or empty images.

    Raises UserError for a merged log of another shape.
    """
    folder = Path(folder)
    merged = read_log(folder)
    if any("path_to_img" not in entry for entry in merged):
        raise UserError(f"{str(folder / LOG)!r} has entries without path_to_img; choose another logdir")
    entries = {entry["path_to_img"]: entry for entry in [*merged, *_parts(folder)]}
    files = {path: folder / path for path in entries}
    return {path: entries[path] for path, file in files.items() if file.is_file() and file.stat().st_size}


def _parts(folder: Path) -> Iterator[dict[str, Any]]:
    for part in filter(Path.is_file, sorted(folder.glob(PARTS))):
        for line in part.read_bytes().split(b"\n"):
            try:
                entry = parse_json(line, {"path_to_img": str}, "")
            except UserError:
                continue  # a line that a kill has cut; its image counts as absent and is made again
            if not path_fault(entry["path_to_img"]):
                yield entry


def merge_parts(folder: str | Path, order: Sequence[str] = ()) -> int:
    """Write all entries to `image_log.json`, remove the parts and return the number of entries.

    For one process, when no other writes. Entries are sorted as their paths in `order`, then by folder, then by path,
    and numbered: sampleID 0, 1, ...
    """
    entries, rank = read_entries(folder), {path: number for number, path in enumerate(order)}
    last = {os.path.dirname(path): number for path, number in rank.items()}

    def sort_key(path: str) -> tuple[int, bool, str]:
        return rank.get(path, last.get(os.path.dirname(path), len(rank))), path not in rank, path

    paths = sorted(entries, key=sort_key)
    numbers = [{"sampleID": number} for number in range(len(paths))]
    write_log(folder, [number | entries[path] | number for path, number in zip(paths, numbers, strict=True)])
    for part in Path(folder).glob(PARTS):
        part.unlink()
    return len(paths)


def damaged_images(folder: str | Path, paths: Sequence[str]) -> list[str]:
    """Return the image files, relative to the folder, that are damaged."""
    with ThreadPoolExecutor(thread_limit()) as pool:
        sound = pool.map(is_intact, map(Path(folder).joinpath, paths))
        return [path for path, fine in zip(paths, sound, strict=True) if not fine]


class Contents(NamedTuple):
    """Contents of a sample folder, by path relative to it.

    Attributes:
        images: number of images in its log.
        black: logged images that are black.
        unplanned: logged images that were not planned.
        unlogged: image files that are not in the log.
        missing: planned images that are not in the log.
    """

    images: int
    black: list[str]
    unplanned: list[str]
    unlogged: list[str]
    missing: list[str]


def finish_log(folder: str | Path, planned: Sequence[str]) -> Contents:
    """Merge the parts of the log, in the order of the planned paths, and return the folder's contents."""
    images = merge_parts(folder, planned)
    entries = {entry["path_to_img"]: entry for entry in read_log(folder)}
    files = (path for path in Path(folder).glob("images/*/[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return Contents(
        images=images,
        black=[path for path, entry in entries.items() if entry.get("black")],
        unplanned=sorted(entries.keys() - planned),
        unlogged=sorted({str(path.relative_to(folder)) for path in files} - entries.keys()),
        missing=[path for path in planned if path not in entries],
    )


def list_samples(folder: str | Path, prompts: Collection[str] = ()) -> list[tuple[Path, str]]:
    """Return the sorted (file, caption) of every image of a sample folder, or of those with one of the `prompts`.

    The caption is the ISIC caption, or else the prompt of image_log.json, of the images' folder. Hidden entries are
    skipped. Raises UserError if the folder is missing, is no sample folder, holds no image of these captions, or
    anything but images of captions.
    """
    root = Path(folder) / "images"
    if not root.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a sample folder (no images/ inside); "
            "scripts/eval.py and scripts/extract_dataset_latents.py write them"
        )
    samples = []
    directories = sorted(root.glob("[!.]*"))
    captions = _captions_of(folder, [path.name for path in directories if path.is_dir()])
    for directory in directories:
        if not directory.is_dir():
            raise _unexpected(directory)
        caption = captions[directory.name]
        if prompts and caption not in prompts:
            continue
        for path in sorted(directory.glob("[!.]*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise _unexpected(path)
            samples.append((path, caption))
    if not samples:
        raise UserError(f"{str(folder)!r} holds no images" + (f" of the prompts {sorted(prompts)}" if prompts else ""))
    return samples


def _unexpected(path: Path) -> UserError:
    allowed = f"images/<caption with _ for spaces>/ holds only {', '.join(IMAGE_SUFFIXES)} files"
    return UserError(f"{str(path)!r} is not read: {allowed}; convert it, or move it away")


def captions_without_images(
    folder: str | Path, samples: Sequence[tuple[Path, str]], prompts: Sequence[str] = ()
) -> list[str]:
    """Return the sorted captions of a sample folder, or the `prompts`, without an image among its `samples`.

    The captions of a folder are those of its folders of images and the prompts of image_log.json.
    """
    captions = set(prompts)
    if not captions:
        names = [path.name for path in (Path(folder) / "images").glob("[!.]*") if path.is_dir()]
        captions = {*_captions_of(folder, names).values()}
        captions |= {entry["prompt"] for entry in read_log(folder) if entry.get("prompt") is not None}
    return sorted(captions - {caption for _, caption in samples})


def _captions_of(folder: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Return the caption of each folder of images: an ISIC caption, or else a prompt of the log."""
    captions = _ISIC_FOLDERS
    if not captions.keys() >= set(names):
        entries = [entry for entry in read_log(folder) if entry.get("prompt") is not None]
        captions = {folder_name(entry["prompt"]): entry["prompt"] for entry in entries}
        captions |= {Path(entry.get("path_to_img", "")).parent.name: entry["prompt"] for entry in entries}
        captions |= _ISIC_FOLDERS
    for name in names:
        if name not in captions:
            raise UserError(
                f"{str(folder)!r}: folder {name!r} is not named after one of the 32 ISIC captions (spaces as "
                "underscores), nor after a prompt of image_log.json"
            )
    return {name: captions[name] for name in names}

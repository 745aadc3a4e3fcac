"""The bookkeeping that lets a sample folder be written by several processes, killed, and completed by the same command.

While images are made, each process appends one JSON line an image to `image_log.part<rank>.jsonl`; at the end they are
merged into `image_log.json`. `settings.json` states what made the images, so that no folder mixes two origins.
"""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_pytorch.data.images import is_whole
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import append, path_fault, path_inside, write_json
from ddpo_pytorch.utils.json_files import OneOf, parse_json, read_json

SETTINGS = "settings.json"
LOG = "image_log.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
PARTS = "image_log.part*.jsonl"


def claim_folder(folder: str | Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Reserve a folder for images made with `settings` (JSON-able), or accept one that has been reserved for them.

    `about` is recorded beside them and not compared. Raises UserError, with nothing written, when the folder was made
    with other settings (the first difference is named) or holds images whose settings are unknown.
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
    write_json(path, {"settings": settings, "about": about})


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that a folder's images were made with; {} where none are recorded. UserError if unreadable."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return {}
    return read_json(path, {"settings": dict}, "choose another folder or move this one away")["settings"]


class PartLog:
    """Context manager around one process's part of the log; `add` writes entries that survive a kill right after.

    Threads may share it.
    """

    def __init__(self, folder: str | Path, rank: int):
        self._path = Path(folder) / PARTS.replace("*", str(rank))
        self._file: io.FileIO | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> "PartLog":
        torn = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        self._file = open(self._path, "ab", buffering=0)
        if torn:  # a kill in mid-line: what follows must not be glued to it
            append(self._file, b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries; each has at least path_to_img, relative to the folder."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        with self._turn:
            append(self._file, lines)


def logged(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Entries so far by path_to_img, from the merged log and every part.

    Those whose image is absent or empty, as after a power cut, are left out. Raises UserError for a merged log of
    another shape.
    """
    folder = Path(folder)
    merged = read_log(folder)
    if not all(_names_image(entry) for entry in merged):
        raise UserError(f"'{folder / 'image_log.json'}' has entries without path_to_img; choose another logdir")
    entries = {entry["path_to_img"]: entry for entry in [*merged, *_parts(folder)]}
    return {path: entry for path, entry in entries.items() if _holds_bytes(folder / path)}


def strays(folder: str | Path, listed: Collection[str]) -> list[str]:
    """Image files of the folder, relative to it and sorted, that `listed` does not name."""
    files = (path for path in Path(folder).glob("images/*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = (str(path.relative_to(folder)) for path in files if not path.name.startswith("."))
    return sorted(path for path in paths if path not in listed)


def _names_image(entry: Any) -> bool:
    name = entry.get("path_to_img") if isinstance(entry, dict) else None
    return isinstance(name, str) and not path_fault(name)


def _holds_bytes(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except ValueError:  # a NUL in a damaged log
        return False


def _parts(folder: Path) -> Iterator[dict[str, Any]]:
    for part in filter(Path.is_file, sorted(folder.glob(PARTS))):
        for line in part.read_bytes().split(b"\n"):
            try:
                entry = parse_json(line, dict, "")
            except UserError:
                continue  # torn by a kill; its image counts as absent and is made again
            if _names_image(entry):
                yield entry


def merge_parts(folder: str | Path, order: Sequence[str] = ()) -> int:
    """Write all entries to `image_log.json` and remove the parts; returns the number.

    For one process, when none writes any more. Entries are sorted as their paths are in `order`, others behind those of
    their folder, or behind all, by path; and numbered: sampleID 0, 1, ...
    """
    entries, rank = logged(folder), {path: number for number, path in enumerate(order)}
    last = {os.path.dirname(path): number for path, number in rank.items()}

    def place(path: str) -> tuple[int, bool, str]:
        return rank.get(path, last.get(os.path.dirname(path), len(rank))), path not in rank, path

    paths = sorted(entries, key=place)
    write_log(folder, [{"sampleID": number, **_unnumbered(entries[path])} for number, path in enumerate(paths)])
    for part in Path(folder).glob(PARTS):
        part.unlink()
    return len(paths)


def _unnumbered(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sampleID"}


def damaged_images(folder: str | Path, paths: Sequence[str]) -> list[str]:
    """Return the image files, relative to the folder, that are damaged."""
    with ThreadPoolExecutor(thread_limit()) as pool:
        sound = pool.map(is_whole, map(Path(folder).joinpath, paths))
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
    return Contents(
        images=images,
        black=[path for path, entry in entries.items() if entry.get("black")],
        unplanned=sorted(entries.keys() - planned),
        unlogged=strays(folder, entries),
        missing=[path for path in planned if path not in entries],
    )


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


LONGEST = 255  # bytes of a file name on common file systems
_HASH_DIGITS = 16


def folder_name(caption: str) -> str:
    """Return the folder of a caption's images: a function of the caption alone, different for different captions.

    Spaces become underscores, as in the official code. What that rule or a file system cannot keep apart is written as
    % and hex digits of its UTF-8 bytes: "_", "/", "\\", unprintable characters, a dot in front, and a "%" that reads as
    such an escape. `urllib.parse.unquote(name.replace("_", " "))` gives the caption back. A name beyond 255 bytes, and
    that of the empty caption, ends in %FF, which no escape contains, and a hash of the caption; image_log.json maps it.
    """
    pieces = [_escaped(caption, place) for place in range(len(caption))]
    name = "".join(pieces)
    if name and len(name.encode()) <= LONGEST:
        return name
    ending = "%FF" + hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
    head, room = "", LONGEST - len(ending)
    for piece in pieces:
        if (room := room - len(piece.encode())) < 0:
            break
        head += piece
    return head + ending


def _escaped(caption: str, place: int) -> str:
    character = caption[place]
    if character == " ":
        return "_"
    unsafe = character in "_/\\" or not character.isprintable() or (character == "." and place == 0)
    if unsafe or (character == "%" and re.match("[0-9A-Fa-f]{2}", caption[place + 1 : place + 3])):
        return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
    return character


_CAPTION_OF_FOLDER = {folder_name(caption): caption for caption in CAPTIONS}


def caption_of_folder(name: str) -> str:
    """The caption whose `folder_name` this is. Raises UserError for any other name."""
    if name not in _CAPTION_OF_FOLDER:
        raise UserError(f"folder {name!r} is not named after one of the 32 ISIC captions (spaces as underscores)")
    return _CAPTION_OF_FOLDER[name]

"""The bookkeeping that lets a sample folder be written by several processes, killed, and completed by the same command.

While images are made, each process appends one JSON line an image to `image_log.part<rank>.jsonl`; at the end they are
merged into `image_log.json`. `settings.json` states what made the images, so that no folder mixes two origins.
"""

import io
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpo_pytorch.data.images import IMAGE_SUFFIXES, read_log, write_log
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import append, path_fault, write_json
from ddpo_pytorch.utils.json_files import parse_json, read_json

SETTINGS = "settings.json"
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

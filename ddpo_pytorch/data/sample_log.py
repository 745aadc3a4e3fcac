"""The bookkeeping that lets a sample folder be written by several processes, killed, and completed by the same command.

While images are made, each process appends one JSON line an image to `image_log.part<rank>.jsonl`; at the end they are
merged into `image_log.json`. `settings.json` states what made the images, so that no folder mixes two origins.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ddpo_pytorch.data.images import read_log, write_log
from ddpo_pytorch.errors import UserError, difference

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
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{SETTINGS}.tmp")
    temporary.write_text(json.dumps({"settings": settings, "about": about}, indent=1) + "\n")
    os.replace(temporary, path)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that a folder's images were made with; {} where none are recorded. UserError if unreadable."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged; choose another folder or move this one away") from error


class PartLog:
    """Context manager around one process's part of the log; `add` writes entries that survive a kill right after."""

    def __init__(self, folder: str | Path, rank: int):
        self._path = Path(folder) / PARTS.replace("*", str(rank))
        self._file: TextIO | None = None

    def __enter__(self) -> "PartLog":
        torn = self._path.is_file() and not self._path.read_text().endswith("\n")
        self._file = open(self._path, "a")
        if torn:  # a kill in mid-line: what follows must not be glued to it
            self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries; each has at least path_to_img, relative to the folder."""
        self._file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self._file.flush()


def logged(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Entries so far by path_to_img, from the merged log and every part; those whose image is absent are left out."""
    folder = Path(folder)
    entries = {entry["path_to_img"]: entry for entry in [*read_log(folder), *_parts(folder)]}
    return {path: entry for path, entry in entries.items() if (folder / path).is_file()}


def _parts(folder: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(folder.glob(PARTS)):
        for line in part.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # torn by a kill; its image counts as absent and is made again


def merge_parts(folder: str | Path, order: Sequence[str] = ()) -> int:
    """Write all entries to `image_log.json`, remove the parts and what kills left half-written; returns the number.

    For one process, when none writes any more. Entries are sorted as their paths are in `order` (others behind, by
    path) and numbered: sampleID 0, 1, ...
    """
    entries, rank = logged(folder), {path: number for number, path in enumerate(order)}
    paths = sorted(entries, key=lambda path: (rank.get(path, len(rank)), path))
    write_log(folder, [{"sampleID": number, **_unnumbered(entries[path])} for number, path in enumerate(paths)])
    for leftover in [*Path(folder).glob(PARTS), *Path(folder).glob("images/*/.*.tmp")]:
        leftover.unlink()
    return len(paths)


def _unnumbered(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sampleID"}

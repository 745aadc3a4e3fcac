"""The published files: their names, two of which README and configuration spell differently, and the archive."""

import logging
import os
import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import LOCK, UNFINISHED, atomic_folder, remove_leftovers

logger = logging.getLogger(__name__)
ARCHIVE = "images.zip"
SPELLINGS = (  # README's, configuration's
    ("rl4med-checkpoint50", "rl4med-checkpoint_50"),
    ("artifact_classifier_train_H4", "artifact_classifier_test_H4"),
)


def resolve(path: str | Path) -> Path:
    """Return `path`, or its other published spelling if only that one exists."""
    path = Path(path).expanduser()
    for alternative in map(Path, spellings(str(path))[1:]):
        if not path.exists() and alternative.exists():
            logger.info("%s does not exist; using %s", path, alternative)
            return alternative
    return path


def spellings(name: str) -> tuple[str, ...]:
    """Return the names that a file may have: the given one, then its other published spelling if there is one."""
    pairs = (*SPELLINGS, *(pair[::-1] for pair in SPELLINGS))
    return (name, *(name.replace(spelling, other) for spelling, other in pairs if spelling in name))


# limits of an archive of pictures; 32 captions with 5,000 images each have fewer entries
LARGEST_GROWTH = 20  # ratio of content to archive: pictures hardly compress; more suggests a zip bomb
SMALL = 2**20  # bytes of content that any archive may have
MOST_ENTRIES = 200_000
LONGEST_NAME, LONGEST_PATH, DEEPEST = 255, 1000, 50  # bytes of a name, characters and levels of a path
SPARE = 2**30  # bytes left free on the disk
UNPACKED = ".unpacked"  # suffix of the folder of extracted content, before its entries are moved into place


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip after `check_entries`. Raises UserError if it cannot be read, now or within the context."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; scripts/download.py fetches it")
    try:
        with zipfile.ZipFile(path) as archive:
            check_entries(path, archive.infolist())
            yield archive
    except UserError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        problem = f"{path} cannot be read as a zip ({one_line(error)})"
        raise UserError(f"{problem}; move it away and fetch it again") from error


def check_entries(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raise UserError for too much content, an unsafe entry (`_fault`), or entries that differ only in case."""
    refused = f"nothing was unpacked: fetch {path.name} again"
    content, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if len(entries) > MOST_ENTRIES or content > max(SMALL, LARGEST_GROWTH * size):
        stated = f"{path} of {size / 2**20:.1f} MiB states {content / 2**20:.1f} MiB of content"
        most = f"at most {LARGEST_GROWTH} times its size and {MOST_ENTRIES} entries"
        raise UserError(f"{stated} in {len(entries)} entries; {most} are accepted; {refused}")
    seen: dict[tuple[str, ...], tuple[tuple[str, ...], bool]] = {}  # (spelling, is a folder) by case-folded path
    for entry in entries:
        name = entry.orig_filename
        parts = tuple(name.removesuffix("/").split("/"))
        fault = _fault(name, parts, entry)
        for depth in range(1, len(parts) + 1) if not fault else ():
            above, is_folder = parts[:depth], depth < len(parts) or entry.is_dir()
            folded = tuple(unicodedata.normalize("NFC", part).casefold() for part in above)
            if folded in seen and (seen[folded] != (above, True) or not is_folder):  # only folders may be repeated
                fault = f"clashes with {'/'.join(seen[folded][0])[:200]!r}"
            seen[folded] = above, is_folder
        if fault:
            raise UserError(f"{path}: the entry {name[:200]!r} {fault}; {refused}")


def _fault(name: str, parts: tuple[str, ...], entry: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # set on Unix; 0 on other systems
    if len(name) > LONGEST_PATH or len(parts) > DEEPEST or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        return f"has a name beyond {LONGEST_NAME} bytes, or a path beyond {LONGEST_PATH} characters or {DEEPEST} levels"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a backslash, colon or control character in its name"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder"
    if any(UNFINISHED.fullmatch(part) or part == LOCK or part.endswith(UNPACKED) for part in parts):
        return "has a name that is reserved for locks and unfinished files"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link" if kind == stat.S_IFLNK else "is neither a file nor a folder"
    return "is encrypted" if entry.flag_bits & 1 else ""


def unpack(path: str | Path, folder: str | Path) -> list[Path]:
    """Unpack a zip into an existing folder, all or nothing; return its new top-level entries, sorted.

    Permissions, owners and links are not restored. After a kill, the same call completes the work.
    Raises UserError for an archive that `opened` refuses, for too little space, and for entries that exist already.
    """
    path, folder = Path(path), Path(folder)
    unpacked = folder / f".{path.name}{UNPACKED}"

    def refuse_existing(names: Iterable[str]) -> None:
        if taken := sorted(name for name in names if os.path.lexists(folder / name)):
            raise UserError(f"{folder / taken[0]} exists already; move it away to unpack the archive again")

    if not unpacked.is_dir():
        remove_leftovers(folder, depth=0)
        with opened(path) as archive:
            entries = archive.infolist()
            refuse_existing(entry.orig_filename.split("/")[0] for entry in entries)
            needed, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
            if needed + SPARE > free:
                raise UserError(f"{path} needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} are free")
            with atomic_folder(unpacked, durable=False) as unfinished:
                for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
                    archive.extract(entry, unfinished)
    # all content is extracted now: after a kill, the next call completes the moves
    names = sorted(os.listdir(unpacked))
    refuse_existing(names)
    for name in names:
        os.replace(unpacked / name, folder / name)
    unpacked.rmdir()
    return [folder / name for name in names]

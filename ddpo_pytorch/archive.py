"""Zip archives from elsewhere, unpacked so that nothing lands outside a folder and nothing stays of a refused one."""

import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path

from tqdm.auto import tqdm

from ddpo_pytorch.errors import UserError

# pictures hardly become smaller in an archive: one that grows more than this in being unpacked is made to fill disks
LARGEST_GROWTH = 20
SMALL = 2**20  # bytes that may come out of any archive
SPARE = 2**30  # bytes left free on the disk
_UNREADABLE = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, NotImplementedError, RuntimeError, OSError)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip whose entries have been checked. Raises UserError where it cannot be read, or `check_entries` refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_entries(path, archive.infolist())
            yield archive
    except _UNREADABLE as error:
        raise UserError(
            f"{path} does not open as a zip, or not to its end ({_short(error)}); move it away and fetch it again"
        ) from error


def check_entries(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse (UserError, the entry named) what no archive of pictures has, before anything is written.

    These are: absolute paths, drive letters, "..", backslashes and control characters in names; links, devices and
    encrypted files; two entries for one file; and more bytes than LARGEST_GROWTH times the archive's own.
    """
    files, folders = set(), set()
    for entry in entries:
        name = entry.orig_filename
        parts = tuple(name.removesuffix("/").split("/"))
        fault = _fault(name, parts, entry)
        if not fault and (parts in files or (not entry.is_dir() and parts in folders)):
            fault = "is there twice"
        if not fault and any(parts[:depth] in files for depth in range(1, len(parts))):
            fault = "lies in a folder that is a file"
        if fault:
            raise UserError(f"{path}: the entry {name[:200]!r} {fault}; nothing was unpacked: fetch the archive again")
        (folders if entry.is_dir() else files).add(parts)
        folders.update(parts[:depth] for depth in range(1, len(parts)))
    stated, own = sum(entry.file_size for entry in entries), path.stat().st_size
    if stated > max(SMALL, LARGEST_GROWTH * own):
        raise UserError(
            f"{path} has {own / 2**20:.1f} MiB and states {stated / 2**20:.1f} MiB of content, more than "
            f"{LARGEST_GROWTH} times as much, which pictures never are; nothing was unpacked: fetch it again"
        )


def _fault(name: str, parts: tuple[str, ...], entry: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # as Unix writes it; 0 where another system did
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a backslash, colon or control character in its name"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link" if kind == stat.S_IFLNK else "is neither a file nor a folder"
    return "is encrypted" if entry.flag_bits & 1 else ""


def unpack(path: str | Path, folder: str | Path) -> list[Path]:
    """Unpack a zip into an existing folder, whole or not at all; return what is new at the folder's top, sorted.

    Files get their names and contents from the archive, and nothing else: no permissions, owners or links. Raises
    UserError for what `check_entries` refuses, a torn archive, a name that is taken already, and a full disk.
    """
    path, folder = Path(path), Path(folder)
    partial = folder / f".{path.name}.partial"
    try:
        with opened(path) as archive:
            entries = archive.infolist()
            needed, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
            if needed + SPARE > free:
                raise UserError(f"{path} needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} are free")
            top = sorted({entry.orig_filename.split("/")[0] for entry in entries})
            for name in top:
                if (folder / name).exists() or (folder / name).is_symlink():
                    raise UserError(f"{folder / name} is there already; move it away to unpack {path} again")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
                _write(archive, entry, partial / entry.orig_filename)
        return [(partial / name).rename(folder / name) for name in top]
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, open(target, "xb") as file:  # "x": names that differ in case alone may collide
        shutil.copyfileobj(source, file, 2**20)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

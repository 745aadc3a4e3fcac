"""The published files and the official split tables: what they are called, and where they come from.

The official README and configuration spell two names differently; both spellings are accepted.
"""

import hashlib
import http.client
import logging
import os
import shutil
import stat
import unicodedata
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import LOCK, UNFINISHED, atomic_folder, atomic_write, remove_leftovers, sha256

logger = logging.getLogger(__name__)

ARCHIVE = "images.zip"
DRIVE_ID = "1ah15Yu5Iu7kXdSM649yKhqCLDhqol0ef"
DRIVE_URL = f"https://drive.google.com/drive/folders/{DRIVE_ID}"

# README's spelling, configuration's spelling
SPELLINGS = (
    ("rl4med-checkpoint50", "rl4med-checkpoint_50"),
    ("artifact_classifier_train_H4", "artifact_classifier_test_H4"),
)


class PublishedFile(NamedTuple):
    """An entry of the Drive folder, by README's spelling."""

    name: str
    what: str
    required: bool = True


FILES = (
    PublishedFile("artifact_classifier_train_H6.pth", "reward classifier"),
    PublishedFile("artifact_classifier_train_H4.pth", "judge"),
    PublishedFile("rl4med-checkpoint50", "LoRA of stage (ii)"),
    PublishedFile("pretrained_unet.safetensors", "UNet of stage (i)"),
    PublishedFile(ARCHIVE, "generated samples", required=False),
)

SPLITS_URL = "https://raw.githubusercontent.com/parhamsaremi/rl4med-ddpo/main/splits"
# sha256 by name
SPLITS = {
    "isic2019_train.csv": "9b573686e740b0bf49beb36458fc30367b3757eee1fa355435eac24c0280274b",
    "isic2019_val.csv": "7300aa82b8a932a69a3b547b2c806b28236c9ac17dfda4bb629946e37531288f",
    "isic2019_test.csv": "f79b6bdab6129e52efea348ee9f74bd7980960e3468f827eb02205584e2dea1e",
}
TIMEOUT = 30  # seconds without an answer


def resolve(path: str | Path) -> Path:
    """`path`, or, where nothing is there, the same under the other published spelling if that exists."""
    path = Path(path).expanduser()
    for pair in SPELLINGS:
        for ours, other in (pair, pair[::-1]):
            alternative = Path(str(path).replace(ours, other))
            if not path.exists() and alternative.exists():
                logger.info("%s is not there; taking %s", path, alternative)
                return alternative
    return path


def spellings(name: str) -> tuple[str, ...]:
    """Names under which a file of `FILES` may lie: README's, then the other one if there is one."""
    return (name, *(name.replace(ours, other) for ours, other in SPELLINGS if ours in name))


def fetch_split(name: str, folder: Path, base_url: str = SPLITS_URL) -> Path:
    """Fetch one split table of `SPLITS` into `folder`; return the file. A correct one that is there is kept.

    Raises:
        UserError: another file has that name already (it is left alone), no answer, or not the official content; then
            nothing is written.
    """
    target, url = folder / name, f"{base_url}/{name}"
    if target.exists():
        digest = sha256(target)
        if digest != SPLITS[name]:
            raise UserError(
                f"{target} is not the official table (its sha256 is {digest}, expected {SPLITS[name]}) and is not "
                "overwritten; move it away, then run this again"
            )
        logger.info("%s is there already", target)
        return target
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched ({error}); save it with a browser as {target}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SPLITS[name]:
        raise UserError(
            f"{url} gave another content than the official table (sha256 {digest}, expected {SPLITS[name]}), which was "
            f"not saved; see what your network answers there, or save the official table as {target}"
        )
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    logger.info("%s fetched, sha256 as expected", target)
    return target


# pictures hardly become smaller in an archive: one that grows more than this in being unpacked is made to fill disks
LARGEST_GROWTH = 20
SMALL = 2**20  # bytes that may come out of any archive
MOST_ENTRIES = 200_000  # 32 captions with 5,000 images each are fewer
LONGEST_NAME, LONGEST_PATH, DEEPEST = 255, 1000, 50  # bytes of a name, characters and levels of a path
SPARE = 2**30  # bytes left free on the disk
UNPACKED = ".unpacked"  # end of the name of a whole archive's content before it is moved to its place


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip whose entries have been checked. Raises UserError where it cannot be read, or as `check_entries`."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory can fail in any way
        raise _unreadable(path, error) from error
    with archive:
        check_entries(path, archive.infolist())
        try:
            yield archive
        except zipfile.BadZipFile as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} does not open as a zip, or not to its end ({_short(error)}); move it away and fetch it again"
    )


def check_entries(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse (UserError, the entry named) what no archive of pictures has, before anything is written.

    These are: absolute paths, drive letters, "..", backslashes and control characters in names; names that are too long
    for a file system, or kept for unfinished files; links, devices and encrypted files; two entries for one file, also
    where upper and lower case do not differ; more than MOST_ENTRIES of them; and more bytes than LARGEST_GROWTH times
    the archive's own.
    """
    refused = f"nothing was unpacked: fetch {path.name} again"
    if len(entries) > MOST_ENTRIES:
        raise UserError(f"{path} has {len(entries)} entries, more than {MOST_ENTRIES}; {refused}")
    kinds: dict[tuple[str, ...], str] = {}  # "file" or "folder" by path
    spellings: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in entries:
        name = entry.orig_filename
        parts = tuple(name.removesuffix("/").split("/"))
        if not (fault := _fault(name, parts, entry)):
            above = [parts[:depth] for depth in range(1, len(parts))]
            kind = "folder" if entry.is_dir() else "file"
            if any(kinds.get(folder) == "file" for folder in above):
                fault = "lies in a folder that is a file"
            elif parts in kinds and (kind, kinds[parts]) != ("folder", "folder"):
                fault = "is there twice"
            kinds |= dict.fromkeys(above, "folder") | {parts: kind}
            for spelled in () if fault else (*above, parts):
                if (other := spellings.setdefault(_folded(spelled), spelled)) != spelled:
                    fault = f"is {'/'.join(other)[:200]!r} on systems where upper and lower case do not differ"
        if fault:
            raise UserError(f"{path}: the entry {name[:200]!r} {fault}; {refused}")
    stated, own = sum(entry.file_size for entry in entries), path.stat().st_size
    if stated > max(SMALL, LARGEST_GROWTH * own):
        raise UserError(
            f"{path} has {own / 2**20:.1f} MiB and states {stated / 2**20:.1f} MiB of content, more than "
            f"{LARGEST_GROWTH} times as much, which pictures never are; {refused}"
        )


def _fault(name: str, parts: tuple[str, ...], entry: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # as Unix writes it; 0 where another system did
    if len(name) > LONGEST_PATH or len(parts) > DEEPEST or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        return (
            f"has a name of more than {LONGEST_NAME} bytes, or a path of more than {LONGEST_PATH} or {DEEPEST} levels"
        )
    if not name.isprintable() or "\\" in name or ":" in name:
        return "has a backslash, colon or control character in its name"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder"
    if any(UNFINISHED.fullmatch(part) or part == LOCK or part.endswith(UNPACKED) for part in parts):
        return "has a name that is kept for locks and unfinished files"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link" if kind == stat.S_IFLNK else "is neither a file nor a folder"
    return "is encrypted" if entry.flag_bits & 1 else ""


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in parts)


def unpack(path: str | Path, folder: str | Path) -> list[Path]:
    """Unpack a zip into an existing folder, whole or not at all; return what is new at the folder's top, sorted.

    Files get their names and contents from the archive, and nothing else: no permissions, owners or links. What a kill
    left is removed or, if all of it had been unpacked, moved to its place. Raises UserError for what `check_entries`
    refuses, a torn archive, a name that is taken already, and a full disk.
    """
    path, folder = Path(path), Path(folder)
    unpacked = folder / f".{path.name}{UNPACKED}"
    if not unpacked.is_dir():
        remove_leftovers(folder, depth=0)
        with opened(path) as archive:
            entries = archive.infolist()
            _refuse_taken(path, folder, sorted({entry.orig_filename.split("/")[0] for entry in entries}))
            needed, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
            if needed + SPARE > free:
                raise UserError(f"{path} needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} are free")
            with atomic_folder(unpacked, durable=False) as unfinished:
                for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
                    _write(archive, entry, unfinished / entry.orig_filename)
    # from here on all content is there, and the next call would finish what is left to do
    top = sorted(entry.name for entry in unpacked.iterdir())
    _refuse_taken(path, folder, top)
    moved: list[str] = []
    try:
        for name in top:
            os.replace(unpacked / name, folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.replace(folder / name, unpacked / name)
        raise
    unpacked.rmdir()
    return [folder / name for name in top]


def _refuse_taken(path: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise UserError(f"{folder / name} is there already; move it away to unpack {path} again")


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as file:  # never over another entry
        for content in _content(archive, entry):
            file.write(content)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(entry) as source:
            while content := source.read(2**20):
                yield content
    except Exception as error:  # as a damaged directory, a damaged content can fail in any way
        raise zipfile.BadZipFile(_short(error)) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Paths inside a folder, atomic writes, locks, full disks, hashes, and JSON-lines logs."""

import errno
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import COUNT, parse_json

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)  # errors of file systems without locks
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HOST = re.sub(r"[^\w-]", "-", platform.node())
# left behind by atomic_write, atomic_folder and remove_folder when they are killed
UNFINISHED = re.compile(r"\..+\.((?P<pid>\d+)(@(?P<host>[\w-]+))?\.tmp|removed)")
ABANDONED_AFTER = 3600  # seconds without a change after which a temporary file of another machine is abandoned
logger = logging.getLogger(__name__)


class DiskFull(UserError, OSError):
    """Raised when a file exceeds the free space of the disk, a quota, or a limit on file sizes."""


def rename_with(path: Path, ending: str) -> Path:
    """Rename a file or folder to `<name>.<ending>`, or `<name>.<ending>2`, ... if that exists; return the new path."""
    names = (f"{path.name}.{ending}{number or ''}" for number in (0, *range(2, 10**6)))
    target = next(one for one in map(path.with_name, names) if not one.exists())
    os.replace(path, target)
    return target


def path_fault(name: str) -> str | None:
    """Return why a path from a table or log must not be opened inside a folder, on any system, or None.

    A backslash counts as a slash. Links inside the folder belong to the user and are followed.
    """
    parts = name.replace("\\", "/").split("/")
    if all(part.strip() in ("", ".") for part in parts):
        return "is empty"
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "holds control characters"
    if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:", name):
        return "leads out of the folder"
    return None


def path_inside(folder: str | Path, name: str, where: str) -> Path:
    """Return `folder / name`. Raises UserError, prefixed by `where`, for a name that `path_fault` rejects."""
    if fault := path_fault(name):
        raise UserError(f"{where}: the path {name!r} {fault} {str(folder)!r}; give one relative to that folder")
    return Path(folder) / name


def open_regular(path: str | Path, advice: str = "remove it") -> BinaryIO:
    """Open a regular file for reading. Raises UserError, ending in `advice`, for any other; OSError as `open` does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK: else opening a pipe waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{str(path)!r} is a folder, pipe or device; a regular file is needed: {advice}")
    return os.fdopen(descriptor, "rb")


@contextmanager
def atomic_write(
    path: str | Path, durable: bool = False, size: int | None = None, folder: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary file or folder next to `path`, renamed to `path` at the end; parents are created.

    An error leaves an existing file unchanged; `remove_leftovers` cleans up after a kill. With `durable` the file also
    survives a power cut, at the cost of waiting for the disk. Raises DiskFull, before anything is written if fewer than
    `size` bytes are free.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{HOST}.tmp")
    with room_for(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same id
        try:
            if folder:
                temporary.mkdir()
            else:
                temporary.write_bytes(b"")
            yield temporary
            written = [*temporary.rglob("*"), temporary]
            _share([file for file in written if file.is_file() and not file.is_symlink()], path)
            for one in written if durable else ():
                _sync(one)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
                    raise
                raise UserError(f"{str(path)!r} already exists; move it away, or choose another name") from error
            if durable:
                _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # a folder, or renamed
                temporary.unlink()


def atomic_folder(path: str | Path, size: int | None = None, durable: bool = True) -> AbstractContextManager[Path]:
    """Yield an empty temporary folder, as `atomic_write` does a file. Raises UserError if `path` has content."""
    return atomic_write(path, durable, size, folder=True)


def _share(files: list[Path], path: Path) -> None:
    """Give files that only their owner may read, as safetensors writes them, the mode of a new file next to `path`."""
    if private := [file for file in files if not file.stat().st_mode & 0o077]:
        probe = path.with_name(f".{path.name}.mode.{os.getpid()}@{HOST}.tmp")
        probe.touch()  # umask, or the folder's default access list
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for file in private:
            with suppress(OSError):  # a file system that refuses modes
                file.chmod(mode)


def write_file(path: str | Path, content: str | bytes, durable: bool = False) -> None:
    """Write text (as UTF-8) or bytes by `atomic_write`."""
    with atomic_write(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any, durable: bool = False) -> None:
    """Write indented JSON atomically."""
    write_file(path, json.dumps(value, indent=1) + "\n", durable)


def remove_folder(path: str | Path) -> None:
    """Rename a folder, then remove it, so that a kill leaves no partial folder under its name."""
    path = Path(path)
    renamed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(path, renamed)
    shutil.rmtree(renamed)


def remove_leftovers(folder: str | Path, depth: int = 2) -> None:
    """Remove temporary files and folders of killed processes from `folder` and `depth` levels of subfolders."""
    entries: list[os.DirEntry] = []
    with suppress(OSError):  # entries that cannot be read or removed do no harm
        entries = list(os.scandir(folder))
    for entry in entries:
        with suppress(OSError):
            is_folder = entry.is_dir(follow_symlinks=False)
            if unfinished := UNFINISHED.fullmatch(entry.name):
                if not _being_written(entry, unfinished["pid"], unfinished["host"]):
                    shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)
            elif is_folder and depth:
                remove_leftovers(entry.path, depth - 1)


def _being_written(entry: os.DirEntry, pid: str | None, host: str | None) -> bool:
    if pid is None or entry.is_symlink():
        return False
    if host not in (None, HOST):
        return time.time() - entry.stat().st_mtime < ABANDONED_AFTER
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    return False


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that sync files only
            raise
    finally:
        os.close(descriptor)


@contextmanager
def room_for(path: str | Path, size: int | None = None) -> Iterator[None]:
    """Turn errors of a full disk into DiskFull; raise it at once if fewer than `size` bytes are free.

    A quota, or a limit on file sizes, is noticed only when it is exceeded.
    """
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    usage = shutil.disk_usage(folder)
    try:
        if size is not None and usage.free < size and usage.total:  # some network file systems report no sizes
            raise OSError(errno.ENOSPC, "too little space")
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (reason := _full_disk(error)):
            raise
        needed = f"about {size / 2**20:,.1f} MiB are needed, " if size else ""
        space = f"{needed}{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free; existing files are untouched"
        advice = f"make room in {str(folder)!r}, then run the same command again"
        raise DiskFull(f"{str(path)!r} could not be written ({reason}): {space}: {advice}") from error


def _full_disk(error: BaseException | None) -> str:
    """Return the reason if an error of Python, NumPy, PyTorch or safetensors means a full disk, else ""."""
    while error is not None:
        code = getattr(error, "errno", None)
        if stated := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers
            code = int(stated[1])
        elif isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):  # numpy
            code = errno.ENOSPC
        if code in FULL_DISK:
            return getattr(error, "strerror", None) or os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a regular file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append(path: str | Path, content: bytes) -> None:
    """Append to a file and wait until the content is on the disk. Raises DiskFull, with the file unchanged."""
    with room_for(path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


class JsonLines:
    """An append-only file of one JSON object per line, written by one process, from any of its threads.

    With `keep`, entries of an existing file whose `counter` is `keep` or more are removed, since a resumed run repeats
    them; so are damaged lines, with a warning. A last line without a newline counts as complete.
    """

    def __init__(self, path: str | Path, active: bool = True, keep: int | None = None, counter: str = "epoch"):
        self.path, self.active, self._lock = Path(path), active, threading.Lock()
        if not active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, kept = self.path.read_bytes() if self.path.is_file() else b"", b""
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                if keep is None or parse_json(line, {counter: COUNT}, "")[counter] < keep:
                    kept += line + b"\n"
            except UserError:
                logger.warning("%s: removed line %d, which is damaged: %.80r", self.path, number, line)
        if kept != content:
            write_file(self.path, kept, durable=True)

    def write(self, *entries: Mapping[str, Any]) -> None:
        """Append entries as `append` does; NaN and infinity become null, since JSON lacks them."""
        if not self.active or not entries:
            return
        lines = ""
        for entry in entries:
            entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            lines += json.dumps(entry) + "\n"
        with self._lock:
            append(self.path, lines.encode())


def lock(path: str | Path, taken: str) -> BaseFileLock:
    """Lock the file at `path`, created if absent, until `release` is called or the process ends; forks do not hold it.

    On a file system without locks, the file itself is the lock. Raises UserError(taken) if another process holds it.
    """
    try:
        try:
            return FileLock(path, timeout=0, thread_local=False).acquire().lock
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if os.path.getsize(path) == 0:  # made by the attempt above; a soft lock holds its owner's id
                os.unlink(path)
            return SoftFileLock(path, timeout=0, thread_local=False).acquire().lock
    except Timeout as error:
        raise UserError(taken) from error


@contextmanager
def locked(folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """Lock a folder, created if absent, for this process, and remove what killed processes left in it.

    Every command that writes a folder does so within this context. After an error, a folder that was created here and
    is still empty is removed. Raises UserError, which suggests `instead`, if another process holds the folder.
    """
    folder = Path(folder)
    path, created = folder / LOCK, not folder.exists()  # created: reset on success
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:  # the last one in /proc
        raise UserError(f"{str(folder)!r} is not a folder, or none can be made there; choose {instead}") from error
    held = lock(path, f"{str(folder)!r} is being written by another run; wait for it to end or choose {instead}")
    try:
        remove_leftovers(folder)
        yield
        created = False
    finally:
        path.unlink(missing_ok=True)
        held.release()
        if created:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()

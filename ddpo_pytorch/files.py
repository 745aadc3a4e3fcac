"""Names that stay inside a folder, regular files, atomic writes, hashes, full disks, logs of one JSON object a line."""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from ddpo_pytorch.errors import UserError

LOCK = ".lock"
# of file systems that know no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger(__name__)
_PARTIAL = re.compile(r"\..+\.(partial|\d+\.tmp|removed)")


def path_fault(name: str) -> str | None:
    """Return why a name from a table or log may not be opened below a folder, or None.

    It must lead to something inside that folder on any system: not empty, not absolute, no drive letter, no "..", no
    control characters. A backslash counts as a slash. Links inside the folder are the user's own and are followed.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or all(part in ("", ".") for part in parts):
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "holds control characters"
    if not parts[0] or ".." in parts or re.match(r"[A-Za-z]:", name):
        return "leads out of the folder"
    return None


def path_inside(folder: str | Path, name: str, where: str) -> Path:
    """Return `folder / name`. Raises UserError, which begins with `where`, for a name that `path_fault` refuses."""
    if fault := path_fault(name):
        raise UserError(f"{where}: the path {name!r} {fault} {str(folder)!r}; give one that starts from that folder")
    return Path(folder) / name


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. A pipe would block, a device may have no end: both raise UserError.

    Raises OSError as `open` does.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{str(path)!r} is a folder, pipe or device, where a regular file is needed; remove it")
    return os.fdopen(descriptor, "rb")


@contextmanager
def atomic_write(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` (its folder is made if absent); what is written there gets the name at the end.

    After an error nothing is left, and a file that had the name before is still the old one. `durable`: also after a
    power cut, for the price of waiting for the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder, which must not exist when it gets its name. Always durable."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Remove a folder, which loses its name at once: no kill leaves a part of it under that name."""
    path = Path(path)
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what the functions above left half-written or half-removed in a folder when they were killed."""
    for path in Path(folder).iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
def room_for(path: str | Path, size: int) -> Iterator[None]:
    """Around writing `size` bytes, about, as `path`. UserError with both numbers before that, and when they do not fit.

    A quota, or a limit on the size of files, is noticed only when it is met. What was written is left to the caller.
    """
    parent = Path(path).parent
    usage = shutil.disk_usage(parent)
    advice = f"about {_readable(size)} are needed and %s are free; what was there before is untouched: make room in "
    advice += f"{str(parent)!r}, then run the same command again"
    if usage.total and usage.free < size:  # there are network file systems that know no sizes
        raise UserError(f"{str(path)!r} was not begun: {advice % _readable(usage.free)}")
    try:
        yield
    except Exception as error:
        if reason := _full_disk(error):
            free = _readable(usage.free)
            raise UserError(f"{str(path)!r} could not be written ({reason}): {advice % free}") from error
        raise


def _full_disk(error: BaseException | None) -> str:
    """What the system said of a full disk, from an error of Python, PyTorch or safetensors; "" for other errors."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else 0
        if stated := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
            code = int(stated[1])
        if code in FULL_DISK:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def sha256(path: str | Path) -> str:
    """SHA-256 of a regular file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class JsonLines:
    """An append-only file of one JSON object a line; silent on every process but the main one.

    Of an existing file, entries whose `counter` is below `keep` stay: a resumed run repeats those after its checkpoint.
    """

    def __init__(self, path: str | Path, active: bool = True, keep: int | None = None, counter: str = "epoch"):
        self.path, self.active = Path(path), active
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if keep is not None and self.path.is_file():
                lines = self.path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if (number := _number(line, counter)) is not None and number < keep]
                if kept != lines:
                    with atomic_write(self.path, durable=True) as temporary:
                        temporary.write_bytes(b"".join(kept))

    def write(self, entry: dict) -> None:
        """Append a line, which is on the disk when this returns. Numbers that JSON lacks, as nan, become null."""
        if self.active:
            entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _number(line: bytes, counter: str) -> int | None:
    """The counter of a line; None where a kill or a power cut has torn it."""
    try:
        return json.loads(line)[counter] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def lock(path: str | Path, taken: str, second: str) -> IO[bytes]:
    """The file at `path`, made if absent, open for appending and locked until it is closed or the process ends.

    Raises UserError(taken) while another process has it. On a file system without locks a warning says so, and to let
    no `second` one write.
    """
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(taken) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: no locks on this file system; let no second %s write here", path, second)
    return file


@contextmanager
def locked(folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """The folder, made if absent, for this process alone. Raises UserError while another process has it.

    The lock ends with the process, however that ends; its file is removed by whoever holds it last. `instead` says what
    else the user can give.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = f"{str(folder)!r} is being written by another run; wait for its end or choose {instead}"
    while True:
        file = lock(path, taken, "run")
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # a run that ended just now removed the file: it locks nothing
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()

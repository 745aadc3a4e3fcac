"""Names inside a folder, atomic writes, locks, full disks, hashes, and logs of one JSON object a line."""

import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import COUNT, parse_json

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)  # of file systems without locks
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what atomic_write, atomic_folder (now, and in earlier versions) and remove_folder leave behind when they are killed
UNFINISHED = re.compile(r"\..+\.(\d+\.tmp|partial|removed)")
ABANDONED_AFTER = 3600  # seconds without a change, where no lock can tell whether a file is still being written
logger = logging.getLogger(__name__)


class DiskFull(UserError, OSError):
    """A file that does not fit: on the disk, into a quota, or below a limit on the size of files."""


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
    """Yield an empty temporary file beside `path` (the folder is made if absent), which is renamed to it at the end.

    After an error nothing is left, and a file that had the name before is still the old one. What a kill leaves,
    `remove_leftovers` removes. `durable`: also after a power cut, for the price of waiting for the disk. Raises
    DiskFull, and whatever is raised within.
    """
    path = Path(path)
    temporary = _temporary(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            try:
                _try_lock(file.fileno())
                yield temporary
                if durable:
                    _sync(temporary)
                os.replace(temporary, path)
                if durable:
                    _sync(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, size: int | None = None, durable: bool = True) -> Iterator[Path]:
    """Do the same for a folder, which must not exist when it gets its name.

    Raises DiskFull before anything is written where fewer than `size` bytes are free, and UserError where another
    command has given a folder this name meanwhile.
    """
    path = Path(path)
    temporary = _temporary(path)
    with room_for(path, size):
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
        temporary.mkdir(parents=True)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            _try_lock(descriptor)
            yield temporary
            for written in (*temporary.rglob("*"), temporary) if durable else ():
                _sync(written)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise UserError(f"{str(path)!r} exists already; move it away, or choose another name") from error
            _sync(path.parent)
        finally:
            os.close(descriptor)
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any, durable: bool = False) -> None:
    """Write indented JSON whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text)


def remove_folder(path: str | Path) -> None:
    """Remove a folder, which loses its name at once: no kill leaves a part of it under that name."""
    path = Path(path)
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: str | Path, depth: int = 2) -> None:
    """Remove what the functions above left when they were killed, in a folder and `depth` levels of folders in it.

    What a living process is writing stays.
    """
    entries: list[os.DirEntry] = []
    with suppress(OSError):  # what cannot be read or removed is in nobody's way
        entries = list(os.scandir(folder))
    for entry in entries:
        with suppress(OSError):
            is_folder = entry.is_dir(follow_symlinks=False)
            if not UNFINISHED.fullmatch(entry.name):
                if is_folder and depth:
                    remove_leftovers(entry.path, depth - 1)
            elif entry.is_symlink() or not _in_use(entry.path):
                shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _in_use(path: str) -> bool:
    """Return whether a living process is writing a temporary file or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        return not _try_lock(descriptor) and time.time() - os.stat(descriptor).st_mtime < ABANDONED_AFTER
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


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
    """Turn the errors of a full disk, within this context, into DiskFull; what was written is left to the caller.

    Raises DiskFull at once where fewer than `size` bytes are free. A quota, or a limit on the size of files, is
    noticed only when it is met.
    """
    path = Path(path)
    needed = "" if size is None else f"about {_readable(size)} are needed and "
    if size is not None and not _free(path) >= size:
        raise DiskFull(f"{str(path)!r} was not begun: {needed}{_advice(path)}")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := full_disk(error):
            raise DiskFull(f"{str(path)!r} could not be written ({reason}): {needed}{_advice(path)}") from error
        raise


def full_disk(error: BaseException | None) -> str:
    """Return what the system said of a full disk, from an error of Python, NumPy, PyTorch or safetensors; else ""."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if stated := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers
            code = int(stated[1])
        if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):  # numpy
            code = errno.ENOSPC
        if code in FULL_DISK:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def _existing(path: Path) -> Path:
    """Return the folder that a new path would be in, or the nearest above it that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _free(path: Path) -> float:
    usage = shutil.disk_usage(_existing(path))
    return usage.free if usage.total else math.inf  # there are network file systems that know no sizes


def _advice(path: Path) -> str:
    return (
        f"{_readable(_free(path))} are free; what was there before is untouched: make room in "
        f"{str(_existing(path))!r}, then run the same command again"
    )


def _readable(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def sha256(path: str | Path) -> str:
    """SHA-256 of a regular file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: str | Path, line: str) -> None:
    """Append a line, which is on the disk when this returns; one that does not fit (DiskFull) leaves nothing."""
    with room_for(path), open(path, "ab", buffering=0) as file:
        append(file, line.encode() + b"\n")
        os.fsync(file.fileno())


def append(file: io.FileIO, content: bytes) -> None:
    """Append all of some bytes to an unbuffered file, or, raising DiskFull, none of them."""
    size = file.seek(0, os.SEEK_END)
    with room_for(file.name):
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        except OSError:
            file.truncate(size)
            raise


class JsonLines:
    """An append-only file of one JSON object a line; silent on every process but the main one.

    Of an existing file, entries whose `counter` is below `keep` stay: a resumed run repeats those after its checkpoint.
    A line that a power cut has torn is removed, with a warning that says which; one that lacks only its newline is
    complete.
    """

    def __init__(self, path: str | Path, active: bool = True, keep: int | None = None, counter: str = "epoch"):
        self.path, self.active = Path(path), active
        if not active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            return
        content, kept, last = self.path.read_bytes(), [], None
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                count = parse_json(line, {counter: COUNT}, "")[counter] if keep is not None else None
            except UserError:
                self._warn(line, number, counter, last, keep)
                continue
            if keep is None or count < keep:
                kept.append(line)
                last = count
        if (text := b"".join(line + b"\n" for line in kept)) != content:
            with atomic_write(self.path, durable=True) as temporary:
                temporary.write_bytes(text)

    def _warn(self, line: bytes, number: int, counter: str, last: int | None, keep: int) -> None:
        stated = re.match(rb'\{"%s": (\d+),' % counter.encode(), line)  # it comes first, so a torn line often has it
        lost = int(stated[1]) if stated else None
        which = f"{counter} {lost}" if stated else f"after {counter} {last}" if last is not None else "the first"
        repeated = (last + 1 if last is not None else 0) >= keep if lost is None else lost >= keep
        outcome = "it is made and logged again" if repeated else "the run has it, the log lacks it from now on"
        logger.warning("%s: line %d (%s) is damaged and was removed; %s", self.path, number, which, outcome)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line, as `append_line` does. Numbers that JSON lacks, as nan, become null."""
        if self.active:
            entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            append_line(self.path, json.dumps(entry))


_locks: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()
# a data loader's worker would keep the locks of its parent, for a while also after the parent was killed
os.register_at_fork(after_in_child=lambda: [file.close() for file in list(_locks)])


def lock(path: str | Path, taken: str, second: str) -> IO[bytes]:
    """Open the file at `path`, made if absent, and lock it until it is closed or the process ends.

    Raises UserError(taken) while another process has it. On a file system without locks a warning asks to let no
    `second` one write.
    """
    file = open(path, "ab")
    try:
        supported = _try_lock(file.fileno())
    except BlockingIOError as error:
        file.close()
        raise UserError(taken) from error
    if not supported:
        logger.warning("%s: no locks on this file system; let no second %s write here", path, second)
    _locks.add(file)
    return file


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; return False on a file system without locks. Raises BlockingIOError where it is locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def locked(folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """Keep a folder, made if absent, for this process alone, and remove what killed ones have left half-written there.

    Every command that writes a folder does so within this. Raises UserError while another process has the folder;
    `instead` is what else the user can give. The lock ends with the process, however that ends; its file is removed by
    whoever holds it last, and so is, after an error, a folder that was made for nothing.
    """
    folder = Path(folder)
    path, made = folder / LOCK, not folder.exists()
    taken = f"{str(folder)!r} is being written by another run; wait for its end or choose {instead}"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = lock(path, taken, "run")
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
            file.close()
        except FileNotFoundError:
            continue  # a run that ended just now removed the file or the folder: that locks nothing
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{str(folder)!r} is not a folder, or lies in what is none; choose {instead}") from error
    failed = True
    try:
        remove_leftovers(folder)
        yield
        failed = False
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if made and failed:
            with suppress(OSError):  # unless it is empty
                folder.rmdir()

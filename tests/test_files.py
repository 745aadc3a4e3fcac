"""Atomic writes, leftovers of kills, locks of folders, full disks, and logs of one JSON object a line."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from script_tools import files_of

from ddpo_pytorch.data.sample_folder import PartLog, claim_folder
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import (
    ABANDONED_AFTER,
    LOCK,
    DiskFull,
    JsonLines,
    atomic_folder,
    atomic_write,
    full_disk,
    locked,
    remove_leftovers,
    write_json,
)
from ddpo_pytorch.utils.training_state import load_state, save_state

resource = pytest.importorskip("resource")  # limits on the size of files; not on Windows
KILLED = """
import os, signal, sys
from ddpo_pytorch.utils.files import atomic_folder, atomic_write, locked
with {0}(sys.argv[1]) as temporary:
    {1}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_within(function: str, path, work: str = "") -> None:
    result = subprocess.run([sys.executable, "-c", KILLED.format(function, work), path])
    assert result.returncode == -signal.SIGKILL


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_start_removes_leftovers_of_a_kill(tmp_path):
    """In the folder and its subfolders; files with similar names and targets of links stay."""
    kill_within("locked", tmp_path)
    kill_within("atomic_write", tmp_path / "0.png", "temporary.write_bytes(bytes(10**6))")
    kill_within("atomic_folder", tmp_path / "sub" / "checkpoint_1", "(temporary / 'x').write_bytes(bytes(10**6))")
    assert len(names(tmp_path)) == 3 and len(names(tmp_path / "sub")) == 1
    own = {".notes.tmp": b"1", "x.12.tmp": b"2", ".12.tmp": b"3"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".link.1.tmp").symlink_to(tmp_path / "x.12.tmp")
    with locked(tmp_path):
        assert {name: content for name, content in files_of(tmp_path).items() if name != LOCK} == own
    assert files_of(tmp_path) == own and names(tmp_path / "sub") == []


def test_files_that_a_process_is_writing_stay(tmp_path):
    """A process of this machine, or of another one that shares the folder, while its files change."""
    foreign = tmp_path / ".cache.npy.1234567@elsewhere.tmp"
    foreign.touch()
    with atomic_write(tmp_path / "cache.npy") as file, atomic_folder(tmp_path / "best") as folder:
        remove_leftovers(tmp_path)
        assert foreign.exists()
        file.write_text("new")
        (folder / "a").write_text("new")
    os.utime(foreign, (0, foreign.stat().st_mtime - ABANDONED_AFTER - 1))
    remove_leftovers(tmp_path)
    assert files_of(tmp_path) == {"cache.npy": b"new", "best/a": b"new"}


@pytest.mark.parametrize("supported", [True, False])
def test_a_folder_has_one_writer(tmp_path, monkeypatch, supported):
    if not supported:

        def flock(*_):
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "new" / "out"
    with locked(folder):
        with pytest.raises(UserError, match=f"{folder}.*another --output"), locked(folder, "another --output"):
            pass
    assert names(folder) == []
    folder.rmdir()
    with pytest.raises(ValueError), locked(folder):
        raise ValueError
    assert not folder.exists() and folder.parent.is_dir()
    with locked(folder):
        (folder / "x").touch()
    assert names(folder) == ["x"]
    for bad in (folder / "x", folder / "x" / "in"):
        with pytest.raises(UserError, match="not a folder"), locked(bad):
            pass


def _wait(ready, done):
    ready.set()
    done.wait(30)


def test_workers_do_not_keep_the_lock_of_a_process_that_ended(tmp_path):
    """Workers of a data loader are forks and outlive a killed parent by some seconds."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    with locked(tmp_path):
        worker = context.Process(target=_wait, args=(ready, done))
        worker.start()
        assert ready.wait(30)
    try:
        with locked(tmp_path):
            pass
    finally:
        done.set()
        worker.join()


@contextmanager
def limited(size: int):
    """Limit the size of files: to a process this looks like a full disk or a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def written(save):
    def write(path):
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            save(file)

    return write


def tensors(path):
    with atomic_write(path) as temporary:
        save_file({"x": torch.ones(20_000)}, temporary)


WRITERS = {
    "json": lambda path: write_json(path, ["x" * 20_000]),
    "torch": written(lambda file: torch.save({"x": torch.ones(20_000)}, file)),
    "numpy": written(lambda file: np.save(file, np.ones(20_000))),
    "safetensors": tensors,
    "settings": lambda path: claim_folder(path, {"x": "y" * 20_000}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_old_files(tmp_path, name):
    path = tmp_path / "out"
    if name != "settings":
        path.write_text("old")
    before = files_of(tmp_path)
    with limited(9000), pytest.raises(DiskFull, match=r"out.*MiB are free"):
        WRITERS[name](path)
    assert files_of(tmp_path) == before
    WRITERS[name](path)
    assert files_of(tmp_path) != before


def test_a_folder_that_does_not_fit_is_not_begun(tmp_path):
    with pytest.raises(DiskFull, match="checkpoint.*are needed"), atomic_folder(tmp_path / "checkpoint", size=2**60):
        pytest.fail("begun")
    assert names(tmp_path) == []


def test_a_line_that_does_not_fit_is_removed(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.write({"epoch": 0})
    with limited(40), pytest.raises(DiskFull, match="log.jsonl"):
        log.write({"epoch": 1, "text": "x" * 100})
    assert path.read_bytes() == b'{"epoch": 0}\n'
    log.write({"epoch": 1, "loss": float("nan")})
    assert path.read_bytes() == b'{"epoch": 0}\n{"epoch": 1, "loss": null}\n'
    with PartLog(tmp_path, 0) as parts, limited(40), pytest.raises(DiskFull, match="image_log.part0"):
        parts.add([{"path_to_img": "x" * 100}])


def test_only_some_errors_mean_a_full_disk():
    assert not full_disk(OSError(errno.EACCES, "denied")) and not full_disk(ValueError("(os error 2)"))
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert full_disk(wrapped) == os.strerror(errno.EDQUOT)


LINES = [json.dumps({"epoch": epoch, "reward": epoch / 10}) for epoch in range(4)]


@pytest.mark.parametrize(
    ("content", "keep", "kept", "damaged"),
    [
        ("\n".join(LINES), 4, [0, 1, 2, 3], None),  # only the newline is missing
        ("\n".join(LINES) + "\n\n", 3, [0, 1, 2], None),
        ("\n".join(LINES)[:-3], 4, [0, 1, 2], 4),
        ("\n".join([LINES[0], "\0\0\0", LINES[2], ""]), 4, [0, 2], 2),
        ('{"epoch": "0"}\n' + LINES[1], 4, [1], 1),
        ("[" * 10**5 + "\n" + LINES[0], 4, [0], 1),
        ('{"epoch": 1, "epoch": 0}\n' + LINES[0], 4, [0], 1),
        ("", 4, [], None),
    ],
)
def test_a_resumed_log_loses_damaged_and_repeated_lines(tmp_path, caplog, content, keep, kept, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    JsonLines(path, keep=keep).write({"epoch": 9})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [*kept, 9]
    assert len(caplog.messages) == (damaged is not None)
    if damaged:
        assert f"{path}: removed line {damaged}," in caplog.text and len(caplog.text) < 500


def test_a_log_without_its_last_newline_continues_on_a_new_line(tmp_path):
    (tmp_path / "log").write_text(LINES[0])
    JsonLines(tmp_path / "log").write({"epoch": 1})
    assert (tmp_path / "log").read_text() == LINES[0] + '\n{"epoch": 1}\n'


def test_a_training_state_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut, the state is the new one or the one before."""
    path, calls = tmp_path / "vae_state.pt", []
    save_state(path, {"step": 1}, {"seed": 0})
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (calls.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("renamed"), replace(old, new)))
    save_state(path, {"step": 2}, {"seed": 0})
    file, renamed, folder = calls
    assert file.startswith(f"{tmp_path}/.vae_state.pt.") and (renamed, folder) == ("renamed", str(tmp_path))
    with limited(9000), pytest.raises(DiskFull, match="vae_state.pt"):
        save_state(path, {"step": 3, "weights": torch.ones(20_000)}, {"seed": 0})
    assert load_state(path, {"seed": 0})["step"] == 2 and names(tmp_path) == ["vae_state.pt"]

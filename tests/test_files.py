"""Atomic writes, what kills leave of them, locks of folders, full disks, and logs of one JSON object a line."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from script_tools import files_of

from ddpo_pytorch.data.images import save_picture
from ddpo_pytorch.data.sample_folder import PartLog, claim_folder
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import (
    LOCK,
    DiskFull,
    JsonLines,
    append_line,
    atomic_folder,
    atomic_write,
    full_disk,
    locked,
    remove_leftovers,
    write_json,
)
from ddpo_pytorch.utils.training_state import load_state, save_state

KILLED = """
import os, signal, sys
from ddpo_pytorch.utils.files import atomic_folder, atomic_write
with {0}(sys.argv[1]) as temporary:
    {1}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_within(function: str, path, work: str) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED.format(function, work), path])
    assert result.returncode == -signal.SIGKILL


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_start_removes_what_a_kill_left(tmp_path):
    """In the folder itself and in those within it; files that merely look alike, and links, lose nothing."""
    for place in (tmp_path, tmp_path / "images" / "a_b"):
        kill_within("atomic_write", place / "0.png", "temporary.write_bytes(bytes(10**6))")
        kill_within("atomic_folder", place / "checkpoint_1", "(temporary / 'x').write_bytes(bytes(10**6))")
        assert len(names(place)) == 2
    (tmp_path / ".checkpoint_2.partial").mkdir()  # by earlier versions
    own = {".notes.tmp": b"1", "x.12.tmp": b"2", ".12.tmp": b"3"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".link.1.tmp").symlink_to(tmp_path / "x.12.tmp")
    with locked(tmp_path):
        assert {name: content for name, content in files_of(tmp_path).items() if name != LOCK} == own
        assert names(tmp_path / "images" / "a_b") == []
    assert files_of(tmp_path) == own


def test_what_a_living_process_writes_stays(tmp_path):
    with atomic_write(tmp_path / "cache.npy") as file, atomic_folder(tmp_path / "best") as folder:
        remove_leftovers(tmp_path)
        assert file.exists() and folder.is_dir()
        file.write_text("whole")
        (folder / "a").write_text("whole")
    assert files_of(tmp_path) == {"cache.npy": b"whole", "best/a": b"whole"}


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked(folder, "another --output"):
        with pytest.raises(UserError) as caught, locked(folder, "another --output"):
            pass
        assert str(folder) in str(caught.value) and "another --output" in str(caught.value)
    folder.rmdir()
    with pytest.raises(ValueError), locked(folder):
        raise ValueError
    assert not folder.exists() and folder.parent.is_dir()  # a folder that was made for nothing goes
    with locked(folder):
        (folder / "x").touch()
    assert names(folder) == ["x"]
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(UserError, match="file"), locked(bad):
            pass


def _wait(ready, done):
    ready.set()
    done.wait(30)


def test_workers_do_not_keep_the_lock_of_a_process_that_ended(tmp_path):
    """Workers of a data loader are forks and live on for some seconds when their parent is killed."""
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
    """Within this context, no file becomes larger: what a full disk or a quota looks like to a process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def torch_save(path):
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save({"x": torch.ones(20_000)}, file)


def tensors(path):
    with atomic_write(path) as temporary:
        save_file({"x": torch.ones(20_000)}, temporary)


def array(path):
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ones(20_000))


WRITERS = {
    "json": lambda path: write_json(path, ["x" * 20_000]),
    "png": lambda path: save_picture(path, noise(64)),
    "jpeg": lambda path: save_picture(path, noise(96), format="JPEG", quality=95, subsampling=0),
    "torch": torch_save,
    "safetensors": tensors,
    "numpy": array,
    "settings": lambda path: claim_folder(path, {"x": "y" * 20_000}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_old_files_stay(tmp_path, name):
    path = tmp_path / "out"
    if name != "settings":
        path.write_text("old")
    before = files_of(tmp_path)
    with limited(9000), pytest.raises(UserError) as caught:
        WRITERS[name](path)
    assert isinstance(caught.value, DiskFull) and isinstance(caught.value, OSError)
    assert "out" in str(caught.value) and "MiB" in str(caught.value) and "\n" not in str(caught.value)
    assert files_of(tmp_path) == before
    WRITERS[name](path)
    assert files_of(tmp_path) != before


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.write({"epoch": 0})
    with limited(40), pytest.raises(DiskFull, match="log.jsonl"):
        log.write({"epoch": 1, "text": "x" * 100})
    assert path.read_bytes() == b'{"epoch": 0}\n'
    log.write({"epoch": 1})
    assert path.read_bytes() == b'{"epoch": 0}\n{"epoch": 1}\n'
    with PartLog(tmp_path, 0) as parts, limited(40), pytest.raises(DiskFull, match="image_log.part0"):
        parts.add([{"path_to_img": "x" * 100}])


def test_errors_of_other_kinds_are_no_full_disks():
    assert not full_disk(OSError(errno.EACCES, "denied")) and not full_disk(ValueError("(os error 2)"))
    inner = OSError(errno.EDQUOT, "quota")
    try:
        raise RuntimeError("wrapped") from inner
    except RuntimeError as error:
        assert full_disk(error) == os.strerror(errno.EDQUOT)


LINES = [json.dumps({"epoch": epoch, "reward": epoch / 10}) for epoch in range(4)]


@pytest.mark.parametrize(
    ("content", "keep", "kept", "warned"),
    [
        ("\n".join(LINES), 4, [0, 1, 2, 3], None),  # only the newline is missing
        ("\n".join(LINES) + "\n\n", 4, [0, 1, 2, 3], None),
        ("\n".join(LINES)[:-3], 4, [0, 1, 2], "epoch 3"),
        ("\n".join(LINES)[:-3], 3, [0, 1, 2], "epoch 3"),
        ("\n".join([*LINES[:3], '{"epo']), 4, [0, 1, 2], "after epoch 2"),
        ("\n".join([LINES[0], "\0\0\0", LINES[2], ""]), 4, [0, 2], "after epoch 0"),
        ('{"epoch": "0"}\n' + LINES[1], 4, [1], "line 1"),
        ("[" * 10**5 + "\n" + LINES[0], 4, [0], "line 1"),
        ('{"epoch": 1, "epoch": 0}\n' + LINES[0], 4, [0], "epoch 1"),
        ("", 4, [], None),
    ],
)
def test_damaged_lines_of_a_log_are_named(tmp_path, caplog, content, keep, kept, warned):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    JsonLines(path, keep=keep).write({"epoch": 9})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [*kept, 9]
    assert len(caplog.messages) == (warned is not None)
    if warned:
        assert str(path) in caplog.text and warned in caplog.text


def test_the_warning_says_whether_the_entry_comes_back(tmp_path, caplog):
    for keep, repeated in ((4, False), (3, True)):
        (tmp_path / "log").write_text("\n".join(LINES)[:-3])
        caplog.clear()
        JsonLines(tmp_path / "log", keep=keep)
        assert ("again" in caplog.text) is repeated and ("lacks it" in caplog.text) is not repeated


def test_a_log_without_its_last_newline_is_not_glued_to(tmp_path):
    (tmp_path / "log").write_text(LINES[0])
    JsonLines(tmp_path / "log").write({"epoch": 1})
    assert (tmp_path / "log").read_text() == LINES[0] + '\n{"epoch": 1}\n'
    append_line(tmp_path / "log", "x")
    assert (tmp_path / "log").read_text().endswith("}\nx\n")


def test_the_state_of_a_training_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Of train_sd.py, train_rlhf.py and the classifiers: after a power cut, the state is this one or the one before."""
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

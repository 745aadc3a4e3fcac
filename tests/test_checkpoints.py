"""Checkpoints: `best`, torn or changed ones, full disks, and logs."""

import json
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from script_tools import files_of
from torch import nn

from ddpo_pytorch.training.checkpoints import (
    epochs_completed,
    find_checkpoint,
    find_weights,
    link_best,
    load_checkpoint,
    repair_best,
    save_checkpoint,
    snapshot,
)
from ddpo_pytorch.utils import files
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_folder, atomic_write

FILES = ("unet.safetensors", "optimizer.pt", "progress.json")


def trained(value: float, size: int = 3):
    """A network of constant weights, its optimizer after one step, and how far it is."""
    unet = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-9)
    unet(torch.ones(1, size)).sum().backward()
    optimizer.step()
    nn.init.constant_(unet.weight, value)
    return unet, optimizer


def progress_of(epoch: int) -> dict:
    held_out = {"best": None, "last": None, "collapsed": 0, "fingerprint": None}
    state = {"epoch": epoch, "global_step": epoch, "skipped_updates": 0, "wandb_id": None, "held_out": held_out}
    return state | {"tracker": {"rewards": []}, "plateau": {"previous": None, "quiet_epochs": 0}}


def save(run: Path, epoch: int, limit: int = 10, size: int = 3, best: bool = False) -> Path:
    return save_checkpoint(run, snapshot(*trained(epoch, size), None), progress_of(epoch), limit, best)


def held(checkpoint: Path, size: int = 3) -> float:
    """The weight in a checkpoint, as it is resumed."""
    unet, optimizer = trained(0.0, size)
    assert load_checkpoint(checkpoint, unet, optimizer, None)["epoch"] == unet.weight[0, 0].item()
    return unet.weight[0, 0].item()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "gone": (Path.unlink, "{} is missing"),
    "torn": (lambda path: os.truncate(path, path.stat().st_size - 1), "{} has "),
    "a bit": (flip, "{} does not have the content"),
}
LISTS = {"empty": "", "torn": '{"files": {"progress.json": {"by', "other": "[]", "lacking": '{"files": {}}'}
CASES = [(name, how, said.format(name)) for name in FILES for how, said in DAMAGES.values()]
CASES += [("manifest.json", lambda path, text=text: path.write_text(text), "manifest.json ") for text in LISTS.values()]


@pytest.mark.parametrize(("name", "damage", "said"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, caplog, name, damage, said):
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    damage(tmp_path / "checkpoint_3" / name)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint_2" and held(tmp_path / "checkpoint_2") == 2
    (line,) = caplog.messages
    assert f"{tmp_path / 'checkpoint_3'} is damaged ({said}" in line and "\n" not in line and "checkpoint_2" in line
    with pytest.raises(UserError, match="checkpoint_3' cannot be resumed") as caught:
        find_checkpoint(tmp_path / "checkpoint_3")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_is_undamaged(tmp_path):
    for epoch in (1, 2):
        (save(tmp_path, epoch) / "manifest.json").unlink()
    with pytest.raises(UserError, match="checkpoint_2 .manifest.json is missing"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="nor a run folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_changed_weights_are_not_evaluated(tmp_path):
    save(tmp_path, 1)
    assert find_weights(tmp_path) == tmp_path / "checkpoint_1" / "unet.safetensors"
    flip(tmp_path / "checkpoint_1" / "unet.safetensors")
    with pytest.raises(UserError, match="unet.safetensors' is damaged .*manifest.json states"):
        find_weights(tmp_path)


def test_best_and_the_newest_stay_and_damaged_ones_do_not_count(tmp_path):
    save(tmp_path, 0, best=True)
    for epoch in (1, 2, 3):
        save(tmp_path, epoch, limit=2)
    assert names(tmp_path) == ["best", "checkpoint_0", "checkpoint_2", "checkpoint_3"]
    (tmp_path / "checkpoint_3" / "optimizer.pt").unlink()
    save(tmp_path, 4, limit=2)
    assert names(tmp_path) == ["best", "checkpoint_0", "checkpoint_2", "checkpoint_3", "checkpoint_4"]
    save(tmp_path, 5, limit=2, best=True)
    assert names(tmp_path) == ["best", "checkpoint_4", "checkpoint_5"]
    save(tmp_path, 6, limit=0)
    assert names(tmp_path) == ["best", "checkpoint_5", "checkpoint_6"]
    assert os.readlink(tmp_path / "best") == "checkpoint_5" and held(tmp_path / "best") == 5


def test_best_is_repaired_by_what_progress_states(tmp_path):
    """After a kill, for a resumed older checkpoint, and in folders that were copied with links followed."""
    for epoch in (1, 2):
        save(tmp_path, epoch, best=True)
    assert repair_best(tmp_path, 1) and os.readlink(tmp_path / "best") == "checkpoint_1"
    (tmp_path / "best").unlink()
    assert repair_best(tmp_path, 2) and os.readlink(tmp_path / "best") == "checkpoint_2"
    assert repair_best(tmp_path, None) and not (tmp_path / "best").exists()
    assert not repair_best(tmp_path, 7) and not (tmp_path / "best").exists()
    shutil.copytree(tmp_path / "checkpoint_1", tmp_path / "best")
    shutil.rmtree(tmp_path / "checkpoint_1")
    assert repair_best(tmp_path, 1) and epochs_completed(tmp_path / "best") == 1
    assert find_weights(tmp_path / "best").parent == tmp_path / "best"
    link_best(tmp_path, 2)
    assert names(tmp_path) == ["best", "checkpoint_2"] and os.readlink(tmp_path / "best") == "checkpoint_2"
    flip(tmp_path / "checkpoint_2" / "optimizer.pt")
    assert not repair_best(tmp_path, 2) and names(tmp_path) == ["checkpoint_2.damaged"]
    assert repair_best(tmp_path / "nowhere", None)


def test_epochs_come_from_name_or_progress(tmp_path):
    assert epochs_completed(tmp_path / "checkpoint_12") == 12
    (tmp_path / "progress.json").write_text(json.dumps(progress_of(7)))
    assert epochs_completed(tmp_path) == 7
    (tmp_path / "progress.json").write_text('{"ep')
    with pytest.raises(UserError, match="progress.json"):
        epochs_completed(tmp_path)


def test_a_damaged_one_of_the_same_epoch_gives_way_once_the_new_one_is_whole(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    for number in ("", "2"):
        (tmp_path / "checkpoint_1" / "optimizer.pt").write_bytes(f"torn{number}".encode())
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("gone")))
            save(tmp_path, 1)
        assert (tmp_path / "checkpoint_1" / "optimizer.pt").read_bytes() == f"torn{number}".encode()
        save(tmp_path, 1)
        assert held(tmp_path / "checkpoint_1") == 1
        assert (tmp_path / f"checkpoint_1.damaged{number}" / "optimizer.pt").read_bytes() == f"torn{number}".encode()
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1.damaged", "checkpoint_1.damaged2"]
    assert "renamed to checkpoint_1.damaged2" in caplog.text


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Every file of the folder and the folder itself, then the rename, then the list of names that holds it."""
    calls = []
    fsync, replace = os.fsync, os.replace
    path_of = {}

    def opened(path, *arguments, original=os.open):
        path_of[(descriptor := original(path, *arguments))] = Path(path)
        return descriptor

    monkeypatch.setattr(files.os, "open", opened)
    monkeypatch.setattr(files.os, "fsync", lambda number: (calls.append(("sync", path_of[number].name)), fsync(number)))
    monkeypatch.setattr(files.os, "replace", lambda old, new: (calls.append(("name", new.name)), replace(old, new)))
    save(tmp_path, 1)
    synced = {name for what, name in calls[:5] if what == "sync"}
    assert synced == {*FILES, "manifest.json", f".checkpoint_1.{os.getpid()}@{files.HOST}.tmp"}
    assert calls[5:] == [("name", "checkpoint_1"), ("sync", tmp_path.name)]
    calls.clear()
    with atomic_write(tmp_path / "a", durable=True) as temporary:
        temporary.write_text("a")
    assert calls == [("sync", temporary.name), ("name", "a"), ("sync", tmp_path.name)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if os.getuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def check_full(run: Path, before: dict, said: str) -> None:
    """A larger checkpoint is refused in one line, and nothing changes."""
    with pytest.raises(UserError) as caught:
        save(run, 2, limit=1, size=300, best=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "about 1.1 MiB" in str(caught.value) and "MiB are free" in str(caught.value)
    assert files_of(run) == before and names(run) == ["best", "checkpoint_1"]


def begin(run: Path) -> dict:
    save(run, 1, best=True)
    return files_of(run)


def test_a_disk_without_room_is_told_before_anything_is_written(small_disk, monkeypatch):
    before = begin(small_disk)
    check_full(small_disk, before, "' could not be written (too little space): about 1.1 MiB")
    # where the system states more room than there is, as under a quota
    usage = namedtuple("usage", "total used free")(2**40, 0, 2**40)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    check_full(small_disk, before, "' could not be written (No space left on device)")


@pytest.mark.parametrize("size", [300_000, 500_000], ids=["weights", "optimizer"])
def test_a_limit_met_while_writing_leaves_nothing(tmp_path, size):
    """Weights are 360 kB, the optimizer's memory twice that."""
    before, limits = begin(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        check_full(tmp_path, before, "' could not be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(tmp_path, 2, limit=1, size=300)
    assert names(tmp_path) == ["best", "checkpoint_1", "checkpoint_2"]


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_logs_lose_torn_lines_and_those_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    for epoch in range(3):
        log.write({"epoch": epoch})
    whole_text = path.read_text()
    with open(path, "a") as file:
        file.write('\0\0\n{"epoch": 3')
    JsonLines(path, keep=9)
    assert path.read_text() == whole_text
    JsonLines(path, keep=2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]
    assert names(tmp_path) == ["log.jsonl"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "b").write_text("b")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_text("c")
    assert files_of(tmp_path) == {"a/b/c": b"c"}

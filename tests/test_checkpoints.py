"""Checkpoints, atomic writes, leftovers of kills, locks of folders, full disks, and logs of one JSON object a line."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from script_tools import files_of, limited, names
from torch import nn

from ddpo_pytorch.data.sample_folder import claim_folder, part_log
from ddpo_pytorch.training import checkpoints
from ddpo_pytorch.training.checkpoints import find_checkpoint, find_weights, repair_best
from ddpo_pytorch.utils import files
from ddpo_pytorch.utils.files import DiskFull, JsonLines, atomic_folder, atomic_write, locked
from ddpo_pytorch.utils.training_state import TrainState


def trained(value: float, size: int = 3):
    """A network of constant weights, its optimizer after one step, and how far it is."""
    unet = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-9)
    unet(torch.ones(1, size)).sum().backward()
    optimizer.step()
    nn.init.constant_(unet.weight, value)
    return unet, optimizer


def save(run: Path, epoch: int, limit: int = 10, size: int = 3, best: bool = False) -> Path:
    held_out = {"best": None, "last": None, "collapsed": 0, "fingerprint": None}
    progress = {"epoch": epoch, "global_step": epoch, "skipped_updates": 0, "wandb_id": None, "held_out": held_out}
    progress |= {"tracker": {"rewards": []}, "plateau": {"previous": None, "quiet_epochs": 0}}
    return checkpoints.save_checkpoint(run, checkpoints.snapshot(*trained(epoch, size), None), progress, limit, best)


def held(checkpoint: Path) -> float:
    """The weight in a checkpoint, as it is resumed."""
    unet, optimizer = trained(0.0)
    assert checkpoints.load_checkpoint(checkpoint, unet, optimizer, None)["epoch"] == unet.weight[0, 0].item()
    return unet.weight[0, 0].item()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, caplog):
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    newest, intact = tmp_path / "checkpoint_3", files_of(tmp_path / "checkpoint_3")
    for name, damage, said in (
        ("unet.safetensors", Path.unlink, "unet.safetensors is missing"),
        ("optimizer.pt", lambda path: os.truncate(path, path.stat().st_size - 1), "optimizer.pt has "),
        ("progress.json", flip, "progress.json does not have the content"),
        ("manifest.json", lambda path: os.truncate(path, 40), "manifest.json is damaged"),
        ("manifest.json", lambda path: path.write_text('{"files": {}}'), "manifest.json does not list"),
    ):
        caplog.clear()
        damage(newest / name)
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint_2" and held(tmp_path / "checkpoint_2") == 2
        (line,) = caplog.messages
        assert f"{newest} is damaged ({said}" in line and "\n" not in line and "checkpoint_2" in line
        refused([said, "checkpoint_3' cannot be resumed"], find_checkpoint, newest)
        (newest / name).write_bytes(intact[name])


def test_no_checkpoint_is_undamaged_and_changed_weights_are_not_evaluated(tmp_path):
    save(tmp_path, 1)
    assert find_weights(tmp_path) == tmp_path / "checkpoint_1" / "unet.safetensors"
    flip(tmp_path / "checkpoint_1" / "unet.safetensors")
    refused("unet.safetensors' is damaged .*manifest.json states", find_weights, tmp_path)
    (tmp_path / "checkpoint_1" / "unet.safetensors").unlink()
    refused("checkpoint_1' is damaged .its weights are missing", find_weights, tmp_path)
    (save(tmp_path, 2) / "manifest.json").unlink()
    refused("checkpoint_2 .manifest.json is missing", find_checkpoint, tmp_path)
    refused("nor a run folder", find_checkpoint, tmp_path / "nowhere")
    (save(tmp_path, 3)).rename(tmp_path / "checkpoint_7")
    refused("its name says 7 epochs, progress.json 3", find_checkpoint, tmp_path / "checkpoint_7")


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
    best = tmp_path / "best"
    for epoch in (1, 2):
        save(tmp_path, epoch, best=True)
    assert repair_best(tmp_path, 1) and os.readlink(best) == "checkpoint_1"
    best.unlink()
    assert repair_best(tmp_path, 2) and os.readlink(best) == "checkpoint_2"
    assert repair_best(tmp_path, None) and not best.exists()
    assert not repair_best(tmp_path, 7) and not best.exists()
    (tmp_path / "checkpoint_1").rename(best)
    assert repair_best(tmp_path, 1) and checkpoints.epochs_completed(best) == 1 and find_weights(best).parent == best
    checkpoints.link_best(tmp_path, 2)
    assert names(tmp_path) == ["best", "checkpoint_2"] and os.readlink(best) == "checkpoint_2"
    flip(tmp_path / "checkpoint_2" / "optimizer.pt")
    assert not repair_best(tmp_path, 2) and names(tmp_path) == ["checkpoint_2.damaged"]
    assert repair_best(tmp_path / "nowhere", None)


def test_a_damaged_one_of_the_same_epoch_gives_way_once_the_new_one_is_whole(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    moments = tmp_path / "checkpoint_1" / "optimizer.pt"
    for number in ("", "2"):
        moments.write_text(f"torn{number}")
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(torch, "save", Mock(side_effect=OSError("gone")))
            save(tmp_path, 1)
        assert moments.read_text() == f"torn{number}"
        save(tmp_path, 1)
        assert held(tmp_path / "checkpoint_1") == 1
        assert (tmp_path / f"checkpoint_1.damaged{number}" / "optimizer.pt").read_text() == f"torn{number}"
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1.damaged", "checkpoint_1.damaged2"]
    assert "renamed to checkpoint_1.damaged2" in caplog.text


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Every file of the folder and the folder itself, then the rename, then the list of names that holds it."""
    calls, fsync, replace, own = [], os.fsync, os.replace, f"{os.getpid()}@{files.HOST}.tmp"
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("name", new.name)), replace(old, new)))
    save(tmp_path, 1)
    written = {"unet.safetensors", "optimizer.pt", "progress.json", "manifest.json"}
    assert {*calls[:5]} == written | {f".checkpoint_1.{own}"}
    assert calls[5:] == [("name", "checkpoint_1"), tmp_path.name]
    calls.clear()
    TrainState(tmp_path / "state.pt", {"seed": 0}).save(step=1)
    assert calls == [f".state.pt.{own}", ("name", "state.pt"), tmp_path.name]


def test_a_disk_without_room_is_noticed_before_or_while_writing(tmp_path, monkeypatch):
    """A larger checkpoint is refused in one line, and nothing changes. Weights are 360 kB, the moments twice that."""
    save(tmp_path, 1, best=True)
    before = files_of(tmp_path)
    usage = namedtuple("usage", "total used free")
    quotas = [(2**40, 300_000, "File too large"), (2**40, 500_000, "File too large")]  # of the weights, of the moments
    for free, limit, said in (2**20, 10**6, "too little space"), *quotas:
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _, free=free: usage(2**40, 0, free))
        with limited(limit):
            message = [f"could not be written ({said}): about 1.1 MiB", "MiB are free"]
            refused(message, save, tmp_path, 2, limit=1, size=300, best=True)
        assert files_of(tmp_path) == before and names(tmp_path) == ["best", "checkpoint_1"]
    save(tmp_path, 2, limit=1, size=300)
    assert names(tmp_path) == ["best", "checkpoint_1", "checkpoint_2"]


def test_the_next_start_removes_leftovers_of_a_kill_and_nothing_else(tmp_path):
    """Files with similar names, targets of links, and what is being written, here or by another machine, stay."""
    code = """import os, signal, sys
from ddpo_pytorch.utils.files import atomic_folder, atomic_write, locked
with locked(sys.argv[1]), atomic_write(sys.argv[1] + "/0.png") as file, atomic_folder(sys.argv[1] + "/sub/a") as folder:
    (folder / "x").write_bytes(file.read_bytes())
    os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3 and len(names(tmp_path / "sub")) == 1
    own = {".notes.tmp": b"1", "x.12.tmp": b"2", ".12.tmp": b"3"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".link.1.tmp").symlink_to(tmp_path / "x.12.tmp")
    with locked(tmp_path):
        assert {name: content for name, content in files_of(tmp_path).items() if name != files.LOCK} == own
    assert files_of(tmp_path) == own and names(tmp_path / "sub") == []

    foreign = tmp_path / ".cache.npy.1234567@elsewhere.tmp"
    foreign.touch()
    with atomic_write(tmp_path / "cache.npy") as file, atomic_folder(tmp_path / "best") as folder:
        files.remove_leftovers(tmp_path)
        assert foreign.exists()
        file.write_text("new")
        (folder / "a").write_text("new")
    os.utime(foreign, (0, foreign.stat().st_mtime - files.ABANDONED_AFTER - 1))
    files.remove_leftovers(tmp_path)
    assert files_of(tmp_path) == own | {"cache.npy": b"new", "best/a": b"new"}


def test_files_can_be_read_by_all_whom_the_umask_allows(tmp_path):
    """Also those that a library had written for their owner alone, as safetensors does."""
    code = """if 1:
    import sys, os
    os.umask(0o027)
    import torch
    from safetensors.torch import save_file
    from ddpo_pytorch.utils.files import atomic_folder, atomic_write
    with atomic_folder(sys.argv[1] + "/folder") as folder, atomic_write(sys.argv[1] + "/file") as file:
        for path in (folder / "weights", file):
            save_file({"x": torch.zeros(1)}, path)
            path.chmod(0o600)"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("folder/weights", "file")] == [0o640] * 2
    assert names(tmp_path) == ["file", "folder"]


def test_files_can_be_written_where_modes_cannot_be_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "chmod", Mock(side_effect=OSError(errno.ENOTSUP, "Not supported")))
    with atomic_write(tmp_path / "file") as file:
        os.chmod(file, 0o600)
    assert names(tmp_path) == ["file"] and Path.chmod.called


@pytest.mark.parametrize("flock", [fcntl.flock, Mock(side_effect=OSError(errno.ENOTSUP, "not supported"))])
def test_a_folder_has_one_writer(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "new" / "out"
    with locked(folder):
        refused(f"{folder}.*another --output", locked(folder, "another --output").__enter__)
    assert names(folder) == []
    folder.rmdir()
    with pytest.raises(ValueError), locked(folder):
        raise ValueError
    assert not folder.exists() and folder.parent.is_dir()
    with locked(folder):
        (folder / "x").touch()
    assert names(folder) == ["x"]
    for bad in (folder / "x", folder / "x" / "in"):
        refused("not a folder", locked(bad).__enter__)


def test_workers_do_not_keep_the_lock_of_a_process_that_ended(tmp_path):
    """Workers of a data loader are forks and outlive a killed parent by some seconds."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2, timeout=30)
    worker = context.Process(target=lambda: [together.wait() for _ in ("locked", "unlocked")])
    with locked(tmp_path):
        worker.start()
        together.wait()
    with locked(tmp_path):
        together.wait()
    worker.join()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "out.json" / "own").mkdir(parents=True)
    refused(f"'{tmp_path}/out.json' already exists", files.write_json, tmp_path / "out.json", {})
    assert files_of(tmp_path) == {} and (tmp_path / "out.json" / "own").is_dir()
    refused("none can be made there", locked("/proc/x").__enter__)


def test_a_full_disk_leaves_old_files_and_whole_lines(tmp_path):
    def write_weights(path):
        with atomic_write(path) as temporary:
            save_file({"x": torch.ones(20_000)}, temporary)

    for name, write in (
        ("json", lambda path: files.write_json(path, ["x" * 20_000])),
        ("safetensors", write_weights),
        ("state", lambda path: TrainState(path, {"seed": 0}).save(weights=torch.ones(20_000))),
        ("settings", lambda path: claim_folder(path, {"x": "y" * 20_000}, {})),
    ):
        path = tmp_path / name
        if name != "settings":  # a folder
            path.write_text("old")
        before = files_of(tmp_path)
        with limited(9000), pytest.raises(DiskFull, match=f"{name}.*MiB are free"):
            write(path)
        assert files_of(tmp_path) == before
        write(path)
        assert files_of(tmp_path) != before

    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.write({"epoch": 0})
    with limited(40), pytest.raises(DiskFull, match="log.jsonl"):
        log.write({"epoch": 1, "text": "x" * 100})
    assert path.read_bytes() == b'{"epoch": 0}\n'
    log.write({"epoch": 1, "loss": float("nan")})
    assert path.read_bytes() == b'{"epoch": 0}\n{"epoch": 1, "loss": null}\n'
    with limited(40), pytest.raises(DiskFull, match="image_log.part0"):
        part_log(tmp_path, 0).write({"path_to_img": "x" * 100})


def test_a_resumed_log_loses_damaged_and_repeated_lines(tmp_path, caplog):
    path, lines = tmp_path / "metrics.jsonl", [json.dumps({"epoch": epoch, "reward": 0.1}) for epoch in range(4)]
    for content, keep, kept, damaged in (
        ("\n".join(lines), None, [0, 1, 2, 3], None),  # only the newline is missing
        ("\n".join(lines) + "\n\n", 3, [0, 1, 2], None),
        ("\n".join(lines)[:-3], 4, [0, 1, 2], 4),
        ("\n".join([lines[0], "\0\0\0", lines[2], ""]), 4, [0, 2], 2),
        ('{"epoch": "0"}\n' + lines[1], 4, [1], 1),
        ("[" * 10**5 + "\n" + lines[0], 4, [0], 1),
    ):
        caplog.clear()
        path.write_text(content)
        JsonLines(path, keep=keep).write({"epoch": 9})
        assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [*kept, 9]
        assert [f"{path}: removed line {damaged}," in message for message in caplog.messages] == [True] * bool(damaged)

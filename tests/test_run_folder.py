"""The same command again: what goes on, from where, what is refused, and that no two runs share a folder."""

import json
import logging
import os
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, run_script
from rl_tools import as_flags
from script_tools import files_of, load_module

from ddpo_pytorch.training import run_folder
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import LOCK, locked

TIMES = {"rollout_samples_per_second", "update_samples_per_second", "peak_memory_gib", "seconds"}


@pytest.fixture(autouse=True)
def light(settings, script, monkeypatch):
    """Four samples of two steps and two updates an epoch; in this process, grids are drawn by nobody."""
    settings |= {"sample.num_steps": 2, "sample.num_batches_per_epoch": 1, "train.batch_size": 2}
    settings |= {"sample.guidance_scale": 1.0, "train.cfg": False}
    monkeypatch.setattr(script, "epoch_time", lambda *_: "no time")
    monkeypatch.setattr(script, "save_grid", lambda *arguments: arguments[-1].write_bytes(b"16 images"))


def untimed(epochs: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in epochs]


def assert_same_run(left, right, epoch: int) -> None:
    """Logs apart from times, and everything in a checkpoint."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    assert untimed(logs[0]) == untimed(logs[1]) and [entry["epoch"] for entry in logs[0]] == list(range(epoch))
    assert files_of(left / f"checkpoint_{epoch}") == files_of(right / f"checkpoint_{epoch}")
    for one in (left, right):
        assert (one / f"grid_{epoch:04d}.png").is_file()


def test_the_same_command_goes_on(train, caplog):
    """With more epochs, which may change; and after the newest checkpoint was damaged, from the one before."""
    caplog.set_level(logging.INFO)
    reference, _ = train(num_epochs=4, run_name="whole")
    folder, _ = train(num_epochs=2)
    again, _ = train(num_epochs=3)
    assert again == folder and f"resumed from {folder / 'checkpoint_2'} after 2 epochs" in caplog.text
    (folder / "checkpoint_3" / "optimizer.pt").write_bytes(b"torn")
    caplog.clear()
    train(num_epochs=4, save_freq=2, num_checkpoint_limit=9, early_stop__tolerance=1e-9)
    assert f"{folder / 'checkpoint_3'} is damaged (optimizer.pt has 4 bytes instead of" in caplog.text
    assert f"resumed from {folder / 'checkpoint_2'} after 2 epochs" in caplog.text
    assert_same_run(reference, folder, 4)
    assert (folder / "checkpoint_3.damaged" / "optimizer.pt").read_bytes() == b"torn"
    assert not (folder / "checkpoint_3").exists()
    before = files_of(folder)
    caplog.clear()
    train(num_epochs=4)
    assert "nothing left to do" in caplog.text and files_of(folder) == before


def test_resume_from_a_run_passes_over_what_is_damaged(train):
    reference, _ = train(num_epochs=3, run_name="whole")
    folder, _ = train(num_epochs=2)
    (folder / "checkpoint_2" / "manifest.json").write_text("torn")
    shutil.copytree(folder, folder.with_name("copy"))
    train(num_epochs=3, resume_from=str(folder))
    assert_same_run(reference, folder, 3)
    # the one before by its own name: a newer one that is damaged protects nothing
    copy, _ = train(num_epochs=3, resume_from=str(folder.with_name("copy") / "checkpoint_1"))
    assert_same_run(reference, copy, 3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train__learning_rate": 2e-2}, "train.learning_rate=0.01, now it is 0.02"),
        ({"seed": 1, "train__clip_range": 1.0}, "seed=42, now it is 1"),
        ({"train__lora_targets": ("to_q",)}, "train.lora_targets"),
        ({"use_lora": False}, "use_lora=True, now it is False"),
        ({"reward_fn": "jpeg_compressibility"}, "reward_fn='isic_classifier_reward', now it is 'jpeg_compressibility'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_other_settings_are_refused(train, tmp_path, changed, said):
    """Also before there is a checkpoint; a folder's settings are the only thing that is looked at."""
    folder = tmp_path / "logs" / "run"
    train(num_epochs=1, save_freq=5)
    before = files_of(folder)
    with pytest.raises(UserError) as caught:
        train(**changed)
    message = str(caught.value)
    assert f"run folder {str(folder)!r} exists already and was begun with" in message and said in message
    assert "another --config.run_name" in message and f"--config.resume_from={folder}" in message
    assert "\n" not in message and files_of(folder) == before


def test_another_number_of_processes_is_refused(train):
    """The samples of an epoch are those of each process times their number."""
    folder, _ = train(num_epochs=1)
    config = json.loads((folder / "config.json").read_text())
    assert config["processes"] == 1 and config["train"]["learning_rate"] == 1e-2
    (folder / "config.json").write_text(json.dumps(config | {"processes": 2}))
    with pytest.raises(UserError, match="processes=2, now it is 1"):
        train()
    # a field of another version of the program is not compared
    (folder / "config.json").write_text(json.dumps(config | {"forgotten": 3}))
    train(num_epochs=2)


@pytest.mark.parametrize(
    ("unread", "read"),
    [
        ({}, {"base_log_path": "elsewhere"}),
        ({"reward_fn_kwargs.fundus_alignment.judges": "elsewhere"}, {"reward_fn": "fundus_alignment"}),
        ({"held_out.classifier": "elsewhere", "held_out.images_per_prompt": 9}, {"held_out.every": 2}),
        ({"per_prompt_stat_tracking.buffer_size": 9}, {"train.advantage": "per_prompt"}),
        ({"train.lora_rank": 9, "train.lora_targets": ("to_q",)}, {"use_lora": True}),
    ],
    ids=["places", "rewards", "held out", "statistics", "adapters"],
)
def test_settings_that_nothing_reads_may_change(unread, read):
    """So that a run folder that was copied elsewhere can be continued there."""
    usual = {"train.advantage": "group", "use_lora": False, "reward_fn": "jpeg_compressibility"}
    names = ("logdir", "reward_fn_kwargs.isic_classifier_reward.classifier", "metric.cache_dir", "sd.cache_dir")
    usual |= dict.fromkeys(names, "here")

    def changed(common, fields):
        one, two = (load_module(ROOT / "config" / "base.py").get_config() for _ in range(2))
        one.update_from_flattened_dict(usual | common)
        two.update_from_flattened_dict(usual | common | fields | dict.fromkeys(names, "there"))
        return difference(*run_folder._comparable(json.loads(json.dumps(one.to_dict())), two.to_dict()))

    assert changed({}, unread) is None
    if unread:
        assert changed(read | {names[1]: "there"}, unread)[0].split("[")[0] in unread
        assert changed({}, read)[0] in read


def test_after_resuming_with_other_settings_the_same_command_is_that_one(train):
    folder, _ = train(num_epochs=1)
    train(num_epochs=2, resume_from=str(folder), train__learning_rate=1e-3)
    with pytest.raises(UserError, match="train.learning_rate=0.001, now it is 0.01"):
        train(num_epochs=3)
    train(num_epochs=3, train__learning_rate=1e-3)
    assert sorted(path.name for path in folder.glob("config*")) == [
        "config.json",
        "config_0001.json",
        "config_0002.json",
    ]


def test_a_run_without_a_checkpoint_begins_anew(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    reference, _ = train(run_name="whole")
    folder = tmp_path / "logs" / "run"
    folder.mkdir()
    (folder / LOCK).touch()  # killed at once
    (folder / ".config.json.9999999.tmp").write_text('{"seed": 4')  # or a little later
    train()
    assert_same_run(reference, folder, 2)
    for left in (*folder.glob("checkpoint_*"), folder / "grid_0002.png"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (folder / ".checkpoint_1.9999999.tmp").mkdir()
    log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(log[0] + log[1][:20])
    train()
    assert f"{folder} has no checkpoint yet" in caplog.text
    assert_same_run(reference, folder, 2)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    for left in folder.glob("checkpoint_*"):
        shutil.rmtree(left)
    with pytest.raises(UserError, match="has a log of epochs but their checkpoints are gone"):
        train()


def test_a_folder_of_something_else_is_left_alone(train, tmp_path):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already, and it holds no config.json; choose another"):
        train()
    (folder / "config.json").write_text('{"seed": 4')
    with pytest.raises(UserError, match="exists already, and its config.json is damaged; choose another"):
        train()
    assert set(files_of(folder)) == {"letters.txt", "config.json"}


def test_a_run_that_stopped_by_itself_is_over(train, caplog):
    caplog.set_level(logging.INFO)
    stopping = {"num_epochs": 6, "early_stop__patience": 1, "early_stop__tolerance": 10.0}
    folder, epochs = train(**stopping)
    assert len(epochs) == 2
    before = files_of(folder)
    again, epochs = train(**stopping)
    assert len(epochs) == 2 and files_of(folder) == before
    assert f"nothing left to do: {folder} has 2 epochs, mean reward changed by less than 10 for 1" in caplog.text
    _, epochs = train(num_epochs=3)
    assert len(epochs) == 3


def test_saving_again_writes_only_what_is_not_there(train, script, monkeypatch, caplog):
    """And counts of skipped updates outlive a run."""
    records = []

    def opened(*arguments, original=script.open_run_state):
        records.append(original(*arguments))
        return records[-1]

    monkeypatch.setattr(script, "open_run_state", opened)
    folder, _ = train(num_epochs=1)
    checkpoint, state = folder / "checkpoint_1", records[0]
    unet, written = torch.nn.Linear(2, 2), {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    arguments = unet, torch.optim.AdamW(unet.parameters())
    state.save(*arguments)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == written
    kept = files_of(checkpoint)
    (checkpoint / "progress.json").write_text("{}")
    state.skipped_updates = 3
    state.save(*arguments)
    assert files_of(folder / "checkpoint_1.damaged") == kept | {"progress.json": b"{}"}
    assert "renamed to checkpoint_1.damaged" in caplog.text
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress["skipped_updates"] == 3 and progress["epoch"] == 1


def test_skipped_updates_are_restored(train, script, monkeypatch):
    folder, _ = train(num_epochs=1)
    assert json.loads((folder / "checkpoint_1" / "progress.json").read_text())["skipped_updates"] == 0

    def opened(*arguments, original=script.open_run_state):
        record = original(*arguments)
        record.skipped_updates += 2
        return record

    monkeypatch.setattr(script, "open_run_state", opened)
    train(num_epochs=2)
    train(num_epochs=3)
    assert json.loads((folder / "checkpoint_3" / "progress.json").read_text())["skipped_updates"] == 4


def test_a_damaged_copy_of_best_is_quarantined(train, tmp_path):
    """As in a run folder that was copied with its links followed."""
    folder, _ = train(num_epochs=1)
    shutil.copytree(folder / "checkpoint_1", folder / "best")
    (folder / "best" / "optimizer.pt").unlink()
    train(num_epochs=2)
    assert (folder / "best.damaged").is_dir() and not (folder / "best").exists()


def test_a_run_folder_is_one_runs_alone(train, tmp_path):
    folder = tmp_path / "logs" / "run"
    train(num_epochs=1)
    before = files_of(folder)
    for given in ({}, {"resume_from": str(folder)}, {"resume_from": str(folder / "checkpoint_1")}):
        with locked(folder), pytest.raises(UserError) as caught:
            train(num_epochs=2, **given)
        other = "run" if given else "--config.run_name"
        message = f"{str(folder)!r} is being written by another run; wait for its end or choose another {other}"
        assert str(caught.value) == message and files_of(folder) == before
    with pytest.raises(UserError, match="use_lora=True, now it is False"):
        train(num_epochs=2, use_lora=False)  # the lock went with the error
    train(num_epochs=2)
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_all_processes_of_a_second_run_end(settings, tmp_path):
    folder = tmp_path / "logs" / "run"
    with locked(folder):
        result = run_script("train.py", *as_flags(settings), processes=2)
    assert result.returncode
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        f"error: {str(folder)!r} is being written by another run; wait for its end or choose another --config.run_name"
    ]
    assert result.stderr.count("exitcode  : 2") == 2 or result.stderr.count("exitcode: 2") >= 1
    assert files_of(folder) == {}


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_then_goes_on(settings, tmp_path):
    if os.getuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    disk, flags = tmp_path / "disk", {"num_epochs": 4, "num_checkpoint_limit": 9}
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        full = run_script("train.py", *as_flags(settings, **flags, logdir=str(disk)))
        assert full.returncode == 2 and "Traceback" not in full.stderr
        (line,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
        number = len(list((disk / "run").glob("checkpoint_*")))
        checkpoint = disk / "run" / f"checkpoint_{number + 1}"
        assert f"{str(checkpoint)!r} could not be written (too little space): about 0." in line and number
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        again = run_script("train.py", *as_flags(settings, **flags, logdir=str(disk)))
        assert again.returncode == 0, again.stderr
        assert f"resumed from {disk / 'run' / f'checkpoint_{number}'} after {number} epochs" in again.stderr
        whole = run_script("train.py", *as_flags(settings, **flags))
        assert whole.returncode == 0, whole.stderr
        assert_same_run(tmp_path / "logs" / "run", disk / "run", 4)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)

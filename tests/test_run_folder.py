"""The same command again: what is resumed, from where, what is refused, and that no two runs share a folder."""

import json
import logging
import shutil

import pytest
from launching import run_script
from rl_tools import as_flags
from script_tools import files_of

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import LOCK, locked

TIMES = {"rollout_samples_per_second", "update_samples_per_second", "peak_memory_gib", "seconds"}


@pytest.fixture(autouse=True)
def light(settings):
    """Four samples of two steps and two updates an epoch."""
    settings |= {"sample.num_steps": 2, "sample.num_batches_per_epoch": 1, "train.batch_size": 2}
    settings |= {"sample.guidance_scale": 1.0, "train.cfg": False}


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
    copied = shutil.copytree(folder, folder.with_name("copy"))
    (copied / "checkpoint_2" / "manifest.json").write_text("torn")
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
    # the one before by its own name: a newer one that is damaged protects nothing
    train(num_epochs=4, resume_from=str(copied / "checkpoint_1"))
    assert_same_run(reference, copied, 4)
    assert "run_name 'run' is not used" in caplog.text


def test_other_settings_are_refused(train, tmp_path):
    """Also before there is a checkpoint; a folder's settings are the only thing that is looked at."""
    folder = tmp_path / "logs" / "run"
    train(num_epochs=1, save_freq=5)
    before, config = files_of(folder), json.loads((folder / "config.json").read_text())
    for changed, said in (
        ({"train__learning_rate": 2e-2}, "train.learning_rate=0.01, now it is 0.02"),
        ({"seed": 1, "train__clip_range": 1.0}, "seed=42, now it is 1"),
        ({"train__lora_targets": ("to_q",)}, "train.lora_targets"),
        ({"reward_fn": "jpeg_compressibility"}, "reward_fn='isic_classifier_reward', now it is 'jpeg_compressi"),
    ):
        with pytest.raises(UserError) as caught:
            train(**changed)
        message = str(caught.value)
        assert f"run folder {str(folder)!r} exists already and was begun with" in message and said in message
        assert "another --config.run_name" in message and f"--config.resume_from={folder}" in message
        assert "\n" not in message and files_of(folder) == before
    # the samples of an epoch are those of each process times their number
    (folder / "config.json").write_text(json.dumps(config | {"processes": 2}))
    with pytest.raises(UserError, match="processes=2, now it is 1"):
        train()
    # a field of another version of the program is not compared
    (folder / "config.json").write_text(json.dumps(config | {"forgotten": 3}))
    train(num_epochs=2)


def test_settings_that_nothing_reads_may_change(rl, own_model, tmp_path):
    """So that a run folder that was copied elsewhere can be continued there."""
    usual = {"train.advantage": "group", "sample.images_per_prompt": 2, "use_lora": False}
    unread = {"reward_fn_kwargs.fundus_alignment.judges": "elsewhere", "held_out.images_per_prompt": 9}
    unread |= {"per_prompt_stat_tracking.buffer_size": 9, "train.lora_rank": 9, "sd.cache_dir": "elsewhere"}
    folder = rl.train(**usual)
    rl.train(num_epochs=2, **usual | unread)
    assert (folder / "checkpoint_2").is_dir()
    with pytest.raises(UserError, match="sample.images_per_prompt=2, now it is 4"):
        rl.train(num_epochs=3, **usual | unread | {"sample.images_per_prompt": 4})


def test_after_resuming_with_other_settings_the_same_command_is_that_one(train):
    folder, _ = train(num_epochs=1)
    train(num_epochs=2, resume_from=str(folder), train__learning_rate=1e-3)
    with pytest.raises(UserError, match="train.learning_rate=0.001, now it is 0.01"):
        train(num_epochs=3)
    train(num_epochs=3, train__learning_rate=1e-3)
    assert {path.name for path in folder.glob("config_*")} == {"config_0001.json", "config_0002.json"}


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
    with pytest.raises(UserError, match="the checkpoints of run folder .* are gone"):
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


def test_a_run_folder_is_one_runs_alone(train, tmp_path):
    folder = tmp_path / "logs" / "run"
    train(num_epochs=1)
    before = files_of(folder)
    for given in ({}, {"resume_from": str(folder)}, {"resume_from": str(folder / "checkpoint_1")}):
        with locked(folder), pytest.raises(UserError, match=f"{str(folder)!r} is being written"):
            train(num_epochs=2, **given)
        assert files_of(folder) == before
    with pytest.raises(UserError, match="use_lora=True, now it is False"):
        train(num_epochs=2, use_lora=False)  # the lock went with the error
    train(num_epochs=2)
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_all_processes_of_a_second_run_end(settings, tmp_path):
    folder = tmp_path / "logs" / "run"
    with locked(folder):
        result = run_script("train.py", *as_flags(settings), processes=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(lines) == 1 and f"{str(folder)!r} is being written" in lines[0]
    assert files_of(folder) == {}

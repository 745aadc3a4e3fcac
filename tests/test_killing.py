"""train.py is killed, at random and before every write of a checkpoint; the same command ends as if it never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script, warm_server
from rl_tools import as_flags
from script_tools import files_of
from test_run_folder import untimed

pytestmark = pytest.mark.slow
KILLS = 10


@pytest.fixture
def tiny(held_out):
    """Four samples of two steps an epoch, an evaluation of three images after each, a checkpoint of each."""
    held_out |= {"sample.num_steps": 2, "sample.num_batches_per_epoch": 1, "train.batch_size": 2, "train.cfg": False}
    held_out |= {"sample.guidance_scale": 1.0, "held_out.images_per_prompt": 1, "num_checkpoint_limit": 2}
    return held_out


def content(folder: Path) -> dict:
    """All that a run leaves, without the times and the settings of each start."""
    files = {name: data for name, data in files_of(folder).items() if not name.startswith("config_")}
    files["metrics.jsonl"] = untimed([json.loads(line) for line in files["metrics.jsonl"].splitlines()])
    config = json.loads(files.pop("config.json"))
    return files | {
        "best": os.readlink(folder / "best"),
        "config": {key: value for key, value in config.items() if key != "run_name"},
    }


def start(flags: list[str], errors: Path, *launcher: str) -> subprocess.Popen:
    settings = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with open(errors, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "tests/warm.py", "scripts/train.py", *flags],
            cwd=ROOT,
            env=os.environ | settings | warm_server(),
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


def test_random_kills_change_nothing(tiny, tmp_path):
    """The moments lie between half of the time to the first epoch's end, and some epochs later."""
    epochs, errors, logs = 8, tmp_path / "errors.txt", tmp_path / "logs"
    warm_server()  # its start is not the script's
    began = time.perf_counter()
    process, first = start(as_flags(tiny, run_name="whole", num_epochs=epochs), errors), None
    while process.poll() is None:
        if first is None and (logs / "whole" / "metrics.jsonl").is_file():
            first = time.perf_counter() - began
        time.sleep(0.005)
    assert process.returncode == 0, errors.read_text()
    whole = time.perf_counter() - began
    expected = content(logs / "whole")
    assert len(expected["metrics.jsonl"]) == epochs and expected["best"].startswith("checkpoint_")
    drawn_moments, kills, runs, reached = random.Random(0), 0, 0, set()
    while kills < KILLS:
        runs += 1
        name = f"run{runs}"
        flags = as_flags(tiny, run_name=name, num_epochs=epochs)
        while True:
            process = start(flags, errors)
            try:
                delay = drawn_moments.uniform(first / 2, first + 3 * (whole - first) / epochs)
                process.wait(delay if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                reached.update(path.name for path in (logs / name).glob("checkpoint_*"))
                continue
            assert process.returncode == 0, errors.read_text()[-3000:]
            break
        assert content(logs / name) == expected
    assert len(reached) > 3  # kills fell into different epochs
    print(f"{kills} kills in {runs} runs, {len(reached)} checkpoints; whole run {whole:.1f} s, first {first:.1f} s")


def test_a_kill_before_any_write_of_a_checkpoint_changes_nothing(tiny, tmp_path):
    values = tiny | {"num_epochs": 3, "num_checkpoint_limit": 1}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    result = run_script("../tests/killed_saves.py", tmp_path / "settings.json")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["points"] >= 20 and set(found["epochs"]) == {"1", "2"} and min(found["epochs"].values()) > 3, found


def test_two_processes_go_on_after_a_kill(tiny, tmp_path):
    errors, logs = tmp_path / "errors.txt", tmp_path / "logs"
    flags = {"num_epochs": 3, "sample.batch_size": 2}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable)
    process = start(as_flags(tiny, run_name="run", **flags), errors, *launcher)
    while not (logs / "run" / "checkpoint_1").is_dir():
        assert process.poll() is None, errors.read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (process.pid, *map(int, children)):
        os.kill(number, signal.SIGKILL)
    process.wait()
    again = run_script("train.py", *as_flags(tiny, run_name="run", **flags), processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed from" in again.stderr
    whole = run_script("train.py", *as_flags(tiny, run_name="whole", **flags), processes=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert content(logs / "run") == content(logs / "whole")

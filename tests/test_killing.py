"""train.py is killed at random, before every write, or asked to stop: the same command completes the run."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from launching import Script, run_script
from rl_tools import LIGHT, as_flags, content, weights
from script_tools import succeed
from stage_tools import assert_equal

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(held_out):
    """Four samples of two steps an epoch, an evaluation of three images after each, a checkpoint of each."""
    held_out |= LIGHT | {"held_out.images_per_prompt": 1, "num_checkpoint_limit": 2}
    return held_out


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def test_random_kills_change_nothing(tiny, tmp_path):
    """The moments lie, in turn, before a start's first epoch ends, about one epoch later, and two."""
    run_script("train.py", "--help")  # the start of the server is not the script's
    epochs, logs, began, first = 8, tmp_path / "logs", time.perf_counter(), None
    script = Script("scripts/train.py", *as_flags(tiny, run_name="whole", num_epochs=epochs))
    while script.poll():
        if first is None and lines(logs / "whole"):
            first = time.perf_counter() - began
        time.sleep(0.005)
    assert script.result().returncode == 0
    per_epoch = (time.perf_counter() - began - first) / epochs
    expected, moments, reached = content(logs / "whole"), random.Random(0), set()
    assert len(expected["metrics.jsonl"]) == epochs and expected["best"].startswith("checkpoint_")
    kills = runs = 0
    while kills < 3:
        runs += 1
        run, killed = logs / f"run{runs}", True
        flags = as_flags(tiny, run_name=run.name, num_epochs=epochs)
        while killed:
            least, script = lines(run) + kills % 3, Script("scripts/train.py", *flags)
            while kills < 3 and script.poll() and lines(run) < least:
                time.sleep(0.005)
            script.wait(300 if kills == 3 else moments.uniform(0, 2 * per_epoch if kills % 3 else first))
            if killed := script.poll():
                script.kill()
                kills += 1
                reached.update(path.name for path in run.glob("checkpoint_*"))
        result = script.result()
        assert result.returncode == 0, result.stderr[-3000:]
        assert content(run) == expected
    assert len(reached) > 2  # kills fell into different epochs


def test_a_kill_before_any_write_of_a_checkpoint_changes_nothing(tiny, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(tiny | {"num_epochs": 3, "num_checkpoint_limit": 1}))
    found = json.loads(succeed("../tests/killed_saves.py", tmp_path / "settings.json").stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["points"] >= 20 and set(found["epochs"]) == {"1", "2"} and min(found["epochs"].values()) > 3, found


def test_two_processes_go_on_after_a_kill(tiny, tmp_path):
    logs, settings = tmp_path / "logs", tiny | {"num_epochs": 3, "sample.batch_size": 2}
    script = Script("scripts/train.py", *as_flags(settings, run_name="run"), processes=2)
    script.kill_when((logs / "run" / "checkpoint_1").is_dir)
    assert "resumed from" in succeed("train.py", *as_flags(settings, run_name="run"), processes=2).stderr
    succeed("train.py", *as_flags(settings, run_name="whole"), processes=2)
    assert content(logs / "run") == content(logs / "whole")


def test_a_run_that_is_asked_to_stop_saves_and_is_resumed(tiny, train, tmp_path):
    tiny |= {"save_freq": 1000, "held_out.every": 0}
    run = tmp_path / "logs" / "run"
    script = Script("scripts/train.py", *as_flags(tiny, num_epochs=1000))
    while lines(run) < 2:
        assert script.poll(), script.result().stderr
        time.sleep(0.01)
    os.kill(script.pid, signal.SIGTERM)
    result = script.result()
    assert result.returncode == 0 and "SIGTERM: stopping" in result.stderr and "Traceback" not in result.stderr
    epochs = int(re.search(r"stopped on request .*after (\d+) epochs", result.stderr)[1])
    assert epochs >= 2 and [path.name for path in run.glob("checkpoint_*")] == [f"checkpoint_{epochs}"]
    ended, expected = (train(num_epochs=epochs + 1, run_name=name)[0] for name in ("run", "whole"))
    assert_equal(weights(ended, epochs + 1), weights(expected, epochs + 1))

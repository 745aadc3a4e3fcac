"""train.py on SIGTERM and SIGUSR1: it saves, ends with 0, and the same command goes on to the same end."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script, warm_server
from rl_tools import as_flags, weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(settings, tmp_path, number):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    rare = {"save_freq": 1000, "train__learning_rate": 1e-3}
    command = [sys.executable, "tests/warm.py", "scripts/train.py", *as_flags(settings, num_epochs=1000, **rare)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | warm_server(), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{number.name}: stopping" in errors and "Traceback" not in errors
    epochs = int(re.search(r"stopped on request .*after (\d+) epochs", errors)[1])
    assert epochs >= 2 and [path.name for path in log.parent.glob("checkpoint_*")] == [f"checkpoint_{epochs}"]

    again = run_script("train.py", *as_flags(settings, num_epochs=epochs + 1, **rare))
    whole = run_script("train.py", *as_flags(settings, num_epochs=epochs + 1, run_name="whole", **rare))
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert f"resumed from {log.parent / f'checkpoint_{epochs}'}" in again.stderr
    ended, expected = (weights(tmp_path / "logs" / name, epochs + 1) for name in ("run", "whole"))
    assert all(torch.equal(ended[key], expected[key]) for key in expected)

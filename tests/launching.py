"""`accelerate launch` with the files of config/accelerate, for real but on CPUs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, warm_server


def cpu_settings() -> dict[str, str]:
    """Return the environment of a script that runs on a CPU, without network, and from tests/warm.py."""
    settings = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return settings | {"CUDA_VISIBLE_DEVICES": ""} | warm_server()


def start(config: str, flags: dict, *arguments, **environment) -> subprocess.Popen:
    """Start `accelerate launch --config_file config/accelerate/<config> <flags> <arguments>` in the repository root."""
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(
        [
            *(sys.executable, "tests/warm.py", shutil.which("accelerate", path=Path(sys.executable).parent), "launch"),
            *("--config_file", f"config/accelerate/{config}", *options, "--no_python"),
            *(sys.executable, "tests/warm.py", *(str(argument) for argument in arguments)),
        ],
        cwd=ROOT,
        env=os.environ | cpu_settings() | {key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Standard error of a launch, which must succeed."""
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-5000:]
    return errors


def launch(config: str, flags: dict, *arguments, **environment) -> str:
    return finish(start(config, flags, *arguments, **environment))

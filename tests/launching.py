"""Scripts in processes of their own, forked from a server that has imported the libraries.

Importing torch, diffusers, transformers and timm takes about six seconds of a script's start, and the tests start many.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    *("torch", "torchvision", "accelerate", "absl.app", "ml_collections.config_flags", "timm", "peft", "scipy.stats"),
    *("diffusers.loaders", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.pipelines"),
    *("transformers.models.clip.modeling_clip", "transformers.models.bert.modeling_bert", "matplotlib.figure"),
    *("pandas", "torchmetrics"),
)
ON_CPU = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*LIBRARIES, "fastapi", "uvicorn"])


def write_experiment(path: Path, fields: dict) -> Path:
    """Write an experiment as a user writes one: config/base.py in full precision, with other values of these fields."""
    path.write_text(f"""
import runpy

def get_config():
    config = runpy.run_path({str(ROOT / "config" / "base.py")!r})["get_config"]()
    config.update_from_flattened_dict({fields | {"mixed_precision": "no"}!r})
    return config
""")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _become(cwd: Path, arguments: list[str], environment: dict[str, str], streams: list[str]) -> None:
    """Be the script, with this environment and files in place of the standard streams."""
    gc.freeze()  # the libraries are no garbage, and collections that look at them take half a second each
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [os.path.dirname(os.path.abspath(arguments[0])), *environment["PYTHONPATH"].split(os.pathsep)]
    sys.argv[:] = arguments
    runpy.run_path(arguments[0], run_name="__main__")


class Script:
    """`processes` processes of a script, started as by torchrun, and what they print."""

    def __init__(self, path: str | Path, *options: object, processes: int = 1, cwd: Path = ROOT, **environment: object):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # until nobody needs this object
        streams, port = [f"{self.folder.name}/{name}" for name in ("stdout", "stderr")], free_port()
        self.processes = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            own = os.environ | ON_CPU | (ranks if processes > 1 else {}) | environment
            given = [str(path), *map(str, options)], {key: str(value) for key, value in own.items()}, streams
            self.processes.append(FORKS.Process(target=_become, args=(cwd, *given)))
            self.processes[-1].start()
        self.pid = self.processes[0].pid

    def said(self, stream: str = "stderr") -> str:
        path = Path(self.folder.name, stream)
        return path.read_text() if path.exists() else ""

    def poll(self) -> bool:
        """Return whether it still runs; when one process fails, the others are given some seconds to notice."""
        if any(process.exitcode for process in self.processes):
            self.wait(20)
            self.kill()
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill_when(self, condition: Callable[[], object]) -> None:
        while self.poll() and not condition():
            time.sleep(0.01)
        self.kill()

    def result(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end; the status is the first that is not 0."""
        end = time.monotonic() + timeout
        while self.poll() and time.monotonic() < end:
            self.processes[0].join(0.05)
        self.kill()
        status = next((process.exitcode for process in self.processes if process.exitcode), 0)
        return subprocess.CompletedProcess([], status, self.said("stdout"), self.said())


def run_script(name: object, *options: object, timeout: float = 300, **kwargs) -> subprocess.CompletedProcess:
    """Run `scripts/<name> ...` from the repository root."""
    return Script(f"scripts/{name}", *options, **kwargs).result(timeout)


def launcher_environment(config: str, **flags: object) -> dict[str, str]:
    """Return what `accelerate launch --config_file config/accelerate/<config> <flags>` adds to the environment."""
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    words = ["--config_file", str(ROOT / "config" / "accelerate" / config), *options, "script"]
    environment = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}

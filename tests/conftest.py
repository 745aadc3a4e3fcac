"""Shared fixtures: the optional folder of real data, a tiny Stable Diffusion, and real runs of the scripts."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.phantoms.skin import write_world

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["script_tools", "rl_tools"]

# Each worker of pytest-xdist keeps to a core of its own, with all that it starts: processes that share their cores with
# others would wait for each other's threads, several times as long as the work takes.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def forget_accelerator():
    """Accelerate keeps its precision and processes for the life of this process; the next test may want others."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and real images, next to the checkout or named by DDPO_SHARED."""
    folder = Path(os.environ.get("DDPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"real data absent: no golden/ in {folder.name!r} next to the checkout (or set DDPO_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """A random Stable Diffusion of 16 x 16 latents and 64 px, in diffusers format."""
    torch.manual_seed(0)
    tokenizer = scratch.build_tokenizer(CAPTIONS)
    text_encoder = scratch.build_text_encoder(tokenizer, 32, 1)
    unet = scratch.build_unet((16, 32), (False, True), 32, 16)
    folder = tmp_path_factory.mktemp("tiny-sd")
    scratch.assemble(scratch.build_vae((8, 8, 8), 64), text_encoder, tokenizer, unet).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A small balanced phantom world of 48, 16 and 16 images."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 48, 16, 16, seed=3, balanced=True)
    return folder


@cache
def warm_server() -> dict[str, str]:
    """Settings by which tests/warm.py finds a server of its own, which ends with this process."""
    address = Path(tempfile.mkdtemp()) / "socket"
    atexit.register(shutil.rmtree, address.parent)
    server = subprocess.Popen(
        [sys.executable, "tests/warm.py", "--serve", address],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"WARM_SERVER": str(address), "WARM_SETTINGS": server.stdout.readline().strip()}


def run_script(*arguments, processes: int = 1, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Run `scripts/<arguments[0]> ...` from the repository root; several CPU processes go through torchrun."""
    name, *options = [str(argument) for argument in arguments]
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python"]
        launcher += [sys.executable]
    settings = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launcher, "tests/warm.py", f"scripts/{name}", *options],
        cwd=ROOT,
        env=os.environ | settings | warm_server() | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
    )

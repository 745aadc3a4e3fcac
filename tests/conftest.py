"""Shared fixtures: the optional folder of real data, a tiny Stable Diffusion, and real runs of the scripts."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from launching import ROOT, run_script  # noqa: F401 (for tests)

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.phantoms.skin import write_world

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


def forget() -> None:
    """Accelerate keeps its precision and processes for the life of this process; the next run may want others."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def forget_accelerator():
    yield
    forget()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and real images, next to the checkout or named by DDPO_SHARED."""
    folder = Path(os.environ.get("DDPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"real data absent: no golden/ in {folder.name!r} next to the checkout (or set DDPO_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    return random_pipeline(tmp_path_factory.mktemp("tiny-sd"), (16, 32), (False, True))


def random_pipeline(folder: Path, channels: tuple[int, ...], attention: tuple[bool, ...]) -> Path:
    """Save a random Stable Diffusion of 16 x 16 latents and 64 px, in diffusers format."""
    torch.manual_seed(0)
    tokenizer, text_encoder = scratch.build_clip(CAPTIONS, 32, 1)
    unet = scratch.build_unet(channels, attention, 32, 16)
    scratch.assemble(scratch.build_vae((8, 8, 8), 64), text_encoder, tokenizer, unet).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A small balanced phantom world of 48, 16 and 16 images."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 48, 16, 16, seed=3, balanced=True)
    return folder

"""Fixtures of all tests: the optional folder of real data, a tiny Stable Diffusion and a small phantom world."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from launching import ROOT

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.phantoms.skin import write_world


def forget() -> None:
    """Accelerate keeps its precision and processes for the life of this process; the next run may want others."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(autouse=True)
def forget_accelerator():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
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


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load_pipeline(tiny_pipeline_dir)


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

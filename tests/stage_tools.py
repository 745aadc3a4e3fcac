"""Fixtures of train_sd.py's tests; a pytest plugin."""

import pytest
import torch
from safetensors.torch import load_file
from script_tools import options, read_lines, run_in_process, succeed

SPLIT = "splits/phantom_{}.csv"


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """Settings of all stages on the small world, with a cache of their own."""
    settings = {"mixed_precision": "no", "sd__data_path": str(world / "images"), "sd__image_size": 32}
    settings |= {"sd__csv": str(world / SPLIT.format("train")), "sd__val_csv": str(world / SPLIT.format("val"))}
    settings |= {"sd__num_steps": 4, "sd__batch_size": 8, "sd__log_every": 1, "sd__val_every": 2, "sd__grid_every": 0}
    settings |= {"sd__save_every": 0, "sd__warmup_steps": 1, "sd__learning_rate": 1e-3, "sample__num_steps": 2}
    settings |= {"sd__vae_channels": (8, 8, 8), "sd__unet_channels": (16, 16), "sd__unet_attention": (False, True)}
    settings |= {"sd__text_width": 16, "sd__text_layers": 1, "sd__cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return settings


@pytest.fixture
def train_stage(run_main, config_file, base):
    """Function (output, fields): train_sd.py's main in this process; returns its log entries."""

    def run(output, **fields):
        run_main("train_sd.py", config_file, **base | {"sd__output": str(output)} | fields)
        return read_lines(output / f"{fields.get('sd__stage', 'finetune')}.jsonl")

    return run


@pytest.fixture(scope="session")
def model(base, config_file, tmp_path_factory):
    """The folder of stages "vae", by a real run of the script, and "unet", in this process, with an empty cache."""
    folder = tmp_path_factory.mktemp("sd")
    fields = base | {"sd__output": str(folder), "sd__cache_dir": str(folder / "cache")}
    fields |= {"sd__grid_every": 4, "sd__num_workers": 1}
    said = succeed("train_sd.py", *options(config_file, **fields, sd__stage="vae")).stderr
    assert "validation loss" in said and "images decoded at" in said
    run_in_process("train_sd.py", config_file, **fields, sd__stage="unet")
    return folder


def unet_of(folder):
    return load_file(folder / "pretrained_unet.safetensors")


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)

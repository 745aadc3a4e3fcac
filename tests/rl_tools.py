"""train.py in this process on a copy of the tiny model, four samples of two steps an epoch; a pytest plugin."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from script_tools import load_module

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier


@pytest.fixture
def own_model(tiny_pipeline_dir, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "model")


@pytest.fixture
def rl(own_model, tmp_path, monkeypatch):
    """`rl.train(**fields)` and `rl.set_up(**fields)`: the script's functions with these changes of its settings.

    Beside the model lie H6.safetensors, which rewards, and prompts.txt with four captions; runs go to logs/run.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script, base = load_module(ROOT / "scripts" / "train.py"), load_module(ROOT / "config" / "base.py")
    monkeypatch.setattr(script, "epoch_time", lambda *_: "no time")
    monkeypatch.setattr(script, "save_grid", lambda *arguments: arguments[-1].write_bytes(b"16 images"))
    torch.manual_seed(1)
    save_classifier(ArtifactClassifier(LABELS, 32, "tinynet_e"), tmp_path / "H6.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:4]) + "\n")
    usual = {"pretrained.model": str(own_model), "logdir": str(tmp_path / "logs"), "run_name": "run"}
    usual |= {"mixed_precision": "no", "wandb": "disabled", "num_epochs": 1, "save_freq": 1, "train.cfg": False}
    usual |= {"sample.num_steps": 2, "sample.batch_size": 4, "sample.num_batches_per_epoch": 1, "train.batch_size": 2}
    usual |= {"sample.guidance_scale": 1.0, "train.learning_rate": 1e-2, "per_prompt_stat_tracking.min_count": 2}
    usual |= {"reward_fn_kwargs.isic_classifier_reward.classifier": str(tmp_path / "H6.safetensors")}
    usual |= {"prompt_fn": "from_file", "prompt_fn_kwargs.path": str(tmp_path / "prompts.txt")}

    def config_of(fields):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        config = base.get_config()
        config.update_from_flattened_dict(usual | {key.replace("__", "."): value for key, value in fields.items()})
        return config

    return SimpleNamespace(
        train=lambda **fields: script.train(config_of(fields)),
        set_up=lambda **fields: script.set_up(config_of(fields)),
    )

"""Every mode of scripts/train.py runs for an epoch, and what it asks for reaches the loop."""

import logging

import pytest
import torch
from conftest import ROOT
from rl_tools import weights
from script_tools import load_module

from ddpo_pytorch.training.setup import check_training
from ddpo_pytorch.utils.errors import UserError


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__kl_coef": 0.5, "train__lora_rank": 2, "train__lora_targets": ("to_q", "conv1")},
        {"train__advantage": "group", "sample__images_per_prompt": 4, "train__num_inner_epochs": 2},
        {"train__advantage": "global", "train__timestep_fraction": 0.67, "train__gradient_checkpointing": True},
        {"train__timestep_window": (0.0, 0.5), "sample__guidance_scale": 1.0, "train__cfg": False},
        {"reward_fn": "isic_classifier_reward:1.0,jpeg_compressibility:0.1", "train__gradient_accumulation_steps": 2},
        {
            "reward_fn": "jpeg_incompressibility",
            "prompt_fn": "from_file",
            "prompt_fn_kwargs": {"path": "isic_prompts.txt"},
        },
    ],
    ids=lambda value: "-".join(key.split("__")[-1] for key in value),
)
def test_modes(script, train, overrides, monkeypatch):
    seen = {}

    def advantages(kind, tracker, prompts, rewards, original=script.compute_advantages):
        seen.update(kind=kind, prompts=prompts)
        return original(kind, tracker, prompts, rewards)

    def update(run, *arguments, original=script.update):
        seen["checkpointing"] = run.pipe.unet.is_gradient_checkpointing
        return original(run, *arguments)

    monkeypatch.setattr(script, "compute_advantages", advantages)
    monkeypatch.setattr(script, "update", update)
    folder, epochs = train(num_epochs=1, **overrides)
    assert epochs[0]["first_ratio_deviation"] == 0.0
    assert seen["kind"] == overrides.get("train__advantage", "per_prompt")
    assert seen["checkpointing"] == overrides.get("train__gradient_checkpointing", False)
    group = overrides.get("sample__images_per_prompt", 1)
    assert seen["prompts"] == [prompt for prompt in seen["prompts"][::group] for _ in range(group)]
    accumulation = overrides.get("train__gradient_accumulation_steps", 1)
    assert epochs[0]["global_step"] == 2 // accumulation * overrides.get("train__num_inner_epochs", 1)
    assert all(torch.isfinite(value).all() for value in weights(folder, 1).values())
    if "train__kl_coef" in overrides:
        assert epochs[0]["kl_to_base"] >= 0


def test_nothing_left_to_do_is_said_and_changes_nothing(train, caplog):
    caplog.set_level(logging.INFO)
    folder, _ = train(num_epochs=2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for fewer in (2, 1):
        caplog.clear()
        again, epochs = train(num_epochs=fewer, resume_from=str(folder))
        assert again == folder and len(epochs) == 2
        assert f"nothing left to do: {folder} has 2 epochs, num_epochs is {fewer}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resuming_goes_on_in_the_runs_folder_whatever_name_is_given(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, _ = train(num_epochs=1)
    again, entries = train(num_epochs=2, run_name="other", resume_from=str(folder))
    assert again == folder and len(entries) == 2 and not (tmp_path / "logs" / "other").exists()
    assert "run_name 'other' is not used" in caplog.text
    caplog.clear()
    train(num_epochs=3, run_name="run", resume_from=str(folder))
    assert "is not used" not in caplog.text


def test_only_ddim_can_be_trained():
    config = load_module(ROOT / "config" / "base.py").get_config()
    with config.unlocked():
        config.sample.scheduler = "ddim"
    check_training(config)
    config.sample.scheduler = "dpmsolver++"
    with pytest.raises(UserError, match="sample.scheduler is 'dpmsolver[+][+]'.*'ddim'"):
        check_training(config)

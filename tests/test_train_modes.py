"""Every mode of scripts/train.py runs for an epoch, and what it asks for reaches the loop."""

import pytest
import torch
from test_train import classifier, script, settings, train, weights  # noqa: F401 (fixtures)


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
def test_modes(script, train, overrides, monkeypatch):  # noqa: F811
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

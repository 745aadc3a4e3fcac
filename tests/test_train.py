"""scripts/train.py: every mode runs, ratios start at 1, resuming changes nothing, errors name what is wrong."""

import logging
import os

import pytest
import torch
from launching import run_script
from rl_tools import train_with, usual_settings, weights
from safetensors.torch import load_file
from script_tools import files_of

from ddpo_pytorch.utils.errors import UserError


@pytest.fixture(scope="module")
def finished(script, tiny_pipeline_dir, judges, tmp_path_factory):
    """The folder and log of two epochs of the usual settings; to be left as it is."""
    return train_with(
        script, usual_settings(tiny_pipeline_dir, judges[6], tmp_path_factory.mktemp("runs")), {"log_images": True}
    )


def test_logs_every_measure_and_begins_at_ratio_one(finished):
    folder, epochs = finished
    assert [entry["epoch"] for entry in epochs] == [0, 1]
    assert epochs[-1]["global_step"] == 4  # 8 samples / 4 = 2 updates an epoch
    for entry in epochs:
        assert entry["first_ratio_deviation"] == 0.0
        assert 0 <= entry["reward_min"] <= entry["reward_mean"] <= entry["reward_max"] <= 1
        assert entry["approx_kl"] >= 0 and entry["approx_kl_k3"] >= -1e-9 and entry["grad_norm"] > 0
        assert entry["rollout_samples_per_second"] > 0 and entry["update_samples_per_second"] > 0
        for key in ("reward_std", "per_prompt_reward_std", "zero_std_share", "advantage_std", "clipfrac", "loss"):
            assert key in entry
        assert entry["peak_memory_gib"] > 0
    assert (folder / "grid_0000.png").is_file() and (folder / "grid_0002.png").is_file()
    card = (folder / "checkpoint_2" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "after 2 epochs" in card and "\n- lora\n" in card
    before, after = weights(folder, 1), weights(folder, 2)
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__kl_coef": 0.5, "train__lora_rank": 2, "train__lora_targets": ("to_q", "conv1")},
        {"train__advantage": "group", "sample__images_per_prompt": 4, "train__num_inner_epochs": 2},
        {"train__advantage": "global", "train__timestep_fraction": 0.67, "train__gradient_checkpointing": True},
        {"train__timestep_window": (0.0, 0.5), "sample__guidance_scale": 1.0, "train__cfg": False},
        {"reward_fn": "isic_classifier_reward:1.0,jpeg_compressibility:0.1", "train__gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda value: "-".join(key.split("__")[-1] for key in value),
)
def test_modes(script, train, overrides, monkeypatch):
    """Every mode runs for an epoch, and what it asks for reaches the loop."""
    seen = {}

    def advantages(kind, tracker, prompts, rewards, original=script.compute_advantages):
        seen.update(kind=kind, prompts=prompts)
        return original(kind, tracker, prompts, rewards)

    def update(run, *arguments, original=script.update):
        seen["checkpointing"] = run.pipe.unet.is_gradient_checkpointing
        return original(run, *arguments)

    monkeypatch.setattr(script, "compute_advantages", advantages)
    monkeypatch.setattr(script, "update", update)
    folder, (entry,) = train(num_epochs=1, **overrides)
    assert entry["first_ratio_deviation"] <= (1e-6 if "mixed_precision" in overrides else 0)
    assert seen["kind"] == overrides.get("train__advantage", "per_prompt")
    assert seen["checkpointing"] == overrides.get("train__gradient_checkpointing", False)
    group = overrides.get("sample__images_per_prompt", 1)
    assert seen["prompts"] == [prompt for prompt in seen["prompts"][::group] for _ in range(group)]
    accumulation = overrides.get("train__gradient_accumulation_steps", 1)
    assert entry["global_step"] == 2 // accumulation * overrides.get("train__num_inner_epochs", 1)
    assert all(torch.isfinite(value).all() for value in weights(folder, 1).values())
    assert ("kl_to_base" in entry) == ("train__kl_coef" in overrides) and entry.get("kl_to_base", 0) >= 0


def test_full_fine_tune_saves_a_unet_that_differs_from_the_base(train, tiny_pipeline_dir):
    folder, epochs = train(use_lora=False, num_epochs=1)
    assert epochs[0]["first_ratio_deviation"] == 0.0
    base = load_file(tiny_pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors")
    tuned = weights(folder, 1, "unet.safetensors")
    assert tuned.keys() == base.keys()
    assert any(not torch.equal(tuned[key], base[key]) for key in base)


def test_stops_when_the_reward_no_longer_changes_and_keeps_the_newest_checkpoints(train, caplog):
    """And the same command again has nothing left to do."""
    caplog.set_level(logging.INFO)
    stopping = {"num_epochs": 6, "early_stop__patience": 2, "early_stop__tolerance": 10.0, "num_checkpoint_limit": 2}
    folder, epochs = train(**stopping)
    assert len(epochs) == 3  # the first has nothing to be compared with
    assert sorted(path.name for path in folder.glob("*checkpoint_*")) == ["checkpoint_2", "checkpoint_3"]
    before = files_of(folder)
    for again in (stopping, {"num_epochs": 3}, {"num_epochs": 1, "resume_from": str(folder)}):
        train(**again)
    assert files_of(folder) == before
    assert f"nothing left to do: {folder} has 3 epochs, mean reward changed by less than 10 for 2" in caplog.text
    assert f"nothing left to do: {folder} has 3 epochs, num_epochs is 1" in caplog.text


@pytest.mark.slow
def test_wandb_records_offline_without_a_key(train, tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path), "WANDB_API_KEY": "", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder, _ = train(log_with="wandb", log_images=True, num_epochs=1)
    assert os.environ.pop("WANDB_MODE") == "offline"
    (record,) = (folder / "wandb").glob("offline-run-*")
    assert list(record.glob("files/media/images/samples_*.png"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sample__eta": 0.0}, "sample.eta is 0.0"),
        ({"sample__scheduler": "dpm++"}, "sample.scheduler is 'dpm++'"),
        ({"prompt_fn": "nope"}, "isic_all"),
        ({"reward_fn": "nope"}, "jpeg_compressibility"),
        ({"train__batch_size": 3}, "make it a multiple"),
        ({"train__cfg": False}, "train.cfg"),
        ({"train__use_8bit_adam": True}, "bitsandbytes"),
        ({"train__advantage": "nope"}, "per_prompt"),
        ({"use_lora": False, "train__kl_coef": 1.0}, "use_lora"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"pretrained.model": "/nowhere/sd"}, "/nowhere/sd"),
        ({"reward_fn_kwargs.isic_classifier_reward.classifier": "/nowhere/H6.pth"}, "/nowhere/H6.pth"),
        ({"resume_from": "/nowhere/run"}, "/nowhere/run"),
        ({"sample__num_steps": 2000}, "1 to 1000"),
        ({"log_with": "sometimes"}, "wandb"),
        ({"prompt_fn": "from_file", "prompt_fn_kwargs.path": "/nowhere.txt"}, "/nowhere.txt"),
        ({"unet_path": "/nowhere/unet.safetensors"}, "/nowhere/unet.safetensors"),
        ({"held_out__patience": 2}, "held_out.every is 0"),
        ({"held_out__every": 1}, "held_out.classifier is empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(train, tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        train(**overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "logs" / "run").exists()


def test_an_older_checkpoint_is_not_resumed(train, finished):
    folder, _ = finished
    before = files_of(folder)
    with pytest.raises(
        UserError, match="not the newest checkpoint of its run; continuing would overwrite checkpoint_2"
    ):
        train(num_epochs=3, resume_from=str(folder / "checkpoint_1"))
    assert files_of(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "config/dgx.py:nope"], "prompt_image_alignment_classifier_isic"),
        (["--config", "config/nope.py:x"], "config/nope.py"),
        (["--config", "config/base.py", "--config.train.nope=1"], "nope"),
        (["--config", "config/base.py", "--config.seed=abc"], "seed"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(arguments, expected):
    result = run_script("train.py", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1

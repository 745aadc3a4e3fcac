"""scripts/train.py: every mode runs, ratios start at 1, resuming and two processes change nothing, errors are told."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from rl_tools import as_flags, weights
from safetensors.torch import load_file
from script_tools import files_of

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.utils.errors import UserError


def test_logs_every_measure_and_begins_at_ratio_one(train):
    folder, epochs = train()
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


def test_a_prompt_that_the_reward_cannot_score_is_told_before_anything_is_written(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{CAPTIONS[0]}\na cat\n")
    with pytest.raises(UserError, match="'a cat' is not one of the 32 ISIC captions"):
        train(prompt_fn="from_file", prompt_fn_kwargs={"path": str(prompts)})
    assert not (tmp_path / "logs").exists()


def test_bf16_begins_at_ratio_one(train):
    _, epochs = train(mixed_precision="bf16")
    assert max(entry["first_ratio_deviation"] for entry in epochs) < 1e-6


def test_full_fine_tune_saves_a_unet_that_differs_from_the_base(train, tiny_pipeline_dir):
    folder, epochs = train(use_lora=False, num_epochs=1)
    assert epochs[0]["first_ratio_deviation"] == 0.0
    base = load_file(tiny_pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors")
    tuned = weights(folder, 1, "unet.safetensors")
    assert tuned.keys() == base.keys()
    assert any(not torch.equal(tuned[key], base[key]) for key in base)


def test_resuming_equals_not_stopping(train):
    whole, epochs = train(num_epochs=4, run_name="whole")
    part, _ = train(num_epochs=2, run_name="part")
    part, resumed = train(num_epochs=4, resume_from=str(part), run_name="part")
    assert [entry["reward_mean"] for entry in resumed] == [entry["reward_mean"] for entry in epochs]
    for key, value in weights(whole, 4).items():
        assert torch.equal(value, weights(part, 4)[key])
    states = [torch.load(folder / "checkpoint_4" / "optimizer.pt", weights_only=True) for folder in (whole, part)]
    for left, right in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert torch.equal(left["exp_avg"], right["exp_avg"]) and left["step"] == right["step"]
    progress = [json.loads((folder / "checkpoint_4" / "progress.json").read_text()) for folder in (whole, part)]
    assert progress[0] == progress[1]


def test_faulty_checkpoints_are_told(train, settings):
    folder, _ = train(num_epochs=1)
    with pytest.raises(UserError, match="use_lora=False"):
        train(resume_from=str(folder), use_lora=False)
    (folder / "checkpoint_1" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="the newest is checkpoint_1 .optimizer.pt has 4"):
        train(resume_from=str(folder))
    (folder / "checkpoint_1" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="cannot be resumed .optimizer.pt is missing"):
        train(resume_from=str(folder / "checkpoint_1"))
    with pytest.raises(UserError, match="neither a checkpoint"):
        train(resume_from=str(folder / "config.json"))


def test_an_epoch_after_the_checkpoint_is_logged_once(train):
    folder, _ = train(num_epochs=2)
    log = folder / "metrics.jsonl"
    # the first epoch's line is lost, as in a checkpoint copied elsewhere; a killed run left a whole line and a torn one
    log.write_text(log.read_text().splitlines(keepends=True)[1] + '{"epoch": 2, "of": "a run that was killed"}\n{"ep')
    _, epochs = train(num_epochs=3, resume_from=str(folder), train__learning_rate=1e-3)
    assert [entry["epoch"] for entry in epochs] == [1, 2] and "of" not in epochs[1]
    assert (folder / "config_0002.json").is_file() and (folder / "config.json").is_file()


def test_keeps_the_newest_checkpoints_only(train):
    folder, _ = train(num_epochs=3, num_checkpoint_limit=2)
    assert sorted(path.name for path in folder.glob("*checkpoint_*")) == ["checkpoint_2", "checkpoint_3"]


def test_stops_when_the_reward_no_longer_changes(train):
    folder, epochs = train(num_epochs=6, early_stop__patience=2, early_stop__tolerance=10.0)
    assert len(epochs) == 3  # the first has nothing to be compared with
    assert (folder / "checkpoint_3").is_dir()


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    """Adapters agree on both ranks (DDP would diverge otherwise) and with one process at the same global batch."""
    one = run_script("train.py", *as_flags(settings, run_name="one", sample__num_batches_per_epoch=4,
                                           train__gradient_accumulation_steps=2))  # fmt: skip
    two = run_script("train.py", *as_flags(settings, run_name="two"), processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    logs = tmp_path / "logs"
    entries = [
        [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for left, right in zip(*entries, strict=True):
        assert left["reward_mean"] == right["reward_mean"] and left["global_step"] == right["global_step"]
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
    start, expected = weights(logs / "one", 1), weights(logs / "one", 2)
    actual = weights(logs / "two", 2)
    step = max((expected[key] - start[key]).abs().max() for key in expected)
    for key, value in expected.items():
        assert (value - actual[key]).abs().max() < 0.02 * step, key


@pytest.mark.slow
def test_wandb_records_offline_without_a_key(settings, tmp_path):
    flags = as_flags(settings, log_with="wandb", log_images=True, num_epochs=1)
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/train.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "logs" / "run" / "wandb").glob("offline-run-*")
    assert list(record.glob("files/media/images/samples_*.png"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sample__eta": 0.0}, "sample.eta is 0.0"),
        ({"prompt_fn": "nope"}, "isic_all"),
        ({"reward_fn": "nope"}, "jpeg_compressibility"),
        ({"train__batch_size": 3}, "make it a multiple"),
        ({"sample__images_per_prompt": 3}, "does not divide"),
        ({"train__cfg": False}, "train.cfg"),
        ({"train__timestep_fraction": 0.1}, "less than one"),
        ({"train__use_8bit_adam": True}, "bitsandbytes"),
        ({"train__advantage": "nope"}, "per_prompt"),
        ({"use_lora": False, "train__kl_coef": 1.0}, "use_lora"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"pretrained.model": "/nowhere/sd"}, "/nowhere/sd"),
        ({"reward_fn_kwargs.isic_classifier_reward.classifier": "/nowhere/H6.pth"}, "/nowhere/H6.pth"),
        ({"resume_from": "/nowhere/run"}, "/nowhere/run"),
        ({"sample__num_steps": 2000}, "1 to 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"train__learning_rate": 0.0}, "train.learning_rate"),
        ({"log_with": "sometimes"}, "wandb"),
        ({"prompt_fn": "from_file", "prompt_fn_kwargs.path": "/nowhere.txt"}, "/nowhere.txt"),
        ({"unet_path": "/nowhere/unet.safetensors"}, "/nowhere/unet.safetensors"),
        ({"early_stop__patience": -1}, "early_stop.patience is -1"),
        ({"held_out__every": -1}, "held_out.every is -1"),
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


def test_an_older_checkpoint_is_not_gone_on_from(train):
    folder, _ = train()
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
        (["--config", "config/mini.py"], "prompt_image_alignment_classifier_isic"),
        (["--config", "config/base.py", "--config.nope=1"], "nope"),
        (["--config", "config/base.py", "--config.train.nope=1"], "nope"),
        (["--config", "config/base.py", "--config.seed=abc"], "seed"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(arguments, expected):
    result = run_script("train.py", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1

"""scripts/train.py: every mode runs, ratios start at 1, the same command resumes, errors name what is wrong."""

import json
import math
import os
import re
import shutil
from functools import partialmethod
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from launching import run_script
from refusals import refused
from rl_tools import LIGHT, TIMES, as_flags, configured, untimed, weights
from safetensors.torch import load_file
from script_tools import files_of, read_lines

from ddpo_pytorch.report.curves import read_config
from ddpo_pytorch.training import setup
from ddpo_pytorch.training.run_state import is_finished
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import LOCK, locked


def test_a_run_logs_every_measure_begins_at_ratio_one_and_is_not_resumed_from_an_older_checkpoint(train, tmp_path):
    folder, epochs = train(log_images=True)
    assert [entry["epoch"] for entry in epochs] == [0, 1]
    assert epochs[-1]["global_step"] == 4  # 8 samples / 4 = 2 updates an epoch
    for entry in epochs:
        assert entry["first_ratio_deviation"] == 0.0
        assert 0 <= entry["reward_min"] <= entry["reward_mean"] <= entry["reward_max"] <= 1 and entry["reward_std"] >= 0
        assert entry["approx_kl"] >= 0 and entry["approx_kl_k3"] >= -1e-9 and entry["grad_norm"] > 0
        assert all(entry[name] > 0 for name in TIMES - {"seconds"})
        assert {"per_prompt_reward_std", "zero_std_share", "advantage_std", "clipfrac", "loss"} <= entry.keys()
    assert (folder / "grid_0000.png").is_file() and (folder / "grid_0002.png").is_file()
    card = (folder / "checkpoint_2" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "after 2 epochs" in card and "\n- lora\n" in card
    before, after = weights(folder, 1), weights(folder, 2)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    content, older = files_of(folder), {"num_epochs": 3, "resume_from": str(folder / "checkpoint_1")}
    (link := tmp_path / "link").symlink_to(folder / "checkpoint_1")
    for settings in (older, older | {"resume_from": str(link)}):
        refused("not the newest checkpoint of its run; continuing would overwrite checkpoint_2", train, **settings)
    assert files_of(folder) == content and not (tmp_path / "metrics.jsonl").exists()
    (archive := tmp_path / "checkpoint_1").mkdir()
    (folder / "checkpoint_1").rename(archive)
    (folder / "checkpoint_1").symlink_to(archive)  # which does not lead out of the run
    refused("not the newest checkpoint of its run; continuing would overwrite checkpoint_2", train, **older)


def test_half_precision_logs_the_ratio_of_the_second_update(script, train, monkeypatch):
    """Log-probs of its samples are moved by .01 after sampling: the first update's ratio stays 1."""
    sample = script.sample_and_score

    def moved(run, epoch, *rest):
        samples, scores = sample(run, epoch, *rest)
        samples.log_probs[run.sample_order(epoch, 0)[4:]] += 0.01
        return samples, scores

    monkeypatch.setattr(script, "sample_and_score", moved)
    folder, (entry,) = train(mixed_precision="bf16", num_epochs=1)
    assert all(torch.isfinite(value).all() for value in weights(folder, 1).values())
    assert entry["first_ratio_deviation"] == 0.0
    assert entry["second_ratio_deviation"] == pytest.approx(1 - math.exp(-0.01), rel=1e-4)


def test_compiled_blocks_sample_with_the_kernels_of_the_update(train, monkeypatch):
    """Passes without gradients are off by a little, as those that Inductor compiles for bfloat16 are.

    The tiny UNet's blocks have 3 variants, and PyTorch's limit is lowered to 2; those of SD exceed its default of 8.
    """

    def backend(graph, _):
        if torch.is_grad_enabled():
            return graph.forward
        return lambda *inputs: [output * 1.01 for output in graph(*inputs)]

    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend=backend))
    monkeypatch.setattr(setup, "in_half_on_gpu", lambda *_: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=2):
        _, (entry,) = train(mixed_precision="bf16", num_epochs=1, train__compile=True, log_images=True)
    assert entry["first_ratio_deviation"] == entry["second_ratio_deviation"] == 0.0
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0  # none was left uncompiled


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__kl_coef": 0.5, "train__lora_rank": 2, "train__lora_targets": ("to_q", "conv1")},
        {"train__advantage": "group", "sample__images_per_prompt": 4, "train__num_inner_epochs": 2},
        {"train__advantage": "global", "train__timestep_fraction": 0.67, "train__gradient_checkpointing": True},
        {"train__advantage": "group", "sample__images_per_prompt": 2, "train__timestep_window": (0.0, 0.5)}
        | {"sample__guidance_scale": 1.0, "train__cfg": False, "train__gradient_accumulation_steps": 2}
        | {"reward_fn": "isic_classifier_reward:1.0,jpeg_compressibility:0.1"},
    ],
    ids=lambda value: "-".join(key.split("__")[-1] for key in value),
)
def test_modes(script, train, overrides, monkeypatch):
    """Every mode runs for an epoch, and what it asks for reaches the loop."""
    advantages, update = (Mock(wraps=getattr(script, name)) for name in ("compute_advantages", "update"))
    monkeypatch.setattr(script, "compute_advantages", advantages)
    monkeypatch.setattr(script, "update", update)
    folder, (entry,) = train(num_epochs=1, **overrides)
    assert entry["first_ratio_deviation"] == 0
    kind, _, prompts, _ = advantages.call_args.args
    run, *_ = update.call_args.args
    assert kind == overrides.get("train__advantage", "per_prompt")
    assert run.pipe.unet.is_gradient_checkpointing == overrides.get("train__gradient_checkpointing", False)
    group = overrides.get("sample__images_per_prompt", 1)
    assert prompts == [prompt for prompt in prompts[::group] for _ in range(group)]
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
    refused("a full UNet, which does not fit use_lora=True", train, num_epochs=2, resume_from=str(folder))


def test_stops_when_the_reward_no_longer_changes_and_keeps_the_newest_checkpoints(train, settings, caplog):
    """And the same command again has nothing left to do."""
    caplog.set_level("INFO")
    stopping = {"num_epochs": 6, "early_stop__patience": 2, "early_stop__tolerance": 10.0, "num_checkpoint_limit": 2}
    folder, epochs = train(**stopping)
    assert len(epochs) == 3  # the first has nothing to be compared with
    assert sorted(path.name for path in folder.glob("*checkpoint_*")) == ["checkpoint_2", "checkpoint_3"]
    assert is_finished(folder, configured(settings, stopping))
    assert not is_finished(folder, configured(settings, {"num_epochs": 4}))
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
    refused("wandb_project='team/name'", train, log_with="wandb", wandb_project="team/name")
    folder, _ = train(log_with="wandb", log_images=True, num_epochs=1)
    assert os.environ.pop("WANDB_MODE") == "offline"
    (record,) = (folder / "wandb").glob("offline-run-*")
    assert list(record.glob("files/media/images/samples_*.png"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sample__eta": 0.0}, "sample.eta is 0.0"),
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
        ({"sample__num_steps": 1000}, "1 to 999"),
        ({"log_with": "sometimes"}, "wandb"),
        ({"run_name": "../run"}, "run_name: the path '../run' leads out of"),
        ({"run_name": "/nowhere/run"}, "run_name: the path '/nowhere/run' leads out of"),
        ({"run_name": "."}, "run_name: the path '.' is empty"),
        ({"prompt_fn": "from_file", "prompt_fn_kwargs.path": "/nowhere.txt"}, "/nowhere.txt"),
        ({"held_out__patience": 2}, "held_out.every is 0"),
        ({"held_out__every": 1}, "held_out.classifier is empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(train, tmp_path, overrides, expected):
    refused(re.escape(expected), train, **overrides)
    assert not (tmp_path / "logs" / "run").exists()


@pytest.fixture
def light(settings, train):
    """`train` with the settings of `LIGHT`."""
    settings |= LIGHT
    return train


def assert_same_run(left, right, epoch: int) -> None:
    """Logs apart from times, and everything in a checkpoint."""
    log, other = (untimed(read_lines(run / "metrics.jsonl")) for run in (left, right))
    assert log == other and [entry["epoch"] for entry in log] == list(range(epoch))
    assert files_of(left / f"checkpoint_{epoch}") == files_of(right / f"checkpoint_{epoch}")
    for one in (left, right):
        assert (one / f"grid_{epoch:04d}.png").is_file()


def test_the_same_command_goes_on(light, caplog):
    """With more epochs, which may change; and after the newest checkpoint was damaged, from the one before."""
    caplog.set_level("INFO")
    reference, _ = light(num_epochs=4, run_name="whole")
    folder, _ = light(num_epochs=2)
    copied = shutil.copytree(folder, folder.with_name("copy"))
    (copied / "checkpoint_2" / "manifest.json").write_text("torn")
    again, _ = light(num_epochs=3)
    assert again == folder and f"resumed from {folder / 'checkpoint_2'} after 2 epochs" in caplog.text
    (folder / "checkpoint_3" / "optimizer.pt").write_bytes(b"torn")
    caplog.clear()
    light(num_epochs=4, save_freq=2, num_checkpoint_limit=9, early_stop__tolerance=1e-9)
    assert f"{folder / 'checkpoint_3'} is damaged (optimizer.pt has 4 bytes instead of" in caplog.text
    assert f"resumed from {folder / 'checkpoint_2'} after 2 epochs" in caplog.text
    assert_same_run(reference, folder, 4)
    assert (folder / "checkpoint_3.damaged" / "optimizer.pt").read_bytes() == b"torn"
    assert not (folder / "checkpoint_3").exists()
    # the one before by its own name: a newer one that is damaged protects nothing
    light(num_epochs=4, resume_from=str(copied / "checkpoint_1"))
    assert_same_run(reference, copied, 4)
    assert "run_name 'run' is not used" in caplog.text


def test_other_settings_are_refused(light, tmp_path):
    """Also before there is a checkpoint; a folder's settings are the only thing that is looked at."""
    folder = tmp_path / "logs" / "run"
    light(num_epochs=1, save_freq=5)
    before, config = files_of(folder), json.loads((folder / "config.json").read_text())
    for changed, said in (
        ({"train__learning_rate": 2e-2}, "train.learning_rate=0.01, now it is 0.02"),
        ({"seed": 1, "train__clip_range": 1.0}, "seed=42, now it is 1"),
        ({"train__lora_targets": ("to_q",)}, "train.lora_targets"),
        ({"reward_fn": "jpeg_compressibility"}, "reward_fn='isic_classifier_reward', now it is 'jpeg_compressi"),
    ):
        start = f"run folder {str(folder)!r} exists already and was started with .*{re.escape(said)}"
        refused(f"{start}.* another --config.run_name.* --config.resume_from={folder}", light, **changed)
        assert files_of(folder) == before
    # the samples of an epoch are those of each process times their number
    (folder / "config.json").write_text(json.dumps(config | {"processes": 2}))
    refused("processes=2, now it is 1", light)
    # a field of another version of the program is not compared
    (folder / "config.json").write_text(json.dumps(config | {"forgotten": 3}))
    light(num_epochs=2)


def test_settings_that_nothing_reads_may_change(rl, own_model, tmp_path):
    """So that a run folder that was copied elsewhere can be continued there."""
    usual = {"train.advantage": "group", "sample.images_per_prompt": 2, "use_lora": False}
    unread = {"reward_fn_kwargs.fundus_alignment.judges": "elsewhere", "held_out.images_per_prompt": 9}
    unread |= {"per_prompt_stat_tracking.buffer_size": 9, "train.lora_rank": 9, "sd.cache_dir": "elsewhere"}
    folder = rl.train(**usual)
    rl.train(num_epochs=2, **usual | unread)
    assert (folder / "checkpoint_2").is_dir()
    others = usual | unread | {"sample.images_per_prompt": 4}
    refused("sample.images_per_prompt=2, now it is 4", rl.train, num_epochs=3, **others)


def test_after_resuming_with_other_settings_the_same_command_is_that_one(light):
    folder, _ = light(num_epochs=1)
    light(num_epochs=2, resume_from=str(folder), train__learning_rate=1e-3)
    refused("train.learning_rate=0.001, now it is 0.01", light, num_epochs=3)
    light(num_epochs=3, train__learning_rate=1e-3)
    assert {path.name for path in folder.glob("config_*")} == {"config_0001.json", "config_0002.json"}
    assert read_config(folder)["train"]["learning_rate"] == 1e-3  # what the report shows
    shutil.rmtree(folder / "checkpoint_3")
    shutil.rmtree(folder / "checkpoint_2")
    light(num_epochs=2, resume_from=str(folder), train__learning_rate=2e-3)  # config_0002.json is of epochs now gone
    assert read_config(folder)["train"]["learning_rate"] == 2e-3
    shutil.rmtree(folder / "checkpoint_2")
    (folder / "config_0002.json").write_text("{}")
    light(num_epochs=2, resume_from=str(folder), train__learning_rate=2e-3)  # and keeps what was renamed before
    renamed = {f"config_0002.json.superseded{number}" for number in ("", 2)}
    assert {path.name for path in folder.glob("config_*")} == {"config_0001.json"} | renamed


def test_a_run_without_a_checkpoint_starts_over(light, tmp_path, caplog):
    caplog.set_level("INFO")
    reference, _ = light(run_name="whole")
    folder = tmp_path / "logs" / "run"
    folder.mkdir()
    (folder / LOCK).touch()  # killed at once
    (folder / ".config.json.9999999.tmp").write_text('{"seed": 4')  # or a little later
    light()
    assert_same_run(reference, folder, 2)
    for left in (*folder.glob("checkpoint_*"), folder / "grid_0002.png"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (folder / ".checkpoint_1.9999999.tmp").mkdir()
    log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(log[0] + log[1][:20])
    light()
    assert f"{folder} has no checkpoint yet" in caplog.text
    assert_same_run(reference, folder, 2)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    for left in folder.glob("checkpoint_*"):
        shutil.rmtree(left)
    refused("the checkpoints of run folder .* are gone", light)


def test_a_folder_of_something_else_is_left_alone(light, tmp_path):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "letters.txt").write_text("mine")
    refused("exists already, and it holds no config.json; choose another", light)
    (folder / "config.json").write_text('{"seed": 4')
    refused("exists already, and its config.json is damaged; choose another", light)
    assert set(files_of(folder)) == {"letters.txt", "config.json"}


def test_a_run_folder_is_one_runs_alone(light, tmp_path):
    folder = tmp_path / "logs" / "run"
    light(num_epochs=1)
    before = files_of(folder)
    for given in ({}, {"resume_from": str(folder)}, {"resume_from": str(folder / "checkpoint_1")}):
        with locked(folder), pytest.raises(UserError, match=f"{str(folder)!r} is being written"):
            light(num_epochs=2, **given)
        assert files_of(folder) == before
    refused("use_lora=True, now it is False", light, num_epochs=2, use_lora=False)  # the lock went with the error
    light(num_epochs=2)
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_errors_are_one_line_and_exit_code_2_for_any_number_of_processes(settings, tmp_path):
    folder = tmp_path / "logs" / "run"
    with locked(folder):
        for processes, wrong, named in (
            (1, {"train.nope": 1}, "nope"),
            (1, {"seed": "abc"}, "seed"),
            (2, {}, f"{str(folder)!r} is being written"),
        ):
            result = run_script("train.py", *as_flags(settings | wrong), processes=processes)
            (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            assert result.returncode == 2 and named in error and "Traceback" not in result.stderr
    assert files_of(folder) == {}

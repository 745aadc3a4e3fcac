"""Full fine-tunes under FSDP, on two CPU processes: the same training in less memory, and files that fit any number."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_script
from launching import launch
from rl_tools import as_flags
from safetensors.torch import load_file
from test_scale import assert_same_gradients, gradients

from ddpo_pytorch.data.isic import ARTIFACTS, CAPTIONS
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.distributed import (
    check_sharding,
    gather_state,
    load_optimizer_into,
    load_weights_into,
    make_accelerator,
    sharding_accelerator,
)
from ddpo_pytorch.utils.errors import UserError

ALONE = {"sample__num_batches_per_epoch": 2, "train__gradient_accumulation_steps": 2}
PROCESSES = {"num_processes": 2, "main_process_port": 0}


def state_of(run: Path, epoch: int) -> tuple[dict, dict]:
    folder = run / f"checkpoint_{epoch}"
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]
    return load_file(folder / "unet.safetensors"), optimizer


def lines(run: Path, file: str, *keys: str) -> list[list]:
    return [[entry[key] for key in keys] for entry in map(json.loads, (run / file).read_text().splitlines())]


@pytest.fixture
def small_pipeline_dir(tmp_path) -> Path:
    """Like the tiny one, with fewer tensors: each of them costs two messages between processes, and time."""
    torch.manual_seed(0)
    tokenizer = scratch.build_tokenizer(CAPTIONS)
    unet = scratch.build_unet((16,), (True,), 32, 16)
    text_encoder = scratch.build_text_encoder(tokenizer, 32, 1)
    scratch.assemble(scratch.build_vae((8, 8, 8), 64), text_encoder, tokenizer, unet).save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


@pytest.fixture
def judge(tmp_path) -> Path:
    torch.manual_seed(4)
    save_classifier(ArtifactClassifier(ARTIFACTS, 32, "tinynet_e"), tmp_path / "H4.safetensors")
    return tmp_path / "H4.safetensors"


@pytest.fixture
def without_second_checkpoint(tmp_path):
    """Function (run, name): a copy of a run of two epochs as it was when a kill met the second."""

    def copy(run: Path, name: str) -> Path:
        folder = tmp_path / "logs" / name
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "checkpoint_2")
        return folder

    return copy


@pytest.mark.slow
def test_a_divided_fine_tune_trains_saves_resumes_and_exports(
    settings,
    judge,
    small_pipeline_dir,
    tmp_path,
    without_second_checkpoint,
):
    """With all that train.py does besides: held-out batches that do not divide among processes, grids, best/."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[:3]))
    fields = {
        "use_lora": False,
        "train__learning_rate": 1e-4,
        "train__max_grad_norm": 1e9,
        "train__gradient_checkpointing": True,
    }
    fields |= {"pretrained__model": small_pipeline_dir, "sample__num_batches_per_epoch": 1, "sample__num_steps": 2}
    fields |= {"prompt_fn": "from_file", "prompt_fn_kwargs__path": prompts, "held_out__every": 1}
    fields |= {"held_out__images_per_prompt": 3, "held_out__classifier": judge}
    whole, divided = tmp_path / "record-whole", tmp_path / "record-divided"
    for folder in (whole, divided):
        folder.mkdir()
    launch("fsdp.yaml", PROCESSES, "tests/update_recorder.py", *as_flags(settings, **fields), RECORD=divided)
    run = tmp_path / "logs" / "run"

    # as one process trains it, in half the memory
    flags = as_flags(settings, run_name="one", num_epochs=1, **fields | ALONE)
    launch("one_gpu.yaml", {}, "tests/update_recorder.py", *flags, RECORD=whole, CONTIGUOUS=1)
    assert_same_gradients(gradients(divided), gradients(whole))
    (alone,) = [json.loads(file.read_text()) for file in whole.glob("counts_*")]
    for held in [json.loads(file.read_text()) for file in divided.glob("counts_*")]:
        assert 0.5 <= held["parameters"] / alone["parameters"] < 0.55
        assert 0.5 <= held["optimizer"] / alone["optimizer"] < 0.55
    same = "epoch", "apr", "reward"
    assert lines(run, "held_out.jsonl", *same)[0] == lines(tmp_path / "logs" / "one", "held_out.jsonl", *same)[0]
    assert lines(run, "metrics.jsonl", "first_ratio_deviation") == [[0.0], [0.0]]

    # resumed by as many processes it is the same to the last bit, by one process the same run
    again = without_second_checkpoint(run, "again")
    launch("fsdp.yaml", PROCESSES, "scripts/train.py", *as_flags(settings, resume_from=again, **fields))
    weights, optimizer = state_of(run, 2)
    other_weights, other_optimizer = state_of(again, 2)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    assert len(optimizer["state"]) == len(other_optimizer["state"]) == len(list(weights))
    for number, memory in optimizer["state"].items():
        assert all(torch.equal(value, other_optimizer["state"][number][key]) for key, value in memory.items())
    for file, keys in (("metrics.jsonl", ("epoch", "reward_mean", "loss", "grad_norm")), ("held_out.jsonl", same)):
        assert lines(run, file, *keys) == lines(again, file, *keys)
    alone = without_second_checkpoint(run, "alone")
    result = run_script("train.py", *as_flags(settings, resume_from=alone, **fields | ALONE))
    assert result.returncode == 0, result.stderr
    keys = "epoch", "reward_mean"
    assert lines(alone, "metrics.jsonl", *keys) == lines(run, "metrics.jsonl", *keys)
    third = state_of(alone, 2)[1]["state"]
    for number, memory in optimizer["state"].items():
        difference = (memory["exp_avg_sq"] - third[number]["exp_avg_sq"]).abs().max()
        assert memory["step"] == third[number]["step"] == 2 and difference <= 1e-2 * memory["exp_avg_sq"].max()

    # and what it wrote is a UNet like any other
    unet = load_pipeline(small_pipeline_dir).unet
    start = {key: value.clone() for key, value in unet.state_dict().items()}
    assert load_weights(unet, run) == run / "checkpoint_2" / "unet.safetensors"
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())
    assert not any(torch.equal(value, weights[key]) for key, value in start.items())
    assert (run / "best" / "unet.safetensors").is_file() and (run / "grid_0002.png").is_file()


def test_without_division_the_functions_are_those_of_pytorch():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer, fresh = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    load_weights_into(other, gather_state(model, main=True))
    load_optimizer_into(fresh, gather_state(optimizer, main=True))
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    expected, actual = optimizer.state_dict(), fresh.state_dict()
    assert actual["param_groups"] == expected["param_groups"] and actual["state"].keys() == {0, 1}
    for number, memory in expected["state"].items():
        assert all(torch.equal(value, actual["state"][number][key]) for key, value in memory.items())
    assert gather_state(model, main=False) is None and gather_state(optimizer, main=False) is None
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights_into(other, {"weight": model.weight})
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer_into(torch.optim.AdamW([other.weight]), gather_state(optimizer, main=True))


@pytest.mark.parametrize("saved_as", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("loaded_as", [torch.channels_last, torch.contiguous_format])
def test_an_optimizer_resumes_whatever_the_order_of_its_tensors_in_memory(saved_as, loaded_as):
    """A fused step takes parameter, gradient and moments number by number as they lie in memory."""

    def step(model, optimizer):
        model(torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 5, 3).to(memory_format=saved_as)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    step(model, optimizer)
    other = torch.nn.Conv2d(3, 5, 3).to(memory_format=loaded_as)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    load_weights_into(other, gather_state(model, main=True))
    load_optimizer_into(resumed, copy.deepcopy(gather_state(optimizer, main=True)))
    step(model, optimizer)
    step(other, resumed)
    assert other.weight.is_contiguous(memory_format=loaded_as)
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)
    moments = [chosen.state_dict()["state"][0]["exp_avg_sq"] for chosen in (resumed, optimizer)]
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((True, False, "no"), "use_lora"),
        ((False, True, "no"), "use_8bit_adam"),
        ((False, False, "fp16"), "mixed_precision"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, named):
    check_sharding(False, False, "bf16")
    with pytest.raises(UserError, match=named) as caught:
        check_sharding(*settings)
    assert "\n" not in str(caught.value)


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        sharding_accelerator(cpu=True, mixed_precision="no")


def test_scripts_that_cannot_divide_their_model_refuse_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        make_accelerator("no")

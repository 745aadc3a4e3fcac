"""Full fine-tunes under FSDP, on two CPU processes: the same training in less memory, and files that fit any number."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from launching import launch
from rl_tools import as_flags, configured
from safetensors.torch import load_file
from test_scale import assert_same_gradients, moments

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.setup import check_training
from ddpo_pytorch.utils.distributed import gather_state, load_optimizer_into, load_weights_into, make_accelerator
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
    return random_pipeline(tmp_path / "sd", (16,), (True,))


@pytest.mark.slow
def test_a_divided_fine_tune(settings, judges, small_pipeline_dir, train, monkeypatch, tmp_path):
    """With all that train.py does besides: held-out batches that do not divide among processes, grids, best/."""
    prompts, logs = tmp_path / "prompts.txt", tmp_path / "logs"
    prompts.write_text("\n".join(CAPTIONS[:3]))
    settings |= {"use_lora": False, "train.learning_rate": 1e-4, "train.max_grad_norm": 1e9}
    settings |= {"train.gradient_checkpointing": True, "pretrained.model": str(small_pipeline_dir)}
    settings |= {"sample.num_batches_per_epoch": 1, "sample.num_steps": 2, "prompt_fn": "from_file"}
    settings |= {"prompt_fn_kwargs.path": str(prompts), "held_out.classifier": str(judges[4])}
    settings |= {"held_out.every": 1, "held_out.images_per_prompt": 3}
    launch("fsdp.yaml", PROCESSES, "scripts/train.py", *as_flags(settings))
    run = logs / "run"

    # as one process trains it
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)  # as FSDP: other layouts round differently
    train(run_name="one", num_epochs=1, **ALONE)
    assert_same_gradients(moments(run), moments(logs / "one"))
    same = "epoch", "apr", "reward"
    assert lines(run, "held_out.jsonl", *same)[0] == lines(logs / "one", "held_out.jsonl", *same)[0]
    assert lines(run, "metrics.jsonl", "first_ratio_deviation") == [[0.0], [0.0]]

    # resumed by as many processes after a kill it is the same to the last bit, by one process the same run
    for name in ("again", "alone"):
        shutil.rmtree(shutil.copytree(run, logs / name) / "checkpoint_2")
    launch("fsdp.yaml", PROCESSES, "scripts/train.py", *as_flags(settings, resume_from=logs / "again"))
    weights, optimizer = state_of(run, 2)
    other_weights, other_optimizer = state_of(logs / "again", 2)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    assert len(optimizer["state"]) == len(other_optimizer["state"]) == len(list(weights))
    for number, memory in optimizer["state"].items():
        assert all(torch.equal(value, other_optimizer["state"][number][key]) for key, value in memory.items())
    for file, keys in (("metrics.jsonl", ("epoch", "reward_mean", "loss", "grad_norm")), ("held_out.jsonl", same)):
        assert lines(run, file, *keys) == lines(logs / "again", file, *keys)
    _, epochs = train(resume_from=str(logs / "alone"), **ALONE)
    assert [entry["reward_mean"] for entry in epochs] == [
        mean for (mean,) in lines(run, "metrics.jsonl", "reward_mean")
    ]
    third = state_of(logs / "alone", 2)[1]["state"]
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
    "bad",
    [{"use_lora": True}, {"train.use_8bit_adam": True}, {"mixed_precision": "fp16"}],
    ids=lambda bad: next(iter(bad)),
)
def test_what_cannot_be_divided_is_refused(settings, monkeypatch, bad):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_training(configured(settings, {"use_lora": False}))
    with pytest.raises(UserError, match=f"^{next(iter(bad))} is "):
        check_training(configured(settings, {"use_lora": False} | bad))


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    for name, value in {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        make_accelerator("no", may_shard=True)

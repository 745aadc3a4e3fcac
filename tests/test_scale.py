"""More processes change nothing but the time: two nodes as one process, and full fine-tunes divided by FSDP."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from common_fixtures import random_pipeline
from launching import ON_CPU, ROOT, Script, free_port, launcher_environment
from refusals import refused
from rl_tools import LIGHT, as_flags, configured, weights
from script_tools import read_lines, succeed
from stage_tools import assert_equal

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.training.checkpoints import UNET_FILE, load_weights
from ddpo_pytorch.training.setup import check_training
from ddpo_pytorch.utils.distributed import gather_state, load_optimizer_into, load_weights_into, make_accelerator


def optimizer_of(run: Path, epoch: int) -> dict:
    return torch.load(run / f"checkpoint_{epoch}" / "optimizer.pt", weights_only=True)["optimizer"]


def moments(run: Path) -> list[torch.Tensor]:
    """Adam's first moments after the first epoch: after a single update the gradients, times 1 - beta1."""
    return [memory["exp_avg"] for memory in optimizer_of(run, 1)["state"].values()]


def assert_same_gradients(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To 1e-5 of the largest gradient of each tensor."""
    assert len(actual) == len(expected) > 10 and sum(bool(value.any()) for value in expected) >= len(expected) // 2
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.slow
def test_two_nodes_train_as_one_process(settings, train, tmp_path):
    """LoRA. Each node has one process, number 0 of its node: what was unique on a node only would collide."""
    settings |= {"train.max_grad_norm": 1e9, "train.gradient_accumulation_steps": 2}  # one update an epoch
    alone, left = train(run_name="one", sample__num_batches_per_epoch=4, train__gradient_accumulation_steps=4)
    succeed("train.py", *as_flags(settings), processes=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    run = tmp_path / "logs" / "run"
    assert_same_gradients(moments(run), moments(alone))
    right = read_lines(run / "metrics.jsonl")  # one line an epoch, though there are two nodes
    for one, other in zip(left, right, strict=True):
        rewards = [key for key in one if key.startswith("reward_")]
        assert [one[key] for key in rewards] == [other[key] for key in rewards]
        assert other["first_ratio_deviation"] == 0 and other["global_step"] == one["global_step"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    start, expected, actual = weights(alone, 1), weights(alone, 2), weights(run, 2)
    step = max((expected[key] - start[key]).abs().max() for key in expected)
    assert all((value - actual[key]).abs().max() < 0.02 * step for key, value in expected.items())
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}


def test_an_epoch_has_the_passes_that_the_docs_count(train, script, monkeypatch):
    """docs/scaling.md: samples x steps x 2 for guidance; the first of two updates has but one pass, of 4 samples."""
    inputs = Counter()

    def counted(stage, run, *arguments):
        count = run.pipe.unet.register_forward_pre_hook(lambda _, given: inputs.update({stage.__name__: len(given[0])}))
        result = stage(run, *arguments)
        count.remove()
        return result

    for stage in (script.sample_and_score, script.update):
        monkeypatch.setattr(script, stage.__name__, partial(counted, stage))
    train(num_epochs=1)
    assert inputs == {"sample_and_score": 8 * 3 * 2, "update": 4 * 3 * 2 + 4 * 2}


def test_launch_files_say_what_their_names_say():
    found = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "config/accelerate").iterdir()}
    assert not any(launched.use_cpu for launched in found.values())
    kinds = {name: (one.distributed_type, one.num_machines, one.num_processes) for name, one in found.items()}
    expected = {"one_gpu": ("NO", 1, 1), "one_node_4": ("MULTI_GPU", 1, 4), "one_node_8": ("MULTI_GPU", 1, 8)}
    assert kinds == expected | {"multi_node": ("MULTI_GPU", 2, 8), "fsdp": ("FSDP", 1, 4)}


@pytest.mark.slow
def test_a_slurm_job_saves_in_time_and_is_put_back_into_the_queue(settings, tmp_path):
    """A job of one node and two processes, with as much of Slurm's commands as it needs.

    srun hands signals to the command that it starts, and to no child of it; scontrol writes down what it is asked for.
    """
    scontrol = f"if [ $1 = show ]; then echo 127.0.0.1; else echo $2 > {tmp_path / 'requeued'}; fi"
    (tmp_path / "bin").mkdir()
    for name, code in (("srun", 'exec "${@:2}"'), ("scontrol", scontrol)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "node[1-1]", "NNODES": 1, "NODEID": 0, "GPUS_ON_NODE": 2}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"MAIN_PORT": str(free_port())}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "docs/slurm.sh", *as_flags(settings | LIGHT, num_epochs=1000, save_freq=1000)]
    environment = os.environ | ON_CPU | {"CUDA_VISIBLE_DEVICES": ""} | environment
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    while job.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 0, errors[-3000:]
    assert (tmp_path / "requeued").read_text() == "7\n"
    epochs = len(log.read_text().splitlines())
    assert 1 <= epochs < 1000 and (log.parent / f"checkpoint_{epochs}").is_dir(), errors[-3000:]
    asked = [line.split()[1] for line in (ROOT / "docs" / "slurm.sh").read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--signal=B:USR1@600", "--ntasks-per-node=1"} <= set(asked)


def lines(run: Path, file: str, *keys: str) -> list[list]:
    return [[entry[key] for key in keys] for entry in read_lines(run / file)]


@pytest.mark.slow
def test_a_divided_fine_tune(settings, judges, train, monkeypatch, tmp_path):
    """With all that train.py does besides: held-out batches that do not divide among processes, grids, best/."""
    prompts, logs = tmp_path / "prompts.txt", tmp_path / "logs"
    prompts.write_text("\n".join(CAPTIONS[:3]))
    # with few tensors: each of them costs two messages between processes, and time
    model = random_pipeline(tmp_path / "sd", (16,), (True,))
    settings |= LIGHT | {"use_lora": False, "train.batch_size": 4, "train.gradient_checkpointing": True}
    settings |= {"train.learning_rate": 1e-4, "train.max_grad_norm": 1e9, "pretrained.model": str(model)}
    settings |= {"prompt_fn": "from_file", "prompt_fn_kwargs.path": str(prompts)}
    settings |= {"held_out.every": 1, "held_out.images_per_prompt": 1, "held_out.classifier": str(judges[4])}
    alone = {"sample__num_batches_per_epoch": 2, "train__gradient_accumulation_steps": 2}
    launched = launcher_environment("fsdp.yaml", num_processes=2)
    succeed("train.py", *as_flags(settings), processes=2, **launched)
    run = logs / "run"

    # as one process trains it
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)  # as FSDP: other layouts round differently
    train(run_name="one", num_epochs=1, **alone)
    assert_same_gradients(moments(run), moments(logs / "one"))
    same = "epoch", "apr", "reward"
    assert lines(run, "held_out.jsonl", *same)[0] == lines(logs / "one", "held_out.jsonl", *same)[0]
    assert lines(run, "metrics.jsonl", "first_ratio_deviation") == [[0.0], [0.0]]

    # resumed by as many processes after a kill it is the same to the last bit, by one process the same run
    for name in ("again", "alone"):
        shutil.rmtree(shutil.copytree(run, logs / name) / "checkpoint_2")
    succeed("train.py", *as_flags(settings, resume_from=logs / "again"), processes=2, **launched)
    unet, optimizer = weights(run, 2, UNET_FILE), optimizer_of(run, 2)
    assert_equal((unet, optimizer), (weights(logs / "again", 2, UNET_FILE), optimizer_of(logs / "again", 2)))
    assert len(optimizer["state"]) == len(unet)
    for file, keys in (("metrics.jsonl", ("epoch", "reward_mean", "loss", "grad_norm")), ("held_out.jsonl", same)):
        assert lines(run, file, *keys) == lines(logs / "again", file, *keys)
    _, epochs = train(resume_from=str(logs / "alone"), **alone)
    assert [[entry["reward_mean"]] for entry in epochs] == lines(run, "metrics.jsonl", "reward_mean")
    third = optimizer_of(logs / "alone", 2)["state"]
    for number, memory in optimizer["state"].items():
        difference = (memory["exp_avg_sq"] - third[number]["exp_avg_sq"]).abs().max()
        assert memory["step"] == third[number]["step"] == 2 and difference <= 1e-2 * memory["exp_avg_sq"].max()

    # and what it wrote is a UNet like any other
    loaded = load_pipeline(model).unet
    assert not any(torch.equal(value, unet[key]) for key, value in loaded.state_dict().items())
    assert load_weights(loaded, run) == run / "checkpoint_2" / UNET_FILE
    assert_equal(dict(loaded.state_dict()), unet)
    assert (run / "best" / UNET_FILE).is_file() and (run / "grid_0002.png").is_file()


@pytest.mark.parametrize("saved_as", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("loaded_as", [torch.channels_last, torch.contiguous_format])
def test_an_optimizer_resumes_whatever_the_order_of_its_tensors_in_memory(saved_as, loaded_as):
    """A fused step takes parameter, gradient and moments number by number as they lie in memory."""

    def step(model, optimizer):
        model(torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(memory_format):
        model = torch.nn.Conv2d(3, 5, 3).to(memory_format=memory_format)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    torch.manual_seed(0)
    model, optimizer = make(saved_as)
    step(model, optimizer)
    other, resumed = make(loaded_as)
    load_weights_into(other, gather_state(model, main=True))
    load_optimizer_into(resumed, copy.deepcopy(gather_state(optimizer, main=True)))
    step(model, optimizer)
    step(other, resumed)
    assert other.weight.is_contiguous(memory_format=loaded_as)
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)
    moments = [chosen.state_dict()["state"][0]["exp_avg_sq"] for chosen in (resumed, optimizer)]
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-9)


def test_what_cannot_be_divided_and_the_first_version_of_fsdp_are_refused(settings, monkeypatch):
    for name, value in {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    check_training(configured(settings, {"use_lora": False}))
    for field, value in {"use_lora": True, "train.use_8bit_adam": True, "mixed_precision": "fp16"}.items():
        refused(f"^{field} is ", check_training, configured(settings, {"use_lora": False, field: value}))
    refused("fsdp_version: 2", make_accelerator, "no", may_shard=True)


FAULTY = """
import os, runpy, signal, sys
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

def train(*words):
    from ddpo_pytorch.training import held_out
    from ddpo_pytorch.training.run_state import RunState
    held_out.save_grid, write = lambda *arguments: None, RunState.write

    def write_or_die(state, entry):
        mark = os.path.join(os.path.dirname(__file__), "killed")
        if entry["epoch"] == 1 and os.environ["RANK"] == "1" and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, entry)

    RunState.write, sys.argv[:] = write_or_die, words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise

if __name__ == "__main__":
    config, _, words = config_from_args(parse_args(sys.argv[1:]))
    config.start_method = "fork"
    elastic_launch(config, train)(*words[1:])  # without Python's -u
"""


@pytest.mark.slow
def test_two_agents_restart_a_killed_worker_and_resume(settings, tmp_path):
    """torchrun's agents on two nodes of a process each; a worker is killed in the second epoch.

    Workers are forked from their agents. As commands, the four of them would import the libraries for a minute.
    """
    (tmp_path / "faulty.py").write_text(FAULTY)
    # several restarts: a worker that is back before the other agent noticed loses its peer once more
    launch = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=5", "--monitor_interval=0.1", "--redirects=3"]
    launch += ["--rdzv_backend=c10d", "--rdzv_id=run", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    launch += [f"--log_dir={tmp_path / 'workers'}", "scripts/train.py", *as_flags(settings | LIGHT)]
    # as documented: torchrun's shared store answers with the addresses of workers that have ended
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
    agents = [Script(tmp_path / "faulty.py", *launch, **shared) for _ in range(2)]
    ended = [agent.result() for agent in agents]
    assert [agent.returncode for agent in ended] == [0, 0], ended[0].stderr[-3000:]
    assert [entry["epoch"] for entry in read_lines(tmp_path / "logs" / "run" / "metrics.jsonl")] == [0, 1]
    said = "".join(path.read_text() for path in (tmp_path / "workers").rglob("stderr.log"))
    assert (tmp_path / "killed").exists() and "resumed from" in said

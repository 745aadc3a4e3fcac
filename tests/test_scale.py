"""More processes change nothing but the time: two nodes have the gradients and weights of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from launching import ON_CPU, ROOT, free_port, launch
from rl_tools import as_flags, weights

FILES = ROOT / "config" / "accelerate"


def moments(run: Path, epoch: int = 1) -> list[torch.Tensor]:
    """Adam's first moments in a checkpoint: after a single update the gradients, times 1 - beta1."""
    state = torch.load(run / f"checkpoint_{epoch}" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    return [memory["exp_avg"] for memory in state.values()]


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
    nodes = {"num_machines": 2, "num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    flags = ["scripts/train.py", *as_flags(settings)]
    with ThreadPoolExecutor() as pool:
        ranks = [nodes | {"machine_rank": node} for node in range(2)]
        list(pool.map(lambda rank: launch("multi_node.yaml", rank, *flags), ranks))
    run = tmp_path / "logs" / "run"
    assert_same_gradients(moments(run), moments(alone))
    right = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(left, right, strict=True):  # one line an epoch, though there are two nodes
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
    inputs = dict.fromkeys(("sample_and_score", "update"), 0)

    def counted(run, *arguments, stage):
        def count(unet, given):
            inputs[stage.__name__] += len(given[0])

        hook = run.pipe.unet.register_forward_pre_hook(count)
        result = stage(run, *arguments)
        hook.remove()
        return result

    for name in inputs:
        monkeypatch.setattr(script, name, partial(counted, stage=getattr(script, name)))
    train(num_epochs=1)
    assert inputs == {"sample_and_score": 8 * 3 * 2, "update": 4 * 3 * 2 + 4 * 2}


def test_launch_files_say_what_their_names_say():
    found = {path.stem: load_config_from_file(str(path)) for path in FILES.iterdir()}
    assert not any(launched.use_cpu for launched in found.values())
    assert {name: (one.distributed_type, one.num_machines, one.num_processes) for name, one in found.items()} == {
        "one_gpu": ("NO", 1, 1),
        "one_node_4": ("MULTI_GPU", 1, 4),
        "one_node_8": ("MULTI_GPU", 1, 8),
        "multi_node": ("MULTI_GPU", 2, 8),
        "fsdp": ("FSDP", 1, 4),
    }


@pytest.mark.slow
def test_a_slurm_job_saves_in_time_and_is_put_back_into_the_queue(settings, tmp_path):
    """A job of one node and two processes, with as much of Slurm's commands as it needs.

    srun hands signals to the command that it starts, and to no child of it; scontrol writes down what it is asked for.
    """
    commands = {
        "srun": """import signal, subprocess, sys
step = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGUSR1, lambda number, frame: step.send_signal(number))
sys.exit(step.wait())""",
        "scontrol": f"""import sys
print("127.0.0.1") if sys.argv[1] == "show" else open({str(tmp_path / "requeued")!r}, "w").write(sys.argv[2])""",
    }
    (tmp_path / "bin").mkdir()
    for name, code in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "node[1-1]", "NNODES": 1, "NODEID": 0, "GPUS_ON_NODE": 2}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"MAIN_PORT": str(free_port())}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "docs/slurm.sh", *as_flags(settings, num_epochs=1000, save_freq=1000)]
    environment = os.environ | ON_CPU | {"CUDA_VISIBLE_DEVICES": ""} | environment
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    while job.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 0, errors[-3000:]
    assert (tmp_path / "requeued").read_text() == "7"
    epochs = len(log.read_text().splitlines())
    assert 1 <= epochs < 1000 and (log.parent / f"checkpoint_{epochs}").is_dir(), errors[-3000:]
    asked = [line.split()[1] for line in (ROOT / "docs" / "slurm.sh").read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--signal=B:USR1@600", "--ntasks-per-node=1"} <= set(asked)

"""More processes change nothing but the time: two have the gradients of one, by each file of config/accelerate."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from launching import cpu_settings, finish, launch, start
from rl_tools import as_flags
from safetensors.torch import load_file

FILES = ROOT / "config" / "accelerate"
# one process with the samples of two: twice the batches, and twice as many of them in an update
ALONE = {"sample__num_batches_per_epoch": 4, "train__gradient_accumulation_steps": 2}


@pytest.fixture
def recorded(settings, tmp_path):
    """Function (name): arguments of tests/update_recorder.py for an epoch, the folder of its records, and its run's."""

    def prepare(name: str, **overrides):
        folder = tmp_path / f"record-{name}"
        folder.mkdir()
        fields = {"run_name": name, "num_epochs": 1, "train__max_grad_norm": 1e9} | overrides
        return ["tests/update_recorder.py", *as_flags(settings, **fields)], folder, tmp_path / "logs" / name

    return prepare


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "gradients.safetensors")


def entry(run: Path) -> dict:
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def assert_same_gradients(actual: dict, expected: dict) -> None:
    """To 1e-5 of the largest gradient of each tensor."""
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_have_the_gradients_of_one_process(recorded, tmp_path):
    """LoRA. Each node has one process, number 0 of its node: what was unique on a node only would collide."""
    arguments, alone, one = recorded("one", **ALONE)
    launch("one_gpu.yaml", {}, *arguments, RECORD=alone)
    arguments, together, two = recorded("two")
    flags = {"num_machines": 2, "num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    nodes = [start("multi_node.yaml", flags | {"machine_rank": node}, *arguments, RECORD=together) for node in range(2)]
    for node in nodes:
        finish(node)
    assert_same_gradients(gradients(together), gradients(alone))
    counts = json.loads((alone / "counts_0.json").read_text())
    # docs/scaling.md: samples x steps x 2 for guidance; the first of two updates has but one pass, of 4 samples
    assert counts["sample_and_score"] == 16 * 3 * 2 and counts["update"] == 8 * 3 * 2 + 4 * 2
    expected, actual = entry(one), entry(two)  # one line, though there are two nodes
    assert {key: actual[key] for key in actual if key.startswith("reward_")} == {
        key: expected[key] for key in expected if key.startswith("reward_")
    }
    assert actual["first_ratio_deviation"] == 0 and actual["global_step"] == expected["global_step"]
    assert (two / "grid_0001.png").read_bytes() != (two / "grid_0000.png").read_bytes()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
def test_one_node_has_the_gradients_of_one_process(recorded):
    """A full fine-tune."""
    arguments, alone, _ = recorded("one", use_lora=False, **ALONE)
    launch("one_gpu.yaml", {}, *arguments, RECORD=alone)
    arguments, together, _ = recorded("two", use_lora=False)
    launch("one_node_4.yaml", {"num_processes": 2, "main_process_port": 0}, *arguments, RECORD=together)
    assert_same_gradients(gradients(together), gradients(alone))


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", "NO", 1, 1),
        ("one_node_4", "MULTI_GPU", 1, 4),
        ("one_node_8", "MULTI_GPU", 1, 8),
        ("multi_node", "MULTI_GPU", 2, 8),
        ("fsdp", "FSDP", 1, 4),
    ],
)
def test_launch_files_say_what_their_names_say(name, kind, machines, processes):
    launched = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert launched.distributed_type == kind and not launched.use_cpu
    assert (launched.num_machines, launched.num_processes) == (machines, processes)
    assert {path.stem for path in FILES.iterdir()} == {"one_gpu", "one_node_4", "one_node_8", "multi_node", "fsdp"}


@pytest.fixture
def cluster(tmp_path):
    """Settings of a job of one node and two processes, and as much of Slurm's and Accelerate's commands as it needs.

    srun hands signals to the command that it starts, and to no child of it; scontrol writes down what it is asked for.
    train.py is started by way of tests/warm.py, to save time.
    """
    commands = {
        "srun": """import signal, subprocess, sys
step = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGUSR1, lambda number, frame: step.send_signal(number))
sys.exit(step.wait())""",
        "scontrol": f"""import sys
print("127.0.0.1") if sys.argv[1] == "show" else open({str(tmp_path / "requeued")!r}, "w").write(sys.argv[2])""",
        "accelerate": f"""import os, sys
at = sys.argv.index("scripts/train.py")
warm = ["--no_python", sys.executable, "tests/warm.py"]
os.execv({shutil.which("accelerate", path=Path(sys.executable).parent)!r},
         ["accelerate", *sys.argv[1:at], *warm, *sys.argv[at:]])""",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in commands.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "node[1-1]", "NNODES": 1, "NODEID": 0, "GPUS_ON_NODE": 2}
    names = {"PATH": f"{folder}:{os.environ['PATH']}", "MAIN_PORT": str(free_port())}
    return cpu_settings() | {f"SLURM_{name}": str(value) for name, value in slurm.items()} | names


@pytest.mark.slow
def test_a_slurm_job_saves_in_time_and_is_put_back_into_the_queue(cluster, settings, tmp_path):
    flags = as_flags(settings, num_epochs=1000, save_freq=1000)
    job = subprocess.Popen(
        ["bash", "docs/slurm.sh", *flags], cwd=ROOT, env=os.environ | cluster, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    while job.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 0, errors[-3000:]
    assert (tmp_path / "requeued").read_text() == "7"
    epochs = len(log.read_text().splitlines())
    assert 1 <= epochs < 1000 and (tmp_path / "logs" / "run" / f"checkpoint_{epochs}").is_dir(), errors[-3000:]


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", "docs/slurm.sh"], cwd=ROOT, check=True)
    asked = [line.split()[1] for line in (ROOT / "docs" / "slurm.sh").read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--signal=B:USR1@600", "--ntasks-per-node=1"} <= set(asked)

"""Scripts and their launcher: threads, timeouts, and settings that decide instead of the launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from ddpo_pytorch.utils.cores import available_cores, thread_limit
from ddpo_pytorch.utils.distributed import make_accelerator
from ddpo_pytorch.utils.errors import UserError

REPORT = """
import os, sys, torch
from ddpo_pytorch.utils.distributed import make_accelerator
accelerator = make_accelerator("no")
print("threads", torch.get_num_threads(), flush=True)
"""
# rank 0 works alone for some seconds, then all meet; under the scripts' own entry point
SLOW = """
import sys, time
from absl import flags
from ddpo_pytorch.utils.cli import cli
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.distributed import make_accelerator
flags.DEFINE_float("process_timeout", 1.0, "")

def main(_):
    accelerator = make_accelerator("no", process_timeout=flags.FLAGS.process_timeout)
    run_on_main_process(accelerator, time.sleep, 6)
    accelerator.wait_for_everyone()
    print("met", flush=True)

cli(main)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
LAUNCH += ("--dynamo_backend", "no")


def start(folder: Path, code: str, *launcher: str, options: tuple = (), **environment) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(code)
    own = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    own |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *launcher, str(folder / "script.py"), *options]
    return subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=300)


def threads_of(run: subprocess.CompletedProcess) -> set[int]:
    assert run.returncode == 0, run.stderr[-3000:]
    return {int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("threads")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_default_of_a_launcher_is_no_limit_of_the_user(tmp_path):
    cores = available_cores()
    assert threads_of(start(tmp_path, REPORT, *LAUNCH)) == {cores}
    assert threads_of(start(tmp_path, REPORT, *TORCHRUN)) == {max(1, cores // 2)}
    assert threads_of(start(tmp_path, REPORT, *TORCHRUN, OMP_NUM_THREADS="1")) == {1}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_limits_of_threads_are_read_as_openmp_reads_them(monkeypatch):
    bound = os.sched_getaffinity(0)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    try:
        for given, expected in (("1", 1), ("1,4", 1), ("0", len(bound)), ("many", len(bound)), ("", len(bound))):
            monkeypatch.setenv("OMP_NUM_THREADS", given)
            assert thread_limit() == expected
        monkeypatch.delenv("OMP_NUM_THREADS")
        os.sched_setaffinity(0, {min(bound)})
        assert available_cores() == thread_limit() == 1
    finally:
        os.sched_setaffinity(0, bound)


def test_settings_decide_and_not_the_launcher(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    threads = torch.get_num_threads()
    with caplog.at_level("INFO"):
        accelerator = make_accelerator("no", gradient_accumulation_steps=3)
    torch.set_num_threads(threads)
    assert accelerator.gradient_accumulation_steps == 3 and accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    lines = [message for message in caplog.messages if "ACCELERATE_" in message]
    assert [line.split("=")[0] for line in lines] == [
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_DYNAMO_BACKEND",
    ]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_USE_CPU", "perhaps"),
    ],
)
def test_what_no_script_knows_is_refused_by_name(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=variable):
        make_accelerator("no")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_timeout_out_of_range_is_refused(timeout):
    with pytest.raises(UserError, match="process_timeout"):
        make_accelerator("no", process_timeout=timeout)


@pytest.mark.slow
def test_a_process_waits_for_another_as_long_as_the_setting_says(tmp_path):
    short = start(tmp_path, SLOW, *TORCHRUN, options=("--process_timeout=2",))
    assert short.returncode != 0 and "met" not in short.stdout
    errors = [line for line in short.stderr.splitlines() if line.startswith("error: ")]
    assert any("process 1 waited 2 s" in line and "--process_timeout=" in line for line in errors), short.stderr
    assert 'script.py", line' not in short.stderr  # torchrun prints a traceback of its own

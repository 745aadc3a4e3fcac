"""Scripts and their launcher: threads, timeouts, and settings that decide instead of the launcher."""

import os
import signal
from types import SimpleNamespace

import psutil
import pytest
import torch
from launching import Script
from refusals import refused

from ddpo_pytorch.utils.cores import available_cores, thread_limit
from ddpo_pytorch.utils.distributed import SIGNALS, StopRequest, StopRequested, make_accelerator

# rank 0 works alone for some seconds, then all meet; under the scripts' own entry point
SLOW = """
import os, time, torch
from absl import flags
from ddpo_pytorch.utils.cli import cli
from ddpo_pytorch.utils.distributed import SIGNALS, StopRequest, StopRequested, make_accelerator, run_on_main_process

def main(_):
    os.sched_getaffinity = lambda _: {0, 1, 2, 3}
    accelerator = make_accelerator("no", process_timeout=2)
    os.write(1, f"threads {torch.get_num_threads()}\\n".encode())  # in one piece: both processes write to one pipe
    run_on_main_process(accelerator, time.sleep, 6)
    accelerator.wait_for_everyone()
    print("met", flush=True)

flags.DEFINE_float("process_timeout", 1.0, "")
cli(main)
"""


@pytest.mark.slow
def test_processes_share_threads_and_wait_for_each_other_as_long_as_the_setting_says(tmp_path):
    (tmp_path / "script.py").write_text(SLOW)
    run = Script(tmp_path / "script.py", processes=2, OMP_NUM_THREADS=4).result()
    assert run.returncode != 0 and run.stdout.splitlines() == ["threads 2"] * 2  # of 4 cores; they never met
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert any("process 1 waited 2 s" in line and "--process_timeout=" in line for line in errors), run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("RANK", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "2")])
def test_variables_that_another_launch_left_behind_are_one_line(tmp_path, name, value):
    (tmp_path / "script.py").write_text(SLOW)
    run = Script(tmp_path / "script.py", **{name: value}).result()
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ") and name in run.stderr.splitlines()[-1]


def test_limits_of_threads_are_read_as_openmp_reads_them_and_the_default_of_a_launcher_is_none(monkeypatch):
    def cores(count):  # where each worker of pytest-xdist has but one
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)

    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cores(4)
    for launcher, variables, expected in (
        ("/usr/bin/torchrun", {}, 4),
        ("torch.distributed.run", {"OMP_NUM_THREADS": "1"}, 1),
        ("accelerate.commands.launch", {}, 4),
        ("accelerate launch --num_cpu_threads_per_process=1", {}, 1),
        ("bash", {}, 1),
    ):
        parent = SimpleNamespace(cmdline=launcher.split, environ=lambda variables=variables: variables)
        monkeypatch.setattr(psutil, "Process", lambda number, parent=parent: parent)
        assert thread_limit() == expected, launcher
    for given, expected in (("1", 1), ("1,4", 1), ("0", 4), ("many", 4), ("", 4), ("9", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert thread_limit() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores(1)
    assert available_cores() == thread_limit() == 1


def test_settings_decide_and_not_the_launcher(monkeypatch, caplog):
    ignored = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "7", "DYNAMO_BACKEND": "INDUCTOR"}
    for name, value in ({"USE_CPU": "true"} | ignored).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with caplog.at_level("INFO"):
        accelerator = make_accelerator("no", gradient_accumulation_steps=3)
    assert accelerator.gradient_accumulation_steps == 3 and accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    lines = [message.split("=")[0] for message in caplog.messages if "ACCELERATE_" in message]
    assert lines == [f"ACCELERATE_{name}" for name in ignored]
    # fp16 itself needs a GPU; what its scaler is made from does not
    assert make_accelerator("no", growth_interval=100).scaler_handler.growth_interval == 100


@pytest.mark.parametrize("precision, cpu, warnings", [("bf16", "AVX2", 1), ("bf16", "AVX512", 0), ("no", "AVX2", 0)])
def test_a_processor_that_emulates_bf16_is_reported(monkeypatch, caplog, precision, cpu, warnings):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    make_accelerator(precision)
    assert sum(record.levelname == "WARNING" for record in caplog.records) == warnings


def test_what_no_script_knows_is_refused_by_name(monkeypatch):
    for timeout in (0, float("nan"), 1e12):
        refused(f"process_timeout is {timeout}", make_accelerator, "no", process_timeout=timeout)
    for name, value in (("USE_DEEPSPEED", "true"), ("USE_PARALLELISM_CONFIG", "true"), ("USE_CPU", "perhaps")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_{name}", value)
            refused(f"ACCELERATE_{name}", make_accelerator, "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # without may_shard
    refused("FSDP", make_accelerator, "no")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_handlers_come_back(number):
    accelerator = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda tensor, how: tensor)
    before = signal.getsignal(number)
    with StopRequest(accelerator) as request:
        request.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested):
            request.check()
        assert request.name == signal.Signals(number).name
    assert signal.getsignal(number) == before

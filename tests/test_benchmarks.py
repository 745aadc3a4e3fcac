"""The benchmarks run and print what they promise; their findings are measured by hand and never asserted."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from launching import ON_CPU, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark(monkeypatch, caplog):
    """Function (name, options): run a benchmark in this process; what its last line says."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(name: str, *options: object) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        with caplog.at_level("INFO"):
            importlib.import_module(name).main()
        return json.loads(caplog.messages[-1])

    return run


def test_stage_one(benchmark):
    figures = benchmark("stage_one", "--count", 32, "--batch_size", 2, "--turns", 1)
    assert min(figures[name]["ratio"] for name in ("step", "step_bf16", "input")) > 0
    with pytest.raises(SystemExit):
        benchmark("stage_one", "--images", ROOT / "tests")


def test_sampling(benchmark, monkeypatch):
    monkeypatch.setattr("sampling.peak_mib", lambda *_: 100)  # runs eval.py
    monkeypatch.setattr("sampling.STEPS", 2)
    figures = benchmark("sampling", "--count", 2, "--turns", 1, "--images_per_prompt", 1)
    for guidance in ("guidance_1", "guidance_3"):
        assert {"against_bare", "against_official", "all_cores"} < set(figures[guidance])
        assert min(figures[guidance].values()) > 0
    assert set(figures["peak_mib"]) == {"32", "128"}
    with pytest.raises(SystemExit):
        benchmark("sampling", "--turns", 0)


def test_gpu_script_without_a_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    subprocess.run(["bash", "benchmarks/gpu.sh", "--simulate", file], cwd=ROOT, env=os.environ | ON_CPU, check=True)
    found = json.loads(file.read_text())
    speed = found["speed default"]
    assert set(speed["ratio"]) >= {"rollout", "update", "epoch", "memory"} and min(speed["ratio"].values()) > 0
    assert speed["unet_inputs"] == 4 and speed["set"][-1] == "train.batch_size=1" and len(found["training"]) == 1
    assert all(0 < epoch["reward_mean"] < 1 and epoch["first_ratio_deviation"] == 0 for epoch in found["training"])

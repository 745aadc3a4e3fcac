"""The benchmarks run and print what they promise; what they find is measured by hand and never asserted."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(name, *options):
    command = [sys.executable, f"benchmarks/{name}", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_stage_one():
    result = run("stage_one.py", "--count", 32, "--batch_size", 2, "--turns", 1)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    for name in ("step", "step_bf16"):
        assert figures[name]["ratio"] == pytest.approx(
            figures[name]["straightforward_s"] / figures[name]["latents_s"], rel=0.02
        )
    assert figures["input"]["ratio"] > 0 and "times as fast" in result.stdout
    wrong = run("stage_one.py", "--images", "tests")
    assert wrong.returncode == 2 and "holds 0 .jpg files" in wrong.stderr


def test_memory_budget():
    result = run("memory_budget.py", "--batch_size", 1)
    assert result.returncode == 0, result.stderr
    # 859,520,964 float32 numbers
    assert "3.20 GiB  UNet weights" in result.stdout and result.stdout.count("in all") == 4


def test_sampling():
    result = run("sampling.py", "--count", 4, "--turns", 1, "--images_per_prompt", 1)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    for guidance in ("guidance_1", "guidance_3"):
        ratios = figures[guidance]
        assert ratios["against_bare"] == pytest.approx(
            ratios["eval_images_per_s"] / ratios["bare_diffusers_images_per_s"], rel=0.05
        )
        assert ratios["against_official"] == pytest.approx(
            ratios["eval_lora_images_per_s"] / ratios["official_way_images_per_s"], rel=0.05
        )
        assert ratios["all_cores"] == pytest.approx(
            ratios["eval_all_cores_images_per_s"] / ratios["bare_diffusers_all_cores_images_per_s"], rel=0.05
        )
    assert (
        figures["cores"] >= 1 and set(figures["peak_mib"]) == {"32", "128"} and min(figures["peak_mib"].values()) > 100
    )
    assert "times as fast as bare diffusers" in result.stdout
    wrong = run("sampling.py", "--turns", 0)
    assert wrong.returncode == 2 and "must be at least 1" in wrong.stderr

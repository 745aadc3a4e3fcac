"""The benchmarks run and print what they promise; what they find is measured by hand and never asserted."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

from ddpo_pytorch.utils.errors import UserError

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


def test_training():
    fields = [f"--set={name}" for name in ("sample.num_steps=2", "sample.batch_size=2", "train.batch_size=1")]
    options = ("--turns", 1, "--batches", 1, "--threads", 1, "--updates")
    result = run_script("../benchmarks/training.py", *options, 2, *fields)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    for part in ("rollout", "update", "epoch"):
        ours, baseline = (figures[side][f"{part}_samples_per_s"] for side in ("ours", "baseline"))
        assert figures["ratio"][part] == pytest.approx(ours / baseline, rel=0.02)
    assert figures["ratio"]["memory"] == pytest.approx(
        figures["peak_mib"]["ours"] / figures["peak_mib"]["baseline"], rel=0.01
    )
    assert figures["unet_inputs"] == 4 and figures["set"][-1] == "train.batch_size=1"
    assert "loss: ours and the baseline's differ by" in result.stdout
    wrong = run_script("../benchmarks/training.py", *options, 3, *fields)
    assert wrong.returncode == 2 and "--updates 3 does not divide the 2 train batches of an epoch" in wrong.stderr


def test_training_knows_its_models(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import workload

    with torch.device("meta"):
        pipe = workload.random_model("sd15")
    parts = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}  # parameters of Stable Diffusion 1.5
    for name, expected in parts.items():
        assert sum(weight.numel() for weight in getattr(pipe, name).parameters()) == expected
    pipe.unet.save_config(tmp_path / "unet")
    forward, both = workload.unet_flops(tmp_path)
    assert 0.6e12 < forward < 0.9e12 and 1.9 * forward < both < 3 * forward
    given = argparse.Namespace(size="mini", batches=1, set=["train.no_such=1"])
    with pytest.raises(UserError, match="no_such"):
        workload.configure(tmp_path, given)

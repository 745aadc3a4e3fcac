"""Scripts on a simulated GPU: no mix of devices or types, products in half precision, host syncs within a budget."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from common_fixtures import random_pipeline
from launching import ON_CPU, ROOT
from rated_world import write_config, write_rated_world
from rl_tools import as_flags, usual_settings
from sample_sets import write_samples
from script_tools import options
from stage_tools import SPLIT

from ddpo_pytorch.data.isic import CAPTIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("cc") or torch.version.cuda is None, reason="no C compiler or CUDA build"),
]
LOOPS = "train", "rollout", "rollout_gradients", "ppo", "optimizer", "ddim_with_logprob", "pipeline_with_logprob"
PLANTED = """
import sys, torch
from ddpo_pytorch.diffusers_patch import pipeline_with_logprob as place
from ddpo_pytorch.generator.pipeline import load_pipeline
step = place.ddim_step_with_logprob
def planted(*arguments):
    latents, log_probs = step(*arguments)
    latents.amax().item()
    return latents, log_probs
place.ddim_step_with_logprob = planted
pipe = load_pipeline(sys.argv[1], device="cuda")
pipe.scheduler.set_timesteps(2, device=pipe.device)
place.pipeline_with_logprob(pipe, "", num_inference_steps=2, eta=1.0, generator=[torch.Generator()])
"""

PROBE = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import memory_budget
print(json.dumps({{"script": "memory", "host_syncs": [], "gib": memory_budget.ddpo(4, False)}}))
"""


@pytest.fixture(scope="module")
def found(judges, config_file, world, alexnet, tmp_path_factory) -> dict[str, dict]:
    """What was counted, by the name of the run, with "syncs" in the training loop by function.

    train.py has 16 samples of 2 steps, in 4 batches, 2 updates of 2 minibatches, and grids of 16 images at once. Its
    UNet has a single level, as each operation takes a millisecond here.
    """
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS[6:8]))
    settings = usual_settings(random_pipeline(folder / "model", (16,), (True,)), judges[6], folder)
    settings |= {"num_epochs": 1, "sample.num_steps": 2, "sample.batch_size": 16, "sample.num_batches_per_epoch": 1}
    settings |= {"train.batch_size": 4, "train.gradient_accumulation_steps": 2, "held_out.classifier": judges[4]}
    settings |= {"prompt_fn": "from_file", "prompt_fn_kwargs.path": folder / "prompts.txt"}
    model = {"pretrained__model": settings["pretrained.model"]}
    full = {"use_lora": False, "mixed_precision": "bf16", "run_name": "full", "held_out__every": 1}
    full |= {"train__batch_size": 8, "train__gradient_accumulation_steps": 1, "held_out__images_per_prompt": 1}
    full["sample__num_steps"] = 1
    sampling = {"logdir": folder / "samples", "mixed_precision": "fp16", "sample__num_steps": 2}
    sampling |= {"eval__num_samples_per_prompt": 1, "eval__batch_size": 4}
    stage = model | {"sd__data_path": world / "images", "sd__csv": world / SPLIT.format("train"), "sd__image_size": 64}
    stage |= {"sd__output": folder / "sd", "sd__limit": 8, "sd__num_steps": 2, "sd__batch_size": 4, "sd__log_every": 2}
    stage |= {"sd__grid_every": 0, "sd__save_every": 0, "sd__cache_dir": folder / "cache", "sd__num_workers": 0}
    classifier = ["--num_classes=4", "--arch=tinynet_e", "--weights=none", "--image_size=32", "--num_epochs=1"]
    classifier += ["--batch_size=16", "--limit=32", f"--data_path={world / 'images'}", "--mixed_precision=fp16"]
    classifier.append(f"--checkpoint_dir={folder / 'judge'}")
    classifier += [f"--{name}_csv={world / SPLIT.format(name)}" for name in ("train", "val")]
    real, fake = (write_samples(folder / name, {CAPTIONS[8]: 3}, seed) for seed, name in enumerate(("real", "fake")))
    metric = {"metric__real_path": real, "metric__fake_path": fake, "metric__output": folder / "metrics"}
    metric |= {"metric__cache_dir": folder / "features", "metric__alexnet": alexnet, "metric__inception": ""}
    rated = write_config(write_rated_world(folder / "rated", count=24))
    (folder / "planted.py").write_text(PLANTED)
    (folder / "probe.py").write_text(PROBE)
    commands = {
        "lora": ["scripts/train.py", *as_flags(settings, mixed_precision="fp16")],
        "full": ["scripts/train.py", *as_flags(settings, **full)],
        "eval": ["scripts/eval.py", *options(config_file, **sampling)],
        "train_sd": ["scripts/train_sd.py", *options(config_file, **stage, mixed_precision="fp16")],
        "classifier": ["scripts/train_isic_classifier.py", *classifier],
        "metric": ["scripts/metric.py", *options(config_file, **metric, metric__extractors="('judge',)")],
        "rlhf": ["scripts/train_rlhf.py", *options(rated, rlhf__output=folder / "rlhf", mixed_precision="fp16")],
        "planted": [folder / "planted.py", settings["pretrained.model"]],
        "memory": [folder / "probe.py"],
    }
    words = [str(word) for command in commands.values() for word in ("--", *command)]
    environment = {name: value for name, value in (os.environ | ON_CPU).items() if name != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "benchmarks/simulated_gpu.py", *words[1:]]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"script"')]
    for line in lines:
        line["syncs"] = Counter()
        for count, _, place in line["host_syncs"]:
            if Path(place.split(":")[0]).stem in LOOPS:
                line["syncs"][place.split(" ")[-1]] += count
    found = dict(zip([*commands, "probe"], lines, strict=True))
    return found | {"features": [path.name for path in (folder / "features").iterdir()]}


# in batches of 4, as the updates score them, and not of sample.batch_size; the check runs beside the next batch
EPOCH = {"check_schedule": 1, "check_images": 4, "sample_and_score": 2, "run_epochs": 2, "step": 2, "averages": 6}


@pytest.mark.parametrize(
    ("name", "half", "expected"),
    [
        # initial noise of 2 grids comes from the CPU; "update" and "averages" are once an epoch
        ("lora", "float16", EPOCH | {"update": 1, "set_gradients": 1, "pipeline_with_logprob": 2}),
        # and 2 evaluations; samples in 2 batches of 8, each a whole update
        ("full", "bfloat16", EPOCH | {"check_images": 2, "update": 1, "pipeline_with_logprob": 4}),
        ("eval", "float16", {"pipeline_with_logprob": 1}),
        ("train_sd", "float16", {}),
        ("classifier", "float16", {}),
        ("rlhf", "float16", {}),
    ],
)
def test_no_step_waits_for_the_device_and_products_are_in_half_precision(found, name, half, expected):
    """The counts are complete: any other sync of the loops, in a denoising step or a minibatch, is one more."""
    assert found[name]["syncs"] == expected
    products = found[name]["products"]
    rest = sum(products.values()) - products[f"torch.{half}"]  # judges and metrics, which compute in float32
    few_steps = name in ("full", "eval", "rlhf")
    assert products[f"torch.{half}"] > (2 if few_steps else 5) * rest and found[name]["peak_gib"] > 0


def test_an_item_in_the_denoising_loop_is_found_and_features_of_a_gpu_are_kept_apart(found):
    """Both runs draw one batch in two steps."""
    assert found["planted"]["syncs"] == {"pipeline_with_logprob": found["eval"]["syncs"]["pipeline_with_logprob"] + 2}
    assert found["features"] and all(name.endswith("-cuda-tf32") for name in found["features"])


@pytest.mark.parametrize(("name", "function", "epoch"), [("classifier", "fit", 1), ("rlhf", "train_stage", 0)])
def test_steps_of_a_fused_optimizer_do_not_wait_in_fp16(found, name, function, epoch):
    syncs = found[name]["host_syncs"]
    items = [count for count, kind, place in syncs if kind == "item" and place.endswith(f" {function}")]
    assert sum(items) == epoch  # the mean loss


def test_memory_of_stable_diffusion_is_what_the_documentation_states(found):
    """SD 1.5's size, with the 4 samples a minibatch of config/dgx.py."""
    (row,) = re.findall(r"^\| 4 \(4 GPUs, 16 GB\) \| (.*) \|$", (ROOT / "docs" / "scaling.md").read_text(), re.M)
    names = ("resident", "update", "rollout", "plain rollout", "decoding")
    stated = dict(zip(names, map(float, row.split(" | ")), strict=True))
    assert found["memory"]["gib"] == pytest.approx(stated, abs=0.05)

"""What eval.py draws: diffusers' own images, from noise and passes that no other setting moves; damaged ones are told.

Every test runs the script's main on a tiny model.
"""

import json
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, JpegImagePlugin
from safetensors.torch import load_file, save_file
from script_tools import PROMPTS, files_of, options

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.sampling import images_per_pass, plan
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
PLAIN = {"eval__classifier": "", "sample__num_steps": 2}


def images_of(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(folder).items() if path.startswith("images/")}


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "image_log.json").read_text())


def damaged(model: Path, folder: Path, part: str, file: str, change) -> Path:
    """A copy of the model, by links, in which `change(weights)` was applied to one of its weight files."""
    for path in model.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    weights = load_file(model / part / file)
    change(weights)
    (folder / part / file).unlink()
    save_file(weights, folder / part / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def deaf_model(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A model of finite weights whose text encoder overflows at the word "ruler", in some of PROMPTS."""
    tokenizer = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None).tokenizer
    tokens = [set(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    ruled = [number for number, prompt in enumerate(PROMPTS) if "ruler" in prompt]
    (token, *_) = set.intersection(*(tokens[i] for i in ruled)) - set.union(
        *(tokens[i] for i in range(4) if i not in ruled)
    )

    def change(weights):
        name = next(name for name in weights if name.endswith("token_embedding.weight"))
        weights[name][token] = 3e38 * (-1.0) ** torch.arange(weights[name].shape[1])

    folder = tmp_path_factory.mktemp("models") / "deaf"
    return damaged(tiny_pipeline_dir, folder, "text_encoder", "model.safetensors", change)


def test_seeds_depend_on_seed_text_and_index_alone():
    whole = {(job.prompt, job.path[-9:]): job.seed for job in plan([(p, {}) for p in PROMPTS], 5, seed=3)}
    part = {(job.prompt, job.path[-9:]): job.seed for job in plan([(p, {}) for p in reversed(PROMPTS[1:3])], 7, seed=3)}
    shared = whole.keys() & part.keys()
    assert len(shared) == 10 and all(whole[key] == part[key] for key in shared)
    other = {job.seed for job in plan([(p, {}) for p in PROMPTS], 5, seed=4)}
    assert len(set(whole.values()) | other) == 40


def test_batch_size_other_prompts_and_more_images_change_no_byte(config_file, run_main, tmp_path):
    """Exactly, on a CPU: passes have one shape there, and a row of a pass does not depend on its place in it."""
    runs = {
        "1": {"eval__batch_size": 1},
        "7": {"eval__batch_size": 7},
        "64": {"eval__batch_size": 64},
        "more": {"eval__num_samples_per_prompt": 9},
        "subset": {"eval__prompts": (PROMPTS[3], PROMPTS[1])},
    }
    drawn = {}
    for name, fields in runs.items():
        run_main(
            "eval.py", config_file, logdir=str(tmp_path / name), **PLAIN | {"sample__guidance_scale": 3.0} | fields
        )
        drawn[name] = images_of(tmp_path / name)
    assert len(drawn["1"]) == 12 and drawn["1"] == drawn["7"] == drawn["64"]
    assert len(drawn["more"]) == 36 and drawn["1"].items() <= drawn["more"].items()
    assert len(drawn["subset"]) == 6 and drawn["subset"].items() <= drawn["1"].items()


def test_images_of_a_pass_on_a_cpu(tiny_pipeline_dir):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    sizes = {}
    for side in (8, 16, 32, 64, 128):
        pipe.unet.register_to_config(sample_size=side)
        sizes[side] = images_per_pass(pipe, 20)
    assert sizes == {8: 32, 16: 32, 32: 8, 64: 2, 128: 1}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 1.0), ("ddim", 0.0), ("dpm++", 1.0)])
def test_images_are_those_of_diffusers(scheduler, eta, guidance, config_file, tiny_pipeline_dir, run_main, tmp_path):
    fields = {"sample__scheduler": scheduler, "sample__eta": eta, "sample__guidance_scale": guidance}
    fields |= {"eval__num_samples_per_prompt": 1, "eval__classifier": "", "sample__num_steps": 5}
    run_main("eval.py", config_file, logdir=str(tmp_path / "x"), **fields)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "ddim":
        pipe.scheduler, arguments = DDIMScheduler.from_config(pipe.scheduler.config), {"eta": eta}
    else:
        kind = {"algorithm_type": "dpmsolver++", "solver_order": 2}
        pipe.scheduler, arguments = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **kind), {}
    for entry in log_of(tmp_path / "x"):
        own = load_image(tmp_path / "x" / entry["path_to_img"])
        noise = torch.Generator().manual_seed(entry["seed"])
        image = pipe(
            entry["prompt"],
            num_inference_steps=5,
            guidance_scale=guidance,
            generator=noise,
            output_type="pt",
            **arguments,
        ).images[0]
        assert (image - own).abs().max() < 0.51 / 255  # half a level of rounding, and the last bits


def test_jpeg_by_option_is_judged_as_stored(config_file, judges, run_main, tmp_path):
    fields = {"eval__num_samples_per_prompt": 1, "sample__num_steps": 2}
    run_main("eval.py", config_file, logdir=str(tmp_path / "jpg"), eval__image_format="jpg", **fields)
    run_main("eval.py", config_file, logdir=str(tmp_path / "png"), **fields)
    log = log_of(tmp_path / "jpg")
    assert [entry["path_to_img"] for entry in log] == [f"images/{folder_name(p)}/00000.jpg" for p in PROMPTS]
    stored = torch.stack([load_image(tmp_path / "jpg" / entry["path_to_img"]) for entry in log])
    exact = torch.stack([load_image(tmp_path / "png" / entry["path_to_img"]) for entry in log_of(tmp_path / "png")])
    assert 0 < (stored - exact).abs().mean() < 0.05
    logits = load_classifier(judges[6]).logits(stored)
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / "jpg" / log[0]["path_to_img"]) as image:
        assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0
        tables = image.quantization
    Image.new("RGB", (8, 8)).save(tmp_path / "q95.jpg", quality=95, subsampling=0)
    with Image.open(tmp_path / "q95.jpg") as image:
        assert image.quantization == tables


def test_every_level_survives_the_file(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    for image in (levels, levels.float() / 255):
        save_image(tmp_path / "x.png", image)
        assert torch.equal((load_image(tmp_path / "x.png") * 255).round().to(torch.uint8), levels)


def test_images_that_are_not_finite_are_named_and_the_others_complete(config_file, deaf_model, run_main, tmp_path):
    with pytest.raises(UserError) as caught:
        run_main("eval.py", config_file, logdir=str(tmp_path / "x"), pretrained__model=str(deaf_model), **PLAIN)
    ruled = [prompt for prompt in PROMPTS if "ruler" in prompt]
    assert 0 < len(ruled) < 4
    message = str(caught.value)
    assert message.startswith(f"{3 * len(ruled)} images are not finite and were not written, the first is images/")
    assert f"{folder_name(ruled[0])}/00000.png of {ruled[0]!r}" in message and "\n" not in message
    assert message.endswith("Run again with another logdir and other weights")  # float32 it was
    assert [entry["prompt"] for entry in log_of(tmp_path / "x")] == [
        p for p in PROMPTS if p not in ruled for _ in "123"
    ]
    assert not list((tmp_path / "x").glob("*.jsonl"))
    run_main("eval.py", config_file, logdir=str(tmp_path / "sound"), **PLAIN)
    sound = images_of(tmp_path / "sound")
    expected = {path: data for path, data in sound.items() if Path(path).parent.name not in map(folder_name, ruled)}
    assert images_of(tmp_path / "x") == expected


@pytest.mark.slow
def test_two_processes_end_in_one_line_about_images_that_are_not_finite(config_file, deaf_model, tmp_path):
    fields = {"pretrained__model": deaf_model, "logdir": tmp_path / "x", "eval__num_samples_per_prompt": 11, **PLAIN}
    result = run_script("eval.py", *options(config_file, **fields), processes=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    count = 11 * sum("ruler" in prompt for prompt in PROMPTS)
    assert result.returncode != 0 and len(errors) == 1 and f"error: {count} images are not finite" in errors[0]
    assert len(log_of(tmp_path / "x")) == len(images_of(tmp_path / "x")) == 44 - count


def test_black_images_are_counted(config_file, tiny_pipeline_dir, run_main, tmp_path, caplog):
    def change(weights):
        weights["decoder.conv_out.bias"] -= 1e3

    model = damaged(tiny_pipeline_dir, tmp_path / "m", "vae", "diffusion_pytorch_model.safetensors", change)
    with caplog.at_level(logging.WARNING):
        run_main("eval.py", config_file, logdir=str(tmp_path / "x"), pretrained__model=str(model), **PLAIN)
    first = tmp_path / "x" / "images" / folder_name(PROMPTS[0]) / "00000.png"
    assert f"12 images are black, the first is {first}" in caplog.text
    assert {entry["black"] for entry in log_of(tmp_path / "x")} == {True}


def test_weights_that_are_not_finite_are_refused(config_file, tiny_pipeline_dir, run_main, tmp_path):
    def change(weights):
        weights["conv_out.weight"][0, 0, 0, 0] = torch.nan

    file = "diffusion_pytorch_model.safetensors"
    model = damaged(tiny_pipeline_dir, tmp_path / "m", "unet", file, change)
    for fields, name in (
        ({"load_from": str(model / "unet" / file)}, model / "unet" / file),
        ({"unet_path": str(model / "unet" / file)}, model / "unet" / file),
        ({"pretrained__model": str(model)}, model / "unet" / file),
    ):
        with pytest.raises(UserError) as caught:
            run_main("eval.py", config_file, logdir=str(tmp_path / "x"), **fields)
        assert str(caught.value).startswith(f"{str(name)!r}: conv_out.weight holds NaN or infinity as float32")
        assert not (tmp_path / "x").exists()


def test_a_prompt_that_a_file_repeats_is_refused(config_file, run_main, tmp_path):
    (tmp_path / "twice.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n{PROMPTS[0]}\n")
    with pytest.raises(UserError, match="is given twice; give every prompt once"):
        run_main("eval.py", config_file, prompt_fn_kwargs__path=str(tmp_path / "twice.txt"), logdir=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_progress_bar_counts_missing_images_on_a_terminal(config_file, tmp_path):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    arguments = options(config_file, logdir=tmp_path / "x", eval__prompts="'free text','and more'", **PLAIN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "scripts/eval.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    assert b"6/6" in shown and b"img/s" in shown
    assert {path.parent.name for path in (tmp_path / "x").rglob("*.png")} == {"free_text", "and_more"}

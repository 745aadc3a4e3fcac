"""eval.py on a tiny model: the folder it writes, processes, kills, reruns, other settings, bad input."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, JpegImagePlugin
from safetensors.torch import load_file, save_file
from script_tools import PROMPTS, files_of, load_module, options, succeed

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import labels_of
from ddpo_pytorch.data.sample_folder import folder_name, list_samples, read_settings
from ddpo_pytorch.generator.lora import add_lora, save_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
COUNT = 11  # images per prompt: 4 * 11 = 44 are passes of 32 and 12, uneven for 2 processes
PLAIN = {"eval__classifier": "", "sample__num_steps": 2}
FOLDERS = [f"images/{folder_name(prompt)}" for prompt in PROMPTS]


def images_of(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(folder).items() if path.startswith("images/")}


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "image_log.json").read_text())


@pytest.fixture
def evaluate(run_main, config_file):
    """Function (logdir, fields): eval.py's main in this process."""
    return lambda folder, **fields: run_main("eval.py", config_file, logdir=str(folder), **fields)


@pytest.fixture(scope="module")
def run_dir(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A run folder with one LoRA checkpoint that changes the output."""
    unet = load_pipeline(tiny_pipeline_dir).unet
    add_lora(unet, 2, ["to_q", "to_v"], seed=0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("logs") / "run"
    (folder / "checkpoint_3").mkdir(parents=True)
    save_lora(unet, folder / "checkpoint_3")
    return folder


@pytest.fixture(scope="module")
def command(config_file, run_dir):
    """Function (logdir): arguments that sample with the run folder's weights."""
    return lambda folder: options(config_file, logdir=folder, load_from=run_dir, eval__num_samples_per_prompt=COUNT)


@pytest.fixture(scope="module")
def samples(command, tmp_path_factory) -> Path:
    """The folder that one process of eval.py writes."""
    folder = tmp_path_factory.mktemp("samples") / "rl"
    result = succeed("eval.py", *command(folder))
    assert "44 images for 4 prompts, 44 are missing" in result.stderr
    assert re.search(rf"44 images in {folder}; drawn now: 44, [\d.]+ images/s; peak memory .* GiB", result.stderr)
    return folder


@pytest.mark.slow
def test_log_settings_and_images(samples, judges, run_dir):
    log = log_of(samples)
    assert [entry["sampleID"] for entry in log] == list(range(44))
    expected = [(p, f"images/{folder_name(p)}/{i:05d}.png") for p in PROMPTS for i in range(COUNT)]
    assert [(entry["prompt"], entry["path_to_img"]) for entry in log] == expected
    assert len({entry["seed"] for entry in log}) == 44
    images = torch.stack([load_image(samples / entry["path_to_img"]) for entry in log])
    assert images.shape == (44, 3, 64, 64) and images.std() > 0.01
    logits = load_classifier(judges[6]).logits(images)
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    assert {entry["weights_sha256"] for entry in log} == {read_settings(samples)["weights_sha256"]}
    for entry, predicted in zip(log, (logits > 0).long().tolist(), strict=True):
        stated = list(labels_of(entry["prompt"]))
        assert entry["labels"] == stated and entry["predictions"] == predicted and not entry["black"]
        assert entry["reward"] == f"{sum(a == b for a, b in zip(stated, predicted, strict=True)) / 6:.4f}"
    settings = read_settings(samples)
    assert settings["seed"] == 42 and settings["device"] == "cpu" and settings["images_per_pass"] is None
    about = json.loads((samples / "settings.json").read_text())["about"]
    assert about["prompts"] == list(PROMPTS) and about["classifier"] == str(judges[6])
    assert about["load_from"] == str(run_dir) and about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not list(samples.glob("*.jsonl"))


@pytest.mark.slow
def test_two_nodes_write_the_same_bytes(samples, command, tmp_path):
    """Two processes with local rank 0, as torchrun starts them on two machines with a common disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "scripts/eval.py", *command(tmp_path / "nodes")]
    nodes = [
        subprocess.Popen(arguments, cwd=ROOT, env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert files_of(tmp_path / "nodes") == files_of(samples)


def test_nodes_without_a_common_folder_are_refused(tmp_path):
    check_shared = load_module(ROOT / "scripts" / "eval.py").check_shared
    check_shared(tmp_path, [True, True])
    with pytest.raises(UserError, match=f"process 1 does not see {str(tmp_path)!r}"):
        check_shared(tmp_path, [True, False])


@pytest.mark.slow
def test_a_killed_run_is_completed_by_two_processes_to_the_same_bytes(samples, command, tmp_path):
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, "scripts/eval.py", *command(folder)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.glob("images/*/*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(list(folder.glob("images/*/*.png"))) < 4 * COUNT and not (folder / "image_log.json").exists()
    # other remains of a kill: an image without its line, a line cut short, a temporary file
    if missing := [path for path in files_of(samples) if path.endswith(".png") and not (folder / path).exists()]:
        (folder / missing[0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / missing[0], folder / missing[0])
    with open(folder / "image_log.part0.jsonl", "a") as file:
        file.write('{"prompt": "a dermo')
    next(folder.glob("images/*")).joinpath(f".00002.png.{process.pid}.tmp").write_bytes(b"")
    result = succeed("eval.py", *command(folder), processes=2)
    assert files_of(folder) == files_of(samples) and result.stderr.count("images in") == 1


@pytest.mark.slow
def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(samples, run_dir, evaluate, judges, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")}
    same = {"load_from": str(run_dir), "eval__num_samples_per_prompt": COUNT}
    moved = shutil.copy(judges[6], tmp_path / "moved.safetensors")
    evaluate(samples, **same, eval__classifier=str(moved))  # the same judge in another place
    assert {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")} == stamps
    whole = files_of(samples)
    for change, message in (
        ({"seed": 43}, "seed 42, now it is 43"),
        ({"sample__num_steps": 4}, "num_steps 3, now it is 4"),
        ({"load_from": ""}, "load_from "),
        ({"eval__classifier": str(judges[4])}, "classifier "),
        ({"sample__scheduler": "dpm++"}, "eta 1.0, now it is None"),
        ({"eval__image_format": "jpg"}, "image_format 'png', now it is 'jpg'"),
    ):
        with pytest.raises(UserError, match=f"made with {message}"):
            evaluate(samples, **same | change)
    assert files_of(samples) == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval__batch_size": 0}, "eval.batch_size is 0"),
        ({"eval__num_samples_per_prompt": 0}, "eval.num_samples_per_prompt is 0"),
        ({"sample__eta": float("nan")}, "sample.eta is nan"),
        ({"sample__guidance_scale": float("inf")}, "sample.guidance_scale is inf"),
        ({"sample__num_steps": 0}, "sample.num_steps is 0"),
        ({"sample__num_steps": 1001}, "sample.num_steps is 1001.*1000"),
        ({"seed": -1}, "seed is -1"),
        ({"sample__scheduler": "euler"}, r"sample.scheduler is 'euler'.*ddim, dpm\+\+"),
        ({"eval__image_format": "gif"}, "eval.image_format is 'gif'.*png, jpg"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'"),
        ({"eval__prompts": ("a\nb",)}, r"eval.prompts, prompt 1: 'a\\nb' .*U\+000A"),
        ({"eval__prompts": ("a", "b", "a"), "eval__classifier": ""}, "prompt 'a' is given twice"),
        ({"eval__prompts": ("a", " "), "eval__classifier": ""}, "eval.prompts, prompt 2: ' ' is blank"),
        ({"eval__prompts": ("a nevus",)}, "'a nevus' .*--config.eval.classifier="),
        ({"prompt_fn": "nothing"}, "'nothing' .*isic_all_idx"),
        ({"prompt_fn_kwargs": {"path": "absent.txt"}}, "'absent.txt'"),
        ({"load_from": "absent"}, "'absent'"),
        ({"load_from": "/etc/passwd"}, "/etc/passwd"),
        ({"pretrained__model": "/absent"}, "/absent"),
        ({"eval__classifier": "absent.pth"}, "'absent.pth'"),
    ],
)
def test_bad_input(fields, message, evaluate, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tmp_path / "x", **fields)
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_any_prompt_gets_a_folder_of_its_own_which_the_log_maps(evaluate, tmp_path):
    odd = ["a b", "a_b", "cup/disc ratio 0.6", "../../x", ".x", "A b", *(f"{'y ' * 140}{n}" for n in (1, 2))]
    (tmp_path / "odd.txt").write_text("\n".join(odd), encoding="utf-8")
    given = {"prompt_fn_kwargs": {"path": str(tmp_path / "odd.txt")}, "eval__num_samples_per_prompt": 1}
    evaluate(tmp_path / "x", **PLAIN | given)
    entries = log_of(tmp_path / "x")
    assert [entry["prompt"] for entry in entries] == odd and {entry["reward"] for entry in entries} == {None}
    assert len({(tmp_path / "x" / entry["path_to_img"]).parent for entry in entries}) == len(odd)
    assert sorted(caption for _, caption in list_samples(tmp_path / "x")) == sorted(odd)
    assert {path.name for path in tmp_path.iterdir()} == {"odd.txt", "x"}


def test_batch_size_other_prompts_and_more_images_change_no_byte(evaluate, tmp_path):
    """Exactly, on a CPU: passes have one shape, and a row of a pass does not depend on its position."""
    runs = {
        "1": {"eval__batch_size": 1},
        "64": {"eval__batch_size": 64},
        "more": {"eval__num_samples_per_prompt": 9},
        "subset": {"eval__prompts": (PROMPTS[3], PROMPTS[1])},
    }
    drawn = {}
    for name, fields in runs.items():
        evaluate(tmp_path / name, **PLAIN | {"sample__guidance_scale": 3.0} | fields)
        drawn[name] = images_of(tmp_path / name)
    assert len(drawn["1"]) == 12 and drawn["1"] == drawn["64"]
    assert len(drawn["more"]) == 36 and drawn["1"].items() <= drawn["more"].items()
    assert len(drawn["subset"]) == 6 and drawn["subset"].items() <= drawn["1"].items()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 1.0), ("ddim", 0.0), ("dpm++", 1.0)])
def test_images_are_those_of_diffusers(scheduler, eta, guidance, evaluate, tiny_pipeline_dir, tmp_path):
    fields = {"sample__scheduler": scheduler, "sample__eta": eta, "sample__guidance_scale": guidance}
    evaluate(tmp_path, **PLAIN | fields, eval__num_samples_per_prompt=1)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "ddim":
        pipe.scheduler, arguments = DDIMScheduler.from_config(pipe.scheduler.config), {"eta": eta}
    else:
        kind = {"algorithm_type": "dpmsolver++", "solver_order": 2}
        pipe.scheduler, arguments = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **kind), {}
    arguments |= {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "pt"}
    for entry in log_of(tmp_path):
        own = load_image(tmp_path / entry["path_to_img"])
        image = pipe(entry["prompt"], generator=torch.Generator().manual_seed(entry["seed"]), **arguments).images[0]
        assert (image - own).abs().max() < 0.51 / 255  # half a level of rounding, and the last bits


def test_a_judge_of_four_attributes_sees_jpegs_as_stored(evaluate, judges, tmp_path):
    fields = {"eval__num_samples_per_prompt": 1, "sample__num_steps": 2, "eval__classifier": str(judges[4])}
    evaluate(tmp_path / "jpg", eval__image_format="jpg", **fields)
    evaluate(tmp_path / "png", **fields)
    log = log_of(tmp_path / "jpg")
    assert [entry["path_to_img"] for entry in log] == [f"{folder}/00000.jpg" for folder in FOLDERS]
    assert [entry["labels"] for entry in log] == [list(labels_of(prompt))[:4] for prompt in PROMPTS]
    stored = torch.stack([load_image(tmp_path / "jpg" / entry["path_to_img"]) for entry in log])
    exact = torch.stack([load_image(tmp_path / "png" / entry["path_to_img"]) for entry in log_of(tmp_path / "png")])
    assert 0 < (stored - exact).abs().mean() < 0.05
    logits = load_classifier(judges[4]).logits(stored)
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / "jpg" / log[0]["path_to_img"]) as image:
        assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0
        tables = image.quantization
    Image.new("RGB", (8, 8)).save(tmp_path / "q95.jpg", quality=95, subsampling=0)
    with Image.open(tmp_path / "q95.jpg") as image:
        assert image.quantization == tables


def test_other_prompts_join_a_folder_and_unplanned_files_are_reported(evaluate, tmp_path, caplog):
    folder, fields = tmp_path / "a", PLAIN | {"eval__num_samples_per_prompt": 2}
    evaluate(folder, **fields, eval__prompts=(PROMPTS[1], PROMPTS[0]))
    first = images_of(folder)
    evaluate(folder, **fields, eval__prompts=PROMPTS[:3])
    assert len(first) == 4 and first.items() <= images_of(folder).items() and len(images_of(folder)) == 6
    assert [entry["prompt"] for entry in log_of(folder)] == [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    assert "asks for" not in caplog.text
    stray = shutil.copy(folder / FOLDERS[2] / "00000.png", folder / FOLDERS[2] / "foreign.png")
    evaluate(folder, **fields | {"eval__num_samples_per_prompt": 1}, eval__prompts=(PROMPTS[2], PROMPTS[0]))
    places = [f"{FOLDERS[prompt]}/0000{index}.png" for prompt in (2, 0, 1) for index in range(2)]
    assert [entry["path_to_img"] for entry in log_of(folder)] == places
    assert [entry["sampleID"] for entry in log_of(folder)] == list(range(6))
    assert (
        f"4 images are more than this command asks for, the first is {folder / min(places[1], *places[3:])}"
        in caplog.text
    )
    assert re.search(f"1 files are not in image_log.json.* {re.escape(str(stray))}", caplog.text)


def test_an_incomplete_folder_is_refused_and_completed(evaluate, tmp_path, monkeypatch):
    """One file is lost and one is emptied while the run goes on."""
    lost, emptied = (f"{FOLDERS[1]}/0000{index}.png" for index in (0, 2))

    def save(path, image):
        save_image(path, image)
        if str(path).endswith(lost):
            path.unlink()
        if str(path).endswith(emptied):
            path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr("ddpo_pytorch.sampling.save_image", save)
        with pytest.raises(UserError, match=f"2 of 12 images .*{re.escape(lost)}"):
            evaluate(tmp_path / "a", **PLAIN)
    assert len(log_of(tmp_path / "a")) == 10
    evaluate(tmp_path / "a", **PLAIN)
    evaluate(tmp_path / "b", **PLAIN)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and len(log_of(tmp_path / "a")) == 12


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_damaged_images_are_drawn_again(image_format, evaluate, tmp_path, caplog):
    """One is cut, one changed in its middle, one is no image, one a pipe, which must not block."""
    fields = PLAIN | {"eval__image_format": image_format, "eval__num_samples_per_prompt": 2}
    evaluate(tmp_path, **fields, eval__prompts=PROMPTS[:2])
    before = files_of(tmp_path)
    cut, changed, text, pipe = (tmp_path / entry["path_to_img"] for entry in log_of(tmp_path))
    data = changed.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-100])
    if image_format == "png":
        changed.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    else:  # has no checksums
        changed.write_bytes(data[: len(data) // 2])
    text.write_text("<html>")
    pipe.unlink()
    os.mkfifo(pipe)
    evaluate(tmp_path, **fields, eval__prompts=PROMPTS[:2])
    assert files_of(tmp_path) == before
    assert "3 images are damaged" in caplog.text  # the fourth is missing


def test_the_progress_bar_counts_missing_images_on_a_terminal(evaluate, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    evaluate(tmp_path, **PLAIN, eval__num_samples_per_prompt=2)
    next(tmp_path.rglob("*.png")).unlink()
    monkeypatch.setattr(sys, "stderr", Terminal())
    evaluate(tmp_path, **PLAIN, eval__num_samples_per_prompt=2)
    assert "1/1" in sys.stderr.getvalue() and "img/s" in sys.stderr.getvalue()


def damaged(model: Path, folder: Path, part: str, file: str, change) -> Path:
    """A copy of the model in which `change(weights)` was applied to one of its weight files."""
    shutil.copytree(model, folder)
    weights = load_file(folder / part / file)
    change(weights)
    save_file(weights, folder / part / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def deaf_model(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A model of finite weights whose text encoder overflows at the word "ruler", which is in some of PROMPTS."""
    tokenizer = load_pipeline(tiny_pipeline_dir).tokenizer
    ruled, others = [], []
    for prompt in PROMPTS:
        (ruled if "ruler" in prompt else others).append(set(tokenizer(prompt).input_ids))
    (token, *_) = set.intersection(*ruled) - set.union(*others)

    def change(weights):
        name = next(name for name in weights if name.endswith("token_embedding.weight"))
        weights[name][token] = 3e38 * (-1.0) ** torch.arange(weights[name].shape[1])

    folder = tmp_path_factory.mktemp("models") / "deaf"
    return damaged(tiny_pipeline_dir, folder, "text_encoder", "model.safetensors", change)


def test_images_that_are_not_finite_are_named_and_the_others_complete(evaluate, deaf_model, tmp_path):
    ruled = [prompt for prompt in PROMPTS if "ruler" in prompt]
    assert 0 < len(ruled) < 4
    with pytest.raises(UserError, match=f"^{3 * len(ruled)} images are not finite") as caught:
        evaluate(tmp_path / "x", pretrained__model=str(deaf_model), **PLAIN)
    message = str(caught.value)
    assert f"images/{folder_name(ruled[0])}/00000.png of {ruled[0]!r}" in message and "\n" not in message
    assert "mixed_precision" not in message  # float32 it was
    assert [entry["prompt"] for entry in log_of(tmp_path / "x")] == [
        p for p in PROMPTS if p not in ruled for _ in "123"
    ]
    assert not list((tmp_path / "x").glob("*.jsonl"))
    evaluate(tmp_path / "sound", **PLAIN)
    sound = images_of(tmp_path / "sound")
    expected = {path: data for path, data in sound.items() if Path(path).parent.name not in map(folder_name, ruled)}
    assert images_of(tmp_path / "x") == expected


@pytest.mark.slow
def test_two_processes_end_with_one_line_about_images_that_are_not_finite(config_file, deaf_model, tmp_path):
    fields = {"pretrained__model": deaf_model, "logdir": tmp_path / "x", "eval__num_samples_per_prompt": 11, **PLAIN}
    result = run_script("eval.py", *options(config_file, **fields), processes=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    count = 11 * sum("ruler" in prompt for prompt in PROMPTS)
    assert result.returncode != 0 and len(errors) == 1 and f"error: {count} images are not finite" in errors[0]
    assert "exitcode  : 2" in result.stderr and "exitcode  : 1" not in result.stderr
    assert len(log_of(tmp_path / "x")) == len(images_of(tmp_path / "x")) == 44 - count


def test_black_images_are_reported(evaluate, tiny_pipeline_dir, tmp_path, caplog):
    def change(weights):
        weights["decoder.conv_out.bias"] -= 1e3

    model = damaged(tiny_pipeline_dir, tmp_path / "m", "vae", "diffusion_pytorch_model.safetensors", change)
    evaluate(tmp_path / "x", pretrained__model=str(model), **PLAIN)
    assert f"12 images are black, the first is {tmp_path / 'x' / FOLDERS[0] / '00000.png'}" in caplog.text
    assert {entry["black"] for entry in log_of(tmp_path / "x")} == {True}

"""eval.py on a tiny model: the folder it writes, processes, nodes, kills, restarts, other settings, bad input."""

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
from script_tools import PROMPTS, files_of, options, succeed

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import labels_of
from ddpo_pytorch.data.sample_folder import (
    PartLog,
    claim_folder,
    folder_name,
    list_samples,
    merge_parts,
    read_entries,
    read_settings,
)
from ddpo_pytorch.generator.lora import add_lora, save_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
COUNT = 11  # images per prompt: 4 * 11 = 44 are passes of 32 and 12, uneven for 2 processes


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


def arguments_of(config_file, folder, run_dir, **fields) -> list[str]:
    return options(config_file, logdir=folder, load_from=run_dir, eval__num_samples_per_prompt=COUNT, **fields)


@pytest.fixture(scope="module")
def samples(config_file, run_dir, tmp_path_factory) -> Path:
    """What one process of eval.py writes for a run folder."""
    folder = tmp_path_factory.mktemp("samples") / "rl"
    result = succeed("eval.py", *arguments_of(config_file, folder, run_dir))
    assert "44 images for 4 prompts, 44 are missing" in result.stderr
    assert re.search(rf"44 images in {folder}; drawn now: 44, [\d.]+ images/s; peak memory of .* GiB", result.stderr)
    return folder


@pytest.mark.slow
def test_eval_writes_the_sample_folder(samples, judges, run_dir):
    log = json.loads((samples / "image_log.json").read_text())
    assert [entry["sampleID"] for entry in log] == list(range(44))
    expected = [(prompt, f"images/{folder_name(prompt)}/{i:05d}.png") for prompt in PROMPTS for i in range(COUNT)]
    assert [(entry["prompt"], entry["path_to_img"]) for entry in log] == expected
    assert len({entry["seed"] for entry in log}) == 44
    images = torch.stack([load_image(samples / entry["path_to_img"]) for entry in log])
    assert images.shape == (44, 3, 64, 64) and images.std() > 0.01
    logits = load_classifier(judges[6]).logits(images)
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    assert {entry["weights_sha256"] for entry in log} == {read_settings(samples)["weights_sha256"]}
    assert {entry["black"] for entry in log} == {False}
    for entry, predicted in zip(log, (logits > 0).long().tolist(), strict=True):
        stated = list(labels_of(entry["prompt"]))
        assert entry["labels"] == stated and entry["predictions"] == predicted
        assert entry["reward"] == f"{sum(a == b for a, b in zip(stated, predicted, strict=True)) / 6:.4f}"
    settings = read_settings(samples)
    assert settings["seed"] == 42 and settings["device"] == "cpu" and settings["images_per_pass"] is None
    about = json.loads((samples / "settings.json").read_text())["about"]
    assert about["prompts"] == list(PROMPTS) and about["classifier"] == str(judges[6])
    assert about["load_from"] == str(run_dir) and about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not list(samples.glob("*.jsonl"))


@pytest.mark.slow
def test_eval_two_processes_write_the_same_bytes(samples, config_file, run_dir, tmp_path):
    result = succeed("eval.py", *arguments_of(config_file, tmp_path / "two", run_dir), processes=2)
    assert files_of(tmp_path / "two") == files_of(samples)
    assert result.stderr.count("images in") == 1


@pytest.mark.slow
def test_eval_two_nodes_write_the_same_bytes(samples, config_file, run_dir, tmp_path):
    """Two processes that are number 0 of their nodes, as torchrun starts them on two machines with a common disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/eval.py", *arguments_of(config_file, tmp_path / "nodes", run_dir)]
    nodes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert files_of(tmp_path / "nodes") == files_of(samples)


@pytest.mark.slow
def test_eval_completes_a_killed_run_to_the_same_bytes(samples, config_file, run_dir, tmp_path):
    folder = tmp_path / "killed"
    arguments = arguments_of(config_file, folder, run_dir)
    command = [sys.executable, "scripts/eval.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("images/*/*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(list(folder.glob("images/*/*.png"))) < 4 * COUNT and not (folder / "image_log.json").exists()
    # what else a kill may leave behind: an image without its line, a line cut short, a temporary file
    missing = [path for path in files_of(samples) if path.endswith(".png") and not (folder / path).exists()]
    if missing:
        (folder / missing[0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / missing[0], folder / missing[0])
    with open(folder / "image_log.part0.jsonl", "a") as file:
        file.write('{"prompt": "a dermo')
    next(folder.glob("images/*")).joinpath(".00002.png.9999999.tmp").write_bytes(b"")
    succeed("eval.py", *arguments, processes=2)
    assert files_of(folder) == files_of(samples)


@pytest.mark.slow
def test_eval_leaves_a_finished_folder_alone_and_refuses_other_settings(
    samples, config_file, run_dir, run_main, judges, tmp_path
):
    before = {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")}
    same = {"logdir": str(samples), "load_from": str(run_dir), "eval__num_samples_per_prompt": COUNT}
    moved = shutil.copy(judges[6], tmp_path / "moved.safetensors")
    run_main("eval.py", config_file, **same, eval__classifier=str(moved))  # the same judge elsewhere
    assert {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")} == before
    whole = files_of(samples)
    for change, message in (
        ({"seed": 43}, "made with seed 42, now it is 43; choose another logdir"),
        ({"sample__num_steps": 4}, "made with num_steps 3, now it is 4"),
        ({"load_from": ""}, "made with load_from "),
        ({"eval__classifier": str(judges[4])}, "made with classifier "),
        ({"eval__classifier": ""}, "made with classifier "),
        ({"sample__scheduler": "dpm++"}, "made with eta 1.0, now it is None"),
        ({"eval__image_format": "jpg"}, "made with image_format 'png', now it is 'jpg'"),
    ):
        with pytest.raises(UserError, match=message):
            run_main("eval.py", config_file, **(same | change))
    assert files_of(samples) == whole


def test_eval_more_images_keep_the_first_ones(config_file, run_main, tmp_path):
    fields = {"eval__batch_size": 2, "sample__num_steps": 2, "eval__classifier": ""}
    run_main("eval.py", config_file, logdir=str(tmp_path / "a"), eval__num_samples_per_prompt=1, **fields)
    first = files_of(tmp_path / "a")
    assert {entry["reward"] for entry in json.loads(first["image_log.json"])} == {None}
    run_main("eval.py", config_file, logdir=str(tmp_path / "a"), eval__num_samples_per_prompt=2, **fields)
    now = files_of(tmp_path / "a")
    assert all(now[path] == data for path, data in first.items() if path.endswith(".png"))
    assert len(json.loads(now["image_log.json"])) == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval__batch_size": 0}, "eval.batch_size is 0"),
        ({"eval__num_samples_per_prompt": 0}, "eval.num_samples_per_prompt is 0"),
        ({"sample__eta": -0.5}, "sample.eta is -0.5"),
        ({"sample__eta": 1.5}, "sample.eta is 1.5"),
        ({"sample__eta": float("nan")}, "sample.eta is nan"),
        ({"sample__eta": float("inf")}, "sample.eta is inf"),
        ({"sample__guidance_scale": float("nan")}, "sample.guidance_scale is nan"),
        ({"sample__guidance_scale": float("inf")}, "sample.guidance_scale is inf"),
        ({"load_from": "/etc/passwd"}, "/etc/passwd.* is a text file"),
        ({"eval__prompts": ("a\0b",)}, r"eval.prompts, prompt 1: 'a\\x00b' .*U\+0000"),
        ({"eval__prompts": ("a\nb",)}, r"'a\\nb' .*U\+000A"),
        ({"eval__prompts": ("a\tb",)}, r"'a\\tb' .*U\+0009"),
        ({"eval__prompts": ("a\udc80b",)}, r"'a\\udc80b' .*U\+DC80"),
        ({"sample__scheduler": "euler"}, "sample.scheduler is 'euler'; allowed are ddim, dpm\\+\\+"),
        ({"eval__image_format": "gif"}, "eval.image_format is 'gif'; allowed are png, jpg"),
        ({"eval__prompts": ("a", "b", "a"), "eval__classifier": ""}, "prompt 'a' is given twice"),
        ({"eval__prompts": ("a", " "), "eval__classifier": ""}, "eval.prompts, prompt 2: ' ' is blank"),
        ({"eval__prompts": ("a nevus",)}, "'a nevus' is not one of .*set --config.eval.classifier="),
        ({"sample__num_steps": 0}, "sample.num_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16', which needs a GPU"),
        ({"prompt_fn": "nothing"}, "'nothing' is unknown; .*isic_all_idx"),
        ({"prompt_fn_kwargs": {"path": "absent.txt"}}, "'absent.txt' does not exist"),
        ({"load_from": "absent"}, "'absent'"),
        ({"pretrained__model": "/absent"}, "/absent"),
        ({"eval__classifier": "absent.pth"}, "'absent.pth' does not exist"),
    ],
)
def test_eval_bad_input(fields, message, config_file, run_main, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run_main("eval.py", config_file, **{"logdir": str(tmp_path / "x"), **fields})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


ODD = (
    "a b",
    "a_b",
    "cup/disc ratio 0.6",
    "../../x",
    ".x",
    "A b",
    *(f"{'y ' * 140}{n}" for n in (1, 2)),
)


def test_any_prompt_gets_a_folder_of_its_own_which_the_log_maps(config_file, run_main, tmp_path):
    (tmp_path / "odd.txt").write_text("\n".join(ODD), encoding="utf-8")
    given = {"prompt_fn_kwargs": {"path": str(tmp_path / "odd.txt")}, "logdir": str(tmp_path / "x")}
    run_main("eval.py", config_file, eval__classifier="", eval__num_samples_per_prompt=1, sample__num_steps=1, **given)
    entries = json.loads((tmp_path / "x" / "image_log.json").read_text())
    assert [entry["prompt"] for entry in entries] == [*ODD]
    assert len({(tmp_path / "x" / entry["path_to_img"]).parent for entry in entries}) == len(ODD)
    assert entries[0]["path_to_img"] == "images/a_b/00000.png"
    assert sorted(caption for _, caption in list_samples(tmp_path / "x")) == sorted(ODD)
    assert {path.name for path in tmp_path.iterdir()} == {"odd.txt", "x"}


def test_a_folder_of_unknown_origin_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds images but no settings.json; choose another logdir"):
        claim_folder(tmp_path, {"seed": 1}, {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        claim_folder(tmp_path, {"seed": 1}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "settings.json"]


def test_the_log_survives_torn_lines_and_counts_only_images_that_exist(tmp_path):
    for name in ("b", "a", "c"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    (tmp_path / "image_log.part1.jsonl").write_text('{"path_to_img": "b.png", "x": 1}\n{"path_to_im')
    with open(tmp_path / "image_log.part1.jsonl", "ab") as file:
        file.write(b'g": "c\xff.png"}\n[1]\n{"prompt": "x"}\n{"path_to_img": 3}\n{"path_to_img": "c.png", "\xe9')
    (tmp_path / "empty.png").touch()
    with PartLog(tmp_path, 1) as log:
        log.add([{"path_to_img": "a.png"}, {"path_to_img": "gone.png"}, {"path_to_img": "empty.png"}])
    assert list(read_entries(tmp_path)) == ["b.png", "a.png"]
    assert merge_parts(tmp_path, ["a.png", "b.png"]) == 2
    entries = json.loads((tmp_path / "image_log.json").read_text())
    assert entries == [{"sampleID": 0, "path_to_img": "a.png"}, {"sampleID": 1, "path_to_img": "b.png", "x": 1}]
    with PartLog(tmp_path, 0) as log:
        log.add([{"path_to_img": "c.png"}])
    assert merge_parts(tmp_path) == 3 and not list(tmp_path.glob("*.jsonl"))


@pytest.mark.slow
def test_user_errors_are_one_line_and_exit_code_2(config_file, tmp_path):
    result = run_script("eval.py", *options(config_file, pretrained__model="/absent", logdir=tmp_path / "x"))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()

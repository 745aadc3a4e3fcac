"""eval.py on a tiny model: the folder it writes, processes, threads, kills, reruns, other settings, bad input."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from launching import Script
from PIL import Image, JpegImagePlugin
from refusals import refused
from script_tools import PROMPTS, files_of, load_module, options, succeed
from tiny_unet import randomize

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import labels_of
from ddpo_pytorch.data.sample_folder import folder_name, list_samples, merge_parts, part_log, read_entries, read_log
from ddpo_pytorch.generator.lora import add_lora, save_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.rewards import isic_classifier_reward
from ddpo_pytorch.sampling import Sampler, draw_images, draw_passes, plan

COUNT = 11  # images per prompt: 4 * 11 = 44 are passes of 32 and 12, uneven for 2 processes
PLAIN = {"eval__classifier": "", "sample__num_steps": 2}
FOLDERS = [f"images/{folder_name(prompt)}" for prompt in PROMPTS]


def images_of(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(folder).items() if path.startswith("images/")}


@pytest.fixture
def evaluate(run_main, config_file):
    return lambda folder, **fields: run_main("eval.py", config_file, logdir=str(folder), **fields)


@pytest.fixture(scope="module")
def run_dir(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A run folder with one LoRA checkpoint that changes the output."""
    unet = load_pipeline(tiny_pipeline_dir).unet
    add_lora(unet, 2, ["to_q", "to_v"], seed=0)
    randomize(unet)
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
    folder = tmp_path_factory.mktemp("samples") / "rl"
    said = succeed("eval.py", *command(folder)).stderr
    assert "44 images for 4 prompts, 44 missing" in said
    assert f"44 images in {folder}" in said and re.search(r"44 images drawn, [\d.]+ images/s", said)
    return folder


@pytest.mark.slow
def test_log_settings_and_images(samples, judges, run_dir):
    log = read_log(samples)
    places = [(prompt, f"images/{folder_name(prompt)}/{index:05d}.png") for prompt in PROMPTS for index in range(COUNT)]
    expected = [(number, *place) for number, place in enumerate(places)]
    assert [(entry["sampleID"], entry["prompt"], entry["path_to_img"]) for entry in log] == expected
    assert len({entry["seed"] for entry in log}) == 44
    images = torch.stack([load_image(samples / entry["path_to_img"]) for entry in log])
    assert images.shape == (44, 3, 64, 64) and images.std() > 0.01
    logits = load_classifier(judges[6]).logits(images)
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    for entry, predicted in zip(log, (logits > 0).long(), strict=True):
        stated = torch.tensor(labels_of(entry["prompt"]))
        assert entry["labels"] == stated.tolist() and entry["predictions"] == predicted.tolist() and not entry["black"]
        assert entry["reward"] == f"{(stated == predicted).double().mean():.4f}"
    settings, about = (json.loads((samples / "settings.json").read_text())[key] for key in ("settings", "about"))
    assert settings["seed"] == 42 and settings["device"] == "cpu" and settings["images_per_pass"] is None
    assert {entry["weights_sha256"] for entry in log} == {settings["weights_sha256"]}
    assert about["prompts"] == list(PROMPTS) and about["classifier"] == str(judges[6])
    assert about["load_from"] == str(run_dir) and about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not list(samples.glob("*.jsonl"))


@pytest.mark.slow
def test_a_killed_run_is_completed_by_two_processes_to_the_same_bytes(samples, command, tmp_path):
    folder = tmp_path / "killed"
    script = Script("scripts/eval.py", *command(folder))
    script.kill_when(lambda: list(folder.glob("images/*/*.png")))
    assert script.processes[0].exitcode == -signal.SIGKILL
    assert 0 < len(list(folder.glob("images/*/*.png"))) < 4 * COUNT and not (folder / "image_log.json").exists()
    # other remains of a kill: an image without its line, a line cut short, a temporary file
    if missing := [path for path in files_of(samples) if path.endswith(".png") and not (folder / path).exists()]:
        (folder / missing[0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / missing[0], folder / missing[0])
    with open(folder / "image_log.part0.jsonl", "a") as file:
        file.write('{"prompt": "a dermo')
    next(folder.glob("images/*")).joinpath(f".00002.png.{script.pid}.tmp").write_bytes(b"")
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
    others = [({"seed": 43}, "seed=42, now it is 43"), ({"sample__scheduler": "dpm++"}, "eta=1.0, now it is None")]
    for change, message in *others, ({"eval__classifier": str(judges[4])}, "classifier="):
        refused(f"made with {message}", evaluate, samples, **same | change)
    assert files_of(samples) == whole


def test_bad_input(evaluate, tmp_path):
    bad = [("eval__batch_size", 0, "eval.batch_size is 0"), ("pretrained__model", "/absent", "/absent")]
    bad += [("sample__num_steps", 1001, "sample.num_steps is 1001.*999")]
    bad += [("load_from", "/etc/passwd", "/etc/passwd"), ("eval__lora_scale", -1.0, "eval.lora_scale is -1.0")]
    bad += [("eval__classifier", "absent.pth", "'absent.pth'")]
    bad += [("sample__scheduler", "euler", r"sample.scheduler is 'euler'.*ddim, dpm\+\+")]
    bad += [("eval__prompts", ("a\nb",), r"eval.prompts, prompt 1: 'a\\nb' .*U\+000A")]
    bad += [("eval__prompts", (*PROMPTS[:2], PROMPTS[0]), f"prompt {re.escape(repr(PROMPTS[0]))} is given twice")]
    bad += [("eval__prompts", ("a nevus",), "'a nevus' .*--config.eval.classifier=")]
    for field, value, message in bad:
        refused(message, evaluate, tmp_path / "x", **{field: value})
        assert not (tmp_path / "x").exists()
    # nodes without a common folder
    check_shared = load_module("scripts/eval.py").check_shared
    check_shared(tmp_path, [True, True])
    refused(f"process 1 does not see {str(tmp_path)!r}", check_shared, tmp_path, [True, False])


def test_adapters_scaled_to_zero_draw_the_base_models_images(evaluate, run_dir, tmp_path):
    one = {"eval__prompts": (PROMPTS[0],), "eval__num_samples_per_prompt": 1}
    changes = {"base": {}, "zero": {"eval__lora_scale": 0.0}, "half": {"eval__lora_scale": 0.5}, "rl": {}}
    for name, change in changes.items():
        evaluate(tmp_path / name, **one, load_from="" if name == "base" else str(run_dir), **change)
    images = {name: load_image(next((tmp_path / name).rglob("*.png"))) for name in changes}
    assert torch.equal(images["base"], images["zero"])
    assert not images["half"].equal(images["zero"]) and not images["half"].equal(images["rl"])


def test_any_prompt_gets_a_folder_of_its_own_which_the_log_maps(evaluate, tmp_path):
    odd = ["a b", "a_b", "cup/disc ratio 0.6", "../../x", ".x", "A b", *(f"{'y ' * 140}{n}" for n in (1, 2))]
    (tmp_path / "odd.txt").write_text("\n".join(odd), encoding="utf-8")
    given = {"prompt_fn_kwargs": {"path": str(tmp_path / "odd.txt")}, "eval__num_samples_per_prompt": 1}
    evaluate(tmp_path / "x", **PLAIN | given)
    entries = read_log(tmp_path / "x")
    assert [entry["prompt"] for entry in entries] == odd and {entry["reward"] for entry in entries} == {None}
    assert len({(tmp_path / "x" / entry["path_to_img"]).parent for entry in entries}) == len(odd)
    assert sorted(caption for _, caption in list_samples(tmp_path / "x")) == sorted(odd)
    assert {path.name for path in tmp_path.iterdir()} == {"odd.txt", "x"}


def test_batch_size_other_prompts_and_more_images_change_no_byte(evaluate, tmp_path):
    """Exactly, on a CPU: passes have one shape, and a row of a pass does not depend on its position."""
    runs = {"1": {"eval__batch_size": 1}, "64": {"eval__batch_size": 64}, "more": {"eval__num_samples_per_prompt": 9}}
    runs["subset"] = {"eval__prompts": (PROMPTS[3], PROMPTS[1])}
    drawn = {}
    for name, fields in runs.items():
        evaluate(tmp_path / name, **PLAIN | {"sample__guidance_scale": 3.0} | fields)
        drawn[name] = images_of(tmp_path / name)
    assert len(drawn["1"]) == 12 and drawn["1"] == drawn["64"]
    assert len(drawn["more"]) == 36 and drawn["1"].items() <= drawn["more"].items()
    assert len(drawn["subset"]) == 6 and drawn["subset"].items() <= drawn["1"].items()


@pytest.mark.parametrize(("eta", "guidance"), [(1.0, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
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
    for entry in read_log(tmp_path):
        own = load_image(tmp_path / entry["path_to_img"])
        image = pipe(entry["prompt"], generator=torch.Generator().manual_seed(entry["seed"]), **arguments).images[0]
        assert (image - own).abs().max() < 0.51 / 255  # half a level of rounding, and the last bits


def test_a_judge_of_four_attributes_sees_jpegs_as_stored(evaluate, judges, tmp_path):
    fields = {"eval__num_samples_per_prompt": 1, "sample__num_steps": 2, "eval__classifier": str(judges[4])}
    evaluate(tmp_path, eval__image_format="jpg", **fields)
    log = read_log(tmp_path)
    assert [entry["path_to_img"] for entry in log] == [f"{folder}/00000.jpg" for folder in FOLDERS]
    assert [entry["labels"] for entry in log] == [list(labels_of(prompt))[:4] for prompt in PROMPTS]
    logits = load_classifier(judges[4]).logits(torch.stack([load_image(tmp_path / e["path_to_img"]) for e in log]))
    torch.testing.assert_close(torch.tensor([entry["logits"] for entry in log]), logits, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / log[0]["path_to_img"]) as image:
        assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0  # no chroma subsampling


def test_other_prompts_join_a_folder_and_unplanned_files_are_reported(evaluate, tmp_path, caplog):
    fields = PLAIN | {"eval__num_samples_per_prompt": 2}
    evaluate(tmp_path, **fields, eval__prompts=(PROMPTS[1], PROMPTS[0]))
    first = images_of(tmp_path)
    evaluate(tmp_path, **fields, eval__prompts=PROMPTS[:3])
    assert len(first) == 4 and first.items() <= images_of(tmp_path).items() and len(images_of(tmp_path)) == 6
    assert [entry["prompt"] for entry in read_log(tmp_path)] == [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    stray = shutil.copy(tmp_path / FOLDERS[2] / "00000.png", tmp_path / FOLDERS[2] / "foreign.png")
    evaluate(tmp_path, **fields | {"eval__num_samples_per_prompt": 1}, eval__prompts=(PROMPTS[2], PROMPTS[0]))
    places = [f"{FOLDERS[prompt]}/0000{index}.png" for prompt in (2, 0, 1) for index in range(2)]
    assert [(entry["sampleID"], entry["path_to_img"]) for entry in read_log(tmp_path)] == list(enumerate(places))
    first = tmp_path / min(places[1], *places[3:])
    assert f"4 images were not requested by this command, the first is {first}" in caplog.text
    assert re.search(f"1 files are not in image_log.json.* {re.escape(str(stray))}", caplog.text)


def test_images_that_vanish_are_missed_and_damaged_ones_drawn_again(evaluate, tmp_path, monkeypatch, caplog):
    """One is lost; then one is cut, one changed, one is no image, one a pipe, which must not block."""
    lost = f"{FOLDERS[1]}/00000.png"

    def save(path, image, comment):
        save_image(path, image, comment)
        if str(path).endswith(lost):
            path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr("ddpo_pytorch.sampling.save_image", save)
        refused(f"1 of 12 images .*{re.escape(lost)}", evaluate, tmp_path, **PLAIN)
    evaluate(tmp_path, **PLAIN)
    before = files_of(tmp_path)
    cut, changed, text, pipe = (tmp_path / entry["path_to_img"] for entry in read_log(tmp_path)[:4])
    data = changed.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-100])
    changed.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    text.write_text("<html>")
    pipe.unlink()
    os.mkfifo(pipe)
    evaluate(tmp_path, **PLAIN)
    assert files_of(tmp_path) == before and len(images_of(tmp_path)) == 12
    assert "3 images are damaged" in caplog.text  # the fourth is missing


def test_images_that_are_not_finite_are_named_and_black_ones_reported(evaluate, tmp_path, monkeypatch, caplog):
    evaluate(tmp_path / "sound", **PLAIN)
    faulty, black, *others = PROMPTS

    def draw(pipe, embeddings, prompts, *settings):
        images = draw_images(pipe, embeddings, prompts, *settings)
        for image, prompt in zip(images, prompts, strict=True):
            image[0, 0, 0] = torch.nan if prompt == faulty else image[0, 0, 0]
            image *= prompt != black
        return images

    monkeypatch.setattr("ddpo_pytorch.sampling.draw_images", draw)
    said = f"^3 images are not finite.*{re.escape(f'{FOLDERS[0]}/00000.png of {faulty!r}')}"
    refused(said, evaluate, tmp_path / "x", **PLAIN)
    logged = [(entry["prompt"], entry["black"]) for entry in read_log(tmp_path / "x")]
    assert logged == [(prompt, prompt == black) for prompt in PROMPTS[1:] for _ in range(3)]
    assert f"3 images are black, the first is {tmp_path / 'x' / FOLDERS[1] / '00000.png'}" in caplog.text
    sound, drawn = images_of(tmp_path / "sound"), images_of(tmp_path / "x")
    finite = {path for path in sound if Path(path).parent.name in map(folder_name, others)}
    assert len(finite) == 6 and all(drawn[path] == sound[path] for path in finite)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_any_number_of_workers_writes_the_same_bytes(scheduler, tiny_pipeline_dir, judges, tmp_path):
    """Four passes of three images, the last one short, with a judge."""
    sampler = Sampler(load_pipeline(tiny_pipeline_dir), scheduler, 2, 1.0, 3.0)
    jobs, drawn = plan([(prompt, {}) for prompt in PROMPTS[:2]], 5, seed=5), []
    passes = [jobs[start : start + 3] for start in range(0, len(jobs), 3)]
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        rest = part_log(folder, 0), (), isic_classifier_reward(judges[4]), "abc"
        assert dict(draw_passes(sampler, passes, workers, 3, folder, *rest)) == {index: [] for index in range(4)}
        assert len(merge_parts(folder, [job.path for job in jobs])) == 10
        drawn.append(files_of(folder))
    assert len(drawn[0]) == len(set(drawn[0].values())) == 11 and drawn[0] == drawn[1]


def test_an_error_while_drawing_ends_the_run(tiny_pipeline_dir, tmp_path):
    judge = Mock(side_effect=OSError("no more"))
    sampler = Sampler(load_pipeline(tiny_pipeline_dir), "ddim", 1, 1.0, 1.0)
    passes = [[job] for job in plan([(PROMPTS[0], {})], 40, seed=5)]
    with pytest.raises(OSError, match="no more"):
        list(draw_passes(sampler, passes, 2, 1, tmp_path, part_log(tmp_path, 0), (), judge, ""))
    assert 0 < len(list(tmp_path.rglob("*.png"))) < 40 and not read_entries(tmp_path)  # the rest was not begun


def test_the_log_survives_torn_lines_and_counts_only_images_that_exist(tmp_path):
    for name in ("b", "a", "c"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    torn = b'{"path_to_img": "b.png", "x": 1}\n{"path_to_img": "c\xff.png"}\n[1]\n{"prompt": "x"}\n{"path_to_img": 3}\n'
    (tmp_path / "image_log.part1.jsonl").write_bytes(torn + b'{"path_to_img": "c.png", "\xe9')
    (tmp_path / "empty.png").touch()
    part_log(tmp_path, 1).write({"path_to_img": "a.png"}, {"path_to_img": "gone.png"}, {"path_to_img": "empty.png"})
    assert list(read_entries(tmp_path)) == ["b.png", "a.png"]
    assert len(merge_parts(tmp_path, ["a.png", "b.png"])) == 2
    entries = json.loads((tmp_path / "image_log.json").read_text())
    assert entries == [{"sampleID": 0, "path_to_img": "a.png"}, {"sampleID": 1, "path_to_img": "b.png", "x": 1}]
    part_log(tmp_path, 0).write({"path_to_img": "c.png"})
    assert len(merge_parts(tmp_path)) == 3 and not list(tmp_path.glob("*.jsonl"))
    (tmp_path / "image_log.json").write_text('[{"prompt": "x"}]')
    refused("image_log.json'.*path_to_img", read_entries, tmp_path)

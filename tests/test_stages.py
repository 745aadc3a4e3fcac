"""The supervised stages on a small phantom world: classifiers, a model from nothing, fine-tuning."""

import csv
import json
import shutil

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file

from ddpo_pytorch.data.phantom import write_world
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import load_classifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 48, 16, 16, seed=3, balanced=True)
    return folder


def classifier_flags(world, folder, heads, **overrides):
    splits = {f"{name}_csv": world / "splits" / f"phantom_{name}.csv" for name in ("train", "val", "test")}
    options = {"data_path": world / "images", "num_classes": heads, "arch": "tinynet_e", "weights": "none"}
    options |= {"image_size": 32, "batch_size": 16, "num_epochs": 2, "checkpoint_dir": folder, **splits, **overrides}
    return [f"--{name}={value}" for name, value in options.items()]


def test_classifier_trains_tests_and_is_not_overwritten(world, tmp_path):
    trained = run_script("train_isic_classifier.py", *classifier_flags(world, tmp_path, 4))
    assert trained.returncode == 0, trained.stderr
    file = tmp_path / "artifact_classifier_H4.safetensors"
    model = load_classifier(file)
    assert model.labels == ("hair", "gel_bubble", "ruler", "ink") and model.image_size == 32
    again = run_script("train_isic_classifier.py", *classifier_flags(world, tmp_path, 4))
    assert again.returncode == 2 and "exists already" in again.stderr
    tested = run_script("train_isic_classifier.py", *classifier_flags(world, tmp_path, 4, mode="test"))
    assert tested.returncode == 0, tested.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "test_H4.json").read_text())}
    assert set(model.labels) <= set(rows) and rows["hair"]["accuracy_low"] <= rows["hair"]["accuracy"] <= 1
    assert all(rows[name]["threshold"] == 0.5 for name in model.labels)
    written = sorted(path.name for path in tmp_path.iterdir())
    report = ["test_H4.csv", "test_H4.json", "test_H4_confusion.png", "test_H4_reliability.png"]
    assert written == [file.name, *report] and all(name in tested.stderr for name in ("avg. precision", *report))
    wrong = run_script("train_isic_classifier.py", *classifier_flags(world, tmp_path, 6, mode="test", checkpoint=file))
    assert wrong.returncode == 2 and "4 heads" in wrong.stderr


def without(world, folder, split, name):
    """The split's table with no positive of an attribute."""
    with open(world / "splits" / f"phantom_{split}.csv", newline="") as file:
        rows = [row | {name: "0"} for row in csv.DictReader(file)]
    with open(folder / f"no_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / f"no_{name}.csv"


def test_classifier_calibrates_publishes_and_is_tested_without_positives(world, tmp_path):
    extra = ("--calibrate_thresholds", "--save_published")
    options = classifier_flags(world, tmp_path, 4, arch="efficientnet_b0", num_epochs=1)
    trained = run_script("train_isic_classifier.py", *options, *extra)
    assert trained.returncode == 0, trained.stderr
    assert "thresholds of best F1" in trained.stderr and "will not state its image size" in trained.stderr
    model = load_classifier(tmp_path / "artifact_classifier_H4.safetensors")
    published = load_classifier(tmp_path / "artifact_classifier_train_H4.pth")
    assert any(value != 0.5 for value in model.thresholds.values())
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(published(pixels), model(pixels), atol=1e-5)

    table = without(world, tmp_path, "test", "ink")
    tested = run_script("train_isic_classifier.py", *options, "--mode=test", f"--test_csv={table}")
    assert tested.returncode == 0, tested.stderr
    assert f"{str(table)!r} has no positive of 'ink' among its 16 images; its AUC is undefined" in tested.stderr
    with open(tmp_path / "test_H4.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert rows["ink"]["auc"] == rows["ink"]["recall"] == "" and rows["hair"]["auc"]
    assert {name: float(rows[name]["threshold"]) for name in model.labels} == model.thresholds


def test_classifier_training_that_cannot_work_stops_at_once(world, tmp_path):
    cases = [
        (classifier_flags(world, tmp_path / "a", 4, val_csv=without(world, tmp_path, "val", "ruler")),
         f"error: {str(tmp_path / 'no_ruler.csv')!r} has no positive of 'ruler' among its 16 images"),
        ([*classifier_flags(world, tmp_path / "b", 4), "--save_published"],
         "error: a published file holds EfficientNet-B0 and no 'tinynet_e'"),
    ]  # fmt: skip
    for options, message in cases:
        stopped = run_script("train_isic_classifier.py", *options)
        assert stopped.returncode == 2 and stopped.stderr.strip().splitlines()[-1].startswith(message)
        assert "epoch 0" not in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_damaged_image_stops_the_stages_or_is_left_out_on_request(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    victim = tmp_path / "world" / "images" / "PHANTOM_0000005.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    arguments = classifier_flags(tmp_path / "world", tmp_path / "out", 4, num_workers=1, num_epochs=1)
    stopped = run_script("train_isic_classifier.py", *arguments)
    said = stopped.stderr.strip().splitlines()[-1]
    assert stopped.returncode == 2 and said.startswith(f"error: {str(victim)!r} cannot be read as an image")
    went_on = run_script("train_isic_classifier.py", *arguments, "--skip_broken")
    assert went_on.returncode == 0 and "47 images" in went_on.stderr and victim.name in went_on.stderr


def test_a_model_from_nothing(world, tmp_path):
    settings = {"mixed_precision": "no", "sd.data_path": world / "images", "sd.csv": world / "splits/phantom_train.csv"}
    settings |= {"sd.image_size": 32, "sd.num_steps": 2, "sd.batch_size": 8, "sd.log_every": 1, "sd.grid_every": 2}
    settings |= {"sd.vae_channels": "(8,8,8)", "sd.unet_channels": "(8,16)", "sd.unet_attention": "(False,True)"}
    settings |= {"sd.text_width": 16, "sd.text_layers": 1, "sample.num_steps": 2}

    def stage(name, output, **extra):
        merged = settings | {"sd.stage": name, "sd.output": tmp_path / output} | extra
        return run_script("train_sd.py", "--config=config/base.py", *(f"--config.{k}={v}" for k, v in merged.items()))

    early = stage("unet", "sd")
    assert early.returncode == 2 and "train it first" in early.stderr
    for name in ("vae", "unet"):
        result = stage(name, "sd")
        assert result.returncode == 0, result.stderr
        assert len((tmp_path / "sd" / f"{name}.jsonl").read_text().splitlines()) == 2
    pipe = load_pipeline(tmp_path / "sd")
    published = load_file(tmp_path / "sd" / "pretrained_unet.safetensors")
    assert published.keys() == pipe.unet.state_dict().keys()
    assert (tmp_path / "sd" / "grid_000002.png").is_file()
    again = stage("unet", "sd")
    assert again.returncode == 2 and "exists already" in again.stderr

    model = {"pretrained.model": tmp_path / "sd"}
    result = stage("finetune", "tuned", **model)
    assert result.returncode == 0, result.stderr
    tuned = load_file(tmp_path / "tuned" / "pretrained_unet.safetensors")
    assert any(not value.equal(published[key]) for key, value in tuned.items())


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("sd.csv=/nowhere.csv", "/nowhere.csv"), ("sd.data_path=/nowhere", "/nowhere"), ("sd.stage=nope", "allowed are")],
)
def test_bad_input_of_train_sd(world, tmp_path, flag, expected):
    common = [f"--config.sd.data_path={world / 'images'}", f"--config.sd.csv={world / 'splits/phantom_train.csv'}"]
    result = run_script("train_sd.py", "--config=config/base.py", *common, f"--config.sd.output={tmp_path}",
                        f"--config.{flag}")  # fmt: skip
    assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr

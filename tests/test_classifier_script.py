"""train_isic_classifier.py on a small phantom world: trained, killed, tested, refused."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from script_tools import call_main, files_of, load_flag_script, succeed
from test_classifier_losses import by_definition
from test_classifier_training import STATES

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import load_split
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.judges.classifier_training import positive_weights
from ddpo_pytorch.utils.errors import UserError

pytestmark = pytest.mark.slow
SCRIPT = "train_isic_classifier.py"
H4 = "artifact_classifier_H4.safetensors"


def classifier_flags(world, folder, heads=4, **overrides):
    splits = {f"{name}_csv": world / "splits" / f"phantom_{name}.csv" for name in ("train", "val", "test")}
    options = {"data_path": world / "images", "num_classes": heads, "arch": "tinynet_e", "weights": "none"}
    options |= {"image_size": 32, "batch_size": 16, "num_epochs": 2, "checkpoint_dir": folder, **splits, **overrides}
    return [f"--{name}={value}" for name, value in options.items()]


def without(world, folder, split, name):
    """The split's table with no positive of an attribute."""
    with open(world / "splits" / f"phantom_{split}.csv", newline="") as file:
        rows = [row | {name: "0"} for row in csv.DictReader(file)]
    with open(folder / f"no_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / f"no_{name}.csv"


@pytest.fixture(scope="module")
def script():
    return load_flag_script(SCRIPT)


@pytest.fixture
def run(script, monkeypatch, caplog):
    """Function (options): run the script's main in this process; what it logged."""

    def main(*options):
        for state in STATES:
            state._reset_state()
        caplog.clear()
        call_main(script, *options)
        return caplog.text

    caplog.set_level("INFO")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    yield main
    torch.set_num_threads(threads)
    for state in STATES:
        state._reset_state()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A folder with a classifier of 3 epochs, without its cache, and what the training said."""
    folder = tmp_path_factory.mktemp("trained")
    options = classifier_flags(world, folder, num_epochs=3, cache_dir=folder.parent / "cache")
    return folder, options, succeed(SCRIPT, *options, "--calibrate_thresholds").stderr


def test_classifier_trains_and_is_not_overwritten(trained):
    folder, options, said = trained
    model = load_classifier(folder / H4)
    assert model.labels == ("hair", "gel_bubble", "ruler", "ink") and model.image_size == 32
    assert list(files_of(folder)) == [H4] and any((folder.parent / "cache").iterdir())
    assert said.count("val AUC hair") == 3 and "images/s" in said
    again = run_script(SCRIPT, *options)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    last = again.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {str(folder / H4)!r} exists already; choose another --checkpoint_dir")


def test_a_killed_training_ends_like_one_that_was_not(world, trained, tmp_path, run):
    folder, _, _ = trained
    options = classifier_flags(world, tmp_path, num_epochs=3) + ["--calibrate_thresholds"]
    settings = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"scripts/{SCRIPT}", *options]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "epoch 1:" in line:
                process.kill()
    state = tmp_path / "artifact_classifier_H4.unfinished.pt"
    assert process.returncode == -9 and state.is_file() and (tmp_path / H4).is_file()
    with pytest.raises(UserError, match="learning_rate=0.0001.* 0.001"):
        run(*options, "--learning_rate=1e-3")
    for other, what in (
        (f"--checkpoint={folder / H4}", "initial weights"),
        (f"--train_csv={without(world, tmp_path, 'train', 'hair')}", "hair|training images"),
    ):
        with pytest.raises(UserError, match=what):
            run(*options, other)
    tested = run(*options, "--mode=test")
    assert f"{tmp_path / H4} is the best epoch so far" in tested
    (tmp_path / H4).unlink()  # what the state says is written again
    resumed = run(*options)
    assert f"resuming from {state}" in resumed and "epoch 0:" not in resumed
    assert not state.exists()
    assert (tmp_path / H4).read_bytes() == (folder / H4).read_bytes()  # weights and thresholds


def test_test_mode_with_one_and_two_processes(world, trained, tmp_path, run):
    """13 images in batches of 4, of which two processes get 8 and 5."""
    model = load_classifier(trained[0] / H4)
    reports = []
    for processes in (1, 2):
        options = classifier_flags(world, tmp_path / str(processes), mode="test", checkpoint=trained[0] / H4, limit=13)
        options += ["--batch_size=4", "--cache_dir="]
        said = run(*options) if processes == 1 else succeed(SCRIPT, *options, processes=2).stderr
        names = ["test_H4.csv", "test_H4.json", "test_H4_confusion.png", "test_H4_reliability.png"]
        assert sorted(files_of(tmp_path / str(processes))) == names
        assert all(name in said for name in ("avg. precision", *names))
        reports.append(json.loads((tmp_path / str(processes) / "test_H4.json").read_text()))
    one, two = reports
    assert len(one) == len(two) and sum(row["support"] for row in one if row["what"].startswith("only")) == 13
    for first, second in zip(one, two, strict=True):
        assert first.pop("what") == second.pop("what")
        assert first == pytest.approx(second, abs=1e-6)
    rows = dict(zip(model.labels, two, strict=False))
    assert rows["hair"]["accuracy_low"] <= rows["hair"]["accuracy"] <= 1
    assert {name: rows[name]["threshold"] for name in model.labels} == pytest.approx(model.thresholds)
    wrong = classifier_flags(world, tmp_path, 6, mode="test", checkpoint=trained[0] / H4)
    with pytest.raises(UserError, match="4 heads"):
        run(*wrong)


def test_options_reach_the_training(world, trained, tmp_path, run):
    """Imbalance options, the backbone of another classifier, another seed, loading processes, no cache."""
    extra = {
        "weights": trained[0] / H4,
        "num_epochs": 1,
        "focal_gamma": 2,
        "num_workers": 1,
        "cache_dir": "",
        "seed": 3,
    }
    done = run(*classifier_flags(world, tmp_path, 6, **extra), "--pos_weight")
    assert f"backbone from {trained[0] / H4}" in done
    (file,) = tmp_path.iterdir()
    model, sets = load_classifier(file), {}
    for split in ("train", "val"):
        rows, paths, _ = load_split(world / "splits" / f"phantom_{split}.csv", world / "images")
        sets[split] = ImageFiles(paths, torch.tensor([row.labels for row in rows], dtype=torch.float32), 32)
    images = torch.stack([image for image, _ in sets["val"]]).float() / 255
    weight = positive_weights(sets["train"].targets, model.labels)
    expected = by_definition(model.logits(images), sets["val"].targets, weight, 2).item()
    said = done.split("validation loss ")[1].split(",")[0]
    assert float(said) == pytest.approx(expected, abs=1e-4)


def test_classifier_calibrates_publishes_and_is_tested_without_positives(world, tmp_path, run):
    extra = ("--calibrate_thresholds", "--save_published")
    options = classifier_flags(world, tmp_path, arch="efficientnet_b0", num_epochs=1)
    said = run(*options, *extra)
    assert "thresholds of best F1" in said and "will not state its image size" in said
    model = load_classifier(tmp_path / H4)
    published = load_classifier(tmp_path / "artifact_classifier_train_H4.pth")
    assert any(value != 0.5 for value in model.thresholds.values())
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(published(pixels), model(pixels), atol=1e-5)

    table = without(world, tmp_path, "test", "ink")
    tested = run(*options, "--mode=test", f"--test_csv={table}")
    assert f"{str(table)!r} has no positive of 'ink' among its 16 images; its AUC is undefined" in tested
    with open(tmp_path / "test_H4.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert rows["ink"]["auc"] == rows["ink"]["recall"] == "" and rows["hair"]["auc"]
    assert {name: float(rows[name]["threshold"]) for name in model.labels} == model.thresholds


def test_classifier_training_that_cannot_work_stops_at_once(world, tmp_path, run):
    for extra, message in (
        (f"--val_csv={without(world, tmp_path, 'val', 'ruler')}", "no_ruler.csv.*no positive of 'ruler'"),
        ("--save_published", "--arch.*'tinynet_e'"),
        ("--mixed_precision=fp16", "mixed_precision.*'fp16'"),
        ("--weights=/nowhere.pth", "weights.*'/nowhere.pth'"),
    ):
        with pytest.raises(UserError, match=message):
            run(*classifier_flags(world, tmp_path / "out"), extra)
        assert not (tmp_path / "out").exists()


def test_a_damaged_image_stops_the_training_or_is_left_out_on_request(world, tmp_path, run):
    shutil.copytree(world, tmp_path / "world")
    victim = tmp_path / "world" / "images" / "PHANTOM_0000005.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    for extra in ({}, {"num_workers": 1, "cache_dir": ""}):
        arguments = classifier_flags(tmp_path / "world", tmp_path / "out", num_epochs=1, **extra)
        with pytest.raises(UserError) as caught:
            run(*arguments)
        assert f"{str(victim)!r} cannot be read as an image" in str(caught.value)
    # a worker's error is the text of its traceback; a person sees its last line.
    stopped = run_script(SCRIPT, *arguments)
    said = stopped.stderr.strip().splitlines()[-1]
    assert stopped.returncode == 2 and said.startswith(f"error: {str(victim)!r} cannot be read as an image")
    went_on = run(*arguments, "--skip_broken")
    assert "47 images" in went_on and victim.name in went_on

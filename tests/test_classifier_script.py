"""train_isic_classifier.py on a small phantom world: trained, killed, tested, refused."""

import json
import shutil

import pandas as pd
import pytest
import torch
from judge_tools import by_definition
from launching import Script
from refusals import refused
from script_tools import files_of, succeed
from torchmetrics.functional.classification import multilabel_auroc

from ddpo_pytorch.data.images import load_image, load_pixels
from ddpo_pytorch.data.isic import LABELS, load_split
from ddpo_pytorch.generator.from_scratch import build_vae
from ddpo_pytorch.generator.latents import reconstruct
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.utils.errors import UserError

pytestmark = pytest.mark.slow
H4 = "artifact_classifier_H4.safetensors"


def classifier_flags(world, folder, heads=4, **overrides):
    splits = {f"{name}_csv": world / "splits" / f"phantom_{name}.csv" for name in ("train", "val", "test")}
    options = {"data_path": world / "images", "num_classes": heads, "arch": "tinynet_e", "weights": "none"}
    options |= {"image_size": 32, "batch_size": 16, "num_epochs": 2, "checkpoint_dir": folder, **splits, **overrides}
    return ["train_isic_classifier.py", *(f"--{name}={value}" for name, value in options.items())]


def without(world, folder, split, name):
    table = pd.read_csv(world / "splits" / f"phantom_{split}.csv").assign(**{name: 0})
    table.to_csv(folder / f"no_{name}.csv", index=False)
    return folder / f"no_{name}.csv"


EXTRA = ("--calibrate_thresholds", "--ema_decay=0.9")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A folder with a classifier of 2 epochs of two processes, without its cache, and what the training said."""
    folder = tmp_path_factory.mktemp("trained")
    options = classifier_flags(world, folder, cache_dir=folder.parent / "cache", batch_size=8, limit=45)
    return folder, succeed(*options, *EXTRA, processes=2).stderr


def test_a_killed_training_ends_like_one_that_was_not(world, trained, tmp_path, run_flags):
    """Two processes with numbers of images that they cannot divide."""
    folder, said = trained
    model = load_classifier(folder / H4)
    assert model.labels == LABELS[:4] and model.image_size == 32 and any(v != 0.5 for v in model.thresholds.values())
    assert list(files_of(folder)) == [H4] and any((folder.parent / "cache").iterdir())
    assert said.count("val AUC hair") == 2 and "images/s" in said
    assert_validation_loss(said, world, folder / H4, 4)

    options = [*classifier_flags(world, tmp_path, batch_size=8, limit=45), *EXTRA]
    Script(f"scripts/{options[0]}", *options[1:], processes=2).kill_when((tmp_path / H4).is_file)
    state = tmp_path / "artifact_classifier_H4.unfinished.pt"
    assert state.is_file()
    others = {"--learning_rate=1e-3": "learning_rate=0.0001.* 0.001", "--limit=0": "epoch_images=45.* 48"}
    for other, what in (others | {f"--checkpoint={folder / H4}": "initial weights"}).items():
        refused(what, run_flags, *options, other)
    assert f"{tmp_path / H4} is the best epoch so far" in run_flags(*options, "--mode=test")
    (tmp_path / H4).unlink()  # what the state says is written again
    resumed = succeed(*options, processes=2).stderr
    assert f"resuming from {state}" in resumed and "epoch 0:" not in resumed and not state.exists()
    assert (tmp_path / H4).read_bytes() == (folder / H4).read_bytes()  # weights and thresholds
    refused(f"{H4}' exists already.*--checkpoint_dir", run_flags, *options)


def test_test_mode(world, trained, tmp_path, run_flags):
    options = classifier_flags(world, tmp_path, mode="test", checkpoint=trained[0] / H4, limit=13, cache_dir="")
    said = run_flags(*options)
    names = [f"test_H4{end}" for end in (".csv", ".json", "_confusion.png", "_reliability.png")]
    assert sorted(files_of(tmp_path)) == names and all(name in said for name in ("average_precision", *names))
    rows = json.loads((tmp_path / "test_H4.json").read_text())
    assert sum(row["support"] for row in rows if row["what"].startswith("exactly")) == 13
    assert [row["threshold"] for row in rows[:4]] == list(load_classifier(trained[0] / H4).thresholds.values())
    refused("4 heads", run_flags, *classifier_flags(world, tmp_path, 6, mode="test", checkpoint=trained[0] / H4))
    # on reconstructions by an autoencoder, too
    vae = build_vae((8, 8), 48).requires_grad_(False).eval()
    vae.save_pretrained(tmp_path / "sd" / "vae")
    more = {"through_vae": tmp_path / "sd", "cache_dir": ""}
    run_flags(*classifier_flags(world, tmp_path / "out", mode="test", checkpoint=trained[0] / H4, **more))
    rows, paths, _ = load_split(world / "splits" / "phantom_test.csv", world / "images")
    images, labels = torch.stack([load_pixels(path, 48) for path in paths]), torch.tensor([row.labels for row in rows])
    for name, seen in (("original", images), ("reconstructed", reconstruct(vae, images))):
        logits = load_classifier(trained[0] / H4).logits(seen / 255)
        expected = multilabel_auroc(logits, labels[:, :4], num_labels=4, average=None).tolist()
        written = json.loads((tmp_path / "out" / f"test_H4_{name}.json").read_text())
        assert [row["auc"] for row in written[:4]] == pytest.approx(expected, abs=0.05)
    start = {"num_epochs": 1, "checkpoint": trained[0] / H4}
    run_flags(*classifier_flags(world, tmp_path / "learned", **start, **more))
    model = load_classifier(tmp_path / "learned" / H4)
    assert model.image_size != 48  # of the autoencoder: it keeps its own
    assert set(model.thresholds.values()) == {0.5}  # those of the checkpoint are of other weights


def assert_validation_loss(said, world, file, heads, weighted=False, gamma=0):
    """Compare the loss that a training logged, on one or more processes, with that of all validation images."""
    sets = {}
    for split in ("train", "val"):
        rows, paths, _ = load_split(world / "splits" / f"phantom_{split}.csv", world / "images")
        sets[split] = torch.tensor([row.labels[:heads] for row in rows], dtype=torch.float32)
    logits = load_classifier(file).logits(torch.stack([load_image(path, 32) for path in paths]))
    weight = (sets["train"] == 0).sum(0) / (sets["train"] == 1).sum(0) if weighted else torch.ones(heads)
    expected = by_definition(logits, sets["val"], weight, gamma).item()
    assert float(said.split("validation loss ")[1].split(",")[0]) == pytest.approx(expected, abs=1e-4)


def test_options_reach_the_training(world, trained, tmp_path, run_flags):
    """Imbalance options, the backbone of another classifier, loading processes, no cache."""
    extra = {"weights": trained[0] / H4, "num_epochs": 1, "focal_gamma": 2, "num_workers": 1, "cache_dir": ""}
    done = run_flags(*classifier_flags(world, tmp_path, 6, **extra), "--pos_weight")
    assert f"backbone from {trained[0] / H4}" in done
    (file,) = tmp_path.iterdir()
    assert_validation_loss(done, world, file, 6, weighted=True, gamma=2)


def test_classifier_is_published_and_tested_without_positives(world, tmp_path, run_flags):
    options = classifier_flags(world, tmp_path, arch="efficientnet_b0", num_epochs=1)
    assert "will not state its image size" in run_flags(*options, "--save_published")
    model = load_classifier(tmp_path / H4)
    published = load_classifier(tmp_path / "artifact_classifier_train_H4.pth")
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(published(pixels), model(pixels), atol=1e-5)

    table = without(world, tmp_path, "test", "ink")
    tested = run_flags(*options, "--mode=test", f"--test_csv={table}")
    assert f"{str(table)!r} has no positive of 'ink' among its 16 images; its AUC is undefined" in tested
    rows = pd.read_csv(tmp_path / "test_H4.csv", index_col="what")
    assert rows.loc["ink", ["auc", "recall"]].isna().all() and rows.loc["hair", "auc"] > 0


def test_a_training_that_cannot_work_stops_and_damaged_images_are_left_out_on_request(world, tmp_path, run_flags):
    bad = {"--save_published": "--arch.*'tinynet_e'", "--mixed_precision=fp16": "mixed_precision.*'fp16'"}
    bad |= {f"--val_csv={without(world, tmp_path, 'val', 'ruler')}": "no_ruler.csv.*no positive of 'ruler'"}
    for extra, message in (bad | {"--weights=/nowhere.pth": "weights.*'/nowhere.pth'"}).items():
        refused(message, run_flags, *classifier_flags(world, tmp_path / "out"), extra)
        assert not (tmp_path / "out").exists()
    shutil.copytree(world, tmp_path / "world")
    victim = tmp_path / "world" / "images" / "PHANTOM_0000005.jpg"
    victim.write_bytes(victim.read_bytes()[:400])
    for extra in ({}, {"num_workers": 1, "cache_dir": ""}):  # decoded here, or by a process: a longer error
        arguments = classifier_flags(tmp_path / "world", tmp_path / "out", num_epochs=1, **extra)
        with pytest.raises(UserError, match="PHANTOM_0000005.jpg' cannot be read as an image"):
            run_flags(*arguments)
    said = run_flags(*arguments, "--skip_broken")
    assert "47 images" in said and victim.name in said

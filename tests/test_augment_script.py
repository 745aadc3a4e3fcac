"""augment.py on a phantom world: trained, resumed, extended, repeated; on two processes; refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from script_tools import files_of, succeed
from torchmetrics.functional.classification import binary_f1_score

from ddpo_pytorch.augmentation.report import MACRO
from ddpo_pytorch.data.isic import CAPTIONS, read_split
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.phantoms.skin import write_world
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A phantom world, and sample folders: all its training images, every second one, none, of an unknown caption."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_train=60, num_val=24, num_test=40, seed=3, size=32, balanced=True)
    for number, row in enumerate(read_split(folder / "splits" / "phantom_train.csv")):
        for name in ("sd", "rl") if number % 2 else ("sd",):
            target = folder / name / "images" / folder_name(row.caption)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "images" / f"{row.image}.jpg", target / f"{number:05d}.jpg")
    (folder / "none" / "images" / folder_name(CAPTIONS[0])).mkdir(parents=True)
    (folder / "unknown" / "images" / "a_dermoscopic_image").mkdir(parents=True)
    return folder


def command(world: Path, output: Path, *more: str, **changed) -> list[str]:
    given = {"data_path": world / "images", "output": output, "arch": "tinynet_e", "weights": "none"}
    given |= {"image_size": 32, "num_epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
    given |= {f"{split}_csv": world / "splits" / f"phantom_{split}.csv" for split in ("train", "val", "test")}
    return ["augment.py", *(f"--{name}={value}" for name, value in (given | changed).items()), *more]


@pytest.fixture
def run(run_flags):
    """Function (arguments of `command`): run the script's main in this process and return its log."""
    return lambda *arguments, **changed: run_flags(*command(*arguments, **changed))


@pytest.mark.slow
def test_trainings_are_resumed_and_extended(world, tmp_path, run):
    output, sd, rl = tmp_path / "out", f"--samples=SD={world / 'sd'}", f"--samples=SD-RL={world / 'rl'}"
    usual = {"ratios": "balanced", "seeds": "0,1", "cache_dir": tmp_path / "cache"}
    run(world, output, sd, **usual)
    one_folder = files_of(output)
    log = run(world, output, sd, rl, **usual)
    assert "6 training runs, 4 are complete" in log and "samples of" in log
    before = files_of(output)
    assert all(before[name] == content for name, content in one_folder.items() if "/" in name)
    assert {name.split("/")[0] for name in before if "/" in name} == {"real", "SD_balanced", "SD-RL_balanced"}
    parts = [f"SD_balanced/seed1/{n}" for n in ("artifact_classifier_H4", "settings", "test_logits", "cache")]
    assert [any(name.startswith(part) for name in before) for part in parts] == [True, True, True, False]
    assert list((tmp_path / "cache").iterdir())
    table = json.loads(before["table4.json"])
    rows = table["rows"]
    assert {row["training"] for row in rows} == {"real", "real + balanced SD", "real + balanced SD-RL"}
    assert {row["group"] for row in rows} == {"all", "minority"} and len(rows) == 2 * 5 * 3 * 3
    stored = [load_file(output / "SD_balanced" / f"seed{seed}" / "test_logits.safetensors") for seed in range(2)]
    test = read_split(world / "splits" / "phantom_test.csv")
    assert all(one["labels"].tolist() == [list(row.labels[:4]) for row in test] for one in stored)
    row = next(r for r in rows if (r["attribute"], r["training"]) == ("ruler", "real + balanced SD"))
    expected = [binary_f1_score(one["logits"][:, 2].sigmoid(), one["labels"][:, 2].int()).item() for one in stored]
    assert row["measure"] == "f1" and row["values"] == pytest.approx(expected, abs=1e-6) and len(set(expected)) > 1
    assert table["test_images"] == 40 and before["table4.md"].decode() in log

    # as if killed before the last logits were written: only these are computed again, and are the same
    (output / "SD-RL_balanced" / "seed1" / "test_logits.safetensors").unlink()
    log = run(world, output, sd, rl, **(usual | {"cache_dir": ""}))
    assert "6 training runs, 5 are complete" in log and "epoch 0" not in log
    after = files_of(output)
    assert json.loads(after.pop("table4.json"))["rows"] == rows  # the file also records the flags
    del before["table4.json"]
    assert after == before


@pytest.mark.slow
def test_two_processes_six_heads_and_few_images(world, tmp_path):
    flags = dict(num_classes=6, limit=40, seeds="5", minority_share=0.0, batch_size=8)
    given = command(world, tmp_path / "out", f"--samples=SD={world / 'sd'}", **flags)
    assert "1 seed(s)" in succeed(*given, processes=2).stderr
    settings = json.loads((tmp_path / "out" / "SD_1" / "seed5" / "settings.json").read_text())["settings"]
    assert settings["images_per_step"] == 16 and settings["train_images"]["images"] > 40
    report = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert sum(group["real"] for group in report["subgroups"].values()) == 40
    assert {row["attribute"] for row in report["rows"]} == {*("hair gel_bubble ruler ink MEL NV".split()), MACRO}
    assert {row["group"] for row in report["rows"]} == {"all"} and report["seeds"] == [5]
    assert load_file(tmp_path / "out" / "real" / "seed5" / "test_logits.safetensors")["logits"].shape == (40, 6)
    assert not [name for name in files_of(tmp_path / "out") if "state" in name or "tmp" in name]


def test_bad_input_is_refused_and_writes_nothing(world, run, tmp_path, monkeypatch):
    """Also split tables that cannot be used, and an output that was started with other settings."""
    table = (world / "splits" / "phantom_train.csv").read_text().splitlines()
    ink = table[0].split(",").index("ink")
    (tmp_path / "overlap.csv").write_text("\n".join([*table[:1], *table[5:25], ""]))
    no_ink = [line for line in table if line.split(",")[ink] in ("ink", "0")]
    (tmp_path / "no_ink.csv").write_text("\n".join([*no_ink, ""]))
    settings = tmp_path / "begun" / "SD_1" / "seed2" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"settings": {"num_epochs": 7}, "about": {}}))
    monkeypatch.chdir(tmp_path)
    before, sd = files_of(tmp_path), f"--samples=SD={world / 'sd'}"
    for options, message in (
        ([sd, f"--output={tmp_path / 'begun'}"], "seed2' was made with arch="),
        ([f"--samples=SD={world}/none"], "holds no images"),
        ([f"--samples=SD={world}/unknown"], "'a_dermoscopic_image' is not named after one of the 32"),
        ([], "--samples=SD=FOLDER"),
        ([sd, "--minority_share=2"], "--minority_share is 2.0"),
        ([sd, "--learning_rate=0"], "learning_rate is 0"),
        ([sd, f"--train_csv={tmp_path / 'no_ink.csv'}"], "has no positive of 'ink' among its"),
        ([sd, f"--val_csv={tmp_path / 'overlap.csv'}"], "overlap.csv'; keep one of them"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run(world, tmp_path / "out", *options)
        assert files_of(tmp_path) == before and not (tmp_path / "out").exists()

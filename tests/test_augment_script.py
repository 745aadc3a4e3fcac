"""Table 4 as people run it: trained, continued, extended, repeated; on two processes; bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from conftest import ROOT
from safetensors.torch import load_file
from script_tools import files_of, load_module, succeed
from torchmetrics.functional.classification import binary_f1_score

from ddpo_pytorch.augmentation.compare import MACRO
from ddpo_pytorch.data.isic import CAPTIONS, read_split, short_caption
from ddpo_pytorch.data.sample_folder import caption_of_folder, folder_name
from ddpo_pytorch.phantoms.skin import write_world


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


@pytest.mark.slow
def test_the_command_trains_resumes_extends_and_repeats(world, tmp_path):
    output, sd, rl = tmp_path / "out", f"--samples=SD={world / 'sd'}", f"--samples=SD-RL={world / 'rl'}"
    usual = {"ratios": "balanced", "cache_dir": tmp_path / "cache"}
    succeed(*command(world, output, sd, **usual))
    one_folder = files_of(output)
    first = succeed(*command(world, output, sd, rl, **usual))  # trains what is not there yet
    assert "9 trainings, 6 are there already" in first.stderr and "samples of" in first.stderr
    before = files_of(output)
    assert all(before[name] == content for name, content in one_folder.items() if "/" in name)
    assert {name.split("/")[0] for name in before if "/" in name} == {"real", "SD_balanced", "SD-RL_balanced"}
    parts = [f"SD_balanced/seed2/{n}" for n in ("artifact_classifier_H4", "settings", "test_logits", "cache")]
    assert [any(name.startswith(part) for name in before) for part in parts] == [True, True, True, False]
    assert list((tmp_path / "cache").iterdir())
    rows = json.loads(before["table4.json"])["rows"]
    assert {row["training"] for row in rows} == {"real", "real + balanced SD", "real + balanced SD-RL"}
    assert {row["group"] for row in rows} == {"all", "minority"} and len(rows) == 2 * 5 * 3 * 3
    stored = [load_file(output / "SD_balanced" / f"seed{seed}" / "test_logits.safetensors") for seed in range(3)]
    test = read_split(world / "splits" / "phantom_test.csv")
    assert all(one["labels"].tolist() == [list(row.labels[:4]) for row in test] for one in stored)
    row = next(r for r in rows if (r["attribute"], r["training"]) == ("ruler", "real + balanced SD"))
    expected = [binary_f1_score(one["logits"][:, 2].sigmoid(), one["labels"][:, 2].int()).item() for one in stored]
    assert row["measure"] == "f1" and row["values"] == pytest.approx(expected, abs=1e-6) and len(set(expected)) > 1
    assert json.loads(before["table4.json"])["test_images"] == 40 and before["table4.md"].decode() in first.stderr

    # as if killed before the last logits were written: only they are made again, and the same
    (output / "SD-RL_balanced" / "seed2" / "test_logits.safetensors").unlink()
    again = succeed(*command(world, output, sd, rl, ratios="balanced", cache_dir=""))
    assert "9 trainings, 8 are there already" in again.stderr and "epoch 0" not in again.stderr
    assert {name: content for name, content in files_of(output).items() if name != "table4.json"} == {
        name: content
        for name, content in before.items()
        if name != "table4.json"  # which records the flags
    }
    assert json.loads((output / "table4.json").read_text())["rows"] == rows


@pytest.mark.slow
def test_two_processes_six_heads_and_few_images(world, tmp_path):
    flags = dict(num_classes=6, limit=40, seeds="5", minority_share=0.0, batch_size=8)
    given = command(world, tmp_path / "out", f"--samples=SD={world / 'sd'}", **flags)
    result = succeed(*given, processes=2)
    assert "1 seed(s) do not tell" in result.stderr
    settings = json.loads((tmp_path / "out" / "SD_1" / "seed5" / "settings.json").read_text())["settings"]
    assert settings["images_per_step"] == 16 and settings["train_images"]["images"] > 40
    report = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert sum(group["real"] for group in report["subgroups"].values()) == 40
    assert {row["attribute"] for row in report["rows"]} == {*("hair gel_bubble ruler ink MEL NV".split()), MACRO}
    assert {row["group"] for row in report["rows"]} == {"all"} and report["seeds"] == [5]
    assert load_file(tmp_path / "out" / "real" / "seed5" / "test_logits.safetensors")["logits"].shape == (40, 6)
    assert not [name for name in files_of(tmp_path / "out") if "state" in name or "tmp" in name]


CASES = """
import os, runpy, sys, traceback
import ddpo_pytorch.judges.classifier_training, ddpo_pytorch.training.setup  # once for all cases
for line in sys.stdin.read().splitlines():
    sys.stderr.flush()
    child = os.fork()
    if not child:
        sys.argv, code = line.split("\\t"), 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)  # taking the interpreter down costs more than the rest
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print("end of case", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(world, tmp_path):
    output, sd = tmp_path / "out", f"--samples=SD={world / 'sd'}"
    table = (world / "splits" / "phantom_train.csv").read_text().splitlines()
    columns = table[0].split(",")
    for name, lines in (("few", table[:3]), ("overlap", table[:1] + table[5:25])):
        (tmp_path / f"{name}.csv").write_text("\n".join([*lines, ""]))
    no_ink = [line for line in table if line.split(",")[columns.index("ink")] in ("ink", "0")]
    (tmp_path / "no_ink.csv").write_text("\n".join([*no_ink, ""]))
    begun = tmp_path / "begun" / "SD_1" / "seed2" / "settings.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({"settings": {"num_epochs": 7}, "about": {}}))
    cases = [
        (
            [sd, f"--output={tmp_path / 'begun'}"],
            "seed2' was made with arch ",
        ),
        (["--samples=SD=nowhere"], "'nowhere' is not a sample folder"),
        ([f"--samples=SD={world / 'none'}"], "holds no images"),
        ([f"--samples=SD={world / 'unknown'}"], "folder 'a_dermoscopic_image' is not named after one of the 32"),
        ([sd, sd], "the name 'SD' is taken"),
        ([], "there is no folder of synthetic images"),
        (["--samples=folder"], "--samples=folder is unusable; write NAME=FOLDER"),
        ([sd, "--ratios=-1"], "ratio '-1' is unusable"),
        ([sd, "--ratios=0.01"], "ratio 0.01x takes none of its"),
        ([sd, "--seeds=0,0"], "--seeds=0,0 is unusable"),
        ([sd, "--minority_share=2"], "--minority_share=2.0 is not a share"),
        ([sd, "--learning_rate=0"], "learning_rate is 0"),
        ([sd, "--arch=nothing"], "'nothing' is unknown to timm"),
        ([sd, "--data_path=nowhere"], "image folder 'nowhere' does not exist"),
        ([sd, f"--train_csv={tmp_path / 'no_ink.csv'}"], "has no positive of 'ink' among its"),
        ([sd, f"--val_csv={tmp_path / 'overlap.csv'}"], "keep it in one of them"),
        ([sd, "--limit=1"], "or raise --limit if you gave one"),
    ]
    lines = []
    for arguments, _ in cases:
        _, *usual = command(world, output)
        lines.append("\t".join([str(ROOT / "scripts" / "augment.py"), *usual, *arguments]))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CASES],
        input="\n".join(lines),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["2"] * len(cases), result.stderr[-3000:]
    for (arguments, message), said in zip(cases, result.stderr.split("end of case\n"), strict=False):
        last = said.splitlines()[-1]
        assert last.startswith("error: ") and message in last and "Traceback" not in said, (arguments, said)
    assert not output.exists() and [path for path in (tmp_path / "begun").rglob("*.*")] == [begun]


def test_a_caption_without_images_is_named(world, tmp_path, monkeypatch, caplog):
    for kind in ("string", "multi_string", "enum", "integer", "float"):
        monkeypatch.setattr(flags, f"DEFINE_{kind}", lambda *_, **__: None)
    script = load_module(ROOT / "scripts" / "augment.py")
    tables = {f"{split}_csv": str(world / "splits" / f"phantom_{split}.csv") for split in ("train", "val", "test")}
    given = {"data_path": str(world / "images"), "limit": 0, "image_size": 32, "num_classes": "4", **tables}
    script.FLAGS = SimpleNamespace(**given)
    folder = shutil.copytree(world / "sd", tmp_path / "sd")
    place = min((folder / "images").iterdir())
    shutil.rmtree(place)
    place.mkdir()
    script.read_data({"SD": folder})
    (line,) = [line for line in caplog.messages if str(folder) in line and "has no image of" in line]
    assert short_caption(caption_of_folder(place.name)) in line

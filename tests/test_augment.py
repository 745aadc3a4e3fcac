"""Table 4: the synthetic images that are drawn, measures against independent loops, tables, and augment.py."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from script_tools import files_of, succeed
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_f1_score

from ddpo_pytorch.augmentation import plan as planning
from ddpo_pytorch.augmentation.report import MACRO, MEASURES, as_csv, compare, markdown, subgroups
from ddpo_pytorch.data.isic import CAPTIONS, read_split
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.phantoms.skin import write_world

NAMES = ("hair", "ink")


def test_drawn_samples_are_distinct_paired_nested_and_counted():
    captions = [caption for caption in CAPTIONS[:3] for _ in range(20)]
    wanted = {CAPTIONS[0]: 5, CAPTIONS[2]: 30, CAPTIONS[1]: 8}
    drawn = planning.draw(captions, wanted, seed=1)
    assert drawn == planning.draw(captions, wanted, seed=1) and drawn.places == sorted(set(drawn.places))
    assert drawn.counts == {CAPTIONS[0]: 5, CAPTIONS[1]: 8, CAPTIONS[2]: 20} and drawn.missing == {CAPTIONS[2]: 10}
    assert [captions[place] for place in drawn.places] == [CAPTIONS[0]] * 5 + [CAPTIONS[1]] * 8 + [CAPTIONS[2]] * 20
    assert planning.draw(captions, wanted, seed=2).places != drawn.places
    # each subgroup on its own: another folder, without the first caption, gives the second one's same samples.
    alone = planning.draw(captions[20:], {CAPTIONS[1]: 8}, seed=1)
    assert [place + 20 for place in alone.places] == [place for place in drawn.places if 20 <= place < 40]
    assert set(alone.places) < set(planning.draw(captions[20:], {CAPTIONS[1]: 12}, seed=1).places)
    # over seeds every sample has the same chance: 400 draws of 8 among 20 take each 160 times, +- 4.5 sd of 9.8
    times = np.bincount([p for s in range(400) for p in planning.draw(captions[20:40], {CAPTIONS[1]: 8}, s).places])
    assert abs(times - 160).max() < 44


def test_wanted_images_names_and_folders_of_a_plan():
    real = {CAPTIONS[0]: 10, CAPTIONS[1]: 3, CAPTIONS[2]: 0, CAPTIONS[3]: 1}
    assert planning.wanted_images(real, 0.5) == {CAPTIONS[0]: 5, CAPTIONS[1]: 2, CAPTIONS[3]: 1}  # halves go up
    assert planning.wanted_images(real, 2.0) == {CAPTIONS[0]: 20, CAPTIONS[1]: 6, CAPTIONS[3]: 2}
    assert planning.wanted_images(real, "balanced") == {CAPTIONS[0]: 0, CAPTIONS[1]: 7, CAPTIONS[3]: 9}
    real = {CAPTIONS[0]: 2, CAPTIONS[1]: 1}
    captions = {"SD": [CAPTIONS[0]] * 3 + [CAPTIONS[1]], "SD-RL": [CAPTIONS[1]]}
    trainings = planning.plan(real, captions, planning.parse_ratios("1x, balanced"), planning.parse_seeds("3, 5"))
    names = ["real", "real + 1x SD", "real + 1x SD-RL", "real + balanced SD", "real + balanced SD-RL"]
    folders = ["real", "SD_1", "SD-RL_1", "SD_balanced", "SD-RL_balanced"]
    assert [one.name for one in trainings] == names * 2
    assert [one.folder for one in trainings] == [f"{folder}/seed{seed}" for seed in (3, 5) for folder in folders]
    assert [len(one.drawn.places) for one in trainings[1:5]] == [3, 1, 1, 1] and trainings[0].drawn is None
    assert trainings[2].drawn.missing == {CAPTIONS[0]: 2}
    for other, ratio in ((CAPTIONS[7], 1.0), (CAPTIONS[1], 0.4)):
        said = r"--samples=X=\.\.\.: ratio .* takes none of its 1 images"
        refused(said, planning.plan, real, {"X": [other]}, [ratio], (0,))


def test_unusable_flags_are_refused_by_name():
    given = {"ratios": ("", "-1", "nan", "1,,2", "much", "1,1.0", "balanced,balanced")}
    given |= {"seeds": ("", "1,1", "1,01", "-1", "1.5", "a")}
    given |= {"samples": (["folder"], ["SD="], ["a/b=c"], [".a=c"], ["A=x", "a=y"], ["Real=x"], ["test=x"], [])}
    for flag, values in given.items():
        for value in values:
            refused(f"--{flag}=", getattr(planning, f"parse_{flag}"), value)


def classifiers(images=150, seeds=3, seed=0):
    """Logits of three kinds of classifiers, the last clearly the best; some are equal."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, len(NAMES))) < (0.4, 0.15)
    return {
        name: np.round(rng.normal(size=(seeds, *truth.shape)) + np.where(truth, strength, -strength), 1)
        for name, strength in (("real", 0.8), ("same", 0.8), ("better", 2.0))
    }, truth


def reference(logits, truth):
    """(measures,) of one attribute by torchmetrics."""
    # in the order of sigmoid(logit), which torch may round differently for equal logits; 0.5 stays 0.5.
    scores, labels = torch.tensor((logits + 20) / 40), torch.tensor(truth).int()
    return [function(scores, labels).item() for function in (binary_f1_score, binary_accuracy, binary_auroc)]


def test_means_spreads_and_paired_bootstrap_equal_a_loop():
    logits, truth = classifiers()
    chosen = np.arange(150) % 2 == 0
    keep = np.flatnonzero(chosen)
    found = compare(logits, truth, NAMES, chosen, resamples=1500, seed=5)
    rows = {(row["attribute"], row["training"], row["measure"]): row for row in found}

    def measures(drawn):  # (training, seed, attribute and macro, measure)
        kinds = np.stack([*logits.values()])[:, :, drawn]
        table = np.array([[[reference(one[:, h], truth[drawn, h]) for h in range(2)] for one in own] for own in kinds])
        return np.concatenate([table, table.mean(2, keepdims=True)], 2)

    point, differences = measures(keep), []
    for drawn in np.random.default_rng(0).integers(150, size=(100, 150)):
        means = measures(drawn[np.isin(drawn, keep)]).mean(1)  # images are drawn first, then those that count taken
        differences.append(means - means[:1])
    low, high = np.quantile(differences, [0.025, 0.975], axis=0)
    spread = np.std(differences, axis=0)
    for place in itertools.product(range(3), range(3), range(3)):
        number, column, index = place
        row = rows[(*NAMES, MACRO)[column], list(logits)[number], MEASURES[index]]
        expected, of_seeds = point[number, :, column, index], (point[number] - point[0])[:, column, index]
        assert row["values"] == pytest.approx(expected, abs=1e-6)
        assert (row["mean"], row["sd"]) == pytest.approx((expected.mean(), expected.std(ddof=1)), abs=1e-6)
        assert row["support"] == (None if column == 2 else truth[keep, column].sum())
        if number:
            assert row["difference"] == pytest.approx(of_seeds.mean(), abs=1e-6)
            # quantiles of 100 resamples scatter by about a quarter of the standard deviation
            assert (row["low"], row["high"]) == pytest.approx((low[place], high[place]), abs=0.9 * spread[place])
            assert row["seeds_agree"] == (abs(np.sign(of_seeds).sum()) == 3)
    assert rows["hair", "better", "auc"]["p"] < 0.002 and rows["hair", "same", "auc"]["p"] > 0.01
    assert {row.get("seeds_agree") for row in found} == {None, True, False}
    # the same resample serves two classifiers: unpaired ones would give a copy an interval of some width
    rows = compare({"real": logits["real"], "copy": logits["real"][::-1]}, truth, NAMES, resamples=200)
    copies = [row for row in rows if row["training"] == "copy"]
    assert all(row["low"] == pytest.approx(0, abs=1e-12) == row["high"] and row["p"] > 0.5 for row in copies)


def table_of(text, heading, head):
    """Return the cells by first cell of the table below a heading of a report whose first column is `head`."""
    lines = text.partition(heading)[2].partition(f"| {head} ")[2].splitlines()[2:]
    lines = [line.strip("|").split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


@pytest.mark.filterwarnings("error")
def test_undefined_values_are_left_out_and_shown_as_a_dash():
    logits, truth = classifiers(seeds=1)
    truth[:, 1] = False
    rows = [{"group": "all"} | row for row in compare(logits, truth, NAMES, resamples=50)]
    found = {(row["attribute"], row["training"], row["measure"]): row for row in rows}
    for key in ("f1", "auc"):
        row = found["ink", "better", key]
        assert (row["mean"], row["sd"], row["difference"], row["p"]) == (None,) * 4
        assert found[MACRO, "better", key]["mean"] == found["hair", "better", key]["mean"]
    accuracy = [found[name, "better", "accuracy"]["mean"] for name in (*NAMES, MACRO)]
    assert accuracy[2] == pytest.approx((accuracy[0] + accuracy[1]) / 2)
    assert found["ink", "real", "accuracy"]["sd"] is None
    assert compare(logits, truth, NAMES, np.zeros(150, bool)) == []

    drawn = planning.draw([CAPTIONS[1]] * 2, {CAPTIONS[1]: 3}, 0)
    groups = subgroups({CAPTIONS[1]: 3, CAPTIONS[8]: 4}, {CAPTIONS[0]: 1}, {CAPTIONS[1]}, {"real + 1x SD": drawn})
    text = markdown(rows, {"seeds": (4,), "minority_share": 0.02, "test_images": 150, "subgroups": groups})
    assert table_of(text, "### ink: in 0 of 150", "trained on")["better"][:3] == ["-"] * 3
    assert "nan" not in text.lower() and "None" not in text and "1 seed(s)" in text and "Samples were missing" in text
    expected = {"MEL plain": ["", "1", "0", "0"], "MEL ink": ["yes", "0", "3", "2 of 3"]}
    expected |= {"MEL hair": ["", "0", "4", "0"], "all": ["", "1", "7", "2 of 3"]}
    assert table_of(text, "## Images by subgroup", "labels") == expected
    lines = list(csv.DictReader(as_csv(rows).splitlines()))
    assert len(lines) == len(rows) and lines[0]["images"] == "150" and lines[0]["seeds_agree"] == ""
    for key in ("mean", "difference", "support"):
        assert [line[key] for line in lines] == ["" if row.get(key) is None else repr(row[key]) for row in rows]


def test_stars_distinguish_seeds_that_agree():
    truth = np.arange(200)[:, None] % 2 == 0
    right = np.where(truth, 1.0, -1.0)
    half = np.where(np.arange(200)[:, None] < 100, right, -right)
    logits = {"real": np.stack([half] * 3), "all": np.stack([right] * 3), "two": np.stack([right, right, -right])}
    logits["none"] = logits["real"]
    rows = [{"group": "all"} | row for row in compare(logits, truth, ("ink",), resamples=200)]
    about = {"seeds": (0, 1, 2), "minority_share": 0, "test_images": 200}
    text = markdown(rows, about | {"subgroups": subgroups({CAPTIONS[0]: 1}, {}, (), {})})
    short, full = table_of(text, "## All", "F1 / accuracy (%)"), table_of(text, "### ink", "trained on")
    assert list(short) == list(full) == ["real", "all", "two", "none"]
    assert short["all"][0] == "1.000* / 100.00*" and full["all"][4].startswith("+50.00 [") and full["all"][4][-1] == "*"
    assert short["two"][0].endswith("66.67*?") and "*" not in short["none"][0]


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
def test_trainings_are_resumed_and_extended(world, tmp_path, run_flags):
    output, sd, rl = tmp_path / "out", f"--samples=SD={world / 'sd'}", f"--samples=SD-RL={world / 'rl'}"
    usual = {"ratios": "balanced", "seeds": "0,1", "cache_dir": tmp_path / "cache"}
    run_flags(*command(world, output, sd, **usual))
    one_folder = files_of(output)
    log = run_flags(*command(world, output, sd, rl, **usual))
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
    log = run_flags(*command(world, output, sd, rl, **(usual | {"cache_dir": ""})))
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


def test_bad_input_is_refused_and_writes_nothing(world, run_flags, tmp_path, monkeypatch):
    """Also split tables that cannot be used, and an output that was started with other settings."""
    table = pd.read_csv(world / "splits" / "phantom_train.csv")
    table[4:24].to_csv(tmp_path / "overlap.csv", index=False)
    table.assign(ink=0).to_csv(tmp_path / "no_ink.csv", index=False)
    settings = tmp_path / "begun" / "SD_1" / "seed2" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"settings": {"num_epochs": 7}, "about": {}}))
    (unknown := tmp_path / "unknown" / "SD_1" / "seed2").mkdir(parents=True)
    (unknown / "test_logits.safetensors").touch()  # of a training that is not known
    monkeypatch.chdir(tmp_path)
    before, sd = files_of(tmp_path), f"--samples=SD={world / 'sd'}"
    bad = [([f"--samples=SD={world}/none"], "holds no images"), ([], "--samples=SD=FOLDER")]
    bad += [([f"--samples=SD={world}/unknown"], "'a_dermoscopic_image' is not named after one of the 32")]
    bad += [([sd, "--minority_share=2"], "--minority_share is 2.0"), ([sd, "--learning_rate=0"], "learning_rate is 0")]
    bad += [([sd, f"--train_csv={tmp_path / 'no_ink.csv'}"], "has no positive of 'ink' among its")]
    bad += [([sd, f"--val_csv={tmp_path / 'overlap.csv'}"], "overlap.csv'; keep one of them")]
    bad += [([sd, "--output=begun"], "seed2' was made with arch="), ([sd, "--output=unknown"], "of unknown settings")]
    for options, message in bad:
        refused([message], run_flags, *command(world, tmp_path / "out", *options))
        assert files_of(tmp_path) == before and not (tmp_path / "out").exists()

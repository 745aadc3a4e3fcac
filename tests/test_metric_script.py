"""metric.py on small folders: one and two processes, numbers by hand, pairs, cache, what is left out."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sample_sets import numbers, read, write_samples
from scipy.special import expit
from script_tools import options, succeed

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.judges.classifier import load_classifier

pytest_plugins = ["script_tools", "sample_sets"]


@pytest.mark.slow
def test_metric_one_and_two_processes(sets, alexnet, judges, config_file, fields, tmp_path):
    """Separate caches, 13 + 9 + 9 images in batches of 4: nothing divides."""
    one, two = (fields(alexnet, output=tmp_path / n, cache_dir=tmp_path / f"cache {n}") for n in ("one", "two"))
    run = succeed("metric.py", *options(config_file, **one), "--report")
    succeed("metric.py", *options(config_file, **two), processes=2)
    first, second = read(tmp_path / "one"), read(tmp_path / "two")
    ours, theirs = (numbers({"models": r["models"], "real": r["real"]}) for r in (first, second))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert theirs == ours  # to the bit
    models = first["models"]
    assert list(models) == ["SD", "SD+RL"] and models["SD"]["images"] == 9 and first["real"]["images"] == 13
    assert models["SD"]["LPIPS_pairs"] == 7  # a caption without a real image has no pairs
    assert 0 < models["SD"]["LPIPS"] < 1 and models["SD"]["FD_judge"] > 0 and models["SD"]["FID"] is None
    assert models["SD"]["fidelity"]["judge"]["matched"]["n"] == 7 and first["settings"]["seed"] == 42
    assert "inception" in str(first["missing"]) and "metric.inception is empty" in run.stderr
    tables = [(tmp_path / "one" / f"{name}.md").read_text() for name in ("table2", "table3")]
    assert all(table in run.stdout for table in tables) and "# Real Sample" in tables[0]
    assert {"table2.tex", "table3.csv", "comparison.png", "report.html"} <= {
        p.name for p in (tmp_path / "one").iterdir()
    }
    line = json.loads((tmp_path / "one" / "metrics_log.jsonl").read_text())
    assert line == {"metrics": {"APR_m": models["SD+RL"]["APR"], "LPIPS": models["SD+RL"]["LPIPS"], "FID": None}}


def test_numbers_by_hand(sets, lively_judge, config_file, fields, run_main, tmp_path):
    """APR from the files, rewards from the log, the paired difference from the images of equal names."""
    run_main("metric.py", config_file, **fields())
    result = read(tmp_path / "out")
    judge = load_classifier(lively_judge)
    right = {
        name: np.array(
            [
                judge.predict(load_image(path)[None])[0].tolist() == list(labels_of(caption)[:4])
                for caption in (CAPTIONS[8], CAPTIONS[0], CAPTIONS[31])
                for path in sorted((sets[name] / "images" / folder_name(caption)).iterdir())
            ]
        )
        for name in ("sd", "rl")
    }
    assert 0 < right["sd"].sum() < 9 and (right["sd"] != right["rl"]).any()  # the test could fail
    assert result["models"]["SD+RL"]["APR"] == pytest.approx(right["rl"].mean(), abs=1e-12)
    assert result["models"]["SD"]["APR_by_prompt"][CAPTIONS[8]] == pytest.approx(right["sd"][:4].mean(), abs=1e-12)
    assert result["models"]["SD+RL"]["reward"] == pytest.approx((0.6 + 0.3 + 0.1) / 9)
    (row,) = result["comparisons"]
    assert row["paired"] and row["pairs"] == 9
    assert row["APR"]["value"] == pytest.approx(right["rl"].mean() - right["sd"].mean(), abs=1e-12)
    assert (row["gained"], row["lost"]) == ((right["rl"] & ~right["sd"]).sum(), (right["sd"] & ~right["rl"]).sum())
    with open(tmp_path / "out" / "per_image.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 13 + 9 + 9
    assert sum(int(line["aligned"]) for line in lines if line["model"] == "SD+RL") == right["rl"].sum()
    assert all(0 <= float(line["H4_hair"]) <= 1 for line in lines)


def test_other_noise_is_compared_without_pairs(sets, config_file, fields, run_main, tmp_path, caplog):
    both = f"SD={sets['sd']},SD+RL={sets['more']}"
    run_main("metric.py", config_file, **fields(folders=both))
    (row,) = read(tmp_path / "out")["comparisons"]
    assert not row["paired"] and row["p"] is None and row["APR"]["value"] is not None
    assert "was drawn from seed 91100" in row["reason"] and "from 92100" in row["reason"] and "0.png" in row["reason"]
    assert row["reason"] in caplog.text and "made with seed 88" in caplog.text


def test_several_folders_of_a_name_are_generation_seeds(sets, config_file, fields, run_main, tmp_path):
    names = ("sd", "rl", "more")
    folders = [f"SD={sets[name]}" for name in names] + [f"{name}={sets[name]}" for name in names]
    run_main("metric.py", config_file, **fields(folders=",".join(folders)))
    models = read(tmp_path / "out")["models"]
    part, singles = models["SD"], [models[name]["APR"] for name in names]
    assert part["APR"] == pytest.approx(np.mean(singles)) and part["images"] == 9 + 9 + 11
    # a t interval over three numbers
    half = 4.302652729911275 * np.std(singles, ddof=1) / 3**0.5
    assert part["alignment"]["H4"]["APR"]["high"] - part["APR"] == pytest.approx(half, rel=1e-6)
    assert len(part["folders"]) == 3


def test_the_real_set_against_itself_and_without_one(sets, config_file, fields, run_main, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    run_main("metric.py", config_file, **fields(fake_path=sets["real"], compare_path="absent"))
    result = read(tmp_path / "out")
    own = result["models"]["SD+RL"]
    for part in ("matched", "unmatched"):
        assert own["fidelity"]["judge"][part]["FID"]["value"] < 1e-9
    assert own["fidelity"]["judge"]["matched"]["coverage"]["value"] == 1
    assert own["APR"] == result["real"]["APR"] and own["LPIPS"] is None and list(result["models"]) == ["SD+RL"]
    assert "SD is left out: there are no samples in absent" in caplog.text
    usual = fields(fake_path=sets["real"], compare_path="", real_path="")
    run_main("metric.py", config_file, **usual | {"metric__prompts": (CAPTIONS[8],)})
    result = read(tmp_path / "out")
    assert result["models"]["SD+RL"]["images"] == 5 and result["models"]["SD+RL"]["FD_judge"] is None
    assert "# Real" not in (tmp_path / "out" / "table2.md").read_text() and "real" not in result
    assert len((tmp_path / "out" / "metrics_log.jsonl").read_text().splitlines()) == 2
    assert "metric.real_path is empty" in str(result["missing"]) and "Table 3" in capsys.readouterr().out


def test_copies_of_training_images_are_found(sets, config_file, fields, run_main, tmp_path):
    """Two pixel copies and a near copy among nine samples; training images without captions, at another depth."""
    train = tmp_path / "train"
    write_samples(train / "deep", {CAPTIONS[0]: 30}, seed=9)
    originals = sorted(train.rglob("*.png"))
    fake = write_samples(tmp_path / "fake", {CAPTIONS[0]: 9}, seed=10)
    samples = sorted(fake.rglob("*.png"))
    for sample, original in zip(samples[:3], originals[4:7], strict=True):
        image = load_image(original)
        save_image(sample, image if sample != samples[2] else (image + 0.004).clamp(0, 1))
    run_main("metric.py", config_file, **fields(fake_path=fake, compare_path="", train_path=train))
    result = read(tmp_path / "out")
    block = result["models"]["SD+RL"]["memorisation"]["judge"]
    assert block["copies"] == 2 and block["share_closer"]["value"] >= 2 / 9
    nearest = {Path(pair["path"]).name: Path(pair["train"]).name for pair in block["closest"]}
    for sample, original in zip(samples[:3], originals[4:7], strict=True):
        assert nearest[sample.name] == original.name
    assert [pair["distance"] < 1e-12 for pair in block["closest"][:3]] == [True, True, False]
    assert (tmp_path / "out" / "closest_judge_SD+RL.png").is_file() and result["sets"]["train"]["images"] == 30


def test_features_are_computed_once_and_again_when_an_image_changes(config_file, fields, run_main, tmp_path):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 10}, seed=1)
    usual = fields(fake_path=folder, compare_path="", real_path="")
    run_main("metric.py", config_file, **usual)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(before) == 4 * 3  # four networks (pixels, thumbnail, logits, features), chunks of 4
    run_main("metric.py", config_file, **usual)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == before
    first = read(tmp_path / "out")
    image = folder / "images" / folder_name(CAPTIONS[0]) / "5.png"
    save_image(image, 1 - load_image(image))
    run_main("metric.py", config_file, **usual)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4 * 4  # one more chunk
    changed = read(tmp_path / "out")
    hashes = [result["models"]["SD+RL"]["folders"][0]["sha256"] for result in (first, changed)]
    assert hashes[0] != hashes[1]


def test_apr_is_that_of_the_samplers_own_log(lively_judge, config_file, fields, run_main, tmp_path):
    """Drawn by eval.py with the judge looking on; counted from its log, without any of metric.py's code."""
    run_main("eval.py", config_file, logdir=str(tmp_path / "drawn"), eval__classifier=str(lively_judge))
    log = json.loads((tmp_path / "drawn" / "image_log.json").read_text())
    right = [entry["predictions"] == entry["labels"][:4] for entry in log]
    run_main("metric.py", config_file, **fields(fake_path=tmp_path / "drawn", compare_path="", real_path=""))
    assert len(log) == 12 and read(tmp_path / "out")["models"]["SD+RL"]["APR"] == sum(right) / 12
    with open(tmp_path / "out" / "per_image.csv") as file:
        lines = {line["path"]: line for line in csv.DictReader(file)}
    for entry in log:
        line = lines[entry["path_to_img"]]
        assert int(line["seed"]) == entry["seed"]
        assert float(line["H4_hair"]) == pytest.approx(expit(entry["logits"][0]), abs=1e-5)

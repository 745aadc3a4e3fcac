"""The report's pictures and curves: order, pairs, thumbnails, logs of runs."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_example import write_run

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.report.curves import curves, read_runs, series
from ddpo_pytorch.report.pictures import SIDE, Album, natural, paired_files, rarest_first
from ddpo_pytorch.utils.errors import UserError


def test_rarest_prompts_come_first():
    counts = dict.fromkeys(CAPTIONS, 5) | {CAPTIONS[7]: 0, CAPTIONS[30]: 2, CAPTIONS[3]: 2}
    order = rarest_first(tuple(reversed(CAPTIONS)), counts)
    assert order[:3] == [CAPTIONS[7], CAPTIONS[3], CAPTIONS[30]]
    assert order[3:] == [c for c in CAPTIONS if counts[c] == 5]
    assert rarest_first(tuple(reversed(CAPTIONS)), None) == list(CAPTIONS)


def test_columns_pair_files_of_one_stem():
    def files(folder, *stems):
        return [(Path(folder) / f"{stem}.png", "a") for stem in stems] + [(Path(folder) / "x.png", "b")]

    sets = {"SD": files("sd", "0", "1", "2", "3"), "RL": files("rl", "3", "1", "4")}
    stems, rows = paired_files(sets, "a", 2)
    assert stems == ["1", "3"]
    assert rows == {"SD": [Path("sd/1.png"), Path("sd/3.png")], "RL": [Path("rl/1.png"), Path("rl/3.png")]}
    # two generation seeds have the same stems, and are paired in their order
    twice = {"SD": files("s1", "0") + files("s2", "0"), "RL": files("r1", "0") + files("r2", "0")}
    stems, rows = paired_files(twice, "a", 6)
    assert stems == ["0", "0"] and rows["RL"] == [Path("r1/0.png"), Path("r2/0.png")]
    # by number and not letter by letter, whatever the order on the disk; all of the first seed before the second
    order = ("0", "1", "10", "100", "2")
    many = {"SD": files("s1", *order) + files("s2", *order), "RL": files("r1", *reversed(order)) + files("r2", *order)}
    stems, rows = paired_files(many, "a", 7)
    assert stems == ["0", "1", "2", "10", "100", "0", "1"]
    assert rows["RL"] == [Path(f"r1/{n}.png") for n in (0, 1, 2, 10, 100)] + [Path("r2/0.png"), Path("r2/1.png")]
    names = ["b2", "a10", "10b", "a9", "9", "a", "a09"]
    assert sorted(names, key=natural) == ["9", "10b", "a", "a09", "a9", "a10", "b2"]
    stems, rows = paired_files({"SD": files("sd", "0"), "RL": files("rl", "9")}, "a", 6)
    assert stems == [] and rows == {"SD": [Path("sd/0.png")], "RL": [Path("rl/9.png")]}


def test_thumbnails_keep_small_images_and_shrink_large_ones(tmp_path):
    rng, sizes = np.random.default_rng(0), {"small": (48, 64), "large": (512, 256)}
    for name, (width, height) in sizes.items():
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
        smooth.save(tmp_path / f"{name}.png")
    album = Album()
    pictures = {name: album.picture(tmp_path / f"{name}.png", name) for name in sizes}
    assert (pictures["small"].width, pictures["small"].height) == (48, 64)
    assert (pictures["large"].width, pictures["large"].height) == (SIDE, SIDE // 2)
    decoded = Image.open(io.BytesIO(base64.b64decode(pictures["small"].source.split(",")[1])))
    truth = np.asarray(Image.open(tmp_path / "small.png"), np.float32)
    assert np.abs(np.asarray(decoded, np.float32) - truth).mean() < 3
    assert album.picture(tmp_path / "none.png", "") is None and album.unreadable == [str(tmp_path / "none.png")]


def test_logs_are_read_by_epoch(tmp_path):
    run = write_run(tmp_path / "a" / "run", 9, 0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 9, "reward_mean": float("nan"), "grad_norm": 0.5}) + '\n{"epoch": 10, "rew')
    runs = read_runs([run, write_run(tmp_path / "b" / "run", 3, 1)])
    assert list(runs) == ["a/run", "b/run"]
    entries = runs["a/run"]
    assert series(entries, "held_out_apr", 100)[:, :2].tolist() == [
        [3, 100 * entries[3]["held_out_apr"]],
        [7, 100 * entries[7]["held_out_apr"]],
    ]
    assert len(series(entries, "reward_mean")) == 9 and len(series(entries, "grad_norm")) == 10
    assert series(entries, "reward_mean")[0, 2] == pytest.approx(0.14) and np.isnan(series(entries, "grad_norm")[0, 2])
    (run / "metrics.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(UserError, match="metrics.jsonl' line 1"):
        read_runs([run])


def test_held_out_evaluations_begin_with_the_base_model(tmp_path):
    lines = [{"epoch": 0, "reward_mean": 0.5}, {"epoch": 1, "reward_mean": 0.6, "held_out_apr": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluations = [{"epoch": 0, "apr": 0.1, "reward": 0.4}, {"epoch": 2, "apr": 0.3, "reward": 0.7}]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
    entries = read_runs([tmp_path])[tmp_path.name]
    points = {key: series(entries, key)[:, :2].tolist() for key in ("held_out_apr", "held_out_reward", "reward_mean")}
    assert points == {
        "held_out_apr": [[0, 0.1], [2, 0.3]],
        "held_out_reward": [[0, 0.4], [2, 0.7]],
        "reward_mean": [[0, 0.5], [1, 0.6]],
    }


def test_plots_are_the_same_bytes_again():
    runs = {"$run_1": [{"epoch": epoch, "reward_mean": 0.1 * epoch} for epoch in range(3)], "other": [{"epoch": 0}]}
    (plot,) = curves(runs)
    assert curves(runs) == [plot] and plot.light != plot.dark
    assert (plot.key, plot.ends) == ("reward_mean", [("$run_1", (0, 0), (2, pytest.approx(0.2)))])
    svg = base64.b64decode(plot.dark.split(",")[1]).decode()
    assert svg.count("<svg") == 1 and "<image" not in svg

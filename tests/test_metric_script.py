"""metric.py on small folders: one and two processes, numbers by hand, odd sets; what it refuses in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from launching import run_script
from PIL import Image
from refusals import refused
from sample_sets import images_of, read, write_samples
from script_tools import names, options, read_table, succeed

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of, short_caption
from ddpo_pytorch.data.sample_folder import folder_name, list_samples, read_log, title_of, write_log
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier

A, B, C = CAPTIONS[0], CAPTIONS[8], CAPTIONS[31]


@pytest.mark.slow
def test_metric_one_and_two_processes(sets, alexnet, judges, config_file, fields, tmp_path):
    """Separate caches, 13 + 9 + 9 images in batches of 4: nothing divides."""
    one, two = (fields(alexnet, output=tmp_path / n, cache_dir=tmp_path / f"cache {n}") for n in ("one", "two"))
    run = succeed("metric.py", *options(config_file, **one), "--report")
    succeed("metric.py", *options(config_file, **two), processes=2)
    first, second = read(tmp_path / "one"), read(tmp_path / "two")
    assert (first["models"], first["real"]) == (second["models"], second["real"])  # to the bit
    models = first["models"]
    assert list(models) == ["SD", "SD+RL"] and models["SD"]["images"] == 9 and first["real"]["images"] == 13
    assert models["SD"]["LPIPS_pairs"] == 7  # a caption without a real image has no pairs
    assert 0 < models["SD"]["LPIPS"] < 1 and models["SD"]["FD_judge"] > 0 and models["SD"]["FID"] is None
    assert models["SD"]["fidelity"]["judge"]["matched"]["n"] == 7 and first["settings"]["seed"] == 42
    assert "inception" in str(first["missing"]) and "metric.inception is empty" in run.stderr
    tables = [(tmp_path / "one" / f"{name}.md").read_text() for name in ("table2", "table3")]
    assert all(table in run.stdout for table in tables) and "# Real Sample" in tables[0]
    assert {"table2.tex", "table3.csv", "comparison.png", "report.html"} <= {*names(tmp_path / "one")}
    line = json.loads((tmp_path / "one" / "metrics_log.jsonl").read_text())
    assert line == {"metrics": {"APR_m": models["SD+RL"]["APR"], "LPIPS": models["SD+RL"]["LPIPS"], "FID": None}}


def test_numbers_by_hand(sets, lively_judge, measured, tmp_path):
    """APR from the files, rewards from the log, the paired difference from the images of equal names."""
    result = measured(compare_path=sets["sd"])
    judge, right = load_classifier(lively_judge), {}
    for name in ("sd", "rl"):
        files = [(path, caption) for caption in (B, A, C) for path in images_of(sets[name], caption)]
        hits = [judge.predict(load_image(path)[None])[0].tolist() == list(labels_of(text)[:4]) for path, text in files]
        right[name] = np.array(hits)
    assert 0 < right["sd"].sum() < 9 and (right["sd"] != right["rl"]).any()  # the test could fail
    assert result["models"]["SD+RL"]["APR"] == pytest.approx(right["rl"].mean(), abs=1e-12)
    assert result["models"]["SD"]["APR_by_prompt"][B] == pytest.approx(right["sd"][:4].mean(), abs=1e-12)
    assert result["models"]["SD+RL"]["reward"] == pytest.approx((0.6 + 0.3 + 0.1) / 9)
    assert result["models"]["SD+RL"]["rewards"]["low"] < 1 / 9 < result["models"]["SD+RL"]["rewards"]["high"]
    (row,) = result["comparisons"]
    assert row["paired"] and row["pairs"] == 9
    assert row["APR"]["value"] == pytest.approx(right["rl"].mean() - right["sd"].mean(), abs=1e-12)
    before, after = (result["models"][name]["FD_judge"] for name in ("SD", "SD+RL"))
    assert row["FD"]["judge"]["value"] == pytest.approx(after - before, abs=1e-12) and after != before
    assert (row["gained"], row["lost"]) == ((right["rl"] & ~right["sd"]).sum(), (right["sd"] & ~right["rl"]).sum())
    lines = read_table(tmp_path / "out" / "per_image.csv")
    assert len(lines) == 13 + 9 + 9
    assert sum(int(line["aligned"]) for line in lines if line["model"] == "SD+RL") == right["rl"].sum()
    assert all(0 <= float(line["H4_hair"]) <= 1 for line in lines)


def test_other_noise_is_compared_without_pairs(sets, measured, tmp_path, caplog):
    (row,) = measured(folders=f"SD={sets['sd']},SD+RL={sets['more']}")["comparisons"]
    assert not row["paired"] and row["p"] is None and row["APR"]["value"] is not None
    assert "was drawn from seed 91100" in row["reason"] and "from 92100" in row["reason"] and "0.png" in row["reason"]
    assert row["reason"] in caplog.text and "made with seed 88" in caplog.text


def test_several_folders_of_a_name_are_generation_seeds(sets, measured, tmp_path):
    part = measured(folders=",".join(f"SD={sets[name]}" for name in ("sd", "rl", "more")))["models"]["SD"]
    images = pd.read_csv(tmp_path / "out" / "per_image.csv")
    means = images[images.model == "SD"].groupby("folder").aligned.mean()
    assert part["APR"] == pytest.approx(np.mean(means)) and part["images"] == 9 + 9 + 11 and len(part["folders"]) == 3
    # a t interval over three numbers
    half, apr = 4.302652729911275 * np.std(means, ddof=1) / 3**0.5, part["alignment"]["H4"]["APR"]
    assert apr["high"] == pytest.approx(min(1, part["APR"] + half), rel=1e-6) and apr["n"] == 29
    fidelity = part["fidelity"]["judge"]  # rests on one folder
    assert fidelity["unmatched"]["FID"]["n"] == 9 and fidelity["unmatched"]["FID"]["low"] >= 0


def test_the_real_set_against_itself_and_without_one(sets, measured, tmp_path, capsys):
    result = measured(fake_path=sets["real"], compare_path="absent")
    own = result["models"]["SD+RL"]
    matched, unmatched = (own["fidelity"]["judge"][part] for part in ("matched", "unmatched"))
    assert matched["FID"]["value"] < 1e-9 and unmatched["FID"]["value"] < 1e-9
    assert matched["coverage"]["value"] == 1 and matched["MMD"]["value"] == pytest.approx(0, abs=0.01)
    assert own["APR"] == result["real"]["APR"] and own["LPIPS"] is None and list(result["models"]) == ["SD+RL"]
    assert "'absent'" in result["missing"]["SD"]
    result = measured(fake_path=sets["real"], real_path="", prompts=(CAPTIONS[8], CAPTIONS[3]))
    assert result["models"]["SD+RL"]["images"] == 5 and result["models"]["SD+RL"]["FD_judge"] is None
    assert any(short_caption(CAPTIONS[3]) in line for line in result["warnings"])  # asked for, and without a folder
    assert "# Real" not in (tmp_path / "out" / "table2.md").read_text() and "real" not in result
    assert len((tmp_path / "out" / "metrics_log.jsonl").read_text().splitlines()) == 2
    assert "metric.real_path is empty" in str(result["missing"]) and "Table 3" in capsys.readouterr().out


def test_features_are_computed_once_and_again_when_an_image_changes_or_the_cache_is_damaged(measured, tmp_path, caplog):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 10}, seed=1)
    first = measured(fake_path=folder, real_path="")["models"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(before) == 4 * 3  # four networks (pixels, thumbnail, logits, features), chunks of 4
    assert measured(fake_path=folder, real_path="")["models"] == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == before
    for number, path in enumerate(before):
        stored = np.load(path)
        stored[0, 0] = np.nan
        np.save(path, stored if number % 4 == 0 else stored[:, 0])
        if number % 4 > 1:
            path.write_bytes(path.read_bytes()[:-20] if number % 2 else b"")
    assert measured(fake_path=folder, real_path="")["models"] == first
    assert caplog.text.count("is damaged") == len(before)
    image = folder / "images" / folder_name(CAPTIONS[0]) / "5.png"
    save_image(image, 1 - load_image(image))
    changed = measured(fake_path=folder, real_path="")["models"]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4 * 4  # one more chunk
    assert changed["SD+RL"]["folders"][0]["sha256"] != first["SD+RL"]["folders"][0]["sha256"]


def test_logs_with_paths_of_another_machine_belong_to_the_folder(measured, sets, tmp_path):
    """As the official eval.py writes them."""
    folder, entries = tmp_path / "copy", read_log(sets["sd"])
    shutil.copytree(sets["sd"], folder)
    for root in ("images/", "rl4med-out/samples/SD/", "/scratch/someone/samples/SD/"):
        write_log(folder, [entry | {"path_to_img": root + entry["path_to_img"]} for entry in entries])
        assert read_log(folder) == entries
    assert measured(fake_path=folder)["models"]["SD+RL"]["reward"] > 0


def test_models_of_different_prompts_are_compared_on_what_they_share(measured, tmp_path, caplog):
    first = write_samples(tmp_path / "first", {A: 6, B: 4}, seed=1)
    second = write_samples(tmp_path / "second", {B: 9, C: 5}, seed=2)
    result = measured(folders=f"SD={first},RL={second}", real_path="")
    (row,) = result["comparisons"]
    assert row["prompts"] == 1 and row["APR"]["n"] == 8  # four of B on each side
    assert row["from_APR"] == result["models"]["SD"]["APR_by_prompt"][B]
    assert row["to_APR"] - row["from_APR"] == pytest.approx(row["APR"]["value"])
    assert "RL has no images of 1 captions that others have" in caplog.text and "MEL plain" in caplog.text


def test_a_caption_without_images_is_named_for_one_model_and_any_folder(measured, sets, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 3, B: 4}, seed=7, drawn=88)
    place = folder / "images" / folder_name(A)
    for path in images_of(folder, A):
        path.unlink()
    for changes, disturb in (
        ({"real_path": folder, "fake_path": sets["sd"]}, lambda: None),
        ({"fake_path": folder}, (place / ".DS_Store").touch),
        ({"fake_path": folder}, lambda: shutil.rmtree(place)),  # the log still has its images
    ):
        disturb()
        warnings = measured(**{"real_path": ""} | changes)["warnings"]
        assert any(str(folder) in line and short_caption(A) in line for line in warnings), changes


def test_the_ceiling_has_the_models_mix_of_prompts(measured, tmp_path):
    real = write_samples(tmp_path / "real", {A: 60, B: 30}, seed=3)
    result = measured(fake_path=write_samples(tmp_path / "own", {A: 3, B: 9, C: 4}, seed=4), real_path=real)
    own, by_prompt = result["models"]["SD+RL"], result["real"]["APR_by_prompt"]
    assert own["ceiling"]["value"] == pytest.approx((3 * by_prompt[A] + 9 * by_prompt[B]) / 12)
    assert own["ceiling_share"] == 12 / 16


def test_folders_of_the_same_images_are_reported(measured, sets, tmp_path, caplog):
    twin = write_samples(tmp_path / "twin", {B: 4, A: 3, C: 2}, seed=1)
    for other in (f"{sets['sd']}/", twin):
        refused("of 'SD' hold the same images", measured, folders=f"SD={sets['sd']},SD={other}")
    (row,) = measured(folders=f"SD={sets['sd']},RL={twin}")["comparisons"]
    assert row["APR"]["value"] == 0 and "hold the same images" in caplog.text


def test_copies_and_near_copies_are_reported(measured, tmp_path, caplog):
    """Of ten samples one is a training image, one its JPEG, one mirrored and brighter, one an image of the real set."""
    train, real = (write_samples(tmp_path / name, {A: 20}, seed=n) for n, name in enumerate(("train", "real")))
    fake = write_samples(tmp_path / "fake", {A: 10}, seed=7)
    samples, known, held = images_of(fake, A), images_of(train, A), images_of(real, A)
    save_image(samples[0], load_image(known[3]))
    Image.open(known[4]).save(tmp_path / "x.jpg", quality=90)
    save_image(samples[1], load_image(tmp_path / "x.jpg"))
    save_image(samples[2], (load_image(known[5]) * 1.03).clamp(0, 1).flip(2))
    save_image(samples[3], load_image(held[6]))
    save_image(held[0], load_image(known[7]))  # a leak: it must not make the measure of near 0
    model = measured(fake_path=fake, real_path=real, train_path=train)["models"]["SD+RL"]
    about, block = model["folders"][0], model["memorisation"]["thumbnail"]
    assert about["copies_of_training_images"] == 1 and about["near_copies_of_training_images"] == 3
    assert about["copies_of_real_images"] == 1 and block["threshold"] > 0.003
    assert block["share_closer"]["value"] >= 0.3
    assert (tmp_path / "out" / "closest_judge_SD+RL.png").is_file()
    found = {Path(pair["path"]).name: Path(pair["train"]).name for pair in block["closest"][:3]}
    assert found == {s.name: k.name for s, k in zip(samples[:3], known[3:6], strict=True)}
    assert caplog.text.count("1 of 10 images") == 2
    assert "1 of 20 real images" in caplog.text and "3 of 10" in caplog.text


def test_training_images_behind_a_link_count_and_settings_of_real_images_may_lack_about(measured, tmp_path):
    write_samples(tmp_path / "elsewhere", {A: 5}, seed=1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "back").symlink_to(tmp_path / "train")
    save_image(tmp_path / "train" / "one.png", load_image(images_of(tmp_path / "elsewhere", A)[0]))
    assert measured(train_path=tmp_path / "train")["sets"]["train"]["images"] == 6
    (tmp_path / "elsewhere" / "settings.json").write_text('{"settings": {}}')
    assert title_of("real", list_samples(tmp_path / "elsewhere")) == "real"


def test_black_repeated_and_missing_images_are_reported(measured, tmp_path, caplog):
    folder = write_samples(tmp_path / "own", {A: 4, C: 2}, seed=1)
    first, *rest = images_of(folder, A)
    rest[0].write_bytes(first.read_bytes())
    Image.new("RGB", (64, 64)).save(rest[1])
    warnings = "\n".join(measured(fake_path=folder)["warnings"])
    expected = ["has no image of 1 generated captions, which count in APR", short_caption(C), "use 4 images per set"]
    expected += ["1 of 6 images is black", "1 of 6 images is identical to another one"]
    assert [text for text in expected if text in warnings] == expected


def test_bad_settings(measured, sets, judges, tmp_path):
    (tmp_path / "file").write_text("")
    places = {name: tmp_path / f"{name}.json" for name in ("nan", "no_n")}
    places["nan"].write_text('{"title": "Membership", "share": NaN}')
    places["no_n"].write_text('{"title": "M", "rows": [{"AUC": {"value": 1, "low": 1, "high": 1, "how": "exact"}}]}')
    places |= {"sd": sets["sd"], "judge": judges[6], "file": tmp_path / "file"}
    for overrides, message in (
        ({"fake_path": ""}, "metric.fake_path is empty; give"),
        ({"real_path": "absent"}, "'absent' is not a sample folder"),
        ({"train_path": "absent"}, "'absent' is not a folder with images"),
        ({"classifier": ""}, "metric.classifier is empty; give"),
        ({"batch_size": 0}, "metric.batch_size is 0"),
        ({"prompts": ("a cat",)}, r"holds no images of the prompts .'a cat'"),
        ({"fake_name": "SD", "compare_path": "{sd}"}, "are both 'SD'"),
        ({"fake_name": "real"}, "a model is named 'real'"),
        ({"folders": "SD"}, "'SD' in metric.folders='SD' is not NAME=PATH"),
        ({"folders": ","}, "metric.folders=',' names nothing"),
        ({"logs": " "}, "metric.logs=' ' names nothing"),
        ({"more_judges": ",,"}, "metric.more_judges=',,' names nothing"),
        ({"inception": "absent.pth"}, "metric.inception='absent.pth' does not exist"),
        ({"extractors": ("clip",)}, "extractors has 'clip'; allowed are inception, judge, dinov2_vits14"),
        ({"fid": "fast"}, "metric.fid is 'fast'; allowed are exact, compat"),
        ({"output": "{file}/deeper"}, "metric.output=.* cannot be written"),
        ({"cache_dir": "{file}"}, "metric.cache_dir=.* cannot be written"),
        ({"logs": "a={sd}"}, "in metric.logs holds no metrics.jsonl"),
        ({"logs": "a={sd},a={judge}"}, "metric.logs names several runs 'a'"),
        ({"compare_path": "{file}"}, "is not a sample folder"),
        ({"results": "absent.json"}, "metric.results names 'absent.json'"),
        ({"results": "{sd}/settings.json"}, "settings.json' is damaged .'title' is missing"),
        ({"results": "{nan}"}, "nan.json' is damaged .'share' is"),
        ({"results": "{no_n}"}, "no_n.json' is damaged .*'n' is missing"),
        ({"more_judges": "H4={judge}"}, "names a judge 'H4', which is taken"),
        ({"classifier": "{judge}"}, "h6.safetensors' has 6 heads .*metric.more_judges=NAME=FILE"),
    ):
        given = {key: x.format(**places) if isinstance(x, str) else x for key, x in overrides.items()}
        refused(message, measured, **given)
        assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def log(folder, **entry) -> None:
    write_log(folder, [{"prompt": A, "path_to_img": str(images_of(folder, A)[0].relative_to(folder))} | entry])


def test_faulty_folders_are_named_before_anything_is_computed(measured, tmp_path):
    for disturb, message in (
        (lambda f, a: Image.new("L", (64, 64)).save(a / "grey.png"), "grey.png' has mode L, not RGB; convert"),
        (lambda f, a: Image.new("RGB", (32, 32)).save(a / "small.png"), "small.png' is 32 x 32 px, most .* 64 x 64"),
        (lambda f, a: (a / "text.png").write_text("no image"), "text.png' cannot be read as an image; remove"),
        (lambda f, a: Image.open(a / "0.png").save(a / "0.jpg"), "0.jpg' .* share a name"),
        (lambda f, a: Image.open(a / "0.png").save(f / "images" / "loose.png"), "loose.png' is not read"),
        (lambda f, a: (f / "images" / "a_cat").mkdir(), "folder 'a_cat' is not named after one of the 32"),
        (lambda f, a: [path.unlink() for path in images_of(f, A)], "holds no images; .* give another"),
        (lambda f, a: log(f, reward="high"), "the reward 'high' is not a finite number"),
        (lambda f, a: write_log(f, [{"prompt": A}]), "path_to_img' is missing"),
        (lambda f, a: log(f, prompt=B), "is not its folder's"),
        (lambda f, a: (f / "settings.json").write_text('{"settings": {}, "about": []}'), "damaged .'about' is"),
    ):
        folder = write_samples(tmp_path / "own", {A: 3}, seed=1)
        disturb(folder, folder / "images" / folder_name(A))
        refused(message, measured, fake_path=folder, real_path="")
        shutil.rmtree(folder)
        assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def cut_last(folder, count):
    """Write a folder of images of A of which the last one is cut short; return both."""
    last = images_of(write_samples(folder, {A: count}, seed=1))[-1]
    last.write_bytes(last.read_bytes()[:600])
    return folder, last


def test_an_image_cut_short_is_named_and_what_came_before_is_kept(measured, tmp_path):
    folder, last = cut_last(tmp_path / "own", 12)
    refused(rf"{last.name}' cannot be read as an image", measured, fake_path=folder, real_path="")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2 * 4 and not (tmp_path / "out").exists()
    last.unlink()
    assert measured(fake_path=folder, real_path="")["models"]["SD+RL"]["images"] == 11


@pytest.mark.slow
def test_both_processes_end_together_when_one_meets_a_faulty_image(config_file, fields, tmp_path):
    folder, last = cut_last(tmp_path / "own", 9)
    given = options(config_file, **fields(fake_path=folder, compare_path="", real_path=""))
    result = run_script("metric.py", *given, processes=2)
    assert result.returncode != 0 and result.stderr.count(f"error: '{last}' cannot be read as an image") == 2
    assert "Connection closed" not in result.stderr


def test_a_network_that_gives_nan_names_the_image(measured, tmp_path):
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e")
    model.model.conv_stem.weight.data *= 1e38  # all are finite in the file, and overflow where they are used
    save_classifier(model, tmp_path / "nan.safetensors")
    said = "0.png': logits of classifier nan.safetensors, 32 px gives NaN or infinity"
    refused([said], measured, classifier=tmp_path / "nan.safetensors")

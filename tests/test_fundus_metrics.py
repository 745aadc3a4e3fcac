"""metric.py on fundus images: judges, image statistics, structure, tables, one and two processes, bad input."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fundus_sets import PROMPTS, images_of, write_fundus
from PIL import Image
from sample_sets import numbers, read, write_samples
from script_tools import options, succeed

from ddpo_pytorch.data.images import load_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import folder_name, read_log, write_log
from ddpo_pytorch.judges.policy import load_judges
from ddpo_pytorch.judges.selector import load_selector, save_selector
from ddpo_pytorch.metrics.image_statistics import FOV, LEGACY, fov_quality, inception_score, legacy_quality
from ddpo_pytorch.metrics.ssim import ssim
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "sample_sets", "fundus_sets"]


def table(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def measured(config_file, fundus_fields, run_main, tmp_path):
    """Function of overrides: metrics.json of the fundus sets."""

    def run(**overrides) -> dict:
        run_main("metric.py", config_file, **fundus_fields(**overrides))
        return read(tmp_path / "out")

    return run


def by_hand(judges: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, list[str], float]:
    """Selector and Policy scores, captions of a folder's images in path order, and the threshold."""
    selector, policy = load_judges(judges)
    paths = images_of(folder)
    captions = {entry["path_to_img"]: entry["prompt"] for entry in read_log(folder)}
    texts = [captions[str(path.relative_to(folder))] for path in paths]
    pictures = [load_image(path)[None] for path in paths]
    scores = [float(selector.score(picture)) for picture in pictures]
    values = [float(policy.score(picture, [text])) for picture, text in zip(pictures, texts, strict=True)]
    return np.array(scores), np.array(values), texts, selector.threshold


# Scored one by one and in batches, images have sharpened float32 scores that differ by about 1e-6, more on some
# processors than on others; an image more or less in a mean of ten would be 1e-2.
FLOAT32 = 1e-5


def test_the_judges_numbers_by_hand(measured, fundus_sets, fundus_judges, tmp_path):
    result = measured()
    assert result["kind"] == "fundus" and list(result["judges"]) == ["selector", "policy"]
    aligned = {}
    for name, model in (("base", "base"), ("better", "better"), ("real", None)):
        block = (result["models"][model] if model else result["real"])["alignment"]["fundus"]
        scores, values, texts, threshold = by_hand(fundus_judges, fundus_sets[name])
        aligned[name] = np.where(scores >= threshold, values, 0)
        assert 0 < (scores >= threshold).sum() < len(scores)  # the test could fail
        assert block["selector"]["value"] == pytest.approx(scores.mean(), abs=FLOAT32)
        assert block["pass_rate"]["value"] == pytest.approx((scores >= threshold).mean(), abs=1e-12)
        assert block["policy"]["value"] == pytest.approx(values.mean(), abs=FLOAT32)
        assert block["alignment"]["value"] == pytest.approx(aligned[name].mean(), abs=FLOAT32)
        assert block["alignment"]["low"] <= block["alignment"]["value"] <= block["alignment"]["high"]
        first = np.array([text == PROMPTS[0] for text in texts])
        assert block["by_prompt"][PROMPTS[0]]["value"] == pytest.approx(aligned[name][first].mean(), abs=FLOAT32)
    assert result["models"]["better"]["fundus_alignment"] == pytest.approx(aligned["better"].mean(), abs=FLOAT32)
    (row,) = result["comparisons"]
    assert row["paired"] and row["pairs"] == 10 and "sign flips of the pairs' differences" in row["test"]
    difference = aligned["better"].mean() - aligned["base"].mean()
    assert row["alignment"]["value"] == pytest.approx(difference, abs=FLOAT32) and row["p"] is not None
    lines = table(tmp_path / "out" / "per_image.csv")
    own = {line["path"]: line for line in lines if line["model"] == "base"}
    for path, value in zip(images_of(fundus_sets["base"]), aligned["base"], strict=True):
        line = own[str(path.relative_to(fundus_sets["base"]))]
        assert float(line["alignment"]) == pytest.approx(value, abs=FLOAT32) and line["caption"] in PROMPTS
    log = json.loads((tmp_path / "out" / "metrics_log.jsonl").read_text())["metrics"]
    assert log["fundus_alignment"] == result["models"]["better"]["fundus_alignment"]


def test_the_policys_scores_depend_on_the_prompt_and_are_kept_by_it(measured, fundus_sets, tmp_path):
    """The same files under another prompt: nothing of the Selector is computed again, all of the Policy is."""
    before = measured(compare_path="", real_path="")
    kept = set((tmp_path / "cache").rglob("*.npy"))
    other = tmp_path / "other"
    shutil.copytree(fundus_sets["better"], other)
    names = {folder_name(p): folder_name(f"{p} Again.") for p in PROMPTS}
    for old, new in names.items():
        (other / "images" / old).rename(other / "images" / new)
    log = [
        entry | {"prompt": f"{entry['prompt']} Again.", "path_to_img": entry["path_to_img"].replace(*pair)}
        for entry in read_log(other)
        for pair in names.items()
        if pair[0] in entry["path_to_img"]
    ]
    write_log(other, log)
    after = measured(compare_path="", real_path="", fake_path=other)
    new = {path.parent.name for path in set((tmp_path / "cache").rglob("*.npy")) - kept}
    assert len(new) == 2  # the Policy's, and MS-SSIM's, whose pairs depend on the names
    pair = [result["models"]["better"]["alignment"]["fundus"] for result in (before, after)]
    assert pair[0]["selector"]["value"] == pair[1]["selector"]["value"]
    assert pair[0]["policy"]["value"] != pair[1]["policy"]["value"]


def test_image_statistics_stand_in_table_1_with_their_distance_to_the_real_set(measured, fundus_sets, tmp_path):
    result = measured()
    for name, columns, function in (("legacy", LEGACY, legacy_quality), ("fov", FOV, fov_quality)):
        found = {
            side: np.array([function((load_image(p) * 255).round().byte().permute(1, 2, 0).numpy()) for p in images])
            for side, images in ((s, images_of(fundus_sets[s])) for s in ("real", "better"))
        }
        block = result["models"]["better"]["quality"][name]
        assert (block["images"], block["no_field"]) == (10, 0)
        for number, statistic in enumerate(columns):
            own, real = found["better"][:, number], found["real"][:, number]
            one = block["statistics"][statistic]
            assert one["mean"]["value"] == pytest.approx(own.mean(), rel=1e-9)
            assert one["difference"]["value"] == pytest.approx(own.mean() - real.mean(), rel=1e-9)
            assert one["standardised"]["value"] == pytest.approx((own.mean() - real.mean()) / real.std(ddof=1))
            assert one["sd"] == pytest.approx(own.std(ddof=1)) and one["wasserstein"] > 0
            theirs = result["real"]["quality"][name]["statistics"][statistic]
            assert theirs["mean"]["value"] == pytest.approx(real.mean()) and "difference" not in theirs
    noise = [
        result["models"][name]["quality"]["fov"]["statistics"]["SNR"]["mean"]["value"] for name in ("base", "better")
    ]
    assert noise[1] < 0.6 * noise[0]  # "better" was drawn with three times the noise
    rows = table(tmp_path / "out" / "table1.csv")
    assert [row["at 64 x 64 px"] for row in rows] == [f"legacy: {n}" for n in LEGACY] + [f"fov: {n}" for n in FOV]
    assert rows[0]["n real images"] == "13" and rows[0]["n better"] == "10"
    assert all(one["sha256"] == "" for name, one in result["networks"].items() if name.startswith("quality"))
    value = result["models"]["base"]["quality"]["legacy"]["statistics"]["SNR"]["difference"]["value"]
    assert rows[0]["base - real"].startswith(f"{value:.4f} [")
    assert {"table1.md", "table1.tex", "fundus.md", "fundus.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob("table[23]*"))
    line = next(one for one in table(tmp_path / "out" / "per_image.csv") if one["model"] == "better")
    assert float(line["fov Entropy"]) > 0 and float(line["legacy Contrast"]) > 0


def test_images_without_a_field_are_counted_and_left_out(measured, tmp_path):
    folder = write_fundus(tmp_path / "own", {PROMPTS[0]: 4}, 5)
    first = images_of(folder)[0]
    Image.new("RGB", (64, 64)).save(first)
    block = measured(fake_path=folder, compare_path="")["models"]["better"]["quality"]
    assert (block["fov"]["images"], block["fov"]["no_field"]) == (3, 1)
    assert (block["legacy"]["images"], block["legacy"]["no_field"]) == (4, 0)
    assert block["fov"]["statistics"]["SNR"]["mean"]["n"] == 3
    lines = [line for line in table(tmp_path / "out" / "per_image.csv") if line["model"] == "better"]
    assert [line["fov SNR"] == "" for line in lines] == [True, False, False, False]


def test_ssim_is_of_pairs_by_name_and_of_no_others(measured, fundus_sets, tmp_path):
    result = measured(pairs_path=fundus_sets["base"], compare_path="", real_path="")
    pairs = zip(images_of(fundus_sets["better"]), images_of(fundus_sets["base"]), strict=True)
    expected = np.mean([float(ssim(load_image(a)[None], load_image(b)[None])) for a, b in pairs])
    assert result["models"]["better"]["structure"]["SSIM"]["value"] == pytest.approx(expected)
    lonely = write_fundus(tmp_path / "lonely", {PROMPTS[2] + " Or not.": 2}, 5)
    with pytest.raises(UserError, match="lonely' has no image named as a generated one"):
        measured(pairs_path=lonely, compare_path="", real_path="")
    assert "SSIM" not in measured(compare_path="", real_path="")["models"]["better"]["structure"]


def test_ms_ssim_falls_when_images_differ_more(measured, tmp_path):
    similar = write_fundus(tmp_path / "similar", {PROMPTS[0]: 4, PROMPTS[1]: 2}, 5)
    for path in images_of(similar)[1:]:
        shutil.copy(images_of(similar)[0], path)
    blocks = measured(fake_path=similar, real_path="")["models"]
    one = blocks["better"]["structure"]["MS_SSIM"]
    assert one["value"] == one["low"] == one["high"] == pytest.approx(1)
    assert blocks["base"]["structure"]["MS_SSIM"]["value"] < 0.9
    assert blocks["base"]["structure"]["MS_SSIM_within"]["n"] == 5 + 4  # a prompt of one image has no pair


@pytest.mark.slow
def test_the_inception_score_of_random_weights(measured, random_inception, tmp_path):
    """Too little to mean something, enough to be taken from the right layer."""
    path, network = random_inception
    folder = write_fundus(tmp_path / "own", {PROMPTS[0]: 3}, 5)
    model = measured(inception=path, fake_path=folder, compare_path="", real_path="")["models"]["better"]
    pictures = torch.stack([load_image(p) for p in images_of(folder)])
    with torch.no_grad():
        logits = network.fc(network((pictures * 255).round().byte())[0]) - network.fc.bias
    assert model["inception_score"]["IS"]["value"] == pytest.approx(inception_score(logits.numpy(), 1)[0], rel=1e-4)
    assert model["inception_score"]["IS"]["value"] >= 1 and model["inception_score"]["parts"] == 1


@pytest.mark.slow
def test_fundus_metrics_of_one_and_two_processes(config_file, fundus_fields, measured, tmp_path):
    """In this process, and by the script in two: 13 + 10 + 10 images in batches of 4, separate caches."""
    train = write_fundus(tmp_path / "train", {PROMPTS[0]: 9}, 11)
    one, two = (
        {"output": tmp_path / n, "cache_dir": tmp_path / f"cache {n}", "train_path": train} for n in ("out", "two")
    )
    measured(**one)
    fields = fundus_fields(**two)
    run = succeed("metric.py", *options(config_file, **fields), "--report", processes=2)
    first, second = read(tmp_path / "out"), read(tmp_path / "two")
    ours, theirs = (numbers({"models": r["models"], "real": r["real"]}) for r in (first, second))
    assert ours.keys() == theirs.keys() and len(ours) > 300
    assert theirs == ours  # to the bit
    assert first["models"]["better"]["fidelity"]["judge"]["matched"]["KID"]["value"] is not None
    assert "Table 1" in run.stdout and "Fundus images" in run.stdout and "Table 2" not in run.stdout
    page = re.sub(r'"data:image[^"]*"', "", (tmp_path / "two" / "report.html").read_text())
    for absent in ("ISIC", "dermoscop", "lesion", "APR", "artifact", "None", ">nan"):
        assert absent not in page, absent
    for present in ("fundus", "ODIR-5K", "Table 1", "Pass rate", "Kernel distance", PROMPTS[0]):
        assert present in page, present


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier": "x"}, "metric.classifier='x' and metric.judges=.* are both given"),
        ({"judges": ""}, "metric.classifier is empty; give the H=4 judge.*metric.judges=DIR"),
        ({"judges": "absent"}, "selector 'absent/selector.safetensors' does not exist"),
        ({"more_judges": "H6=x"}, "metric.more_judges='H6=x' and metric.judges=.* are both given"),
        ({"quality": ("fine",)}, "metric.quality has 'fine'; allowed are legacy, fov"),
        ({"prompts": ("a cat",)}, "holds no images of the prompts"),
        ({"prompts": (PROMPTS[0], "a cat")}, "no folder has images of 'a cat' in metric.prompts"),
    ],
)
def test_bad_settings(overrides, message, measured, tmp_path):
    with pytest.raises(UserError, match=message):
        measured(**overrides)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_tell_their_captions(measured, judges, fundus_sets, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(fundus_sets["base"], folder)
    (folder / "image_log.json").unlink()
    with pytest.raises(
        UserError, match="is not named after one of the 32 ISIC captions .*, nor after a prompt of image"
    ):
        measured(fake_path=folder)
    with pytest.raises(UserError, match="metric.classifier judges the 32 ISIC captions, and a folder has 'Fundus: The"):
        measured(classifier=judges[4], judges="")
    both = write_samples(tmp_path / "isic", {CAPTIONS[0]: 2}, seed=1)
    result = measured(fake_path=both, compare_path="", real_path="", quality=())  # any caption has a Policy score
    assert list(result["models"]["better"]["images_by_prompt"].values())[0] == 2


def test_a_selector_without_a_threshold_is_refused(measured, fundus_judges, tmp_path):
    shutil.copytree(fundus_judges, tmp_path / "judges")
    selector = load_selector(tmp_path / "judges" / "selector.safetensors")
    selector.threshold = None
    save_selector(selector, tmp_path / "judges" / "selector.safetensors")
    with pytest.raises(UserError, match="has no threshold; train_rlhf.py sets it"):
        measured(judges=tmp_path / "judges")

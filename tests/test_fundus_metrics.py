"""metric.py on fundus images: judges, image statistics, structure, tables, bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from sample_sets import PROMPTS, images_of, metric_fields, read, write_fundus, write_samples
from script_tools import read_table, run_in_process

from ddpo_pytorch.data.images import load_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import read_log
from ddpo_pytorch.judges.policy import load_judges
from ddpo_pytorch.judges.selector import load_selector, save_selector
from ddpo_pytorch.metrics.image_statistics import FOV, LEGACY, fov_quality, inception_score, legacy_quality
from ddpo_pytorch.metrics.ssim import ssim
from ddpo_pytorch.report.page import write_report


@pytest.fixture
def measured(measured, fundus_usual):
    """Function of overrides: metrics.json of the fundus sets."""
    return lambda **overrides: measured(**fundus_usual | overrides)


@pytest.fixture(scope="module")
def both(config_file, fundus_usual, tmp_path_factory):
    """Return the measurement of the fundus sets, and its folder."""
    folder = tmp_path_factory.mktemp("both")
    given = {"output": folder / "out", "cache_dir": folder / "cache", "alexnet": "", "inception": ""} | fundus_usual
    run_in_process("metric.py", config_file, **metric_fields(given))
    return read(folder / "out"), folder / "out"


# Scored one by one and in batches, images have sharpened float32 scores that differ by about 1e-6, more on some
# processors than on others; an image more or less in a mean of ten would be 1e-2.
FLOAT32 = 1e-5


def test_the_judges_numbers_by_hand(both, fundus_sets, fundus_judges):
    (result, folder), (selector, policy) = both, load_judges(fundus_judges)
    assert list(result["models"]) == ["base", "better"]
    assert result["kind"] == "fundus" and list(result["judges"]) == ["selector", "policy"]
    aligned = {}
    for name, measured in (*result["models"].items(), ("real", result["real"])):
        block = measured["alignment"]["fundus"]
        captions = {entry["path_to_img"]: entry["prompt"] for entry in read_log(fundus_sets[name])}
        paths = images_of(fundus_sets[name])
        texts = [captions[str(path.relative_to(fundus_sets[name]))] for path in paths]
        images = [load_image(path)[None] for path in paths]
        scores = np.array([float(selector.score(image)) for image in images])
        values = np.array([float(policy.score(image, [text])) for image, text in zip(images, texts, strict=True)])
        passed = scores >= selector.threshold
        aligned[name] = np.where(passed, values, 0)
        assert 0 < passed.sum() < len(scores)  # the test could fail
        expected = {"selector": scores.mean(), "policy": values.mean(), "alignment": aligned[name].mean()}
        assert {key: block[key]["value"] for key in expected} == pytest.approx(expected, abs=FLOAT32)
        assert block["pass_rate"]["value"] == pytest.approx(passed.mean(), abs=1e-12)
        assert block["alignment"]["low"] <= block["alignment"]["value"] <= block["alignment"]["high"]
        first = np.array([text == PROMPTS[0] for text in texts])
        assert block["by_prompt"][PROMPTS[0]]["value"] == pytest.approx(aligned[name][first].mean(), abs=FLOAT32)
    assert result["models"]["better"]["fundus_alignment"] == pytest.approx(aligned["better"].mean(), abs=FLOAT32)
    (row,) = result["comparisons"]
    assert row["paired"] and row["pairs"] == 10 and "sign flips of the pairs' differences" in row["test"]
    difference = aligned["better"].mean() - aligned["base"].mean()
    assert row["alignment"]["value"] == pytest.approx(difference, abs=FLOAT32) and row["p"] is not None
    own = {line["path"]: line for line in read_table(folder / "per_image.csv") if line["model"] == "base"}
    for path, value in zip(images_of(fundus_sets["base"]), aligned["base"], strict=True):
        line = own[str(path.relative_to(fundus_sets["base"]))]
        assert float(line["alignment"]) == pytest.approx(value, abs=FLOAT32) and line["caption"] in PROMPTS
    log = json.loads((folder / "metrics_log.jsonl").read_text())["metrics"]
    assert log["fundus_alignment"] == result["models"]["better"]["fundus_alignment"]


def test_the_policys_scores_depend_on_the_prompt_and_are_kept_by_it(measured, tmp_path):
    """The same images under another prompt: nothing of the Selector is computed again, all of the Policy is."""
    folders = [write_fundus(tmp_path / f"own{end}", {p + end: 3 for p in PROMPTS[:2]}, 2) for end in ("", " Again.")]
    before = measured(compare_path="", real_path="", fake_path=folders[0])
    kept = set((tmp_path / "cache").rglob("*.npy"))
    after = measured(compare_path="", real_path="", fake_path=folders[1])
    new = {path.parent.name for path in set((tmp_path / "cache").rglob("*.npy")) - kept}
    assert len(new) == 2  # the Policy's, and MS-SSIM's, whose pairs depend on the names
    first, second = (result["models"]["better"]["alignment"]["fundus"] for result in (before, after))
    assert first["selector"]["value"] == second["selector"]["value"]
    assert first["policy"]["value"] != second["policy"]["value"]


def test_image_statistics_stand_in_table_1_with_their_distance_to_the_real_set(both, fundus_sets, tmp_path):
    result, output = both
    pixels = [[np.asarray(Image.open(path)) for path in images_of(fundus_sets[name])] for name in ("better", "real")]
    for name, columns, function in (("legacy", LEGACY, legacy_quality), ("fov", FOV, fov_quality)):
        own, real = (np.array(list(map(function, part))) for part in pixels)
        block = result["models"]["better"]["quality"][name]
        assert (block["images"], block["no_field"]) == (10, 0) and list(block["statistics"]) == list(columns)
        found = block["statistics"].values()
        difference = own.mean(0) - real.mean(0)
        assert [one["mean"]["value"] for one in found] == pytest.approx(own.mean(0), rel=1e-9)
        assert [one["sd"] for one in found] == pytest.approx(own.std(0, ddof=1))
        assert [one["difference"]["value"] for one in found] == pytest.approx(difference, rel=1e-9)
        assert [one["standardised"]["value"] for one in found] == pytest.approx(difference / real.std(0, ddof=1))
        theirs = result["real"]["quality"][name]["statistics"].values()
        assert [one["mean"]["value"] for one in theirs] == pytest.approx(real.mean(0))
    rows = read_table(output / "table1.csv")
    assert [row["at 64 x 64 px"] for row in rows] == [f"legacy: {n}" for n in LEGACY] + [f"fov: {n}" for n in FOV]
    assert rows[0]["n real images"] == "13" and rows[0]["n better"] == "10"
    assert {"table1.md", "table1.tex", "fundus.md", "fundus.csv"} <= {p.name for p in output.iterdir()}
    assert not list(output.glob("table[23]*"))
    page = write_report(tmp_path, result, {}, {}).read_text()
    absent = ("ISIC", "dermoscop", "lesion", "APR", "artifact", "None", ">nan")
    present = ("ODIR-5K", "Pass rate", "Kernel distance", "mean alignment of", "legacy: SNR", PROMPTS[0])
    assert [text for text in absent + present if text in page] == list(present)


def test_images_without_a_field_ssim_by_name_and_ms_ssim(measured, fundus_sets, tmp_path):
    folder = write_fundus(tmp_path / "own", {PROMPTS[0]: 4, PROMPTS[1]: 2}, 5)
    first, second, *others = images_of(folder)
    Image.new("RGB", (64, 64)).save(first)
    for path in others:  # nearly the same image, so MS-SSIM is high
        shutil.copy(second, path)
    models = measured(fake_path=folder, pairs_path=fundus_sets["base"], real_path="")["models"]
    block = models["better"]["quality"]
    assert (block["fov"]["images"], block["fov"]["no_field"]) == (5, 1)
    assert (block["legacy"]["images"], block["fov"]["statistics"]["SNR"]["mean"]["n"]) == (6, 5)
    lines = [line for line in read_table(tmp_path / "out" / "per_image.csv") if line["model"] == "better"]
    assert [line["fov SNR"] == "" for line in lines] == [True] + [False] * 5
    names = {path.relative_to(folder): path for path in images_of(folder)}
    pairs = [(load_image(names[name])[None], load_image(fundus_sets["base"] / name)[None]) for name in names]
    expected = np.mean([float(ssim(*pair)) for pair in pairs])
    assert models["better"]["structure"]["SSIM"]["value"] == pytest.approx(expected)
    assert models["better"]["structure"]["MS_SSIM"]["value"] > models["base"]["structure"]["MS_SSIM"]["value"]
    assert models["base"]["structure"]["MS_SSIM_within"]["n"] == 5 + 4  # a prompt of one image has no pair
    lonely = write_fundus(tmp_path / "lonely", {PROMPTS[2] + " Or not.": 2}, 5)
    refused("lonely' has no image named as a generated one", measured, pairs_path=lonely, compare_path="", real_path="")


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


def test_bad_settings(measured, tmp_path):
    for overrides, message in (
        ({"classifier": "x"}, "metric.classifier='x' and metric.judges=.* are both given"),
        ({"judges": "absent"}, "selector 'absent/selector.safetensors' does not exist"),
        ({"quality": ("fine",)}, "metric.quality is 'fine'; allowed are legacy, fov"),
        ({"prompts": (PROMPTS[0], "a cat")}, "no folder has images of 'a cat' in metric.prompts"),
    ):
        refused(message, measured, **overrides)
        assert not (tmp_path / "out").exists()


def test_folders_and_judges_of_the_other_kind(measured, judges, fundus_sets, fundus_judges, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(fundus_sets["base"], folder)
    (folder / "image_log.json").unlink()
    refused("is not named after one of the 32 ISIC captions .*, nor after a prompt of", measured, fake_path=folder)
    refused("the label 'hair' of 'Fundus: The left eye .*metric.judges", measured, classifier=judges[4], judges="")
    shutil.copytree(fundus_judges, tmp_path / "judges")
    selector = load_selector(tmp_path / "judges" / "selector.safetensors")
    selector.threshold = None
    save_selector(selector, tmp_path / "judges" / "selector.safetensors")
    refused("has no threshold; train_rlhf.py sets it", measured, judges=tmp_path / "judges")
    both = write_samples(tmp_path / "isic", {CAPTIONS[0]: 2}, seed=1)
    result = measured(fake_path=both, compare_path="", real_path="", quality=())  # any caption has a Policy score
    assert list(result["models"]["better"]["images_by_prompt"].values())[0] == 2

"""metric.py on plain folders with metadata.csv and a judge of other labels than ISIC's."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from refusals import refused
from sample_sets import read, write_samples

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.metadata import of_caption, read_metadata
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.metrics.sanity import CHANGES, HALF, halves
from ddpo_pytorch.metrics.subgroups import largest_gap
from ddpo_pytorch.metrics.tables import number
from ddpo_pytorch.report.findings import group_tables, sanity_table
from ddpo_pytorch.report.page import write_report

LABELS = ("bright", "striped")


def write_folder(folder, count: int, seed: int, **columns):
    """A folder of `count` images of each text, in a subfolder, and its metadata.csv with these other columns."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for place in range(4 * count):
        bright, striped = divmod(place % 4, 2)
        name, image = f"part/{seed}_{place}.png", 0.05 * torch.randn(3, 32, 32, generator=generator)
        image += 0.3 + 0.4 * bright
        image[:, ::4] -= 0.3 * striped
        save_image(folder / name, image.clamp(0, 1))
        text = f"an image, {'bright' if bright else 'dark'} and {'striped' if striped else 'plain'}"
        rows.append({"file_name": name, "text": text, "bright": bright, "striped": striped})
    pd.DataFrame(rows).assign(**columns).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """Real and generated folders, and a judge that is wrong about every fifth generated image."""
    folder = tmp_path_factory.mktemp("plain")
    sites = {"site": ["a", "b", "b", "b"] * 6, "age": range(24)}
    made = {"real": write_folder(folder / "real", 6, 1, **sites), "fake": write_folder(folder / "fake", 6, 2, **sites)}
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS, 32, "test_vit").eval()
    table = pd.read_csv(made["fake"] / "metadata.csv")
    seen = torch.tensor(table[list(LABELS)].to_numpy()).double() * 2 - 1
    seen[::5, 0] *= -1
    features = model.features(torch.stack([load_image(made["fake"] / name) for name in table.file_name])).double()
    model.model.head.weight.data = torch.linalg.lstsq(features, seen, driver="gelsd").solution.T.float()
    model.model.head.bias.data.zero_()
    save_classifier(model, folder / "judge.safetensors")
    return made | {"judge": folder / "judge.safetensors"}


@pytest.fixture
def measure(measured, plain):
    usual = {"real_path": plain["real"], "fake_path": plain["fake"], "classifier": plain["judge"]}
    return lambda **overrides: measured(**usual | overrides)


def test_alignment_is_with_the_labels_of_the_table(measure, plain, tmp_path):
    """Also of a folder without a table, by caption, and with a condition that holds."""
    table, judge = pd.read_csv(plain["fake"] / "metadata.csv"), load_classifier(plain["judge"])
    images = torch.stack([load_image(plain["fake"] / name) for name in table.file_name])
    right = (judge.predict(images).numpy() == table[list(LABELS)].to_numpy()).all(axis=1)
    result = measure()
    model = result["models"]["SD+RL"]
    assert 0 < right.sum() < 24 and model["APR"] == pytest.approx(right.mean())
    assert model["label_accuracy"].keys() == set(LABELS) and list(result["judges"]) == ["H2"]
    assert not (tmp_path / "out" / "table2.md").exists() and (tmp_path / "out" / "table3.md").exists()
    drawn = write_samples(tmp_path / "drawn", {table.text[1]: 6}, seed=3, size=32)
    assert measure(fake_path=drawn)["models"]["SD+RL"]["images"] == 6
    refused("APR.value of SD.RL is 0.7917", measure, fail_if=["APR>2", f"alignment.H2.APR.value<{right.mean() + 0.01}"])
    assert read(tmp_path / "out")["models"]["SD+RL"]["APR"] == model["APR"]  # written all the same
    for given, message in (("FID>1", "no number 'FID' for SD.RL"), ("APR", "is not a condition")):
        refused(message, measure, fail_if=[given])


def test_columns_follow_from_the_caption_if_they_never_differ_and_faulty_ones_are_named(measure, tmp_path):
    (tmp_path / "t.csv").write_text("file_name,text,hard,age\na.png,x,1,3\nb.png,x,1,4\nc.png,y,0,5\n")
    assert of_caption(read_metadata(tmp_path / "t.csv")) == {"x": {"hard": "1"}, "y": {"hard": "0"}}
    folder = write_folder(tmp_path / "own", 1, 1)
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    faults = [("file_name", "../a.png", "leads out of the folder"), ("text", "", "the text is empty")]
    faults += [("file_name", "none.png", "names 1 images that are absent, first '.*none.png'")]
    for column, cell, message in *faults, ("bright", "yes", "the label 'bright' of 'part/1_0.png' is 'yes'"):
        cells = table[column].mask(table.index == 0, cell)
        table.assign(**{column: cells}).to_csv(folder / "metadata.csv", index=False)
        refused(message, measure, fake_path=folder)
        assert not (tmp_path / "out").exists()


def test_groups_have_their_own_numbers_and_gaps(measure, plain, tmp_path):
    """In several folders, they are those of all their images: each fourth one is of site a, or each second one."""
    result = measure(groups=("site", "age"), train_path=write_folder(tmp_path / "train", 3, 9))
    block, table = result["models"]["SD+RL"]["groups"], pd.read_csv(tmp_path / "out" / "per_image.csv")
    table = table[table.model == "SD+RL"].sort_values("path", key=lambda p: p.str.extract(r"_(\d+)\.")[0].astype(int))
    means = table.groupby(["a", "b", "b", "b"] * 6).aligned.mean()
    sites, gaps, bands = block["site"]["groups"], block["site"]["gaps"], block["age"]["groups"]
    assert [sites[name]["n"] for name in "ab"] == [6, 18]
    assert [sites[name]["aligned"]["value"] for name in "ab"] == pytest.approx(means.tolist())
    assert gaps["aligned"]["gap"]["value"] == pytest.approx(abs(means["a"] - means["b"]))
    assert 0 < gaps["aligned"]["p"] <= 1
    assert sites["b"]["KID"]["low"] is not None and gaps["KID"]["gap"]["value"] >= 0
    assert list(bands) == ["11.5 to 17.25", "17.25 and above", "5.75 to 11.5", "below 5.75"]
    assert {one["n"] for one in bands.values()} == {6} and 0 <= bands["below 5.75"]["closer"]["value"] <= 1
    assert set(block["age"]["gaps"]) == {"aligned", "closer", "KID"}
    frames = group_tables(result)
    assert frames["site"].loc["a", "n SD+RL"] == "6" and "Largest gap" in frames["age"].index
    refused("metric.groups has 'sex'; columns of metadata.csv are age, bright", measure, groups=("sex",))

    other = write_folder(plain["fake"].parent / "other", 6, 3, site=["a", "b"] * 12, age=range(24))
    result = measure(groups=("site",), folders=f"M={plain['fake']},M={other}")
    sites, gaps = (result["models"]["M"]["groups"]["site"][name] for name in ("groups", "gaps"))
    assert [sites[name]["n"] for name in "ab"] == [6 + 12, 18 + 12]
    for name in ("aligned", "KID"):
        gap = abs(sites["a"][name]["value"] - sites["b"][name]["value"])
        assert gaps[name]["gap"]["value"] == pytest.approx(gap)
    few = write_folder(plain["fake"].parent / "few", 1, 4, site=["a", "b", "b", "b"], age=range(4))
    table = pd.read_csv(few / "metadata.csv")
    table[:3].to_csv(few / "metadata.csv", index=False)
    groups = measure(groups=("site",), real_path=few)["models"]["SD+RL"]["groups"]["site"]["groups"]
    assert all("KID" not in block for block in groups.values())


def test_equal_names_in_subfolders_are_images_of_their_own(measure, plain, tmp_path):
    """Also below images/, and with a prompt that a folder lacks."""
    table, folder = pd.read_csv(plain["fake"] / "metadata.csv"), tmp_path / "own"
    places = [f"images/patient{number}/left.png" for number in range(len(table))]
    for name, place in zip(table.file_name, places, strict=True):
        save_image(folder / place, load_image(plain["fake"] / name))
    table.assign(file_name=places).to_csv(folder / "metadata.csv", index=False)
    result = measure(fake_path=folder, compare_path=folder, fake_name="B", sanity=True, real_path=folder)
    assert result["models"]["B"]["APR"] == measure()["models"]["SD+RL"]["APR"]
    assert result["models"]["SD"]["folders"][0]["sha256"] == result["models"]["B"]["folders"][0]["sha256"]
    assert result["sanity"]["models"]["blur"]["folders"][0]["identical_images"] == 0
    table.assign(file_name=places, text="an image, unknown").to_csv(folder / "metadata.csv", index=False)
    unknown = {"fake_path": folder, "prompts": ("an image, unknown",)}
    refused("real' holds no images of the prompts .'an image, unknown'", measure, **unknown)


def test_the_largest_gap_is_found_and_chance_is_told_apart():
    rng = np.random.default_rng(0)
    names = rng.choice(["x", "y", "z"], 300)
    values, alone = (rng.random(300) < np.where(names == "y", 0.8, 0.4)).astype(float), np.zeros(300)
    found = largest_gap(values, names, alone, 0)
    test = scipy.stats.f_oneway(*(values[names == name] for name in "xyz"))  # of the same hypothesis
    assert found["gap"].low < 0.4 < found["gap"].high and found["p"] < 0.01 > test.pvalue
    assert np.mean([largest_gap(rng.permutation(values), names, alone, s)["p"] < 0.1 for s in range(40)]) < 0.3
    assert largest_gap(values[:3], np.array(["x", "x", "y"]), np.zeros(3), 0)["gap"].value is None
    tied = largest_gap(np.ones(300), names, alone, 0)  # between two groups, of which each has the largest mean
    assert (tied["gap"].value, tied["p"]) == (0, 1) and tied["gap"].n == sum((names == x).sum() for x in "xz")


@pytest.mark.parametrize("broken", [False, True])
def test_a_gap_between_groups_of_whole_prompts_is_no_surer_than_their_prompts(broken):
    """Sixteen prompts of thirty images and no effect of the group: images alone would find one in two of five cases.

    Nor is it if one image has another group than those of its prompt.
    """
    prompts, found = np.repeat(np.arange(16), 30), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        values = (rng.random(480) < rng.beta(2, 2, 16)[prompts]).astype(float)
        names = np.where(rng.permutation(16) < 8, "x", "y")[prompts]
        if broken:
            names[0] = "y" if names[0] == "x" else "x"
        found.append(largest_gap(values, names, prompts, seed))
    assert np.mean([one["p"] < 0.1 for one in found]) < 0.25
    assert np.mean([one["gap"].low > 0 for one in found]) < 0.25 and "over prompts" in found[0]["gap"].how
    gap = largest_gap(values + (prompts % 2), np.where(prompts % 2, "x", "y"), prompts, 0)
    assert gap["gap"].low < 1 < gap["gap"].high and gap["p"] < 0.01
    within = np.where(rng.random(480) < 0.5, "x", "y")  # in each prompt
    gap = largest_gap(values + (within == "y"), within, prompts, 0)
    assert gap["gap"].low < 1 < gap["gap"].high and gap["p"] < 0.01
    few = largest_gap(values, np.where(prompts > 0, "x", "y"), prompts, 0)
    assert few["gap"].value > 0 and few["gap"].low is None and few["p"] >= 0.05  # any of 16 prompts could be that one


def test_degraded_real_images_are_noticed(measure, plain, tmp_path):
    """Each change moves what it should; copies and training images are exactly what they are said to be."""
    train = write_folder(tmp_path / "train", 5, 9)
    result = measure(sanity=True, train_path=train)
    models = result["sanity"]["models"]
    assert list(models) == [HALF, *CHANGES, "duplicates", "training images"] and result["sanity"]["missing"] == {}
    flaws = {name: model["folders"][0] for name, model in models.items()}
    assert {flaws[name]["images"] for name in models} == {12}
    assert [flaws[name]["identical_images"] for name in (HALF, "duplicates")] == [0, 4]
    assert [flaws[name]["copies_of_training_images"] for name in (HALF, "training images")] == [0, 12]
    assert models["training images"]["memorisation"]["judge"]["authenticity"]["value"] == 0
    distances = {name: model["fidelity"]["judge"]["matched"]["FID"]["value"] for name, model in models.items()}
    assert distances["blur"] > 1.2 * distances[HALF] and distances["training images"] > 0
    table, moves = sanity_table(result)
    assert "MMD, Gaussian (x 1000) (judge)" in table.index  # without an arrow
    assert table.loc["FID (judge)", HALF] == number(models[HALF]["fidelity"]["judge"]["matched"]["FID"], ".4g")
    base, now = (models[name]["alignment"]["H2"]["APR"] for name in (HALF, "blur"))
    expected = 2 * (now["value"] - base["value"]) / (base["high"] - base["low"])
    assert moves.loc["APR (%)", "blur"] == pytest.approx(expected)
    assert (tmp_path / "out" / "sanity.csv").is_file() and (moves[HALF] == 0).all()
    page = write_report(tmp_path, result, {}, {}).read_text()
    assert "What these metrics detect" in page and page.count("data:image/svg") == 1
    refused("metric.real_path is empty", measure, sanity=True, real_path="")
    table = pd.read_csv(train / "metadata.csv")
    table[table.index % 4 != 3].to_csv(train / "metadata.csv", index=False)  # without one of the four captions
    result = measure(sanity=True, train_path=train)
    assert "training images" not in result["sanity"]["models"] and "9 of 12" in str(result["sanity"]["missing"])
    assert result["sanity"]["models"][HALF] == models[HALF]


def test_halves_share_no_image_and_hold_equally_many_of_each_prompt():
    groups = np.array([0, 1, 0, 0, 2, 1, 1, 0, 1])
    first, second = halves(groups, 3)
    assert not set(first) & set(second) and groups[first].tolist().count(0) == 2
    assert sorted(groups[first]) == sorted(groups[second]) == [0, 0, 1, 1]


@pytest.mark.slow
def test_a_judge_of_any_labels_and_architecture_is_trained(tmp_path, run_flags):
    every, val = write_folder(tmp_path / "all", 40, 5), write_folder(tmp_path / "val", 6, 6) / "metadata.csv"
    for path in (val.parent / "part").iterdir():
        path.rename(every / "part" / path.name)
    options = ["train_isic_classifier.py", f"--data_path={every}", "--labels=bright,striped", "--arch=test_vit"]
    options += [f"--train_csv={every / 'metadata.csv'}", f"--val_csv={val}", "--weights=none", "--image_size=32"]
    options += ["--num_epochs=8", "--learning_rate=0.01", f"--checkpoint_dir={tmp_path / 'judge'}"]
    run_flags(*options)
    judge, table = load_classifier(tmp_path / "judge" / "classifier_H2.safetensors"), pd.read_csv(val)
    seen = judge.predict(torch.stack([load_image(every / name) for name in table.file_name]))
    assert (seen[:, 0].numpy() == table.bright).mean() > 0.9
    run_flags(*options, "--mode=test", f"--test_csv={val}")
    assert {row["what"] for row in json.loads((tmp_path / "judge" / "test_H2.json").read_text())} >= set(LABELS)
    refused("share 24 images", run_flags, *options, f"--train_csv={val}", "--checkpoint_dir=other")

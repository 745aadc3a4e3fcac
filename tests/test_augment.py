"""Table 4: the synthetic images that are drawn, measures against independent loops, and the tables."""

import csv
import itertools

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_f1_score

from ddpo_pytorch.augmentation import plan as planning
from ddpo_pytorch.augmentation.report import MACRO, MEASURES, as_csv, compare, markdown, subgroups
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.utils.errors import UserError

NAMES = ("hair", "ink")


def test_wanted_images_of_a_ratio_and_balanced():
    real = {CAPTIONS[0]: 10, CAPTIONS[1]: 3, CAPTIONS[2]: 0, CAPTIONS[3]: 1}
    assert planning.wanted_images(real, 0.5) == {CAPTIONS[0]: 5, CAPTIONS[1]: 2, CAPTIONS[3]: 1}  # halves go up
    assert planning.wanted_images(real, 2.0) == {CAPTIONS[0]: 20, CAPTIONS[1]: 6, CAPTIONS[3]: 2}
    assert planning.wanted_images(real, "balanced") == {CAPTIONS[0]: 0, CAPTIONS[1]: 7, CAPTIONS[3]: 9}


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


def test_plan_names_and_folders():
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
        with pytest.raises(UserError, match=r"--samples=X=\.\.\.: ratio .* takes none of its 1 images"):
            planning.plan(real, {"X": [other]}, [ratio], (0,))


def test_unusable_flags_are_refused_by_name():
    given = {"ratios": ("", "-1", "nan", "1,,2", "much", "1,1.0", "balanced,balanced")}
    given |= {"seeds": ("", "1,1", "1,01", "-1", "1.5", "a")}
    given |= {"samples": (["folder"], ["SD="], ["a/b=c"], [".a=c"], ["A=x", "a=y"], ["Real=x"], ["test=x"], [])}
    for flag, values in given.items():
        for value in values:
            with pytest.raises(UserError, match=f"--{flag}="):
                getattr(planning, f"parse_{flag}")(value)


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
        table = np.array(
            [[[reference(one[drawn, h], truth[drawn, h]) for h in range(2)] for one in own] for own in logits.values()]
        )
        return np.concatenate([table, table.mean(2, keepdims=True)], 2)

    point, rng, differences = measures(keep), np.random.default_rng(0), []
    for _ in range(100):  # images are drawn first, and those that count are taken from them
        drawn = rng.integers(150, size=150)
        means = measures(drawn[np.isin(drawn, keep)]).mean(1)
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
    about = {"seeds": (4,), "minority_share": 0.02, "test_images": 150, "subgroups": groups}
    text = markdown(rows, about)
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

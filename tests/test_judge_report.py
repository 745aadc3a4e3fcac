"""The classifier's report: every number against an independent reference, undefined ones, files."""

import json

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.special import expit
from scipy.stats import mannwhitneyu
from script_tools import read_table
from torchmetrics.functional import classification as reference

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier_report import COLUMNS, MEASURES, Report, best_thresholds, check_both_classes


def sample(images=200, heads=6, seed=0):
    """Logits rounded to one decimal, so that many are equal, and labels that they predict better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.random((images, heads)) < 0.3
    logits = np.round(rng.normal(size=(images, heads)) + np.where(labels, 1.0, -1.0), 1)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)


def mann_whitney_auc(positive, negative):
    return mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))


def test_measures_equal_independent_ones():
    logits, labels = sample()
    rows = Report(logits, labels, LABELS, resamples=20).attributes
    for index, row in enumerate(rows):
        scores, truth = logits[:, index], labels[:, index].int()
        assert row["auc"] == pytest.approx(mann_whitney_auc(scores[truth == 1], scores[truth == 0]), abs=1e-12)
        probabilities = torch.sigmoid(scores.double())
        named = {name: name for name in ("accuracy", "average_precision", "precision", "recall", "specificity")}
        named |= {"auc": "auroc", "f1": "f1_score"}
        references = {name: getattr(reference, f"binary_{named[name]}")(probabilities, truth) for name in named}
        references["ece"] = reference.binary_calibration_error(probabilities, truth, n_bins=15, norm="l1")
        references["prevalence"] = truth.double().mean()
        assert references.keys() == set(MEASURES)
        for name, value in references.items():
            assert row[name] == pytest.approx(value.item(), abs=1e-6), name
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] or name == "ece"  # see below
        assert row["support"] == truth.sum() and row["what"] == LABELS[index]
        assert sum(row[count] for count in ("tp", "fp", "fn", "tn")) == len(truth)


def test_the_interval_of_a_calibration_error_covers_it():
    """Logits are twice as large as they should be. The quantiles of resampled images covered it in none of 40 sets."""
    rng, found = np.random.default_rng(0), []
    truth = np.mean([abs(expit(2 * x) - expit(x)) for x in rng.normal(-2, 1, 100_000)])
    for seed in range(40):
        logits = rng.normal(-2, 1, 300)
        labels = torch.tensor(rng.random(300) < expit(logits)).float()[:, None]
        (row,) = Report(torch.tensor(2 * logits)[:, None], labels, ("hair",), resamples=200, seed=seed).attributes
        found.append(row["ece_low"] <= truth <= row["ece_high"])
    assert np.mean(found) > 0.8


def test_intervals_are_those_of_resampled_images():
    logits, labels = sample(300, 1)
    row = Report(logits, labels, ("hair",), resamples=1000, seed=3).attributes[0]
    assert row == Report(logits, labels, ("hair",), resamples=1000, seed=3).attributes[0]
    # an independent bootstrap of the AUC, one resample after the other.
    rng, values = np.random.default_rng(0), []
    scores, truth = logits[:, 0].numpy(), labels[:, 0].numpy() > 0
    for _ in range(400):
        drawn = rng.integers(300, size=300)
        values.append(mann_whitney_auc(scores[drawn][truth[drawn]], scores[drawn][~truth[drawn]]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert (row["auc_low"], row["auc_high"]) == pytest.approx((low, high), abs=0.01)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_is_undefined_is_none_and_empty(tmp_path, caplog):
    for broken in (float("nan"), float("inf")):
        refused("not finite", Report, torch.tensor([[broken]]), torch.tensor([[1.0]]), ("hair",))
    logits = torch.tensor([[-1.0, 2, 1e4], [-2, 1, -1e4], [-3, 1, 3]])
    labels = torch.tensor([[0.0, 1, 1], [0, 1, 0], [0, 1, 1]])
    report = Report(logits, labels, LABELS[:3])
    hair, gel, ruler = report.attributes
    assert [hair[key] for key in ("auc", "average_precision", "precision", "recall", "f1")] == [None] * 5
    assert hair["accuracy"] == hair["specificity"] == 1 and hair["auc_low"] is None
    assert gel["auc"] is None and gel["specificity"] is None and gel["f1"] == gel["average_precision"] == 1
    assert ruler["auc"] == ruler["auc_low"] == 1  # resamples of one class are left out
    check_both_classes(labels, LABELS[:3], "t.csv", training=False)
    absent = ("positive of 'hair'", "negative of 'gel_bubble'")
    assert [f"'t.csv' has no {one} among its 3 images; its AUC is undefined" for one in absent] == caplog.messages
    said = "no positive of 'hair'.*training needs both"
    refused(said, check_both_classes, labels, LABELS[:3], "t.csv", training=True)
    found = {row["what"]: (row["support"], row["recall"], row["auc"]) for row in report.combinations}
    assert found == {"exactly gel_bubble": (1, 1, None), "exactly gel_bubble+ruler": (2, 1, None)}
    report.write(tmp_path / "deep" / "test_H3")
    table = read_table(tmp_path / "deep" / "test_H3.csv")
    assert table[0]["auc"] == "" and float(table[0]["accuracy"]) == 1 and tuple(table[0]) == COLUMNS
    assert json.loads((tmp_path / "deep" / "test_H3.json").read_text()) == report.rows
    assert next(line for line in report.table().splitlines() if line.startswith("auc")).split()[1:3] == ["-", "[-,"]


def test_thresholds_of_best_f1():
    logits, labels = sample(150, 2)
    thresholds = best_thresholds(logits, labels, LABELS[:2])
    for index, row in enumerate(Report(logits, labels, LABELS[:2], thresholds, resamples=1).attributes):
        probabilities, truth = torch.sigmoid(logits[:, index].double()), labels[:, index].int()
        best = max(reference.binary_f1_score(probabilities, truth, threshold=t) for t in [0.0, *probabilities.tolist()])
        assert row["f1"] == pytest.approx(best.item(), abs=1e-6) and row["threshold"] == thresholds[row["what"]]
    # separable: half-way; nothing to separate: everything is claimed; no positive: 0.5.
    logits = torch.logit(torch.tensor([[0.2, 0.4, 0.9], [0.6, 0.8, 0.9]], dtype=torch.float64))
    found = best_thresholds(logits, torch.tensor([[0.0, 1, 0], [1, 1, 0]]), LABELS[:3])
    assert found == pytest.approx({"hair": 0.4, "gel_bubble": 0.2, "ruler": 0.5})

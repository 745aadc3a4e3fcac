"""The classifier's report: every number against an independent reference, undefined ones, files and pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
    binary_precision,
    binary_recall,
    binary_specificity,
)

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier_report import (
    COLUMNS,
    MEASURES,
    Report,
    best_thresholds,
    confusion_figure,
    one_sided,
    reliability_figure,
)
from ddpo_pytorch.utils.errors import UserError


def sample(images=200, heads=6, seed=0):
    """Logits rounded to one decimal, so that many are equal, and labels that they predict better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.random((images, heads)) < 0.3
    logits = np.round(rng.normal(size=(images, heads)) + np.where(labels, 1.0, -1.0), 1)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)


def test_measures_equal_independent_ones():
    logits, labels = sample()
    rows = Report(logits, labels, LABELS, resamples=20).attributes
    for index, row in enumerate(rows):
        scores, truth = logits[:, index], labels[:, index].int()
        u = mannwhitneyu(scores[truth == 1], scores[truth == 0]).statistic
        assert row["auc"] == pytest.approx(u / (truth.sum() * (1 - truth).sum()).item(), abs=1e-12)
        probabilities = torch.sigmoid(scores.double())
        references = {
            "auc": binary_auroc(probabilities, truth),
            "average_precision": binary_average_precision(probabilities, truth),
            "precision": binary_precision(probabilities, truth),
            "recall": binary_recall(probabilities, truth),
            "f1": binary_f1_score(probabilities, truth),
            "specificity": binary_specificity(probabilities, truth),
            "accuracy": ((probabilities > 0.5) == truth).double().mean(),
            "ece": binary_calibration_error(probabilities, truth, n_bins=15, norm="l1"),
            "prevalence": truth.double().mean(),
        }
        assert references.keys() == MEASURES.keys()
        for name, reference in references.items():
            assert row[name] == pytest.approx(reference.item(), abs=1e-6), name
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] or name == "ece"  # a gap is biased upwards
        assert row["support"] == truth.sum() and row["what"] == LABELS[index]
        assert sum(row[count] for count in ("tp", "fp", "fn", "tn")) == len(truth)


def test_a_case_computed_by_hand():
    """Probabilities 0.2, 0.4, 0.6, 0.8 with labels 0, 1, 0, 1: of 4 pairs 3 are in order."""
    probabilities = torch.tensor([[0.2], [0.4], [0.6], [0.8]])
    row = Report(torch.logit(probabilities), torch.tensor([[0.0], [1], [0], [1]]), ("ink",)).attributes[0]
    expected = dict(tp=1, fp=1, fn=1, tn=1, auc=3 / 4, average_precision=(1 + 2 / 3) / 2, precision=0.5, recall=0.5)
    expected |= dict(f1=0.5, accuracy=0.5, specificity=0.5, prevalence=0.5, ece=(0.2 + 0.6 + 0.6 + 0.2) / 4)
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_intervals_are_those_of_resampled_images():
    logits, labels = sample(300, 1)
    row = Report(logits, labels, ("hair",), resamples=1000, seed=3).attributes[0]
    assert row == Report(logits, labels, ("hair",), resamples=1000, seed=3).attributes[0]
    assert row != Report(logits, labels, ("hair",), resamples=1000, seed=4).attributes[0]
    # the accuracy of n independent images has a binomial error; 1.96 of its standard deviations make 95 %.
    half = 1.96 * np.sqrt(row["accuracy"] * (1 - row["accuracy"]) / 300)
    assert row["accuracy_high"] - row["accuracy_low"] == pytest.approx(2 * half, rel=0.1)
    # an independent bootstrap of the AUC, one resample after the other.
    rng, values = np.random.default_rng(0), []
    scores, truth = logits[:, 0].numpy(), labels[:, 0].numpy() > 0
    for _ in range(400):
        drawn = rng.integers(300, size=300)
        positive, negative = scores[drawn][truth[drawn]], scores[drawn][~truth[drawn]]
        values.append(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
    low, high = np.quantile(values, [0.025, 0.975])
    assert (row["auc_low"], row["auc_high"]) == pytest.approx((low, high), abs=0.01)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_none_and_empty(tmp_path):
    logits, labels = torch.tensor([[-1.0, 2, 3], [-2, 1, -3], [-3, 1, 3]]), torch.tensor([[0.0, 1, 1], [0, 1, 0]] * 2)
    report = Report(logits, labels[:3], LABELS[:3])
    hair, gel, ruler = report.attributes
    assert [hair[key] for key in ("auc", "average_precision", "precision", "recall", "f1")] == [None] * 5
    assert hair["accuracy"] == hair["specificity"] == 1 and hair["auc_low"] is None
    assert gel["auc"] is None and gel["specificity"] is None and gel["f1"] == gel["average_precision"] == 1
    assert ruler["auc"] == ruler["auc_low"] == 1  # resamples of one class are left out
    assert one_sided(labels[:3], LABELS[:3]) == [("hair", "positive"), ("gel_bubble", "negative")]
    report.write(tmp_path / "deep" / "test_H3")
    with open(tmp_path / "deep" / "test_H3.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert table[0]["auc"] == "" and float(table[0]["accuracy"]) == 1 and tuple(table[0]) == COLUMNS
    assert json.loads((tmp_path / "deep" / "test_H3.json").read_text()) == report.rows
    lines = report.table().splitlines()
    assert next(line for line in lines if line.startswith("AUC")).split()[1:3] == ["-", "-"]


def test_combinations_that_occur_have_support_and_exact_matches():
    labels = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 0], [1, 0]])
    logits = torch.tensor([[1.0, -1], [1, 1], [-1, 1], [1, -1], [2, -2]])
    report = Report(logits, labels, ("hair", "ink"))
    found = {row["what"]: (row["support"], row["recall"]) for row in report.combinations}
    assert found == {"only none": (1, 0), "only ink": (1, 1), "only hair": (3, pytest.approx(2 / 3))}
    assert all(row["precision"] is None and row["auc"] is None for row in report.combinations)


def test_thresholds_of_best_f1():
    logits, labels = sample(150)
    thresholds = best_thresholds(logits, labels, LABELS)
    rows = {row["what"]: row for row in Report(logits, labels, LABELS, thresholds, resamples=1).attributes}
    for index, name in enumerate(LABELS):
        probabilities, truth = torch.sigmoid(logits[:, index].double()), labels[:, index].int()
        best = max(binary_f1_score(probabilities, truth, threshold=t) for t in [0.0, *probabilities.tolist()])
        assert rows[name]["f1"] == pytest.approx(best.item(), abs=1e-6)
        assert rows[name]["threshold"] == thresholds[name]
    # separable: half-way; nothing to separate: everything is claimed; no positive: 0.5.
    logits = torch.logit(torch.tensor([[0.2, 0.4, 0.9], [0.6, 0.8, 0.9]], dtype=torch.float64))
    found = best_thresholds(logits, torch.tensor([[0.0, 1, 0], [1, 1, 0]]), LABELS[:3])
    assert found == pytest.approx({"hair": 0.4, "gel_bubble": 0.2, "ruler": 0.5})


def test_extreme_and_broken_logits():
    report = Report(torch.tensor([[1e4], [-1e4], [0.0]]), torch.tensor([[1.0], [0], [0]]), ("hair",))
    row = report.attributes[0]
    assert (row["auc"], row["tp"], row["tn"]) == (1, 1, 2) and row["ece"] == pytest.approx(0.5 / 3)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite"):
            Report(torch.tensor([[broken]]), torch.tensor([[1.0]]), ("hair",))
    with pytest.raises(ValueError, match="not \\(N, 2\\)"):
        Report(torch.zeros(3, 1), torch.zeros(3, 1), LABELS[:2])


@pytest.mark.parametrize(("heads", "panels"), [(1, (1, 1)), (4, (2, 2)), (6, (2, 3))])
def test_figures_state_the_numbers(tmp_path, heads, panels):
    logits, labels = sample(40, heads)
    logits[:, 0] = 0.1  # all images in one bin
    report = Report(logits, labels, LABELS[:heads], resamples=2)
    confusion = confusion_figure(report.attributes)
    for row, ax in zip(report.attributes, confusion.axes, strict=True):
        counts = [int(text.get_text().split()[0]) for text in ax.texts]
        assert counts == [row[name] for name in ("tn", "fp", "fn", "tp")] and ax.get_title() == row["what"]
    reliability = reliability_figure(report.probabilities, report.truth, report.names)
    points = [ax.collections[0].get_offsets() for ax in reliability.axes[::2]]
    assert len(points) == heads and len(points[0]) == 1
    expected = torch.sigmoid(torch.tensor(0.1)).item(), labels[:, 0].mean().item()
    assert tuple(points[0][0]) == pytest.approx(expected, abs=1e-6)
    written = report.write(tmp_path / "test_H")
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written[2:]:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
        for rows in np.array_split(pixels, panels[0]):
            for panel in np.array_split(rows, panels[1], axis=1):
                assert (panel[..., 2] - panel[..., 0] > 60).sum() > 100  # blue marks
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all()  # nothing is cut off

"""APR by hand, and against torchmetrics' exact match."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MultilabelExactMatch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.metrics.alignment import aligned_images, apr_by_prompt, measure_apr

HAIR, GEL_RULER, PLAIN = CAPTIONS[8], CAPTIONS[16 + 6], CAPTIONS[0]


def test_apr_by_hand():
    captions = [HAIR, HAIR, GEL_RULER, GEL_RULER, PLAIN]
    predictions = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    aligned = aligned_images(captions, predictions, LABELS[:4])
    assert aligned.tolist() == [1, 0, 1, 0, 1]
    assert list(apr_by_prompt(aligned, captions).items()) == [(PLAIN, 1.0), (HAIR, 0.5), (GEL_RULER, 0.5)]
    groups = np.array([CAPTIONS.index(caption) for caption in captions])
    block, hits = measure_apr(LABELS[:4], predictions.numpy() - 0.5, captions, groups, 0)
    assert hits.tolist() == aligned.tolist() and block["APR"].value == 3 / 5 and block["by_prompt"][HAIR].value == 0.5
    numbers = block["attributes"]
    assert {name: values["accuracy"] for name, values in numbers.items()} == {
        "hair": 1.0, "gel_bubble": 1.0, "ruler": 0.8, "ink": 0.8
    }  # fmt: skip
    assert numbers["ruler"]["recall"].value == 0.5 and numbers["ruler"]["precision"].value == 1
    assert (numbers["ink"]["requested"], numbers["ink"]["seen"], numbers["ink"]["recall"].value) == (0, 1, None)


def test_every_label_of_the_judge_counts():
    # six heads: the same artifacts but the wrong disease is not aligned
    predictions = torch.tensor([[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    assert aligned_images([HAIR] * 2, predictions, LABELS).tolist() == [1, 0]
    # columns are found by name, not by position
    assert aligned_images([CAPTIONS[1]], torch.tensor([[1, 0]]), ("ink", "hair")).tolist() == [1]


def test_apr_equals_torchmetrics_over_uneven_shares():
    captions = [CAPTIONS[i % 32] for i in range(101)]
    predictions = torch.randint(0, 2, (101, 4), generator=torch.Generator().manual_seed(0))
    metric = MultilabelExactMatch(num_labels=4)
    for start in range(3):
        stated = torch.tensor([labels_of(caption)[:4] for caption in captions[start::3]])
        metric.update(predictions[start::3], stated)
    assert aligned_images(captions, predictions, LABELS[:4]).mean() == pytest.approx(float(metric.compute()), rel=1e-6)

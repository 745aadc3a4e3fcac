"""APR by hand; tables 2 and 3 in the paper's layout, in three formats."""

import csv
import io
from pathlib import Path

import torch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.metadata import requested_labels
from ddpo_pytorch.metrics.alignment import aligned_images, apr_by_prompt, measure_apr
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.tables import TABLE3_COLUMNS, model_table, table2, to_csv, to_latex, to_markdown


def quantity(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 1, "how": ""}


def model(apr, by_prompt, reward=None, **blocks):
    return {"alignment": {"H4": {"APR": apr, "by_prompt": by_prompt}}, "rewards": reward, "images": 32000} | blocks


BY_PROMPT = {CAPTIONS[8]: quantity(0.6374), CAPTIONS[1]: quantity(0.002, 0.0, 0.01), CAPTIONS[18]: quantity(0.8)}
FIDELITY = {"inception": {"matched": {"FID": quantity(121.47), "KID": quantity(0.0123)}, "unmatched": {}}}
SD = model(quantity(0.1828, 0.15, 0.2), BY_PROMPT, 0.8, fidelity=FIDELITY, perception={"LPIPS": quantity(0.6)})
RL = model(quantity(0.6314), {}, fidelity={"judge": {"matched": {"FID": quantity(0.123456)}}}, perception=None)


def test_table_2_has_the_papers_layout():
    table = table2({"SD": SD, "SD+RL": RL}, model(quantity(0.9), {CAPTIONS[8]: quantity(0.95)}), {CAPTIONS[8]: 543})
    assert list(table)[1:] == "MEL Hair,MEL Gel,MEL Ink,MEL Ruler,NV Hair,NV Gel,NV Ink,NV Ruler".split(",")
    assert table.to_numpy().tolist() == [
        ["# Real Sample", "543", *["0"] * 7],
        ["APR ↑ (%) SD", "63.74", "n/a", "0.20 [0.00, 1.00]", "n/a", "n/a", "n/a", "n/a", "80.00"],
        ["APR ↑ (%) SD+RL", *["n/a"] * 8],
        ["APR ↑ (%) real images", "95.00", *["n/a"] * 7],
    ]
    assert len(table2({"SD": SD})) == 1


def test_table_3_states_what_is_missing():
    assert model_table(TABLE3_COLUMNS, {"SD": SD, "SD+RL": RL}).to_numpy().tolist() == [
        ["SD", "18.28 [15.00, 20.00]", "121.47", "12.30", "0.600", "n/a", "0.800", "32000"],
        ["SD+RL", "63.14", "n/a", "n/a", "n/a", "0.1235", "n/a", "32000"],
    ]
    assert model_table(TABLE3_COLUMNS, {"SD": SD}, "unmatched")["FID ↓"].tolist() == ["n/a"]


def test_formats_hold_the_same_cells():
    table = model_table(TABLE3_COLUMNS, {"100 % a_b & c": SD})
    lines = to_markdown(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [list(table), cells]
    text = to_latex(table)
    assert text.startswith(r"\begin{tabular}{lrrrrrrr}") and r"100 \% a\_b \& c & 18.28 [15.00, 20.00] & 121.47" in text
    assert r"FID $\downarrow$" in text and "↓" not in text


HAIR, GEL_RULER, PLAIN = CAPTIONS[8], CAPTIONS[16 + 6], CAPTIONS[0]


def test_apr_by_hand():
    captions = [HAIR, HAIR, GEL_RULER, GEL_RULER, PLAIN]
    predictions = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    requested = requested_labels(captions, LABELS[:4])
    aligned = aligned_images(requested, predictions)
    assert aligned.tolist() == [1, 0, 1, 0, 1]
    assert list(apr_by_prompt(aligned, captions).items()) == [(PLAIN, 1.0), (HAIR, 0.5), (GEL_RULER, 0.5)]
    images = ImageSet(Path(), (), tuple(captions), ())
    block, hits = measure_apr(images, requested, LABELS[:4], predictions.numpy() - 0.5, 0)
    assert hits.tolist() == aligned.tolist() and block["APR"].value == 3 / 5 and block["by_prompt"][HAIR].value == 0.5
    numbers = block["attributes"]
    accuracy = {name: values["accuracy"].value for name, values in numbers.items()}
    assert accuracy == {"hair": 1.0, "gel_bubble": 1.0, "ruler": 0.8, "ink": 0.8}
    assert numbers["ruler"]["recall"].value == 0.5 and numbers["ruler"]["precision"].value == 1
    assert (numbers["ink"]["requested"], numbers["ink"]["seen"], numbers["ink"]["recall"].value) == (0, 1, None)

    # six heads: the same artifacts but the wrong disease is not aligned; columns are found by name, not by position
    seen = torch.tensor([[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    assert aligned_images(requested_labels([HAIR] * 2, LABELS), seen).tolist() == [1, 0]
    assert requested_labels([CAPTIONS[1]], ("ink", "hair")).tolist() == [[1, 0]]

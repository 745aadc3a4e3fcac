"""Folders of images with a table metadata.csv, in the format of Hugging Face's imagefolder.

The columns are file_name, text and any others; those named after a judge's labels contain 0 or 1.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.data.tables import Row, number, read_table, tidy_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault

METADATA = "metadata.csv"


def read_metadata(path: str | Path) -> list[Row]:
    """Return the rows of a metadata.csv. Raises UserError as `read_table` does."""

    def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[Row, str, str]:
        name = tidy_path(fields["file_name"])
        if fault := path_fault(fields["file_name"]):
            faults.append(f"file_name {name!r} {fault}; give a path relative to the folder")
        if not fields["text"]:
            faults.append("the text is empty; describe the image")
        return Row(name, fields["text"], fields, index), name, f"image {name!r}"

    return read_table(path, "table", ("file_name", "text"), make, free_text="text", advice="list one image per line")


def of_caption(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return, by text, the columns that the text determines in every row, such as labels but not a patient's age."""
    stated: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        stated[row.caption] |= row.fields
    omitted = {name for row in rows for name, value in row.fields.items() if stated[row.caption][name] != value}
    omitted |= {"file_name", "text"}
    return {text: {name: own[name] for name in own if name not in omitted} for text, own in stated.items()}


def requested_labels(
    captions: Sequence[str], labels: Sequence[str], table: Sequence[Mapping[str, str]] = ()
) -> torch.Tensor:
    """Return the 0/1 labels (N, H) that N images should show, in the order of `labels`.

    They come from the images' rows of `table`, else from an ISIC caption. Raises UserError if neither states them.
    """
    result = []
    for caption, row in zip(captions, table or [{}] * len(captions), strict=True):
        stated = [row.get(name) for name in labels]
        if None in stated and caption in CAPTIONS and set(labels) <= set(LABELS):
            stated = [str(labels_of(caption)[LABELS.index(name)]) for name in labels]
        if wrong := [name for name, value in zip(labels, stated, strict=True) if number(value or "") not in (0, 1)]:
            given = "is missing" if row.get(wrong[0]) is None else f"is {row[wrong[0]]!r}"
            advice = f"add a column of 0 and 1 for each to {METADATA}, or give another judge (fundus: metric.judges)"
            what = f"the label {wrong[0]!r} of {row.get('file_name') or caption!r} {given}"
            raise UserError(f"{what}; the judge predicts {', '.join(labels)}: {advice}")
        result.append([int(number(value)) for value in stated])
    return torch.tensor(result)

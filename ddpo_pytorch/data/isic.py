"""ISIC 2019 with artifact labels: label order, captions, split tables, image files.

There are 2 x 2^4 = 32 captions. Labels are looked up by the whole caption, not by substring ("ink" is in "pink").
`python -m ddpo_pytorch.data.isic --splits DIR` checks and counts split tables (`ddpo_pytorch.data.splits`).
"""

import itertools
import runpy
from collections.abc import Sequence
from pathlib import Path

from ddpo_pytorch.data.images import find_images, rows_with_image, stem_of
from ddpo_pytorch.data.tables import Row, number, read_table, tidy_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault

# order of every label vector; judges with four heads use the first four
LABELS = ("hair", "gel_bubble", "ruler", "ink", "MEL", "NV")
ARTIFACTS = LABELS[:4]
PAPER_ORDER = ("MEL", "NV", "hair", "gel_bubble", "ink", "ruler")  # columns of table 1
DISEASES = {"MEL": "melanoma (MEL)", "NV": "melanocytic nevus (NV)"}


def _compose(labels: tuple[int, ...]) -> str:
    disease = DISEASES["MEL" if labels[4] else "NV"]
    present = [name.replace("_", " ") for name, value in zip(ARTIFACTS, labels[:4], strict=True) if value]
    tail = f"showing {', '.join(present)}" if present else "with no visible artifacts"
    return f"a dermoscopic image with {disease} {tail}"


# official order: melanoma, then nevus; within each, binary counting with hair as the highest bit
_ROWS = [(*bits, *disease) for disease in ((1, 0), (0, 1)) for bits in itertools.product((0, 1), repeat=4)]
_TABLE = {_compose(labels): labels for labels in _ROWS}
CAPTIONS: tuple[str, ...] = tuple(_TABLE)
# columns of table 2: captions with exactly one artifact, by (disease, artifact)
SINGLE_ARTIFACT_CAPTIONS = {
    (disease, artifact): _compose((*(int(a == artifact) for a in ARTIFACTS), int(disease == "MEL")))
    for disease in DISEASES
    for artifact in ARTIFACTS
}


def caption_of(labels: Sequence[int]) -> str:
    """Return the caption of six 0/1 labels in the order of `LABELS`, or raise UserError."""
    key = tuple(int(value) for value in labels)
    if key not in _TABLE.values():
        raise UserError(f"labels {key} have no caption: give 0/1 values of {LABELS} with exactly one of MEL and NV")
    return _compose(key)


def caption_list(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return all 32 captions, including those without rows."""
    return CAPTIONS


def short_caption(caption: str) -> str:
    """Return a short name of a subgroup: "MEL hair+ink", "NV plain"."""
    labels = labels_of(caption)
    present = [name for name, value in zip(ARTIFACTS, labels, strict=False) if value]
    return f"{'MEL' if labels[4] else 'NV'} {'+'.join(present) or 'plain'}"


def labels_of(caption: str) -> tuple[int, ...]:
    """Return the six labels of a caption. Raises UserError for a text that is not one of `CAPTIONS`."""
    if caption not in _TABLE:
        raise UserError(f"{caption!r} is not one of the 32 ISIC captions, e.g. {CAPTIONS[1]!r}")
    return _TABLE[caption]


def read_split(path: str | Path) -> list[Row]:
    """Read a split table with the columns image, MEL, NV, hair, gel_bubble, ruler, ink and any others."""

    def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[Row | None, str, str]:
        image, values = tidy_path(fields["image"]), [number(fields[name]) for name in LABELS]
        if wrong := [name for name, value in zip(LABELS, values, strict=True) if value not in (0, 1)]:
            faults.append(f"{', '.join(f'{name} is {fields[name]!r}' for name in wrong)}; allowed are 0 and 1")
        elif values[4] == values[5]:
            faults.append(f"MEL and NV are {tuple(map(int, values[4:]))}; exactly one of them must be 1")
        if fault := path_fault(image):
            faults.append(f"the image id {image!r} {fault}; give the name of the file in the image folder")
        labels = () if faults else tuple(map(int, values))
        row = Row(image, _compose(labels), fields, index, labels) if labels else None
        return row, image_key(image), f"image {image!r}"

    return read_table(path, "split table", ("image", *LABELS), make)


def image_key(image: str) -> str:
    """Return an image id in lower case, without suffix and `_downsampled`, which ISIC appends inconsistently."""
    return stem_of(image).casefold().removesuffix("_downsampled")


def find_image_files(data_path: str | Path, images: Sequence[str]) -> list[Path | None]:
    """Return the files of image ids, with or without `_downsampled`, by `images.find_images`."""
    return find_images(data_path, [stem_of(image) for image in images], image_key)


def load_split(csv_path: str | Path, data_path: str | Path, limit: int = 0) -> tuple[list[Row], list[Path], int]:
    """Return `read_split` without the rows that lack an image, by `images.rows_with_image`."""
    return rows_with_image(read_split(csv_path), csv_path, data_path, limit, find_image_files)


if __name__ == "__main__":
    runpy.run_module("ddpo_pytorch.data.splits", run_name="__main__")

"""Fundus photographs with captions: tables `path,Text,modality`, prompts, eyes, patients, image files.

python -m ddpo_pytorch.data.fundus --csv captions.csv --out DIR     # fundus_{train,val,test}.csv, by patient
"""

import argparse
import logging
import posixpath
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.images import find_damage, rows_with_image
from ddpo_pytorch.data.splits import assign
from ddpo_pytorch.data.tables import choice, invisible_character, read_table, table_text
from ddpo_pytorch.utils.cli import add_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, path_fault

logger = logging.getLogger(__name__)
MODALITY = "Fundus"
SPLITS = ("train", "val", "test")
OPTIONAL = ("modality", "patient", "eye", "quality")  # columns of a table that are used if it has them
_PREFIX = re.compile(r"fundus\s*:\s*", re.IGNORECASE)
_EYE_OF_FILE = re.compile(r"^(.+)[_\- ](left|right|od|os)$", re.IGNORECASE)
_EYES = {"left": "left", "l": "left", "os": "left", "right": "right", "r": "right", "od": "right"}
# OD and OS, right and left in Latin, are written in capitals
_EYE_IN_TEXT = re.compile(r"\b((?i:left|right)|OD|OS)\b")
_SIDE = re.compile(r"\b(left|right)|nasal|temporal|\bo.?clock\b", re.IGNORECASE)
_BALANCED_KINDS = 50  # captions (or ratings) whose shares a division by patients keeps: the most frequent ones


@dataclass(frozen=True)
class Row:
    """One photograph of a table: its path there, "Fundus: <Text>", every column as text, its number from 0.

    `patient` is the column of that name, else the file's name without folder, suffix and eye. `eye` is "left", "right",
    or "" where neither column, file name nor caption tells.
    """

    image: str
    caption: str
    fields: dict[str, str]
    number: int
    patient: str
    eye: str


def read_split(path: str | Path) -> list[Row]:
    """Read a table with the columns path and Text, and perhaps modality (or modal), patient, eye; others are carried.

    See `tables.read_table` for what is understood. A path starts from the image folder. Raises UserError
    that describes the first faults by line and counts the others: a row whose commas cannot be resolved, an
    empty path or caption, a path out of the folder, one that appears twice, and another modality than fundus.
    """
    table, faults = read_table(path, ("path", "Text"), "fundus table", OPTIONAL, free_text="Text")
    rows, lines = [], {}
    for line, fields in table:
        image = tidy_path(fields["path"])
        fault = image_fault(image) or caption_fault(fields["Text"], choice(fields, "modality", MODALITY))
        if not fault and image in lines:
            fault = f"image {image!r} appears twice, first in line {lines[image]}; remove one of them"
        if fault:
            faults.add(line, fault)
            continue
        lines[image] = line
        patient = choice(fields, "patient", patient_of(image))
        eye = _eye(choice(fields, "eye"), image, fields["Text"])
        rows.append(Row(image, caption_of(fields["Text"]), fields, len(rows), patient, eye))
    faults.refuse()
    if not rows:
        raise UserError(f"fundus table {str(path)!r} has a header and no rows; give one image a line")
    return rows


def caption_of(text: str) -> str:
    """The prompt of a description: "Fundus: <text>", with single spaces and one prefix only."""
    text = " ".join(text.split())
    return f"{MODALITY}: {_PREFIX.sub('', text, count=1) if _PREFIX.match(text) else text}"


def caption_list(rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct captions of the rows, sorted."""
    return tuple(sorted({row.caption for row in rows}))


def names_side(text: str) -> bool:
    """Whether a mirrored image would no longer be what the text says: it names an eye, a side or a clock position."""
    return bool(_SIDE.search(text) or _EYE_IN_TEXT.search(text))


def tidy_path(text: str) -> str:
    """A path of a table in one spelling: slashes, no `./`, no `a/../`. Empty for an empty cell."""
    return posixpath.normpath(text.replace("\\", "/")) if text else ""


def image_fault(image: str) -> str | None:
    """Return why an image of a table may not be opened, or None. `image` is a tidy path (`files.path_fault`)."""
    if not image:
        return "the path of the image is empty"
    fault = path_fault(image)
    return fault and f"path {image!r} {fault}; give one that starts from the image folder"


def caption_fault(text: str, modality: str) -> str | None:
    """What is wrong with a description and its modality, or None."""
    if modality.lower() != MODALITY.lower():
        return f"modality is {modality!r}; only {MODALITY} images are generated here, so remove rows of any other"
    if not _PREFIX.sub("", text, count=1).strip():
        return "the caption is empty; describe the image"
    caption = " ".join(text.split())
    fault = invisible_character(caption)
    return fault and f"the caption {caption!r} {fault}"


def patient_of(image: str) -> str:
    """The name of a file without folder, suffix and, at its end, _left, _right, _OD or _OS."""
    stem = posixpath.splitext(posixpath.basename(image))[0]
    match = _EYE_OF_FILE.match(stem)
    return match[1] if match else stem


def _eye(cell: str, image: str, text: str) -> str:
    if cell.lower() in _EYES:
        return _EYES[cell.lower()]
    match = _EYE_OF_FILE.match(posixpath.splitext(posixpath.basename(image))[0])
    if match:
        return _EYES[match[2].lower()]
    named = {_EYES[word.lower()] for word in _EYE_IN_TEXT.findall(text)}
    return named.pop() if len(named) == 1 else ""


def load_split(csv_path: str | Path, data_path: str | Path, limit: int = 0) -> tuple[list[Row], list[Path], int]:
    """Return rows that have an image, their files, and the number of rows without one, which a warning names.

    `limit` > 0 keeps the first that many rows with an image. Raises UserError as `read_split` and
    `images.rows_with_image` do. `check_images` finds damaged ones.
    """
    rows = read_split(csv_path)
    return rows_with_image(rows, [row.image for row in rows], csv_path, data_path, limit)


def check_images(paths: Sequence[Path]) -> None:
    """Decode every image. Raises UserError that names the first that `images.read_rgb` refuses, and counts them."""
    faults = [fault for fault in find_damage(paths) if fault]
    if faults:
        more = f" (and {len(faults) - 1} more of {len(paths)} images)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)


def assign_patients(patients: Sequence[str], kinds: Sequence, shares: Sequence[float], seed: int) -> list[int]:
    """For each image the number of its split, such that all images of a patient are in one split.

    `shares` (S,) sum to 1; sizes, and the shares of the most frequent `kinds` (captions, ratings), come near them. The
    same for any order of the images. Raises UserError if there are fewer patients than splits, or one stays empty.
    """
    groups = defaultdict(Counter)
    for patient, kind in zip(patients, kinds, strict=True):
        groups[patient][kind] += 1
    names = sorted(groups)
    total = sum(groups.values(), Counter())
    frequent = sorted(total, key=lambda kind: (-total[kind], kind))[:_BALANCED_KINDS]
    counts = np.array([[group.total(), *(group[kind] for kind in frequent)] for group in map(groups.get, names)])
    chosen = assign(counts, np.outer(shares, counts.sum(0)), seed) if names else np.array([], int)
    if set(chosen.tolist()) != set(range(len(shares))):
        wanted = ", ".join(f"{share:.3g}" for share in shares)
        raise UserError(f"{len(names)} patients cannot be divided into the shares {wanted}; one would be empty")
    split_of = dict(zip(names, chosen.tolist(), strict=True))
    return [split_of[patient] for patient in patients]


def split_by_patient(rows: Sequence[Row], val: float, test: float, seed: int) -> dict[str, list[Row]]:
    """Rows by "train", "val", "test" in their order, each patient in one of them; a split of share 0 is left out.

    Raises UserError for shares that leave nothing to train on and for too few patients.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1) or seed < 0:
        raise UserError(
            f"val {val}, test {test}, seed {seed}: none may be negative, and the shares are below 1 together"
        )
    shares = {name: share for name, share in zip(SPLITS, (1 - val - test, val, test), strict=True) if share}
    numbers = assign_patients([row.patient for row in rows], [row.caption for row in rows], list(shares.values()), seed)
    return {
        name: [row for row, own in zip(rows, numbers, strict=True) if own == number]
        for number, name in enumerate(shares)
    }


def write_splits(folder: str | Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write fundus_<split>.csv with every column of the table.

    Raises UserError, before anything is written, where a file of that name holds something else.
    """
    contents = {Path(folder) / f"fundus_{name}.csv": _as_csv(rows).encode() for name, rows in splits.items()}
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{str(path)!r} exists and holds something else; choose another folder or move it away")
    for path, content in contents.items():
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows with every column of the table that they were read from; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(_as_csv(rows).encode())


def _as_csv(rows: Sequence[Row]) -> str:
    return table_text(list(rows[0].fields), (row.fields for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Divide a fundus table by patient into train, val and test.")
    add_path(parser, "--csv", help="table with the columns path, Text and perhaps modality, patient")
    add_path(parser, "--out", help="folder for fundus_train.csv, fundus_val.csv, fundus_test.csv")
    for name in ("val", "test"):
        parser.add_argument(f"--{name}", type=float, default=0.15, help="share of the images, default 0.15; 0: no file")
    parser.add_argument("--seed", type=int, default=42, help="default 42")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        splits = split_by_patient(read_split(given.csv), given.val, given.test, given.seed)
        write_splits(given.out, splits)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    for name, rows in splits.items():
        patients = len({row.patient for row in rows})
        counts = f"{patients} patients, {len(rows)} images, {len(caption_list(rows))} captions"
        logger.info("%-5s  %s", name, counts)


if __name__ == "__main__":
    main()

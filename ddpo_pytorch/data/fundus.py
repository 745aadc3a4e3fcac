"""Fundus photographs with captions: tables `path,Text,modality`, prompts, eyes, patients, image files.

python -m ddpo_pytorch.data.fundus --csv captions.csv --out DIR     # fundus_{train,val,test}.csv, by patient
"""

import argparse
import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.images import find_damage, rows_with_image
from ddpo_pytorch.data.splits import SPLITS, assign
from ddpo_pytorch.data.tables import choice, invisible_character, read_table, table_text
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, path_fault

logger = logging.getLogger(__name__)
MODALITY = "Fundus"
OPTIONAL = ("modality", "patient", "eye", "quality")  # columns that are used if present
_PREFIX = re.compile(r"fundus\s*:\s*", re.IGNORECASE)
_EYE_OF_FILE = re.compile(r"^(.+)[_\- ](left|right|od|os)$", re.IGNORECASE)
_EYES = {"left": "left", "l": "left", "os": "left", "right": "right", "r": "right", "od": "right"}
# OD and OS, right and left in Latin, are written in capitals
_EYE_IN_TEXT = re.compile(r"\b((?i:left|right)|OD|OS)\b")
_SIDE = re.compile(r"\b(left|right)|nasal|temporal|\bo.?clock\b", re.IGNORECASE)
_BALANCED_KINDS = 50  # most frequent captions (or ratings) of which a split by patients keeps the shares


@dataclass(frozen=True)
class Row:
    """Photograph of a table: its path there, "Fundus: <Text>", every column as text, its number from 0.

    `patient` is the column of that name, else the file's name without folder, suffix and eye. `eye` is "left", "right",
    or "" if neither column, file name nor caption names it.
    """

    image: str
    caption: str
    fields: dict[str, str]
    number: int
    patient: str
    eye: str


def read_split(path: str | Path) -> list[Row]:
    """Read a table with the columns path and Text, perhaps modality (or modal), patient, eye and others.

    See `tables.read_table` for the format. A path starts from the image folder. Raises UserError for a row whose commas
    cannot be resolved, an empty path or caption, a path out of the folder or a repeated one, and another modality.
    """
    table, faults = read_table(path, ("path", "Text"), "fundus table", OPTIONAL, free_text="Text")
    rows, lines = [], {}
    for line, fields in table:
        image, text = tidy_path(fields["path"]), fields["Text"]
        fault = "the path of the image is empty" if not image else path_fault(image)
        if image and fault:
            fault = f"path {image!r} {fault}; give one that starts from the image folder"
        fault = fault or caption_fault(text, choice(fields, "modality", MODALITY))
        if not fault and image in lines:
            fault = f"image {image!r} appears twice, first in line {lines[image]}; remove one of them"
        if fault:
            faults.add(line, fault)
            continue
        lines[image] = line
        patient = choice(fields, "patient", patient_of(image))
        rows.append(Row(image, caption_of(text), fields, len(rows), patient, _eye(choice(fields, "eye"), image, text)))
    faults.refuse()
    if not rows:
        raise UserError(f"fundus table {str(path)!r} has a header and no rows; give one image a line")
    return rows


def caption_of(text: str) -> str:
    """Return the prompt of a description: "Fundus: <text>", with single spaces and one prefix."""
    text = " ".join(text.split())
    if prefix := _PREFIX.match(text):
        text = text[prefix.end() :]
    return f"{MODALITY}: {text}"


def caption_list(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the distinct captions of the rows, sorted."""
    return tuple(sorted({row.caption for row in rows}))


def names_side(text: str) -> bool:
    """Return whether mirroring an image makes its text wrong: it names an eye, a side or a clock position."""
    return bool(_SIDE.search(text) or _EYE_IN_TEXT.search(text))


def tidy_path(text: str) -> str:
    """Return a path with slashes, without `./` and `a/../`; "" for an empty cell."""
    return posixpath.normpath(text.replace("\\", "/")) if text else ""


def caption_fault(text: str, modality: str) -> str | None:
    """Return the fault of a description or its modality, or None."""
    if modality.lower() != MODALITY.lower():
        return f"modality is {modality!r}; only {MODALITY} is allowed, remove the row"
    if not _PREFIX.sub("", text, count=1).strip():
        return "the caption is empty; describe the image"
    caption = " ".join(text.split())
    fault = invisible_character(caption)
    return fault and f"the caption {caption!r} {fault}"


def patient_of(image: str) -> str:
    """Return a file's name without folder, suffix and _left, _right, _OD or _OS at its end."""
    stem = posixpath.splitext(posixpath.basename(image))[0]
    match = _EYE_OF_FILE.match(stem)
    return match[1] if match else stem


def _eye(cell: str, image: str, text: str) -> str:
    if cell.lower() in _EYES:
        return _EYES[cell.lower()]
    if match := _EYE_OF_FILE.match(posixpath.splitext(posixpath.basename(image))[0]):
        return _EYES[match[2].lower()]
    eyes = {_EYES[word.lower()] for word in _EYE_IN_TEXT.findall(text)}
    return eyes.pop() if len(eyes) == 1 else ""


def load_split(csv_path: str | Path, data_path: str | Path, limit: int = 0) -> tuple[list[Row], list[Path], int]:
    """Return the rows that have an image, their files, and the number of rows without one, which a warning lists.

    `limit` > 0 keeps the first rows. Raises UserError as `read_split` and `images.rows_with_image` do.
    """
    return rows_with_image(read_split(csv_path), csv_path, data_path, limit)


def check_images(paths: Sequence[Path]) -> None:
    """Decode every image. Raises UserError for those that `images.read_rgb` refuses, of which it names the first."""
    if faults := [fault for fault in find_damage(paths) if fault]:
        raise UserError(f"{faults[0]} ({len(faults)} of {len(paths)} images are unusable)")


def assign_patients(patients: Sequence[str], kinds: Sequence, shares: Sequence[float], seed: int) -> list[int]:
    """Return the number of the split of each image, with all images of a patient in one split.

    `shares` (S,) sum to 1; sizes, and the shares of the most frequent `kinds` (captions, ratings), come near them. The
    result does not depend on the order of the images. Raises UserError if a split stays empty.
    """
    groups = defaultdict(Counter)
    for patient, kind in zip(patients, kinds, strict=True):
        groups[patient][kind] += 1
    names, total = sorted(groups), Counter(kinds)
    frequent = sorted(total, key=lambda kind: (-total[kind], kind))[:_BALANCED_KINDS]
    counts = np.array([[groups[name].total(), *(groups[name][kind] for kind in frequent)] for name in names])
    chosen = assign(counts, np.outer(shares, counts.sum(0)), seed) if names else np.array([], int)
    if set(chosen.tolist()) != set(range(len(shares))):
        wanted = ", ".join(f"{share:.3g}" for share in shares)
        raise UserError(f"{len(names)} patients cannot be divided into the shares {wanted}; one would be empty")
    split_of = dict(zip(names, chosen.tolist(), strict=True))
    return [split_of[patient] for patient in patients]


def split_by_patient(rows: Sequence[Row], val: float, test: float, seed: int) -> dict[str, list[Row]]:
    """Return rows by "train", "val", "test" in their order, each patient in one of them, without splits of share 0.

    Raises UserError for shares that leave nothing to train on and for too few patients.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1) or seed < 0:
        raise UserError(f"val {val}, test {test}, seed {seed}: allowed are 0 or more, and less than 1 in val + test")
    shares = {name: share for name, share in zip(SPLITS, (1 - val - test, val, test), strict=True) if share}
    patients, captions = [row.patient for row in rows], [row.caption for row in rows]
    splits = {name: [] for name in shares}
    for row, number in zip(rows, assign_patients(patients, captions, list(shares.values()), seed), strict=True):
        splits[list(shares)[number]].append(row)
    return splits


def write_splits(folder: str | Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write fundus_<split>.csv with every column of the table.

    Raises UserError, without writing, if a file of that name holds something else.
    """
    paths = {name: Path(folder) / f"fundus_{name}.csv" for name in splits}
    for name, path in paths.items():
        if path.exists() and path.read_bytes() != _as_csv(splits[name]):
            raise UserError(f"{str(path)!r} exists and holds something else; choose another folder or move it away")
    for name, path in paths.items():
        write_table(path, splits[name])


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows with every column of their table, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(_as_csv(rows))


def _as_csv(rows: Sequence[Row]) -> bytes:
    return table_text(list(rows[0].fields), (row.fields for row in rows)).encode()


def split_table(csv: str, out: str, val: float, test: float, seed: int) -> None:
    """Write the splits of a table and log their sizes."""
    splits = split_by_patient(read_split(csv), val, test, seed)
    write_splits(out, splits)
    for name, rows in splits.items():
        patients = len({row.patient for row in rows})
        counts = f"{patients} patients, {len(rows)} images, {len(caption_list(rows))} captions"
        logger.info("%-5s  %s", name, counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Divide a fundus table by patient into train, val and test.")
    add_path(parser, "--csv", help="table with the columns path, Text and perhaps modality, patient")
    add_path(parser, "--out", help="folder for fundus_train.csv, fundus_val.csv, fundus_test.csv")
    for name in ("val", "test"):
        parser.add_argument(f"--{name}", type=float, default=0.15, help="share of the images, default 0.15; 0: no file")
    parser.add_argument("--seed", type=int, default=42, help="default 42")
    run_command(parser, split_table, arguments)


if __name__ == "__main__":
    main()

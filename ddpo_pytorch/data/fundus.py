"""Fundus photographs with captions: tables `path,Text,modality`, prompts, eyes, patients, splits.

python -m ddpo_pytorch.data.fundus --csv captions.csv --out DIR     # fundus_{train,val,test}.csv, by patient
"""

import argparse
import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpo_pytorch.data.images import find_damage, rows_with_image
from ddpo_pytorch.data.splits import SPLITS, assign
from ddpo_pytorch.data.tables import Row, invisible_character, number, read_table, table_text, tidy_path
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault, write_file
from ddpo_pytorch.utils.settings import Range

logger = logging.getLogger(__name__)
MODALITY = "Fundus"
QUALITY = Range("[1, 3]")
_MODALITY = re.compile(r"([A-Za-z][\w -]{0,30}):\s")
# OD and OS, right and left eye in Latin, are written in capitals
_EYE_IN_TEXT = re.compile(r"\b((?i:left|right)|OD|OS)\b")
# sides that `mirrored_caption` cannot swap
_OTHER_SIDE = re.compile(r"\b(?:left|right)\w|\bo.?clock\b", re.IGNORECASE)


def quality_of(row: Row) -> float:
    """Return the value of the column `quality`, 1 (poor) to 3 (good); 3 if it is absent or empty."""
    return float(row.fields.get("quality") or 3)


def is_good(row: Row) -> bool:
    """Return True unless the column `quality` marks the image as degraded."""
    return quality_of(row) == 3


def read_split(path: str | Path) -> list[Row]:
    """Read a table with the columns path (relative to the image folder), Text and optionally modality and others."""
    only: list[str] = []

    def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[Row, str, str]:
        image, text, modality = tidy_path(fields["path"]), fields["Text"], fields.get("modality") or MODALITY
        if fault := path_fault(image):
            faults.append(f"path {image!r} {fault}; give a path relative to the image folder")
        elif fault := caption_fault(text, modality, only):
            faults.append(fault)
        if (quality := fields.get("quality")) and (number(quality) or 0) not in QUALITY:
            faults.append(f"quality is {quality!r}; it must be {QUALITY} (3 is good) or empty")
        patient = fields.get("patient") or patient_of(image)
        return Row(image, caption_of(text, *only), fields, index, patient=patient), image, f"image {image!r}"

    optional, advice = ("modality", "patient", "eye", "quality"), "list one image per line"
    return read_table(path, "fundus table", ("path", "Text"), make, optional, free_text="Text", advice=advice)


def caption_of(text: str, modality: str = MODALITY) -> str:
    """Return the prompt of a description: "<Modality>: <text>", with single spaces and one prefix."""
    modality = MODALITY if modality.lower() == MODALITY.lower() else modality
    text = re.sub(rf"^{re.escape(modality)}\s*:\s*", "", " ".join(text.split()), count=1, flags=re.IGNORECASE)
    return f"{modality}: {text}"


def findings_of(caption: str) -> set[str]:
    """Return the findings in a caption, which are separated by commas, without modality and eye."""
    text = re.sub(r"^.*?\bshows\b", "", _MODALITY.sub("", caption, count=1).lower())
    return {" ".join(re.sub(r"\b(left|right)\b|[.]", " ", part).split()) for part in text.split(",")} - {""}


def modality_of(prompt: str) -> str:
    """Return the modality at the start of a prompt made by `caption_of`, else ""."""
    match = _MODALITY.match(prompt)
    return match[1] if match else ""


def caption_list(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the distinct captions of the rows, sorted."""
    return tuple(sorted({row.caption for row in rows}))


def mirrored_caption(caption: str) -> str | None:
    """Return the caption of the mirror image, with the eyes swapped; None for words such as "leftward" or "o'clock".

    A mirrored left eye looks like a right eye, in which nasal and temporal are the same directions as before.
    """
    swapped = {"left": "right", "right": "left", "od": "OS", "os": "OD"}

    def other(match: re.Match) -> str:
        word, mirrored = match[0], swapped[match[0].lower()]
        return mirrored.capitalize() if word.istitle() else mirrored.upper() if word.isupper() else mirrored

    return None if _OTHER_SIDE.search(caption) else _EYE_IN_TEXT.sub(other, caption)


def caption_fault(text: str, modality: str, only: list[str]) -> str | None:
    """Return the fault of a description or its modality, or None; `only` stores the modality of the first row."""
    if not _MODALITY.fullmatch(f"{modality}: "):
        return f"modality is {modality!r}; it must be a short name such as {MODALITY}"
    only[:] = only or [modality]
    if modality.lower() != only[0].lower():
        return f"modality is {modality!r}, before it is {only[0]!r}; a table has one modality, remove the row"
    if caption_of(text, modality).endswith(": "):
        return "the caption is empty; describe the image"
    caption = " ".join(text.split())
    fault = invisible_character(caption)
    return fault and f"the caption {caption!r} {fault}"


def patient_of(image: str) -> str:
    """Return a file's name without folder, suffix and final _left, _right, _OD or _OS, or for left.jpg its folder."""
    folder, name = posixpath.split(image)
    stem = posixpath.splitext(name)[0]
    if folder and stem.lower() in ("left", "right", "od", "os"):  # <patient>/left.jpg
        return folder
    return re.sub(r"(?<=.)[_\- ](left|right|od|os)$", "", stem, flags=re.IGNORECASE)


def load_split(csv_path: str | Path, data_path: str | Path, limit: int = 0) -> tuple[list[Row], list[Path], int]:
    """Return `read_split` without the rows that lack an image, by `images.rows_with_image`."""
    return rows_with_image(read_split(csv_path), csv_path, data_path, limit)


def check_images(paths: Sequence[Path]) -> None:
    """Decode every image. Raises UserError with the first error of `images.read_rgb` and the number of such images."""
    if faults := [fault for fault in find_damage(paths) if fault]:
        raise UserError(f"{faults[0]} ({len(faults)} of {len(paths)} images are unusable)")


def divide_patients(images: Sequence[Any], kinds: Sequence, shares: Sequence[float], seed: int) -> list[list]:
    """Divide images into S parts: all images of a `patient` in the same part, whatever the order of the images.

    Part sizes, overall and of the 50 most frequent `kinds` (captions, ratings), approximate `shares` (S,) of sum 1.
    Raises UserError if a part would be empty.
    """
    groups = defaultdict(Counter)
    for image, kind in zip(images, kinds, strict=True):
        groups[image.patient][kind] += 1
    names, total = sorted(groups), Counter(kinds)
    frequent = sorted(total, key=lambda kind: (-total[kind], kind))[:50]
    counts = np.array([[groups[name].total(), *(groups[name][kind] for kind in frequent)] for name in names])
    chosen = assign(counts, np.outer(shares, counts.sum(0)), seed) if names else np.array([], int)
    if set(chosen.tolist()) != set(range(len(shares))):
        wanted = ", ".join(f"{share:.3g}" for share in shares)
        raise UserError(f"{len(names)} patients cannot be divided into the shares {wanted}; one would be empty")
    split_of = dict(zip(names, chosen.tolist(), strict=True))
    return [[image for image in images if split_of[image.patient] == index] for index in range(len(shares))]


def split_by_patient(rows: Sequence[Row], val: float, test: float, seed: int) -> dict[str, list[Row]]:
    """Return rows by split, "train", "val" and "test", each patient in one of them; splits of share 0 are omitted."""
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1) or seed < 0:
        raise UserError(f"val {val}, test {test}, seed {seed}: allowed are 0 or more, and val + test below 1")
    shares = {name: share for name, share in zip(SPLITS, (1 - val - test, val, test), strict=True) if share}
    parts = divide_patients(rows, [row.caption for row in rows], list(shares.values()), seed)
    return dict(zip(shares, parts, strict=True))


def split_table(csv: str, out: str, val: float, test: float, seed: int) -> None:
    """Write the splits of a table as fundus_<split>.csv and log their sizes. UserError if one exists and differs."""
    splits = split_by_patient(read_split(csv), val, test, seed)
    texts = {name: table_text(list(rows[0].fields), [row.fields for row in rows]) for name, rows in splits.items()}
    paths = {name: Path(out) / f"fundus_{name}.csv" for name in splits}
    for name, path in paths.items():
        if path.exists() and path.read_bytes() != texts[name].encode():
            raise UserError(f"{str(path)!r} exists and holds other content; choose another folder or move it away")
    for name, rows in splits.items():
        write_file(paths[name], texts[name])
        counts = len({row.patient for row in rows}), len(rows), len(caption_list(rows))
        logger.info("%-5s  %d patients, %d images, %d captions", name, *counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Split a fundus table by patient into train, val and test.")
    add_path(parser, "--csv", help="table with the columns path, Text and optionally modality, patient")
    add_path(parser, "--out", help="folder for fundus_train.csv, fundus_val.csv, fundus_test.csv")
    for name in ("val", "test"):
        parser.add_argument(f"--{name}", type=float, default=0.15, help="share of the images, default 0.15; 0: no file")
    parser.add_argument("--seed", type=int, default=42, help="default 42")
    run_command(parser, split_table, arguments)


if __name__ == "__main__":
    main()

"""Check split tables: counts, images, and lesions that occur in several splits.

    python -m ddpo_pytorch.data.isic --splits DIR [--images FOLDER] [--metadata CSV [--regroup OUT --seed S]]

A set of splits is `<name>_train.csv`, `<name>_val.csv` and `<name>_test.csv` in one folder, or some of the three. ISIC
has several images of many lesions, and a classifier tested on lesions it was trained on looks better than it is.
"""

import argparse
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import compress, permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpo_pytorch.data import isic
from ddpo_pytorch.data.images import find_damage
from ddpo_pytorch.data.isic import LABELS, PAPER_ORDER, image_key, read_split
from ddpo_pytorch.data.tables import Row, read_table, tidy_path, write_table
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_folder, sha256, write_json
from ddpo_pytorch.utils.json_files import read_json

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
RECORD = "splits.json"  # seed and hash of each table of regrouped splits


def find_splits(folder: str | Path) -> dict[str, dict[str, Path]]:
    """Return the sets of splits in a folder by name prefix: files by "train", "val" and "test"."""
    sets = defaultdict(dict)
    for split in SPLITS:
        for path in sorted(Path(folder).glob(f"[!.]*_{split}.csv")):
            sets[path.stem.removesuffix(f"_{split}")][split] = path
    if not sets:
        raise UserError(f"{str(folder)!r} does not exist or holds no *_train.csv, *_val.csv, *_test.csv; give another")
    return dict(sets)


def read_splits(paths: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Read the tables of one set. Raises UserError if two share an image, or if a recorded hash differs."""
    record, advice = next(iter(paths.values())).parent / RECORD, "make the splits again"
    hashes = read_json(record, {"files": {str: {"sha256": str}}}, advice)["files"] if record.is_file() else {}
    splits, owners = {}, {}
    for split, path in paths.items():
        splits[split] = read_split(path)
        if path.name in hashes and hashes[path.name]["sha256"] != sha256(path):
            raise UserError(f"{str(path)!r} was changed after {RECORD} recorded its hash; make the splits again")
        for row in splits[split]:
            if (other := owners.setdefault(image_key(row.image), split)) != split:
                raise UserError(f"image {row.image!r} is in {str(paths[other])!r} and {str(path)!r}; keep one of them")
    return splits


def count_labels(rows: Sequence[Row]) -> dict[str, int]:
    """Return the number of rows with each label, in the order of table 1."""
    return {name: sum(row.labels[LABELS.index(name)] for row in rows) for name in PAPER_ORDER}


def report_counts(splits: Mapping[str, Sequence[Row]]) -> None:
    """Log table 1 and, over train, the "# real" row of table 2."""
    from pandas import DataFrame  # a slow import that training does not need

    counts = {split: {"images": len(rows)} | count_labels(rows) for split, rows in splits.items()}
    reports = [DataFrame(counts).T.rename_axis(columns="table 1")]
    if "train" in splits:
        captions = Counter(row.caption for row in splits["train"])
        columns = [(disease, artifact) for disease in isic.DISEASES for artifact in PAPER_ORDER[2:]]
        real = {" ".join(column): captions[isic.SINGLE_ARTIFACT_CAPTIONS[column]] for column in columns}
        reports.append(DataFrame(real, index=["# real"]).rename_axis(columns="table 2"))
    for report in reports:
        logger.info("%s", report.rename(columns=lambda name: name.replace("_bubble", "")).to_string())


def check_images(splits: Mapping[str, Sequence[Row]], folder: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Decode the images of the splits; return (split, image id) of each missing one, and errors of broken ones."""
    paths, missing = [], []
    for split, rows in splits.items():
        images = [row.image for row in rows]
        files = isic.find_image_files(folder, images) if Path(folder).is_dir() else [None] * len(images)
        present = [path for path in files if path]
        absent = [image for image, path in zip(images, files, strict=True) if not path]
        paths += present
        missing += [(split, image) for image in absent]
        listed = f": {', '.join(absent[:5])}{', ...' if absent[5:] else ''}" if absent else ""
        logger.info("%-8s %d images, %d missing%s", split, len(present), len(absent), listed)
    if not paths:
        raise UserError(f"none of the {len(missing)} images of the splits is in {str(folder)!r}; give another folder")
    logger.info("decoding %d images", len(paths))
    faults = [fault for fault in find_damage(paths) if fault]
    logger.info("%s", "\n".join([f"{len(faults)} images are broken", *faults]))
    return missing, faults


def drop_broken(rows: Sequence[Row], paths: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """Return the rows whose image can be decoded, and the images; warn of all others. Raises UserError if none can."""
    faults = find_damage(paths)
    for fault in filter(None, faults):
        logger.warning("skipping: %s", fault)
    if all(faults):
        raise UserError(f"all {len(paths)} images are broken, the first: {faults[0]}")
    good = [not fault for fault in faults]
    return list(compress(rows, good)), list(compress(paths, good))


def read_metadata(path: str | Path) -> dict[str, dict[str, str]]:
    """Return the columns image and lesion_id (which may be empty) of ISIC's metadata by `image_key`."""

    def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[tuple[str, dict], str, str]:
        key = image_key(tidy_path(fields["image"]))
        return (key, fields), key, f"image {fields['image']!r}"

    return dict(read_table(path, "metadata", ("image", "lesion_id"), make))


def _frame(splits: Mapping[str, Sequence[Row]], metadata: Mapping[str, Mapping[str, str]]) -> "DataFrame":
    """Return split, row, known (to the metadata) and lesion of each row; a row without lesion_id is its own lesion."""
    from pandas import DataFrame

    records = []
    for split, row in ((split, row) for split, rows in splits.items() for row in rows):
        fields = metadata.get(image_key(row.image), {})
        lesion = fields.get("lesion_id")
        records.append((split, row, bool(fields), f"lesion {lesion}" if lesion else f"image {row.image}"))
    return DataFrame(records, columns=["split", "row", "known", "lesion"])


def report_leakage(splits: Mapping[str, Sequence[Row]], metadata: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Log and return the number of lesions in several splits, and of their images."""
    frame = _frame(splits, metadata)
    if not frame.known.any():
        raise UserError(f"the metadata have none of the {len(frame)} images of the splits; give ISIC's file")
    named = frame.lesion.str.startswith("lesion ").sum()
    logger.info("lesions  %d of %d images have a lesion_id; the others cannot be checked", named, len(frame))
    shared = frame[frame.groupby("lesion").split.transform("nunique") > 1]
    count = shared.lesion.nunique(), len(shared)
    logger.info("leakage  %d lesions, with %d images, are in more than one split", *count)
    for split, other in permutations(splits, 2):
        if leaked := shared.lesion[shared.split == split].isin(shared.lesion[shared.split == other]).sum():
            share = 100 * leaked / len(splits[split])
            logger.info("%-8s %d images (%.1f %%) show a lesion that is also in %s", split, leaked, share, other)
    return count


def assign(groups: np.ndarray, targets: np.ndarray, seed: int) -> np.ndarray:
    """Return the split (G,) of each group such that the sums over each split approximate its target.

    `groups` (G, F) and `targets` (S, F) count images, then other features. Each group is assigned to the split that has
    room and for which the sum of (count - target)^2 / target increases least.
    """
    groups, targets = groups.astype(float), targets.astype(float)
    rarity = np.where(groups > 0, groups.sum(0), np.inf).min(1)
    # large groups and rare labels, which are hard to place, go first
    order = np.lexsort((np.random.default_rng(seed).permutation(len(groups)), rarity, -groups[:, 0]))
    sums, chosen = np.zeros_like(targets), np.zeros(len(groups), int)
    for index in order:
        group = groups[index]
        excess = np.maximum(sums[:, 0] + group[0] - targets[:, 0], 0)
        cost = (group * (2 * (sums - targets) + group) / np.maximum(targets, 1)).sum(1)
        chosen[index] = np.lexsort((cost, excess))[0]
        sums[chosen[index]] += group
    return chosen


def regroup(
    splits: Mapping[str, Sequence[Row]], metadata: Mapping[str, Mapping[str, str]], seed: int
) -> dict[str, list[Row]]:
    """Return splits with each lesion in only one, of about the old sizes and label frequencies, in random order."""
    if len(splits) < 2:
        raise UserError(f"there is only the split {', '.join(splits)}; regrouping needs two or three")
    frame = _frame(splits, metadata)
    lesions, _ = frame.lesion.factorize()  # (N,) numbers from 0 in the order of first appearance
    columns = [LABELS.index(name) for name in PAPER_ORDER]
    counts = np.array([[1, *(row.labels[column] for column in columns)] for row in frame.row])  # (N, 7)
    groups = np.zeros((lesions.max() + 1, counts.shape[1]), int)
    np.add.at(groups, lesions, counts)
    targets = np.array([counts[frame.split == split].sum(0) for split in splits])
    chosen = assign(groups, targets, seed)[lesions]
    by_lesion, rng = np.argsort(lesions, kind="stable"), np.random.default_rng(seed)
    parts = {split: by_lesion[chosen[by_lesion] == number] for number, split in enumerate(splits)}
    return {split: [frame.row[index] for index in rng.permutation(part)] for split, part in parts.items()}


def write_splits(folder: str | Path, name: str, splits: Mapping[str, Sequence[Row]], metadata: Mapping) -> None:
    """Write `<name>_<split>.csv` and splits.json, with `metadata` and each file's hash and counts, in a new folder."""
    every = [row.fields for rows in splits.values() for row in rows]
    if other := set.union(*map(set, every)) - set.intersection(*map(set, every)):
        raise UserError(f"columns of the split tables differ ({', '.join(sorted(other))}); give all tables the same")
    with atomic_folder(folder) as unfinished:
        files = {}
        for split, rows in splits.items():
            path = unfinished / f"{name}_{split}.csv"
            write_table(path, list(every[0]), (row.fields for row in rows))
            files[path.name] = {"sha256": sha256(path), "images": len(rows), **count_labels(rows)}
        write_json(unfinished / RECORD, {**metadata, "files": files})


def check_folder(
    folder: str, images: str = "", list_missing: str = "", metadata: str = "", regroup_to: str = "", seed: int = 0
) -> None:
    """Log reports on the sets of splits in a folder, write the requested files, then raise for broken images."""
    if (regroup_to and not metadata) or (list_missing and not images) or seed < 0:
        raise UserError("--regroup needs --metadata, --list_missing needs --images, and --seed is 0 or more")
    for output in (regroup_to, list_missing):
        if output and Path(output).exists():
            raise UserError(f"{output!r} exists already; choose another name or move it away")
    sets, missing, faults = find_splits(folder), [], []
    if metadata and len(sets) > 1:
        raise UserError(f"{folder!r} holds the splits {', '.join(sets)}; --metadata needs a folder with one of them")
    for name, paths in sets.items():
        splits = read_splits(paths)
        for path in paths.values():
            logger.info("%s  %s", sha256(path), path)
        report_counts(splits)
        if images:
            absent, broken = check_images(splits, images)
            missing, faults = missing + absent, faults + broken
        if metadata:
            known = read_metadata(metadata)
            report_leakage(splits, known)
        if regroup_to:
            regrouped = regroup(splits, known, seed)
            sources = {path.name: sha256(path) for path in (*paths.values(), Path(metadata))}
            write_splits(regroup_to, name, regrouped, {"seed": seed, "made_from": sources})
            logger.info("written to %s, each lesion in one split", regroup_to)
            report_counts(regrouped)
            report_leakage(regrouped, known)
    if list_missing:
        write_table(list_missing, ("split", "image"), [*dict.fromkeys(missing)])  # tables may share images
    if faults:
        raise UserError(f"{len(faults)} broken images are listed above, the first: {faults[0]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and count split tables.")
    add_path(parser, "--splits", dest="folder", help="folder of *_train.csv, *_val.csv, *_test.csv")
    add_path(parser, "--images", optional=True, help="folder of <image>.jpg: count missing ones, decode all others")
    add_path(parser, "--list_missing", optional=True, help="CSV file to write: split and id of every missing image")
    add_path(parser, "--metadata", optional=True, help="ISIC_2019_Training_Metadata.csv: report lesions in two splits")
    add_path(parser, "--regroup", optional=True, dest="regroup_to", help="folder to write: splits that share no lesion")
    parser.add_argument("--seed", type=int, default=42, help="seed of --regroup, default 42")
    run_command(parser, check_folder, arguments)


if __name__ == "__main__":
    main()

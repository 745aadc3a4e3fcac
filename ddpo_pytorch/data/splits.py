"""Split tables as a whole: whether they are sound, what they count, whether one lesion is in two of them.

    python -m ddpo_pytorch.data.isic --splits DIR                       # checks, table 1, table 2's "# real" row
    python -m ddpo_pytorch.data.isic --splits DIR --images FOLDER       # and every image: there, and whole?
    python -m ddpo_pytorch.data.isic --splits DIR --metadata CSV        # and lesions that are in several splits
    python -m ddpo_pytorch.data.isic --splits DIR --metadata CSV --regroup OUT --seed S   # new splits without any

A set of splits is `<name>_train.csv`, `<name>_val.csv` and `<name>_test.csv` of one folder, or some of the three.
"""

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddpo_pytorch.data.image_paths import find_images, stem_of
from ddpo_pytorch.data.images import find_damage
from ddpo_pytorch.data.isic import Row, count_labels, count_single, file_key, image_key, read_split
from ddpo_pytorch.data.lesions import (
    RECORD,
    read_metadata,
    refuse_existing,
    regroup,
    report_leakage,
    write_splits,
)
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.utils.cli import add_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.json_files import read_json

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")


def find_splits(folder: str | Path) -> dict[str, dict[str, Path]]:
    """The sets of splits in a folder: files by train, val, test, by the name in front. UserError if there is none.

    Only names that end in exactly _train, _val or _test count: phantom_train_a.csv is a part of one, not a split.
    """
    if not Path(folder).is_dir():
        raise UserError(f"split folder {str(folder)!r} does not exist; give the folder of the *_train.csv files")
    found = defaultdict(dict)
    for split in SPLITS:
        for path in sorted(Path(folder).glob(f"[!.]*_{split}.csv")):
            found[path.stem.removesuffix(f"_{split}")][split] = path
    if not found:
        raise UserError(f"{str(folder)!r} holds no split table; they are named *_train.csv, *_val.csv, *_test.csv")
    return dict(found)


def read_splits(paths: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Read the tables of one set. Raises UserError as `read_split` does, and for an image that is in two of them.

    Where the folder holds the record that regrouping writes, a table that differs from its recorded hash is refused.
    """
    record = next(iter(paths.values())).parent / RECORD
    hashes: dict[str, str] = {}
    if record.is_file():
        files = read_json(record, {"files": {str: {"sha256": str}}}, "make the splits again")["files"]
        hashes = {name: file["sha256"] for name, file in files.items()}
    splits, owners = {}, {}
    for split, path in paths.items():
        splits[split] = read_split(path)
        if hashes.get(path.name, sha256(path)) != sha256(path):
            raise UserError(f"{str(path)!r} was changed after {RECORD} recorded its hash; make the splits again")
        for row in splits[split]:
            other = owners.setdefault(image_key(row.image), split)
            if other != split:
                raise UserError(
                    f"image {row.image!r} is in {str(paths[other])!r} ({other}) and in {str(path)!r} ({split}); keep "
                    "it in one of them"
                )
    return splits


def report_counts(splits: Mapping[str, Sequence[Row]]) -> None:
    """Log table 1 and, over train, the "# real" row of table 2."""
    logger.info("table 1  %7s" + " %6s" * 6, "images", *(name.replace("_bubble", "") for name in count_labels([])))
    for split, rows in splits.items():
        logger.info("%-8s %7d" + " %6d" * 6, split, len(rows), *count_labels(rows).values())
    if "train" in splits:
        single = count_single(splits["train"])
        heads = (f"{disease} {artifact.replace('_bubble', '')}" for disease, artifact in single)
        logger.info("table 2 " + " %9s" * 8, *heads)
        logger.info("# real  " + " %9d" * 8, *single.values())


def check_images(splits: Mapping[str, Sequence[Row]], folder: str | Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Decode every image of the splits: (split, image id) of those that are missing, and what is wrong with which file.

    Raises UserError if the folder does not exist or holds none of the images.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give the folder that holds <image>.jpg files")
    found, missing = [], []
    for split, rows in splits.items():
        names = [row.image for row in rows]
        paths = dict(zip(names, find_images(folder, map(stem_of, names), file_key), strict=True))
        there = [path for path in paths.values() if path]
        absent = [image for image, path in paths.items() if not path]
        found, missing = found + there, missing + [(split, image) for image in absent]
        downsampled = sum(path.stem.endswith("_downsampled") for path in there)
        some = f": {', '.join(absent[:5])}{', ...' if absent[5:] else ''}" if absent else ""
        logger.info("%-8s %d images (%d _downsampled), %d missing%s", split, len(there), downsampled, len(absent), some)
    if not found:
        raise UserError(f"none of the {len(missing)} images of the splits is in {str(folder)!r}")
    logger.info("decoding %d images", len(found))
    faults = [fault for fault in find_damage(found) if fault]
    logger.info("%s", "\n".join([f"{len(faults)} images are broken", *faults]))
    return missing, faults


def drop_broken(rows: Sequence[Row], paths: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """The rows whose image (at the same place in `paths`) can be decoded to its last pixel; warns of every other one.

    Raises UserError if none is left.
    """
    faults = dict(zip(paths, find_damage(paths), strict=True))
    kept = [(row, path) for row, path in zip(rows, paths, strict=True) if not faults[path]]
    for fault in filter(None, faults.values()):
        logger.warning("left out: %s", fault)
    if not kept:
        raise UserError(f"all {len(paths)} images are broken, the first: {faults[paths[0]]}")
    return [row for row, _ in kept], [path for _, path in kept]


def check_folder(
    folder: str, images: str = "", list_missing: str = "", metadata: str = "", regroup_to: str = "", seed: int = 0
) -> None:
    """What the module's command does: log the reports asked for on the sets of splits in a folder, write what is named.

    Raises UserError for whatever is wrong, broken images last, after everything else has been reported.
    """
    if (regroup_to and not metadata) or (list_missing and not images) or seed < 0:
        raise UserError("--regroup needs --metadata, --list_missing needs --images, and --seed is 0 or more")
    for output in filter(None, (regroup_to, list_missing)):
        refuse_existing(Path(output))
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
            made = regroup(splits, known, seed)
            about = {"seed": seed, "made_from": {path.name: sha256(path) for path in (*paths.values(), Path(metadata))}}
            write_splits(regroup_to, name, made, about)
            logger.info("written to %s, each lesion in one split", regroup_to)
            report_counts(made)
            report_leakage(made, known)
    if list_missing:
        write_table(list_missing, ("split", "image"), missing)
    if faults:
        raise UserError(f"{len(faults)} broken images are named above, the first: {faults[0]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and count split tables.")
    add_path(parser, "--splits", help="folder of *_train.csv, *_val.csv, *_test.csv")
    add_path(parser, "--images", optional=True, help="folder of <image>.jpg: count missing ones, decode all others")
    add_path(parser, "--list_missing", optional=True, help="CSV file to write: split and id of every missing image")
    add_path(parser, "--metadata", optional=True, help="ISIC_2019_Training_Metadata.csv: report lesions in two splits")
    add_path(parser, "--regroup", optional=True, help="folder to write: splits that have each lesion in one of them")
    parser.add_argument("--seed", type=int, default=42, help="of --regroup, default 42")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        check_folder(given.splits, given.images, given.list_missing, given.metadata, given.regroup, given.seed)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

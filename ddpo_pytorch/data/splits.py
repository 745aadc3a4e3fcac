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
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.images import find_damage, find_images, stem_of
from ddpo_pytorch.data.isic import Row, count_labels, count_single, file_key, image_key, read_split
from ddpo_pytorch.data.tables import read_table, write_table
from ddpo_pytorch.utils.cli import add_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_folder, sha256, write_json
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


RECORD = "splits.json"  # seed, and the hash of every table, of splits made here


def read_metadata(path: str | Path) -> dict[str, dict[str, str]]:
    """Return the columns of ISIC's metadata by `image_key`; at least image and lesion_id, which may be empty.

    Raises UserError as `tables.read_table` does and for images that appear twice.
    """
    table, faults = read_table(path, ("image", "lesion_id"), "metadata", optional=("source",))
    metadata = {}
    for line, fields in table:
        if image_key(fields["image"]) in metadata:
            faults.add(line, f"image {fields['image']!r} appears twice; remove one of them")
        metadata[image_key(fields["image"])] = fields
    faults.refuse()
    return metadata


def group_by_lesion(
    splits: Mapping[str, Sequence[Row]], metadata: Mapping[str, Mapping[str, str]]
) -> list[list[tuple[str, Row]]]:
    """(split, row) of all rows, one list a lesion; a row whose lesion is not known is a lesion of its own."""
    lesions = defaultdict(list)
    for split, rows in splits.items():
        for row in rows:
            lesion = metadata.get(image_key(row.image), {}).get("lesion_id", "").strip()
            lesions[("lesion", lesion) if lesion else ("image", row.image)].append((split, row))
    return list(lesions.values())


def report_leakage(splits: Mapping[str, Sequence[Row]], metadata: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Log lesions that are in more than one split and, where the metadata have a column source, images by source.

    Returns the number of such lesions and of their images. Raises UserError if the metadata know none of the images.
    """
    images = [image_key(row.image) for rows in splits.values() for row in rows]
    known = [image for image in images if image in metadata]
    if not known:
        raise UserError(f"the metadata have none of the {len(images)} images of the splits; give ISIC's own file")
    named = sum(bool(metadata[image]["lesion_id"].strip()) for image in known)
    logger.info("lesions  %d of %d images have a lesion_id; for the others leakage cannot be seen", named, len(images))
    shared = [group for group in group_by_lesion(splits, metadata) if len({split for split, _ in group}) > 1]
    count = len(shared), sum(len(group) for group in shared)
    logger.info("leakage  %d lesions, with %d images, are in more than one split", *count)
    for split, rows in splits.items():
        for other in (name for name in splits if name != split):
            both = [group for group in shared if any(name == other for name, _ in group)]
            leaked = sum(name == split for group in both for name, _ in group)
            if leaked:
                share = 100 * leaked / len(rows)
                logger.info("%-8s %d images (%.1f %%) show a lesion that is also in %s", split, leaked, share, other)
    if "source" in metadata[known[0]]:
        for split, rows in splits.items():
            sources = Counter(metadata.get(image_key(row.image), {}).get("source") or "unknown" for row in rows)
            logger.info("%-8s by source: %s", split, ", ".join(f"{name} {n}" for name, n in sorted(sources.items())))
    return count


def assign(groups: np.ndarray, targets: np.ndarray, seed: int) -> np.ndarray:
    """The split (G,) of each group such that the sums over each split come near its target.

    `groups` (G, F) and `targets` (S, F) count images in their first column and anything else to be kept in the others.
    A group goes where there is room for it and where the sum of (count - target)^2 / target grows least.
    """
    groups, targets = groups.astype(float), targets.astype(float)
    rarity = np.where(groups > 0, groups.sum(0), np.inf).min(1)
    # what is hard to place goes first, large groups and rare labels; what is left for the end fits anywhere.
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
    """The same rows with each lesion in one split only, sizes and label frequencies near those of `splits`.

    A function of the arguments; rows are in random order. Raises UserError for a single split.
    """
    if len(splits) < 2:
        raise UserError(f"there is only the split {', '.join(splits)}; regrouping needs two or three")
    groups, names, result = group_by_lesion(splits, metadata), list(splits), {name: [] for name in splits}
    counts = np.array([_totals([row for _, row in group]) for group in groups])
    targets = np.array([_totals(rows) for rows in splits.values()])
    for group, index in zip(groups, assign(counts, targets, seed), strict=True):
        result[names[index]] += [row for _, row in group]
    rng = np.random.default_rng(seed)
    return {name: [rows[index] for index in rng.permutation(len(rows))] for name, rows in result.items()}


def _totals(rows: Sequence[Row]) -> list[int]:
    return [len(rows), *count_labels(rows).values()]


def write_splits(folder: str | Path, name: str, splits: Mapping[str, Sequence[Row]], about: Mapping) -> None:
    """Write `<name>_<split>.csv` with every column and splits.json: `about`, and each file's hash and counts.

    The folder appears whole or not at all. Raises UserError if it exists, or if the tables have different columns.
    """
    folder = Path(folder)
    refuse_existing(folder)
    columns = list(next(row for rows in splits.values() for row in rows).fields)
    for row in (row for rows in splits.values() for row in rows):
        if set(row.fields) != set(columns):
            raise UserError(f"the columns of the split tables differ ({', '.join(set(row.fields) ^ set(columns))})")
    with atomic_folder(folder) as unfinished:
        files = {}
        for split, rows in splits.items():
            path = unfinished / f"{name}_{split}.csv"
            write_table(path, columns, (row.fields for row in rows))
            files[path.name] = {"sha256": sha256(path), "images": len(rows), **count_labels(rows)}
        write_json(unfinished / RECORD, {**about, "files": files})


def refuse_existing(path: Path) -> None:
    """Raise UserError if something is there already."""
    if path.exists():
        raise UserError(f"{str(path)!r} exists already; choose another name or move it away")


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

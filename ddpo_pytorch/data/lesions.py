"""Lesions in more than one split, and splits without any.

ISIC shows many lesions in several images, and a classifier tested on lesions it was trained on looks better than it is.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.isic import Row, count_labels, image_key
from ddpo_pytorch.data.tables import read_table, write_table
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_folder, sha256, write_json

logger = logging.getLogger(__name__)
RECORD = "splits.json"  # seed, and the hash of every table, of splits made here


def read_metadata(path: str | Path) -> dict[str, dict[str, str]]:
    """Return the columns of ISIC's metadata by `image_key`; at least image and lesion_id, which may be empty.

    Raises UserError as `csv_tables.read_table` does and for images that appear twice.
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

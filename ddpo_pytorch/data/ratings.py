"""Expert ratings of images, 1 (poor) to 3 (excellent): reading a table, means over raters, agreement.

An expert's level is the weight of a rating in means and losses. It never changes the rating itself.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ddpo_pytorch.data import tables as csv_tables
from ddpo_pytorch.data.fundus import (
    MODALITY,
    assign_patients,
    caption_fault,
    caption_of,
    patient_of,
    tidy_path,
)
from ddpo_pytorch.data.tables import choice, read_table
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault

COLUMNS = ("image_path", "rating", "modality", "expert_level", "prompt", "rater_id")
CLASSES = (1, 2, 3)


@dataclass(frozen=True)
class Rating:
    """One row: one expert's rating of an image for a prompt ("Fundus: <text>").

    `rating`, `quality`, `alignment` and `expert_level` are in [1, 3]; `quality` and `alignment` are None if the expert
    gave one rating for both. `rater_id` is "" if unknown. `path` is the image file.
    """

    image: str
    rating: float
    modality: str
    expert_level: float
    prompt: str
    rater_id: str
    quality: float | None
    alignment: float | None
    patient: str
    line: int
    path: Path = Path()

    def of(self, column: str) -> float:
        """Return the rating of "quality" or "alignment"."""
        apart = getattr(self, column)
        return self.rating if apart is None else apart


@dataclass(frozen=True)
class RatedImage:
    """Mean ratings of an image for a prompt.

    `quality` and `alignment`: means in [1, 3] over `ratings` rows, weighted by expert level. `weight`: mean level / 3.
    """

    image: str
    path: Path
    prompt: str
    quality: float
    alignment: float
    weight: float
    patient: str
    ratings: int

    def reward(self, column: str) -> float:
        """Return R = (r - 1) / 2 in [0, 1] of the column "quality" or "alignment"."""
        return (getattr(self, column) - 1) / 2


def read_ratings(path: str | Path, root: str | Path = "", within: str | Path = "") -> list[Rating]:
    """Read a table with image_path, rating, prompt and optionally the rest of COLUMNS, quality, alignment, patient.

    Without expert_level every expert has level 3; without rater_id every row is another rater. Image paths start from
    `root` or from the table's folder. Images must be in `root`, by default the table's folder, or in the folder
    `within`: a table from elsewhere cannot point to other files. See `tables.read_table` for the accepted spellings.

    Raises UserError that describes the first faults by line and counts the others: a rating or level that is no number
    from 1 to 3, a missing image or one elsewhere, an empty prompt, another modality, a second rating of the same image
    and prompt by one rater, an image of two patients, and commas that cannot be resolved.
    """
    required, optional = ("image_path", "rating", "prompt"), (*COLUMNS, "quality", "alignment", "patient")
    table, faults = read_table(path, required, "ratings table", optional, free_text="prompt")
    folders = _Folders(Path(path).parent, root, within)
    ratings, by_rater, patients = [], {}, {}
    for line, fields in table:
        rating, problems = _rating(fields, line, folders)
        key = (rating.rater_id, rating.image, rating.prompt)
        if by_rater.setdefault(key, line) != line and rating.rater_id:
            problems.append(
                f"rater {rating.rater_id!r} has rated image {rating.image!r} for this prompt in line {by_rater[key]} "
                "too; keep one of the two"
            )
        patient, first = patients.setdefault(rating.image, (rating.patient, line))
        if patient != rating.patient:
            problems.append(f"image {rating.image!r} is of patient {rating.patient!r}, in line {first} of {patient!r}")
        for text in problems:
            faults.add(line, text)
        ratings.append(rating)
    faults.refuse()
    if not ratings:
        raise UserError(f"ratings table {str(path)!r} has a header and no rows; scripts/rate.py adds them")
    return ratings


class _Folders:
    """The folders in which images of a table of ratings may be."""

    def __init__(self, table: Path, root: str | Path, within: str | Path):
        self.root = Path(root or table)
        self._starts = (self.root, table)
        self._allowed = [folder for folder in (str(self.root), str(within)) if folder]

    def find(self, image: str) -> tuple[str, Path, str | None]:
        """Return the image's path from `root`, its file, and the problem with it, or None."""
        if not image:
            return image, self.root, "the path of the image is empty"
        # links are not followed: ".." means what it meant where the table was written
        paths = [Path(os.path.normpath(start / image)) for start in self._starts]
        inside = [path for path in paths if any(not path_fault(os.path.relpath(path, one)) for one in self._allowed)]
        path = next(filter(os.path.isfile, inside), (inside or paths)[0])
        name = os.path.relpath(path, self.root)
        fault = None
        if not inside:
            folders = " and ".join(map(repr, self._allowed))
            fault = f"path {name!r} leads out of {folders}; if you trust the table, give its folder as rlhf.data_path"
        elif not os.path.isfile(path):
            fault = f"image {name!r} does not exist in {str(self.root)!r}; remove the row or restore the file"
        return name, path, fault


def _rating(fields: Mapping[str, str], line: int, folders: _Folders) -> tuple[Rating, list[str]]:
    """Return the rating of a row, with NaN for unreadable numbers, and its problems."""
    faults = []

    def number(name: str, hint: str = "") -> float:
        value = csv_tables.number(fields[name])
        if value is None or not 1 <= value <= 3:
            faults.append(f"{name} is {fields[name]!r}; allowed are 1 to 3{hint}")
        return math.nan if value is None else value

    image, path, fault = folders.find(tidy_path(fields["image_path"]))
    faults += filter(None, (fault, caption_fault(fields["prompt"], choice(fields, "modality", MODALITY))))
    level = number("expert_level", " (without this column all are 3)") if "expert_level" in fields else 3.0
    apart = {name: number(name) if choice(fields, name) else None for name in ("quality", "alignment")}
    rating = Rating(
        image=image,
        rating=number("rating"),
        modality=MODALITY,
        expert_level=level,
        prompt=caption_of(fields["prompt"]),
        rater_id=choice(fields, "rater_id"),
        **apart,
        patient=choice(fields, "patient", patient_of(image)),
        line=line,
        path=path,
    )
    return rating, faults


def aggregate(ratings: Sequence[Rating], root: str | Path = "") -> list[RatedImage]:
    """Return one entry for each (image, prompt), in the order of their first rows.

    The mean over its rows is sum(level * rating) / sum(level). `root` replaces the folder the ratings were read with.
    """
    images = []
    for (image, prompt), rows in _units(ratings).items():
        levels = [row.expert_level for row in rows]
        quality, alignment = (
            float(np.average([row.of(column) for row in rows], weights=levels)) for column in ("quality", "alignment")
        )
        path = Path(root) / image if root else rows[0].path
        weight = float(np.mean(levels)) / 3
        images.append(RatedImage(image, path, prompt, quality, alignment, weight, rows[0].patient, len(rows)))
    return images


def check_classes(images: Sequence[RatedImage], column: str = "quality") -> str:
    """Return a warning if no image has one of the ratings 1, 2, 3 (the one nearest to a mean), else "".

    Raises UserError if all images have the same rating.
    """
    counts = Counter(rating_class(getattr(image, column)) for image in images)
    if len(counts) < 2:
        which = f"all {len(images)} images are rated {next(iter(counts))}" if counts else "no image is rated"
        raise UserError(f"{which} ({column}); judges need images of at least two of the ratings 1, 2 and 3")
    absent = [value for value in CLASSES if not counts[value]]
    present = ", ".join(f"{counts[value]} of {value}" for value in CLASSES if counts[value])
    warning = f"no image is rated {absent[0]} ({column}; there are {present})" if absent else ""
    return warning and f"{warning}: scores near that rating will be guesses"


def rating_class(mean: float) -> int:
    """Return the rating 1, 2 or 3 nearest to a mean; halves round up."""
    return math.floor(mean + 0.5)


def split_by_patient(
    images: Sequence[RatedImage], share: float, seed: int
) -> tuple[list[RatedImage], list[RatedImage]]:
    """Split images by patient into (train, validation), with `share` of the images, and of each rating, in the latter.

    Raises UserError for a share outside (0, 1) and for a single patient.
    """
    if not 0 < share < 1:
        raise UserError(f"the validation share is {share}; allowed is a number between 0 and 1")
    kinds = [rating_class(image.quality) for image in images]
    numbers = assign_patients([image.patient for image in images], kinds, (1 - share, share), seed)

    train, val = [], []
    for image, number in zip(images, numbers, strict=True):
        (val if number else train).append(image)
    return train, val


def agreement(ratings: Sequence[Rating], column: str = "quality") -> dict[str, float | int | None]:
    """Measure the agreement of raters of the same image and prompt, in the column "quality" or "alignment".

    `alpha`: Krippendorff's, ordinal; 1 is agreement, 0 chance. `kappa`: Cohen's, quadratic weights, mean over the pairs
    of named raters. None if undefined: nothing rated twice, or all ratings equal. `images` rated at least twice,
    `pairs` of ratings of the same image, `raters` by name, `rater_pairs` behind `kappa`.
    """
    units = [[row.of(column) for row in rows] for rows in _units(ratings).values() if len(rows) > 1]
    by_rater = defaultdict(dict)
    for row in ratings:
        if row.rater_id:
            by_rater[row.rater_id][row.image, row.prompt] = row.of(column)
    kappas = []
    for one, other in combinations([by_rater[name] for name in sorted(by_rater)], 2):
        shared = sorted(one.keys() & other.keys())
        if len(shared) > 1:
            kappas.append(quadratic_kappa([one[key] for key in shared], [other[key] for key in shared]))
    kappas = [kappa for kappa in kappas if kappa is not None]
    return {
        "alpha": ordinal_alpha(units),
        "kappa": float(np.mean(kappas)) if kappas else None,
        "images": len(units),
        "pairs": sum(math.comb(len(unit), 2) for unit in units),
        "raters": len(by_rater),
        "rater_pairs": len(kappas),
    }


def ordinal_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Return Krippendorff's alpha for ordinal data; each unit holds the values that it was given, by any observers.

    alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck, with the coincidences o_ck (each ordered pair in a unit
    of m values counts 1 / (m - 1)), n_c = sum_k o_ck, n = sum_c n_c, and d_ck the square of the number of values from c
    to k by rank, sum_{g=c..k} n_g - (n_c + n_k) / 2 (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).
    Units with fewer than two values do not count. None if no unit has two, or all values are equal.
    """
    units = [list(unit) for unit in units if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    if len(values) < 2:
        return None
    rank = {value: index for index, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount([rank[value] for value in unit], minlength=len(values))
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(1)
    middles = totals.cumsum() - totals / 2
    distances = (middles[:, None] - middles) ** 2
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / expected)


def quadratic_kappa(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Cohen's kappa of two raters of the same items, with quadratic weights; None if all values are equal.

    1 - mean_i (a_i - b_i)^2 / mean_ij (a_i - b_j)^2.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    expected = ((a[:, None] - b) ** 2).mean()
    return float(1 - ((a - b) ** 2).mean() / expected) if expected else None


def _units(ratings: Iterable[Rating]) -> dict[tuple[str, str], list[Rating]]:
    units = defaultdict(list)
    for row in ratings:
        units[row.image, row.prompt].append(row)
    return units

"""Expert ratings of images, 1 (poor) to 3 (excellent); an expert's level weights a rating but never changes it."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.sample_folder import is_framed
from ddpo_pytorch.data.tables import number, read_table, tidy_path
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault

COLUMNS = ("image_path", "rating", "modality", "expert_level", "prompt", "rater_id")
APART = ("quality", "alignment", "patient")  # more columns, if quality and alignment were asked separately
CRITERIA = ("disc", "vessels", "contrast", "artifacts")  # of quality, if they were rated
CLASSES = (1, 2, 3)


@dataclass(frozen=True)
class Rating:
    """One expert's rating of an image for a prompt, in [1, 3].

    `apart`: those of quality, alignment and CRITERIA that were asked separately.
    """

    image: str
    rating: float
    expert_level: float
    prompt: str
    rater_id: str
    patient: str
    path: Path
    apart: Mapping[str, float]

    def of(self, column: str) -> float | None:
        """Return the rating of "quality" or "alignment", by default `rating`, or of a criterion, by default None."""
        return self.apart.get(column, None if column in CRITERIA else self.rating)


@dataclass(frozen=True)
class RatedImage:
    """Means in [1, 3], weighted by level, over the ratings of an image and prompt; `weight` is mean level / 3.

    `criteria`: means of those of CRITERIA that were rated.
    """

    image: str
    path: Path
    prompt: str
    quality: float
    alignment: float
    weight: float
    patient: str
    criteria: Mapping[str, float] = field(default_factory=dict)

    def reward(self, column: str) -> float:
        """Return R = (r - 1) / 2 in [0, 1] of "quality", "alignment" or a criterion, NaN if not rated."""
        return (({"quality": self.quality, "alignment": self.alignment} | self.criteria).get(column, math.nan) - 1) / 2


def read_ratings(path: str | Path, root: str | Path = "", within: str | Path = "") -> list[Rating]:
    """Read a table with image_path, rating, prompt and optionally the rest of COLUMNS, APART and CRITERIA.

    Without expert_level every expert has level 3; without rater_id every row counts as a different rater. Image paths
    are relative to `root` (by default the table's folder) or to the table's folder. Images must be in `root` or in
    the folder `within`, so that an untrusted table cannot point to other files.
    """
    table, root = Path(path).parent, Path(root or Path(path).parent)
    allowed = [folder for folder in (str(root), str(within)) if folder]
    patients: dict[str, tuple[str, int]] = {}
    only: list[str] = []

    def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[Rating, tuple | None, str]:
        # links are not resolved, so that ".." means the same as where the table was written
        paths = [Path(os.path.normpath(start / tidy_path(fields["image_path"]))) for start in (root, table)]
        inside = [file for file in paths if any(not path_fault(os.path.relpath(file, one)) for one in allowed)]
        file = next(filter(os.path.isfile, inside), (inside or paths)[0])
        image = os.path.relpath(file, root)
        if not fields["image_path"]:
            faults.append("the path of the image is empty")
        elif not inside:
            folders = " and ".join(map(repr, allowed))
            faults.append(f"path {image!r} leads out of {folders}; if you trust the table, give it as rlhf.data_path")
        elif not os.path.isfile(file):
            faults.append(f"image {image!r} does not exist in {str(root)!r}; remove the row or restore the file")
        if (mode := mode_of(fields)) in ("real", "pair"):
            faults.append(f"it is an answer of rate.py --mode={mode}; judges learn from those of --mode=rate")
        modality = fields.get("modality") or fundus.modality_of(fields["prompt"]) or fundus.MODALITY
        if fault := fundus.caption_fault(fields["prompt"], modality, only):
            faults.append(fault)
        values: dict[str, float | None] = {}
        for name in ("expert_level", "rating", "quality", "alignment", *CRITERIA):
            cell = fields.get(name, "3" if name == "expert_level" else "")
            values[name] = number(cell)
            if (cell or name in ("expert_level", "rating")) and not 1 <= (values[name] or 0) <= 3:
                hint = " (without this column all are 3)" * (name == "expert_level")
                faults.append(f"{name} is {cell!r}; allowed are 1 to 3{hint}")
        # a generated image shows no patient, so each counts as its own patient
        patient = fields.get("patient") or (image if is_framed(file) else fundus.patient_of(image))
        rater = fields.get("rater_id", "")
        other, first = patients.setdefault(image, (patient, line))
        if patient != other:
            faults.append(f"image {image!r} is of patient {patient!r}, in line {first} of {other!r}")
        prompt = fundus.caption_of(fields["prompt"], *only)
        given, level = values.pop("rating"), values.pop("expert_level")
        apart = {name: value for name, value in values.items() if value is not None}
        rating = Rating(image, given, level, prompt, rater, patient, file, apart)
        return rating, (rater, image, prompt) if rater else None, f"rater {rater!r} of image {image!r} for this prompt"

    required, optional = ("image_path", "rating", "prompt"), (*COLUMNS, *APART, *CRITERIA)
    advice = "scripts/rate.py adds them"
    return read_table(path, "ratings table", required, make, optional, free_text="prompt", advice=advice)


def mode_of(fields: Mapping[str, str]) -> str:
    """Return the mode of rate.py in which a row was answered, or "" if that is not known."""
    return fields.get("mode") or ("pair" if fields.get("other") else "rate" if fields.get("alignment") else "")


def aggregate(ratings: Sequence[Rating]) -> list[RatedImage]:
    """Return a RatedImage per (image, prompt), of means weighted by level."""
    images = []
    for (image, prompt), rows in _units(ratings).items():
        means = {}
        for name in ("quality", "alignment", *CRITERIA):
            if given := [(value, row.expert_level) for row in rows if (value := row.of(name)) is not None]:
                values, levels = zip(*given, strict=True)
                means[name] = float(np.average(values, weights=levels))
        rated = means.pop("quality"), means.pop("alignment"), float(np.mean([row.expert_level for row in rows])) / 3
        images.append(RatedImage(image, rows[0].path, prompt, *rated, rows[0].patient, means))
    return images


def check_classes(images: Sequence[RatedImage], column: str = "quality") -> str:
    """Return a warning naming a rating, 1 to 3, that no mean rounds to, or "". Raises UserError if all round to one."""
    counts = Counter(rating_class(getattr(image, column)) for image in images)
    if len(counts) < 2:
        rated = f"are rated {next(iter(counts))}" if counts else "are there"
        raise UserError(f"{len(images)} images {rated} ({column}); judges need at least two of the ratings 1, 2 and 3")
    if not (absent := [value for value in CLASSES if not counts[value]]):
        return ""
    present = ", ".join(f"{counts[value]} of {value}" for value in CLASSES if counts[value])
    return f"no image is rated {absent[0]} ({column}; there are {present}): scores near that rating will be guesses"


def rating_class(mean: float) -> int:
    """Round a mean to the rating 1, 2 or 3, half up."""
    return math.floor(mean + 0.5)


def split_by_patient(images: Sequence[RatedImage], share: float, seed: int) -> list[list[RatedImage]]:
    """Split images by patient into [train, validation], with about `share` of all and of each rating in the latter.

    Raises UserError for a share outside (0, 1), or if one of the two would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"the validation share is {share}; allowed is a number between 0 and 1")
    return fundus.divide_patients(images, [rating_class(one.quality) for one in images], (1 - share, share), seed)


def agreement(ratings: Sequence[Rating], column: str = "quality") -> dict[str, float | int | None]:
    """Measure the agreement between raters of the same image and prompt, in the column "quality" or "alignment".

    `alpha` is Krippendorff's (ordinal), `kappa` Cohen's (quadratic), averaged over pairs of named raters: 1 is perfect
    agreement, 0 chance, None undefined. `images` counts those rated at least twice, `pairs` their pairs of ratings.
    """
    units = [[row.of(column) for row in rows] for rows in _units(ratings).values() if len(rows) > 1]
    by_rater = defaultdict(dict)
    for row in ratings:
        if row.rater_id:
            by_rater[row.rater_id][row.image, row.prompt] = row.of(column)
    kappas = []  # Cohen's, 1 - mean_i (a_i - b_i)^2 / mean_ij (a_i - b_j)^2, of each pair of raters if defined
    for first, second in combinations(map(by_rater.get, sorted(by_rater)), 2):
        same = sorted(first.keys() & second.keys())
        a, b = (np.array([values[unit] for unit in same]) for values in (first, second))
        if len(same) > 1 and (expected := ((a[:, None] - b) ** 2).mean()):
            kappas.append(1 - ((a - b) ** 2).mean() / expected)
    return {
        "alpha": ordinal_alpha(units),
        "kappa": float(np.mean(kappas)) if kappas else None,
        "images": len(units),
        "pairs": sum(math.comb(len(unit), 2) for unit in units),
        "raters": len(by_rater),
        "rater_pairs": len(kappas),
    }


def ordinal_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Return Krippendorff's alpha of units, each a list of observers' values; None without two different values.

    alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck, with the coincidences o_ck (each ordered pair in a unit
    of m values counts 1 / (m - 1)), n_c = sum_k o_ck, n = sum_c n_c, and d_ck the square of the number of values from c
    to k by rank, sum_{g=c..k} n_g - (n_c + n_k) / 2 (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).
    """
    units = [list(unit) for unit in units if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    if len(values) < 2:
        return None
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount(np.searchsorted(values, unit), minlength=len(values))
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(1)
    middles = totals.cumsum() - totals / 2
    distances = (middles[:, None] - middles) ** 2
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / expected)


def fleiss_kappa(units: Iterable[Sequence[float]]) -> float | None:
    """Return Fleiss' kappa of units, each a list of readers' categories; None if all are equal.

    (P - E) / (1 - E), where P is the mean over units of the share of agreeing pairs of readers, and E the sum of the
    squared shares of the categories (Fleiss 1971).
    """
    units = [unit for unit in units if len(unit) > 1]
    counts = [np.array(list(Counter(unit).values())) for unit in units]
    shares = np.array(list(Counter(value for unit in units for value in unit).values()), float)
    expected = float(((shares / shares.sum()) ** 2).sum())
    agreed = np.mean([(n * (n - 1)).sum() / (n.sum() * (n.sum() - 1)) for n in counts]) if counts else 1.0
    return float((agreed - expected) / (1 - expected)) if len(shares) > 1 else None


def _units(ratings: Iterable[Rating]) -> dict[tuple[str, str], list[Rating]]:
    units = defaultdict(list)
    for row in ratings:
        units[row.image, row.prompt].append(row)
    return units

"""Degraded fundus images with simulated expert ratings whose truth is known."""

import argparse
import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.fundus import MODALITY, check_images, findings_of, is_good, load_split, modality_of
from ddpo_pytorch.data.images import RESIZES, load_pixels, save_image
from ddpo_pytorch.data.sample_folder import RECORD
from ddpo_pytorch.data.tables import Row, write_table
from ddpo_pytorch.phantoms import damage
from ddpo_pytorch.phantoms.drawing import check_record
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import LOCK, locked, sha256, write_json
from ddpo_pytorch.utils.randomness import text_number
from ddpo_pytorch.utils.settings import SHARE, ZERO_OR_MORE, check_ranges

logger = logging.getLogger(__name__)
STYLE = 2  # incremented when the degradations change, so that old and new rating sets never mix
COLUMNS = (*ratings.COLUMNS, *ratings.APART)
GRADES = (3, 2, 1)
ERRORS = {3: 0.04, 2: 0.12, 1: 0.25}  # probability that an expert of this level is off by one grade


def write_rating_set(
    rows: Sequence[Row],
    paths: Sequence[Path],
    out: str | Path,
    seed: int = 0,
    size: int = 64,
    resize: str = "fov",
    mismatched: float = 0.3,
    structural: float = 0.75,
    raters: int = 0,
) -> None:
    """Write, or complete, ratings.csv and images/<number>.png: each image in the grades 3 (unchanged), 2 and 1.

    A share `structural` is also written with STRUCTURAL damage. These, and images with vessel contrast below VISIBLE,
    written once and unchanged, have quality and alignment 1. Only fundus images get either, or erased vessels. Images
    with a `quality` below 3 in the table are left out.

    Names and order do not reveal the grade, which is the `quality`. A share `mismatched` of each grade has the caption
    of another image without a common finding and `alignment` 1 instead of 3; `rating` is the lower of the two. Raters:
    a faultless "truth" of level 3, or `raters` raters of levels 3, 2, 1, 3, ..., with errors as in ERRORS.
    """
    settings = dict(style=STYLE, seed=seed, size=size, resize=resize, raters=raters)
    settings |= dict(mismatched=mismatched, structural=structural)
    shares = mismatched in SHARE and structural in SHARE
    if not shares or resize not in RESIZES or min(size - 32, raters, seed) < 0:
        limits = f"size >= 32, resize of {', '.join(RESIZES)}, mismatched and structural in [0, 1]"
        raise UserError(f"a rating set needs {limits}, raters and seed >= 0, got {settings}")
    pairs = list(zip(rows, paths, strict=True))
    described = [[row.image, row.caption, row.patient, row.fields.get("quality"), sha256(path)] for row, path in pairs]
    settings |= dict(kinds=list(damage.KINDS), bands={str(grade): list(band) for grade, band in damage.BANDS.items()})
    settings |= dict(images=len(rows), sources=hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16])
    out = Path(out)
    with locked(out, "another --out"):
        check_record(out / RECORD, settings, occupied=any(path.name != LOCK for path in out.iterdir()))
        if (out / "ratings.csv").exists():  # the last file to be written
            return
        good = [(row, path) for row, path in pairs if is_good(row)]
        contrasts = [(row, path, damage.VISIBLE) for row, path in good]
        if retinal := modality_of(rows[0].caption) == MODALITY:
            contrasts = [(row, path, damage.vessel_contrast(_pixels(path, size, resize))) for row, path in good]
        visible = [one for one in contrasts if one[2] >= damage.VISIBLE]
        counts = len(rows), len(rows) - len(good), len(good) - len(visible), len(visible)
        logger.info(
            "%d images: %d left out because of their quality in the table, %d without and %d with visible vessels",
            *counts,
        )
        if not visible:
            raise UserError(f"none of the {len(rows)} images shows a retina of good quality; give others")
        rng = np.random.default_rng((seed, 1))
        truth = _true_ratings([row for row, _, _ in visible], mismatched, rng)
        jobs = [(row, path, grade, contrast >= damage.ERASABLE) for row, path, contrast in visible for grade in GRADES]
        ruined = rng.permutation(len(visible))[: round(retinal * structural * len(visible))]
        kinds = itertools.cycle(damage.STRUCTURAL)
        none = [(*visible[one][:2], kind, True) for one, kind in zip(ruined, kinds, strict=False)]
        none += [(row, path, "", True) for row, path, contrast in contrasts if contrast < damage.VISIBLE]
        truth += [dict(quality=1, alignment=1, prompt=row.caption, patient=row.patient) for row, *_ in none]
        numbers = rng.permutation(len(truth))
        write_json(out / RECORD, settings)
        for (row, path, change, erasable), rating, number in zip(jobs + none, truth, numbers, strict=True):
            rating["image_path"] = f"images/{number:06d}.png"
            if not (file := out / rating["image_path"]).exists():
                image, grade = _pixels(path, size, resize), change if isinstance(change, int) else 0
                rng_image = np.random.default_rng((seed, text_number(row.image), grade))
                if change not in (3, ""):
                    kind, strength = damage.draw_damage(grade, rng_image, erasable) if grade else (change, 1.0)
                    image = damage.degrade(image, kind, strength, rng_image)
                save_image(file, torch.from_numpy(image).permute(2, 0, 1))
        rated = _simulate_raters([truth[position] for position in np.argsort(numbers)], raters, rng)
        write_table(out / "ratings.csv", COLUMNS, rated)
        logger.info("%d ratings of %d images in %s", len(rated), len(truth), out)


@lru_cache(maxsize=1)  # the grades of an image are consecutive
def _pixels(path: Path, size: int, resize: str) -> np.ndarray:
    return load_pixels(path, size, resize).permute(1, 2, 0).numpy()


def _true_ratings(rows: Sequence[Row], mismatched: float, rng: np.random.Generator) -> list[dict]:
    """Return quality, alignment, prompt and patient of the three GRADES of every row, some with swapped captions."""
    count = len(rows)
    swapped = np.stack([rng.permutation(count) < round(mismatched * count) for _ in GRADES], axis=1)
    findings = [findings_of(row.caption) for row in rows]
    truth = []
    for index, row in enumerate(rows):
        for grade, swap in zip(GRADES, swapped[index], strict=True):
            prompt = row.caption
            if swap:
                others = (other for other in rng.permutation(count) if not findings[other] & findings[index])
                if (other := next(others, None)) is None:
                    raise UserError(f"no image shows anything else than {prompt!r}; set mismatched to 0")
                prompt = rows[other].caption
            truth.append(dict(quality=grade, alignment=1 if swap else 3, prompt=prompt, patient=row.patient))
    return truth


def _simulate_raters(truth: Sequence[dict], raters: int, rng: np.random.Generator) -> list[dict]:
    """Return the rows of ratings.csv: the ratings of every image by each rater."""
    people = [(f"rater{number + 1}", 3 - number % 3) for number in range(raters)]
    rows = []
    for image in truth:
        for rater, level in people or [("truth", 3)]:
            grades = {name: image[name] for name in ("quality", "alignment")}
            for name, grade in grades.items() if people else ():
                if rng.random() < ERRORS[level]:
                    grades[name] = int(rng.choice([other for other in (1, 2, 3) if abs(other - grade) == 1]))
            about = dict(modality=modality_of(image["prompt"]), expert_level=level, rater_id=rater)
            rows.append(image | grades | about | {"rating": min(grades.values())})
    return rows


def degrade_table(csv: str, data_path: str, limit: int, **settings) -> None:
    """Write a rating set of the first `limit` images of a table, or of all if 0. Raises UserError if it is negative."""
    check_ranges({"limit": limit}, {"limit": ZERO_OR_MORE}, "--")
    rows, paths, _ = load_split(csv, data_path, limit)
    check_images(paths)
    write_rating_set(rows, paths, **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Degrade fundus images in known ways: a rating set.")
    add_path(parser, "--csv", help="fundus table with the columns path and Text")
    add_path(parser, "--data_path", help="folder that the paths in the table are relative to")
    add_path(parser, "--out", help="folder to write: new, or the same set to complete")
    parser.add_argument("--resize", default="fov", help=f"how images become squares: {', '.join(RESIZES)}; default fov")
    for name, default, description in (
        ("seed", 0, "seed of kinds, strengths, names and swapped captions"),
        ("size", 64, "side in pixels"),
        ("limit", 0, "number of images from the start of the table; 0: all"),
        ("raters", 0, "number of raters who make errors; 0: a single faultless one"),
        ("mismatched", 0.3, "share with the caption of another image"),
        ("structural", 0.75, "share to write also with structural damage"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{description}; default {default}")
    run_command(parser, degrade_table, arguments)


if __name__ == "__main__":
    main()

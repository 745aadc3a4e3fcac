"""Fundus images spoilt in known ways and degrees: expert ratings whose truth is known, without experts.

`python -m ddpo_pytorch.phantoms.rating_sets --csv TABLE --data_path DIR --out OUT` writes such a rating set of the
images of a table: each as it is (rating 3), visibly spoilt (2) and badly spoilt (1).
"""

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.fundus import MODALITY, Row, check_images, load_split
from ddpo_pytorch.data.images import RESIZES, load_pixels, save_image
from ddpo_pytorch.data.tables import choice, number, write_table
from ddpo_pytorch.phantoms.damage import BANDS, ERASABLE, KINDS, VISIBLE, degrade, draw_damage, vessel_contrast
from ddpo_pytorch.utils.cli import add_path
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import LOCK, locked, sha256, write_json
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.randomness import text_number

logger = logging.getLogger(__name__)
STYLE = 1  # raised when an image is spoilt in another way, so that old and new rating sets never mix
COLUMNS = (*ratings.COLUMNS, "quality", "alignment", "patient")
ERRORS = {3: 0.04, 2: 0.12, 1: 0.25}  # chance that an expert of this level gives a grade next to the true one


@dataclass(frozen=True)
class _Source:
    row: Row
    path: Path
    erasable: bool


def write_rating_set(
    rows: Sequence[Row],
    paths: Sequence[Path],
    out: str | Path,
    seed: int = 0,
    size: int = 64,
    resize: str = "fov",
    mismatched: float = 0.3,
    raters: int = 0,
) -> None:
    """Write images/<number>.png and ratings.csv: of every image three, of the grades 3 (as it is), 2 and 1.

    Names and order do not give the grade away. `quality` is the grade. A share `mismatched` of each grade has the
    caption of another image that shares no finding with its own: `alignment` is 1 there, else 3; `rating` is the lower
    of both. One faultless rater "truth" of level 3, or `raters` raters of levels 3, 2, 1, 3, ..., who err as in ERRORS.

    Left out, with a count: images whose table gives a `quality` below 3, and those below VISIBLE. The next same call
    finishes an interrupted one. Raises UserError, touching nothing, where `out` holds something else, for impossible
    values, and if no image or no other caption is left.
    """
    if size < 32 or resize not in RESIZES or not 0 <= mismatched <= 1 or raters < 0 or seed < 0:
        raise UserError(
            f"size {size}, resize {resize!r}, mismatched {mismatched}, raters {raters}, seed {seed}: needed are "
            f"size >= 32, resize of {', '.join(RESIZES)}, mismatched in [0, 1], raters >= 0, seed >= 0"
        )
    out = Path(out)
    settings = dict(style=STYLE, seed=seed, size=size, resize=resize, mismatched=mismatched, raters=raters)
    settings |= dict(kinds=list(KINDS), bands={str(grade): list(band) for grade, band in BANDS.items()})
    settings |= dict(images=len(rows), sources=_digest(rows, paths))
    with locked(out, "another --out"):
        if not _complete(out, settings):
            _write_rating_set(rows, paths, out, settings)


def _write_rating_set(rows: Sequence[Row], paths: Sequence[Path], out: Path, settings: Mapping[str, Any]) -> None:
    seed, size, resize, mismatched = (settings[name] for name in ("seed", "size", "resize", "mismatched"))
    pairs = zip(rows, paths, strict=True)
    chosen = [(row, path) for row, path in pairs if number(choice(row.fields, "quality", "3")) == 3]
    sources = _visible(chosen, size, resize)
    logger.info(
        "%d images, of which %d have a lower quality in the table and %d show no vessels; %d are taken",
        len(rows), len(rows) - len(chosen), len(chosen) - len(sources), len(sources),
    )  # fmt: skip
    if not sources:
        raise UserError(f"none of the {len(rows)} images shows a retina in good quality; give others")
    rng = np.random.default_rng((seed, 1))
    truth = _true_ratings(sources, mismatched, rng)
    numbers = rng.permutation(len(truth))
    write_json(out / "record.json", settings)
    for index, source in enumerate(sources):
        files = [out / _image_path(number) for number in numbers[3 * index : 3 * index + 3]]
        _write_grades(source, files, seed, size, resize)
    rated = [dict(truth[at], image_path=_image_path(numbers[at])) for at in np.argsort(numbers)]
    given = _given_ratings(rated, settings["raters"], rng)
    write_table(out / "ratings.csv", COLUMNS, given)
    logger.info("%d ratings of %d images in %s", len(given), len(rated), out)


def _digest(rows: Sequence[Row], paths: Sequence[Path]) -> str:
    """Hash of the images' names in the table, captions, patients and contents, wherever the files lie."""
    about = [
        [row.image, row.caption, row.patient, row.fields.get("quality"), sha256(path)]
        for row, path in zip(rows, paths, strict=True)
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _complete(out: Path, settings: dict) -> bool:
    """Whether `out` holds the whole set already; UserError where it holds another or anything else."""
    record = out / "record.json"
    if record.exists():
        if changed := difference(read_json(record, advice="give a new folder"), settings):
            name, before, now = changed
            raise UserError(f"{str(out)!r} holds a rating set of {name} {before}, not {now}; give a new folder")
        return (out / "ratings.csv").exists()
    if any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{str(out)!r} holds something else than a rating set; give a new folder")
    return False


def _pixels(path: Path, size: int, resize: str) -> np.ndarray:
    return load_pixels(path, size, resize).permute(1, 2, 0).numpy()


def _visible(chosen: Sequence[tuple[Row, Path]], size: int, resize: str) -> list[_Source]:
    sources = []
    for row, path in chosen:
        contrast = vessel_contrast(_pixels(path, size, resize))
        if contrast >= VISIBLE:
            sources.append(_Source(row, path, contrast >= ERASABLE))
    return sources


def _image_path(number: int) -> str:
    return f"images/{number:06d}.png"


def _write_grades(source: _Source, files: Sequence[Path], seed: int, size: int, resize: str) -> None:
    """The grades 3, 2 and 1 of one image, those that are not there yet."""
    if all(file.exists() for file in files):
        return
    original = _pixels(source.path, size, resize)
    for grade, file in zip((3, 2, 1), files, strict=True):
        rng, image = np.random.default_rng((seed, text_number(source.row.image), grade)), original
        if grade < 3:
            image = degrade(original, *draw_damage(grade, rng, source.erasable), rng)
        if not file.exists():
            save_image(file, torch.from_numpy(image).permute(2, 0, 1))


def _true_ratings(sources: Sequence[_Source], mismatched: float, rng: np.random.Generator) -> list[dict]:
    """Quality, alignment, prompt and patient of the grades 3, 2 and 1 of every source."""
    count = len(sources)
    swapped = np.stack([rng.permutation(count) < round(mismatched * count) for _ in range(3)], axis=1)
    findings = [_findings(source.row.caption) for source in sources]
    truth = []
    for index, source in enumerate(sources):
        for grade, swap in zip((3, 2, 1), swapped[index], strict=True):
            prompt = source.row.caption
            if swap:
                others = (at for at in rng.permutation(count) if not findings[at] & findings[index])
                other = next(others, None)
                if other is None:
                    raise UserError(f"no image shows anything else than {prompt!r} does; set mismatched to 0")
                prompt = sources[other].row.caption
            truth.append(dict(quality=grade, alignment=1 if swap else 3, prompt=prompt, patient=source.row.patient))
    return truth


def _findings(caption: str) -> set[str]:
    """What a caption says the image shows, without the eye: parts between commas."""
    said = re.sub(r"^.*?\bshows\b", "", caption.lower())
    return {" ".join(re.sub(r"\b(left|right)\b|[.]", " ", part).split()) for part in said.split(",")} - {""}


def _given_ratings(truth: Sequence[dict], raters: int, rng: np.random.Generator) -> list[dict]:
    """Rows of ratings.csv: what each rater says of each image."""
    people = [(f"rater{number + 1}", 3 - number % 3) for number in range(raters)]
    rows = []
    for about in truth:
        for rater, level in people or [("truth", 3)]:
            said = {name: about[name] for name in ("quality", "alignment")}
            if people:
                said = {name: _heard(grade, ERRORS[level], rng) for name, grade in said.items()}
            row = about | said | dict(modality=MODALITY, expert_level=level, rater_id=rater)
            rows.append(row | {"rating": min(said.values())})
    return rows


def _heard(grade: int, error: float, rng: np.random.Generator) -> int:
    """The grade or, with this chance, one next to it."""
    if rng.random() >= error:
        return grade
    return int(rng.choice([other for other in (1, 2, 3) if abs(other - grade) == 1]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Spoil fundus images in known degrees: a rating set of known truth.")
    add_path(parser, "--csv", help="fundus table with the columns path and Text")
    add_path(parser, "--data_path", help="folder that the paths of the table start from")
    add_path(parser, "--out", help="folder to write: new, or the same set to be finished")
    parser.add_argument("--resize", default="fov", help=f"how images become squares: {', '.join(RESIZES)}; default fov")
    for name, default, what in (
        ("seed", 0, "of kinds, strengths, names and swapped captions"),
        ("size", 64, "side in pixels"),
        ("limit", 0, "take the first so many images of the table; 0: all"),
        ("raters", 0, "so many raters who err; 0: one who does not"),
        ("mismatched", 0.3, "share with the caption of another image"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what}; default {default}")
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows, paths, missing = load_split(given.pop("csv"), given.pop("data_path"), given.pop("limit"))
        check_images(paths)
        if missing:
            logger.info("%d rows of the table have no image", missing)
        write_rating_set(rows, paths, **given)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Training sets of table 4: which synthetic images to add to the real ones of each subgroup (combination of labels)."""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of, load_split
from ddpo_pytorch.data.sample_folder import captions_without_images, list_samples
from ddpo_pytorch.data.splits import read_splits
from ddpo_pytorch.data.tables import number as table_number
from ddpo_pytorch.judges.classifier_report import check_both_classes
from ddpo_pytorch.metrics.image_sets import lacking_images
from ddpo_pytorch.utils.cli import expand
from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
REAL, BALANCED = "real", "balanced"
RESERVED = (REAL, "train", "val", "test", "cache")  # names of folders and image sets
Ratio = float | str  # a number, or BALANCED


def parse_ratios(text: str) -> tuple[Ratio, ...]:
    """Parse "0.5,1x,balanced" as (0.5, 1.0, "balanced"). Raises UserError for other text and for repeated ratios."""
    words = [word.strip() for word in text.split(",")]
    ratios = tuple(word if word == BALANCED else table_number(word.removesuffix("x")) for word in words)
    usable = {ratio for ratio in ratios if ratio == BALANCED or (ratio and 0 < ratio < math.inf)}
    if len(usable) < len(words):
        raise UserError(f"--ratios={text} is unusable; give different numbers above 0 or {BALANCED}, comma-separated")
    return ratios


def parse_samples(given: Sequence[str]) -> dict[str, Path]:
    """Parse ["SD=folder", ...] as {"SD": folder}. Raises UserError for no entry, another form and repeated names.

    Names are used for folders: letters, digits and . + - _, starting with a letter or digit, case-insensitively unique.
    """
    folders = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", name):
            raise UserError(f"--samples={text} is unusable; write NAME=FOLDER with a NAME of letters, digits, . + - _")
        if name.lower() in {*RESERVED, *(other.lower() for other in folders)}:
            raise UserError(f"--samples={text}: the name {name!r} is taken; choose another")
        folders[name] = Path(expand(folder))
    if not folders:
        raise UserError("no folder of synthetic images is given; give one or more, --samples=SD=FOLDER")
    return folders


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse "0,1,2" as (0, 1, 2). Raises UserError unless they are different integers of 0 or more."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(f"--seeds={text} is unusable; give different integers of 0 or more, e.g. 0,1,2")
    return tuple(map(int, words))


def wanted_images(real: Mapping[str, int], ratio: Ratio) -> dict[str, int]:
    """Return the number of synthetic images to add per caption, given its number of real ones.

    A number adds `ratio` images per real one, rounded half up. BALANCED fills every caption up to the most common one.
    Captions without real images get none: the question is whether more images with the same labels help.
    """
    most, held = max(real.values(), default=0), {caption: count for caption, count in real.items() if count}
    if ratio == BALANCED:
        return {caption: most - count for caption, count in held.items()}
    return {caption: int(np.floor(float(ratio) * count + 0.5)) for caption, count in held.items()}


class Draw(NamedTuple):
    """Samples drawn from a list: ascending indices, their number by caption, and how many were missing by caption."""

    places: list[int]
    counts: dict[str, int]
    missing: dict[str, int]


def draw(captions: Sequence[str], wanted: Mapping[str, int], seed: int) -> Draw:
    """Draw `wanted[caption]` of the samples with these `captions`, without replacement; all if there are too few.

    The n-th sample of a caption gets a random number that depends on (seed, caption, n) only, and the smallest are
    drawn: folders sampled from the same noise contribute the same noise, and smaller draws are subsets of larger ones.
    """
    places, counts = [], {}
    for caption, count in wanted.items():
        members = [position for position, other in enumerate(captions) if other == caption]
        order = np.argsort(np.random.default_rng((seed, CAPTIONS.index(caption))).random(len(members)))
        places += [members[index] for index in order[:count]]
        counts[caption] = min(count, len(members))
    missing = {caption: count - counts[caption] for caption, count in wanted.items() if count > counts[caption]}
    return Draw(sorted(places), counts, missing)


@dataclass(frozen=True)
class Training:
    """One classifier, trained on real images and, unless `source` is "", on `drawn` samples of that folder."""

    name: str  # in table rows, the same for all seeds
    folder: str  # relative to the output
    seed: int
    source: str = ""
    drawn: Draw | None = None


def plan(
    real: Mapping[str, int], captions: Mapping[str, Sequence[str]], ratios: Sequence[Ratio], seeds: Sequence[int]
) -> list[Training]:
    """Return all training runs, seed by seed, each starting with the one on real images only.

    `real`: number of real training images by caption; `captions`: captions of the samples by folder name. Warns of
    missing samples. Raises UserError for a folder that would contribute no images.
    """
    trainings = []
    for seed in seeds:
        trainings.append(Training(REAL, f"{REAL}/seed{seed}", seed))
        for ratio in ratios:
            text, times = (ratio, ratio) if ratio == BALANCED else (f"{ratio:g}", f"{ratio:g}x")
            for source, samples in captions.items():
                drawn = draw(samples, wanted_images(real, ratio), seed)
                if not drawn.places:
                    taken = f"takes none of its {len(samples)} images of {len(set(samples))} captions"
                    advice = f"give samples of the {len(real)} captions of the real images, or a larger ratio"
                    raise UserError(f"--samples={source}=...: ratio {times} {taken}; {advice}")
                name = f"{REAL} + {times} {source}"
                if drawn.missing and seed == seeds[0]:
                    count, absent = len(drawn.missing), sum(drawn.missing.values())
                    logger.warning("%s: %d samples of %d captions are missing", name, absent, count)
                trainings.append(Training(name, f"{source}_{text}/seed{seed}", seed, source, drawn))
    return trainings


@dataclass(frozen=True)
class Data:
    """Image files and captions of the splits "train", "val" and "test" and of the sample folders, by name."""

    files: dict[str, ImageFiles]
    captions: dict[str, list[str]]

    @property
    def real(self) -> Counter:
        """Number of real training images by caption."""
        return Counter(self.captions["train"])

    def training_files(self, training: Training) -> ImageFiles:
        """Return the real training images, followed by the samples drawn for this run."""
        files = self.files["train"]
        if training.drawn is None:
            return files
        samples, places = self.files[training.source], training.drawn.places
        paths = [*files.paths, *(samples.paths[index] for index in places)]
        return ImageFiles(paths, torch.cat([files.targets, samples.targets[places]]), files.size)


def read_data(
    tables: dict[str, Path], images: str | Path, folders: dict[str, Path], classes: int, size: int, limit: int = 0
) -> Data:
    """Find the images of the splits `tables` ("train", "val", "test") and of sample folders; log missing ones.

    `limit`: number of real training images, 0 for all. Raises UserError for overlapping splits, and for a training or
    validation split without positives or negatives for one of the first `classes` labels.
    """
    files, captions = {}, {}
    read_splits(tables)
    for name, source in (tables | folders).items():
        if name in tables:
            rows, paths, missing = load_split(source, images)
            samples = [(path, row.caption) for path, row in zip(paths, rows, strict=True)]
            if name == "train" and 0 < limit < len(samples):
                chosen = np.sort(np.random.default_rng(0).permutation(len(samples))[:limit])
                samples = [samples[index] for index in chosen]
            logger.info("%s: %d images, %d rows without one are skipped", source, len(samples), missing)
        else:
            samples = list_samples(source)
            if lacking := captions_without_images(source, samples):
                logger.warning("%s", lacking_images(source, lacking))
            count = len({caption for _, caption in samples})
            logger.info("%s: %d synthetic images of %d subgroups", source, len(samples), count)
        captions[name] = [caption for _, caption in samples]
        targets = torch.tensor([labels_of(caption)[:classes] for caption in captions[name]], dtype=torch.float32)
        files[name] = ImageFiles([path for path, _ in samples], targets, size)
        if name in tables:
            check_both_classes(targets, LABELS[:classes], source, training=name != "test")
    return Data(files, captions)

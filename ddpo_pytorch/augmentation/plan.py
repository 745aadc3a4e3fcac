"""Training sets of table 4: the synthetic images that are added to the real ones.

A subgroup is a combination of labels, that is, a caption.
"""

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
from ddpo_pytorch.data.isic import CAPTIONS, LABELS, Row, labels_of, load_split
from ddpo_pytorch.data.sample_folder import captions_without_images, list_samples
from ddpo_pytorch.data.splits import read_splits
from ddpo_pytorch.judges.classifier_report import one_sided
from ddpo_pytorch.metrics.image_sets import lacking_images
from ddpo_pytorch.utils.cli import expand
from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
REAL, BALANCED = "real", "balanced"
Ratio = float | str  # a number, or BALANCED


def parse_ratios(text: str) -> tuple[Ratio, ...]:
    """Parse "0.5,1x,balanced" as (0.5, 1.0, "balanced"). Raises UserError for other text and for repeated ratios."""
    ratios = []
    for word in (word.strip() for word in text.split(",")):
        try:
            ratios.append(word if word == BALANCED else float(word.removesuffix("x")))
        except ValueError:
            ratios.append(math.nan)
        if ratios[-1] != BALANCED and not 0 < ratios[-1] < math.inf:
            raise UserError(f"--ratios={text}: ratio {word!r} is unusable; give numbers above 0 or {BALANCED}")
    if len(set(ratios)) < len(ratios):
        raise UserError(f"--ratios={text} repeats a ratio; give each once")
    return tuple(ratios)


def parse_samples(given: Sequence[str]) -> dict[str, Path]:
    """Parse ["SD=folder", ...] as {"SD": folder}. Raises UserError for no entry, another form and repeated names.

    Names become those of folders: letters, digits and . + - _, starting with a letter or digit, unique without case.
    """
    folders = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", name):
            raise UserError(f"--samples={text} is unusable; write NAME=FOLDER with a NAME of letters, digits, . + - _")
        if name.lower() in {REAL, *(other.lower() for other in folders)}:
            raise UserError(f"--samples={text}: the name {name!r} is taken; choose another")
        folders[name] = Path(expand(folder))
    if not folders:
        raise UserError("no folder of synthetic images is given; give one or more, --samples=SD=FOLDER")
    return folders


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse "0,1,2" as (0, 1, 2). Raises UserError for anything but different integers of 0 or more."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(f"--seeds={text} is unusable; give different integers of 0 or more, e.g. 0,1,2")
    return tuple(map(int, words))


def wanted_images(real: Mapping[str, int], ratio: Ratio) -> dict[str, int]:
    """Return the number of synthetic images to add for each caption, given its number of real ones.

    A number adds `ratio` images per real one, halves rounded up. BALANCED fills every caption up to the most common
    one. Captions without real images get none: the question is whether more images of the same labels help.
    """
    most = max(real.values(), default=0)
    return {
        caption: most - count if ratio == BALANCED else int(np.floor(float(ratio) * count + 0.5))
        for caption, count in real.items()
        if count
    }


class Draw(NamedTuple):
    """Samples drawn from a list: their indices, ascending; their number by caption; how many more were requested."""

    places: list[int]
    counts: dict[str, int]
    missing: dict[str, int]


def draw(captions: Sequence[str], wanted: Mapping[str, int], seed: int) -> Draw:
    """Draw `wanted[caption]` of the samples with these `captions`, without replacement; all if there are too few.

    The n-th sample of a caption gets a random number that depends on (seed, caption, n) alone, and the smallest are
    drawn. So folders sampled from the same noise contribute images of the same noise, and a smaller number is a subset
    of a larger one.
    """
    places, counts, missing = [], {}, {}
    for caption, count in wanted.items():
        own = [place for place, other in enumerate(captions) if other == caption]
        order = np.argsort(np.random.default_rng((seed, CAPTIONS.index(caption))).random(len(own)))
        places += [own[index] for index in order[:count]]
        counts[caption] = min(count, len(own))
        if count > len(own):
            missing[caption] = count - len(own)
    return Draw(sorted(places), counts, missing)


def minority(real: Mapping[str, int], share: float) -> set[str]:
    """Return the captions that make up less than `share` of the real training images, those without any included."""
    total = sum(real.values())
    return {caption for caption in CAPTIONS if real.get(caption, 0) < share * total}


@dataclass(frozen=True)
class Training:
    """One classifier, trained on real images and, unless `source` is "", on `drawn` samples of that folder.

    `folder` is relative to the output; `name`, that of table rows, is the same for all seeds.
    """

    name: str
    folder: str
    seed: int
    source: str = ""
    drawn: Draw | None = None


def plan(
    real: Mapping[str, int], captions: Mapping[str, Sequence[str]], ratios: Sequence[Ratio], seeds: Sequence[int]
) -> list[Training]:
    """Return all trainings, seed by seed, the one on real images alone first.

    `real`: number of real training images by caption; `captions`: those of the samples, by folder name. Raises
    UserError for a folder that would contribute no sample.
    """
    trainings = []
    for seed in seeds:
        trainings.append(Training(REAL, f"{REAL}/seed{seed}", seed))
        for ratio in ratios:
            text, times = (ratio, ratio) if ratio == BALANCED else (f"{ratio:g}", f"{ratio:g}x")
            for source, own in captions.items():
                drawn = draw(own, wanted_images(real, ratio), seed)
                if not drawn.places:
                    raise UserError(
                        f"--samples={source}=...: ratio {times} takes none of its {len(own)} images of {len(set(own))} "
                        f"captions; give samples of the {len(real)} captions of the real images, or a larger ratio"
                    )
                name = f"{REAL} + {times} {source}"
                trainings.append(Training(name, f"{source}_{text}/seed{seed}", seed, source, drawn))
    return trainings


@dataclass(frozen=True)
class Data:
    """Rows and image files of the three splits, and image files and captions of the samples by folder name."""

    rows: dict[str, list[Row]]
    files: dict[str, ImageFiles]
    samples: dict[str, ImageFiles]
    captions: dict[str, list[str]]

    @property
    def real(self) -> Counter:
        """Number of real training images by caption."""
        return Counter(row.caption for row in self.rows["train"])

    def training_files(self, training: Training) -> ImageFiles:
        """Return the real training images, followed by the samples drawn for this training."""
        files = self.files["train"]
        if training.drawn is None:
            return files
        samples, places = self.samples[training.source], training.drawn.places
        paths = [*files.paths, *(samples.paths[place] for place in places)]
        return ImageFiles(paths, torch.cat([files.targets, samples.targets[places]]), files.size)


def read_data(
    tables: Mapping[str, Path], images: str | Path, folders: Mapping[str, Path], classes: int, size: int, limit: int = 0
) -> Data:
    """Find the images of the splits `tables` ("train", "val", "test") and of sample folders; log what they lack.

    `classes`: number of labels; `size`: side in pixels; `limit`: number of real training images, 0 for all. Raises
    UserError for overlapping splits and for a training or validation split without positives or negatives of a label.
    """

    def image_files(paths: Sequence[Path], labels: Sequence[Sequence[int]]) -> ImageFiles:
        return ImageFiles(list(paths), torch.tensor([one[:classes] for one in labels], dtype=torch.float32), size)

    read_splits(tables)
    rows, files, samples, captions = {}, {}, {}, {}
    for split, table in tables.items():
        rows[split], paths, missing = load_split(table, images)
        if split == "train" and 0 < limit < len(paths):
            chosen = np.sort(np.random.default_rng(0).permutation(len(paths))[:limit])
            rows[split], paths = [rows[split][index] for index in chosen], [paths[index] for index in chosen]
        logger.info("%s: %d images, %d rows without one are skipped", table, len(paths), missing)
        files[split] = image_files(paths, [row.labels for row in rows[split]])
        for name, absent in one_sided(files[split].targets, LABELS[:classes]):
            message = f"{str(table)!r} has no {absent} of {name!r} among its {len(paths)} images"
            if split != "test":
                raise UserError(f"{message}; training needs both: add such images, or raise --limit if you gave one")
            logger.warning("%s; its AUC is undefined", message)
    for name, folder in folders.items():
        found = list_samples(folder)
        captions[name] = [caption for _, caption in found]
        if lacking := captions_without_images(folder, found):
            logger.warning("%s", lacking_images(folder, lacking))
        samples[name] = image_files([path for path, _ in found], [labels_of(caption) for caption in captions[name]])
        logger.info("%s: %d synthetic images of %d subgroups", folder, len(found), len(set(captions[name])))
    return Data(rows, files, samples, captions)

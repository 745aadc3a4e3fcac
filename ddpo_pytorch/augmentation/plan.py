"""What table 4 trains on: which synthetic images are added to the real ones.

A subgroup is a combination of labels, that is, a caption.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.utils.cli import expand
from ddpo_pytorch.utils.errors import UserError

REAL, BALANCED = "real", "balanced"
Ratio = float | str  # a number, or BALANCED


def parse_ratios(text: str) -> tuple[Ratio, ...]:
    """ "0.5,1x,balanced" -> (0.5, 1.0, "balanced"). Raises UserError for anything else, and for one given twice."""
    ratios = []
    for word in (word.strip() for word in text.split(",")):
        try:
            ratios.append(word if word == BALANCED else float(word.removesuffix("x")))
        except ValueError:
            ratios.append(math.nan)
        if ratios[-1] != BALANCED and not 0 < ratios[-1] < math.inf:
            raise UserError(f"ratio {word!r} is unusable; --ratios takes numbers above 0 and {BALANCED}, e.g. 0.5,1,2")
    if len(set(ratios)) < len(ratios):
        raise UserError(f"--ratios={text} names a ratio twice; give each once")
    return tuple(ratios)


def parse_samples(given: Sequence[str]) -> dict[str, Path]:
    """["SD=folder", ...] -> {"SD": folder}. Raises UserError for no entry, another form, or a name given twice.

    Names become those of folders: letters, digits and . + - _, begun by a letter or digit, differing in more than case.
    """
    folders = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", name):
            raise UserError(f"--samples={text} is unusable; write NAME=FOLDER with a NAME of letters, digits, . + - _")
        if name.lower() in {REAL, *(other.lower() for other in folders)}:
            raise UserError(f"--samples={text}: the name {name!r} is taken; give each folder a name of its own")
        folders[name] = Path(expand(folder))
    if not folders:
        raise UserError("there is no folder of synthetic images; give one or more, --samples=SD=FOLDER")
    return folders


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2). Raises UserError for other than numbers from 0 on, and for one given twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(f"--seeds={text} is unusable; give different whole numbers from 0 on, e.g. 0,1,2")
    return tuple(map(int, words))


def wanted_images(real: Mapping[str, int], ratio: Ratio) -> dict[str, int]:
    """Synthetic images to add for each caption, from its number of real ones.

    A number adds `ratio` images for each real one, halves rounded up. BALANCED fills every caption up to the commonest
    one. Captions without a real image get none in both: what is asked is whether more images of the same labels help,
    and neither the validation split nor the classifier without synthetic images could have learned of others.
    """
    most = max(real.values(), default=0)
    return {
        caption: most - count if ratio == BALANCED else int(np.floor(float(ratio) * count + 0.5))
        for caption, count in real.items()
        if count
    }


class Draw(NamedTuple):
    """Places in a list of samples, in order; how many are of each caption; and how many more were asked for."""

    places: list[int]
    counts: dict[str, int]
    missing: dict[str, int]


def draw(captions: Sequence[str], wanted: Mapping[str, int], seed: int) -> Draw:
    """Draw `wanted[caption]` of the samples with these `captions`, without replacement; all where there are too few.

    The n-th sample of a caption gets a random number that depends on (seed, caption, n) alone, and the smallest are
    drawn. So folders drawn from the same noise give images of the same noise, whatever was learned in between, and a
    smaller number gives a part of what a larger one gives.
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
    """Captions that make up less than `share` of the real training images, among them those that have none."""
    total = sum(real.values())
    return {caption for caption in CAPTIONS if real.get(caption, 0) < share * total}


@dataclass(frozen=True)
class Training:
    """One classifier: on real images and, unless `source` is "", on `drawn` of that folder's samples.

    `folder` is relative to the output; `name` is that of table rows and the same for all seeds.
    """

    name: str
    folder: str
    seed: int
    source: str = ""
    drawn: Draw | None = None


def plan(
    real: Mapping[str, int], captions: Mapping[str, Sequence[str]], ratios: Sequence[Ratio], seeds: Sequence[int]
) -> list[Training]:
    """All trainings, seed by seed; the first ones are on real images alone.

    `real`: real training images by caption; `captions`: those of each folder's samples, by its name. Raises UserError
    for a folder none of whose samples would be taken.
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
                        f"captions for the {len(real)} captions of the real training images; give samples of those, or "
                        "a larger ratio"
                    )
                trainings.append(
                    Training(f"{REAL} + {times} {source}", f"{source}_{text}/seed{seed}", seed, source, drawn)
                )
    return trainings

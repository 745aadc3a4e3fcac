"""Pictures in the report: thumbnails as data URIs, models side by side on the same noise, closest pairs."""

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ddpo_pytorch.data.images import read_rgb
from ddpo_pytorch.data.sample_folder import title_of
from ddpo_pytorch.metrics.image_sets import sort_captions
from ddpo_pytorch.utils.errors import UserError

SIDE, COLUMNS = 128, 6  # pixels of a thumbnail, thumbnails per row
Samples = Mapping[str, Sequence[tuple[Path, str]]]


class Picture(NamedTuple):
    """A thumbnail: data URI, width and height in pixels, alternative text."""

    source: str
    width: int
    height: int
    alt: str


class Album:
    """Makes thumbnails and collects the paths of unreadable files."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []

    def picture(self, path: str | Path, alt: str) -> Picture | None:
        """Return a thumbnail of at most `SIDE` pixels per side, or None if the image cannot be read."""
        try:
            image = read_rgb(path)
        except UserError:
            self.unreadable.append(str(path))
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        return Picture(f"data:image/jpeg;base64,{data}", image.width, image.height, alt)

    def grids(self, samples: Samples, captions: Sequence[str]) -> list[dict]:
        """Return a grid per caption as in figures 3 and 4: "rows" of pictures by title: real images, then each model.

        Models' pictures are in columns of the same noise with their "stems", which are [] for unrelated files.
        """
        models, made = {name: files for name, files in samples.items() if name != "real"}, []
        for caption in captions:
            stems, files = paired_files(models, caption, COLUMNS)
            if "real" in samples:
                real = [*_keyed(samples["real"], caption).values()][:COLUMNS]
                files = {title_of("real", samples["real"]): real} | files
            rows = {name: [self.picture(p, f"{name}, {p.stem}: {caption}") for p in own] for name, own in files.items()}
            if any(rows.values()):
                made.append({"caption": caption, "stems": stems, "rows": rows})
        return made

    def closest_pairs(self, closest: Sequence[Mapping], name: str) -> list[dict]:
        """Add to the pairs in metrics.json the pictures of the model's image and of its nearest training image."""
        pairs = []
        for pair in closest:
            generated = self.picture(pair["path"], f"{name}, {Path(pair['path']).stem}: {pair['caption']}")
            training = self.picture(pair["train"], f"training image {Path(pair['train']).stem}")
            pairs.append(pair | {"generated": generated, "training": training})
        return pairs


def rarest_first(captions: Sequence[str], real_images: Mapping[str, int] | None) -> list[str]:
    """Sort captions by number of real images, fewest first; ties are in the official order."""
    return sorted(sort_captions(captions), key=lambda caption: (real_images or {}).get(caption, 0))


def paired_files(sets: Samples, caption: str, columns: int) -> tuple[list[str], dict[str, list[Path]]]:
    """Return the stems of the first `columns` files of a caption that all sets have, and these files by set.

    Stems are in natural order: 2 before 10. The n-th files with a repeated stem (several generation seeds) are paired,
    second ones after all first ones. Sets without a common stem show their own first files, and stems are [].
    """
    keyed = {name: files for name, samples in sets.items() if (files := _keyed(samples, caption))}
    first = next(iter(keyed.values()), {})
    common = [key for key in first if all(key in files for files in keyed.values())][:columns]
    rows = {name: [files[key] for key in common or [*files][:columns]] for name, files in keyed.items()}
    return [stem for stem, _ in common], rows


def _keyed(samples: Sequence[tuple[Path, str]], caption: str) -> dict[tuple[str, int], Path]:
    seen, files = Counter(), {}
    for path, text in samples:
        if text == caption:
            stem = Path(path).stem
            files[stem, seen[stem]] = Path(path)
            seen[stem] += 1
    return dict(sorted(files.items(), key=lambda item: (item[0][1], natural(item[0][0]))))


def natural(stem: str) -> tuple[list[str | int], str]:
    """Return a sort key that orders names by the numbers in them: 0, 1, 2, 10."""
    # parts at odd indices are digits in every name, so numbers are compared with numbers
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", stem))], stem

"""Pictures of sets next to each other, and of samples next to their nearest training images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ddpo_pytorch.data.images import image_grid, load_image
from ddpo_pytorch.data.sample_folder import title_of
from ddpo_pytorch.metrics.image_sets import sort_captions

MAX_CAPTIONS, COLUMNS = 64, 8


def comparison(sets: Mapping[str, Sequence[tuple[Path, str]]]) -> Image.Image:
    """Draw the first image of each caption that all sets (by name) have, up to MAX_CAPTIONS, in a row per set."""
    first = {title_of(name, samples): {c: path for path, c in reversed(samples)} for name, samples in sets.items()}
    captions = sort_captions(set.intersection(*(set(paths) for paths in first.values())))[:MAX_CAPTIONS]
    parts = [captions[start : start + COLUMNS] for start in range(0, len(captions), COLUMNS)]
    return _sheet([(name, [paths[caption] for caption in part]) for part in parts for name, paths in first.items()])


def contact_sheet(pairs: Sequence[Mapping]) -> Image.Image:
    """Draw a row per pair {"path", "train", "distance"}: its distance, the sample, its training image."""
    return _sheet([(f"{pair['distance']:.4f}", [pair["path"], pair["train"]]) for pair in pairs])


def _sheet(rows: Sequence[tuple[str, Sequence[str | Path]]]) -> Image.Image:
    """Draw rows of images, each with its text on the left."""
    grids = [(text, image_grid(torch.stack([load_image(path) for path in paths]), len(paths))) for text, paths in rows]
    left = max((8 * len(text) for text, _ in grids), default=0)
    size = left + max((grid.width for _, grid in grids), default=1), sum(grid.height for _, grid in grids) or 1
    sheet, top = Image.new("RGB", size, "white"), 0
    for text, grid in grids:
        sheet.paste(grid, (left, top))
        ImageDraw.Draw(sheet).text((2, top + grid.height // 2 - 5), text, fill="black")
        top += grid.height
    return sheet

"""Pictures of sets next to each other, and of samples next to their nearest training images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ddpo_pytorch.data.images import image_grid, load_image
from ddpo_pytorch.metrics.image_sets import sort_captions

MAX_CAPTIONS = 64
WHITE = (255, 255, 255)


def comparison(sets: Mapping[str, Sequence[tuple[Path, str]]], columns: int = 8) -> Image.Image:
    """Draw the first image of every caption that all sets have, a row per set, up to MAX_CAPTIONS captions.

    `sets`: (file, caption) by model name. Names are written to the left of their rows.
    """
    first = {name: {caption: path for path, caption in reversed(samples)} for name, samples in sets.items()}
    captions = sort_captions(set.intersection(*(set(paths) for paths in first.values())))[:MAX_CAPTIONS]
    blocks = []
    for start in range(0, len(captions), columns):
        for name, paths in first.items():
            images = [load_image(paths[caption]) for caption in captions[start : start + columns]]
            blocks.append((name, image_grid(torch.stack(images), columns)))
    if not blocks:
        return Image.new("RGB", (1, 1), WHITE)
    width = max(8 * len(name) for name in first)
    sheet = Image.new("RGB", (width + blocks[0][1].width, sum(grid.height for _, grid in blocks)), WHITE)
    top = 0
    for name, grid in blocks:
        sheet.paste(grid, (width, top))
        ImageDraw.Draw(sheet).text((2, top + grid.height // 2 - 5), name, fill=(0, 0, 0))
        top += grid.height
    return sheet


def contact_sheet(pairs: Sequence[Mapping], columns: int = 4) -> Image.Image:
    """Draw pairs {"path", "train", "distance"}: the sample on the left, its training image on the right."""
    if not pairs:
        return Image.new("RGB", (1, 1), WHITE)
    grids = [
        image_grid(torch.stack([load_image(pair["path"]), load_image(pair["train"])]), columns=2) for pair in pairs
    ]
    width, height = grids[0].width + 8, grids[0].height + 14
    sheet = Image.new("RGB", (width * min(columns, len(pairs)), height * -(-len(pairs) // columns)), WHITE)
    for number, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        top, left = (number // columns) * height, (number % columns) * width
        sheet.paste(grid, (left, top + 14))
        ImageDraw.Draw(sheet).text((left + 2, top + 1), f"{pair['distance']:.4f}", fill=(0, 0, 0))
    return sheet

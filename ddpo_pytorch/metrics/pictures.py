"""Pictures of sets side by side, and of samples beside the training images nearest to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ddpo_pytorch.data.images import image_grid, load_image
from ddpo_pytorch.metrics.vocabulary import in_order

MOST_CAPTIONS = 64


def comparison(sets: Mapping[str, Sequence[tuple[Path, str]]], columns: int = 8) -> Image.Image:
    """The first image of every caption, a row a set, the sets' rows for the same captions below each other.

    `sets`: (file, caption) by model name, as `list_samples` gives them. The names stand at the left of their rows.
    Of more than MOST_CAPTIONS captions the first are shown.
    """
    first = {name: {caption: path for path, caption in reversed(samples)} for name, samples in sets.items()}
    captions = in_order(set.intersection(*(set(paths) for paths in first.values())))[:MOST_CAPTIONS]
    blocks = []
    for start in range(0, len(captions), columns):
        for name, paths in first.items():
            images = [load_image(paths[caption]) for caption in captions[start : start + columns]]
            blocks.append((name, image_grid(torch.stack(images), columns)))
    if not blocks:
        return Image.new("RGB", (1, 1), (255, 255, 255))
    width = max(8 * len(name) for name in first)
    sheet = Image.new("RGB", (width + blocks[0][1].width, sum(grid.height for _, grid in blocks)), (255, 255, 255))
    top = 0
    for name, grid in blocks:
        sheet.paste(grid, (width, top))
        ImageDraw.Draw(sheet).text((2, top + grid.height // 2 - 5), name, fill=(0, 0, 0))
        top += grid.height
    return sheet


def contact_sheet(pairs: Sequence[Mapping], columns: int = 4) -> Image.Image:
    """Pairs {"path", "train", "distance"} in their order: the sample at the left, its training image at the right."""
    cells = []
    for pair in pairs:
        images = torch.stack([load_image(pair["path"]), load_image(pair["train"])])
        grid = image_grid(images, columns=2)
        cell = Image.new("RGB", (grid.width + 8, grid.height + 14), (255, 255, 255))
        cell.paste(grid, (0, 14))
        ImageDraw.Draw(cell).text((2, 1), f"{pair['distance']:.4f}", fill=(0, 0, 0))
        cells.append(cell)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width, height = cells[0].size if cells else (1, 1)
    sheet = Image.new("RGB", (width * min(columns, len(cells) or 1), height * max(1, len(rows))), (255, 255, 255))
    for top, row in enumerate(rows):
        for left, cell in enumerate(row):
            sheet.paste(cell, (left * width, top * height))
    return sheet

"""The paper's tables 2 and 3 as Markdown ("n/a" is what could not be measured), and pictures of sets side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ddpo_pytorch.data.images import image_grid, load_image
from ddpo_pytorch.data.isic import CAPTIONS, SINGLE_ARTIFACT_CAPTIONS

# the paper's column order and titles of table 2.
ARTIFACT_TITLES = {"hair": "Hair", "gel_bubble": "Gel", "ink": "Ink", "ruler": "Ruler"}
DISEASE_ORDER = ("MEL", "NV")
NOT_AVAILABLE = "n/a"


def table2(models: Mapping[str, Mapping], real_images: Mapping[str, int] | None = None) -> str:
    """APR in percent for the 8 captions with one artifact: a row a model, above them the number of real images.

    `models`: metrics by model name, of which "APR_by_prompt" (ratios) is read. `real_images`: images by caption.
    """
    keys = [(disease, artifact) for disease in DISEASE_ORDER for artifact in ARTIFACT_TITLES]
    captions = [SINGLE_ARTIFACT_CAPTIONS[key] for key in keys]
    header = ["", *(f"{disease} {ARTIFACT_TITLES[artifact]}" for disease, artifact in keys)]
    rows = []
    if real_images is not None:
        rows.append(["# Real Sample", *(str(real_images.get(caption, 0)) for caption in captions)])
    for name, values in models.items():
        apr = values["APR_by_prompt"]
        rows.append([f"APR ↑ (%) {name}", *(_percent(apr.get(caption)) for caption in captions)])
    return markdown_table(header, rows)


def table3(models: Mapping[str, Mapping]) -> str:
    """APR (%), FID, LPIPS, FD-judge and mean reward over all captions: a row a model. `models`: metrics by name."""
    header = ["Model", "APR ↑ (%)", "FID ↓", "LPIPS ↓", "FD-judge ↓", "Reward ↑", "Images"]
    rows = [
        [
            name,
            _percent(values["APR"]),
            _number(values["FID"], ".2f"),
            _number(values["LPIPS"], ".3f"),
            _number(values["FD_judge"], ".4g"),  # the scale of its features is the judge's own
            _number(values["reward"], ".3f"),
            str(values["images"]),
        ]
        for name, values in models.items()
    ]
    return markdown_table(header, rows)


def comparison(sets: Mapping[str, Sequence[tuple[Path, str]]], columns: int = 8) -> Image.Image:
    """The first image of every caption, a row a set, the sets' rows for the same captions below each other.

    `sets`: (file, caption) by model name, as `list_samples` gives them. The names stand at the left of their rows.
    """
    first = {name: {caption: path for path, caption in reversed(samples)} for name, samples in sets.items()}
    captions = [caption for caption in CAPTIONS if all(caption in paths for paths in first.values())]
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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned Markdown, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ([cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in [header, rule, *rows])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(ratio: float | None) -> str:
    return NOT_AVAILABLE if ratio is None else f"{100 * ratio:.2f}"


def _number(value: float | None, form: str) -> str:
    return NOT_AVAILABLE if value is None else format(value, form)

"""The two pictures of a classifier's report: 2 x 2 counts, and how far its probabilities can be taken at their word."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WHITE, BLACK, GREY, LIGHT, BLUE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (225, 225, 225), (31, 98, 168)
COLUMNS = 3


def confusion_picture(rows: Sequence[Mapping]) -> Image.Image:
    """For every attribute its counts of images: the truth in rows, the prediction in columns.

    `rows` have what, threshold, tp, fp, fn, tn. A cell is the darker, the larger its share of the row, in percent below
    the count.
    """
    cell, left, top = 130, 110, 88
    panels = []
    for row in rows:
        panel, draw = _panel(left + 2 * cell + 30, top + 2 * cell + 34)
        middle = left + cell
        draw.text((middle, 8), row["what"], BLACK, _font(24), anchor="ma")
        draw.text((middle, 40), f"predicted (threshold {row['threshold']:.3f})", GREY, _font(15), anchor="ma")
        for x, word in enumerate(("absent", "present")):
            draw.text((left + cell * (x + 0.5), top - 6), word, BLACK, _font(15), anchor="ms")
        for y, (truth, counts) in enumerate(
            (("absent", (row["tn"], row["fp"])), ("present", (row["fn"], row["tp"]))),
        ):
            center = top + cell * (y + 0.5)
            draw.text((left - 10, center - 10), "truly", GREY, _font(15), anchor="rm")
            draw.text((left - 10, center + 10), truth, BLACK, _font(15), anchor="rm")
            for x, count in enumerate(counts):
                share = count / sum(counts) if sum(counts) else 0.0
                box = (left + cell * x, top + cell * y, left + cell * (x + 1), top + cell * (y + 1))
                draw.rectangle(box, _blend(BLUE, share), WHITE, 2)
                ink = WHITE if share > 0.5 else BLACK
                draw.text((left + cell * (x + 0.5), center - 8), str(count), ink, _font(28), anchor="mm")
                percent = f"{100 * share:.1f} %" if sum(counts) else "no image"
                draw.text((left + cell * (x + 0.5), center + 24), percent, ink, _font(15), anchor="mm")
        panels.append(panel)
    return _sheet(panels)


def reliability_picture(
    probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str], bins: int = 15
) -> Image.Image:
    """For every attribute, over `bins` bins of equal width: observed frequency against mean predicted probability.

    Calibrated probabilities lie on the dashed diagonal. Points are the larger, the more images are in their bin; below
    stand the numbers. `probabilities` and `truth` are (N, H).
    """
    side, left, top, bars = 450, 86, 58, 70
    right, bottom = left + side, top + side
    floor = bottom + 72 + bars
    panels = []
    for name, predicted, observed in zip(names, probabilities.T, truth.T, strict=True):
        panel, draw = _panel(right + 30, floor + 40)
        draw.text(((left + right) / 2, 12), name, BLACK, _font(24), anchor="ma")
        for tick in (0, 0.25, 0.5, 0.75, 1):
            x, y = left + side * tick, bottom - side * tick
            draw.line((x, top, x, bottom), LIGHT)
            draw.line((left, y, right, y), LIGHT)
            draw.text((x, bottom + 15), f"{tick:g}", GREY, _font(14), anchor="ma")
            draw.text((left - 16, y), f"{tick:g}", GREY, _font(14), anchor="rm")
        draw.rectangle((left, top, right, bottom), outline=GREY)
        for start in np.arange(0, side, 12):
            draw.line((left + start, bottom - start, left + start + 6, bottom - start - 6), GREY, 2)
        _vertical(panel, (24, (top + bottom) / 2), "observed frequency")
        draw.text(((left + right) / 2, bottom + 36), "mean predicted probability", BLACK, _font(16), anchor="ma")

        which = np.minimum((predicted * bins).astype(int), bins - 1)
        counts = np.bincount(which, minlength=bins)
        points = [
            (left + side * predicted[which == index].mean(), bottom - side * observed[which == index].mean())
            for index in np.flatnonzero(counts)
        ]
        draw.line(points, _blend(BLUE, 0.3), 2, joint="curve")
        for (x, y), count in zip(points, counts[counts > 0], strict=True):
            radius = 4 + 9 * (count / counts.max()) ** 0.5  # a bin of one image must not look like one of hundreds
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), BLUE, WHITE, 1)
        step = side / bins
        for index, count in enumerate(counts):
            height = (bars - 14) * count / counts.max()
            if count:
                box = (left + step * index + 2, floor - max(height, 1), left + step * (index + 1) - 2, floor)
                draw.rectangle(box, _blend(BLUE, 0.55))
                text, x = _short(int(count)), left + step * (index + 0.5)
                draw.text((x, floor - height - 3), text, BLACK, _font(12), anchor="ms")
        draw.line((left, floor, right, floor), GREY)
        draw.text(((left + right) / 2, floor + 8), "images in each bin", BLACK, _font(16), anchor="ma")
        panels.append(panel)
    return _sheet(panels)


def _panel(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    panel = Image.new("RGB", (width, height), WHITE)
    return panel, ImageDraw.Draw(panel)


def _sheet(panels: Sequence[Image.Image]) -> Image.Image:
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    width, height = panels[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), WHITE)
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * width, index // columns * height))
    return sheet


def _vertical(panel: Image.Image, center: tuple[float, float], text: str) -> None:
    font = _font(16)
    _, _, width, height = font.getbbox(text)
    label = Image.new("RGB", (int(width) + 2, int(height) + 4), WHITE)
    ImageDraw.Draw(label).text((1, 1), text, BLACK, font)
    label = label.rotate(90, expand=True)
    panel.paste(label, (int(center[0] - label.width / 2), int(center[1] - label.height / 2)))


def _short(count: int) -> str:
    """At most four characters, to fit above a bar."""
    for unit, divisor in (("M", 10**6), ("k", 10**3)):
        if count >= 10 * divisor:
            return f"{count // divisor}{unit}"
    return str(count)


def _blend(color: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(round(255 + (value - 255) * (0.06 + 0.94 * share)) for value in color)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)

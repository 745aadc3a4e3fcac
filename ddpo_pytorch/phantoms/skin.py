"""Dermoscopy-like images with exact labels, for use without ISIC.

A picture is drawn from its six labels: skin, one lesion (nevus or melanoma), then the artifacts of a dermatoscope.
`python -m ddpo_pytorch.phantoms.skin --out DIR` writes a world in the layout of ISIC 2019.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import save_picture
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.phantoms.drawing import POINTS, Sheet, blend, clouds, complete_world, direction, plane, step
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError

STYLE = 2  # incremented when pictures or labels change, so that old and new worlds never mix
COLUMNS = tuple("image MEL NV dark_corner hair gel_border gel_bubble ruler ink patches vasc label".split())
# counts of each combination of LABELS[:5] in ISIC 2019's 12,004 training images; three do not occur
ISIC_COUNTS = {
    "00000": 4344, "10000": 3051, "00001": 1242, "10001": 543, "00100": 520, "01000": 489, "00101": 440, "11000": 327,
    "10100": 294, "01001": 260, "10101": 116, "11001": 88, "00110": 75, "01100": 29, "11100": 28, "01110": 24,
    "10110": 22, "00010": 21, "01101": 21, "10111": 12, "11101": 11, "01010": 10, "00111": 10, "10010": 8,
    "11010": 7, "11110": 5, "00011": 4, "10011": 2, "01111": 1,
}  # fmt: skip
RARE = 0.1  # share of images drawn uniformly from these combinations, since some are too rare to learn
SKIN_TONES = np.array([[242, 214, 200], [236, 192, 178], [222, 176, 146], [196, 145, 110], [158, 108, 78]], np.float32)
NEVUS_BROWNS = np.array([[142, 89, 60], [120, 74, 50], [92, 56, 38]], np.float32)
MELANOMA_REGIONS = (((164, 88, 76), 0.52, 0.8), ((100, 110, 130), 0.5, 0.85), ((28, 21, 21), 0.46, 0.95))


def sample_labels(rng: np.random.Generator, balanced: bool = False) -> tuple[int, ...]:
    """Draw six labels in the order of LABELS, nearly as frequent as in ISIC, or uniformly if `balanced`."""
    if balanced:
        five = [int(value) for value in rng.random(5) < 0.5]
    else:
        counts = np.array(list(ISIC_COUNTS.values()))
        chances = (1 - RARE) * counts / counts.sum() + RARE / len(counts)
        five = [int(digit) for digit in rng.choice(list(ISIC_COUNTS), p=chances)]
    return (*five, 1 - five[4])


def draw(labels: Sequence[int], rng: np.random.Generator, size: int = POINTS) -> np.ndarray:
    """Draw the picture of six 0/1 labels, with one of MEL and NV set: uint8 (size, size, 3).

    Each layer has its own random stream, so that equal generators draw the same lesion with and without an artifact.
    """
    if len(labels) != len(LABELS) or any(value not in (0, 1) for value in labels) or sum(labels[4:]) != 1:
        raise UserError(f"labels {tuple(labels)} cannot be drawn; give 0 or 1 for each of {LABELS}, one of MEL, NV set")
    hair, gel_bubble, ruler, ink, melanoma, _ = labels
    layers = [np.random.default_rng(seed) for seed in rng.integers(2**63, size=7)]
    centre, radius = layers[0].uniform(28, 36, size=2).astype(np.float32), layers[0].uniform(13, 18)
    image = (_melanoma if melanoma else _nevus)(_skin(layers[1], 2 * size), layers[2], centre, radius)
    image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
    # from bottom to top: ink on the skin, hair, gel, and the ruler on the glass
    image = _ink(image, layers[3], centre, radius) if ink else image
    image = _hair(image, layers[4]) if hair else image
    image = _gel_bubbles(image, layers[5]) if gel_bubble else image
    image = _ruler(image, layers[6]) if ruler else image
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _skin(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Draw mottled skin of any tone, lit from one side, darker in the corners: float32 (pixels, pixels, 3)."""
    x, y = plane(pixels)
    mottling, redness, grain = clouds(rng, pixels, 4), clouds(rng, pixels, 3, 2), clouds(rng, pixels, 28, 2)
    tilt = rng.uniform(0.0, 0.002) * direction(rng.uniform(0, 2 * math.pi))
    vignette = rng.uniform(0.08, 0.24) * (((x - 32) ** 2 + (y - 32) ** 2) / 2048) ** 1.5
    light = (1 + tilt[0] * (x - 32) + tilt[1] * (y - 32)) * (1 - vignette) + 0.035 * mottling + 0.018 * grain
    image = rng.choice(SKIN_TONES) * np.float32(rng.uniform(0.97, 1.03, size=3)) * light[..., None]
    return image + redness[..., None] * np.array([2.0, -4.0, -3.0], np.float32)


def _blob(rng: np.random.Generator, pixels: int, centre: np.ndarray, stretch: float, waves: range, by: float):
    """Return elliptic distance and angle from `centre`, and a wavy outline in radii, each (pixels, pixels)."""
    (x, y), axis = plane(pixels), direction(rng.uniform(0, math.pi))
    along = (axis[0] * (x - centre[0]) + axis[1] * (y - centre[1])) / stretch
    across = (axis[0] * (y - centre[1]) - axis[1] * (x - centre[0])) * stretch
    angle = np.arctan2(across, along)
    bumps = sum(rng.uniform(0.4, 1) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in waves)
    return np.sqrt(along**2 + across**2), angle, 1 + by * bumps


def _network(rng: np.random.Generator, pixels: int, period: float) -> np.ndarray:
    """Draw a pigment network, 0.5 on its cords and -0.5 in its holes: three plane waves distorted by noise."""
    x, y = plane(pixels)
    bend, turn = 2.0 * clouds(rng, pixels, 8, 2), rng.uniform(0, math.pi)
    waves = (2 * math.pi / period * direction(turn + k * 2 * math.pi / 3) for k in range(3))
    return step(0.2 - sum(np.cos(wave[0] * x + wave[1] * y + bend) for wave in waves), 2.2) - 0.5


def _nevus(image: np.ndarray, rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Draw a round, evenly brown nevus with a soft border, usually with a fine pigment network that fades outwards."""
    pixels = len(image)
    distance, _, outline = _blob(rng, pixels, centre, rng.uniform(0.93, 1.09), range(2, 5), 0.025)
    inside = step(0.92 * radius * outline + 0.35 * clouds(rng, pixels, 10, 1) - distance, rng.uniform(3.5, 6.5))
    outward = (distance / radius) ** 2
    shade = 1 + rng.uniform(-0.1, 0.2) * outward + 0.07 * clouds(rng, pixels, 7)
    network = _network(rng, pixels, rng.uniform(3.6, 4.6)) * np.clip(1.2 - outward, 0, 1)
    shade -= (0.0, 0.16, 0.24)[rng.integers(3)] * network
    brown = rng.choice(NEVUS_BROWNS) * np.float32(rng.uniform(0.94, 1.06, size=3))
    brown *= min(max(float(image.mean()) / 190, 0.72), 1.0)  # a brown mole stays darker than brown skin
    return blend(image, brown * shade[..., None], 0.95 * inside)


def _melanoma(image: np.ndarray, rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Draw an asymmetric, ragged melanoma: brown with black, blue-grey and reddish regions."""
    pixels, (x, y) = len(image), plane(len(image))
    ragged, uneven = clouds(rng, pixels, 7, 2), clouds(rng, pixels, 9)
    distance, angle, outline = _blob(rng, pixels, centre, rng.uniform(1.06, 1.22), range(1, 7), 0.09)
    sharpness = 3.0 + 1.6 * np.cos(angle + rng.uniform(0, 2 * math.pi))  # abrupt on one side, fading on the other
    inside = step(1.04 * radius * outline + 1.8 * ragged - distance, sharpness)
    lesion = np.full_like(image, np.float32([108, 66, 44]) * rng.uniform(0.85, 1.15))
    start = rng.uniform(0, 2 * math.pi)
    for turn, (colour, reach, opacity) in enumerate(MELANOMA_REGIONS):
        heading = direction(start + turn * 2 * math.pi / 3 + rng.uniform(-0.5, 0.5))
        at = centre + rng.uniform(0.4, 0.62) * radius * heading
        gap = np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2)
        edge = reach * radius * rng.uniform(0.8, 1.25) + (5.0 * ragged if turn % 2 else 4.0 * uneven)
        lesion = blend(lesion, colour, opacity * step(edge - gap, 7.0))
    shade = 1 + 0.17 * uneven - 0.26 * _network(rng, pixels, rng.uniform(4.2, 6.0))
    return blend(image, lesion * shade[..., None], 0.96 * inside)


def _hair(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw four to eight long dark hairs of similar direction, each with a faint shadow."""
    sheet, lie = Sheet(len(image)), rng.uniform(0, math.pi)
    for _ in range(rng.integers(4, 9)):
        along = direction(lie + rng.normal(0, 0.4))
        across = along[::-1] * (-1, 1)
        middle = 32 + across * rng.uniform(-27, 27) + along * rng.uniform(-8, 8)
        root, tip, sag = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(-14, 14)
        sheet.stroke(middle - along * root, middle + across * sag, middle + along * tip, rng.uniform(1.0, 1.5))
    shadow, colour = np.roll(sheet.alpha(blur=0.8), 1, axis=(0, 1)), rng.uniform(0.7, 1.4) * np.array([38, 26, 20])
    return blend(image * (1 - 0.16 * shadow)[..., None], colour, 0.92 * sheet.alpha())


def _gel_bubbles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw four to seven air bubbles in gel: a bright ring between dark lines, a clear middle, a highlight."""
    light, dark, placed = Sheet(len(image)), Sheet(len(image)), []
    shine, wanted = 0.5 * direction(rng.uniform(-2.6, -2.0)), rng.integers(4, 8)
    while len(placed) < wanted:
        centre, radius = rng.uniform(5, 59, size=2), rng.uniform(3.0, 6.8) if len(placed) < 3 else rng.uniform(2.4, 4.2)
        if any(math.dist(centre, other) < radius + reach + 0.5 for other, reach in placed):
            continue
        placed.append((centre, radius))
        for inset, strength in ((-0.5, 0.35), (0.9, 0.5), (1.7, 0.0)):
            dark.disc(centre, radius - inset, strength)
        light.disc(centre, radius, 0.95)
        light.disc(centre, radius - 1.1, 0.3)
        light.disc(centre + radius * shine, 0.24 * radius + 0.25)
    return blend(image * (1 - 0.7 * dark.alpha())[..., None], (255, 252, 248), light.alpha())


def _ruler(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a line with tick marks along one edge, every fifth one longer, as etched into the contact glass."""
    sheet, spacing, long_tick = Sheet(len(image)), rng.uniform(3.6, 4.8), rng.integers(5)
    inset, tilt, width = rng.uniform(0.5, 3.0), rng.uniform(-0.05, 0.05), rng.uniform(0.9, 1.2)
    along, across, corner = np.array([1, tilt]), np.array([-tilt, 1]), np.array([0, inset - 32 * tilt])
    sheet.stroke(corner, corner + 32 * along, corner + 64 * along, width)
    for index, at in enumerate(np.arange(rng.uniform(0, spacing), POINTS, spacing)):
        foot, length = corner + at * along, 9.5 if index % 5 == long_tick else 5.0
        sheet.stroke(foot, foot + across, foot + length * across, width)
    return blend(image, (26, 26, 34), 0.9 * np.rot90(sheet.alpha(), rng.integers(4)))


def _ink(image: np.ndarray, rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Draw a surgical marker's gentian violet: strokes or dots around the lesion, soaked into the skin."""
    sheet, start, dots = Sheet(len(image)), rng.uniform(0, 2 * math.pi), rng.random() < 0.35
    count = int(rng.integers(3, 6))
    for turn in range(count):
        heading = start + turn * 2 * math.pi / count + rng.uniform(-0.25, 0.25)
        near = centre + (radius + rng.uniform(3, 5)) * direction(heading)
        side = (0.1 if dots else rng.uniform(5, 9)) * direction(heading + math.pi / 2 + rng.uniform(-0.4, 0.4))
        bend = near if dots else near + 4 * direction(heading)
        sheet.stroke(near - side, bend, near + side, rng.uniform(4.8, 6.4) if dots else rng.uniform(2.4, 3.6))
    violet = np.array([92, 46, 158]) + rng.uniform(-1, 1) * np.array([26, -6, 8])
    soaked = np.clip(0.86 + 0.16 * clouds(rng, len(image), 14, 2), 0.55, 0.97)
    return blend(image, violet, soaked * np.maximum(sheet.alpha(blur=0.5), 0.35 * sheet.alpha(blur=1.6)))


def write_world(
    folder: str | Path,
    num_train: int,
    num_val: int,
    num_test: int,
    seed: int,
    size: int = POINTS,
    balanced: bool = False,
) -> None:
    """Write images/<image>.jpg and splits/phantom_{train,val,test}.csv in the layout of ISIC 2019, or complete them.

    Image i depends only on (seed, i, size) and `balanced` (see `sample_labels`). phantom_train_{a,b}.csv are halves of
    the training rows, for the reward classifier and the judge.
    """
    world = dict(style=STYLE, seed=seed, size=size, num_train=num_train, num_val=num_val, num_test=num_test)
    world |= {"balanced": True} if balanced else {}
    if min(world.values()) < 0 or size < 16:
        raise UserError(f"a phantom world needs numbers >= 0 and size >= 16, got {world}")

    def draw_images() -> dict[str, list[dict]]:
        rows = []
        for index in tqdm(range(num_train + num_val + num_test), desc="drawing", unit="image", disable=None):
            rng, path = np.random.default_rng((seed, index)), Path(folder) / "images" / f"PHANTOM_{index:07d}.jpg"
            labels = sample_labels(rng, balanced)
            row = dict.fromkeys(COLUMNS, 0) | dict(zip(LABELS, labels, strict=True)) | {"image": path.stem}
            rows.append(row | {"MEL": float(row["MEL"]), "NV": float(row["NV"]), "label": row["MEL"]})
            if not path.exists():
                save_picture(path, Image.fromarray(draw(labels, rng, size)))
        train, val, test = rows[:num_train], rows[num_train : num_train + num_val], rows[num_train + num_val :]
        return {"train": train, "val": val, "test": test, "train_a": train[::2], "train_b": train[1::2]}

    complete_world(Path(folder), world, "phantom", COLUMNS, draw_images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a world of dermoscopy-like images in the layout of ISIC 2019.")
    add_path(parser, "--out", dest="folder", help="folder to write: new, or the same world to complete")
    for name, default in (("num_train", 10000), ("num_val", 1000), ("num_test", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--balanced", action="store_true", help="all combinations of labels equally often")
    run_command(parser, write_world, arguments)


if __name__ == "__main__":
    main()

"""Synthetic fundus photographs with exact findings, for use without ODIR. Geometry is in points from the top left.

`python -m ddpo_pytorch.phantoms.fundus --out DIR` writes a world in the layout of ODIR-5K.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import save_picture
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.phantoms.damage import degrade, draw_damage
from ddpo_pytorch.phantoms.drawing import POINTS, Sheet, blend, clouds, complete_world, direction, plane, step
from ddpo_pytorch.utils.cli import add_path, run_command
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import SHARE

STYLE = 1  # incremented when the drawing code changes pictures, so that old and new worlds never mix
COLUMNS = ("path", "Text", "modality", "patient", "eye", "age", "sex", "quality")
EYES = ("left", "right")
# findings as worded in ODIR's captions, with frequencies as uneven as in real archives
FINDINGS = {
    "normal fundus": 0.36,
    "drusen": 0.2,
    "glaucoma": 0.18,
    "severe nonproliferative retinopathy": 0.15,
    "pathological myopia": 0.11,
}
SAME = 0.5  # probability that the second eye has the first eye's finding; otherwise it is drawn independently
TONES = np.array([[206, 108, 56], [188, 88, 48], [172, 98, 60], [212, 128, 88], [158, 80, 52]], np.float32)
APERTURE = 31.0  # radius of the field


@dataclass(frozen=True)
class Look:
    """Appearance shared by both eyes of a patient: colour (RGB), lengths in points, cup-to-disc ratio."""

    tone: np.ndarray
    disc_radius: float
    disc_distance: float
    cup: float
    vessel_width: float
    vessel_strength: float
    macula_depth: float


def draw_look(rng: np.random.Generator) -> Look:
    """Draw the look of a patient."""
    tone = rng.choice(TONES) * np.float32(rng.uniform(0.94, 1.06, size=3))
    ranges = ((4.9, 5.7), (17.5, 20.5), (0.25, 0.38), (1.15, 1.4), (0.85, 1.05), (0.42, 0.56))
    return Look(tone, *(float(rng.uniform(*values)) for values in ranges))


def draw_findings(rng: np.random.Generator) -> tuple[str, str]:
    """Draw the findings of the left and the right eye with the frequencies FINDINGS and SAME."""
    first, other = (str(finding) for finding in rng.choice(list(FINDINGS), size=2, p=list(FINDINGS.values())))
    return first, first if rng.random() < SAME else other


def draw(finding: str, eye: str, look: Look, rng: np.random.Generator, size: int = POINTS) -> np.ndarray:
    """Draw the photograph of an eye: uint8 (size, size, 3), black around a round field.

    The disc is nasal of the macula: right of it in a right eye. Each layer has its own random stream, so that equal
    generators draw the same eye with different findings.
    """
    if finding not in FINDINGS or eye not in EYES:
        raise UserError(f"{finding!r} of the eye {eye!r} is unknown; findings: {', '.join(FINDINGS)}; eyes: {EYES}")
    nasal, pixels = (1 if eye == "right" else -1), 2 * size
    layers = [np.random.default_rng(seed) for seed in rng.integers(2**63, size=6)]
    macula = np.array([32 - 6.5 * nasal, 33.0]) + layers[0].uniform(-1.2, 1.2, size=2)
    disc = macula + (nasal * look.disc_distance, layers[0].uniform(-2.2, 0.2))

    image = _background(look, layers[1], pixels, macula)
    if finding == "pathological myopia":
        image = _myopia(image, layers[2], disc, nasal, look)
    elif finding == "drusen":
        image = _drusen(image, layers[2], macula)
    image = _disc(image, layers[3], disc, look, layers[2].uniform(0.82, 0.92) if finding == "glaucoma" else look.cup)
    image = _vessels(image, layers[4], disc, macula, nasal, look)
    if finding == "severe nonproliferative retinopathy":
        image = _retinopathy(image, layers[2], macula, disc)
    image = _camera(image, layers[5])
    image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _from(centre: np.ndarray, pixels: int) -> np.ndarray:
    """Return the distances (pixels, pixels) from a centre, in points."""
    x, y = plane(pixels)
    return np.hypot(x - np.float32(centre[0]), y - np.float32(centre[1]))


def _background(look: Look, rng: np.random.Generator, pixels: int, macula: np.ndarray) -> np.ndarray:
    """Draw the patient's tone, mottled, with the dark macula: float32 (pixels, pixels, 3)."""
    mottling, warmth = clouds(rng, pixels, 5), clouds(rng, pixels, 3, 2)
    pit = np.exp(-((_from(macula, pixels) / rng.uniform(4.0, 4.8)) ** 2))
    shade = (1 + 0.045 * mottling) * (1 - look.macula_depth * pit)
    return (look.tone + warmth[..., None] * np.array([3.0, -3.0, -4.0], np.float32)) * shade[..., None]


def _myopia(image: np.ndarray, rng: np.random.Generator, disc: np.ndarray, nasal: int, look: Look) -> np.ndarray:
    """Draw a thinned retina: pale, streaked by choroidal vessels, with a white atrophy temporal of the disc."""
    pixels = len(image)
    x, y = plane(pixels)
    image = blend(image, (238, 164, 112), np.full((pixels, pixels), 0.62, np.float32))
    bend, turn = 4.5 * clouds(rng, pixels, 5, 2), rng.uniform(-0.8, 0.8)
    streaks = step(np.cos(2 * math.pi / 6.0 * (y + turn * (x - 32)) + bend) - 0.3, 1.1)
    image = blend(image, (206, 92, 60), 0.42 * streaks)
    reach = look.disc_radius * rng.uniform(1.9, 2.4)
    ragged = 0.9 * clouds(rng, pixels, 9, 2)
    centre = disc - (nasal * 0.62 * reach, rng.uniform(-2, 2))
    return blend(image, (252, 240, 196), 0.93 * step(reach + ragged - _from(centre, pixels), 1.6))


def _drusen(image: np.ndarray, rng: np.random.Generator, macula: np.ndarray) -> np.ndarray:
    """Draw eighteen to thirty yellow spots with soft edges around the macula."""
    sheet = Sheet(len(image))
    for _ in range(rng.integers(18, 31)):
        place = macula + min(abs(rng.normal(0, 6.0)) + 1.0, 14.0) * direction(rng.uniform(0, 2 * math.pi))
        sheet.disc(place, rng.uniform(0.7, 1.5))
    return blend(image, (250, 222, 116), 0.9 * sheet.alpha(blur=0.35))


def _disc(image: np.ndarray, rng: np.random.Generator, at: np.ndarray, look: Look, cup: float) -> np.ndarray:
    """Draw the optic nerve head: an orange rim around a white cup of `cup` times its diameter."""
    distance = _from(at, len(image))
    image = blend(image, (240, 176, 98), 0.95 * step(look.disc_radius - distance, 1.2))
    place = at + rng.uniform(-0.3, 0.3, size=2)
    return blend(image, (255, 246, 214), 0.96 * step(cup * look.disc_radius - _from(place, len(image)), 1.0))


def _vessels(image, rng, disc: np.ndarray, macula: np.ndarray, nasal: int, look: Look) -> np.ndarray:
    """Draw an artery and a wider, darker vein in each quadrant; the temporal ones arch above and below the macula."""
    arteries, veins = Sheet(len(image)), Sheet(len(image))
    for up in (-1, 1):
        for temporal in (True, False):
            for sheet, width, shift in ((veins, look.vessel_width, 0.0), (arteries, 0.72 * look.vessel_width, 2.6)):
                root = disc + rng.uniform(-0.6, 0.6, size=2)
                if temporal:
                    end = macula + (-nasal * rng.uniform(12, 18), up * (rng.uniform(5, 9) + shift))
                    bend = np.array([disc[0] - nasal * rng.uniform(3, 6), 33 + up * (rng.uniform(25, 29) + shift)])
                else:
                    end = disc + (nasal * rng.uniform(11, 16), up * (rng.uniform(11, 17) + 1.6 * shift))
                    bend = disc + (nasal * rng.uniform(0, 3), up * (rng.uniform(8, 11) + shift))
                _tree(sheet, rng, root, bend, end, width, branches=4 if temporal else 2)
    on_disc = step(0.9 * look.disc_radius - _from(disc, len(image)), 2.0)[..., None]
    strength = look.vessel_strength * (1 - 0.45 * on_disc)
    image = image * (1 - strength * veins.alpha()[..., None] * np.array([0.42, 0.68, 0.6], np.float32))
    return image * (1 - strength * arteries.alpha()[..., None] * np.array([0.2, 0.5, 0.46], np.float32))


def _tree(sheet: Sheet, rng, root: np.ndarray, bend: np.ndarray, end: np.ndarray, width: float, branches: int) -> None:
    """Draw a tapering vessel along a quadratic Bezier curve, with branches of half its width on alternating sides."""

    def at(t: float) -> np.ndarray:
        return (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * end

    parts = np.linspace(0, 1, 9)
    for first, last in zip(parts[:-1], parts[1:], strict=True):
        sheet.stroke(at(first), at((first + last) / 2), at(last), width * (1 - 0.5 * first))
    side = rng.choice((-1, 1))
    for number in range(branches):
        t = (number + rng.uniform(0.6, 1.3)) / (branches + 0.6)
        ahead = at(t + 0.02) - at(t)
        heading = math.atan2(ahead[1], ahead[0]) + side * rng.uniform(0.5, 0.9)
        length, side = rng.uniform(6, 11), -side
        middle = at(t) + 0.5 * length * direction(heading)
        tip = middle + 0.5 * length * direction(heading - side * rng.uniform(0.1, 0.5))
        sheet.stroke(at(t), middle, tip, width * 0.5)


def _retinopathy(image: np.ndarray, rng: np.random.Generator, macula: np.ndarray, disc: np.ndarray) -> np.ndarray:
    """Draw 16 to 26 dark haemorrhages across the field, and hard yellow exudates in two or three clusters."""
    blood, lipid = Sheet(len(image)), Sheet(len(image))
    for _ in range(rng.integers(16, 27)):
        place = 32 + rng.uniform(5, 26) * direction(rng.uniform(0, 2 * math.pi))
        if math.dist(place, disc) > 6:
            along = rng.uniform(0.3, 1.3) * direction(rng.uniform(0, math.pi))
            blood.stroke(place - along, place, place + along, rng.uniform(1.6, 3.0))
    for _ in range(rng.integers(2, 4)):
        middle = macula + rng.uniform(4, 13) * direction(rng.uniform(0, 2 * math.pi))
        for _ in range(rng.integers(4, 8)):
            lipid.disc(middle + rng.normal(0, 1.8, size=2), rng.uniform(0.45, 0.95))
    image = blend(image, (84, 16, 14), 0.85 * blood.alpha(blur=0.3))
    return blend(image, (255, 236, 130), 0.95 * lipid.alpha())


def _camera(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add the camera's uneven flash, darker towards the rim, a little grain, and its round aperture."""
    x, y = plane(len(image))
    radius = _from(np.array([32.0, 32.0]), len(image))
    tilt = rng.uniform(0.0, 0.004) * direction(rng.uniform(0, 2 * math.pi))
    light = (1 + tilt[0] * (x - 32) + tilt[1] * (y - 32)) * (1 - rng.uniform(0.15, 0.4) * (radius / APERTURE) ** 3)
    light = rng.uniform(0.92, 1.12) * light + 0.012 * clouds(rng, len(image), 28, 2)
    return image * (light * step(APERTURE - radius, 1.0))[..., None]


def write_world(
    folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int, size: int = POINTS, degraded: float = 0
) -> None:
    """Write images/<patient>_<eye>.jpg, captions.csv and splits/fundus_{train,val,test}.csv in the layout of ODIR.

    Numbers count images, two per patient. A share `degraded` of the training and validation images has a `quality` of 2
    or 1 instead of 3. Images depend only on (seed, patient, size, degraded). The same call completes a partial world.
    """
    numbers = dict(num_train=num_train, num_val=num_val, num_test=num_test)
    world = dict(style=STYLE, seed=seed, size=size, degraded=degraded) | numbers
    if min(world.values()) < 0 or size < 32 or degraded not in SHARE or any(value % 2 for value in numbers.values()):
        raise UserError(f"a fundus world needs even numbers >= 0, size >= 32 and degraded in [0, 1], got {world}")
    root = Path(folder)

    def draw_images() -> dict[str, list[dict]]:
        parts = {"train": [], "val": [], "test": []}
        names = [name for name in parts for _ in range(numbers[f"num_{name}"] // 2)]
        for patient, name in enumerate(tqdm(names, desc="drawing", unit="patient", disable=None)):
            rng = np.random.default_rng((seed, patient))
            look, age, sex = draw_look(rng), int(rng.integers(25, 86)), str(rng.choice(("Male", "Female")))
            for finding, eye, eye_seed in zip(draw_findings(rng), EYES, rng.integers(2**63, size=2), strict=True):
                path, damage = root / "images" / f"R{patient:06d}_{eye}.jpg", np.random.default_rng((eye_seed, 1))
                quality = int(damage.integers(1, 3)) if damage.random() < degraded and name != "test" else 3
                if not path.exists():
                    image = draw(finding, eye, look, np.random.default_rng(eye_seed), size)
                    if quality < 3:
                        image = degrade(image, *draw_damage(quality, damage), damage)
                    save_picture(path, Image.fromarray(image))
                caption = f"The {eye} eye fundus image shows {finding}."  # as in ODIR's tables
                cells = (f"images/{path.name}", caption, "Fundus", path.name[:7], eye, age, sex, quality)
                parts[name].append(dict(zip(COLUMNS, cells, strict=True)))
        write_table(root / "captions.csv", COLUMNS, [row for rows in parts.values() for row in rows])
        return parts

    complete_world(root, world, "fundus", COLUMNS, draw_images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a world of fundus photographs in the layout of ODIR-5K.")
    add_path(parser, "--out", dest="folder", help="folder to write: new, or the same world to complete")
    for name, default in (("num_train", 4000), ("num_val", 400), ("num_test", 400), ("seed", 0), ("size", POINTS)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--degraded", type=float, default=0, help="share of degraded train and val images, default 0")
    run_command(parser, write_world, arguments)


if __name__ == "__main__":
    main()

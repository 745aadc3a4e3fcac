"""A small world of rated images with known answers: stripes, sharp (3), soft (2) or blurred (1).

Quality is the sharpness; alignment is 3 if the stripes have the colour of the prompt, else 1.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from launching import write_experiment
from PIL import Image
from scipy.ndimage import gaussian_filter

from ddpo_pytorch.generator.from_scratch import build_bert

SIZE = 32
PROMPTS = ("Fundus: stripes in red", "Fundus: stripes in blue")
BLUR = {3: 0.0, 2: 1.5, 1: 3.0}  # pixels


def stripes(quality: int, blue: bool, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """uint8 (size, size, 3) of red or blue stripes that stand or lie, of random period and phase."""
    wave = np.sign(np.sin(2 * np.pi * np.arange(size) / (rng.uniform(5, 8) * size / SIZE) + rng.uniform(0, 2 * np.pi)))
    picture = np.tile(0.5 + 0.5 * wave, (size, 1))
    picture = gaussian_filter(picture.T if rng.random() < 0.5 else picture, BLUR[quality] * size / SIZE, mode="wrap")
    colour = np.array([1, 0.7, 0.5])[:: -1 if blue else 1]
    picture = picture[..., None] * colour + rng.normal(0, 0.03, (size, size, 3))
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def write_rated_world(folder: Path, count: int = 120, seed: int = 0) -> Path:
    """images/, ratings.csv (two images a patient) and bert/, a text encoder; the folder."""
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        quality, blue, said = 1 + number % 3, number // 3 % 2, number // 6 % 2
        name = f"images/{number:03d}.png"
        Image.fromarray(stripes(quality, bool(blue), rng)).save(folder / name)
        row = {"image_path": name, "rating": quality, "modality": "Fundus", "expert_level": 3, "prompt": PROMPTS[said]}
        row |= {"rater_id": "a", "quality": quality, "alignment": 3 if blue == said else 1}
        rows.append(row | {"patient": f"p{number // 2}"})
    pd.DataFrame(rows).to_csv(folder / "ratings.csv", index=False)
    write_bert(folder / "bert")
    return folder


def write_bert(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in build_bert(PROMPTS, 32, 2, tokens=16):
            part.save_pretrained(folder)
    return folder


def write_config(rated: Path) -> Path:
    fields = {"resize": "stretch", "ratings": str(rated / "ratings.csv"), "text_encoder": str(rated / "bert")}
    fields |= {"text_tokens": 16, "image_size": 32, "patch_size": 8, "width": 32, "heads": 2}
    fields |= {"selector_layers": 2, "policy_layers": 2, "num_epochs": 2, "batch_size": 16}
    fields |= {"learning_rate": 3e-3, "second_learning_rate": 1e-3}
    return write_experiment(rated / "tiny.py", {f"rlhf.{name}": value for name, value in fields.items()})

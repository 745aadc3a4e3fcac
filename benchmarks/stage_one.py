"""How much faster stage (i) and the classifier's input are than the straightforward version, as ratios of one run.

    python benchmarks/stage_one.py                    # phantoms in the two sizes that most of ISIC 2019 has
    python benchmarks/stage_one.py --images FOLDER    # the .jpg files of a folder

(a) A step of train_sd.py at 128 px on latents encoded once, against one that decodes its JPEGs, resizes them and runs
the autoencoder: model and batch of config/isic128.py, in float32 and with bfloat16 for the UNet (never for the
autoencoder, which train_sd.py keeps in float32). (b) The classifier's input at 128 px from the file of decoded images,
against decoding in every epoch. Both sides of a pair are timed by turns; the medians are compared. The last line is
JSON.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpo_pytorch.data.images import ImageFiles, decoded, load_image
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.finetune_losses import CaptionTable, NoiseLoss
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, write_index
from ddpo_pytorch.phantoms.skin import draw
from ddpo_pytorch.utils.cli import add_path
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream

logger = logging.getLogger(__name__)
SIZE = 128


def make_images(folder: Path, count: int) -> list[Path]:
    """Phantoms as JPEG files, by turns of 600 x 450 (HAM10000) and 1024 x 1024 pixels (BCN20000)."""
    paths = []
    for number in range(count):
        pixels = draw(labels_of(CAPTIONS[number % 32]), np.random.default_rng(number))
        paths.append(folder / f"{number}.jpg")
        size = (1024, 1024) if number % 2 else (600, 450)
        Image.fromarray(pixels).resize(size).save(paths[-1], quality=90)
    return paths


def by_turns(first: Callable[[], None], second: Callable[[], None], turns: int) -> tuple[float, float]:
    """Median seconds of each; both run once untimed before."""
    seconds = ([], [])
    for turn in range(turns + 1):
        for kind, function in enumerate((first, second)):
            started = time.perf_counter()
            function()
            if turn:
                seconds[kind].append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def build(channels: tuple[int, ...], unet_channels: tuple[int, ...]):
    torch.manual_seed(0)
    tokenizer, text_encoder = scratch.build_clip(CAPTIONS, 64, 2)
    text_encoder.eval()
    vae = scratch.build_vae(channels, SIZE).eval().requires_grad_(False)
    unet = scratch.build_unet(unet_channels, (False, True, True), 64, SIZE // 2 ** (len(channels) - 1))
    return scratch.assemble(vae, text_encoder, tokenizer, unet)


def measure_step(paths: list[Path], folder: Path, batch_size: int, turns: int, bf16: bool) -> dict:
    """Sizes of config/isic128.py. Both sides end in the same loss, backward pass and AdamW step."""
    pipe = build((32, 64, 64, 64), (64, 128, 128))
    loss_model = NoiseLoss(pipe, CaptionTable(pipe, CAPTIONS, trained=False), caption_dropout=0.1)
    optimizer = torch.optim.AdamW(loss_model.parameters(), lr=1e-4)
    numbers = [index % 32 for index in range(len(paths))]
    files = ImageFiles(paths, torch.tensor(numbers), SIZE)
    encode_data_set(pipe.vae, files, range(len(paths)), numbers, folder, progress=False)
    write_index(folder, pipe.vae, CAPTIONS, len(paths), {})
    sampler = EndlessBatches(len(paths), batch_size, seed=0)
    batches = iter(DataLoader(LatentShards(folder), batch_sampler=sampler))
    plain = iter(sampler)
    step = 0

    def descend(batch: Sequence[torch.Tensor]) -> None:
        nonlocal step
        step += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_model(batch, BatchDraws(0, Stream.NOISE, step, batch_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def straightforward() -> None:
        indices = next(plain)
        images = torch.stack([load_image(paths[index], SIZE) for index in indices]) * 2 - 1
        with torch.no_grad():
            posterior = pipe.vae.encode(images).latent_dist
        descend((posterior.mean, posterior.logvar, torch.tensor([numbers[index] for index in indices])))

    def from_latents() -> None:
        descend(next(batches))

    slow, fast = by_turns(straightforward, from_latents, turns)
    return {"straightforward_s": round(slow, 4), "latents_s": round(fast, 4), "ratio": round(slow / fast, 2)}


def measure_input(paths: list[Path], folder: Path, turns: int) -> dict:
    """One epoch of batches of 32, shuffled."""
    files = ImageFiles(paths, torch.zeros(len(paths), 6), SIZE)
    cached = decoded(files, folder)

    def epoch(dataset) -> Callable[[], None]:
        loader = DataLoader(dataset, 32, shuffle=True, generator=torch.Generator().manual_seed(0))
        return lambda: [images.float() / 255 for images, _ in loader]

    slow, fast = by_turns(epoch(files), epoch(cached), turns)
    speeds = {"decoding_images_per_s": round(len(paths) / slow), "cache_images_per_s": round(len(paths) / fast)}
    return speeds | {"ratio": round(slow / fast, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios of stage (i) and of the classifier's input.")
    add_path(parser, "--images", optional=True, help="folder of .jpg files; phantoms without")
    parser.add_argument("--count", type=int, default=256, help="images used")
    parser.add_argument("--batch_size", type=int, default=64, help="of a step of train_sd.py")
    parser.add_argument("--turns", type=int, default=5, help="timed repetitions of each side")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = sorted(Path(given.images).glob("*.jpg"))[: given.count] if given.images else []
        if given.images and len(paths) < max(32, given.batch_size):
            parser.exit(
                2, f"error: {given.images!r} holds {len(paths)} .jpg files; {max(32, given.batch_size)} or more\n"
            )
        paths = paths or make_images(folder, given.count)
        result = {
            "step": measure_step(paths, folder / "latents", given.batch_size, given.turns, bf16=False),
            "step_bf16": measure_step(paths, folder / "latents", given.batch_size, given.turns, bf16=True),
            "input": measure_input(paths, folder / "cache", given.turns),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
    for name, title in (("step", "float32"), ("step_bf16", "bfloat16")):
        logger.info("step of stage (i) from latents, %s: %s times as fast", title, result[name]["ratio"])
    logger.info("input of the classifier from the cache: %s times as fast", result["input"]["ratio"])
    logger.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()

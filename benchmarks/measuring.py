"""Measure what metric.py costs as folders grow: memory, images per second, and the savings of its feature cache.

    python benchmarks/measuring.py --count 2000

Draws folders of N and 4N images (64 px, all captions), and as many training images as N, and measures each folder with
scripts/metric.py in a process of its own, with the judge of the mini world: alignment, fidelity, diversity and
memorisation in its features. Then the larger one again, from the cache. The last line is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.phantoms.skin import draw

ROOT = Path(__file__).resolve().parents[1]
DRAWN = 64  # different phantoms; the others are these with noise of their own


def make_folder(folder: Path, count: int, seed: int) -> Path:
    """A sample folder of `count` images."""
    phantoms = [draw(labels_of(CAPTIONS[i % 32]), np.random.default_rng((seed, i))) for i in range(DRAWN)]
    rng = np.random.default_rng(seed)
    for number in range(count):
        noisy = phantoms[number % DRAWN] / 255 + rng.normal(0, 0.02, phantoms[0].shape)
        image = torch.from_numpy(noisy.clip(0, 1)).permute(2, 0, 1)
        save_image(folder / "images" / folder_name(CAPTIONS[number % 32]) / f"{number:06d}.png", image)
    return folder


def run_metric(folder: Path, real: Path, train: Path, work: Path) -> tuple[float, float]:
    """(seconds, peak MiB) of metric.py on a folder."""
    fields = {"fake_path": folder, "real_path": real, "train_path": train, "compare_path": ""}
    fields |= {"output": work / "out", "cache_dir": work / "cache"}
    options = [f"--config.metric.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "scripts/metric.py", "--config=config/mini.py:evaluate_metric_rl", *options]
    started = time.perf_counter()
    with open(work / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((work / "log").read_text())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return time.perf_counter() - started, usage.ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="images of the smaller folder")
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        small, large = (make_folder(work / f"{n}", n, seed) for seed, n in ((1, count), (2, 4 * count)))
        real, train = make_folder(work / "real", count, 3), make_folder(work / "train", count, 4)
        run_metric(real, real, train, work)  # so that both folders find real and training images in the cache
        figures = {"images": [count, 4 * count], "machine": platform.processor() or platform.machine()}
        for name, folder in (("small", small), ("large", large), ("large_again", large)):
            seconds, peak = run_metric(folder, real, train, work)
            figures |= {f"{name}_s": round(seconds, 1), f"{name}_peak_mib": round(peak)}
    grown = figures["large_peak_mib"] - figures["small_peak_mib"]
    figures["kib_an_image"] = round(grown * 1024 / (3 * count), 2)
    figures["cache_ratio"] = round(figures["large_s"] / figures["large_again_s"], 2)
    print(f"{count} images: {figures['small_s']} s, {figures['small_peak_mib']} MiB")
    print(f"{4 * count} images: {figures['large_s']} s, {figures['large_peak_mib']} MiB")
    print(f"again, from the cache: {figures['large_again_s']} s, {figures['cache_ratio']} times as fast")
    print(f"each further image takes {figures['kib_an_image']} KiB")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

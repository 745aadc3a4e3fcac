"""Sanity check of the metrics at this number of images: half of the real ones, degraded, against the other half."""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torchvision.transforms.functional as tvf
from accelerate import Accelerator
from PIL import Image, ImageFilter

from ddpo_pytorch.data.images import read_rgb, save_picture
from ddpo_pytorch.data.sample_folder import list_samples
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.inputs import Sets
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.fingerprint import fingerprint

HALF = "half against half"


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    return Image.open(buffer).convert("RGB")


def _crop(image: Image.Image) -> Image.Image:
    return tvf.resize(tvf.center_crop(image, [round(0.8 * side) for side in image.size[::-1]]), image.size[::-1])


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 64)),
    "JPEG": _jpeg,  # of quality 10
    "hue shift": lambda image: tvf.adjust_hue(image, 0.1),  # a tenth of the circle
    "crop": _crop,  # to the middle 80 % of each side
}


def halves(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of two random halves with the same number of images of each prompt; odd ones are left out."""
    parts = []
    for group in np.unique(groups):
        order = np.random.default_rng([seed, int(group), 8]).permutation(np.flatnonzero(groups == group))
        parts.append(order[: len(order) // 2 * 2].reshape(-1, 2))
    return tuple(np.sort(np.concatenate(parts), axis=0).T)


def select(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Return the subset of these images, without results of networks."""
    columns = {name: getattr(images, name) for name in ("paths", "captions", "digests", "table")}
    chosen = {name: tuple(column[i] for i in indices) for name, column in columns.items() if column}
    return dataclasses.replace(images, **chosen, lacking=(), names={}, rows={}, pairs={})


def sanity_sets(sets: Sets, folder: Path, seed: int, accelerator: Accelerator) -> tuple[Sets, dict[str, str]]:
    """Return half of the real images, unchanged and degraded, as models, the other half as `real`; and missing sets.

    The main process writes the images to `folder`: those of `CHANGES`, "duplicates" (each prompt's first half of the
    images, twice) and "training images" of the same prompts, if each has enough of them.
    """
    reference, half = (select(sets.real, part) for part in halves(sets.real.groups, seed))
    if len(half) < 2:
        raise UserError(f"--sanity needs 2 real images of one caption; {str(sets.real.folder)!r} has too few")
    jobs, missing = {name: (list(half.paths), change) for name, change in CHANGES.items()}, {}
    members = [np.flatnonzero(half.groups == group).tolist() for group in np.unique(half.groups)]
    first = {i: part[n % ((len(part) + 1) // 2)] for part in members for n, i in enumerate(part)}
    jobs["duplicates"] = [half.paths[first[i]] for i in range(len(half))], lambda image: image
    if sets.train is not None:
        known = defaultdict(list)
        with suppress(UserError):  # a folder of images without captions
            for path, caption in list_samples(sets.train.folder):
                known[caption].append(path)
        paths = [known[caption].pop(0) for caption in half.captions if known[caption]]
        if len(paths) == len(half):
            jobs["training images"] = paths, lambda image: image
        elif paths:  # too few would shrink all sets, which are matched by caption
            missing["training images"] = f"metric.train_path has {len(paths)} of {len(half)} images with these captions"
        else:
            missing["training images"] = "metric.train_path has none of the captions; give images/<caption>/ or a table"
    models, folder = {HALF: [half]}, folder / fingerprint(seed, list(half.digests))[:16]  # not that of another run
    for name, (sources, change) in jobs.items():
        target = folder / name.replace(" ", "_")
        paths = tuple(target / path.relative_to(half.folder).with_suffix(".png") for path in half.paths)
        if accelerator.is_main_process:
            for source, path in zip(sources, paths, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_picture(path, change(read_rgb(source)))
        accelerator.wait_for_everyone()
        made = {"folder": target, "paths": paths, "digests": tuple(map(sha256, paths)), "entries": {}}
        models[name] = [dataclasses.replace(select(half, range(len(half))), **made)]
    return Sets(models, reference, sets.train, sets.pairs and half), missing

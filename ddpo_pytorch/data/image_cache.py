"""Images decoded and resized once: one memory-mapped file that epochs, workers, processes and runs share."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.files import whole

logger = logging.getLogger(__name__)
_SPARE_BYTES = 2**30  # left free on the disk


class DecodedImages(Dataset):
    """The items of an `ImageFiles`, with pixels from a file made by `decoded`."""

    def __init__(self, files: ImageFiles, path: Path):
        self.files, self.path = files, path
        self._pixels: np.ndarray | None = None

    @property
    def targets(self) -> torch.Tensor:
        return self.files.targets

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None}  # a worker maps the file itself; pickling would copy all of it

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What DataLoader calls for a whole batch."""
        if self._pixels is None:
            self._pixels = np.load(self.path, mmap_mode="r")
        # in the file's order, so that a disk reads forwards; the copy is writable and holds no reference to the map
        return [(torch.from_numpy(self._pixels[index].copy()), self.targets[index]) for index in indices]


def decoded(files: ImageFiles, folder: str | Path) -> Dataset:
    """The same items from a cache in `folder`, which is made now if it is not there; `files` if `folder` is "".

    The cache belongs to the paths, sizes and modification times of the files and to the way they are resized. Where the
    disk has no room for it, a warning is logged and `files` returned. With several processes a node, let one come
    first: `with accelerator.local_main_process_first()`. Raises UserError for a damaged image.
    """
    if not str(folder):
        return files
    shape = (len(files), 3, files.size, files.size)
    path = Path(folder) / f"images_{_fingerprint(files)}.npy"
    if path.is_file():
        if path.stat().st_size < np.prod(shape):
            raise UserError(f"{str(path)!r} is shorter than its {len(files)} images; delete it, it will be made again")
        return DecodedImages(files, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed + _SPARE_BYTES > free:
        logger.warning("no room for a cache of %.1f GB in %s; every image is decoded each time", needed / 1e9, folder)
        return files
    started = time.perf_counter()
    with whole(path) as temporary:
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        with ThreadPoolExecutor(_cores()) as pool:  # PIL decodes and resizes outside Python's lock
            images = pool.map(lambda index: files[index][0].numpy(), range(len(files)))
            for index, image in enumerate(tqdm(images, total=len(files), desc="decoding", unit="image", disable=None)):
                pixels[index] = image
        pixels.flush()
        del pixels
    speed = len(files) / (time.perf_counter() - started)
    logger.info("%d images decoded at %.0f images/s into %s (%.2f GB)", len(files), speed, path, needed / 1e9)
    return DecodedImages(files, path)


def loader_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader that keep a GPU fed: pinned memory where there is one, workers that stay alive."""
    return dict(
        num_workers=num_workers, persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available()
    )  # fmt: skip


def _fingerprint(files: ImageFiles) -> str:
    stats = [(path, path.stat()) for path in map(Path, files.paths)]
    about = [files.size, files.resize, [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in stats]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""A memory-mapped cache of decoded and resized images, shared by epochs, workers, processes and runs."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import READER_VERSION, ImageFiles
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)
_SPARE_BYTES = 2**30  # left free on the disk
_WINDOW = 256  # images


class DecodedImages(Dataset):
    """The items of an `ImageFiles`, with pixels from a file of `decoded`."""

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
        """Return a batch; DataLoader calls this if it exists."""
        if self._pixels is None:
            try:
                self._pixels = np.lib.format.open_memmap(self.path, mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{str(self.path)!r} is damaged ({error}); delete it, it is made again") from error
        # a copy is writable and holds no reference to the map
        return [(torch.from_numpy(self._pixels[index].copy()), self.targets[index]) for index in indices]


def decoded(files: ImageFiles, folder: str | Path) -> Dataset:
    """Return the same items from a cache in `folder`, which is written if absent; `files` if `folder` is "".

    The cache depends on paths, sizes and modification times of the files, the resizing and the version of the reader.
    If it cannot be written (no room, no permission), a warning is logged and `files` returned. With several processes a
    node, call it within `accelerator.local_main_process_first()`. Raises UserError for a damaged image.
    """
    if not str(folder):
        return files
    shape = (len(files), 3, files.size, files.size)
    path = Path(folder) / f"images_{_fingerprint(files)}.npy"
    if path.is_file():
        if path.stat().st_size < np.prod(shape):
            raise UserError(f"{str(path)!r} is shorter than its {len(files)} images; delete it, it is made again")
        return DecodedImages(files, path)
    gigabytes, started = np.prod(shape) / 1e9, time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, depth=0)
        if np.prod(shape) + _SPARE_BYTES > shutil.disk_usage(path.parent).free:
            raise OSError("no room on the disk")
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            # written front to back, so that a full disk is an error, where a memory map would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in _decode_all(files):
                file.write(image.numpy().tobytes())
    except OSError as error:
        logger.warning("no cache of %.1f GB in %s (%s); images are decoded on every access", gigabytes, folder, error)
        return files
    speed = len(files) / (time.perf_counter() - started)
    logger.info("%d images decoded at %.0f images/s into %s (%.2f GB)", len(files), speed, path, gigabytes)
    return DecodedImages(files, path)


def _decode_all(files: ImageFiles) -> Iterator[torch.Tensor]:
    """Yield all images in order, decoded by threads in windows that fit into memory."""
    with (
        ThreadPoolExecutor(thread_limit()) as pool,
        tqdm(total=len(files), desc="decoding", unit="image", disable=None) as bar,
    ):
        for start in range(0, len(files), _WINDOW):
            for image, _ in pool.map(files.__getitem__, range(start, min(start + _WINDOW, len(files)))):
                yield image
                bar.update()


def loader_options(num_workers: int) -> dict[str, Any]:
    """Return arguments of a DataLoader: persistent workers, and pinned memory if there is a GPU."""
    pinned = torch.cuda.is_available()
    return dict(num_workers=num_workers, persistent_workers=num_workers > 0, pin_memory=pinned)


def _fingerprint(files: ImageFiles) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in map(Path, files.paths)]
    described = [READER_VERSION, files.size, files.resize, [(path, s.st_size, s.st_mtime_ns) for path, s in stats]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

"""Results of networks on images, computed once and cached on disk, in chunks of one batch.

A chunk's file is named after the network (weights and preprocessing), the device unless it is the CPU, and the images'
content, so a killed run resumes. Each process computes whole chunks, so results do not depend on the number of
processes, nor the memory needed on the number of images.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ddpo_pytorch.data.images import load_image
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)

GPU_THREADS = 3  # one batch is decoded while another is computed
CPU_BATCH = 32  # larger ones leave the cache of a core: with 256, EfficientNet-lite1 takes 1.4 times as long


@dataclass(frozen=True)
class Network:
    """A function from images (B, 3, H, W) in [0, 1], two such batches, or images and captions to (B, F)."""

    name: str
    what: str
    sha256: str  # of the weight file
    key: str  # identifies all that results depend on, such as weights and preprocessing
    run: Callable[..., torch.Tensor]
    reads_captions: bool = False


class Rows:
    """Results (N, F) of a network for N images or pairs in chunk files, indexed like an array and read on demand."""

    def __init__(self, files: Sequence[Path], count: int, chunk: int):
        self._files, self._count, self._chunk = list(files), count, chunk

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Return the rows of a slice, or at an array of indices in this order, as float64."""
        indices = np.arange(self._count)[index]
        result = np.zeros((len(indices), self._read(0).shape[1] if self._files else 0))
        for number in np.unique(indices // self._chunk):
            chosen, rows = indices // self._chunk == number, self._read(number)
            if rows.shape[1] != result.shape[1]:
                reason = f"{rows.shape[1]} columns, not {result.shape[1]}"
                raise UserError(f"{str(self._files[number])!r} is damaged ({reason}); remove it")
            result[chosen] = rows[indices[chosen] % self._chunk]
        return result

    def _read(self, number: int) -> np.ndarray:
        try:
            return np.lib.format.open_memmap(self._files[number], mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{str(self._files[number])!r} is damaged ({error}); remove it") from error


class FeatureStore:
    """Results of networks in `folder`; missing ones are computed and stored, `batch_size` images at a time."""

    def __init__(self, folder: Path, accelerator: Accelerator, batch_size: int, progress: bool = True):
        self.folder, self.accelerator, self.batch_size, self.progress = folder, accelerator, batch_size, progress
        if accelerator.is_main_process and folder.is_dir():
            remove_leftovers(folder, depth=1)
        # on a CPU, one thread per operation and one operation per core: splitting sums would change the last bits
        self._on_cpu = accelerator.device.type == "cpu"
        precision = "tf32" if torch.backends.cudnn.allow_tf32 else "float32"
        self._variant = "" if self._on_cpu else f"-{accelerator.device.type}-{precision}"  # devices round differently
        self._threads = max(1, torch.get_num_threads()) if self._on_cpu else GPU_THREADS

    def features(self, title: str, images: ImageSet, networks: Sequence[Network]) -> dict[str, Rows]:
        """Return rows by network name; networks that read captions are skipped for sets without captions.

        Every process must call this with the same arguments. Raises UserError naming the file that cannot be decoded or
        has a non-finite result; results computed before that are kept.
        """
        if not all(images.captions):
            networks = [network for network in networks if not network.reads_captions]
        return self._compute(title, networks, [images.paths], [images.digests], images.captions)

    def pairs(self, title: str, first: ImageSet, second: ImageSet, pairs: Sequence[tuple[int, int]], network: Network):
        """Return rows of a network of two images for pairs of (index in the first set, index in the second)."""
        paths = [[images.paths[pair[side]] for pair in pairs] for side, images in enumerate((first, second))]
        digests = [[images.digests[pair[side]] for pair in pairs] for side, images in enumerate((first, second))]
        return self._compute(title, [network], paths, digests)[network.name]

    def _compute(
        self, title: str, networks: Sequence[Network], paths: Sequence, digests: Sequence, captions: Sequence[str] = ()
    ) -> dict[str, Rows]:
        """Return rows by network name of the first of `paths` (and hashes), or of pairs of the first and the second."""
        count, size = len(paths[0]), self.batch_size
        parts = [slice(start, start + size) for start in range(0, count, size)]
        files = {}
        for network in networks:
            folder = self.folder / (hashlib.sha256(network.key.encode()).hexdigest()[:16] + self._variant)
            content = [*digests, captions] if network.reads_captions else digests
            names = (repr([column[part] for column in content]) for part in parts)  # hashes of the images, and captions
            files[network.name] = [folder / f"{hashlib.sha256(n.encode()).hexdigest()[:32]}.npy" for n in names]
        work, seen = [], set()
        for number, part in enumerate(parts):
            pending = [(n, files[n.name][number]) for n in networks if files[n.name][number] not in seen]
            seen |= {file for _, file in pending}  # chunks of equal content share a file
            if absent := [(n, file) for n, file in pending if not _is_intact(file, len(paths[0][part]))]:
                work.append((absent, [column[part] for column in paths], captions[part]))
        self.accelerator.wait_for_everyone()  # all processes have checked the cache before any of them writes
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        cached, fault = count - sum(len(columns[0]) for _, columns, _ in work), ""
        hidden = None if self.progress and not rank else True
        one_thread = partial(torch.set_num_threads, 1) if self._on_cpu else None
        with (
            tqdm(total=count, initial=cached, desc=title, unit="img", disable=hidden) as bar,
            ThreadPoolExecutor(self._threads, initializer=one_thread) as pool,
        ):
            try:
                for done in pool.map(self._compute_chunk, *zip(*work[rank::processes], strict=True)):
                    bar.update(min(done * processes, count - bar.n))
            except UserError as error:
                fault = str(error)
        if self._on_cpu:
            torch.set_num_threads(self._threads)  # the pool's setting affects the whole process
        # all processes raise together, so that none waits for one that met a faulty image
        if fault := next(filter(None, gather_object([fault])), ""):
            raise UserError(fault)
        return {n.name: Rows(files[n.name], count, size) for n in networks}

    def _compute_chunk(self, absent: Sequence, columns: Sequence[Sequence[Path]], captions: Sequence[str]) -> int:
        """Write the file of each absent (network, file); return the number of images or pairs."""
        batches = [torch.stack([load_image(path) for path in column]).to(self.accelerator.device) for column in columns]
        size = CPU_BATCH if self._on_cpu else self.batch_size
        starts = range(0, len(columns[0]), size)
        for network, file in absent:
            inputs = [*batches, captions] if network.reads_captions else batches
            with torch.no_grad():
                parts = [network.run(*(each[start : start + size] for each in inputs)) for start in starts]
            rows = torch.cat(parts).cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise UserError(f"{str(columns[0][bad[0]])!r}: {network.what} gives NaN or infinity; check its weights")
            with atomic_write(file) as temporary, open(temporary, "wb") as chunk:
                np.save(chunk, rows, allow_pickle=False)
        return len(columns[0])


def _is_intact(file: Path, rows: int) -> bool:
    """Return whether a chunk's file exists and has this number of rows, all of finite numbers."""
    if not file.is_file():
        return False
    with suppress(OSError, ValueError, EOFError, TypeError):
        stored = np.lib.format.open_memmap(file, mode="r")
        if stored.ndim == 2 and len(stored) == rows and np.isfinite(stored).all():
            return True
    logger.warning("%s is damaged; computing it again", file)
    return False


def pixel_facts(images: torch.Tensor) -> torch.Tensor:
    """Return (B, 5) float64: each image's highest level in 0 ... 255, and the hash of its pixels as four numbers."""
    levels = (images * 255).round().to(torch.uint8).cpu().numpy()
    hashes = [np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:16], dtype=np.uint32) for image in levels]
    rows = [[image.max(), *digest] for image, digest in zip(levels, hashes, strict=True)]
    return torch.tensor(np.array(rows, dtype=float))


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Return (B, 256): luminance on a 16 x 16 grid minus its mean, at nearly the same angle after JPEG or resizing."""
    luminance = (images * torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)).sum(1, keepdim=True)
    grid = torch.nn.functional.interpolate(luminance, (THUMBNAIL, THUMBNAIL), mode="area").flatten(1).double()
    grid = grid - grid.mean(dim=1, keepdim=True)
    grid[grid.abs().amax(dim=1) < 1e-6, 0] = 1.0  # images of one colour have no direction: all count as equal
    return grid


THUMBNAIL = 16
THUMBNAILS = Network("thumbnail", "luminance on a grid of 16 x 16", "", "thumbnail 1", thumbnails)
PIXELS = Network("pixels", "pixels", "", "pixel facts 1", pixel_facts)

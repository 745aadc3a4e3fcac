"""What networks say about images, computed once and kept on disk.

The images of a set are cut into chunks of one batch. A chunk's result is a file whose name is a function of the network
(weights and preprocessing) and of the content of the images, so that nothing is computed twice, a run that was killed
goes on, and a changed image or network is noticed. Chunks are dealt to the processes, each of which computes whole
ones: results do not depend on their number, and memory not on the number of images.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

# on a GPU, one batch is decoded while another is computed
GPU_THREADS = 3


@dataclass(frozen=True)
class Network:
    """A function of images, and what identifies it.

    `run` maps images (B, 3, H, W) in [0, 1] to (B, F); of two images for `pairs`, of images and their B captions where
    it `reads_captions`. `key` changes with the weights and with the preprocessing; `sha256` is that of the weight file.
    """

    name: str
    what: str
    sha256: str
    key: str
    run: Callable[..., torch.Tensor]
    reads_captions: bool = False


class Rows:
    """(N, F) results of a network for N images (or pairs), in chunk files; slices and selections are read on demand."""

    def __init__(self, files: Sequence[Path], count: int, chunk: int):
        self._files, self._count, self._chunk = list(files), count, chunk

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Consecutive rows, float64."""
        start, stop, _ = part.indices(self._count)
        return self.take(np.arange(start, stop))

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of these indices in this order, float64."""
        indices = np.asarray(indices, dtype=np.int64)
        if not len(indices):
            return np.zeros((0, self._read(0).shape[1] if self._files else 0))
        result = None
        for number in np.unique(indices // self._chunk):
            chosen = indices // self._chunk == number
            rows = self._read(number)[indices[chosen] % self._chunk]
            if result is None:
                result = np.empty((len(indices), rows.shape[1]))
            result[chosen] = rows
        return result

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows, float64, a chunk at a time."""
        for number in range(len(self._files)):
            yield np.asarray(self._read(number), dtype=np.float64)

    def _read(self, number: int) -> np.ndarray:
        try:
            return np.lib.format.open_memmap(self._files[number], mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{str(self._files[number])!r} is damaged ({error}); remove it, to make it again"
            ) from error


class FeatureStore:
    """Networks' results in `folder`, computed where they are absent, `batch_size` images at a time."""

    def __init__(self, folder: Path, accelerator: Accelerator, batch_size: int, progress: bool = True):
        self.folder, self.accelerator, self.batch_size, self.progress = folder, accelerator, batch_size, progress
        # on a CPU one thread an operation, as many operations as cores: last bits depend on how sums are split.
        if accelerator.is_main_process and folder.is_dir():
            remove_leftovers(folder, depth=1)
        self._threads = max(1, torch.get_num_threads()) if accelerator.device.type == "cpu" else GPU_THREADS

    def features(self, title: str, images: ImageSet, networks: Sequence[Network]) -> dict[str, Rows]:
        """Rows by name of the network. Every process must call this with the same arguments.

        Networks that read captions are left out where the set has none.

        Raises UserError naming the file that cannot be decoded or whose result is not finite; what was computed before
        stays.
        """
        if not all(images.captions):
            networks = [network for network in networks if not network.reads_captions]
        return self._compute(title, networks, [images.paths], [images.digests], images.captions)

    def pairs(self, title: str, first: ImageSet, second: ImageSet, pairs: Sequence[tuple[int, int]], network: Network):
        """Rows of a network of two images, for pairs of (index in the first set, index in the second)."""
        columns = [(images, [pair[side] for pair in pairs]) for side, images in enumerate((first, second))]
        paths = [[images.paths[i] for i in chosen] for images, chosen in columns]
        digests = [[images.digests[i] for i in chosen] for images, chosen in columns]
        return self._compute(title, [network], paths, digests)[network.name]

    def _compute(
        self,
        title: str,
        networks: Sequence[Network],
        paths: Sequence[Sequence[Path]],
        digests: Sequence[Sequence[str]],
        captions: Sequence[str] = (),
    ) -> dict[str, Rows]:
        parts = [slice(start, start + self.batch_size) for start in range(0, len(paths[0]), self.batch_size)]
        names = {False: _names(digests, parts), True: _names([*digests, captions], parts)}
        files = {
            n.name: [self.folder / n.key[:16] / f"{name}.npy" for name in names[n.reads_captions]] for n in networks
        }
        work, met = [], set()
        for number, part in enumerate(parts):
            count = len(paths[0][part])
            own = [(n, files[n.name][number]) for n in networks if files[n.name][number] not in met]
            met |= {file for _, file in own}  # chunks of the same content are one
            if absent := [(n, file) for n, file in own if not _intact(file, count)]:
                work.append((absent, [column[part] for column in paths], captions[part]))
        self.accelerator.wait_for_everyone()  # everyone has looked before anyone writes
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        hidden = None if self.progress and not rank else True
        with (
            tqdm(total=len(paths[0]), initial=len(paths[0]) - sum(len(columns[0]) for _, columns, _ in work),
                 desc=title, unit="img", disable=hidden) as bar,
            ThreadPoolExecutor(self._threads, initializer=_one_thread(self.accelerator.device)) as pool,
        ):  # fmt: skip
            fault = ""
            try:
                for count in _bounded_map(pool, self._chunk, work[rank::processes], self._threads + 1):
                    bar.update(min(count * processes, len(paths[0]) - bar.n))
            except UserError as error:
                fault = str(error)
        if self.accelerator.device.type == "cpu":
            torch.set_num_threads(self._threads)  # what the pool's threads set holds for all
        # all processes meet here, and end alike: none is left waiting for one that met a faulty image
        if fault := next(filter(None, gather_object([fault])), ""):
            raise UserError(fault)
        return {n.name: Rows(files[n.name], len(paths[0]), self.batch_size) for n in networks}

    def _chunk(
        self, absent: Sequence[tuple[Network, Path]], columns: Sequence[Sequence[Path]], captions: Sequence[str]
    ) -> int:
        batches = [torch.stack([load_image(path) for path in column]).to(self.accelerator.device) for column in columns]
        for network, file in absent:
            with torch.no_grad():
                given = (*batches, captions) if network.reads_captions else batches
                rows = network.run(*given).cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise UserError(f"{str(columns[0][bad[0]])!r}: {network.what} gives NaN or infinity; check its weights")
            content = io.BytesIO()
            np.save(content, rows, allow_pickle=False)
            with atomic_write(file) as temporary:
                temporary.write_bytes(content.getvalue())
        return len(columns[0])


def _names(columns: Sequence[Sequence[str]], parts: Sequence[slice]) -> list[str]:
    """A file name for what is known of each part: hashes of its images, and their captions where they matter."""
    whole_names = (hashlib.sha256(repr([column[part] for column in columns]).encode()) for part in parts)
    return [name.hexdigest()[:32] for name in whole_names]


def _intact(file: Path, rows: int) -> bool:
    """Whether a chunk's file is there and holds so many rows; a damaged one is made again."""
    if not file.is_file():
        return False
    try:
        if len(np.lib.format.open_memmap(file, mode="r")) == rows:
            return True
    except (OSError, ValueError, EOFError, TypeError):
        pass
    logger.warning("%s is damaged and made again", file)
    return False


def _one_thread(device: torch.device) -> Callable[[], None] | None:
    return (lambda: torch.set_num_threads(1)) if device.type == "cpu" else None


def _bounded_map(pool: ThreadPoolExecutor, function: Callable, work: Sequence[tuple], ahead: int) -> Iterator:
    """Results in order, at most `ahead` calls submitted at once; the first error cancels what has not begun."""
    futures = []
    try:
        for arguments in work:
            futures.append(pool.submit(function, *arguments))
            if len(futures) >= ahead:
                yield futures.pop(0).result()
        while futures:
            yield futures.pop(0).result()
    finally:
        for future in futures:
            future.cancel()


def pixel_facts(images: torch.Tensor) -> torch.Tensor:
    """(B, 5) float64: the brightest level of each image in 0 ... 255, and four numbers made from a hash of its pixels.

    Files of equal pixels have equal hashes whatever their format.
    """
    levels = (images * 255).round().to(torch.uint8).cpu().numpy()
    rows = []
    for image in levels:
        digest = np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:16], dtype=np.uint32)
        rows.append([image.max(), *digest])
    return torch.tensor(np.array(rows, dtype=np.float64))


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """(B, 256): each image's luminance on a grid of 16 x 16, without its mean. Alike for near copies of an image.

    The cosine distance of two of them changes little with JPEG compression, resizing and brightness.
    """
    luminance = (images * torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)).sum(1, keepdim=True)
    grid = torch.nn.functional.interpolate(luminance, (THUMBNAIL, THUMBNAIL), mode="area").flatten(1).double()
    grid = grid - grid.mean(dim=1, keepdim=True)
    grid[grid.abs().amax(dim=1) < 1e-6, 0] = 1.0  # one colour all over has no direction: all such are alike
    return grid


THUMBNAIL = 16
_THUMBNAIL_KEY = hashlib.sha256(b"thumbnail 1").hexdigest()
THUMBNAILS = Network("thumbnail", "luminance on a grid of 16 x 16", "", _THUMBNAIL_KEY, thumbnails)
PIXELS = Network("pixels", "pixels", "", hashlib.sha256(b"pixel facts 1").hexdigest(), pixel_facts)


def count_identical(facts: np.ndarray) -> int:
    """Images of (N, 5) `pixel_facts` whose pixels are those of an earlier one."""
    return len(facts) - len({row.tobytes() for row in facts[:, 1:]})

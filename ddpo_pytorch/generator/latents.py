"""Latents of a data set, encoded once into safetensors shards with an index; stage (i) trains on them.

A folder holds `shard_<number>.safetensors` and, once all are there, `index.json`. A shard has, for up to SHARD_IMAGES
images in the order of the data set, `row` (n,) int64, `caption` (n,) int64 (positions in the index's list), and the
autoencoder's posterior `mean` and `logvar` (n, C, h, w), half precision, not scaled. The index records the autoencoder,
image size, resize mode and source.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import loader_options
from ddpo_pytorch.utils.cores import one_thread
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, path_inside, sha256, write_json
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import COUNT, read_json
from ddpo_pytorch.utils.weights import open_safetensors

logger = logging.getLogger(__name__)
INDEX = "index.json"
SHARD_IMAGES = 256
INDEX_SHAPE = {"captions": [str], "images": COUNT, "shards": [{"file": str, "sha256": str}]}
ENCODE_BATCH = 8


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log-variance (B, C, h, w), half precision on the CPU, for uint8 images (B, 3, H, W).

    On a CPU one thread computes, since the last bits depend on the number of threads. To use more cores, start more
    processes.
    """
    pixels = (images.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    with one_thread():
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.half().cpu().contiguous(), posterior.logvar.half().cpu().contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode uint8 images (B, 3, H, W), uint8: the best that a diffusion model on this VAE can draw."""
    mean, _ = encode(vae, images)
    with one_thread():
        decoded = vae.decode(mean.to(vae.device, vae.dtype)).sample
    return ((decoded.float() / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def sample_posterior(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return mean + noise * exp(logvar / 2), clamped as AutoencoderKL does; float32, not scaled."""
    return mean.float() + noise * torch.exp(0.5 * logvar.float().clamp(-30, 20))


def encode_data_set(
    vae: AutoencoderKL | None,
    files: Dataset,
    rows: Sequence[int],
    caption_ids: Sequence[int],
    folder: str | Path,
    *,
    rank: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    keep_image: Callable[[int, torch.Tensor], None] | None = None,
    is_kept: Callable[[int], bool] = lambda position: True,
) -> int:
    """Encode this process's shards of a data set of uint8 images; return the number of images decoded.

    Shards are dealt to the processes and appear atomically: a rerun after a kill continues with the missing ones, and
    any number of processes writes the same files.

    Args:
        vae: None only keeps images, without latents.
        files: items (image, ...), images uint8 (3, H, W).
        rows, caption_ids: of each item, stored in the shards.
        keep_image: receives (position, image) of each decoded image, in threads.
        is_kept: whether `keep_image` succeeded for a position before; otherwise its shard is made again.
    """
    hashes = _recorded_hashes(folder)
    starts = range(rank * SHARD_IMAGES, len(rows), processes * SHARD_IMAGES)
    shards = [(_shard_path(folder, start // SHARD_IMAGES), _positions(start, len(rows))) for start in starts]
    total = sum(len(positions) for _, positions in shards)

    def is_done(path: Path, positions: Sequence[int]) -> bool:
        intact = vae is None or _is_intact(path, [rows[position] for position in positions], hashes.get(path.name))
        return intact and all(map(is_kept, positions))

    shards = [(path, positions) for path, positions in shards if not is_done(path, positions)]
    batches = [
        [positions[i : i + ENCODE_BATCH] for i in range(0, len(positions), ENCODE_BATCH)] for _, positions in shards
    ]
    # one loader for all shards keeps its workers alive
    sampler = list(itertools.chain.from_iterable(batches))
    loader = iter(DataLoader(files, batch_sampler=sampler, **loader_options(num_workers)))
    missing = sum(map(len, sampler))
    hidden = None if progress and rank == 0 else True
    with (
        tqdm(total=total, initial=total - missing, desc="encoding", unit="image", disable=hidden) as bar,
        ThreadPoolExecutor(ENCODE_BATCH) as pool,  # compressing PNGs takes longer than decoding JPEGs
    ):
        for (path, positions), shard_batches in zip(shards, batches, strict=True):
            latents = []
            for batch in shard_batches:
                images, _ = next(loader)
                saving = pool.map(keep_image, batch, images) if keep_image else ()
                if vae is not None:
                    latents.append(encode(vae, images))
                list(saving)  # raises errors of the threads
                bar.update(len(images))
            if vae is not None:
                mean, logvar = map(torch.cat, zip(*latents, strict=True))
                numbers = (torch.tensor([values[position] for position in positions]) for values in (rows, caption_ids))
                tensors = dict(zip(("row", "caption"), numbers, strict=True)) | {"mean": mean, "logvar": logvar}
                with atomic_write(path) as temporary:
                    save_file(tensors, temporary)
    return missing


def _shard_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"shard_{number:05d}.safetensors"


def _positions(start: int, count: int) -> list[int]:
    """Return the positions in the data set of the shard that begins at `start`."""
    return list(range(start, min(start + SHARD_IMAGES, count)))


def _recorded_hashes(folder: str | Path) -> dict[str, str]:
    path = Path(folder) / INDEX
    if not path.is_file():
        return {}
    try:
        return {entry["file"]: entry["sha256"] for entry in read_json(path, INDEX_SHAPE)["shards"]}
    except UserError as error:
        logger.warning("%s; it is written again", error)
        return {}


def _is_intact(path: Path, rows: list[int], recorded: str | None) -> bool:
    """Return whether a shard is undamaged and holds these rows; warn if it exists and is not."""
    if not path.is_file():
        return False
    try:
        with open_safetensors(path) as file:  # refuses a file shorter than its header states
            problem = "" if file.get_tensor("row").tolist() == rows else "holds other rows"
    except (UserError, SafetensorError) as error:
        problem = f"is damaged ({error})"
    if not problem and recorded not in (None, sha256(path)):
        problem = f"differs from {INDEX}"
    if problem:
        logger.warning("%s %s and is made again", path, problem)
    return not problem


def write_index(
    folder: str | Path, vae: AutoencoderKL, captions: Sequence[str], images: int, about: Mapping[str, Any]
) -> None:
    """Write the index of a complete folder; `about` describes the source. Main process only.

    Removes shards of an earlier run with more images.
    """
    paths = [_shard_path(folder, number) for number in range(-(-images // SHARD_IMAGES))]
    index = dict(about) | {
        "vae_sha256": fingerprint(vae),
        "scaling_factor": vae.config.scaling_factor,
        "images": images,
        "captions": list(captions),
        "shards": [{"file": path.name, "sha256": sha256(path)} for path in paths],
    }
    for leftover in set(Path(folder).glob("shard_*.safetensors")) - set(paths):
        leftover.unlink()
    write_json(Path(folder) / INDEX, index)


class LatentShards(Dataset):
    """Data set of a folder of latents, memory-mapped: items are (mean (C, h, w), logvar (C, h, w), caption id).

    `index` is the content of index.json. Raises UserError for a folder without index, and for a shard that is missing,
    differs from its recorded hash, or has an unexpected content.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / INDEX
        if not path.is_file():
            raise UserError(f"{str(folder)!r} holds no complete latents (no {INDEX}); run the extraction (again)")
        self.index = read_json(path, INDEX_SHAPE, "delete it and run the extraction again")
        self.captions, self.images = self.index["captions"], self.index["images"]
        self._caption_ids = torch.arange(len(self.captions))
        self._shards = [self._load(path.parent, entry) for entry in self.index["shards"]]
        if problem := self._find_problem():
            raise UserError(f"{str(path)!r} is damaged ({problem}); delete it and run the extraction again")

    @staticmethod
    def _load(folder: Path, entry: Mapping[str, str]) -> dict[str, torch.Tensor]:
        path = path_inside(folder, str(entry["file"]), f"{str(folder / INDEX)!r}")
        if not path.is_file() or sha256(path) != entry["sha256"]:
            problem = "differs from the index" if path.is_file() else "is missing"
            raise UserError(f"latent shard {str(path)!r} {problem}; run the command that wrote it again to restore it")
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)

    def _find_problem(self) -> str | None:
        """Return why an item could not be read or would have no caption, or None."""
        sizes = [len(_positions(start, self.images)) for start in range(0, self.images, SHARD_IMAGES)]
        if not sizes or len(sizes) != len(self._shards):
            return f"it states {self.images} images and {len(self._shards)} shards"
        for shard, size in zip(self._shards, sizes, strict=True):
            if lacking := {"row", "caption", "mean", "logvar"} - shard.keys():
                return f"a shard lacks {min(lacking)!r}"
            rows, captions = shard["row"], shard["caption"]
            if {rows.dtype, captions.dtype} != {torch.int64} or not rows.shape == captions.shape == (size,):
                return f"a shard is not of {size} images"
            if not 0 <= captions.min() <= captions.max() < len(self.captions):
                return "a shard has a caption that is not listed"
            if not shard["mean"].shape == shard["logvar"].shape == (size, *self.shape) or len(self.shape) != 3:
                return "shards have latents of different shapes"
        return None

    def shares_images_with(self, other: "LatentShards") -> bool:
        """Return whether both come from the same table and have rows in common."""
        rows = [{row for shard in own._shards for row in shard["row"].tolist()} for own in (self, other)]
        return self.index.get("csv_sha256") == other.index.get("csv_sha256") and bool(rows[0] & rows[1])

    def digests(self) -> list[str]:
        """Return the SHA-256 of each shard."""
        return [shard["sha256"] for shard in self.index["shards"]]

    def renumber(self, captions: Sequence[str]) -> None:
        """Make caption ids positions in this list, which contains all captions of the latents."""
        self._caption_ids = torch.tensor([captions.index(caption) for caption in self.captions])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of one latent."""
        return tuple(self._shards[0]["mean"].shape[1:])

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number, offset = divmod(position, SHARD_IMAGES)
        mean, logvar, caption = (self._shards[number][name][offset] for name in ("mean", "logvar", "caption"))
        return mean, logvar, self._caption_ids[caption]

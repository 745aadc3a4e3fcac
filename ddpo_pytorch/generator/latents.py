"""Latents of a whole data set, encoded once: safetensors shards with an index, from which stage (i) trains.

A folder of latents holds `shard_<number>.safetensors` and, once all of them are there, `index.json`. A shard has, for
up to SHARD_IMAGES images in the order of the data set, `row` (n,) int64, `caption` (n,) int64 (the position of the
caption in the index's list), and the mean and log-variance of the autoencoder's posterior, `mean` and `logvar`
(n, C, h, w) in half precision, not scaled. The index states what made them: autoencoder, image size, resize, source.
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

from ddpo_pytorch.data.image_cache import loader_options
from ddpo_pytorch.utils.cores import one_thread
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, path_inside, sha256, write_json
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import COUNT, read_json
from ddpo_pytorch.utils.weights import open_safetensors

logger = logging.getLogger(__name__)
INDEX = "index.json"
SHARD_IMAGES = 256
SHAPE = {"captions": [str], "images": COUNT, "shards": [{"file": str, "sha256": str}]}  # of the index
ENCODE_BATCH = 8


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (B, C, h, w), half precision on the CPU, of the posterior for uint8 images (B, 3, H, W).

    On a CPU by one thread: the last bits depend on their number, and that on the number of processes. To use more
    cores, start more processes.
    """
    pixels = (images.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    with one_thread():
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.half().cpu().contiguous(), posterior.logvar.half().cpu().contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder makes of uint8 images (B, 3, H, W), uint8: the best that any diffusion model on it can draw.

    On a CPU by one thread, as `encode`.
    """
    mean, _ = encode(vae, images)
    with one_thread():
        decoded = vae.decode(mean.to(vae.device, vae.dtype)).sample
    return ((decoded.float() / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def sample_posterior(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """mean + noise * exp(logvar / 2), clamped as AutoencoderKL does; float32, not scaled."""
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
    """Encode this process's shards of a data set of uint8 images; returns how many images were decoded.

    Shards are dealt to the processes and written whole, so that a killed run goes on with the first that is missing,
    and every number of processes writes the same. `keep_image(position, image)` gets each image that is decoded;
    a shard whose images are not all `is_kept` is done again. Without a `vae` no shard is written, only images are kept.
    """
    count, hashes = len(rows), _recorded_hashes(folder)
    starts = range(rank * SHARD_IMAGES, count, processes * SHARD_IMAGES)
    share = sum(min(SHARD_IMAGES, count - start) for start in starts)
    shards = {}  # to be made: the positions of a shard's images, in batches
    for start in starts:
        positions = list(range(start, min(start + SHARD_IMAGES, count)))
        path = shard_path(folder, start // SHARD_IMAGES)
        kept = vae is None or _holds(path, [rows[position] for position in positions], hashes.get(path.name))
        if not kept or not all(map(is_kept, positions)):
            shards[path] = [positions[i : i + ENCODE_BATCH] for i in range(0, len(positions), ENCODE_BATCH)]
    # one loader for all shards: its workers stay
    batches = list(itertools.chain.from_iterable(shards.values()))
    loader = iter(DataLoader(files, batch_sampler=batches, **loader_options(num_workers)))
    missing = sum(map(len, batches))
    shown = None if progress and rank == 0 else True
    with (
        tqdm(total=share, initial=share - missing, desc="encoding", unit="image", disable=shown) as bar,
        ThreadPoolExecutor(ENCODE_BATCH) as pool,  # compressing PNGs takes longer than decoding JPEGs
    ):
        for path, own_batches in shards.items():
            latents = []
            for positions in own_batches:
                images, _ = next(loader)
                saving = pool.map(keep_image, positions, images) if keep_image else ()
                if vae is not None:
                    latents.append(encode(vae, images))
                list(saving)  # an error in a thread is raised here
                bar.update(len(images))
            if vae is not None:
                positions = list(itertools.chain.from_iterable(own_batches))
                shard = {"row": torch.tensor([rows[position] for position in positions])}
                shard["caption"] = torch.tensor([caption_ids[position] for position in positions])
                shard["mean"], shard["logvar"] = map(torch.cat, zip(*latents, strict=True))
                with atomic_write(path) as temporary:
                    save_file(shard, temporary)
    return missing


def shard_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"shard_{number:05d}.safetensors"


def _recorded_hashes(folder: str | Path) -> dict[str, str]:
    path = Path(folder) / INDEX
    try:
        return {entry["file"]: entry["sha256"] for entry in read_json(path, SHAPE)["shards"]} if path.is_file() else {}
    except UserError as error:
        logger.warning("%s; it is written again", error)
        return {}


def _holds(path: Path, rows: list[int], recorded: str | None) -> bool:
    """Whether a shard is whole and of these rows; one that is not is told of and made again."""
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
    """Write the index of a complete folder; `about` states the source. For one process, when all shards are there.

    Shards beyond it, of an earlier run with more images, are removed.
    """
    paths = [shard_path(folder, number) for number in range(-(-images // SHARD_IMAGES))]
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
    """Items (mean, logvar, caption id) of a folder of latents. Shards are memory-mapped and shared between processes.

    `index` is the content of index.json. Raises UserError for a folder without one, a missing shard, or a shard that
    differs from the hash in the index: cut off, or half-written by something else.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / INDEX
        if not path.is_file():
            raise UserError(
                f"{str(folder)!r} holds no complete latents (no {INDEX}); run scripts/extract_dataset_latents.py, "
                "or the same command again if it was stopped"
            )
        self.index = read_json(path, SHAPE, "delete it and run the extraction again")
        self.captions, self.images = self.index["captions"], self.index["images"]
        self._positions = torch.arange(len(self.captions))
        self._shards = [self._load(path.parent, entry) for entry in self.index["shards"]]
        self._check(path)

    @staticmethod
    def _load(folder: Path, entry: Mapping[str, str]) -> dict[str, torch.Tensor]:
        path = path_inside(folder, str(entry["file"]), f"{str(folder / INDEX)!r}")
        if not path.is_file() or sha256(path) != entry["sha256"]:
            problem = "differs from the index" if path.is_file() else "is missing"
            raise UserError(
                f"latent shard {str(path)!r} {problem}; run the command that wrote it again, it makes this shard anew"
            )
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)

    def _check(self, path: Path) -> None:
        """Raise UserError for shards of which an item could not be taken, or would have no caption."""
        sizes = [min(SHARD_IMAGES, self.images - start) for start in range(0, self.images, SHARD_IMAGES)]
        faults = map(self._fault, self._shards, sizes)
        if not sizes or len(sizes) != len(self._shards):
            faults = [f"it states {self.images} images and {len(self._shards)} shards"]
        if fault := next(filter(None, faults), None):
            raise UserError(f"{str(path)!r} is damaged ({fault}); delete it and run the extraction again")

    def _fault(self, shard: Mapping[str, torch.Tensor], size: int) -> str | None:
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
        """Whether the two were made from rows of one table of which some are in both."""
        rows = [{row for shard in own._shards for row in shard["row"].tolist()} for own in (self, other)]
        return self.index.get("csv_sha256") == other.index.get("csv_sha256") and bool(rows[0] & rows[1])

    def digests(self) -> list[str]:
        """SHA-256 of each shard."""
        return [shard["sha256"] for shard in self.index["shards"]]

    def renumber(self, captions: Sequence[str]) -> None:
        """From now on caption ids are positions in this list, which has all captions of the latents."""
        self._positions = torch.tensor([captions.index(caption) for caption in self.captions])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return tuple(self._shards[0]["mean"].shape[1:])

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shard, offset = divmod(position, SHARD_IMAGES)
        mean, logvar, caption = (self._shards[shard][name][offset] for name in ("mean", "logvar", "caption"))
        return mean, logvar, self._positions[caption]

"""Latents of a data set, encoded once into safetensors shards with an index; stage (i) trains on them.

A folder holds `shard_<number>.safetensors` and, once it is complete, `index.json` about autoencoder, images and source.
A shard of n <= SHARD_IMAGES images, in the order of the data set, has int64 (n,) of `row`, `caption` (position in the
index's list) and, if known, `content` of the image file (`data.images.content_numbers`), and the autoencoder's
posterior `mean` and `logvar` (n, C, h, w) in half precision, not scaled.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, Dataset
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
    """Return mean and log-variance (B, C, h, w), half precision on the CPU, for uint8 images (B, 3, H, W)."""
    pixels = (images.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    with one_thread():  # the last bits depend on the number of threads; more processes use more cores
        posterior = vae.encode(pixels).latent_dist
    return posterior.mean.half().cpu().contiguous(), posterior.logvar.half().cpu().contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode uint8 images (B, 3, H, W), uint8: the best that a diffusion model with this VAE can do."""
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
    contents: Sequence[int] = (),
    rank: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    keep_image: Callable[[int, torch.Tensor], None] | None = None,
    is_kept: Callable[[int], bool] = lambda position: True,
) -> int:
    """Encode this process's shards of a data set of uint8 images; return the number of images decoded.

    Shards are written atomically: a rerun continues with the missing ones. The number of processes does not matter.

    Args:
        vae: if None, images are only passed to `keep_image`, without latents.
        files: items (image, ...), images uint8 (3, H, W).
        rows, caption_ids: row and caption number of each item, stored in the shards.
        contents: `content_numbers` of the items' files; a shard of other files is redone, unless it records none.
        keep_image: receives (position, image) of each decoded image, in threads.
        is_kept: whether the image at a position was kept by an earlier run; if not, its shard is encoded again.
    """
    columns = {"row": rows, "caption": caption_ids} | ({"content": contents} if contents else {})
    index, hashes = Path(folder) / INDEX, {}
    # Listed rather than looked up: for half a minute, an NFS client trusts that a name it missed does not exist, and a
    # node that encodes nothing would not find the index that the main process writes meanwhile.
    if index.parent.is_dir() and INDEX in os.listdir(folder):
        try:
            hashes = {entry["file"]: entry["sha256"] for entry in read_json(index, INDEX_SHAPE)["shards"]}
        except UserError as error:
            logger.warning("%s; writing it again", error)

    def numbers(positions: range) -> dict[str, list[int]]:
        return {name: [column[position] for position in positions] for name, column in columns.items()}

    def is_done(path: Path, positions: range) -> bool:
        problem = "" if vae is None else _find_damage(path, hashes.get(path.name), numbers(positions))
        if problem and path.is_file():
            logger.warning("%s %s and is encoded again", path, problem)
        return not problem and all(map(is_kept, positions))

    own = _shards(folder, len(rows))[rank::processes]
    missing = [(path, positions) for path, positions in own if not is_done(path, positions)]
    # one loader for all shards keeps its workers alive
    batches = [batch for _, positions in missing for batch in BatchSampler(positions, ENCODE_BATCH, drop_last=False)]
    loader = iter(DataLoader(files, batch_sampler=batches, **loader_options(num_workers)))
    total, count = (sum(len(positions) for _, positions in shards) for shards in (own, missing))
    hidden = None if progress and rank == 0 else True
    with (
        tqdm(total=total, initial=total - count, desc="encoding", unit="image", disable=hidden) as bar,
        ThreadPoolExecutor(ENCODE_BATCH) as pool,  # compressing PNGs takes longer than decoding JPEGs
    ):
        for path, positions in missing:
            latents = []
            for batch in BatchSampler(positions, ENCODE_BATCH, drop_last=False):
                images, _ = next(loader)
                saving = pool.map(keep_image, batch, images) if keep_image else ()
                if vae is not None:
                    latents.append(encode(vae, images))
                list(saving)  # raises errors of the threads
                bar.update(len(images))
            if vae is not None:
                mean, logvar = map(torch.cat, zip(*latents, strict=True))
                shard = {name: torch.tensor(values) for name, values in numbers(positions).items()}
                with atomic_write(path) as temporary:
                    save_file(shard | {"mean": mean, "logvar": logvar}, temporary)
    return count


def _shards(folder: str | Path, images: int) -> list[tuple[Path, range]]:
    """Return each shard's file and the positions of its images in the data set."""
    parts = [range(start, images)[:SHARD_IMAGES] for start in range(0, images, SHARD_IMAGES)]
    return [(Path(folder) / f"shard_{number:05d}.safetensors", part) for number, part in enumerate(parts)]


def write_index(folder: str | Path, vae: AutoencoderKL, captions: Sequence[str], images: int, about: Mapping) -> None:
    """Write the index of a complete folder, `about` its source; remove excess shards. Main process only."""
    paths = [path for path, _ in _shards(folder, images)]
    network = {"vae_sha256": fingerprint(vae), "scaling_factor": vae.config.scaling_factor}
    shards = [{"file": path.name, "sha256": sha256(path)} for path in paths]
    for leftover in set(Path(folder).glob("shard_*.safetensors")) - set(paths):
        leftover.unlink()
    contents = {"images": images, "captions": list(captions), "shards": shards}
    write_json(Path(folder) / INDEX, {**about, **network, **contents})


def _find_damage(path: Path, recorded: str | None, expected: Mapping[str, list[int]] = {}) -> str:
    """Return why a shard is unusable (missing, truncated, not the recorded one, of other rows or images), or ""."""
    try:
        with open_safetensors(path) as file:  # rejects a truncated file
            if "row" in expected and file.get_tensor("row").tolist() != expected["row"]:
                return "holds other rows"
            contents = file.get_tensor("content").tolist() if "content" in file.keys() else None  # noqa: SIM118
            if contents is not None and contents != expected.get("content", contents):
                return "is of images that have changed since"
    except (UserError, SafetensorError) as error:
        return f"is damaged ({error})" if path.is_file() else "is missing"
    return "" if recorded in (None, sha256(path)) else f"differs from {INDEX}"


class LatentShards(Dataset):
    """Memory-mapped data set of a folder of latents; items are (mean (C, h, w), logvar (C, h, w), caption id).

    `index` is the content of index.json. Raises UserError for a folder without index, and for a shard that is missing,
    differs from its recorded hash, or has unexpected content.
    """

    def __init__(self, folder: str | Path):
        path, advice = Path(folder) / INDEX, "delete it and run the extraction again"
        if not path.is_file():
            raise UserError(f"{str(folder)!r} holds no complete latents (no {INDEX}); run the extraction (again)")
        self.index = read_json(path, INDEX_SHAPE, advice)
        self.captions, self.images = self.index["captions"], self.index["images"]
        self._caption_ids, self._shards = torch.arange(len(self.captions)), []
        for entry in self.index["shards"]:
            shard = path_inside(folder, entry["file"], repr(str(path)))
            if problem := _find_damage(shard, entry["sha256"]):
                raise UserError(f"{str(shard)!r} {problem}; run the command that wrote it again to restore it")
            with open_safetensors(shard) as file:
                self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
        if problem := self._find_problem():
            raise UserError(f"{str(path)!r} is damaged ({problem}); {advice}")

    def _find_problem(self) -> str | None:
        """Return why some item cannot be read or has no caption, or None."""
        if not self._shards or len(self._shards) != -(-self.images // SHARD_IMAGES):
            return f"it states {self.images} images and {len(self._shards)} shards"
        for shard, (_, positions) in zip(self._shards, _shards("", self.images), strict=True):
            if lacking := {"row", "caption", "mean", "logvar"} - shard.keys():
                return f"a shard lacks {min(lacking)!r}"
            size, rows, captions = len(positions), shard["row"], shard["caption"]
            if {rows.dtype, captions.dtype} != {torch.int64} or not rows.shape == captions.shape == (size,):
                return f"a shard does not have {size} images"
            if not 0 <= captions.min() <= captions.max() < len(self.captions):
                return "a shard has a caption that is not listed"
            if not shard["mean"].shape == shard["logvar"].shape == (size, *self.shape) or len(self.shape) != 3:
                return "shards have latents of different shapes"
        return None

    def check_disjoint(self, validation: "LatentShards") -> None:
        """Raise UserError if both have images in common: equal files, or the same rows of a table."""
        same_table = self.index.get("csv_sha256") == validation.index.get("csv_sha256")
        for name in ("content", "row") if same_table else ("content",):  # shards of earlier versions lack the content
            shards = [[shard[name].tolist() for shard in part._shards if name in shard] for part in (self, validation)]
            ours, theirs = ({number for numbers in part for number in numbers} for part in shards)
            if ours & theirs:
                advice = "extract them from different split tables"
                raise UserError(f"training and validation latents share {len(ours & theirs)} images; {advice}")

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


def merge_captions(sets: Sequence[LatentShards]) -> list[str]:
    """Renumber the caption ids of several sets as positions in a common list of captions, and return that."""
    captions = list(dict.fromkeys(caption for latents in sets for caption in latents.captions))
    for latents in sets:
        latents._caption_ids = torch.tensor([captions.index(caption) for caption in latents.captions])
    return captions

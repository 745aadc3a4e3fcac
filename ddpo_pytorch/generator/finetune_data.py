"""Settings and training data of stage (i): images of a split table, or latents that are encoded once and verified."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from ml_collections import ConfigDict
from torch.utils.data import DataLoader, Dataset

from ddpo_pytorch.data import datasets as kinds
from ddpo_pytorch.data.images import RESIZES, ImageFiles, content_numbers, loader_options
from ddpo_pytorch.data.sample_folder import LOG, claim_folder, read_pool
from ddpo_pytorch.data.tables import Row
from ddpo_pytorch.generator.from_scratch import GROUPS, HEAD_WIDTH, TEXT_ENCODERS
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, write_index
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream
from ddpo_pytorch.utils.settings import NOT_NEGATIVE, ONE_OR_MORE, ZERO_OR_MORE, Range, check_choices, check_ranges

logger = logging.getLogger(__name__)
# result of each stage, in sd.output
OUTCOMES = {"vae": "vae", "unet": "pretrained_unet.safetensors", "finetune": "pretrained_unet.safetensors"}
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
REAL_SHARE = Range("[0.5, 1]")  # at least half of the images are real
RANGES = dict.fromkeys(("num_steps", "batch_size", "gradient_accumulation_steps", "image_size"), ONE_OR_MORE)
RANGES |= dict.fromkeys(("log_every", "val_every", "lora_rank", "text_width", "text_layers"), ONE_OR_MORE)
RANGES |= dict.fromkeys(("limit", "val_images", "warmup_steps", "grid_every", "save_every"), ZERO_OR_MORE)
RANGES |= {"vae_latent_channels": ONE_OR_MORE, "num_workers": ZERO_OR_MORE, "vae_crop": ZERO_OR_MORE}
RANGES |= dict.fromkeys(("min_snr_gamma", "vae_kl_weight", "perceptual_coef", "adversarial_coef"), NOT_NEGATIVE)
RANGES |= dict.fromkeys(("caption_dropout", "ema_decay"), Range("[0, 1)")) | {"learning_rate": Range("(0, inf)")}
RANGES |= {"text_tokens": Range("[2, inf)", whole=True), "real_share": REAL_SHARE}
# Settings that may change when a run resumes: those without effect on the result, and paths. The data, VAE, BERT and
# pool at these paths are compared by content.
_FREE = {"output", "data_path", "csv", "val_csv", "val_images", "latents", "val_latents", "cache_dir", "vae", "bert"}
_FREE |= {"pool", "perceptual_net", "num_workers", "gradient_checkpointing", "batch_size"}
_FREE |= {f"{name}_every" for name in ("log", "val", "grid", "save")}


def check_settings(sd: ConfigDict) -> None:
    """Raise UserError for values of `config.sd` that are out of range or contradict each other."""
    choices = {"stage": OUTCOMES, "kind": kinds.KINDS, "resize": RESIZES, "lr_schedule": SCHEDULES}
    check_choices(sd, choices | {"text_encoder": TEXT_ENCODERS}, "sd.")
    check_ranges(sd, RANGES, "sd.")
    for name in ("pool", "use_lora"):
        if sd[name] and sd.stage != "finetune":
            raise UserError(f"sd.{name} is {sd[name]!r}, which needs sd.stage=finetune; it is {sd.stage!r}")
    if sd.use_lora and sd.train_text_encoder:
        raise UserError("sd.use_lora=True trains only adapters of the UNet; set sd.train_text_encoder=False")
    for name in ("vae_channels", "unet_channels"):
        if not sd[name] or any(count not in ONE_OR_MORE or count % GROUPS for count in sd[name]):
            raise UserError(f"sd.{name} is {sd[name]!r}; it must be one or more multiples of {GROUPS}")
    if sd.text_width % HEAD_WIDTH:
        raise UserError(f"sd.text_width is {sd.text_width}; it must be a multiple of {HEAD_WIDTH}")
    factor = 2 ** (len(sd.vae_channels) - 1) if sd.stage != "finetune" else 8
    if sd.image_size % factor:
        raise UserError(f"sd.image_size is {sd.image_size}; it must be a multiple of {factor}, the VAE's reduction")
    if sd.vae_crop % factor or sd.vae_crop > sd.image_size:
        raise UserError(f"sd.vae_crop is {sd.vae_crop}; it must be a multiple of {factor}, at most sd.image_size")
    if sd.adversarial_coef and not (sd.stage == "vae" and sd.vae):
        raise UserError("sd.adversarial_coef trains a trained autoencoder's decoder; give sd.stage=vae and sd.vae=DIR")
    if sd.adversarial_coef and (sd.vae_crop or sd.image_size) < 24:
        raise UserError("sd.adversarial_coef needs images or crops of 24 pixels or more, the discriminator's patches")
    if sd.csv and sd.val_csv and not sd.latents:
        kinds.check_apart(sd.kind, Path(sd.csv), Path(sd.val_csv))
    if len(sd.unet_channels) != len(sd.unet_attention):
        counts = len(sd.unet_channels), len(sd.unet_attention)
        raise UserError(f"sd.unet_channels and sd.unet_attention have {counts} values; give the same number")


def settings_of(config: ConfigDict, processes: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that must not change on resuming: settings that affect the result, and hashes of the data."""
    settings = {f"sd.{name}": value for name, value in config.sd.items() if name not in _FREE}
    common = {"seed": config.seed, "mixed_precision": config.mixed_precision}
    return settings | common | {"sd.batch_size x processes": config.sd.batch_size * processes, **data}


def find_rows(sd: ConfigDict, csv: str, limit: int) -> tuple[list[Row], list[Path]]:
    """Return the rows of a split table whose image exists, at most `limit` (0: all), and their image files."""
    rows, paths, missing = kinds.find_rows(sd.kind, csv, sd.data_path, limit, sd.skip_broken)
    logger.info("%s: %d images, %d rows without one are skipped", csv, len(rows), missing)
    return rows, paths


def find_images(sd: ConfigDict, csv: str, limit: int) -> ImageFiles:
    """Return the images of a split table as uint8 squares."""
    paths = find_rows(sd, csv, limit)[1]
    return ImageFiles(paths, torch.arange(len(paths)), sd.image_size, sd.resize)


def open_latents(
    accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, validation: bool = False
) -> LatentShards | None:
    """Return the latents for training or validation: those configured, else encoded into sd.output/latents.

    Returns None if validation is not configured. Raises UserError for latents of another VAE, size or resize mode.
    """
    train, val = ("train", sd.latents, sd.csv, sd.limit), ("val", sd.val_latents, sd.val_csv, sd.val_images)
    name, given, csv, limit = val if validation else train
    if given:
        latents = LatentShards(given)
    elif validation and not csv:
        return None
    else:
        rows, paths = find_rows(sd, csv, limit)
        items = [(path, row.number, row.caption) for row, path in zip(rows, paths, strict=True)]
        captions, origin = kinds.KINDS[sd.kind].caption_list(rows), {"csv_sha256": sha256(csv)}
        latents = _encode(accelerator, sd, vae, items, captions, name, origin, limit=limit)
    expected = {"vae_sha256": fingerprint(vae), "image_size": sd.image_size, "resize": sd.resize}
    if changed := difference({key: latents.index.get(key) for key in expected}, expected):
        raise UserError(f"the latents in {given!r} were made with {changed}; extract them again")
    return latents


def open_pool(accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL) -> tuple[LatentShards, list[float]]:
    """Return the latents of images in sd.pool that passed the Selector (else UserError), and their Policy scores."""
    entries = [entry for entry in read_pool(sd.pool, "sd.pool") if entry["passed"]]
    if not entries:
        raise UserError(f"sd.pool {sd.pool!r} has no image that the Selector passed; raise improve.max_attempts")
    items = [(Path(sd.pool) / entry["path_to_img"], row, entry["prompt"]) for row, entry in enumerate(entries)]
    captions, origin = sorted({entry["prompt"] for entry in entries}), {"pool_sha256": sha256(Path(sd.pool) / LOG)}
    return _encode(accelerator, sd, vae, items, captions, "pool", origin), [entry["policy"] for entry in entries]


def _encode(
    accelerator: Accelerator,
    sd: ConfigDict,
    vae: AutoencoderKL,
    items: Sequence[tuple[Path, int, str]],
    captions: Sequence[str],
    name: str,
    origin: Mapping[str, Any],
    **settings: Any,
) -> LatentShards:
    """Encode images (file, row, caption) into a folder below sd.output, reserved for this origin and settings."""
    folder, about = Path(sd.output) / "latents" / name, {**origin, "image_size": sd.image_size, "resize": sd.resize}
    claimed = about | settings | {"vae_sha256": fingerprint(vae)}
    run_on_main_process(accelerator, claim_folder, folder, claimed, {"images": len(items)})
    paths, rows, texts = zip(*items, strict=True)
    files, contents = ImageFiles(paths, torch.tensor(rows), sd.image_size, sd.resize), content_numbers(paths)
    ids, rank, processes = [captions.index(t) for t in texts], accelerator.process_index, accelerator.num_processes
    done = encode_data_set(
        vae, files, rows, ids, folder, contents=contents, rank=rank, processes=processes, num_workers=sd.num_workers
    )
    done = accelerator.reduce(torch.tensor(done, device=accelerator.device)).item()
    if accelerator.is_main_process:
        write_index(folder, vae, captions, len(items), about)
        logger.info("latents of %d images in %s, %d of them encoded now", len(items), folder, done)
    accelerator.wait_for_everyone()
    return LatentShards(folder)


class MixedLatents(Dataset):
    """Real and pool latents for fine-tuning on images that judges chose (RAFT, Dong et al. 2023).

    Items are (mean, logvar, caption id, weight): all real images with weight 1, then images of the pool with weights
    w_i / mean(w). A pass over the real images takes round(real (1 - real_share) / real_share) images of the pool,
    whatever its size, so that the real ones keep the generator from drifting where the judges are blind. A larger pool
    is spread over several passes, shuffled together. Raises UserError for weights that are negative or all 0.
    """

    def __init__(self, real: LatentShards, pool: LatentShards, weights: Sequence[float], real_share: float):
        values = torch.tensor(weights, dtype=torch.float32)
        if not (values >= 0).all() or not values.sum() > 0:
            raise UserError("the pool's scores are negative or all 0; draw the pool again with scripts/generate.py")
        self.real, self.pool, self.weights = real, pool, values / values.mean()
        share = round(len(real) * (1 - real_share) / real_share)
        self.passes = math.ceil(len(pool) / share) if share else 1
        self.from_pool = self.passes * share

    def __len__(self) -> int:
        return self.passes * len(self.real) + self.from_pool

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        number = position - self.passes * len(self.real)
        if number < 0:
            return *self.real[position % len(self.real)], torch.ones(())
        index = number * len(self.pool) // self.from_pool  # spreads repeats over all captions
        return *self.pool[index], self.weights[index]


def endless_batches(
    accelerator: Accelerator, sd: ConfigDict, seed: int, dataset: Dataset, first: int
) -> Iterator[tuple[list[torch.Tensor], BatchDraws]]:
    """Yield this process's batches, starting with number `first`, each with its random numbers."""
    size, share = sd.batch_size, (accelerator.process_index, accelerator.num_processes)
    sampler = EndlessBatches(len(dataset), size, seed, first, *share)
    loader = DataLoader(dataset, batch_sampler=sampler, **loader_options(sd.num_workers))
    for number, batch in enumerate(loader, start=first):
        batch = [tensor.to(accelerator.device, non_blocking=True) for tensor in batch]
        yield batch, BatchDraws(seed, Stream.NOISE, number, size, *share, device=accelerator.device)

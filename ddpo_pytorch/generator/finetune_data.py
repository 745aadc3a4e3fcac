"""What stage (i) trains on: images of a split table, or their latents, made once and checked."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from ml_collections import ConfigDict
from torch.utils.data import Dataset

from ddpo_pytorch.data import datasets as kinds
from ddpo_pytorch.data.datasets import KINDS, Row, check_apart, source
from ddpo_pytorch.data.images import RESIZES, ImageFiles
from ddpo_pytorch.data.sample_folder import LOG, claim_folder, read_log
from ddpo_pytorch.generator.from_scratch import TEXT_ENCODERS
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, write_index
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import checked
from ddpo_pytorch.utils.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    ZERO_OR_MORE,
    Range,
    check_choices,
    check_ranges,
)

logger = logging.getLogger(__name__)
REAL_SHARE = Range("[0.5, 1]")  # half of the images are real, or more
# what a finished stage has left in sd.output.
OUTCOMES = {"vae": "vae", "unet": "pretrained_unet.safetensors", "finetune": "pretrained_unet.safetensors"}
RANGES = {
    **dict.fromkeys(("num_steps", "batch_size", "gradient_accumulation_steps", "image_size"), ONE_OR_MORE),
    **dict.fromkeys(("log_every", "val_every", "lora_rank", "text_width", "text_layers"), ONE_OR_MORE),
    **dict.fromkeys(("limit", "val_images", "warmup_steps", "grid_every", "save_every", "num_workers"), ZERO_OR_MORE),
    "text_tokens": Range("[2, inf)", whole=True),
    "learning_rate": POSITIVE,
    "min_snr_gamma": NOT_NEGATIVE,
    "vae_kl_weight": NOT_NEGATIVE,
    "caption_dropout": BELOW_ONE,
    "ema_decay": BELOW_ONE,
    "real_share": REAL_SHARE,
}
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
# settings that change how a training runs and not what it computes, or that say where things lie: of the autoencoder,
# BERT and pool that these name, the contents are compared.
_FREE = {"output", "data_path", "csv", "val_csv", "val_images", "val_every", "latents", "val_latents", "cache_dir"}
_FREE |= {"num_workers", "gradient_checkpointing", "log_every", "grid_every", "save_every", "batch_size"}
_FREE |= {"vae", "bert", "pool"}
# settings that only some stages read
_STAGES_READING = {
    **dict.fromkeys(("vae_kl_weight", "vae_channels"), ("vae",)),
    **dict.fromkeys(("unet_channels", "unet_attention", "text_width", "text_layers"), ("unet",)),
    **dict.fromkeys(("caption_dropout", "min_snr_gamma", "text_encoder", "text_tokens"), ("unet", "finetune")),
    **dict.fromkeys(("use_lora", "lora_rank", "lora_targets", "train_text_encoder", "real_share"), ("finetune",)),
}


class MixedLatents(Dataset):
    """Items (mean, logvar, caption id, weight): the real images and as many from the pool as `real_share` asks for.

    One pass has every real image once, with weight 1, and round(real (1 - real_share) / real_share) items of the pool,
    which is gone through from its beginning as often as that takes; pool image i has weight w_i / mean(w). So the real
    images keep the generator from drifting into what the judges do not see, whatever the size of the pool.

    Args:
        real, pool: latents whose caption ids count in the same list (`LatentShards.renumber`).
        weights: (len(pool),), not negative, not all 0; the judges' scores.
        real_share: in [0.5, 1].

    Raises UserError for another share or weights.
    """

    def __init__(self, real: LatentShards, pool: LatentShards, weights: Sequence[float], real_share: float):
        check_ranges({"real_share": real_share}, {"real_share": REAL_SHARE}, "sd.")
        values = torch.tensor(weights, dtype=torch.float32)
        if len(values) != len(pool) or not (values >= 0).all() or not values.sum() > 0:
            raise UserError(
                f"{len(values)} weights for {len(pool)} images of the pool, or weights that are not positive numbers; "
                "draw the pool again with scripts/generate.py"
            )
        self.real, self.pool, self.weights = real, pool, values / values.mean()
        self.drawn = round(len(real) * (1 - real_share) / real_share)

    @property
    def captions(self) -> list[str]:
        return list(dict.fromkeys([*self.real.captions, *self.pool.captions]))

    def digests(self) -> list[str]:
        """Hashes of all that is learned from, weights included."""
        return [*self.real.digests(), *self.pool.digests(), str(self.weights.tolist()), str(self.drawn)]

    def shares_images_with(self, other: LatentShards) -> bool:
        """See `LatentShards.shares_images_with`; of the real images."""
        return self.real.shares_images_with(other)

    def renumber(self, captions: Sequence[str]) -> None:
        """See `LatentShards.renumber`; for both parts."""
        self.real.renumber(captions)
        self.pool.renumber(captions)

    def __len__(self) -> int:
        return len(self.real) + self.drawn

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        if position < len(self.real):
            return *self.real[position], torch.ones(())
        index = (position - len(self.real)) % len(self.pool)
        return *self.pool[index], self.weights[index]


def check_settings(sd: ConfigDict) -> None:
    """Refuse `config.sd` that cannot be trained (UserError)."""
    choices = {"stage": OUTCOMES, "kind": KINDS, "resize": RESIZES, "lr_schedule": SCHEDULES}
    check_choices(sd, choices | {"text_encoder": TEXT_ENCODERS}, "sd.")
    check_ranges(sd, RANGES, "sd.")
    if sd.pool and sd.stage != "finetune":
        raise UserError(f"sd.pool is for sd.stage=finetune, which is {sd.stage!r}")
    if sd.use_lora and (sd.stage != "finetune" or sd.train_text_encoder):
        needed = "sd.train_text_encoder=False" if sd.stage == "finetune" else "sd.stage=finetune"
        raise UserError(f"sd.use_lora=True needs {needed}: it trains adapters of the UNet and nothing else")
    factor = 2 ** (len(sd.vae_channels) - 1) if sd.stage != "finetune" else 8
    if sd.image_size % factor:
        raise UserError(f"sd.image_size is {sd.image_size}; it must be a multiple of {factor}, what the VAE divides by")
    if sd.csv and sd.val_csv and not sd.latents:
        check_apart(sd.kind, Path(sd.csv), Path(sd.val_csv))
    if len(sd.unet_channels) != len(sd.unet_attention) or any(n % 8 for n in (*sd.unet_channels, *sd.vae_channels)):
        raise UserError("sd.unet_channels and sd.unet_attention must be equally long, and channels multiples of 8")


def state_file(sd: ConfigDict) -> Path:
    """Return where the state of an unfinished stage lies."""
    return Path(sd.output) / f"{sd.stage}_state.pt"


def refuse_outcome(sd: ConfigDict) -> None:
    """Raise UserError where a stage's outcome is there, of which nothing but a kill has left the state."""
    outcome = Path(sd.output) / OUTCOMES[sd.stage]
    if outcome.exists():
        state_file(sd).unlink(missing_ok=True)
        raise UserError(f"{str(outcome)!r} exists already; give another folder with --config.sd.output=DIR")


def settings_of(config: ConfigDict, processes: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state to resume from belongs to: settings that its result depends on, and hashes of the data."""
    settings = {f"sd.{name}": value for name, value in config.sd.items() if _matters(config.sd, name)}
    images_per_step = config.sd.batch_size * config.sd.gradient_accumulation_steps * processes
    return settings | {
        "seed": config.seed,
        "mixed_precision": config.mixed_precision,
        "sd.batch_size x processes": images_per_step // config.sd.gradient_accumulation_steps,
        **data,
    }


def _matters(sd: ConfigDict, name: str) -> bool:
    read = {"vae_channels": not sd.vae, "text_tokens": sd.text_encoder == "bert", "real_share": bool(sd.pool)}
    read |= dict.fromkeys(("lora_rank", "lora_targets"), sd.use_lora)
    return name not in _FREE and sd.stage in _STAGES_READING.get(name, OUTCOMES) and read.get(name, True)


def find_rows(sd: ConfigDict, csv: str, limit: int) -> tuple[list[Row], list[Path]]:
    """Rows of a split table that have an image, at most `limit` (0: all), and their files."""
    rows, paths, missing = kinds.find_rows(sd.kind, csv, sd.data_path, limit, sd.skip_broken)
    logger.info("%s: %d images, %d rows without one are skipped", csv, len(rows), missing)
    return rows, paths


def find_images(sd: ConfigDict, csv: str, limit: int) -> ImageFiles:
    """The images of a split table as uint8 squares."""
    paths = find_rows(sd, csv, limit)[1]
    return ImageFiles(paths, torch.arange(len(paths)), sd.image_size, sd.resize)


def open_latents(
    accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, validation: bool = False
) -> LatentShards | None:
    """The latents to train on or to validate with: those of the configuration, or made from images under sd.output.

    None for a validation that is not configured. Raises UserError for latents of another autoencoder or size.
    """
    given, csv = (sd.val_latents, sd.val_csv) if validation else (sd.latents, sd.csv)
    if not given and validation and not csv:
        return None
    folder = Path(given or Path(sd.output) / "latents" / ("val" if validation else "train"))
    if not given:
        _encode(accelerator, sd, vae, csv, sd.val_images if validation else sd.limit, folder)
    latents = LatentShards(folder)
    wanted = {"vae_sha256": fingerprint(vae), "image_size": sd.image_size, "resize": sd.resize}
    for name, value in wanted.items():
        if latents.index.get(name) != value:
            raise UserError(
                f"the latents in {str(folder)!r} were made with {name}={latents.index.get(name)!r}, this training has "
                f"{value!r}; extract them again with the same model and size"
            )
    return latents


def _encode(accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, csv: str, limit: int, folder: Path) -> None:
    rows, paths = find_rows(sd, csv, limit)
    images = ImageFiles(paths, torch.tensor([row.number for row in rows]), sd.image_size, sd.resize)
    captions = source(sd.kind).caption_list(rows)
    numbers = [captions.index(row.caption) for row in rows]
    about = {"csv_sha256": sha256(csv), "image_size": sd.image_size, "resize": sd.resize}
    _encode_images(accelerator, vae, images, captions, numbers, folder, about, about | {"limit": limit}, sd.num_workers)


def add_pool(accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, real: LatentShards) -> MixedLatents:
    """The real images' latents mixed with those of the images in sd.pool that passed, weighted by the Policy's scores.

    Raises UserError for a folder that generate.py did not write, and where no image passed.
    """
    entries = [entry for entry in read_log(sd.pool) if entry.get("passed")]
    if not entries:
        raise UserError(
            f"sd.pool {sd.pool!r} has no image that the Selector passed; draw more with scripts/generate.py "
            "(improve.max_attempts), or lower its threshold (--config.rlhf.threshold) and train it again"
        )
    shape = [{"prompt": str, "policy": float, "path_to_img": str}]
    checked(entries, shape, repr(str(Path(sd.pool) / LOG)), "draw the pool again with scripts/generate.py")
    prompts, weights = [entry["prompt"] for entry in entries], [float(entry["policy"]) for entry in entries]
    paths, captions = [Path(sd.pool) / entry["path_to_img"] for entry in entries], sorted(set(prompts))
    images = ImageFiles(paths, torch.arange(len(paths)), sd.image_size, sd.resize)
    about = {"pool_sha256": sha256(Path(sd.pool) / LOG), "image_size": sd.image_size, "resize": sd.resize}
    folder = Path(sd.output) / "latents" / "pool"
    numbers = [captions.index(prompt) for prompt in prompts]
    _encode_images(accelerator, vae, images, captions, numbers, folder, about, about, sd.num_workers)
    return MixedLatents(real, LatentShards(folder), weights, sd.real_share)


def _encode_images(
    accelerator: Accelerator,
    vae: AutoencoderKL,
    images: ImageFiles,
    captions: Sequence[str],
    numbers: Sequence[int],
    folder: Path,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    num_workers: int,
) -> None:
    """Latents of images, whose captions have these numbers in the list, in a folder that is kept for these settings."""
    if accelerator.is_main_process:
        claim_folder(folder, dict(settings) | {"vae_sha256": fingerprint(vae)}, {"images": len(images)})
    accelerator.wait_for_everyone()
    place = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
    done = encode_data_set(vae, images, images.targets.tolist(), numbers, folder, **place, num_workers=num_workers)
    done = accelerator.reduce(torch.tensor(done, device=accelerator.device)).item()
    if accelerator.is_main_process:
        write_index(folder, vae, captions, len(images), about)
        logger.info("latents of %d images in %s, %d of them encoded now", len(images), folder, done)
    accelerator.wait_for_everyone()

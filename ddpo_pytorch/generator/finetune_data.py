"""Training data and settings of stage (i): images of a split table, or latents that are encoded once and verified."""

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
from ddpo_pytorch.utils.json_files import check_shape
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
# the result of each stage in sd.output
OUTCOMES = {"vae": "vae", "unet": "pretrained_unet.safetensors", "finetune": "pretrained_unet.safetensors"}
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
REAL_SHARE = Range("[0.5, 1]")  # at least half of the images are real
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
# Settings that may change between a run and its resumption: those that do not affect the result, and paths. The VAE,
# BERT and pool at these paths are compared by content.
_FREE = {"output", "data_path", "csv", "val_csv", "val_images", "val_every", "latents", "val_latents", "cache_dir"}
_FREE |= {"num_workers", "gradient_checkpointing", "log_every", "grid_every", "save_every", "batch_size"}
_FREE |= {"vae", "bert", "pool"}
# settings that only some stages use
_STAGES_USING = {
    **dict.fromkeys(("vae_kl_weight", "vae_channels"), ("vae",)),
    **dict.fromkeys(("unet_channels", "unet_attention", "text_width", "text_layers"), ("unet",)),
    **dict.fromkeys(("caption_dropout", "min_snr_gamma", "text_encoder", "text_tokens"), ("unet", "finetune")),
    **dict.fromkeys(("use_lora", "lora_rank", "lora_targets", "train_text_encoder", "real_share"), ("finetune",)),
}


def check_settings(sd: ConfigDict) -> None:
    """Raise UserError for values of `config.sd` that cannot be trained."""
    choices = {"stage": OUTCOMES, "kind": KINDS, "resize": RESIZES, "lr_schedule": SCHEDULES}
    check_choices(sd, choices | {"text_encoder": TEXT_ENCODERS}, "sd.")
    check_ranges(sd, RANGES, "sd.")
    if sd.pool and sd.stage != "finetune":
        raise UserError(f"sd.pool needs sd.stage=finetune, which is {sd.stage!r}")
    if sd.use_lora and (sd.stage != "finetune" or sd.train_text_encoder):
        needed = "sd.train_text_encoder=False" if sd.stage == "finetune" else "sd.stage=finetune"
        raise UserError(f"sd.use_lora=True needs {needed}: it trains adapters of the UNet and nothing else")
    factor = 2 ** (len(sd.vae_channels) - 1) if sd.stage != "finetune" else 8
    if sd.image_size % factor:
        raise UserError(f"sd.image_size is {sd.image_size}; it must be a multiple of {factor}, the VAE's reduction")
    if sd.csv and sd.val_csv and not sd.latents:
        check_apart(sd.kind, Path(sd.csv), Path(sd.val_csv))
    if len(sd.unet_channels) != len(sd.unet_attention) or any(n % 8 for n in (*sd.unet_channels, *sd.vae_channels)):
        raise UserError("sd.unet_channels and sd.unet_attention must be equally long, and channels multiples of 8")


def state_file(sd: ConfigDict) -> Path:
    """Return the path of an unfinished stage's state."""
    return Path(sd.output) / f"{sd.stage}_state.pt"


def refuse_outcome(sd: ConfigDict) -> None:
    """Raise UserError if the stage is finished already; remove a state that a kill left behind then."""
    outcome = Path(sd.output) / OUTCOMES[sd.stage]
    if outcome.exists():
        state_file(sd).unlink(missing_ok=True)
        raise UserError(f"{str(outcome)!r} exists already; give another folder with --config.sd.output=DIR")


def settings_of(config: ConfigDict, processes: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must stay the same to resume: settings that the result depends on, and hashes of the data."""
    sd = config.sd
    used = {"vae_channels": not sd.vae, "text_tokens": sd.text_encoder == "bert", "real_share": bool(sd.pool)}
    used |= dict.fromkeys(("lora_rank", "lora_targets"), sd.use_lora)
    settings = {
        f"sd.{name}": value
        for name, value in sd.items()
        if name not in _FREE and sd.stage in _STAGES_USING.get(name, OUTCOMES) and used.get(name, True)
    }
    common = {"seed": config.seed, "mixed_precision": config.mixed_precision}
    return settings | common | {"sd.batch_size x processes": sd.batch_size * processes, **data}


def find_rows(sd: ConfigDict, csv: str, limit: int) -> tuple[list[Row], list[Path]]:
    """Return the rows of a split table that have an image, at most `limit` (0: all), and their files."""
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
    """Return the latents for training or validation: those configured, or made from images in sd.output/latents.

    None if no validation is configured. Raises UserError for latents of another autoencoder, size or resize mode.
    """
    given, csv = (sd.val_latents, sd.val_csv) if validation else (sd.latents, sd.csv)
    if not given and validation and not csv:
        return None
    folder = Path(given or Path(sd.output) / "latents" / ("val" if validation else "train"))
    if not given:
        limit = sd.val_images if validation else sd.limit
        rows, paths = find_rows(sd, csv, limit)
        texts, captions = [row.caption for row in rows], source(sd.kind).caption_list(rows)
        numbers = [row.number for row in rows]
        _encode(accelerator, sd, vae, paths, numbers, texts, captions, folder, {"csv_sha256": sha256(csv)}, limit=limit)
    latents = LatentShards(folder)
    wanted = {"vae_sha256": fingerprint(vae), "image_size": sd.image_size, "resize": sd.resize}
    for name, value in wanted.items():
        if latents.index.get(name) != value:
            made = f"{name}={latents.index.get(name)!r}, this training has {value!r}"
            raise UserError(f"the latents in {str(folder)!r} were made with {made}; extract them again")
    return latents


def add_pool(accelerator: Accelerator, sd: ConfigDict, vae: AutoencoderKL, real: LatentShards) -> "MixedLatents":
    """Mix real latents with those of the images in sd.pool that passed the Selector, weighted by the Policy's scores.

    Raises UserError for a folder that generate.py did not write, and if no image passed.
    """
    log, folder = Path(sd.pool) / LOG, Path(sd.output) / "latents" / "pool"
    entries = [entry for entry in read_log(sd.pool) if entry.get("passed")]
    if not entries:
        raise UserError(f"sd.pool {sd.pool!r} has no image that the Selector passed; raise improve.max_attempts")
    shape = [{"prompt": str, "policy": float, "path_to_img": str}]
    check_shape(entries, shape, repr(str(log)), "draw the pool again with scripts/generate.py")
    paths, prompts = zip(*((Path(sd.pool) / entry["path_to_img"], entry["prompt"]) for entry in entries), strict=True)
    numbers, captions = range(len(paths)), sorted(set(prompts))
    _encode(accelerator, sd, vae, paths, numbers, prompts, captions, folder, {"pool_sha256": sha256(log)})
    return MixedLatents(real, LatentShards(folder), [entry["policy"] for entry in entries], sd.real_share)


def _encode(
    accelerator: Accelerator,
    sd: ConfigDict,
    vae: AutoencoderKL,
    paths: Sequence[Path],
    numbers: Sequence[int],
    texts: Sequence[str],
    captions: Sequence[str],
    folder: Path,
    origin: Mapping[str, Any],
    **settings: Any,
) -> None:
    """Encode images with row `numbers` and captions `texts` into a folder reserved for this origin and settings."""
    about = {**origin, "image_size": sd.image_size, "resize": sd.resize}
    if accelerator.is_main_process:
        claim_folder(folder, about | settings | {"vae_sha256": fingerprint(vae)}, {"images": len(paths)})
    accelerator.wait_for_everyone()
    done = encode_data_set(
        vae,
        ImageFiles(paths, torch.tensor(numbers), sd.image_size, sd.resize),
        list(numbers),
        [captions.index(text) for text in texts],
        folder,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        num_workers=sd.num_workers,
    )
    done = accelerator.reduce(torch.tensor(done, device=accelerator.device)).item()
    if accelerator.is_main_process:
        write_index(folder, vae, captions, len(paths), about)
        logger.info("latents of %d images in %s, %d of them encoded now", len(paths), folder, done)
    accelerator.wait_for_everyone()


class MixedLatents(Dataset):
    """Real and pool latents for fine-tuning on what judges chose (RAFT, Dong et al. 2023).

    Items are (mean, logvar, caption id, weight). One pass has every real image once, with weight 1, followed by
    round(real (1 - real_share) / real_share) items of the pool in cyclic order, with weights w_i / mean(w). So the real
    images keep the generator from drifting where the judges are blind, whatever the size of the pool.

    Args:
        real, pool: latents with caption ids in the same list (`LatentShards.renumber`).
        weights: (len(pool),), non-negative, not all 0; the judges' scores.
        real_share: in [0.5, 1].

    Raises UserError for another share or weights.
    """

    def __init__(self, real: LatentShards, pool: LatentShards, weights: Sequence[float], real_share: float):
        check_ranges({"real_share": real_share}, {"real_share": REAL_SHARE}, "sd.")
        values = torch.tensor(weights, dtype=torch.float32)
        if len(values) != len(pool) or not (values >= 0).all() or not values.sum() > 0:
            problem = f"{len(pool)} images have {len(values)} weights, or weights that are negative or all 0"
            raise UserError(f"the pool's {problem}; draw the pool again with scripts/generate.py")
        self.real, self.pool, self.weights = real, pool, values / values.mean()
        self.from_pool = round(len(real) * (1 - real_share) / real_share)

    @property
    def captions(self) -> list[str]:
        return list(dict.fromkeys([*self.real.captions, *self.pool.captions]))

    def digests(self) -> list[str]:
        """Return hashes of all training data, weights included."""
        return [*self.real.digests(), *self.pool.digests(), str(self.weights.tolist()), str(self.from_pool)]

    def shares_images_with(self, other: LatentShards) -> bool:
        return self.real.shares_images_with(other)

    def renumber(self, captions: Sequence[str]) -> None:
        self.real.renumber(captions)
        self.pool.renumber(captions)

    def __len__(self) -> int:
        return len(self.real) + self.from_pool

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        if position < len(self.real):
            return *self.real[position], torch.ones(())
        index = (position - len(self.real)) % len(self.pool)
        return *self.pool[index], self.weights[index]

"""Turn a split table and its images into a sample folder of real images, with their VAE latents.

    accelerate launch scripts/extract_dataset_latents.py --config config/dgx.py:preprocess_isic_real_data

Writes to logdir: images/<caption with _>/<row index>.png, lossless and resized to `dataset.image_size`; image_log.json
(sampleID = row index, prompt, path_to_img and every column of the table); and, when `pretrained.model` is not empty,
latents.safetensors with `row` (N,) int64 and the VAE posterior's `mean` and `logvar` (N, C, h, w), fp16 and unscaled.
Rows are dealt to processes by their index. A finished folder is left as it is.
"""

import hashlib
import logging
from pathlib import Path

import torch
from absl import flags
from diffusers import AutoencoderKL
from ml_collections import ConfigDict, config_flags
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ddpo_pytorch.data.images import load_image, save_image, write_log
from ddpo_pytorch.data.isic import Row, folder_name, load_split, read_split
from ddpo_pytorch.data.sample_log import claim_folder
from ddpo_pytorch.data.splits import drop_broken
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.run import cli, make_accelerator

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "config/base.py", "Extraction of real images and latents.")

logger = logging.getLogger(__name__)

LATENTS = "latents.safetensors"
PARTS = "latents.part*.safetensors"
ENCODE_BATCH = 8


def find_rows(dataset: ConfigDict) -> tuple[list[tuple[int, Row, Path]], int]:
    """(row index in the table, row, file) of every row with an image, at most `limit`; and the number without one."""
    if not dataset.csv or not dataset.data_path:
        raise UserError(
            f"dataset.csv is {dataset.csv!r} and dataset.data_path {dataset.data_path!r}; give the split table and the "
            "folder of its <image>.jpg files"
        )
    if dataset.image_size < 1:
        raise UserError(f"dataset.image_size is {dataset.image_size}; it must be at least 1")
    index = {row.image: number for number, row in enumerate(read_split(dataset.csv))}
    rows, paths, missing = load_split(dataset.csv, dataset.data_path, dataset.limit)
    if dataset.skip_broken:
        rows, paths = drop_broken(rows, paths)
    return [(index[row.image], row, path) for row, path in zip(rows, paths, strict=True)], missing


def entry_of(index: int, row: Row) -> dict:
    """Log entry of one image: every column of the table, and what each sample folder states of an image."""
    path = f"images/{folder_name(row.caption)}/{index}.png"
    return row.fields | {"sampleID": index, "prompt": row.caption, "path_to_img": path}


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (B, C, h, w) in fp16 of the VAE's posterior for images (B, 3, H, W) in [0, 1]."""
    posterior = vae.encode((images.to(vae.device) * 2 - 1).to(vae.dtype)).latent_dist
    return posterior.mean.half().cpu().contiguous(), posterior.logvar.half().cpu().contiguous()


def extract(share: list[tuple[int, Row, Path]], size: int, folder: Path, vae: AutoencoderKL | None, bar: tqdm) -> dict:
    """Write this process's images; returns its latents as the tensors `row`, `mean`, `logvar` ({} without a VAE)."""
    rows, means, logvars = [], [], []
    for start in range(0, len(share), ENCODE_BATCH):
        batch = share[start : start + ENCODE_BATCH]
        images = torch.stack([load_image(path, size) for _, _, path in batch])
        for (index, row, _), image in zip(batch, images, strict=True):
            save_image(folder / entry_of(index, row)["path_to_img"], image)
        if vae is not None:
            mean, logvar = encode(vae, images)
            rows += [index for index, _, _ in batch]
            means.append(mean)
            logvars.append(logvar)
        bar.update(len(batch))
    return {"row": torch.tensor(rows), "mean": torch.cat(means), "logvar": torch.cat(logvars)} if rows else {}


def merge_latents(folder: Path) -> None:
    """Join the processes' parts into one file sorted by row."""
    parts = [load_file(file) for file in sorted(folder.glob(PARTS))]
    if parts:
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = joined["row"].argsort()
        save_file({name: value[order].contiguous() for name, value in joined.items()}, folder / LATENTS)
    remove_parts(folder)


def remove_parts(folder: Path) -> None:
    for file in folder.glob(PARTS):
        file.unlink()


def main(_) -> None:
    config = FLAGS.config
    accelerator = make_accelerator("no", config.allow_tf32)
    rank, folder, dataset = accelerator.process_index, Path(config.logdir), config.dataset
    found, missing = find_rows(dataset)
    settings = {
        "csv_sha256": hashlib.sha256(Path(dataset.csv).read_bytes()).hexdigest(),
        "rows": [index for index, _, _ in found],
        "image_size": dataset.image_size,
        "model": config.pretrained.model,
    }
    vae = None
    if config.pretrained.model:
        # fp32: half precision overflows in the encoder of SD 1.5, and stored halves hold its result well enough.
        vae = load_pipeline(config.pretrained.model, config.pretrained.revision, device=accelerator.device).vae
    if accelerator.is_main_process:
        claim_folder(folder, settings, {"csv": dataset.csv, "missing": missing})
        remove_parts(folder)  # of a run that was killed, perhaps with another number of processes
    accelerator.wait_for_everyone()
    if (folder / "image_log.json").is_file():
        logger.info("%s is complete already; nothing to do", folder)
        accelerator.end_training()
        return

    share = found[rank :: accelerator.num_processes]
    with tqdm(total=len(share), disable=None if config.progress and not rank else True) as bar:
        latents = extract(share, dataset.image_size, folder, vae, bar)
    if latents:
        save_file(latents, folder / PARTS.replace("*", str(rank)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        merge_latents(folder)
        write_log(folder, [entry_of(index, row) for index, row, _ in found])
        logger.info("%d images in %s; %d rows of %s have no image", len(found), folder, missing, dataset.csv)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)

"""Turn a split table and its images into a sample folder of real images, with their VAE latents.

    accelerate launch scripts/extract_dataset_latents.py --config config/dgx.py:preprocess_isic_real_data

Writes to logdir: images/<caption with _>/<row index>.png, lossless squares; image_log.json (sampleID = row index,
prompt, path_to_img and every column of the table); and, unless `pretrained.model` is empty, latents/, from which
scripts/train_sd.py trains, with any number of processes. Rerun the same command to complete an interrupted folder, or
after images have changed.
"""

import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from ddpo_pytorch.data.datasets import KINDS, find_rows
from ddpo_pytorch.data.images import (
    LARGEST_SIDE,
    RESIZES,
    ImageFiles,
    comment_of,
    content_numbers,
    is_intact,
    save_image,
)
from ddpo_pytorch.data.sample_folder import WORLD, claim_folder, folder_name, read_log, write_log
from ddpo_pytorch.generator.latents import INDEX, encode_data_set, write_index
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator, run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.settings import ZERO_OR_MORE, Range, check_choices, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/dgx.py:preprocess_isic_real_data")
logger = logging.getLogger(__name__)


def main(_) -> None:
    config = expand_config(FLAGS.config, "logdir")
    accelerator = make_accelerator("no", config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.logdir):
        extract(accelerator, config)
    accelerator.end_training()


def extract(accelerator: Accelerator, config: ConfigDict) -> None:
    """Write the missing parts of the sample folder and its latents."""
    folder, dataset, csv, images = Path(config.logdir), config.dataset, config.dataset.csv, config.dataset.data_path
    if not csv or not images:
        raise UserError(f"dataset.csv is {csv!r} and dataset.data_path {images!r}; give the table and its image folder")
    sizes = {"image_size": Range(f"[1, {LARGEST_SIDE}]", whole=True)}
    check_ranges(dataset, sizes | dict.fromkeys(("limit", "num_workers"), ZERO_OR_MORE), "dataset.")
    check_choices(dataset, {"kind": KINDS, "resize": RESIZES}, "dataset.")
    rows, sources, missing = find_rows(dataset.kind, csv, images, dataset.limit, dataset.skip_broken)
    settings = {"csv_sha256": sha256(csv), "image_size": dataset.image_size, "resize": dataset.resize}
    numbers, captions = [row.number for row in rows], KINDS[dataset.kind].caption_list(rows)
    vae, pretrained = None, config.pretrained
    if pretrained.model:  # in fp32, since SD 1.5's encoder overflows in half precision, in which latents are stored
        pipe = load_pipeline(pretrained.model, pretrained.revision, device=accelerator.device)
        vae, factor = pipe.vae, pipe.vae_scale_factor
        if dataset.image_size % factor:
            problem = f"dataset.image_size is {dataset.image_size}; it must be a multiple of {factor}"
            raise UserError(f"{problem}, the VAE's reduction, unless pretrained.model is empty")
    claimed = settings | {"limit": dataset.limit, "vae_sha256": fingerprint(vae) if vae is not None else ""}
    # pictures must label phantoms as such; the images of skin phantoms are in a subfolder of their world
    phantoms = any((place / WORLD).is_file() for place in (Path(images), Path(images).absolute().parent))
    about = {"phantoms": phantoms, "csv": csv, "model": pretrained.model, "missing": missing}
    run_on_main_process(accelerator, claim_folder, folder, claimed, about)

    # log entries: every column of the table, the patient, and the fields of every sample folder
    entries, contents = [], content_numbers(sources)
    for row in rows:
        path = f"images/{folder_name(row.caption)}/{row.number}.png"
        patient = {"patient": row.patient} if row.patient else {}  # the table may name it only in the path
        usual = {"sampleID": row.number, "prompt": row.caption, "path_to_img": path}
        entries.append(row.fields | patient | usual)
    paths = [folder / entry["path_to_img"] for entry in entries]

    def keep_image(position: int, image: torch.Tensor) -> None:
        save_image(paths[position], image.float() / 255, f"source {contents[position]}")

    def is_kept(position: int) -> bool:  # earlier versions did not record the source
        path = paths[position]
        return is_intact(path) and comment_of(path) in ("", f"source {contents[position]}")

    started = time.perf_counter()
    files = ImageFiles(sources, torch.tensor(numbers), dataset.image_size, dataset.resize)
    done = encode_data_set(
        vae,
        files,
        numbers,
        [captions.index(row.caption) for row in rows],
        folder / "latents",
        contents=contents,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        num_workers=dataset.num_workers,
        progress=config.progress,
        keep_image=keep_image,
        is_kept=is_kept,
    )
    done = accelerator.reduce(torch.tensor(done, device=accelerator.device)).item()
    log = read_log(folder)
    before, complete = {folder / entry["path_to_img"] for entry in log}, [one.get("sampleID") for one in log] == numbers
    complete = complete and (vae is None or (folder / "latents" / INDEX).is_file())
    if accelerator.is_main_process and (done or not complete):
        for leftover in before - set(paths):  # rows whose source image was removed
            leftover.unlink(missing_ok=True)
        if vae is not None:
            write_index(folder / "latents", vae, captions, len(rows), settings)
        write_log(folder, entries)
        speed = done / (time.perf_counter() - started)
        logger.info("%d images in %s, %d of them new at %.1f images/s", len(rows), folder, done, speed)
        logger.info("%d rows of %s have no image", missing, csv)
    elif not done:
        logger.info("%s is complete; nothing to do", folder)


if __name__ == "__main__":
    cli(main)

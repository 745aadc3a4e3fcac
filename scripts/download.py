"""Fetch and check the published files and the official split tables.

    python scripts/download.py                                  # into rl4med-out/published and rl4med-out/data/splits
    python scripts/download.py --check rl4med-out/published     # or --unpack, without network

Rerun the same command after an interruption: it keeps complete files and resumes partial ones.
"""

import hashlib
import http.client
import logging
import os
import urllib.request
from functools import partial
from pathlib import Path

import gdown
import torch
from absl import flags
from diffusers import UNet2DConditionModel

from ddpo_pytorch.generator.lora import ATTENTION, add_lora, load_lora, lora_parameters
from ddpo_pytorch.generator.parts import check_fit
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.utils.cli import cli, expand_flags
from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import locked, write_file
from ddpo_pytorch.utils.published import ARCHIVE, opened, spellings, unpack
from ddpo_pytorch.utils.weights import open_safetensors

FLAGS = flags.FLAGS
flags.DEFINE_string("root", "rl4med-out", "files go to ROOT/published, split tables to ROOT/data/splits")
flags.DEFINE_string("check", None, "only check this folder of published files; nothing is downloaded")
flags.DEFINE_string("unpack", None, f"only unpack {ARCHIVE} in this folder of published files; nothing is downloaded")

logger = logging.getLogger(__name__)

DRIVE_ID = "1ah15Yu5Iu7kXdSM649yKhqCLDhqol0ef"
DRIVE_URL = f"https://drive.google.com/drive/folders/{DRIVE_ID}"
SPLITS_URL = "https://raw.githubusercontent.com/parhamsaremi/rl4med-ddpo/main/splits"
# sha256 by name
SPLITS = {
    "isic2019_train.csv": "9b573686e740b0bf49beb36458fc30367b3757eee1fa355435eac24c0280274b",
    "isic2019_val.csv": "7300aa82b8a932a69a3b547b2c806b28236c9ac17dfda4bb629946e37531288f",
    "isic2019_test.csv": "f79b6bdab6129e52efea348ee9f74bd7980960e3468f827eb02205584e2dea1e",
}
TIMEOUT = 30  # seconds without an answer
LORA_RANK = 4
UNET = "pretrained_unet.safetensors"
FILES = {  # by README's spelling
    "artifact_classifier_train_H6.pth": "reward classifier",
    "artifact_classifier_train_H4.pth": "judge",
    "rl4med-checkpoint50": "LoRA of stage (ii)",
    UNET: "UNet of stage (i)",
    ARCHIVE: "generated samples, optional",
}


def sd15_unet() -> UNet2DConditionModel:
    """Return SD 1.5's UNet on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)  # other defaults are SD 1.5's


def check_content(file: str, path: Path) -> str:
    """Return what a published file holds (`file`: README's spelling). Raises UserError if it is wrong.

    Of the UNet only the header is read, and of the archive the directory, not the gigabytes after it.
    """
    if file == ARCHIVE:
        with opened(path) as archive:
            return f"zip of {sum(not entry.is_dir() for entry in archive.infolist())} files"
    if file.startswith("artifact_classifier"):
        heads, expected = len(load_classifier(path).labels), 6 if file.endswith("H6.pth") else 4
        if heads != expected:
            raise UserError(f"{path} has {heads} heads, expected {expected}; fetch it again")
        return f"classifier with {heads} heads"
    unet = sd15_unet()
    if file == UNET:
        with open_safetensors(path) as weights:  # its header only
            headers = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (it is not a dict)
            shapes = {name: torch.empty(header.get_shape(), device="meta") for name, header in headers.items()}
            dtypes = sorted({header.get_dtype() for header in headers.values()})
        check_fit(shapes, unet.state_dict(), path, "give the UNet of SD 1.5, or fetch it again")
        return f"UNet of SD 1.5, {len(shapes)} tensors, {'/'.join(dtypes)}"
    # every attention projection has both matrices, of the published rank
    add_lora(unet, LORA_RANK, ATTENTION, seed=0)
    load_lora(unet, path)
    return f"LoRA of rank {LORA_RANK}, {len(lora_parameters(unet))} tensors"


def check(folder: Path) -> None:
    """Check and log each published file. Raises UserError if one is wrong, or a required one is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that holds the published files")
    bad = []
    for file, description in FILES.items():
        present = [folder / name for name in spellings(file) if (folder / name).exists()]
        for path in present:
            label = f"{path.name}{f' (README: {file})' if path.name != file else ''}, {size(path)}"
            try:
                logger.info("%s: %s: OK", label, check_content(file, path))
            except UserError as error:
                logger.info("%s: WRONG: %s", label, error)
                bad.append(path.name)
        if not present:
            logger.info("%s: missing (%s)", " or ".join(spellings(file)), description)
            bad += [file] * (file != ARCHIVE)
    if bad:
        raise UserError(f"{folder}: missing or wrong: {', '.join(bad)}; move wrong files away and fetch them again")


def size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def fetch_split(name: str, folder: Path, base_url: str = SPLITS_URL) -> Path:
    """Return a split table of `SPLITS` in `folder`, fetched if it is absent. Raises UserError for other content."""
    target, url = folder / name, f"{base_url}/{name}"
    exists = target.exists()
    source = target if exists else url
    try:
        with open(target, "rb") if exists else urllib.request.urlopen(url, timeout=TIMEOUT) as file:
            content = file.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{source} cannot be read ({error}); save {url} as {target}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != SPLITS[name]:
        problem = f"{source} is not the official table (sha256 {digest}, expected {SPLITS[name]})"
        raise UserError(f"{problem}; nothing was overwritten: save the official table as {target}")
    if not exists:
        write_file(target, content)
    logger.info("%s %s, sha256 as expected", target, "exists" if exists else "fetched")
    return target


def fetch_published(folder: Path) -> None:
    """Fetch the missing files of the Drive folder, required ones first. Raises UserError after trying all of them."""
    try:
        listing = gdown.download_folder(
            id=DRIVE_ID, output=str(folder), skip_download=True, quiet=True, timeout=TIMEOUT
        )
    except Exception as error:  # gdown's exceptions share no base class, and a changed Google page may raise any
        kind = type(error).__name__
        raise UserError(f"Google Drive does not list the published folder ({kind}: {one_line(error)})") from error
    if not listing:
        raise UserError("Google Drive lists nothing in the published folder")
    required, failed = {name for file in FILES if file != ARCHIVE for name in spellings(file)}, []
    for item in sorted(listing, key=lambda item: Path(item.path).parts[0] not in required):
        target = Path(os.path.abspath(item.local_path))
        try:
            if not target.is_relative_to(os.path.abspath(folder)):
                raise UserError(f"it would be outside {folder}")
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                gdown.download(id=item.id, output=str(target), resume=True, timeout=TIMEOUT, retries=3)
            logger.info("%s is present, %s", target, size(target))
        except Exception as error:
            logger.warning("%s was not downloaded: %s: %s", item.path, type(error).__name__, one_line(error))
            failed.append(item.path)
    if failed:
        raise UserError(f"{len(failed)} of {len(listing)} files were not downloaded ({', '.join(failed)})")


def fetch(root: Path) -> None:
    """Fetch and check all files. Raises UserError, after logging advice, if some are missing."""
    published, problems = root / "published", []
    steps = {f"split table {name}": partial(fetch_split, name, root / "data" / "splits") for name in SPLITS}
    for name, step in (steps | {"published files": partial(fetch_published, published)}).items():
        try:
            step()
        except UserError as error:
            logger.warning("%s", error)
            problems.append(name)
    if "published files" in problems:
        logger.warning(
            "Google Drive often blocks scripts for up to a day. Rerun this later, or do it by hand:\n  1. open %s in a "
            "browser\n  2. download %s\n  3. put them into %s\n  4. python scripts/download.py --check %s",
            *(DRIVE_URL, ", ".join(" or ".join(spellings(file)) for file in FILES), published, published),
        )
    if published.is_dir():
        check(published)
    if problems:
        raise UserError(f"could not be fetched: {', '.join(problems)}; see the advice above")


def main(_) -> None:
    expand_flags(FLAGS, ("root", "check", "unpack"))
    if FLAGS.check is not None and FLAGS.unpack is not None:
        raise UserError("--check and --unpack are given, which do different things; give one, then the other")
    if FLAGS.check is not None:
        check(Path(FLAGS.check))
    elif FLAGS.unpack is not None:
        folder = Path(FLAGS.unpack)
        with locked(folder, "another folder"):
            for path in unpack(folder / ARCHIVE, folder):
                logger.info("unpacked: %s", path)
    else:
        with locked(FLAGS.root, "another --root"):
            fetch(Path(FLAGS.root))


if __name__ == "__main__":
    cli(main)

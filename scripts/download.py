"""Fetch the published files and the official split tables, and check every file.

    python scripts/download.py                                  # into rl4med-out/published and rl4med-out/data/splits
    python scripts/download.py --check rl4med-out/published     # no network: what is there, and is it complete?
    python scripts/download.py --unpack rl4med-out/published    # no network: its images.zip, beside it

Run again after an interruption: what is complete is kept, what is half done is continued.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import gdown
import torch
from absl import flags
from diffusers import UNet2DConditionModel

from ddpo_pytorch.generator.lora import add_lora, load_lora, lora_parameters
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.utils.cli import cli, expand_flags
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked
from ddpo_pytorch.utils.published import (
    ARCHIVE,
    DRIVE_ID,
    DRIVE_URL,
    FILES,
    SPLITS,
    TIMEOUT,
    PublishedFile,
    fetch_split,
    opened,
    spellings,
    unpack,
)
from ddpo_pytorch.utils.weights import open_safetensors

FLAGS = flags.FLAGS
flags.DEFINE_string("root", "rl4med-out", "files go to ROOT/published, split tables to ROOT/data/splits")
flags.DEFINE_string("check", None, "only check this folder of published files; nothing is downloaded")
flags.DEFINE_string("unpack", None, f"only unpack {ARCHIVE} of this folder of published files; nothing is downloaded")

logger = logging.getLogger(__name__)

LORA_RANK = 4
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def sd15_unet() -> UNet2DConditionModel:
    """SD 1.5's UNet on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )


def check_unet(path: Path) -> str:
    """Names and shapes are SD 1.5's. Only the header is read, not the gigabytes after it."""
    with open_safetensors(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
        dtypes = sorted({tensor.get_dtype() for tensor in found.values()})
    expected = {name: tuple(tensor.shape) for name, tensor in sd15_unet().state_dict().items()}
    for name in sorted(expected | shapes):
        ours, theirs = expected.get(name, "absent"), shapes.get(name, "absent")
        if ours != theirs:
            raise UserError(f"{path} has another architecture: {name} is {theirs}, in SD 1.5's UNet {ours}")
    return f"UNet of SD 1.5, {len(shapes)} tensors, {'/'.join(dtypes)}"


def check_lora(path: Path) -> str:
    """Every attention projection of SD 1.5's UNet has both halves, of the published rank."""
    unet = sd15_unet()
    add_lora(unet, LORA_RANK, LORA_TARGETS, seed=0)
    load_lora(unet, path)
    return f"LoRA of rank {LORA_RANK}, {len(lora_parameters(unet))} tensors"


def check_classifier(path: Path, heads: int) -> str:
    found = len(load_classifier(path).labels)
    if found != heads:
        raise UserError(f"{path} has {found} heads, {heads} belong under this name; fetch it again")
    return f"classifier with {heads} heads"


def check_zip(path: Path) -> str:
    """The directory at the archive's end is there, and fit to be unpacked; every entry's content would be gigabytes."""
    with opened(path) as archive:
        return f"zip of {sum(not entry.is_dir() for entry in archive.infolist())} files"


CHECKS: dict[str, Callable[[Path], str]] = {
    "pretrained_unet.safetensors": check_unet,
    "rl4med-checkpoint50": check_lora,
    "artifact_classifier_train_H6.pth": lambda path: check_classifier(path, 6),
    "artifact_classifier_train_H4.pth": lambda path: check_classifier(path, 4),
    ARCHIVE: check_zip,
}


def size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def check(folder: Path) -> None:
    """Log one line for each published file. Raises UserError if one is wrong, or a required one is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that holds the published files")
    bad = []
    for file in FILES:
        present = [folder / name for name in spellings(file.name) if (folder / name).exists()]
        for path in present:
            also = f" (README: {file.name})" if path.name != file.name else ""
            try:
                logger.info("%s%s, %s: %s: OK", path.name, also, size(path), CHECKS[file.name](path))
            except UserError as error:
                logger.info("%s%s, %s: WRONG: %s", path.name, also, size(path), error)
                bad.append(path.name)
        if not present:
            names = " or ".join(spellings(file.name))
            notes = [file.what] if file.required else [file.what, "optional"]
            # gdown writes to the file's name with eight random characters and .part added
            if any(any(folder.glob(f"{name}????????.part")) for name in spellings(file.name)):
                notes.append("a part of it is there")
            logger.info("%s: missing (%s)", names, ", ".join(notes))
            if file.required:
                bad.append(file.name)
    if bad:
        raise UserError(
            f"{folder}: missing or wrong: {', '.join(bad)} (see above); move wrong files away and fetch them again"
        )


def entry_of(path: str) -> PublishedFile | None:
    """The published file that a path of the listing, relative to the folder, is or is part of."""
    top = Path(path).parts[0]
    return next((file for file in FILES if top in spellings(file.name)), None)


def fetch_published(folder: Path) -> None:
    """List the Drive folder, then fetch what is not there, required files first; one failure does not stop the rest."""
    # gdown's exceptions have no common base in all its versions, and a page that Google changed raises anything.
    try:
        listing = gdown.download_folder(
            id=DRIVE_ID, output=str(folder), skip_download=True, quiet=True, timeout=TIMEOUT
        )
    except Exception as error:
        raise UserError(f"Google Drive does not list the published folder ({reason(error)})") from error
    if not listing:
        raise UserError("Google Drive lists nothing in the published folder")
    entries = [entry_of(item.path) for item in listing]
    for item, entry in zip(listing, entries, strict=True):
        logger.info("listed: %s (%s)", item.path, entry.what if entry else "not known here, fetched too")
    for file in FILES:
        if file not in entries:
            logger.warning("not listed: %s", " or ".join(spellings(file.name)))

    failed = []
    required_first = sorted(zip(listing, entries, strict=True), key=lambda pair: not (pair[1] and pair[1].required))
    for item, _ in required_first:
        target = Path(os.path.abspath(item.local_path))
        if not target.is_relative_to(os.path.abspath(folder)):
            logger.warning("%s would lie outside %s and is not fetched", item.path, folder)
            failed.append(item.path)
            continue
        if target.is_file():
            logger.info("%s is there already, %s", target, size(target))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            gdown.download(id=item.id, output=str(target), resume=True, timeout=TIMEOUT, retries=3)
            logger.info("%s fetched, %s", target, size(target))
        except Exception as error:
            logger.warning("%s did not arrive: %s", item.path, reason(error))
            failed.append(item.path)
    if failed:
        raise UserError(f"{len(failed)} of {len(listing)} files did not arrive ({', '.join(failed)})")


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def manual_route(folder: Path) -> None:
    names = [" or ".join(spellings(file.name)) + ("" if file.required else " (optional)") for file in FILES]
    logger.warning("Google Drive often refuses scripts, for up to a day. Run this again later, or by hand:")
    logger.warning("  1. open %s in a browser", DRIVE_URL)
    logger.warning("  2. download %s", ", ".join(names))
    logger.warning("  3. put them into %s", folder)
    logger.warning("  4. python scripts/download.py --check %s", folder)


def main(_) -> None:
    expand_flags(FLAGS, ("root", "check", "unpack"))
    if FLAGS.check is not None:
        check(Path(FLAGS.check))
        return
    if FLAGS.unpack is not None:
        folder = Path(FLAGS.unpack)
        with locked(folder, "another folder"):
            for path in unpack(folder / ARCHIVE, folder):
                logger.info("unpacked: %s", path)
        return
    root = Path(FLAGS.root)
    with locked(root, "another --root"):
        fetch(root)


def fetch(root: Path) -> None:
    """Fetch all files into a folder. Raises UserError, which says what to do, where some did not arrive."""
    problems = []
    for name in SPLITS:
        try:
            fetch_split(name, root / "data" / "splits")
        except UserError as error:
            logger.warning("%s", error)
            problems.append(f"split table {name}")
    try:
        fetch_published(root / "published")
    except UserError as error:
        logger.warning("%s", error)
        manual_route(root / "published")
        problems.append("published files")
    if (root / "published").is_dir():
        check(root / "published")
    if problems:
        raise UserError(f"could not be fetched: {', '.join(problems)}; what to do is said above")


if __name__ == "__main__":
    cli(main)

"""Checkpoints of a run: `checkpoint_<epochs completed>/` with the trained weights and what resuming needs.

The weights are safetensors (`pytorch_lora_weights.safetensors`, or `unet.safetensors` of a full fine-tune); optimizer
state is plain tensors, progress is JSON. Random states are not saved: all randomness is a function of progress.
`best/` beside them is a checkpoint, too: that of the highest held-out APR, which progress.json states. A manifest in
each lists its files and their hashes (older ones have none); a checkpoint without fault against it is called whole.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.generator.lora import FILE_NAME, FILE_NAMES, has_lora, load_lora, lora_state_dict
from ddpo_pytorch.generator.pipeline import replace_unet_weights
from ddpo_pytorch.utils.distributed import gather_state, load_optimizer_into, load_weights_into
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_folder, path_fault, remove_folder, sha256
from ddpo_pytorch.utils.json_files import COUNT, OneOf, read_json
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import open_safetensors, read_pickle, read_safetensors

UNET_FILE = "unet.safetensors"
STATE_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
BEST = "best"
_EVALUATION = OneOf(({"epoch": COUNT, "apr": float, "reward": float}, None))
# What a checkpoint's progress may state (`Record.state_dict`); older ones state less.
PROGRESS = {
    "epoch": COUNT,
    "global_step?": COUNT,
    "skipped_updates?": COUNT,
    "wandb_id?": OneOf((str, None)),
    "tracker?": {"rewards": [(OneOf((str, int)), [float])]},
    "plateau?": {"previous": OneOf((float, None)), "quiet_epochs": COUNT},
    "held_out?": {
        "best": _EVALUATION,
        "last": _EVALUATION,
        "collapsed": COUNT,
        "identity": OneOf((dict, None)),
    },
}
_NAME = re.compile(r"checkpoint_?(\d+)")

logger = logging.getLogger(__name__)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    if not Path(run_dir).is_dir():
        return []
    folders = [path for path in Path(run_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is, or once was, a checkpoint of train.py, as opposed to a run folder."""
    path = Path(path)
    named = path.name == BEST or _NAME.fullmatch(path.name)
    return path.is_dir() and not checkpoints(path) and (bool(named) or (path / PROGRESS_FILE).is_file())


def fault(checkpoint: str | Path, thorough: bool = True) -> str | None:
    """Why a checkpoint cannot be gone on from, in a few words; None when it is whole.

    Its files are compared with its manifest: their hashes only when `thorough`, else their sizes. One from before there
    was a manifest has all files and, when `thorough`, no torn one.
    """
    checkpoint = Path(checkpoint)
    try:
        listed = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    if listed is not None:
        if PROGRESS_FILE not in listed:
            return f"{MANIFEST} does not list {PROGRESS_FILE}"
        faults = (file_fault(checkpoint / name, about, thorough) for name, about in listed.items())
        return next(filter(None, faults), None)
    weights = next((name for name in (FILE_NAME, UNET_FILE) if (checkpoint / name).is_file()), FILE_NAME)
    for name in (STATE_FILE, PROGRESS_FILE, weights):
        if not (checkpoint / name).is_file():
            return f"{name} is not there"
    try:
        epochs_completed(checkpoint, stated=True)
        if thorough:
            _read_state(checkpoint / STATE_FILE, mmap=True)
            with open_safetensors(checkpoint / weights):  # knows from the header how long the file must be
                pass
    except (UserError, ValueError, OSError) as error:
        return " ".join(str(error).split())[:200]
    return None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` is, or of a run folder the newest whole one; best/ where only that is whole.

    Damaged ones that are passed over on the way are told, one line each. Raises UserError if `path` is neither, is a
    damaged checkpoint, or has no whole one.
    """
    path = Path(path)
    if is_checkpoint(path):
        if reason := fault(path):
            raise UserError(
                f"{str(path)!r} cannot be resumed ({reason}); resume from another checkpoint, or from the run folder, "
                "of which the newest whole one is taken"
            )
        return path
    found = [*reversed(checkpoints(path)), *(best for best in [path / BEST] if best.is_dir())]
    if not found:
        raise UserError(f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoint_<epoch> folders in it")
    faults: dict[Path, str] = {}
    for checkpoint in found:
        if (reason := fault(checkpoint)) is None:
            for damaged, what in faults.items():
                logger.warning("%s is damaged (%s): going on from %s instead", damaged, what, checkpoint.name)
            return checkpoint
        faults[checkpoint] = reason
    damaged, what = next(iter(faults.items()))
    raise UserError(
        f"no checkpoint of {str(path)!r} is whole, the newest is {damaged.name} ({what}); bring back a whole one, or "
        "choose another --config.run_name to begin anew"
    )


def find_weights(path: str | Path) -> Path:
    """The weight file that `path` is or holds: LoRA in any known format, or a full UNet.

    `path` may be a file, a checkpoint folder (also a published one), or a run folder, of which the newest checkpoint is
    taken, or best/ where there is no other. Raises UserError naming what was looked for.
    """
    path = resolve(path)
    if path.is_file():
        return path
    names = (*FILE_NAMES, UNET_FILE)
    for folder in (path, *reversed(checkpoints(path)), path / BEST):
        for name in names:
            if (folder / name).is_file():
                _check_listed(folder / name)
                return folder / name
    raise UserError(f"no weights at {str(path)!r}; give a weight file, or a folder that holds {' or '.join(names)}")


def _check_listed(file: Path) -> None:
    """UserError where the folder's manifest states another content of a file."""
    try:
        listed = read_manifest(file.parent) or {}
        reason = file_fault(file, listed[file.name]) if file.name in listed else None
    except ValueError as error:
        reason = str(error)
    if reason:
        raise UserError(f"{str(file)!r} is damaged ({reason}); give another checkpoint folder, or the file itself")


def load_weights(unet: nn.Module, path: str | Path, adapters: bool | None = None) -> Path:
    """Load LoRA or full UNet weights, whichever `path` holds, and return the file they came from.

    `adapters`: which of the two they have to be. Raises UserError for the other kind, and as the loaders do.
    """
    file = find_weights(path)
    full = file.suffix == ".safetensors" and not _is_lora(file)
    if adapters is full:
        held = "a full UNet" if full else "LoRA adapters"
        advice = "give it as unet_path" if full else "give full weights, or set use_lora=True"
        raise UserError(f"load_from: {str(file)!r} holds {held}, which does not fit use_lora={adapters}; {advice}")
    if full:
        replace_unet_weights(unet, file)
    else:
        load_lora(unet, file)
    return file


def _is_lora(file: Path) -> bool:
    with open_safetensors(file) as weights:
        return any("lora" in key for key in weights.keys())  # noqa: SIM118 (safe_open is not a dict)


def epochs_completed(checkpoint: str | Path, stated: bool = False) -> int:
    """Epochs after which a checkpoint was saved, from its name or else its progress. UserError if that is damaged.

    `stated`: from its progress whatever its name.
    """
    checkpoint = Path(checkpoint)
    if (name := _NAME.fullmatch(checkpoint.name)) and not stated:
        return int(name[1])
    return _read_progress(checkpoint)["epoch"]


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / PROGRESS_FILE, PROGRESS, "resume from another checkpoint")


def checkpoint_folder(run_dir: str | Path, epoch: int) -> Path:
    """Where the checkpoint after so many epochs lies."""
    return Path(run_dir) / f"checkpoint_{epoch}"


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there and without fault."""
    return checkpoint.is_dir() and fault(checkpoint) is None


def recover_best(run_dir: str | Path) -> Path | None:
    """`best` of a run, or None. A kill while it was replaced may have left it under another name: it gets its own back.

    Main process only. It may be damaged.
    """
    best, *others = best_names(run_dir)
    for other in others:  # complete where they are, as they appear whole
        if not best.exists() and other.exists():
            os.replace(other, best)
        shutil.rmtree(other, ignore_errors=True)
    return best if best.is_dir() else None


def best_names(run_dir: str | Path) -> tuple[Path, Path, Path]:
    """best/, and what it is called shortly before and after."""
    return tuple(Path(run_dir) / name for name in (BEST, f".{BEST}.new", f".{BEST}.old"))


def _read_state(file: Path, mmap: bool = False) -> dict:
    try:
        return read_pickle(file, mmap)
    except UserError as error:
        raise ValueError(f"{file.name} is damaged or holds more than plain tensors") from error


def load_checkpoint(folder: str | Path, unet: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore weights, optimizer and gradient scaler; return the progress that was saved with them.

    `folder` is from `find_checkpoint`, which has compared it with its manifest. Raises UserError for a checkpoint of
    other settings.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file() or not (folder / PROGRESS_FILE).is_file():
        raise UserError(
            f"{str(folder)!r} lacks {STATE_FILE} or {PROGRESS_FILE}; only checkpoints of train.py can be resumed"
        )
    if (folder / UNET_FILE).is_file() == has_lora(unet):
        held = "a full UNet" if has_lora(unet) else "LoRA adapters"
        raise UserError(
            f"{str(folder)!r} holds {held}, which does not fit use_lora={has_lora(unet)}; change that setting"
        )
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        state = _read_state(folder / STATE_FILE)
        progress = _read_progress(folder)
        if has_lora(unet):
            load_lora(unet, folder)
        else:
            load_weights_into(unet, read_safetensors(folder / UNET_FILE)[0])
        load_optimizer_into(optimizer, state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(folder)!r} cannot be resumed ({reason}); resume from another checkpoint") from error
    # the optimizer's memory comes from the checkpoint, learning rate and the like from the configuration.
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)
    return progress


class Snapshot(NamedTuple):
    """What training has changed, on the CPU: weights and the file they belong in; state of optimizer and scaler."""

    file: str
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]


def snapshot(unet: nn.Module, optimizer: Any, scaler: Any, main: bool = True) -> Snapshot | None:
    """What a checkpoint of these holds, for the process that is `main`; None for the others. Every process calls it.

    Tensors that are on the CPU already are not copied: write them before the next update.
    """
    lora = has_lora(unet)
    weights = (lora_state_dict(unet) if main else None) if lora else gather_state(unet, main)
    optimizer_state = gather_state(optimizer, main)
    if not main:
        return None
    weights = {key: value.contiguous() for key, value in weights.items()}
    state = {"optimizer": optimizer_state, "scaler": scaler.state_dict() if scaler is not None else None}
    return Snapshot(FILE_NAME if lora else UNET_FILE, weights, state)


def save_checkpoint(run_dir: str | Path, epoch: int, taken: Snapshot, progress: dict, limit: int) -> Path:
    """Write `checkpoint_<epoch>` whole or not at all, then remove those before the newest `limit`. Main process only.

    A damaged one of that name is put aside; damaged ones do not count among the newest. best/ always stays. Raises
    UserError, with all as it was before, when the disk is full.
    """
    folder = checkpoint_folder(run_dir, epoch)
    _write(folder, taken, progress)
    kept = 0
    for checkpoint in reversed(checkpoints(run_dir)):
        if kept == max(1, limit):
            remove_folder(checkpoint)
        elif fault(checkpoint, thorough=False) is None:
            kept += 1
    return folder


def put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to `<name>.damaged`, or `.damaged2` and so on, under which nothing looks for it."""
    names = (f"{folder.name}.damaged{number or ''}" for number in (0, *range(2, 10**6)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    return aside


def save_best(run_dir: str | Path, taken: Snapshot, progress: dict) -> Path:
    """Put the same in the place of `best`, whose last content is removed when the new one is complete."""
    best, new, old = best_names(run_dir)
    shutil.rmtree(new, ignore_errors=True)
    _write(new, taken, progress)
    shutil.rmtree(old, ignore_errors=True)
    if best.exists():
        os.replace(best, old)
    os.replace(new, best)
    shutil.rmtree(old, ignore_errors=True)
    return best


def _write(folder: Path, taken: Snapshot, progress: dict) -> None:
    text = json.dumps(progress, indent=1)
    tensors = [*taken.weights.values(), *_tensors(taken.state)]
    # what surrounds a tensor in the files is small and bounded
    size = sum(tensor.nbytes for tensor in tensors) + 512 * len(tensors) + len(text) + 2**16
    with atomic_folder(folder, size) as temporary:
        save_file(taken.weights, temporary / taken.file, metadata={"format": "pt"})
        with open(temporary / STATE_FILE, "wb") as file:  # of a path, PyTorch would not say why it cannot be written
            torch.save(taken.state, file)
        (temporary / PROGRESS_FILE).write_text(text)
        write_manifest(temporary)
        if folder.exists():
            logger.warning("%s is damaged and was put aside as %s", folder, put_aside(folder).name)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


MANIFEST = "manifest.json"


def write_manifest(folder: str | Path) -> None:
    """List every file that the folder holds now: {"files": {path in the folder: {"bytes", "sha256"}}}."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, dict] | None:
    """The files that are listed; None where there is no list. Raises ValueError for a damaged one."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        files = read_json(path, {"files": {str: {"bytes": COUNT, "sha256": str}}})["files"]
    except UserError as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if any(path_fault(name) for name in files):
        raise ValueError(f"{MANIFEST} is damaged: it names files outside its folder")
    return files


def file_fault(path: Path, about: dict, thorough: bool = True) -> str | None:
    """What is wrong with a file that a manifest describes, or None. Without `thorough` its content is not read."""
    if not path.is_file():
        return f"{path.name} is not there"
    if (size := path.stat().st_size) != about["bytes"]:
        return f"{path.name} has {size} bytes instead of {about['bytes']}"
    if thorough and sha256(path) != about["sha256"]:
        return f"{path.name} has another content than {MANIFEST} states"
    return None

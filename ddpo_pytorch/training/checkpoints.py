"""Checkpoints of a run: `checkpoint_<epochs completed>/` with the trained weights and everything resuming needs.

Weights are safetensors (`pytorch_lora_weights.safetensors`, or `unet.safetensors` of a full fine-tune), optimizer state
is plain tensors, progress is JSON, README.md is a model card, and a manifest lists all files with their hashes. Random
states are not saved: all randomness is a function of progress. `best` is a link to the checkpoint of the highest
held-out APR.
"""

import json
import logging
import os
import re
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
from ddpo_pytorch.utils.files import atomic_folder, atomic_write, path_fault, remove_folder, sha256
from ddpo_pytorch.utils.json_files import COUNT, OneOf, read_json
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import open_safetensors, read_pickle, read_safetensors

UNET_FILE = "unet.safetensors"
STATE_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
MANIFEST = "manifest.json"
CARD_FILE = "README.md"
BEST = "best"
_EVALUATION = OneOf(({"epoch": COUNT, "apr": float, "reward": float}, None))
PROGRESS = {  # RunState.state_dict()
    "epoch": COUNT,
    "global_step": COUNT,
    "skipped_updates": COUNT,
    "wandb_id": OneOf((str, None)),
    "tracker": {"rewards": [(OneOf((str, int)), [float])]},
    "plateau": {"previous": OneOf((float, None)), "quiet_epochs": COUNT},
    "held_out": {"best": _EVALUATION, "last": _EVALUATION, "collapsed": COUNT, "fingerprint": OneOf((dict, None))},
}
_NAME = re.compile(r"checkpoint_?(\d+)")

logger = logging.getLogger(__name__)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without `best`."""
    if not Path(run_dir).is_dir():
        return []
    folders = [path for path in Path(run_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def checkpoint_folder(run_dir: str | Path, epoch: int) -> Path:
    """Return the path of the checkpoint after `epoch` completed epochs."""
    return Path(run_dir) / f"checkpoint_{epoch}"


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a folder is a checkpoint of train.py, possibly damaged, as opposed to a run folder."""
    path = Path(path)
    named = path.name == BEST or _NAME.fullmatch(path.name)
    return path.is_dir() and not checkpoints(path) and (bool(named) or (path / PROGRESS_FILE).is_file())


def is_intact(checkpoint: Path) -> bool:
    """Return whether a checkpoint exists and is undamaged."""
    return checkpoint.is_dir() and find_damage(checkpoint) is None


def find_damage(checkpoint: str | Path, check_hashes: bool = True) -> str | None:
    """Return why a checkpoint cannot be resumed, or None. Without `check_hashes` only file sizes are compared."""
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    if files is None:
        return f"{MANIFEST} is missing"
    if PROGRESS_FILE not in files:
        return f"{MANIFEST} does not list {PROGRESS_FILE}"
    damages = (find_file_damage(Path(checkpoint) / name, about, check_hashes) for name, about in files.items())
    return next(filter(None, damages), None)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` is, or the newest undamaged one of a run folder.

    Logs a line for each damaged checkpoint that is passed over. Raises UserError if `path` is neither, is a damaged
    checkpoint, or holds no undamaged one.
    """
    path = Path(path)
    if is_checkpoint(path):
        if damage := find_damage(path):
            raise UserError(
                f"{str(path)!r} cannot be resumed ({damage}); resume from another checkpoint, or from the run folder "
                "to take its newest undamaged one"
            )
        return path
    candidates = [*reversed(checkpoints(path)), *(folder for folder in [path / BEST] if _is_copy(folder))]
    if not candidates:
        raise UserError(f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoint_<epoch> folders")
    damages: dict[Path, str] = {}
    for checkpoint in candidates:
        if (damage := find_damage(checkpoint)) is None:
            for damaged, reason in damages.items():
                logger.warning("%s is damaged (%s): resuming from %s instead", damaged, reason, checkpoint.name)
            return checkpoint
        damages[checkpoint] = damage
    newest, damage = next(iter(damages.items()))
    raise UserError(
        f"no checkpoint of {str(path)!r} is undamaged, the newest is {newest.name} ({damage}); restore one, or start "
        "again with another --config.run_name"
    )


def find_weights(path: str | Path) -> Path:
    """Return the weight file that `path` is or holds: LoRA in any known format, or a full UNet.

    `path` may be a file, a checkpoint folder (also a published one), or a run folder, which stands for its newest
    checkpoint. Raises UserError if there is none, or if it is not what the folder's manifest states.
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
    try:
        listed = read_manifest(file.parent) or {}  # published checkpoints have no manifest
        damage = find_file_damage(file, listed[file.name]) if file.name in listed else None
    except ValueError as error:
        damage = str(error)
    if damage:
        raise UserError(f"{str(file)!r} is damaged ({damage}); give another checkpoint folder, or the file itself")


def load_weights(unet: nn.Module, path: str | Path, adapters: bool | None = None) -> Path:
    """Load LoRA or full UNet weights, whichever `path` holds, and return the file they came from.

    adapters: which of the two is required. Raises UserError for the other kind, and as the loaders do.
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


def epochs_completed(checkpoint: str | Path) -> int:
    """Return the epochs completed before a checkpoint was saved, by its name, else by progress.json (UserError)."""
    checkpoint = Path(checkpoint)
    if name := _NAME.fullmatch(checkpoint.name):
        return int(name[1])
    return _read_progress(checkpoint)["epoch"]


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / PROGRESS_FILE, PROGRESS, "resume from another checkpoint")


def load_checkpoint(folder: str | Path, unet: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore weights, optimizer and gradient scaler of an undamaged checkpoint; return its progress.

    The optimizer's moments come from the checkpoint, its learning rate and other settings from the configuration.
    Raises UserError for a checkpoint of another kind of training.
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
        state, progress = read_pickle(folder / STATE_FILE), _read_progress(folder)
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
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)
    return progress


class Snapshot(NamedTuple):
    """Trained weights, the name of their file, and the state of optimizer and scaler, all on the CPU."""

    file: str
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]


def snapshot(unet: nn.Module, optimizer: Any, scaler: Any, main: bool = True) -> Snapshot | None:
    """Collect what a checkpoint holds on the `main` process; None on the others. Collective: every process calls it.

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


def save_checkpoint(
    run_dir: str | Path, taken: Snapshot, progress: dict, limit: int, best: bool = False, card: str = ""
) -> Path:
    """Write `checkpoint_<progress["epoch"]>` atomically, then remove all but the newest `limit` and the best one.

    `card` becomes its README.md. With `best`, the link of that name points to it from now on. A damaged checkpoint of
    the same epoch is quarantined; damaged ones do not count among the newest. Main process only. Raises UserError when
    the disk is full, with everything as it was before.
    """
    folder = checkpoint_folder(run_dir, progress["epoch"])
    _write(folder, taken, progress, card)
    if best:
        link_best(run_dir, progress["epoch"])
    remove_old(run_dir, limit)
    return folder


def remove_old(run_dir: str | Path, limit: int) -> None:
    """Remove all checkpoints but the newest `limit` (at least one), and the one that `best` points to."""
    kept, best = 0, (Path(run_dir) / BEST).resolve()
    for checkpoint in reversed(checkpoints(run_dir)):
        if kept == max(1, limit):
            if checkpoint.resolve() != best:
                remove_folder(checkpoint)
        elif find_damage(checkpoint, check_hashes=False) is None:
            kept += 1


def link_best(run_dir: str | Path, epoch: int) -> None:
    """Let `best` point to the checkpoint after `epoch` epochs."""
    link = Path(run_dir) / BEST
    if _is_copy(link):
        remove_folder(link)
    with atomic_write(link) as temporary:
        temporary.unlink()
        temporary.symlink_to(checkpoint_folder("", epoch), target_is_directory=True)


def repair_best(run_dir: str | Path, epoch: int | None) -> bool:
    """Make `best` what progress states: the checkpoint after `epoch` epochs, or nothing for None.

    A kill may have left the link on an earlier one. Returns False where that checkpoint is missing or damaged, which is
    quarantined. Main process only.
    """
    link = Path(run_dir) / BEST
    if link.is_dir():
        if (damage := find_damage(link)) is None and _read_progress(link)["epoch"] == epoch:
            return True
        if damage:
            quarantine(link.resolve())
    if link.is_symlink():
        link.unlink()
    if epoch is not None and is_intact(checkpoint_folder(run_dir, epoch)):
        link_best(run_dir, epoch)
    return epoch is None or link.is_dir()


def _is_copy(best: Path) -> bool:
    """Return whether `best` is a folder, as in a run that was copied with its links followed."""
    return best.is_dir() and not best.is_symlink()


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint to `<name>.damaged`, `<name>.damaged2`, ..., which nothing reads; return the path."""
    names = (f"{folder.name}.damaged{number or ''}" for number in (0, *range(2, 10**6)))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, target)
    logger.warning("%s is damaged and was renamed to %s", folder, target.name)
    return target


def _write(folder: Path, taken: Snapshot, progress: dict, card: str) -> None:
    text = json.dumps(progress, indent=1)
    tensors = [*taken.weights.values(), *_tensors(taken.state)]
    # an upper bound: besides its tensors a file holds little
    size = sum(tensor.nbytes for tensor in tensors) + 512 * len(tensors) + len(text) + 2**16
    with atomic_folder(folder, size) as temporary:
        save_file(taken.weights, temporary / taken.file, metadata={"format": "pt"})
        with open(temporary / STATE_FILE, "wb") as file:  # given a path, torch.save hides the cause of an OSError
            torch.save(taken.state, file)
        (temporary / PROGRESS_FILE).write_text(text)
        if card:
            (temporary / CARD_FILE).write_text(card)
        write_manifest(temporary)
        if folder.exists():
            quarantine(folder)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def write_manifest(folder: str | Path) -> None:
    """List every file in a folder: {"files": {relative path: {"bytes", "sha256"}}}."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, dict] | None:
    """Return the listed files, or None without a manifest. Raises ValueError for a damaged one."""
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


def find_file_damage(path: Path, about: dict, check_hash: bool = True) -> str | None:
    """Return how a file differs from its entry in a manifest, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != about["bytes"]:
        return f"{path.name} has {size} bytes instead of {about['bytes']}"
    if check_hash and sha256(path) != about["sha256"]:
        return f"{path.name} does not have the content that {MANIFEST} states"
    return None

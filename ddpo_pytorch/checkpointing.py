"""Checkpoints of a run: `checkpoint_<epochs completed>/` with the trained weights and what resuming needs.

The weights are safetensors (`pytorch_lora_weights.safetensors`, or `unet.safetensors` of a full fine-tune); optimizer
state is plain tensors, progress is JSON. Random states are not saved: all randomness is a function of progress.
`best/` beside them is a checkpoint, too: that of the highest held-out APR, which progress.json states.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.errors import UserError
from ddpo_pytorch.files import whole_folder
from ddpo_pytorch.generator.lora import FILE_NAMES, has_lora, load_lora, save_lora
from ddpo_pytorch.generator.pipeline import replace_unet_weights
from ddpo_pytorch.published import resolve

UNET_FILE = "unet.safetensors"
STATE_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
BEST = "best"
_NAME = re.compile(r"checkpoint_?(\d+)")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    if not Path(run_dir).is_dir():
        return []
    folders = [path for path in Path(run_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` is, or the newest in the run folder that it is; best/ where it holds no other.

    Raises UserError if it is neither.
    """
    path = Path(path)
    if (path / PROGRESS_FILE).is_file():
        return path
    found = checkpoints(path) or [best for best in [path / BEST] if (best / PROGRESS_FILE).is_file()]
    if not found:
        raise UserError(f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoint_<epoch> folders in it")
    return found[-1]


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
                return folder / name
    raise UserError(f"no weights at {str(path)!r}; give a weight file, or a folder that holds {' or '.join(names)}")


def load_weights(unet: nn.Module, path: str | Path) -> Path:
    """Load LoRA or full UNet weights, whichever `path` holds, and return the file they came from."""
    file = find_weights(path)
    if file.suffix == ".safetensors" and not _is_lora(file):
        replace_unet_weights(unet, file)
    else:
        load_lora(unet, file)
    return file


def _is_lora(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as weights:
            return any("lora" in key for key in weights.keys())  # noqa: SIM118 (safe_open is not a dict)
    except SafetensorError:
        return "lora" in file.name  # let the loader that fits the name say what is wrong with it


def epochs_completed(checkpoint: str | Path) -> int:
    """Epochs after which a checkpoint was saved, from its name or else its progress. UserError if that is damaged."""
    checkpoint = Path(checkpoint)
    if name := _NAME.fullmatch(checkpoint.name):
        return int(name[1])
    file = checkpoint / PROGRESS_FILE
    try:
        return int(json.loads(file.read_text())["epoch"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error}); resume from another checkpoint") from error


def save_checkpoint(
    run_dir: str | Path, epoch: int, unet: nn.Module, optimizer: Any, scaler: Any, progress: dict, limit: int
) -> Path:
    """Write `checkpoint_<epoch>` whole or not at all, then remove all but the newest `limit`. Main process only."""
    folder = Path(run_dir) / f"checkpoint_{epoch}"
    with whole_folder(folder) as temporary:
        _write(temporary, unet, optimizer, scaler, progress)
    for old in checkpoints(run_dir)[: -max(1, limit)]:
        shutil.rmtree(old)
    return folder


def save_best(run_dir: str | Path, unet: nn.Module, optimizer: Any, scaler: Any, progress: dict) -> Path:
    """Put the same in the place of `best`, whose last content is removed when the new one is complete."""
    best, new, old = _best_names(run_dir)
    shutil.rmtree(new, ignore_errors=True)
    with whole_folder(new) as temporary:
        _write(temporary, unet, optimizer, scaler, progress)
    shutil.rmtree(old, ignore_errors=True)
    if best.exists():
        os.replace(best, old)
    os.replace(new, best)
    shutil.rmtree(old, ignore_errors=True)
    return best


def recover_best(run_dir: str | Path) -> Path | None:
    """`best` of a run, or None. A kill while it was replaced may have left it under another name: it gets its own back.

    Main process only.
    """
    best, *others = _best_names(run_dir)
    for other in others:  # complete where they are, as they appear whole
        if not best.exists() and other.exists():
            os.replace(other, best)
        shutil.rmtree(other, ignore_errors=True)
    return best if best.is_dir() else None


def _best_names(run_dir: str | Path) -> tuple[Path, Path, Path]:
    return tuple(Path(run_dir) / name for name in (BEST, f".{BEST}.new", f".{BEST}.old"))


def _write(folder: Path, unet: nn.Module, optimizer: Any, scaler: Any, progress: dict) -> None:
    if has_lora(unet):
        save_lora(unet, folder)
    else:
        save_file({k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()}, folder / UNET_FILE)
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler is not None else None}
    torch.save(state, folder / STATE_FILE)
    (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=1))


def _read_state(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{file.name} is damaged or holds more than plain tensors") from error


def load_checkpoint(folder: str | Path, unet: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore weights, optimizer and gradient scaler; return the progress that was saved with them."""
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
        progress = json.loads((folder / PROGRESS_FILE).read_text())
        state = _read_state(folder / STATE_FILE)
        load_weights(unet, folder)
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(folder)!r} cannot be resumed ({reason}); resume from another checkpoint") from error
    # the optimizer's memory comes from the checkpoint, learning rate and the like from the configuration.
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)
    return progress

"""Writing the checkpoints that `ddpo_pytorch.training.checkpoints` describes and reads.

At every moment the last whole one is there, under its own name or one under which it is found again.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.generator.lora import FILE_NAME, has_lora, lora_state_dict
from ddpo_pytorch.training.checkpoints import (
    PROGRESS_FILE,
    STATE_FILE,
    UNET_FILE,
    best_names,
    checkpoint_folder,
    checkpoints,
    fault,
)
from ddpo_pytorch.training.manifest import write_manifest
from ddpo_pytorch.utils.distributed import gather_optimizer, gather_weights
from ddpo_pytorch.utils.files import atomic_folder, remove_folder

logger = logging.getLogger(__name__)


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
    weights = (lora_state_dict(unet) if main else None) if lora else gather_weights(unet, main)
    optimizer_state = gather_optimizer(optimizer, main)
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

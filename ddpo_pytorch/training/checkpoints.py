"""Checkpoints of a run: `checkpoint_<epochs completed>/` with the trained weights and everything resuming needs.

Weights are safetensors (`pytorch_lora_weights.safetensors`, or `unet.safetensors` of a full fine-tune), optimizer state
is plain tensors, progress is JSON, README.md is a model card, and a manifest lists all files with their hashes. There
are no random states, since randomness is a function of progress. `best` is a link to the checkpoint with the highest
held-out APR.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.generator.lora import FILE_NAME, FILE_NAMES, has_lora, load_lora, lora_state_dict
from ddpo_pytorch.generator.pipeline import replace_unet_weights, unet_metadata
from ddpo_pytorch.utils.distributed import gather_state, load_optimizer_into
from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import atomic_folder, atomic_write, path_fault, remove_folder, rename_with, sha256
from ddpo_pytorch.utils.json_files import COUNT, OneOf, read_json
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import open_safetensors, read_pickle

UNET_FILE = "unet.safetensors"
STATE_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
MANIFEST = "manifest.json"
BEST = "best"
_EVALUATION = OneOf(({"epoch": COUNT, "apr": float, "reward": float}, None))
PROGRESS = {  # RunState.state_dict()
    **dict.fromkeys(("epoch", "global_step", "skipped_updates"), COUNT),
    "wandb_id": OneOf((str, None)),
    "tracker": {"rewards": [(OneOf((str, int)), [float])]},
    "plateau": {"previous": OneOf((float, None)), "quiet_epochs": COUNT},
    "held_out": {"best": _EVALUATION, "last": _EVALUATION, "collapsed": COUNT, "fingerprint": OneOf((dict, None))},
}
_NAME = re.compile(r"checkpoint_?(\d+)")
# name of the weight file, the trained weights and their metadata, and the state of optimizer and scaler, on the CPU
Snapshot = tuple[str, dict[str, torch.Tensor], dict[str, str], dict[str, Any]]
logger = logging.getLogger(__name__)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without `best`."""
    folders = [path for path in Path(run_dir).glob("checkpoint*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=epochs_completed)


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a folder is a checkpoint of train.py (possibly damaged), as opposed to a run folder."""
    path = Path(path)
    named = path.name == BEST or _NAME.fullmatch(path.name) is not None
    return path.is_dir() and not checkpoints(path) and (named or (path / PROGRESS_FILE).is_file())


def epochs_completed(checkpoint: str | Path) -> int:
    """Return the epochs completed at a checkpoint, from its name, else from progress.json (may raise UserError)."""
    name = _NAME.fullmatch(Path(checkpoint).name)
    return int(name[1]) if name else read_progress(checkpoint)["epoch"]


def read_progress(checkpoint: str | Path) -> dict[str, Any]:
    """Return the progress of a checkpoint, `RunState.state_dict()`. Raises UserError."""
    return read_json(Path(checkpoint) / PROGRESS_FILE, PROGRESS, "resume from another checkpoint")


def find_damage(checkpoint: str | Path, only: str = "", check_hashes: bool = True) -> str | None:
    """Return how a checkpoint, or just its file `only`, differs from its manifest; None if it does not.

    Without `check_hashes` only file sizes are compared.
    """
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = read_json(folder / MANIFEST, {"files": {str: {"bytes": COUNT, "sha256": str}}})["files"]
    except UserError:
        return f"{MANIFEST} is damaged"
    if any(map(path_fault, files)):
        return f"{MANIFEST} is damaged: it names files outside its folder"
    if not only and PROGRESS_FILE not in files:
        return f"{MANIFEST} does not list {PROGRESS_FILE}"
    for name, listed in files.items():
        if only and name != only:
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != listed["bytes"]:
            return f"{name} has {size} bytes instead of {listed['bytes']}"
        if check_hashes and sha256(folder / name) != listed["sha256"]:
            return f"{name} does not have the content that {MANIFEST} states"
    if (stated := _NAME.fullmatch(folder.name)) and check_hashes and not only:  # it may have been renamed
        if (epoch := read_progress(folder)["epoch"]) != int(stated[1]):
            return f"its name says {stated[1]} epochs, {PROGRESS_FILE} {epoch}"
    return None


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest undamaged checkpoint of a run folder.

    Logs a warning for each damaged checkpoint that is skipped. Raises UserError if `path` is neither, is a damaged
    checkpoint, or holds no undamaged one.
    """
    path = Path(path)
    if is_checkpoint(path):
        if damage := find_damage(path):
            raise UserError(f"{str(path)!r} cannot be resumed ({damage}); resume from its run folder, or another one")
        return path
    copied_best = [path / BEST] if _is_copy(path / BEST) else []
    damages: dict[Path, str] = {}
    for checkpoint in [*reversed(checkpoints(path)), *copied_best]:
        if damage := find_damage(checkpoint):
            damages[checkpoint] = damage
            continue
        for damaged, reason in damages.items():
            logger.warning("%s is damaged (%s): resuming from %s instead", damaged, reason, checkpoint.name)
        return checkpoint
    if not damages:
        raise UserError(f"{str(path)!r} is neither a checkpoint nor a run folder with checkpoint_<epoch>/; give one")
    newest, damage = next(iter(damages.items()))
    problem = f"all checkpoints of {str(path)!r} are damaged, the newest is {newest.name} ({damage})"
    raise UserError(f"{problem}; restore one, or start again with another --config.run_name")


def find_weights(path: str | Path) -> Path:
    """Return the LoRA or UNet file at `path` (of a run, the newest). Raises UserError for none, or a damaged one."""
    path = resolve(path)
    if path.is_file():
        return path
    names = (*FILE_NAMES, UNET_FILE)
    for folder in (path, *reversed(checkpoints(path)), path / BEST):
        file = next(filter(Path.is_file, (folder / name for name in names)), None)
        if (folder / MANIFEST).is_file():  # published checkpoints have none
            damage = find_damage(folder, only=file.name) if file else "its weights are missing"
            if damage:
                raise UserError(f"{str(file or folder)!r} is damaged ({damage}); give another checkpoint, or a file")
        if file:
            return file
    raise UserError(f"no weights at {str(path)!r}; give a weight file, or a folder that holds {' or '.join(names)}")


def load_weights(unet: nn.Module, path: str | Path, adapters: bool | None = None) -> Path:
    """Load LoRA or full UNet weights, whichever `path` holds, and return the file they came from.

    adapters: True requires LoRA, False a full UNet. Raises UserError for the other kind, and as the loaders do.
    """
    file, full = find_weights(path), False
    if file.suffix == ".safetensors":
        with open_safetensors(file) as weights:
            full = not any("lora" in key for key in weights.keys())  # noqa: SIM118 (safe_open is not a dict)
    if adapters is full:
        _refuse_kind(f"load_from: {str(file)!r}", adapters, "give it as unet_path" if full else "give full weights")
    if full:
        replace_unet_weights(unet, file)
    else:
        load_lora(unet, file)
    return file


def _refuse_kind(where: str, adapters: bool, advice: str) -> NoReturn:
    held = "a full UNet" if adapters else "LoRA adapters"
    raise UserError(f"{where} holds {held}, which does not fit use_lora={adapters}; change that setting, or {advice}")


def load_checkpoint(folder: str | Path, unet: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore weights, optimizer and gradient scaler of an undamaged checkpoint; return its progress.

    The optimizer's moments come from the checkpoint, its learning rate and other settings from the configuration.
    Raises UserError for a checkpoint that another kind of training wrote.
    """
    folder, lora = Path(folder), has_lora(unet)
    if not (folder / STATE_FILE).is_file() or not (folder / PROGRESS_FILE).is_file():
        raise UserError(f"{str(folder)!r} lacks {STATE_FILE} or {PROGRESS_FILE}; resume a checkpoint of train.py")
    if (folder / UNET_FILE).is_file() == lora:
        _refuse_kind(repr(str(folder)), lora, "resume from another checkpoint")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        state, progress = read_pickle(folder / STATE_FILE), read_progress(folder)
        if lora:
            load_lora(unet, folder)
        else:
            replace_unet_weights(unet, folder / UNET_FILE)
        load_optimizer_into(optimizer, state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{str(folder)!r} cannot be resumed ({one_line(error)}); choose another checkpoint") from error
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)
    return progress


def snapshot(unet: nn.Module, optimizer: Any, scaler: Any, main: bool = True) -> Snapshot | None:
    """Return a checkpoint's content on the `main` process, else None; CPU tensors are not copied. Collective."""
    lora = has_lora(unet)
    weights = (lora_state_dict(unet) if main else None) if lora else gather_state(unet, main)
    state = {"optimizer": gather_state(optimizer, main), "scaler": None if scaler is None else scaler.state_dict()}
    if not main:
        return None
    return FILE_NAME if lora else UNET_FILE, {k: v.contiguous() for k, v in weights.items()}, unet_metadata(unet), state


def save_checkpoint(
    run_dir: str | Path, taken: Snapshot, progress: dict, limit: int, best: bool = False, card: str = ""
) -> Path:
    """Write `checkpoint_<progress["epoch"]>` atomically, then remove all but the newest `limit` and the best one.

    `card` becomes its README.md. With `best`, the link `best` is set to it. A damaged checkpoint of the same epoch is
    quarantined; damaged ones do not count towards `limit`. Main process only. Raises DiskFull, leaving existing
    files unchanged.
    """
    folder, text = Path(run_dir) / f"checkpoint_{progress['epoch']}", json.dumps(progress, indent=1)
    name, weights, metadata, state = taken
    moments = [value for memory in state["optimizer"]["state"].values() for value in memory.values()]
    tensors = [value for value in (*weights.values(), *moments) if isinstance(value, torch.Tensor)]
    # upper bound: apart from the tensors, the files are small
    size = sum(tensor.nbytes for tensor in tensors) + 512 * len(tensors) + len(text) + 2**16
    with atomic_folder(folder, size) as temporary:
        save_file(weights, temporary / name, metadata=metadata)
        with open(temporary / STATE_FILE, "wb") as file:  # given a path, torch.save hides the cause of an OSError
            torch.save(state, file)
        (temporary / PROGRESS_FILE).write_text(text)
        if card:
            (temporary / "README.md").write_text(card)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
        if folder.exists():
            quarantine(folder)
    if best:
        link_best(run_dir, progress["epoch"])
    kept, linked = 0, (Path(run_dir) / BEST).resolve()
    for checkpoint in reversed(checkpoints(run_dir)):
        if kept == max(1, limit):
            if checkpoint.resolve() != linked:
                remove_folder(checkpoint)
        elif find_damage(checkpoint, check_hashes=False) is None:
            kept += 1
    return folder


def link_best(run_dir: str | Path, epoch: int) -> None:
    """Point the link `best` to the checkpoint after `epoch` epochs."""
    link = Path(run_dir) / BEST
    if _is_copy(link):
        remove_folder(link)
    with atomic_write(link) as temporary:
        temporary.unlink()
        temporary.symlink_to(f"checkpoint_{epoch}", target_is_directory=True)


def repair_best(run_dir: str | Path, epoch: int | None) -> bool:
    """Point `best` to the checkpoint after `epoch` epochs, or remove it for None; a kill may have left another link.

    Returns False if that checkpoint is missing or damaged; damaged ones are quarantined. Main process only.
    """
    link, checkpoint = Path(run_dir) / BEST, Path(run_dir) / f"checkpoint_{epoch}"
    if link.is_dir():
        if (damage := find_damage(link)) is None and read_progress(link)["epoch"] == epoch:
            return True
        if damage:
            quarantine(link.resolve())
    if link.is_symlink():
        link.unlink()
    if epoch is not None and find_damage(checkpoint) is None:
        link_best(run_dir, epoch)
    return epoch is None or link.is_dir()


def _is_copy(best: Path) -> bool:
    """Return whether `best` is a folder, as in a run that was copied with its links followed."""
    return best.is_dir() and not best.is_symlink()


def quarantine(folder: Path) -> None:
    """Rename a damaged checkpoint to `<name>.damaged`, `<name>.damaged2`, ..., which nothing reads."""
    logger.warning("%s is damaged and was renamed to %s", folder, rename_with(folder, "damaged").name)


def model_card(settings: Mapping[str, Any], weights_file: str, epoch: int) -> str:
    """Return the README.md of a checkpoint of a run with these settings, with the metadata that the hub reads."""
    model, kind = settings["pretrained"]["model"], "lora" if weights_file == FILE_NAME else "unet"
    on_hub = model.count("/") == 1 and not Path(model).exists()
    base_model = f"base_model: {json.dumps(model)}\n" if on_hub else ""
    unet = f" with the UNet of {Path(settings['unet_path']).name}" if settings["unet_path"] else ""
    full = f'unet.load_state_dict(safetensors.torch.load_file("{UNET_FILE}"))'
    load = full if kind == "unet" else 'load_lora_weights("PATH_OF_THIS_FOLDER")'
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- ddpo
- reinforcement-learning
- {kind}
---

# DDPO checkpoint {epoch}

Weights ({kind}) after {epoch} epoch{"s" * (epoch != 1)} of [rl4med-ddpo](https://github.com/parhamsaremi/rl4med-ddpo)
from the model below{unet}, with the reward {settings["reward_fn"]} and the prompts {settings["prompt_fn"]}. Images are
synthetic.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({json.dumps(model)})
pipe.{load}
```
"""

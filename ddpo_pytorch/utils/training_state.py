"""The state of an unfinished training: one file, written whole, from which the same command goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import parse_json
from ddpo_pytorch.utils.weights import read_pickle


def save_state(path: str | Path, state: Mapping[str, Any], belongs_to: Mapping[str, Any]) -> None:
    """Write tensors and plain values, and the settings (JSON-able) that they belong to.

    The file is on the disk when this returns. Raises DiskFull, with the old one untouched.
    """
    with atomic_write(path, durable=True) as temporary, open(temporary, "wb") as file:
        torch.save({"state": dict(state), "belongs_to": json.dumps(belongs_to)}, file)


def restore_state(
    path: str | Path, belongs_to: Mapping[str, Any], restore: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any] | None:
    """Load a state and give it to `restore`; return it, or None where there is no file.

    Raises UserError as `load_state` does, and where `restore` finds another content than it expects.
    """
    state = load_state(path, belongs_to)
    if state is not None:
        try:
            restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise _damaged(path, error) from error
    return state


def load_state(path: str | Path, belongs_to: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save_state` wrote, on the CPU; None where there is no file.

    Raises UserError for a damaged file, and for one of other settings, of which the first is named.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        # mapped: the processes of a node share what would otherwise be a copy of all weights and moments for each
        saved = read_pickle(path, mmap=True)
        state, old = dict(saved["state"]), parse_json(saved["belongs_to"], dict, "")
    except Exception as error:  # a damaged pickle can fail in any way
        raise _damaged(path, error) from error
    new = json.loads(json.dumps(belongs_to))
    if changed := difference(old, new):
        name, before, now = changed
        raise UserError(
            f"{str(path)!r} is the state of an unfinished training with {name}={before}, now it is {now}; give the "
            "same to go on, another folder, or delete it to begin anew"
        )
    return state


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{str(path)!r}, the state of an unfinished training, is damaged ({type(error).__name__}); delete it to start "
        "again"
    )

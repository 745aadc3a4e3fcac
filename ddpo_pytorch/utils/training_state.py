"""The state of an unfinished training: a single file, written atomically, from which the same command resumes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import parse_json
from ddpo_pytorch.utils.weights import read_pickle


class TrainState:
    """Save and load everything that changes during a training.

        state = TrainState(path, settings, model=model, optimizer=optimizer, scheduler=scheduler)
        progress = state.load() or {"epoch": 0}
        ...
        state.save(epoch=3)

    Args:
        path: the file; None saves no state.
        settings: JSON-able values that identify the training; a state with other ones is rejected.
        parts: objects with `state_dict` and `load_state_dict`, or None.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], **parts: Any):
        self.path, self.settings = None if path is None else Path(path), settings
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def load(self) -> dict[str, Any] | None:
        """Restore the parts; return the progress given to `save`, or None without a file. See `restore_state`."""

        def restore(state: Mapping[str, Any]) -> None:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            if not isinstance(state["progress"], dict):
                raise TypeError("progress")

        state = self.path and restore_state(self.path, self.settings, restore)
        return state["progress"] if state else None

    def save(self, **progress: Any) -> None:
        """Write all parts and `progress` (tensors and plain values). Raises DiskFull, keeping the old file."""
        if self.path is not None:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            save_state(self.path, {"parts": parts, "progress": progress}, self.settings)

    def remove(self) -> None:
        """Delete the file of a finished training."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def save_state(path: str | Path, state: Mapping[str, Any], belongs_to: Mapping[str, Any]) -> None:
    """Durably write tensors and plain values with the settings (JSON-able) that they belong to.

    Raises DiskFull, with the old file untouched.
    """
    with atomic_write(path, durable=True) as temporary, open(temporary, "wb") as file:
        torch.save({"state": dict(state), "belongs_to": json.dumps(belongs_to)}, file)


def restore_state(
    path: str | Path, belongs_to: Mapping[str, Any], restore: Callable[[Mapping[str, Any]], None] = lambda state: None
) -> dict[str, Any] | None:
    """Load the state that `save_state` wrote on the CPU, pass it to `restore` and return it; None without a file.

    Raises UserError for a damaged file, including any error of `restore`, and for a state of other settings, naming
    the first that differs.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        # memory-mapped, so that the processes of a node share one copy of weights and moments
        saved = read_pickle(path, mmap=True)
        state, old = dict(saved["state"]), parse_json(saved["belongs_to"], dict, "")
        if not (changed := difference(old, json.loads(json.dumps(belongs_to)))):
            restore(state)
            return state
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(
            f"{str(path)!r}, the state of an unfinished training run, is damaged ({type(error).__name__}); delete it "
            "to start over"
        ) from error
    name, before, now = changed
    raise UserError(
        f"{str(path)!r} is the state of an unfinished training run with {name}={before}, now it is {now}; use the same "
        "value to resume, choose another folder, or delete the file to start over"
    )

"""The state of an unfinished training run: a single file, written atomically, from which the same command resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import parse_json
from ddpo_pytorch.utils.weights import read_pickle


class TrainState:
    """Save and load everything that changes during training: parts with `state_dict` and `load_state_dict`, or None.

        state = TrainState(path, settings, model=model, optimizer=optimizer, scheduler=scheduler)
        progress = state.load() or {"epoch": 0}
        ...
        state.save(epoch=3)

    Without a path, nothing is saved. `settings` are JSON-able values that identify the run; a state of others is
    rejected.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], **parts: Any):
        self.path, self.settings = None if path is None else Path(path), settings
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def load(self) -> dict[str, Any] | None:
        """Restore the parts; return the progress given to `save`, on the CPU, or None without a file.

        Raises UserError for a damaged file, and for a state of other settings, naming the first that differs.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            # memory-mapped, so that the processes of a node share one copy of weights and moments
            saved = read_pickle(self.path, mmap=True)
            state, old = saved["state"], parse_json(saved["belongs_to"], dict, "")
            if not (changed := difference(old, json.loads(json.dumps(self.settings)))):
                for name, part in self.parts.items():
                    part.load_state_dict(state["parts"][name])
                return {**state["progress"]}
        except Exception as error:  # a damaged pickle can fail in any way
            problem = f"is damaged ({type(error).__name__})"
            raise UserError(f"the training state {str(self.path)!r} {problem}; delete it to start over") from error
        advice = "use the same value to resume, choose another folder, or delete the file to start over"
        raise UserError(f"{str(self.path)!r} is the state of an unfinished training run with {changed}; {advice}")

    def save(self, **progress: Any) -> None:
        """Durably write all parts and `progress` (tensors and plain values). Raises DiskFull, keeping the old file."""
        if self.path is None:
            return
        state = {"parts": {name: part.state_dict() for name, part in self.parts.items()}, "progress": progress}
        with atomic_write(self.path, durable=True) as temporary, open(temporary, "wb") as file:
            torch.save({"state": state, "belongs_to": json.dumps(self.settings)}, file)

    def remove(self) -> None:
        """Delete the file of a finished run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

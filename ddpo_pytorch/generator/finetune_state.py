"""Training state of stage (i), and its batches from any step on."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ddpo_pytorch.data.images import loader_options
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream
from ddpo_pytorch.utils.training_state import restore_state

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """All that changes from step to step."""

    parameters: list[nn.Parameter]
    optimizer: Any
    schedule: Any
    average: EMAModel | None
    scaler: Any

    def snapshot(self, step: int) -> dict[str, Any]:
        """Return the state after `step`, for `save_state`."""
        average = self.average
        return {
            "step": step,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": (average.optimization_step, average.shadow_params) if average else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, file: Path, settings: dict[str, Any]) -> int:
        """Restore a snapshot from a state file; return its step, or 0 if there is no file."""
        state = restore_state(file, settings, self._take)
        if state is None:
            return 0
        logger.info("resuming after step %d of %s", state["step"], file)
        return state["step"]

    def _take(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            if self.average:
                self.average.optimization_step, shadow = state["average"]
                for parameter, value in zip(self.average.shadow_params, shadow, strict=True):
                    parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        if not isinstance(state["step"], int):
            raise TypeError("step")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights within this context."""
        if self.average:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.average:
                self.average.restore(self.parameters)


def endless_batches(
    accelerator: Accelerator, sd: ConfigDict, seed: int, dataset: Dataset, first: int
) -> Iterator[tuple[list[torch.Tensor], BatchDraws]]:
    """Yield this process's batches from number `first` on, each with its random numbers."""
    size, share = sd.batch_size, (accelerator.process_index, accelerator.num_processes)
    try:
        sampler = EndlessBatches(len(dataset), size, seed, first, *share)
    except ValueError as error:
        raise UserError(f"{error}; lower sd.batch_size") from error
    loader = DataLoader(dataset, batch_sampler=sampler, **loader_options(sd.num_workers))
    for number, batch in enumerate(loader, start=first):
        batch = [tensor.to(accelerator.device, non_blocking=True) for tensor in batch]
        yield batch, BatchDraws(seed, Stream.NOISE, number, size, *share, device=accelerator.device)

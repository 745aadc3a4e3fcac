"""The moving parts of stage (i): what changes from step to step, and batches that go on where a killed run stopped."""

import logging
import time
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

from ddpo_pytorch.data.image_cache import loader_options
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream
from ddpo_pytorch.utils.training_state import restore_state

logger = logging.getLogger(__name__)


def parameter_groups(loss: nn.Module, parameters: list[nn.Parameter], sd: ConfigDict) -> list:
    """What the optimizer takes: a text encoder that is trained further learns at a tenth of the UNet's rate."""
    if sd.stage != "finetune" or not sd.train_text_encoder:
        return parameters
    text = {id(parameter) for parameter in loss.captions.parameters()}
    slow = [parameter for parameter in parameters if id(parameter) in text]
    fast = [parameter for parameter in parameters if id(parameter) not in text]
    return [{"params": fast}, {"params": slow, "lr": sd.learning_rate / 10}]


class Stopwatch:
    """Seconds of work since the last lap; what happens within `paused` does not count."""

    def __init__(self):
        self._started = time.perf_counter()

    def lap(self) -> float:
        seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun


@dataclass
class Training:
    """All that changes from step to step."""

    parameters: list[nn.Parameter]
    optimizer: Any
    schedule: Any
    average: EMAModel | None
    scaler: Any

    def snapshot(self, step: int) -> dict[str, Any]:
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
        """Take what `snapshot` made from a state file; return its step, 0 if there is no file."""
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
        """Within this context the model has its averaged weights."""
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
    """This process's batches from number `first` on, each with its random numbers."""
    size, place = sd.batch_size, (accelerator.process_index, accelerator.num_processes)
    try:
        sampler = EndlessBatches(len(dataset), size, seed, first, *place)
    except ValueError as error:
        raise UserError(f"{error}; lower sd.batch_size") from error
    loader = DataLoader(dataset, batch_sampler=sampler, **loader_options(sd.num_workers))
    for number, batch in enumerate(loader, start=first):
        batch = [tensor.to(accelerator.device, non_blocking=True) for tensor in batch]
        yield batch, BatchDraws(seed, Stream.NOISE, number, size, *place, device=accelerator.device)

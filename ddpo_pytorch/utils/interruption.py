"""Requests to stop: SIGTERM and SIGUSR1, which schedulers send some time before they end a job."""

import logging
import signal

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the signals are noted, instead of ending the process."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.name = ""  # of the signal that this process got, or "" if none yet

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name
        logger.warning("%s: stopping at the next batch of samples, or after the update that is under way", self.name)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. A collective: every process calls it at the same places."""
        flag = torch.tensor(float(bool(self.name)), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum").item())

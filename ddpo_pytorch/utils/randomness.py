"""Randomness as a function of (seed, progress) alone: no states are saved, and a resumed run equals an unbroken one."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch.utils.data import Sampler

from ddpo_pytorch.utils.distributed import to_device
from ddpo_pytorch.utils.errors import UserError

# independent random streams of a run; their numbers are part of every derived seed
Stream = IntEnum("Stream", "PROMPTS NOISE ORDER TIMESTEPS GRID EVALUATION BATCHES VALIDATION HELD_OUT POOL", start=0)


def derived_seed(seed: int, stream: Stream, *progress: int) -> int:
    """Return a 63-bit seed from the run's seed, the stream and the progress (epoch, sample index, ...)."""
    state = np.random.SeedSequence([seed, int(stream), *progress]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


def text_number(text: str) -> int:
    """Return 128 bits of a text's SHA-256, for use in `derived_seed` in place of an index."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of random, NumPy and PyTorch within the context, then restore them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator_of(seed: int, stream: Stream, *progress: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, stream, *progress))


class EndlessBatches(Sampler[list[int]]):
    """Endless batches of indices below `count`, from one permutation per `count // (batch_size * processes)` batches.

    Each process gets its part of a batch; what remains of a permutation is dropped. A resumed run starts at batch
    `first`. Raises UserError if there are fewer items than one batch of all processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, first: int = 0, rank: int = 0, processes: int = 1):
        self.count, self.batch_size, self.seed, self.first = count, batch_size, seed, first
        self.rank, self.processes = rank, processes
        if count < batch_size * processes:
            few = f"{count} items are fewer than a batch of {batch_size} for {processes} processes"
            raise UserError(f"{few}; lower the batch size")

    def __iter__(self) -> Iterator[list[int]]:
        total = self.batch_size * self.processes
        epoch, first = divmod(self.first, self.count // total)
        while True:
            order = torch.randperm(self.count, generator=generator_of(self.seed, Stream.BATCHES, epoch))
            for number in range(first, self.count // total):
                start = number * total + self.rank * self.batch_size
                yield order[start : start + self.batch_size].tolist()
            epoch, first = epoch + 1, 0


class BatchDraws:
    """Random numbers for batch `number` of a stream, drawn for all processes; each keeps its own rows.

    They are drawn on the CPU, so that they are the same on every device. Only the first `kept` of the `size` rows of a
    process are used (the last batch of a validation set is shorter).
    """

    def __init__(
        self,
        seed: int,
        stream: Stream,
        number: int,
        size: int,
        rank: int = 0,
        processes: int = 1,
        kept: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self._generator, self._total = generator_of(seed, stream, number), size * processes
        self._device = torch.device(device)
        self._rows = slice(rank * size, rank * size + (size if kept is None else kept))

    def normal(self, *shape: int) -> torch.Tensor:
        """Return (B, *shape) from the standard normal distribution."""
        return self._local(torch.randn(self._total, *shape, generator=self._generator))

    def uniform(self) -> torch.Tensor:
        """Return (B,) from [0, 1)."""
        return self._local(torch.rand(self._total, generator=self._generator))

    def integers(self, bound: int) -> torch.Tensor:
        """Return (B,) from {0, ..., bound - 1}."""
        return self._local(torch.randint(bound, (self._total,), generator=self._generator))

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        return to_device(values[self._rows], self._device)

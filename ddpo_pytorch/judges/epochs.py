"""What an epoch of classifier training sees: the order of its images, the batches of each process, flips."""

import math
from collections.abc import Iterator

import torch

from ddpo_pytorch.utils.randomness import Stream, generator_of


def epoch_order(images: int, drawn: int, seed: int, epoch: int) -> torch.Tensor:
    """Indices (drawn,) of an epoch's images: stretch number `epoch` of permutations of all images laid end to end."""
    first, skipped = divmod(epoch * drawn, images)
    rounds = range(first, first + math.ceil((skipped + drawn) / images))
    order = [torch.randperm(images, generator=generator_of(seed, Stream.BATCHES, number)) for number in rounds]
    return torch.cat(order)[skipped : skipped + drawn]


def deal(order: torch.Tensor, batch_size: int, rank: int, processes: int) -> list[list[int]]:
    """The batches of one process. All processes get equally many, and batches differ by one image at most.

    There are as many as with full batches and a rest, but no rest: an update on a few images would count as much as any
    other, and batch norm cannot be trained on a single one. Needs as many images as processes.
    """
    steps = max(1, min(math.ceil(len(order) / (batch_size * processes)), len(order) // processes))
    return [batch.tolist() for batch in order.tensor_split(steps * processes)[rank::processes]]


class EpochBatches:
    """This process's batches of epoch number `epoch`, which may be set between epochs: a DataLoader's batch sampler."""

    def __init__(self, images: int, drawn: int, batch_size: int, seed: int, rank: int, processes: int):
        self.images, self.drawn, self.batch_size, self.seed = images, drawn, batch_size, seed
        self.rank, self.processes, self.epoch = rank, processes, 0

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.images, self.drawn, self.seed, self.epoch)
        return iter(deal(order, self.batch_size, self.rank, self.processes))


def random_flips(images: torch.Tensor, quarter_turns: bool = False) -> torch.Tensor:
    """Each square image of (B, 3, S, S) mirrored left-right and top-bottom with probability 1/2 each.

    With `quarter_turns` it is also transposed with probability 1/2, which makes the eight symmetries equally likely.
    """
    for dim in (-1, -2):
        chosen = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(dim), images)
    if quarter_turns:
        chosen = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], images.transpose(-1, -2), images)
    return images

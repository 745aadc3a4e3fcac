"""Passes over sample sets with a judge and feature networks, shared among processes.

Each process takes every n-th image; counts, moments and distances are summed in float64 at the end of a pass, so the
results do not depend on the number of processes and uneven shares do no harm.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.metrics.alignment import AlignmentCounts, count_alignment
from ddpo_pytorch.metrics.fidelity import Moments, add_distances, frechet_distance, pair_images
from ddpo_pytorch.metrics.loading import load_batches

logger = logging.getLogger(__name__)

Samples = Sequence[tuple[Path, str]]
Extractor = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Instruments:
    """What measures: the judge, feature extractors by the name of their Frechet distance, LPIPS or None.

    `shape` (H, W) is the one size of all images, `batch_size` images a process and batch.
    """

    accelerator: Accelerator
    judge: ArtifactClassifier
    extractors: dict[str, Extractor]
    lpips: torch.nn.Module | None
    shape: tuple[int, int]
    batch_size: int
    progress: bool = True

    def share(self, items: Sequence) -> Sequence:
        """This process's part of a list that every process holds whole."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a float64 tensor over all processes."""
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum").to(value.device)

    def batches(self, title: str, *columns: Sequence[Path]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Aligned batches (B, 3, H, W) of one or more equally long lists of files, with a progress bar."""
        loaders = [load_batches(paths, self.batch_size, self.shape) for paths in columns]
        total = -(-len(columns[0]) // self.batch_size)
        hidden = None if self.progress and self.accelerator.is_main_process else True
        for batch in tqdm(zip(*loaders, strict=True), desc=title, total=total, disable=hidden):
            yield tuple(images.to(self.accelerator.device) for images in batch)


@dataclass(frozen=True)
class Measured:
    """What one pass over a sample set yields: the judge's counts, and moments by the name of the features."""

    counts: AlignmentCounts
    moments: dict[str, Moments] = field(default_factory=dict)

    def distance(self, other: "Measured | None", name: str) -> float | None:
        """Frechet distance of the named features to those of another set; None where either was not measured."""
        if other is None or name not in self.moments or name not in other.moments:
            return None
        return frechet_distance(self.moments[name], other.moments[name])


def measure(samples: Samples, tools: Instruments, title: str) -> Measured:
    """Judge every sample and collect the moments of its features."""
    device, probe = tools.accelerator.device, torch.zeros(1, 3, *tools.shape)
    moments = {name: Moments.zeros(fn(probe).shape[1], device) for name, fn in tools.extractors.items()}
    counts = count_alignment([], torch.empty(0), tools.judge.labels)
    share = tools.share(samples)
    captions = iter([caption for _, caption in share])
    for (images,) in tools.batches(title, [path for path, _ in share]):
        stated = [next(captions) for _ in images]
        counts += count_alignment(stated, tools.judge.predict(images), tools.judge.labels)
        for name, features in tools.extractors.items():
            moments[name].add(features(images))
    table = tools.sum(counts.table)
    summed = {name: Moments(tools.sum(m.count), tools.sum(m.total), tools.sum(m.outer)) for name, m in moments.items()}
    return Measured(AlignmentCounts(counts.labels, table), summed)


def lpips_sums(fake: Samples, real: Samples, seed: int, tools: Instruments) -> torch.Tensor:
    """(32, 2) float64 sums of (LPIPS, pairs) by caption; zeros without LPIPS or real images."""
    sums = torch.zeros(len(CAPTIONS), 2, dtype=torch.float64)
    if tools.lpips is None:
        return sums
    pairs = tools.share(pair_images(fake, real, seed))
    rows = iter([CAPTIONS.index(caption) for _, _, caption in pairs])
    for fakes, reals in tools.batches("LPIPS", [pair[0] for pair in pairs], [pair[1] for pair in pairs]):
        add_distances(sums, tools.lpips, fakes, reals, [next(rows) for _ in fakes])
    return tools.sum(sums)

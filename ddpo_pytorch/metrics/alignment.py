"""APR, the artifact prevalence rate of equation (3): the share of images in which a judge sees what the caption says.

An image counts when *all* labels the judge has (H = 4 artifacts in the paper) equal the caption's. Everything is kept
as counts, so that processes with uneven shares are summed and divided once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, SINGLE_ARTIFACT_CAPTIONS, labels_of


@dataclass(frozen=True)
class AlignmentCounts:
    """Judged images by caption: (32, 2 + H) float64 with columns images, aligned images, agreements of each label."""

    labels: tuple[str, ...]
    table: torch.Tensor

    def __add__(self, other: "AlignmentCounts") -> "AlignmentCounts":
        return AlignmentCounts(self.labels, self.table + other.table)

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.table[:, 0].sum())

    def apr(self) -> float | None:
        """Share of aligned images in [0, 1]; None without images."""
        return _ratio(self.table.sum(0))

    def apr_by_prompt(self) -> dict[str, float]:
        """APR of each caption that has images, in the official order."""
        return {c: _ratio(row) for c, row in zip(CAPTIONS, self.table, strict=True) if row[0]}

    def apr_single_artifact(self) -> dict[tuple[str, str], float | None]:
        """Table 2: APR by (disease, artifact) of the 8 captions with exactly one artifact; None without images."""
        by_prompt = self.apr_by_prompt()
        return {key: by_prompt.get(caption) for key, caption in SINGLE_ARTIFACT_CAPTIONS.items()}

    def images_by_prompt(self) -> dict[str, int]:
        """Number of images of each caption, zeros included."""
        return {caption: int(row[0]) for caption, row in zip(CAPTIONS, self.table, strict=True)}

    def label_accuracy(self) -> dict[str, float]:
        """Share of images on which the judge agrees with the caption about one label, by label."""
        sums = self.table.sum(0)
        return {name: float(sums[2 + i] / sums[0]) for i, name in enumerate(self.labels) if sums[0]}


def count_alignment(captions: Sequence[str], predictions: torch.Tensor, labels: tuple[str, ...]) -> AlignmentCounts:
    """Count B images with these captions and 0/1 predictions (B, H), whose columns are `labels`.

    Raises UserError for a caption that is not one of the 32.
    """
    columns = [LABELS.index(name) for name in labels]
    table = torch.zeros(len(CAPTIONS), 2 + len(labels), dtype=torch.float64)
    if captions:
        stated = torch.tensor([labels_of(caption) for caption in captions])[:, columns]
        agree = predictions.cpu() == stated
        aligned = agree.all(dim=1, keepdim=True)
        rows = torch.cat([torch.ones_like(aligned), aligned, agree], dim=1).double()
        table.index_add_(0, torch.tensor([CAPTIONS.index(caption) for caption in captions]), rows)
    return AlignmentCounts(labels, table)


def _ratio(row: torch.Tensor) -> float | None:
    return float(row[1] / row[0]) if row[0] else None

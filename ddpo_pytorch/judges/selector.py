"""The Selector scores the quality of an image in [0, 1], regardless of its prompt; a threshold accepts or rejects it.

Vision transformer (patch 16, width 768, 6 layers, 12 heads at full size), then width -> 256 -> 64 -> 1. If experts
rated criteria of quality, such as the clarity of the optic disc, the last layer has one more output for each.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpo_pytorch.judges.vit import Judge, VisionSizes, build, mlp, read_judge, save_judge
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import OneOf

HEAD = (256, 64)
MLP_RATIO = 8 / 3  # of its blocks: 2048 at width 768
DESCRIPTION = {"sizes": dict, "threshold?": OneOf((float, None)), "criteria?": [str]}
DESCRIPTION |= {"calibration?": dict, "origin?": dict}


class Selector(Judge):
    """Map images to logits of quality and `criteria`; `threshold` is the least score to pass, None if uncalibrated."""

    def __init__(self, sizes: VisionSizes, criteria: Sequence[str] = ()):
        super().__init__(sizes)
        self.criteria = tuple(criteria)
        self.threshold: float | None = None
        self.calibration: Mapping[str, Any] = {}
        self.head = mlp((self.features, *HEAD, 1 + len(self.criteria)), nn.GELU, sizes.dropout)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map preprocessed images to logits (B,), or with K criteria (B, 1 + K), quality first."""
        return self.head(self.encoder(pixels)).squeeze(-1)

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """Score images (B, 3, H, W) in [0, 1]: (B,), float32 in [0, 1], without dropout or gradients."""
        return self.score_all(images)[:, 0]

    def score_all(self, images: torch.Tensor) -> torch.Tensor:
        """Score quality and K criteria of images (B, 3, H, W): (B, 1 + K), as `score`."""
        return self.score_with(images).view(len(images), -1)

    def accepts(self, scores: torch.Tensor) -> torch.Tensor:
        """Return whether scores (B,) reach `threshold`: bool (B,). Raises UserError before calibration."""
        if self.threshold is None:
            raise UserError("the Selector has no threshold; stage 1 of train_rlhf.py calibrates it")
        return scores >= self.threshold


def save_selector(selector: Selector, path: str | Path) -> None:
    """Write safetensors with sizes, threshold, calibration and origin in the metadata, atomically."""
    description = {name: getattr(selector, name) for name in ("threshold", "calibration", "origin", "criteria")}
    save_judge(path, "selector", selector, description | {"sizes": vars(selector.sizes)})


def load_selector(path: str | Path, device: str | torch.device = "cpu") -> Selector:
    """Load a Selector, frozen and in eval mode. Raises UserError for a missing or invalid file."""
    description, weights = read_judge(path, "selector", DESCRIPTION)
    selector = build(lambda: Selector(description["sizes"], description.get("criteria", ())), weights, path)
    selector.threshold = description.get("threshold")
    selector.calibration, selector.origin = description.get("calibration", {}), description.get("origin", {})
    return selector.to(device)

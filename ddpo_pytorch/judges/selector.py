"""The Selector scores the quality of an image in [0, 1], whatever it was meant to show; a threshold accepts or rejects.

Vision transformer (patch 16, width 768, 6 layers, 12 heads at full size), then width -> 256 -> 64 -> 1.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpo_pytorch.judges.vit import ImageEncoder, VisionSizes, build, read_judge, read_sizes, save_judge, scoring
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import OneOf

HEAD = (256, 64)
MLP_RATIO = 8 / 3  # of its blocks: 2048 at width 768
DESCRIPTION = {"sizes": dict, "threshold?": OneOf((float, None)), "calibration?": dict, "origin?": dict}


class Selector(nn.Module):
    """Images -> one logit each; the score is its sigmoid.

    Attributes:
        threshold: lowest score that passes, or None before calibration.
        calibration: how the threshold was chosen (plain values), for people.
        origin: training data and settings (plain values).
    """

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.sizes = sizes
        self.threshold: float | None = None
        self.calibration: Mapping[str, Any] = {}
        self.origin: Mapping[str, Any] = {}
        self.encoder = ImageEncoder(sizes)
        layers, width = [], sizes.width
        for inner in HEAD:
            layers += [nn.Linear(width, inner), nn.GELU(), nn.Dropout(sizes.dropout)]
            width = inner
        self.head = nn.Sequential(*layers, nn.Linear(width, 1))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) in [-1, 1]."""
        return self.encoder.preprocess(images)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Preprocessed images -> logits (B,)."""
        return self.head(self.encoder(pixels)).squeeze(-1)

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B,), float32 in [0, 1], without dropout or gradients."""
        with scoring(self):
            return self(self.preprocess(images.to(next(self.parameters()).device))).float().sigmoid()

    def passes(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> bool (B,), whether each scores `threshold` or more."""
        return self.accepts(self.score(images))

    def accepts(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B,) -> bool (B,). Raises UserError if there is no threshold yet."""
        if self.threshold is None:
            raise UserError("the Selector has no threshold; stage 1 of train_rlhf.py calibrates it")
        return scores >= self.threshold


def save_selector(selector: Selector, path: str | Path) -> None:
    """Write safetensors with sizes, threshold, calibration and origin in the metadata, atomically."""
    description = {name: getattr(selector, name) for name in ("threshold", "calibration", "origin")}
    save_judge(path, "selector", selector, description | {"sizes": dataclasses.asdict(selector.sizes)})


def load_selector(path: str | Path, device: str | torch.device = "cpu") -> Selector:
    """Load a Selector, frozen and in eval mode. Raises UserError for a missing or other file."""
    description, weights = read_judge(path, "selector", DESCRIPTION)
    sizes = read_sizes(description, path)
    selector = build(lambda: Selector(sizes), weights, path)
    selector.threshold = description.get("threshold")
    selector.calibration, selector.origin = description.get("calibration", {}), description.get("origin", {})
    return selector.to(device)

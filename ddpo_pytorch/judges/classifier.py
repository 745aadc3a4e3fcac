"""The attribute classifier: EfficientNet with one logit per attribute, its preprocessing and its files.

H = 6 heads (`LABELS`) give the reward; an independent model with H = 4 heads (the artifacts) judges the outcome (APR).
The paper's backbone is EfficientNet-B0 at 512 px; small relatives from timm serve small images.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision.transforms.functional as tvf
from torch import nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from ddpo_pytorch.data.images import LARGEST_SIDE
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.vit import build, read_judge, save_judge
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import OneOf
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DROPOUT = 0.3
KIND = "artifact_classifier"
# the published checkpoints: torchvision's EfficientNet-B0 with Sequential(Dropout, Linear) as classifier
PUBLISHED_ARCH = "torchvision/efficientnet_b0"
PUBLISHED_SIZE = 512  # pixels; the files do not state it
DESCRIPTION = {
    "labels": [str],
    "image_size": range(1, LARGEST_SIDE + 1),
    "arch": str,
    "thresholds?": OneOf(({str: float}, None)),
}


class ArtifactClassifier(nn.Module):
    """Backbone, dropout 0.3 and a linear layer to len(labels) logits; sigmoid(logit) > 0.5 means present.

    `arch` is a timm model name, or "torchvision/efficientnet_b0" for the published checkpoints. `thresholds` by label,
    0.5 by default, are saved with the model for reports; `predict`, and so reward, evaluation and metrics, uses 0.5.
    Raises UserError for an unknown architecture, repeated labels, or thresholds of other labels.
    """

    def __init__(
        self,
        labels: tuple[str, ...] = LABELS,
        image_size: int = 512,
        arch: str = "efficientnet_b0",
        pretrained: bool = False,
        thresholds: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.labels, self.image_size, self.arch = tuple(labels), int(image_size), arch
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise UserError(f"classifier labels are {str(self.labels)[:200]}; give at least one, all different")
        self.thresholds = dict.fromkeys(self.labels, 0.5) | dict(thresholds or {})
        if set(self.thresholds) != set(self.labels) or not all(0 <= value <= 1 for value in self.thresholds.values()):
            given, names = str(self.thresholds)[:200], str(self.labels)[:200]
            raise UserError(f"thresholds are {given}; allowed are numbers in [0, 1] for {names}")
        if arch == PUBLISHED_ARCH:
            self.model = efficientnet_b0()
            if pretrained:  # torchvision's own way would unpickle whatever lies in the cache
                weights = EfficientNet_B0_Weights.IMAGENET1K_V1
                self.model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
            self.model.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(1280, len(self.labels)))
        elif timm.is_model(arch):
            self.model = timm.create_model(arch, pretrained=pretrained, num_classes=len(self.labels), drop_rate=DROPOUT)
        else:
            raise UserError(f"classifier architecture {arch!r} is unknown to timm; try efficientnet_b0 or tinynet_e")
        self.to(memory_format=torch.channels_last)  # a training step on CPU takes .7 of the time, same logits

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> resized (bilinear, antialiased), ImageNet-normalised; input unchanged."""
        images = images.float()
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = tvf.resize(images, [self.image_size, self.image_size], antialias=True)
        return tvf.normalize(images, IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Preprocessed (B, 3, S, S) -> logits (B, H)."""
        return self.model(pixels)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> logits (B, H)."""
        return self(self.preprocess(images.to(next(self.parameters()).device)))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> 0/1 predictions (B, H) at threshold 0.5."""
        return (self.logits(images) > 0).long()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> pooled features before the head (B, F)."""
        pixels = self.preprocess(images.to(next(self.parameters()).device))
        if self.arch == PUBLISHED_ARCH:
            return torch.flatten(self.model.avgpool(self.model.features(pixels)), 1)
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)


def save_classifier(model: ArtifactClassifier, path: str | Path) -> None:
    """Write safetensors with labels, image_size, arch and thresholds in the metadata, atomically."""
    names = ("labels", "image_size", "arch", "thresholds")
    save_judge(path, KIND, model, {name: getattr(model, name) for name in names})


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ArtifactClassifier:
    """Load one of our safetensors files or a published .pth, frozen and in eval mode.

    Raises UserError for a missing file, weights that do not fit, and as `read_tensors` does.
    """
    path = resolve(path)
    if not path.is_file():
        raise UserError(
            f"classifier {str(path)!r} does not exist; train one with scripts/train_isic_classifier.py or fetch the "
            "published files (README, 'Published files')"
        )
    if path.suffix == ".safetensors":
        description, state = read_judge(path, KIND, DESCRIPTION)
        labels, size, arch = (description[name] for name in ("labels", "image_size", "arch"))
        make = partial(ArtifactClassifier, tuple(labels), size, arch, thresholds=description.get("thresholds"))
    else:
        state, _ = read_tensors(path)
        head = state.get("model.classifier.1.weight")
        if head is None or head.ndim != 2 or len(head) not in (4, 6):
            raise UserError(
                f"{str(path)!r} is not a published classifier: expected a dict with model_state_dict, names of "
                "torchvision's EfficientNet-B0 under 'model.', and a head of 4 or 6 rows"
            )
        make = partial(ArtifactClassifier, LABELS[: len(head)], PUBLISHED_SIZE, PUBLISHED_ARCH)
    return build(make, state, path).to(device)

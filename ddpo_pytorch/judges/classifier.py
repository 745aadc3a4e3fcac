"""The attribute classifier: EfficientNet with one logit an attribute, its preprocessing and its files.

H = 6 heads (`LABELS`) give the reward; an independent model with H = 4 heads (the artifacts) judges the outcome (APR).
The paper's backbone is EfficientNet-B0 at 512 px; small relatives from timm serve small images.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision.transforms.functional as tvf
from safetensors.torch import save_file
from torch import nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from ddpo_pytorch.data.images import LARGEST_SIDE
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.vit import build
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import OneOf, parse_json
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DROPOUT = 0.3
# the published checkpoints: torchvision's EfficientNet-B0 with Sequential(Dropout, Linear) as classifier.
PUBLISHED_ARCH = "torchvision/efficientnet_b0"
PUBLISHED_SIZE = 512  # pixels; the files do not state it
# what our files state about themselves
DESCRIPTION = {
    "labels": [str],
    "image_size": range(1, LARGEST_SIDE + 1),
    "arch": str,
    "thresholds?": OneOf(({str: float}, None)),
}


class ArtifactClassifier(nn.Module):
    """Backbone, dropout 0.3 and a linear layer to len(labels) logits; sigmoid(logit) > 0.5 means present.

    `arch` is a timm model name, or "torchvision/efficientnet_b0" for the published checkpoints. `thresholds`, by label,
    0.5 where none is given, are kept in the model's files for reports that ask for them; `predict`, and with it reward,
    evaluation and metrics, stays at 0.5. Raises UserError for an unknown architecture or thresholds of other labels.
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
            raise UserError(f"labels {str(self.labels)[:200]} of a classifier are none, or not all different")
        self.thresholds = dict.fromkeys(self.labels, 0.5) | dict(thresholds or {})
        if set(self.thresholds) != set(self.labels) or not all(0 <= value <= 1 for value in self.thresholds.values()):
            given, names = str(self.thresholds)[:200], str(self.labels)[:200]
            raise UserError(f"thresholds {given} are not numbers in [0, 1] for some of {names}")
        if arch == PUBLISHED_ARCH:
            self.model = efficientnet_b0()
            if pretrained:  # torchvision's own way would unpickle whatever lies in the cache
                weights = EfficientNet_B0_Weights.IMAGENET1K_V1
                self.model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
            self.model.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(1280, len(self.labels)))
        else:
            if not timm.is_model(arch):
                raise UserError(
                    f"classifier architecture {arch!r} is unknown to timm; examples: efficientnet_b0, tinynet_e"
                )
            self.model = timm.create_model(arch, pretrained=pretrained, num_classes=len(self.labels), drop_rate=DROPOUT)
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
    """Write safetensors whose metadata holds labels, image_size, arch and thresholds: the file describes itself.

    It appears whole or not at all.
    """
    about = {name: getattr(model, name) for name in ("labels", "image_size", "arch", "thresholds")}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"artifact_classifier": json.dumps(about)})


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ArtifactClassifier:
    """Open one of our safetensors files or a published .pth, in eval mode and frozen.

    Raises UserError for a missing file, weights that are missing, unexpected or of another shape, and as `read_tensors`
    does.
    """
    path = resolve(path)
    if not path.is_file():
        raise UserError(
            f"classifier {str(path)!r} does not exist; train one with scripts/train_isic_classifier.py or fetch the "
            "published files (README, 'Published files')"
        )
    if path.suffix == ".safetensors":
        make, state = _read_own(path)
    else:
        make, state = _read_published(path)
    model = build(make, state, path)
    return model.requires_grad_(False).eval().to(device)


def _read_own(path: Path) -> tuple[Callable[[], ArtifactClassifier], dict[str, torch.Tensor]]:
    state, metadata = read_tensors(path)
    about = metadata.get("artifact_classifier")
    if about is None:
        raise UserError(
            f"{str(path)!r} holds no classifier description; it was not written by train_isic_classifier.py"
        )
    about = parse_json(about, DESCRIPTION, f"the description in {str(path)!r}", "train it again")
    thresholds = about.get("thresholds")  # files written before they were kept have none
    labels, image_size, arch = tuple(about["labels"]), about["image_size"], about["arch"]
    return partial(ArtifactClassifier, labels, image_size, arch, thresholds=thresholds), state


def _read_published(path: Path) -> tuple[Callable[[], ArtifactClassifier], dict[str, torch.Tensor]]:
    state, _ = read_tensors(path)
    head = state.get("model.classifier.1.weight")
    if head is None or head.ndim != 2 or len(head) not in (4, 6):
        raise UserError(
            f"{str(path)!r} is not a published classifier: a dict with model_state_dict in torchvision's "
            "EfficientNet-B0 names under 'model.' and a head of 4 or 6 rows was expected"
        )
    return partial(ArtifactClassifier, LABELS[: len(head)], PUBLISHED_SIZE, PUBLISHED_ARCH), state


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""The attribute classifier: EfficientNet with one logit per attribute, its preprocessing and its files.

H = 6 heads (`LABELS`) give the reward; an independent model with H = 4 heads (the artifacts) judges the outcome (APR).
The paper's backbone is EfficientNet-B0 at 512 px; smaller timm models suit smaller images. The published classifiers
have torchvision's names of tensors, not timm's. Both return the same logits in eval mode; in training, torchvision's
drops whole residual branches (stochastic depth up to 0.2).
"""

import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
import torchvision.transforms.functional as tvf
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from ddpo_pytorch.data.images import LARGEST_SIDE
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.generator.parts import check_fit
from ddpo_pytorch.judges.vit import build, read_judge, save_judge, timm_network
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import OneOf
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

logger = logging.getLogger(__name__)
DROPOUT = 0.3
KIND, FIELDS = "artifact_classifier", ("labels", "image_size", "arch", "thresholds")  # of a file's metadata
# the published checkpoints: torchvision's EfficientNet-B0 with Sequential(Dropout, Linear) as classifier
PUBLISHED_ARCH = "torchvision/efficientnet_b0"
TIMM_ARCH = "efficientnet_b0"
TORCHVISION_FILE = "efficientnet_b0_rwightman-7f5810bc.pth"  # https://download.pytorch.org/models/
PUBLISHED_SIZE = 512  # pixels; the files do not state it
DESCRIPTION = {"labels": [str], "image_size": range(1, LARGEST_SIDE + 1), "arch": str}
DESCRIPTION |= {"thresholds?": OneOf(({str: float}, None))}


class ArtifactClassifier(nn.Module):
    """Backbone, dropout 0.3 and a linear layer to len(labels) logits; sigmoid(logit) > 0.5 means present.

    `arch` is a timm model name, or "torchvision/efficientnet_b0" for the published checkpoints. `thresholds` by label
    are saved for reports; `predict`, and thus rewards and metrics, always uses 0.5. Raises UserError for an unknown
    architecture, repeated labels, or thresholds of other labels.
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
            if pretrained:  # weights=... would unpickle any file in the cache
                weights = EfficientNet_B0_Weights.IMAGENET1K_V1
                self.model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
            self.model.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(1280, len(self.labels)))
        elif timm.is_model(arch):
            settings = {"num_classes": len(self.labels), "drop_rate": DROPOUT, "pretrained": pretrained}
            self.model = timm_network(arch, self.image_size, **settings)
        else:
            raise UserError(f"classifier architecture {arch!r} is unknown to timm; try efficientnet_b0 or tinynet_e")
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # a training step on a CPU takes 30 % less time, with equal logits

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images (B, 3, H, W) in [0, 1] (bilinear, antialiased) and normalise as ImageNet; input unchanged."""
        images = images.float()
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = tvf.resize(images, [self.image_size, self.image_size], antialias=True)
        return (images - self.mean) / self.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map preprocessed images (B, 3, S, S) to logits (B, H)."""
        return self.model(pixels)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Map images in [0, 1] to logits (B, H)."""
        return self(self.preprocess(images.to(next(self.parameters()).device)))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Map images in [0, 1] to 0/1 predictions (B, H) at threshold 0.5."""
        return (self.logits(images) > 0).long()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images in [0, 1] to pooled features before the head (B, F)."""
        pixels = self.preprocess(images.to(next(self.parameters()).device))
        if self.arch == PUBLISHED_ARCH:
            return self.model.avgpool(self.model.features(pixels)).flatten(1)
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)


def save_classifier(model: ArtifactClassifier, path: str | Path) -> None:
    """Write safetensors with labels, image_size, arch and thresholds in the metadata, atomically."""
    save_judge(path, KIND, model, {name: getattr(model, name) for name in FIELDS})


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ArtifactClassifier:
    """Load one of our safetensors files or a published .pth, frozen and in eval mode. Raises UserError for others."""
    path = resolve(path)
    if not path.is_file():
        advice = "train one with scripts/train_isic_classifier.py or fetch the published files (docs/data.md)"
        raise UserError(f"classifier {str(path)!r} does not exist; {advice}")
    if path.suffix == ".safetensors":
        description, state = read_judge(path, KIND, DESCRIPTION)
        make = partial(ArtifactClassifier, **{name: description.get(name) for name in FIELDS})
    else:
        state, _ = read_tensors(path)
        head = state.get("model.classifier.1.weight")
        if head is None or head.ndim != 2 or len(head) not in (4, 6):
            known = "a model_state_dict of torchvision's EfficientNet-B0 under 'model.', with a head of 4 or 6 rows"
            raise UserError(f"{str(path)!r} is not a published classifier ({known}); give another file")
        make = partial(ArtifactClassifier, LABELS[: len(head)], PUBLISHED_SIZE, PUBLISHED_ARCH)
    return build(make, state, path).to(device)


@cache
def torchvision_names() -> dict[str, str]:
    """Map timm's name to torchvision's for each tensor of EfficientNet-B0; both list them in the same order."""
    with torch.device("meta"):
        ours, theirs = timm.create_model(TIMM_ARCH), efficientnet_b0()
    return dict(zip(ours.state_dict(), theirs.state_dict(), strict=True))


def new_classifier(labels: tuple[str, ...], image_size: int, arch: str, weights: str) -> ArtifactClassifier:
    """Return a classifier with a random head and a backbone of `weights`: "imagenet", "none" or the path of a file.

    Raises UserError as `load_backbone` does, and if the ImageNet weights are neither cached nor reachable.
    """
    if weights not in ("imagenet", "none") and not resolve(weights).is_file():
        raise UserError(f"weights are {weights!r}; allowed are imagenet, none and the path of a file")
    try:
        model = ArtifactClassifier(labels, image_size, arch, pretrained=weights == "imagenet")
    except (OSError, RuntimeError, UnpicklingError) as error:
        paper = arch.split(".")[0] in (TIMM_ARCH, PUBLISHED_ARCH)
        source = f"torchvision's {TORCHVISION_FILE}" if paper else timm.get_pretrained_cfg(arch).hf_hub_id
        advice = f"give --weights=none for random ones, or --weights=PATH of {source}, fetched where there is internet"
        raise UserError(f"ImageNet weights of {arch!r} cannot be loaded ({type(error).__name__}); {advice}") from error
    if weights not in ("imagenet", "none"):
        load_backbone(model, weights)
    return model


def load_backbone(model: ArtifactClassifier, path: str | Path) -> None:
    """Load all but the head from a file: timm's, torchvision's, or a classifier of ours. UserError if it is unfit."""
    path = resolve(path)
    state, _ = read_tensors(path)
    if all(name.startswith("model.") for name in state):  # a classifier of ours, or a published one
        state = {name.removeprefix("model."): value for name, value in state.items()}
    from_torchvision = "features.0.0.weight" in state
    if from_torchvision != (model.arch == PUBLISHED_ARCH):
        names = torchvision_names()
        names = {theirs: ours for ours, theirs in names.items()} if from_torchvision else names
        state = {names.get(name, name): value for name, value in state.items()}
    names = "classifier" if model.arch == PUBLISHED_ARCH else model.model.pretrained_cfg["classifier"]
    head = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    backbone = {name: value for name, value in state.items() if not name.startswith(head)}
    own = {name: value for name, value in model.model.state_dict().items() if not name.startswith(head)}
    # older files lack batch norm's num_batches_tracked, which nothing here uses
    optional = {name for name in own if name.endswith("num_batches_tracked")} - backbone.keys()
    expected = {name: value for name, value in own.items() if name not in optional}
    check_fit(backbone, expected, path, f"give another file, or another --arch than {model.arch}")
    model.model.load_state_dict(backbone, strict=False)
    source = "torchvision's" if from_torchvision else "timm's"
    logger.info("backbone from %s: %d tensors under %s names; the head is random", path, len(backbone), source)


def check_publishable(model: ArtifactClassifier) -> None:
    """Raise UserError unless the published format fits the model: EfficientNet-B0 with heads for 4 or 6 `LABELS`."""
    if model.arch.split(".")[0] != TIMM_ARCH and model.arch != PUBLISHED_ARCH:
        advice = f"give --arch={TIMM_ARCH} or leave out --save_published"
        raise UserError(f"--arch is {model.arch!r}, but a published file holds EfficientNet-B0; {advice}")
    if model.labels not in (LABELS[:4], LABELS):
        raise UserError(f"labels are {model.labels}; a published file has heads for {LABELS[:4]} or {LABELS}")


def save_published(
    model: ArtifactClassifier, path: str | Path, epoch: int, val_loss: float, val_accuracy: float
) -> None:
    """Write the model in the published format, atomically. Raises UserError as `check_publishable` does.

    It has torchvision's names under "model." and a new AdamW's state; `load_classifier` assumes 512 pixels and 0.5.
    """
    check_publishable(model)
    names = {} if model.arch == PUBLISHED_ARCH else torchvision_names()
    state = {f"model.{names.get(name, name)}": value.cpu() for name, value in model.model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4).state_dict()
    payload = {"epoch": epoch, "model_state_dict": state, "optimizer_state_dict": optimizer}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(payload | {"val_loss": val_loss, "val_accuracy": val_accuracy}, file)

"""Initial weights of a classifier (ImageNet's, those of a file, or random), and the published file format.

EfficientNet-B0 has two sets of tensor names: timm's, and torchvision's, in which the published classifiers are written.
Both build the same network: equal kernels, strides, paddings and groups, SiLU, squeeze-excitation, and batch norms with
eps 1e-5 and momentum 0.1. In eval mode the same tensors give the same logits under either name. Training differs:
torchvision drops whole residual branches (stochastic depth up to 0.2), timm does not by default.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

logger = logging.getLogger(__name__)
TORCHVISION_FILE = "efficientnet_b0_rwightman-7f5810bc.pth"  # https://download.pytorch.org/models/
TIMM_ARCH = "efficientnet_b0"
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # per stage; those of the first stage have no expansion
_FIRST_STAGE = {
    "conv_dw": "0.0",
    "bn1": "0.1",
    "se.conv_reduce": "1.fc1",
    "se.conv_expand": "1.fc2",
    "conv_pw": "2.0",
    "bn2": "2.1",
}
_LATER_STAGES = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "se.conv_reduce": "2.fc1",
    "se.conv_expand": "2.fc2",
    "conv_pwl": "3.0",
    "bn3": "3.1",
}
# timm's module -> torchvision's, for every module with tensors
TORCHVISION_MODULES = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    **{
        f"blocks.{stage}.{block}.{ours}": f"features.{stage + 1}.{block}.block.{theirs}"
        for stage, blocks in enumerate(_BLOCKS)
        for block in range(blocks)
        for ours, theirs in (_LATER_STAGES if stage else _FIRST_STAGE).items()
    },
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}
TIMM_MODULES = {theirs: ours for ours, theirs in TORCHVISION_MODULES.items()}


def new_classifier(labels: tuple[str, ...], image_size: int, arch: str, weights: str) -> ArtifactClassifier:
    """Return a classifier with a random head and a backbone of `weights`: "imagenet", "none" or the path of a file.

    Raises UserError as `load_backbone` does, and if the ImageNet weights are neither cached nor reachable.
    """
    if weights not in ("imagenet", "none") and not resolve(weights).is_file():
        raise UserError(f"weights are {weights!r}; allowed are imagenet, none and the path of a file")
    try:
        model = ArtifactClassifier(labels, image_size, arch, pretrained=weights == "imagenet")
    except (OSError, RuntimeError, UnpicklingError) as error:
        sources = [f"torchvision's {TORCHVISION_FILE}"] if arch.split(".")[0] in (TIMM_ARCH, PUBLISHED_ARCH) else []
        if arch != PUBLISHED_ARCH:
            sources.insert(0, f"{timm.get_pretrained_cfg(arch).hf_hub_id} from the Hugging Face hub")
        raise UserError(
            f"ImageNet weights of {arch!r} cannot be loaded ({type(error).__name__}); give --weights=none for random "
            f"ones, or --weights=PATH of {' or '.join(sources)}, fetched on a machine with a network"
        ) from error
    if weights not in ("imagenet", "none"):
        load_backbone(model, weights)
    return model


def load_backbone(model: ArtifactClassifier, path: str | Path) -> None:
    """Load all weights but the head's from a file: timm's, torchvision's, or a classifier of this project.

    Raises UserError for a file that does not fit the architecture, and as `read_tensors` does.
    """
    path = resolve(path)
    state, _ = read_tensors(path)
    if state and all(name.startswith("model.") for name in state):  # a classifier of ours, or a published one
        state = {name.removeprefix("model."): value for name, value in state.items()}
    from_torchvision = "features.0.0.weight" in state
    if from_torchvision != (model.arch == PUBLISHED_ARCH):
        state = rename_modules(state, TIMM_MODULES if from_torchvision else TORCHVISION_MODULES)

    names = "classifier" if model.arch == PUBLISHED_ARCH else model.model.pretrained_cfg["classifier"]
    head = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    target = {name: value for name, value in model.model.state_dict().items() if not name.startswith(head)}
    backbone = {name: value for name, value in state.items() if not name.startswith(head)}
    # older files lack the counters of batch norm, which nothing here uses
    missing = [name for name in target if name not in backbone and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in backbone if name not in target]
    reshaped = [name for name in backbone if name in target and backbone[name].shape != target[name].shape]
    if wrong := missing + unexpected + reshaped:
        raise UserError(
            f"{str(path)!r} does not fit {model.arch!r}: {len(missing)} weights are missing, {len(unexpected)} "
            f"unexpected and {len(reshaped)} of another shape, the first {wrong[0]!r}; give a file of that "
            "architecture, or the file's --arch"
        )
    model.model.load_state_dict(backbone, strict=False)
    source = "torchvision's" if from_torchvision else "timm's"
    logger.info("backbone from %s: %d tensors under %s names; the head starts fresh", path, len(backbone), source)


def rename_modules(state: Mapping[str, torch.Tensor], modules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return a state dict with modules renamed; tensors are shared, and unknown modules keep their names."""
    split = {name: name.rpartition(".") for name in state}
    return {f"{modules.get(module, module)}.{leaf}": state[name] for name, (module, _, leaf) in split.items()}


def check_publishable(model: ArtifactClassifier) -> None:
    """Raise UserError unless the published form can hold the model: EfficientNet-B0 with heads for 4 or 6 `LABELS`."""
    if model.arch.split(".")[0] != TIMM_ARCH and model.arch != PUBLISHED_ARCH:
        raise UserError(
            f"--arch is {model.arch!r}, but a published file holds EfficientNet-B0; give --arch={TIMM_ARCH} or leave "
            "out --save_published"
        )
    if model.labels not in (LABELS[:4], LABELS):
        raise UserError(f"labels are {model.labels}; a published file has heads for {LABELS[:4]} or {LABELS}")


def save_published(
    model: ArtifactClassifier, path: str | Path, epoch: int, val_loss: float, val_accuracy: float
) -> None:
    """Write the model in the published form, atomically.

    A dict with epoch, model_state_dict (torchvision's names under "model."), optimizer_state_dict (of a fresh AdamW),
    val_loss and val_accuracy. The form states neither image size nor thresholds: `load_classifier` assumes 512 pixels
    and 0.5. Raises UserError as `check_publishable` does.
    """
    check_publishable(model)
    state = {name: value.detach().cpu() for name, value in model.model.state_dict().items()}
    if model.arch != PUBLISHED_ARCH:
        state = rename_modules(state, TORCHVISION_MODULES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    payload = {
        "epoch": int(epoch),
        "model_state_dict": {f"model.{name}": value for name, value in state.items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "val_loss": float(val_loss),
        "val_accuracy": float(val_accuracy),
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(payload, file)

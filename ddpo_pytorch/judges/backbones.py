"""What a classifier's training starts from: ImageNet weights, the backbone of a file, or nothing."""

import logging
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch

from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier
from ddpo_pytorch.judges.torchvision_names import TIMM_ARCH, TORCHVISION_MODULES
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

logger = logging.getLogger(__name__)
TORCHVISION_FILE = "efficientnet_b0_rwightman-7f5810bc.pth"  # https://download.pytorch.org/models/


def new_classifier(labels: tuple[str, ...], image_size: int, arch: str, weights: str) -> ArtifactClassifier:
    """A classifier whose backbone has `weights`: "imagenet" (fetched, or from the cache), "none" or a file's path.

    The head is random in any case. Raises UserError as `load_backbone` does, and where the ImageNet weights cannot be
    had.
    """
    if weights not in ("imagenet", "none") and not resolve(weights).is_file():
        raise UserError(f"weights are {weights!r}; allowed are imagenet, none and the path of a file")
    try:
        model = ArtifactClassifier(labels, image_size, arch, pretrained=weights == "imagenet")
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"ImageNet weights of {arch!r} cannot be loaded ({type(error).__name__}); give --weights=none for random "
            f"ones or --weights=PATH of a file: {_sources(arch)}, fetched on a machine with a network"
        ) from error
    if weights not in ("imagenet", "none"):
        load_backbone(model, weights)
    return model


def load_backbone(model: ArtifactClassifier, path: str | Path) -> None:
    """Load all but the head from a file: timm's or torchvision's of the architecture, or a classifier of this project.

    The head may have any size and is left out. Raises UserError for a file that does not fit the architecture, and as
    `read_tensors` does.
    """
    path = resolve(path)
    state, _ = read_tensors(path)
    if state and all(name.startswith("model.") for name in state):  # a classifier of ours, or a published one
        state = {name.removeprefix("model."): value for name, value in state.items()}
    from_torchvision = "features.0.0.weight" in state
    if from_torchvision and model.arch != PUBLISHED_ARCH:
        state = _renamed(state, {theirs: ours for ours, theirs in TORCHVISION_MODULES.items()})
    elif not from_torchvision and model.arch == PUBLISHED_ARCH:
        state = _renamed(state, TORCHVISION_MODULES)
    head = _head(model)
    target = {name: value for name, value in model.model.state_dict().items() if not name.startswith(head)}
    found = {name: value for name, value in state.items() if not name.startswith(head)}
    # older files lack the counters of batch norm, which nothing here uses
    missing = [name for name in target if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in target]
    other = [name for name in found if name in target and found[name].shape != target[name].shape]
    if missing or unexpected or other:
        raise UserError(
            f"{str(path)!r} does not fit {model.arch!r}: of its weights {len(missing)} are missing, {len(unexpected)} "
            f"unexpected and {len(other)} of another shape, the first {(missing + unexpected + other)[0]!r}; give a "
            "file of that architecture, or the file's --arch"
        )
    model.model.load_state_dict(found, strict=False)
    logger.info(
        "backbone from %s: %d tensors under %s names; its head is left out (%d tensors), the new one starts fresh",
        *(path, len(found), "torchvision's" if from_torchvision else "timm's", len(state) - len(found)),
    )


def _renamed(state: dict[str, torch.Tensor], modules: dict[str, str]) -> dict[str, torch.Tensor]:
    """With other names of modules; those without one keep theirs and are found out when the names are compared."""
    split = {name: name.rpartition(".") for name in state}
    return {f"{modules.get(module, module)}.{leaf}": state[name] for name, (module, _, leaf) in split.items()}


def _head(model: ArtifactClassifier) -> tuple[str, ...]:
    """What the names of the head's tensors begin with."""
    names = "classifier" if model.arch == PUBLISHED_ARCH else model.model.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _sources(arch: str) -> str:
    """Where a file with the ImageNet weights of an architecture can be had."""
    torchvision = f"torchvision's {TORCHVISION_FILE}"
    if arch == PUBLISHED_ARCH:
        return torchvision
    hub = f"{timm.get_pretrained_cfg(arch).hf_hub_id} from the Hugging Face hub"
    return f"{hub} or {torchvision}" if arch.split(".")[0] == TIMM_ARCH else hub

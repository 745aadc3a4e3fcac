"""EfficientNet-B0 under two sets of names: timm's and torchvision's, in which the published classifiers are written.

Both build the same network: equal kernels, strides, paddings and groups, SiLU, squeeze-excitation, and batch norms with
eps 1e-5 and momentum 0.1. In eval mode the same tensors give the same logits under either name. Training differs:
torchvision drops whole residual branches (stochastic depth up to 0.2), timm does not unless asked to.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write

TIMM_ARCH = "efficientnet_b0"
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # in each stage; those of the first stage have no expansion
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
# torchvision's module by timm's; every module that has tensors.
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
_TIMM_MODULES = {theirs: ours for ours, theirs in TORCHVISION_MODULES.items()}


def to_torchvision(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of timm's efficientnet_b0 under torchvision's names. The tensors are shared, not copied.

    Raises UserError if a module is missing or unknown.
    """
    return _renamed(state, TORCHVISION_MODULES, "timm")


def to_timm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's efficientnet_b0 under timm's names, the inverse of `to_torchvision`."""
    return _renamed(state, _TIMM_MODULES, "torchvision")


def check_publishable(model: ArtifactClassifier) -> None:
    """Raise UserError unless the published form can hold the model: EfficientNet-B0 with heads for 4 or 6 `LABELS`."""
    if model.arch.split(".")[0] != TIMM_ARCH and model.arch != PUBLISHED_ARCH:
        raise UserError(
            f"a published file holds EfficientNet-B0 and no {model.arch!r}; take --arch={TIMM_ARCH} or leave out "
            "--save_published"
        )
    if model.labels not in (LABELS[:4], LABELS):
        raise UserError(f"a published file has heads for {LABELS[:4]} or {LABELS}, not for {model.labels}")


def save_published(
    model: ArtifactClassifier, path: str | Path, epoch: int, val_loss: float, val_accuracy: float
) -> None:
    """Write the model in the published form; the file appears whole or not at all.

    A dict with epoch, model_state_dict (torchvision's names under "model."), optimizer_state_dict (of an AdamW that has
    made no step), val_loss and val_accuracy. The form states neither image size nor thresholds: `load_classifier` takes
    512 pixels and 0.5. Raises UserError as `check_publishable` does.
    """
    check_publishable(model)
    state = {name: value.detach().cpu() for name, value in model.model.state_dict().items()}
    if model.arch != PUBLISHED_ARCH:
        state = to_torchvision(state)
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


def _renamed(state: Mapping[str, torch.Tensor], modules: Mapping[str, str], source: str) -> dict[str, torch.Tensor]:
    split = {key: key.rpartition(".") for key in state}
    wrong = sorted({module for module, _, _ in split.values()} ^ modules.keys())
    if wrong:
        what = "unknown" if wrong[0] not in modules else "missing"
        raise UserError(f"not a state dict of {source}'s EfficientNet-B0: {len(wrong)} modules, {wrong[0]!r} {what}")
    return {f"{modules[module]}.{leaf}": state[key] for key, (module, _, leaf) in split.items()}

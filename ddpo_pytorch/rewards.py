"""Reward functions, chosen by name: `reward_fn` and `reward_fn_kwargs` of a configuration.

A factory returns `fn(images, prompts, metadata) -> (rewards, info)`: images (B, 3, H, W) float in [0, 1], which a
reward never modifies; prompts, B strings; metadata, B dicts of the prompt function; rewards, B floats; info, a dict of
further per-image values. To add one, write a factory and enter it in `REWARDS`.
"""

import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpo_pytorch.data.images import to_pil
from ddpo_pytorch.data.isic import LABELS, labels_of
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier
from ddpo_pytorch.judges.policy import load_judges

RewardFn = Callable[[torch.Tensor, Sequence[str], Sequence[Mapping[str, Any]]], tuple[np.ndarray, dict[str, Any]]]
JPEG_QUALITY = 95


def jpeg_incompressibility() -> RewardFn:
    """Size in kB (1000 bytes) of the image as JPEG of quality 95."""

    def reward(images, prompts, metadata):
        return np.array([_jpeg_bytes(image) / 1000 for image in images], dtype=np.float64), {}

    return reward


def jpeg_compressibility() -> RewardFn:
    """Minus the size in kB of the image as JPEG of quality 95."""
    size = jpeg_incompressibility()

    def reward(images, prompts, metadata):
        return -size(images, prompts, metadata)[0], {}

    return reward


def isic_classifier_reward(classifier: str | Path | ArtifactClassifier, device: str | torch.device = "cpu") -> RewardFn:
    """Share of the classifier's attributes that it predicts as the prompt states: 0, 1/H, ..., 1.

    The stated attributes come from metadata["label"], or from the prompt where metadata has none (then it must be one
    of the ISIC captions, else UserError). info: predictions and labels, (B, H) integers, and logits, (B, H) float32, in
    the order of `classifier.labels`. `classifier` is a model or the path of one.
    """
    model = classifier if isinstance(classifier, ArtifactClassifier) else load_classifier(classifier, device)
    model = model.to(device).eval()
    columns = [LABELS.index(name) for name in model.labels]

    def reward(images, prompts, metadata):
        stated = [_labels(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
        labels = np.array(stated, dtype=np.int64)[:, columns]
        logits = model.logits(images).float().cpu().numpy()
        predictions = (logits > 0).astype(np.int64)  # as ArtifactClassifier.predict
        about = {"predictions": predictions, "labels": labels, "logits": logits}
        return (predictions == labels).mean(axis=1), about

    return reward


def fundus_alignment(judges: str | Path, device: str | torch.device = "cpu") -> RewardFn:
    """[selector >= tau] * policy, in [0, 1]: what the Selector rejects earns nothing, the rest the Policy's score.

    `judges` is a folder that train_rlhf.py wrote; tau is the Selector's own threshold. info: both scores (B,).
    """
    selector, policy = load_judges(judges, device)

    def reward(images, prompts, metadata):
        quality = selector.score(images).double().cpu().numpy()
        alignment = policy.score(images, prompts).double().cpu().numpy()
        return (quality >= selector.threshold) * alignment, {"selector": quality, "policy": alignment}

    return reward


REWARDS: dict[str, Callable[..., RewardFn]] = {
    "fundus_alignment": fundus_alignment,
    "isic_classifier_reward": isic_classifier_reward,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}


def build_reward(
    spec: str, kwargs_by_name: Mapping[str, Mapping[str, Any]] | None = None, device: str | torch.device = "cpu"
) -> RewardFn:
    """The reward that `spec` names: "a", or a weighted sum such as "a:0.7,b:0.3" (weight 1 where none is given).

    `kwargs_by_name` holds each factory's keyword arguments; entries of rewards that `spec` does not name are ignored.
    info of one unweighted reward is its own; info of a sum holds every part's unweighted rewards under its name and the
    part's own info under "<name>/<key>". Raises UserError for an unknown or repeated name, a weight that is not a
    finite number, or keyword arguments that do not fit.
    """
    weights = parse_spec(spec)
    kwargs_by_name = kwargs_by_name or {}
    parts = {name: _build(name, kwargs_by_name.get(name, {}), device) for name in weights}
    if list(weights.values()) == [1.0]:
        return next(iter(parts.values()))

    def reward(images, prompts, metadata):
        total, info = np.zeros(len(prompts)), {}
        for name, part in parts.items():
            info[name], details = part(images, prompts, metadata)
            info |= {f"{name}/{key}": value for key, value in details.items()}
            total += weights[name] * info[name]
        return total, info

    return reward


def check_prompts(reward_fn: RewardFn, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Score a black image for each (prompt, metadata): what the reward cannot judge is told before anything is drawn.

    Raises what the reward raises, UserError for a prompt that it does not understand.
    """
    for start in range(0, len(prompts), 32):
        texts, about = zip(*prompts[start : start + 32], strict=True)
        reward_fn(torch.zeros(len(texts), 3, 64, 64), list(texts), list(about))


def parse_spec(spec: str) -> dict[str, float]:
    """Weights by reward name of "a" or "a:0.7,b:0.3", in order. Raises UserError (see `build_reward`)."""
    weights: dict[str, float] = {}
    for part in spec.split(","):
        name, _, text = (piece.strip() for piece in part.partition(":"))
        if name not in REWARDS:
            raise UserError(
                f"reward {name!r} (in reward_fn={spec!r}) is unknown; ddpo_pytorch/rewards.py has "
                f"{', '.join(sorted(REWARDS))}"
            )
        if name in weights:
            raise UserError(f"reward {name!r} appears twice in reward_fn={spec!r}; add up its weights instead")
        weights[name] = _weight(text, spec) if ":" in part else 1.0
    return weights


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"weight {text!r} in reward_fn={spec!r} is not a number; write name:weight")
    return weight


def _build(name: str, kwargs: Mapping[str, Any], device: str | torch.device) -> RewardFn:
    factory = REWARDS[name]
    accepted = inspect.signature(factory).parameters
    kwargs = dict(kwargs)
    if "device" in accepted:
        kwargs.setdefault("device", device)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise UserError(
            f"reward_fn_kwargs.{name} has {sorted(kwargs)} but {name} takes {sorted(accepted)} ({error})"
        ) from error
    return factory(**kwargs)


def _jpeg_bytes(image: torch.Tensor) -> int:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


def _labels(prompt: str, about: Mapping[str, Any]) -> Sequence[int]:
    return about["label"] if "label" in about else labels_of(prompt)

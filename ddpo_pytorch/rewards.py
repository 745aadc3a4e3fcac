"""Reward functions, selected by `reward_fn` and `reward_fn_kwargs` of a configuration.

A factory returns `fn(images, prompts, metadata) -> (rewards, info)`: images (B, 3, H, W) float in [0, 1], not to be
modified; prompts, B strings; metadata, B dicts from the prompt function; rewards, B finite numbers as a list, array or
tensor (`check_result`); info, a dict of further per-image values. To use your own factory, set
`reward_fn="my_module:my_reward"` and `reward_fn_kwargs.my_reward`, or register it in `REWARDS`.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpo_pytorch.data.images import to_pil
from ddpo_pytorch.data.isic import LABELS, labels_of
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier
from ddpo_pytorch.judges.policy import load_judges
from ddpo_pytorch.prompts import Prompt
from ddpo_pytorch.utils.cli import import_function, signature_of
from ddpo_pytorch.utils.errors import UserError, describe_value

Device = str | torch.device
Metadata = Sequence[Mapping[str, Any]]  # of each prompt
RewardFn = Callable[[torch.Tensor, Sequence[str], Metadata], tuple[np.ndarray, dict[str, Any]]]


def jpeg_incompressibility() -> RewardFn:
    """Reward the size in kB (1000 bytes) of the image as a JPEG of quality 95."""

    def size(image: torch.Tensor) -> float:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000

    return lambda images, prompts, metadata: (np.array([size(image) for image in images]), {})


def jpeg_compressibility() -> RewardFn:
    """Reward minus the size in kB of the image as a JPEG of quality 95."""
    size = jpeg_incompressibility()
    return lambda images, prompts, metadata: (-size(images, prompts, metadata)[0], {})


def isic_classifier_reward(classifier: str | Path | ArtifactClassifier, device: Device = "cpu") -> RewardFn:
    """Reward the share of the classifier's H attributes that it predicts as the prompt states: 0, 1/H, ..., 1.

    The stated attributes are metadata["label"], 0 or 1 for each of LABELS, or those of the prompt, an ISIC caption.
    info: predictions, labels and logits (B, H), in the order of `classifier.labels`. `classifier` is a model or the
    path of one. Raises UserError for other metadata or prompts, and for a classifier of labels other than ISIC's.
    """
    model = classifier if isinstance(classifier, ArtifactClassifier) else load_classifier(classifier, device)
    model = model.to(device).eval()
    if not set(model.labels) <= set(LABELS):
        given, allowed = ", ".join(model.labels), ", ".join(LABELS)
        advice = "give another classifier, or a reward of your own"
        raise UserError(f"the classifier predicts {given}; allowed are {allowed}: {advice}")
    columns = [LABELS.index(name) for name in model.labels]

    def reward(images, prompts, metadata):
        stated = []
        for prompt, one in zip(prompts, metadata, strict=True):
            values = _as_array(one["label"] if "label" in one else labels_of(prompt))
            if values is None or values.shape != (len(LABELS),) or not np.isin(values, (0, 1)).all():
                wanted = f"{len(LABELS)} numbers, 0 or 1, for {', '.join(LABELS)}: change the prompt function"
                raise UserError(f"metadata['label'] of a prompt is {one['label']!r}; it must be {wanted}")
            stated.append(values)
        labels = np.array(stated, dtype=np.int64)[:, columns]
        logits = model.logits(images).float().cpu().numpy()
        predictions = (logits > 0).astype(np.int64)  # as ArtifactClassifier.predict
        info = {"predictions": predictions, "labels": labels, "logits": logits}
        return (predictions == labels).mean(axis=1), info

    return reward


def fundus_alignment(judges: str | Path, device: Device = "cpu") -> RewardFn:
    """Reward [selector >= tau] * policy, in [0, 1]: the Policy's score of images that the Selector accepts.

    `judges` is a folder written by train_rlhf.py; tau is the Selector's own threshold. info: both scores (B,).
    """
    selector, policy = load_judges(judges, device)

    def reward(images, prompts, metadata):
        scores = selector.score(images)
        passed, quality = selector.accepts(scores).cpu().numpy(), scores.double().cpu().numpy()
        alignment = policy.score(images, prompts).double().cpu().numpy()
        return passed * alignment, {"selector": quality, "policy": alignment}

    return reward


_FACTORIES = (fundus_alignment, isic_classifier_reward, jpeg_compressibility, jpeg_incompressibility)
REWARDS: dict[str, Callable[..., RewardFn]] = {factory.__name__: factory for factory in _FACTORIES}


class Reward:
    """A reward, or a weighted sum of rewards, whose results are validated by `check_result`.

    Calling it with a batch returns rewards (B,) float64 and info. A single reward (weights None) keeps its own info. A
    sum's info holds the unweighted rewards of its `parts` by name, and the info of each part as "<name>/<key>".
    A UserError is passed on; any other exception becomes a RuntimeError that names the reward and the prompts.
    """

    def __init__(self, functions: Mapping[str, RewardFn], weights: Mapping[str, float] | None = None):
        self._functions, self._weights = dict(functions), weights
        self.parts = () if weights is None else tuple(functions)

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[np.ndarray, dict[str, Any]]:
        total, info = np.zeros(len(prompts)), {}
        for name, function in self._functions.items():
            try:
                result = function(images, prompts, metadata)
            except UserError:
                raise
            except Exception as error:
                texts = ", ".join(map(repr, dict.fromkeys(prompts)))
                raise RuntimeError(f"reward {name!r} failed on images of {texts}") from error
            rewards, details = check_result(name, result, prompts)
            if self._weights is None:
                return rewards, details
            info |= {name: rewards} | {f"{name}/{key}": value for key, value in details.items()}
            total += self._weights[name] * rewards
        return check_result(" + ".join(self.parts), (total, info), prompts)


def as_reward(function: RewardFn) -> Reward:
    """Wrap `function` in a `Reward`, which validates its results, unless it is one."""
    name = getattr(function, "__name__", type(function).__name__)
    return function if isinstance(function, Reward) else Reward({name: function})


class Scorer:
    """Scores batches of images while the next ones are sampled.

    On a GPU, scoring runs in its own thread and CUDA stream, concurrently with the denoising of the next batch. On a
    CPU, where the two would compete for the same cores, a batch is scored when it is submitted.
    """

    def __init__(self, reward_fn: RewardFn, device: torch.device):
        self.reward_fn, self._thread = as_reward(reward_fn), None
        if device.type == "cuda":  # threads start on GPU 0, where every rank would create a context
            index = torch.cuda.current_device() if device.index is None else device.index
            self._thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(index,))
            self._stream = torch.cuda.Stream(index)
        self._scores: list[Future[np.ndarray]] = []

    def submit(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        metadata: Metadata,
        check: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    ) -> None:
        """Queue `check(images)`, (B, 3, H, W) float32 in [0, 1], for scoring. Raises errors of earlier batches.

        `check` runs in the scoring thread, so that the calling thread does not wait for the GPU.
        """
        for earlier in self._scores:
            if earlier.done():
                earlier.result()
        if self._thread:
            ready = torch.cuda.current_stream(images.device).record_event()
            score = self._thread.submit(self._score_on_stream, ready, images, prompts, metadata, check)
        else:
            score = Future()
            score.set_result(self._score(images, prompts, metadata, check))
        self._scores.append(score)

    def collect(self) -> np.ndarray:
        """Return the scores of the N images since the last call, in order of submission. Raises as `Reward` does.

        (N, 1 + P) float64: the reward, then the unweighted rewards of the P parts of a weighted sum.
        """
        pending, self._scores = self._scores, []
        return np.concatenate([one.result() for one in pending])

    def close(self) -> None:
        """Stop the thread and drop queued batches."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def _score_on_stream(self, ready: torch.cuda.Event, images: torch.Tensor, *batch: Any) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            images.record_stream(self._stream)  # keeps the memory from being reused too early
            return self._score(images, *batch)

    def _score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Metadata, check: Callable) -> np.ndarray:
        rewards, info = self.reward_fn(check(images), prompts, metadata)
        return np.stack([rewards, *(info[name] for name in self.reward_fn.parts)], axis=1)


def build_reward(
    spec: str, kwargs_by_name: Mapping[str, Mapping[str, Any]] | None = None, device: Device = "cpu"
) -> Reward:
    """Build the reward of a specification: "a", or a weighted sum such as "a:0.7,b:0.3" (weight 1 by default).

    `kwargs_by_name` holds each factory's keyword arguments; those of registered rewards that are not in `spec` are
    ignored. Raises UserError for an invalid specification, argument or factory.
    """
    parts = parse_spec(spec)
    kwargs_by_name = kwargs_by_name or {}
    for name, given in kwargs_by_name.items():
        if name not in REWARDS and name not in parts:
            raise UserError(f"reward_fn_kwargs.{name} belongs to no reward; {_known()}")
        if not isinstance(given, Mapping):
            raise UserError(f"reward_fn_kwargs.{name} is {given!r}; give arguments, reward_fn_kwargs.{name}.NAME=VALUE")
    functions = {}
    for name, part in parts.items():
        factory = import_function(part.path, "reward_fn") if part.path else REWARDS[name]
        signature = signature_of(factory)
        accepted = sorted(signature.parameters)
        kwargs = ({"device": device} if "device" in accepted else {}) | dict(kwargs_by_name.get(name, {}))
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            fault = f"reward_fn_kwargs.{name} has {sorted(kwargs)} but {name} takes {accepted} ({error})"
            if {"images", "prompts"} <= {*accepted} - {*kwargs}:
                fault = f"{name!r} takes {accepted}, so it is a reward; name a function that returns it (README)"
            raise UserError(fault) from error
        function = functions[name] = factory(**kwargs)
        if not callable(function):
            made = describe_value(function)
            raise UserError(f"reward {name!r} returned {made}; it must return a function of a batch")
    weights = {name: part.weight for name, part in parts.items()}
    return Reward(functions, None if list(weights.values()) == [1.0] else weights)


def check_result(name: str, result: Any, prompts: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Validate a reward function's result for B prompts; return rewards (B,) float64 and info.

    Rewards may be a list or tuple of B numbers, or an array or tensor of shape (B,) or (B, 1), of integers, booleans or
    floats, on any device. Raises UserError for anything else, and for a value that is not finite.
    """
    count, where = len(prompts), f"for {len(prompts)} images; it must return"
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[1], Mapping):
        wanted = "a pair of rewards and a dict, as in `return rewards, {}`"
        raise UserError(f"reward {name!r} returned {describe_value(result)} {where} {wanted}")
    rewards, info = result
    values = _as_array(rewards)
    if values is None or values.shape not in ((count,), (count, 1)):
        wanted = f"{count} real numbers, one for each image: a list, an array or a tensor of shape ({count},)"
        raise UserError(f"reward {name!r} returned {describe_value(rewards)} {where} {wanted}")
    values = values.reshape(count)
    for prompt, value in zip(prompts, values, strict=True):
        if not np.isfinite(value):
            raise UserError(f"the reward {name!r} of an image of {prompt!r} is {value}; rewards must be finite numbers")
    return values, dict(info)


def _as_array(rewards: Any) -> np.ndarray | None:
    """Convert real numbers to a float64 array of the same shape; return None for anything else."""

    def on_host(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16

    try:
        array = np.asarray([on_host(one) for one in rewards] if isinstance(rewards, tuple | list) else on_host(rewards))
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that are not plain arrays
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None


def check_prompts(
    reward_fn: RewardFn,
    prompts: Sequence[Prompt],
    device: Device = "cpu",
    batch_size: int = 32,
    size: tuple[int, int] = (64, 64),
) -> None:
    """Try a reward on an image of noise on `device` for each (prompt, metadata), before anything is sampled.

    Images are of `size` (height, width), like those to come, since a reward may fit no other. Every call has at least
    two, to catch a reward that returns one value per batch. Raises as `Reward` does, and UserError for a prompt that
    the reward does not understand.
    """
    reward_fn, generator = as_reward(reward_fn), torch.Generator().manual_seed(0)
    noise = torch.rand((max(2, batch_size), 3, *size), generator=generator).to(device)
    for start in range(0, len(prompts), len(noise)):
        tried = prompts[start : start + len(noise)]
        texts, metadata = zip(*(tried if len(tried) > 1 else [*tried, *tried]), strict=True)
        reward_fn(noise[: len(texts)].clone(), list(texts), list(metadata))


class Part(NamedTuple):
    """A reward in a specification: its weight, and "module:factory" if it is not registered."""

    weight: float
    path: str = ""


def parse_spec(spec: str) -> dict[str, Part]:
    """Parse "a", or a sum such as "a:0.7,b:0.3" (weight 1 by default), into rewards by name, in order.

    Each name may be "module:factory". Raises UserError for an unknown or repeated name, and for an invalid weight.
    """
    parts: dict[str, Part] = {}
    for piece in spec.split(","):
        name, colon, last = (text.strip() for text in piece.rpartition(":"))
        try:
            weight = float(last)
        except ValueError:
            weight = math.nan
        if not colon or (not math.isfinite(weight) and ":" not in name and name not in REWARDS):
            name, weight = piece.strip(), 1.0  # no weight; the colon, if any, is that of module:factory
        path, name = (name, name.rpartition(":")[2]) if ":" in name else ("", name)
        if not path and name not in REWARDS:
            raise UserError(f"reward {name!r} (in reward_fn={spec!r}) is unknown; {_known()}")
        if not math.isfinite(weight):
            raise UserError(f"weight {last!r} in reward_fn={spec!r} is not a finite number; write name:weight")
        if name in parts:
            advice = "add up its weights instead" if parts[name].path == path else "rename one of the functions"
            raise UserError(f"reward {name!r} appears twice in reward_fn={spec!r}; {advice}")
        parts[name] = Part(weight, path)
    if not any(part.weight for part in parts.values()):
        raise UserError(f"all weights in reward_fn={spec!r} are 0, so there is nothing to learn; change one of them")
    return parts


def _known() -> str:
    return f"REWARDS in ddpo_pytorch/rewards.py has {', '.join(sorted(REWARDS))}; or give module:factory"

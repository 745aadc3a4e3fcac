"""All measures of one folder, of a model that is one or several folders, and of two models against each other."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.files import whole
from ddpo_pytorch.metrics.intervals import (
    Quantity,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_unpaired_difference,
    mcnemar,
    over_runs,
    sign_permutation_p,
)
from ddpo_pytorch.metrics.measure import (
    Neighbours,
    Side,
    aligned_images,
    alignment,
    copies,
    diversity,
    fidelity,
    memorised,
    neighbours,
    pixels,
)
from ddpo_pytorch.metrics.store import count_identical

# settings of eval.py that may differ between two folders of which one is compared with the other
OWN_SETTINGS = ("weights_sha256", "prompts", "classifier")


@dataclass
class Context:
    """What the folders of a report are measured against. Judges map names to labels, the first one judges APR."""

    judges: Mapping[str, tuple[str, ...]]
    extractors: Sequence[str]
    real: Side | None
    train: Side | None
    per_group: int
    seed: int
    baselines: dict[str, Neighbours] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.real is not None and self.train is not None:
            self.baselines = {name: neighbours(name, self.real, self.train) for name in self.extractors}

    def unseen(self, extractor: str) -> Neighbours | None:
        """The real images' neighbours: the measure of near. Copies of training images among them would spoil it."""
        own = self.baselines.get(extractor)
        return None if own is None else own.where(~copies(self.real, self.train))


@dataclass
class Folder:
    """One measured folder: its part of metrics.json, and what is known of each image (arrays of length N)."""

    side: Side
    result: dict
    aligned: np.ndarray
    columns: dict[str, Sequence]


def set_facts(side: Side) -> dict:
    """What metrics.json states about a set of images."""
    facts = pixels(side)
    black = int((facts[:, 0] < 2).sum())
    return side.images.about() | {"identical_images": count_identical(facts), "black_images": black}


def measure_folder(side: Side, lpips: Mapping, parts: tuple[np.ndarray, np.ndarray] | None, context: Context) -> Folder:
    """Every measure that the context allows.

    `lpips` holds under "real" and "within" pairs (P, 2) of indices, of which the first is into this set, and their
    distances (P,). `parts` are the indices of real and of own images that have the same prompt mix.
    """
    seed, captions = context.seed, side.images.captions
    result = {"images": len(captions), "alignment": {}, "perception": {}, "diversity": {}}
    columns: dict[str, Sequence] = {}
    for name, labels in context.judges.items():
        logits = np.concatenate(list(side.rows[name].chunks()))
        result["alignment"][name] = alignment(labels, logits, captions, seed)
        columns |= {f"{name}_{label}": _sigmoid(logits[:, i]) for i, label in enumerate(labels)}
        if name == next(iter(context.judges)):
            stated, seen = aligned_images(labels, logits, captions)
            hits = (stated == seen).all(axis=1)
            result["label_accuracy"] = dict(zip(labels, (stated == seen).mean(axis=0).tolist(), strict=True))
    for name, key in (("real", "LPIPS"), ("within", "LPIPS_within")):
        if name in lpips and len(lpips[name][0]):
            pairs, distances = lpips[name]
            groups = side.groups[pairs[:, 0]]
            result["perception"][key] = bootstrap_mean(distances, groups, seed, resample_groups=True)
            if name == "real":
                means = {CAPTIONS[g]: float(distances[groups == g].mean()) for g in np.unique(groups)}
                result |= {"LPIPS_by_prompt": means, "LPIPS_pairs": len(pairs)}
                columns["lpips"] = _scattered(len(captions), pairs[:, 0], distances)
    for name in context.extractors:
        result["diversity"][name] = diversity(name, side, context.per_group, seed)
    if context.real is not None and parts is not None:
        result["fidelity"] = {n: fidelity(n, context.real, side, *parts, seed) for n in context.extractors}
    if context.train is not None:
        result["memorisation"] = {}
        for name in context.extractors:
            own = context.baselines[name] if side is context.real else neighbours(name, side, context.train)
            result["memorisation"][name] = memorised(side, context.train, own, context.unseen(name), seed)
            if "train_distance" not in columns:
                columns["nearest_train"] = [str(context.train.images.paths[i]) for i in own.indices]
                columns["train_distance"] = own.distances
    return Folder(side, result, hits, columns)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(logits / 2)) / 2  # exp would overflow


def _scattered(count: int, indices: np.ndarray, values: np.ndarray) -> list[float | None]:
    result: list[float | None] = [None] * count
    for index, value in zip(indices, values, strict=True):
        result[index] = float(value)
    return result


def summarise(folders: Sequence[Folder], fid_part: str) -> dict:
    """A model's part of metrics.json: of one folder its own; of several the means, with intervals over folders.

    `fid_part` ("matched" or "unmatched") is the fidelity that the headline takes.
    """
    result = combined([folder.result for folder in folders])
    judge = next(iter(result["alignment"].values()))
    rewards = [reward for folder in folders if (reward := mean_reward(folder)) is not None]
    headline = {
        "APR": judge["APR"].value,
        "FID": _value(result, "fidelity", "inception", fid_part, "FID"),
        "KID": _value(result, "fidelity", "inception", fid_part, "KID"),
        "LPIPS": _value(result, "perception", "LPIPS"),
        "FD_judge": _value(result, "fidelity", "judge", "matched", "FID"),
        "reward": statistics.fmean(rewards) if rewards else None,
        "APR_by_prompt": {caption: quantity.value for caption, quantity in judge["by_prompt"].items()},
    }
    result.setdefault("LPIPS_pairs", 0)
    return headline | result


def _value(result: Mapping, *keys: str) -> float | None:
    for key in keys:
        result = (result or {}).get(key)
    return None if result is None else result.value


def mean_reward(folder: Folder) -> float | None:
    """Mean of the rewards that eval.py logged for the folder's images; None if it had no classifier."""
    entries = (folder.side.images.entry(i) for i in range(len(folder.side.images)))
    rewards = [float(entry["reward"]) for entry in entries if entry.get("reward") is not None]
    return sum(rewards) / len(rewards) if rewards else None


def combined(parts: Sequence):
    """Equal structures as one: numbers averaged, counts added, quantities with an interval over the parts."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        # what one of them lacks, e.g. a caption without images, is left out of its mean
        keys = dict.fromkeys(key for part in parts for key in part or {})
        return {key: combined([part[key] for part in parts if part and key in part]) for key in keys}
    if isinstance(first, Quantity):
        values = [part.value for part in parts if part.value is not None]
        if not values:
            return first
        quantity = over_runs(values)
        return Quantity(quantity.value, quantity.low, quantity.high, sum(part.n for part in parts), quantity.how)
    if isinstance(first, list):
        return sorted((entry for part in parts for entry in part), key=lambda entry: entry["distance"])[: len(first)]
    if isinstance(first, int):
        return sum(parts)
    return None if first is None else statistics.fmean(part for part in parts if part is not None)


def compare(first: Sequence[Folder], second: Sequence[Folder], seed: int) -> dict:
    """APR of one model minus that of another: paired where both were drawn from the same noise, unpaired elsewhere."""
    reasons = [pairing_fault(a.side, b.side) for a, b in zip(first, second, strict=False)]
    if len(first) != len(second):
        reasons.append(f"{len(first)} and {len(second)} folders")
    reason = next(filter(None, reasons), "")
    if reason:
        values = [np.concatenate([folder.aligned for folder in folders]).astype(float) for folders in (first, second)]
        groups = [np.concatenate([folder.side.groups for folder in folders]) for folders in (first, second)]
        quantity = bootstrap_unpaired_difference(values[0], groups[0], values[1], groups[1], seed)
        return {"paired": False, "reason": reason, "pairs": 0, "APR": quantity, "p": None}
    a, b, groups = (np.concatenate(column) for column in zip(*map(_pairs, first, second), strict=True))
    gained, lost, p = mcnemar(a, b)
    return {
        "paired": True,
        "reason": "",
        "pairs": len(a),
        "APR": bootstrap_difference(a.astype(float), b.astype(float), groups, seed),
        "p": p,
        "p_by_prompt": sign_permutation_p(b.astype(float) - a.astype(float), groups, seed),
        "gained": gained,
        "lost": lost,
        "test": "p: McNemar, exact; p_by_prompt: sign flips of the prompts' mean differences",
    }


def pairing_fault(first: Side, second: Side) -> str:
    """Why two folders' images are not pairs from the same noise; "" if they are. Names the first image that differs."""
    a, b = first.images, second.images
    position = {key: index for index, key in enumerate(b.keys)}
    for index, key in enumerate(a.keys):
        if key not in position:
            return f"{a.paths[index]} has no counterpart in {b.folder}"
        seeds = a.entry(index).get("seed"), b.entry(position[key]).get("seed")
        if None in seeds:
            folder = a.folder if seeds[0] is None else b.folder
            return f"{folder}/image_log.json states no seed for {key}"
        if seeds[0] != seeds[1]:
            return f"{a.paths[index]} was drawn from seed {seeds[0]}, {b.paths[position[key]]} from {seeds[1]}"
    return "" if len(a) == len(b) else f"{a.folder} has {len(a)} images, {b.folder} {len(b)}"


def _pairs(first: Folder, second: Folder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = {key: index for index, key in enumerate(second.side.images.keys)}
    order = [position[key] for key in first.side.images.keys]
    return first.aligned, second.aligned[order], first.side.groups


def different_settings(first: Side, second: Side) -> list[str]:
    """Lines for settings of eval.py, other than the model, in which two folders differ."""
    a, b = first.images.made_with, second.images.made_with
    names = [name for name in a if name in b and name not in OWN_SETTINGS and a[name] != b[name]]
    return [
        f"{first.images.folder} was made with {n} {a[n]}, {second.images.folder} with {n} {b[n]}; a difference between "
        "them is not one between their weights alone"
        for n in names
    ]


def write_per_image(path: Path, models: Mapping[str, Sequence[Folder]]) -> None:
    """A CSV with one line an image: model, folder, path, caption, seed, whether aligned, and all its numbers."""
    extra = dict.fromkeys(name for folders in models.values() for folder in folders for name in folder.columns)
    with whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "folder", "path", "caption", "seed", "aligned", *extra])
        for model, folders in models.items():
            for folder in folders:
                images = folder.side.images
                for i, image in enumerate(images.paths):
                    about = [model, images.folder, image.relative_to(images.folder), images.captions[i]]
                    numbers = [folder.columns[name][i] if name in folder.columns else None for name in extra]
                    shown = [f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
                    writer.writerow([*about, images.entry(i).get("seed"), int(folder.aligned[i]), *shown])

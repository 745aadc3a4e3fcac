"""All measures of one folder, and of a model that is one or several folders."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.metrics.feature_store import THUMBNAILS, count_identical
from ddpo_pytorch.metrics.fundus import JUDGES, Structure, fundus_alignment, inception_block, quality, structure
from ddpo_pytorch.metrics.intervals import Quantity, bootstrap_mean, bootstrap_ratio, over_runs
from ddpo_pytorch.metrics.measures import (
    NEAR_COPY,
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


@dataclass
class Context:
    """What the folders of a report are measured against. Judges map names to labels, the first one judges APR.

    Of fundus images there are none of these; `threshold` is the Selector's. `quality`: names of sets of statistics.
    """

    judges: Mapping[str, tuple[str, ...]]
    extractors: Sequence[str]
    real: Side | None
    train: Side | None
    per_group: int
    seed: int
    threshold: float | None = None
    quality: Sequence[str] = ()
    baselines: dict[str, Neighbours] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.real is not None and self.train is not None:
            self.baselines = {name: neighbours(name, self.real, self.train) for name in self.spaces}

    @property
    def key(self) -> str:
        """Name in metrics.json of how well images show their prompts."""
        return "APR" if self.threshold is None else "alignment"

    @property
    def spaces(self) -> list[str]:
        """In which nearness to training images is measured: every extractor, and thumbnails."""
        return [*self.extractors, THUMBNAILS.name]

    def near_copies(self) -> np.ndarray:
        """(N,) bool: real images that are copies or near copies of training images."""
        return copies(self.real, self.train) | (self.baselines[THUMBNAILS.name].distances < NEAR_COPY)

    def unseen(self, space: str) -> Neighbours | None:
        """The real images' neighbours: the measure of near. Copies of training images among them would spoil it."""
        own = self.baselines.get(space)
        return None if own is None else own.where(~self.near_copies())


@dataclass
class Folder:
    """One measured folder: its part of metrics.json, and what is known of each image (arrays of length N).

    `aligned` is 0 or 1, or of fundus images the alignment in [0, 1].
    """

    side: Side
    result: dict
    aligned: np.ndarray
    columns: dict[str, Sequence]


def set_facts(side: Side, context: Context | None = None) -> dict:
    """What metrics.json states about a set of images, and, of a generated one in a context, its copies of real ones."""
    facts = pixels(side)
    black = int((facts[:, 0] < 2).sum())
    about = side.images.about() | {"identical_images": count_identical(facts), "black_images": black}
    for name in ("real", "train"):
        other = getattr(context, name, None)
        if other is not None and other is not side:
            kind = "training" if name == "train" else "real"
            about[f"copies_of_{kind}_images"] = int(copies(side, other).sum())
            near = neighbours(THUMBNAILS.name, side, other).distances < NEAR_COPY
            about[f"near_copies_of_{kind}_images"] = int(near.sum())
    return about


def ceiling(captions: Sequence[str], real: Folder, seed: int) -> tuple[Quantity, float]:
    """The judge's agreement with real images in the mix of these captions, and the share of them that real ones have.

    Every real image weighs as many of the captions as there are for each real image of its caption; the interval
    resamples captions and images.
    """
    wanted, held = Counter(captions), Counter(real.side.images.captions)
    weights = np.array([wanted[c] / held[c] for c in real.side.images.captions])
    covered = sum(wanted[c] for c in held if c in wanted) / len(captions)
    if not weights.any():
        return Quantity.missing("no real image of these captions"), 0.0
    return bootstrap_ratio(weights * real.aligned, weights, real.side.groups, seed), covered


def measure_folder(
    side: Side,
    lpips: Mapping,
    parts: tuple[np.ndarray, np.ndarray] | None,
    context: Context,
    pairwise: Structure | None = None,
) -> Folder:
    """Every measure that the context allows.

    `lpips` holds under "real" and "within" pairs (P, 2) of indices, of which the first is into this set, and their
    distances (P,). `parts` are the indices of real and of own images that have the same prompt mix. `pairwise`: see
    `fundus.Structure`.
    """
    seed, captions = context.seed, side.images.captions
    result = {"images": len(captions), "alignment": {}, "perception": {}, "diversity": {}}
    columns: dict[str, Sequence] = {}
    if context.threshold is not None:
        result["alignment"][JUDGES], hits, columns = fundus_alignment(side, context.threshold, seed)
        result["inception_score"] = inception_block(side, seed)
    if context.quality:
        result["quality"], own = quality(side, context.real, context.quality, seed)
        columns |= own
    if pairwise:
        result["structure"] = structure(side, pairwise, seed)
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
                means = {side.images.vocabulary[g]: float(distances[groups == g].mean()) for g in np.unique(groups)}
                result |= {"LPIPS_by_prompt": means, "LPIPS_pairs": len(pairs)}
                columns["lpips"] = _scattered(len(captions), pairs[:, 0], distances)
    for name in context.extractors:
        result["diversity"][name] = diversity(name, side, context.per_group, seed)
    if context.real is not None and parts is not None:
        result["fidelity"] = {n: fidelity(n, context.real, side, *parts, seed) for n in context.extractors}
    if context.train is not None:
        result["memorisation"] = {}
        for name in context.spaces:
            own = context.baselines[name] if side is context.real else neighbours(name, side, context.train)
            result["memorisation"][name] = memorised(side, context.train, own, context.unseen(name), seed)
            if "train_distance" not in columns:
                columns["nearest_train"] = [str(context.train.images.paths[i]) for i in own.indices]
                columns["train_distance"] = own.distances
        columns["thumbnail_distance"] = own.distances
        columns["copy_of_train"] = copies(side, context.train).astype(int)
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
    key, name = ("APR", "APR") if "APR" in judge else ("alignment", "fundus_alignment")
    rewards = [reward for folder in folders if (reward := mean_reward(folder)) is not None]
    headline = {
        name: judge[key].value,
        "FID": _value(result, "fidelity", "inception", fid_part, "FID"),
        "KID": _value(result, "fidelity", "inception", fid_part, "KID"),
        "LPIPS": _value(result, "perception", "LPIPS"),
        "FD_judge": _value(result, "fidelity", "judge", "matched", "FID"),
        "reward": statistics.fmean(rewards) if rewards else None,
        f"{name}_by_prompt": {caption: quantity.value for caption, quantity in judge["by_prompt"].items()},
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


# ends of what a number can be; others are at least 0
BOUNDS = {"KID": (-np.inf, np.inf), "vendi": (1, np.inf), "pairwise_distance": (0, 2)}
BOUNDS |= dict.fromkeys(("mean", "difference", "standardised"), (-np.inf, np.inf)) | {
    "SSIM": (-1, 1),
    "IS": (1, np.inf),
}
BOUNDS |= dict.fromkeys(("FID", "density", "LPIPS", "LPIPS_within"), (0, np.inf))


def combined(parts: Sequence, name: str = "", of_set: bool = False):
    """Equal structures as one: numbers averaged, counts added, quantities with an interval over the parts.

    Counts behind statistics of a whole set, on whose value they bear, stay those of the smallest part.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        # what one of them lacks, e.g. a caption without images, is left out of its mean
        keys = dict.fromkeys(key for part in parts for key in part or {})
        of_set = of_set or name in ("fidelity", "diversity", "inception_score")
        return {key: combined([part[key] for part in parts if part and key in part], key, of_set) for key in keys}
    if isinstance(first, Quantity):
        values = [part.value for part in parts if part.value is not None]
        if not values:
            return first
        quantity, counts = over_runs(values), [part.n for part in parts]
        low, high = BOUNDS.get(name, (0, 1))
        ends = [None if end is None else float(np.clip(end, low, high)) for end in (quantity.low, quantity.high)]
        return Quantity(quantity.value, *ends, min(counts) if of_set else sum(counts), quantity.how)
    if isinstance(first, list):
        return sorted((entry for part in parts for entry in part), key=lambda entry: entry["distance"])[: len(first)]
    if isinstance(first, int):
        return min(parts) if of_set else sum(parts)
    return None if first is None else statistics.fmean(part for part in parts if part is not None)


def write_per_image(path: Path, models: Mapping[str, Sequence[Folder]], key: str = "aligned") -> None:
    """A CSV with one line an image: model, folder, path, caption, seed, whether aligned, and all its numbers.

    `key`: name of the column that says how well the image is aligned.
    """
    extra = dict.fromkeys(name for folders in models.values() for folder in folders for name in folder.columns)
    rows = []
    for model, folders in models.items():
        for folder in folders:
            images = folder.side.images
            for i, image in enumerate(images.paths):
                about = [model, images.folder, image.relative_to(images.folder), images.captions[i]]
                numbers = [folder.columns[name][i] if name in folder.columns else None for name in extra]
                shown = [f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
                rows.append([*about, images.entry(i).get("seed"), f"{float(folder.aligned[i]):.6g}", *shown])
    write_table(path, ["model", "folder", "path", "caption", "seed", key, *extra], rows)

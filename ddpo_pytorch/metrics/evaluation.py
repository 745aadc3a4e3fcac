"""All measures of every folder and model of a report: the contents of metrics.json and per_image.csv."""

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from ml_collections import ConfigDict
from scipy.special import expit

from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.metrics.alignment import measure_apr, measure_fundus_alignment
from ddpo_pytorch.metrics.comparison import Folder, compare, find_warnings, mean_reward, missing_blocks
from ddpo_pytorch.metrics.diversity import within_pairs
from ddpo_pytorch.metrics.feature_store import THUMBNAILS, FeatureStore
from ddpo_pytorch.metrics.fidelity import pair_images
from ddpo_pytorch.metrics.image_sets import ImageSet, shape_of
from ddpo_pytorch.metrics.inputs import Sets, Tools
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, bootstrap_ratio, mean_over_runs
from ddpo_pytorch.metrics.measures import (
    NEAR_COPY,
    MeasuredSet,
    Neighbours,
    copies,
    diversity_size,
    find_neighbours,
    match_prompts,
    measure_diversity,
    measure_fidelity,
    measure_inception_score,
    measure_memorisation,
    measure_quality,
    measure_structure,
)
from ddpo_pytorch.metrics.networks import POLICY, SELECTOR
from ddpo_pytorch.metrics.ssim import MAX_PAIRS, pairs_by_name

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "torchmetrics", "lpips", "numpy", "scipy")
FUNDUS = "fundus"  # name of Selector and Policy together in metrics.json
# ranges of numbers; others lie in [0, 1]
INFINITE = (-np.inf, np.inf)
BOUNDS = dict.fromkeys(("KID", "mean", "difference", "standardised"), INFINITE)
BOUNDS |= dict.fromkeys(("FID", "density", "LPIPS", "LPIPS_within"), (0, np.inf))
BOUNDS |= {"vendi": (1, np.inf), "IS": (1, np.inf), "pairwise_distance": (0, 2), "SSIM": (-1, 1)}


# --- every process: networks look at images ---


@dataclass
class Measured:
    """Measured sets of a report: folders by model, real and training images or None."""

    models: dict[str, list[MeasuredSet]]
    real: MeasuredSet | None
    train: MeasuredSet | None

    @property
    def folders(self) -> list[MeasuredSet]:
        """The folders of all models."""
        return [own for folders in self.models.values() for own in folders]


def run_networks(config: ConfigDict, sets: Sets, tools: Tools, accelerator: Accelerator) -> Measured:
    """Run all networks on all images and pairs that the cache lacks. Every process must call this."""
    metric, seed = config.metric, config.seed
    store = FeatureStore(Path(metric.cache_dir), accelerator, metric.batch_size, config.progress)

    def run(title: str, images: ImageSet | None, pairs: dict | None = None) -> MeasuredSet | None:
        if images is None:
            return None
        rows = store.features(title, images, tools.of_images)
        measured = {}
        for name, (network, partners, indices) in (pairs or {}).items():
            values = store.pairs(f"{title}: {name}", images, partners, indices, network).all()
            if len(values):
                measured[name] = np.array(indices), values[:, 0]
        return MeasuredSet(images, rows, measured)

    real = run("real images", sets.real, own_pairs(sets.real, tools, seed) if sets.real is not None else None)
    train = run("train images", sets.train)
    models = {
        name: [
            run(name, images, own_pairs(images, tools, seed) | partner_pairs(images, sets, tools, seed))
            for images in folders
        ]
        for name, folders in sets.models.items()
    }
    return Measured(models, real, train)


def own_pairs(images: ImageSet, tools: Tools, seed: int) -> dict:
    """Return (network, partner set, index pairs) by measure of pairs within a set."""
    if "ms_ssim" not in tools.similarity:
        return {}
    network, any_prompt = tools.similarity["ms_ssim"], np.zeros(len(images), dtype=int)
    return {
        "MS_SSIM": (network, images, within_pairs(any_prompt, seed, images.keys)[:MAX_PAIRS]),
        "MS_SSIM_within": (network, images, within_pairs(images.groups, seed, images.keys)[:MAX_PAIRS]),
    }


def partner_pairs(images: ImageSet, sets: Sets, tools: Tools, seed: int) -> dict:
    """Return (network, partner set, index pairs) by measure of a model's LPIPS, and SSIM to images of equal names."""
    result = {}
    if tools.lpips is not None:
        result["LPIPS_within"] = tools.lpips, images, within_pairs(images.groups, seed, images.keys)
        if sets.real is not None:
            own, theirs = ({path: i for i, path in enumerate(side.paths)} for side in (images, sets.real))
            paths = pair_images(images.samples, sets.real.samples, seed)
            result["LPIPS"] = tools.lpips, sets.real, [(own[a], theirs[b]) for a, b, _ in paths]
    if "ssim" in tools.similarity:
        pairs = pairs_by_name(images.keys, sets.pairs.keys, f"metric.pairs_path={str(sets.pairs.folder)!r}")
        if len(pairs) < len(images):
            logger.warning("%s: SSIM of %d of %d images, others lack partners", images.folder, len(pairs), len(images))
        result["SSIM"] = tools.similarity["ssim"], sets.pairs, pairs
    return result


# --- the main process: numbers ---


@dataclass
class Context:
    """Settings, judges and sets that folders are measured against.

    `judges`: labels by name, of which the first judges APR; none for fundus images, whose Selector has a `threshold`.
    `per_group`: images per prompt for diversity; `quality`: sets of statistics.
    """

    judges: Mapping[str, tuple[str, ...]]
    threshold: float | None
    extractors: Sequence[str]
    quality: Sequence[str]
    real: MeasuredSet | None
    train: MeasuredSet | None
    per_group: int
    seed: int
    # distances of real images to training images by space; their near copies are left out of the baseline
    neighbours: dict[str, Neighbours] = field(default_factory=dict)
    near_copies: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.real is not None and self.train is not None:
            self.neighbours = {name: find_neighbours(name, self.real, self.train) for name in self.spaces}
            near = self.neighbours[THUMBNAILS.name].distances < NEAR_COPY
            self.near_copies = copies(self.real, self.train) | near

    @property
    def key(self) -> str:
        """Name of the alignment measure in metrics.json."""
        return "APR" if self.threshold is None else "alignment"

    @property
    def spaces(self) -> list[str]:
        """Feature spaces in which nearness to training images is measured."""
        return [*self.extractors, THUMBNAILS.name]


def set_facts(own: MeasuredSet, context: Context | None = None) -> dict:
    """Return what metrics.json states about a set; in a context also its copies of real and training images."""
    facts = own.rows["pixels"].all()
    identical = len(facts) - len({row.tobytes() for row in facts[:, 1:]})
    result = own.images.describe() | {"identical_images": identical, "black_images": int((facts[:, 0] < 2).sum())}
    others = {"real": context.real, "training": context.train} if context else {}
    for kind, other in others.items():
        if other is not None:
            result[f"copies_of_{kind}_images"] = int(copies(own, other).sum())
            near = find_neighbours(THUMBNAILS.name, own, other).distances < NEAR_COPY
            result[f"near_copies_of_{kind}_images"] = int(near.sum())
    return result


def measure_folder(own: MeasuredSet, parts: tuple[np.ndarray, np.ndarray] | None, context: Context) -> Folder:
    """Measure everything that the context allows.

    `parts`: indices of real and of own images with equal prompt mixes; None for the real images themselves.
    """
    seed, captions, groups = context.seed, own.images.captions, own.groups
    real = context.real if parts is not None else None
    result = {"images": len(captions), "alignment": {}, "perception": {}, "diversity": {}}
    columns: dict[str, Sequence] = {}
    if context.threshold is not None:
        scores = (own.rows[name].all()[:, 0] for name in (SELECTOR, POLICY))
        result["alignment"][FUNDUS], aligned, columns = measure_fundus_alignment(
            *scores, context.threshold, captions, groups, seed
        )
        result["inception_score"] = measure_inception_score(own, seed)
    else:
        for number, (name, labels) in enumerate(context.judges.items()):
            logits = own.rows[name].all()
            block, hits = measure_apr(labels, logits, captions, groups, seed)
            result["alignment"][name] = block
            columns |= {f"{name}_{label}": expit(logits[:, i]) for i, label in enumerate(labels)}
            if number == 0:
                aligned = hits
                result["label_accuracy"] = {label: block["attributes"][label]["accuracy"] for label in labels}
    if context.quality:
        result["quality"], own_columns = measure_quality(own, real, context.quality, seed)
        columns |= own_columns
    if structure := measure_structure(own, seed):
        result["structure"] = structure
    for name in ("LPIPS", "LPIPS_within"):
        if name in own.pairs:
            pairs, values = own.pairs[name]
            result["perception"][name] = bootstrap_mean(values, groups[pairs[:, 0]], seed, resample_groups=True)
    if "LPIPS" in own.pairs:
        pairs, values = own.pairs["LPIPS"]
        paired = groups[pairs[:, 0]]
        means = {own.images.all_captions[g]: float(values[paired == g].mean()) for g in np.unique(paired)}
        result |= {"LPIPS_by_prompt": means, "LPIPS_pairs": len(pairs)}
        by_image = dict(zip(pairs[:, 0].tolist(), values.tolist(), strict=True))
        columns["lpips"] = [by_image.get(index) for index in range(len(captions))]
    for name in context.extractors:
        result["diversity"][name] = measure_diversity(name, own, context.per_group, seed)
    if real is not None:
        result["fidelity"] = {name: measure_fidelity(name, real, own, parts, seed) for name in context.extractors}
    if context.train is not None:
        memorisation, memorisation_columns = _nearness(own, context)
        result["memorisation"] = memorisation
        columns |= memorisation_columns
    facts = set_facts(own, context) if own is not context.real else {}
    return Folder(own.images, result, facts, aligned, columns)


def _nearness(own: MeasuredSet, context: Context) -> tuple[dict, dict[str, Sequence]]:
    """Return the memorisation block by space, and the columns of per_image.csv."""
    train, blocks, columns = context.train, {}, {}
    for name in context.spaces:
        found = context.neighbours[name] if own is context.real else find_neighbours(name, own, train)
        baseline = context.neighbours[name].distances[~context.near_copies] if context.neighbours else None
        blocks[name] = measure_memorisation(own, train, found, baseline, context.seed)
        if not columns:
            columns["nearest_train"] = [str(train.images.paths[i]) for i in found.indices]
            columns["train_distance"] = found.distances
    columns["thumbnail_distance"] = found.distances
    columns["copy_of_train"] = copies(own, train).astype(int)
    return blocks, columns


# --- models ---


def summarise(folders: Sequence[Folder], fid_part: str) -> dict:
    """Return a model's part of metrics.json: headline numbers, and the blocks of one folder or combined ones.

    `fid_part` ("matched" or "unmatched") is the fidelity in the headline.
    """
    result = combine([folder.result for folder in folders])
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
        f"{name}_by_prompt": {caption: estimate.value for caption, estimate in judge["by_prompt"].items()},
    }
    result.setdefault("LPIPS_pairs", 0)
    return headline | result


def _value(result: Mapping, *keys: str) -> float | None:
    for key in keys:
        result = (result or {}).get(key)
    return None if result is None else result.value


def combine(parts: Sequence, name: str = "", of_set: bool = False):
    """Merge equal structures: average numbers, add counts, and give estimates an interval over the parts.

    Counts behind statistics of a whole set, whose value depends on them, are those of the smallest part.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        # a key that some lack, e.g. a caption without images, is averaged over the others
        keys = dict.fromkeys(key for part in parts for key in part or {})
        of_set = of_set or name in ("fidelity", "diversity", "inception_score")
        return {key: combine([part[key] for part in parts if part and key in part], key, of_set) for key in keys}
    if isinstance(first, Estimate):
        values = [part.value for part in parts if part.value is not None]
        if not values:
            return first
        over_runs, counts = mean_over_runs(values), [part.n for part in parts]
        bounds = BOUNDS.get(name, (0, 1))
        ends = [None if end is None else float(np.clip(end, *bounds)) for end in (over_runs.low, over_runs.high)]
        return Estimate(over_runs.value, *ends, min(counts) if of_set else sum(counts), over_runs.how)
    if isinstance(first, list):  # the closest pairs
        return sorted((entry for part in parts for entry in part), key=lambda entry: entry["distance"])[: len(first)]
    if isinstance(first, int):
        return min(parts) if of_set else sum(parts)
    return None if first is None else statistics.fmean(part for part in parts if part is not None)


def ceiling(captions: Sequence[str], real: Folder, seed: int) -> tuple[Estimate, float]:
    """Return the judge's agreement with real images in the mix of these captions, and the share of these that exist.

    Every real image is weighted by the number of these captions per real image of its caption; the interval resamples
    captions and images.
    """
    wanted, held = Counter(captions), Counter(real.images.captions)
    weights = np.array([wanted[c] / held[c] for c in real.images.captions])
    covered = sum(wanted[c] for c in held if c in wanted) / len(captions)
    if not weights.any():
        return Estimate.missing("no real image of these captions"), 0.0
    return bootstrap_ratio(weights * real.aligned, weights, real.images.groups, seed), covered


# --- the report ---


@dataclass
class Evaluation:
    """`result`: contents of metrics.json; `folders`: measured folders by model, with "real" first if there is one."""

    result: dict
    folders: dict[str, list[Folder]]


def evaluate(config: ConfigDict, tools: Tools, measured: Measured) -> Evaluation:
    """Compute all numbers of a report."""
    metric, real, every = config.metric, measured.real, measured.folders
    parts = match_prompts([own.groups for own in ([real] if real else []) + every], config.seed)
    context = Context(
        judges={name: labels for name, (_, labels) in tools.judges.items() if labels},
        threshold=tools.threshold,
        extractors=list(tools.extractors),
        quality=tuple(metric.quality),
        real=real,
        train=measured.train,
        per_group=diversity_size([own.images for own in every]),
        seed=config.seed,
    )
    parts_of = iter(parts[1:])
    models = {
        name: [measure_folder(own, (parts[0], next(parts_of)) if real else None, context) for own in folders]
        for name, folders in measured.models.items()
    }
    reference = measure_folder(real, None, context) if real else None
    fid_part = "unmatched" if metric.fid == "compat" else "matched"
    result = describe(config, tools, measured) | {
        "warnings": find_warnings(context, models, len(parts[0])),
        "models": {},
        "fid_part": fid_part,
    }
    for name, folders in models.items():
        captions = [caption for folder in folders for caption in folder.images.captions]
        counts = Counter(captions)
        model = summarise(folders, fid_part) | {
            "folders": [folder.facts | {"made_with": dict(folder.images.made_with)} for folder in folders],
            "black_images": sum(folder.facts["black_images"] for folder in folders),
            "images_by_prompt": {caption: counts[caption] for caption in every[0].images.all_captions},
            "missing": missing_blocks(folders, real.images if real else None),
        }
        if reference:
            model["ceiling"], model["ceiling_share"] = ceiling(captions, reference, config.seed)
        result["models"][name] = model
    if context.judges:
        result["judge_labels"] = list(next(iter(context.judges.values())))
    first = next(iter(models))
    result["comparisons"] = [
        {"from": first, "to": name} | compare(models[first], own, config.seed, context.key)
        for name, own in models.items()
        if name != first
    ]
    if reference:
        models = {"real": [reference]} | models
        result["real"] = summarise([reference], fid_part)
    return Evaluation(json.loads(json.dumps(result, default=Estimate.to_dict)), models)


def describe(config: ConfigDict, tools: Tools, measured: Measured) -> dict:
    """Return what metrics.json states besides the numbers: settings, versions, hashes, what is missing."""
    missing = {} if measured.real else {"FID, KID, LPIPS to real images": "metric.real_path is empty"}
    judges = {
        name: {"what": network.what, "sha256": network.sha256, "labels": list(labels)}
        for name, (network, labels) in tools.judges.items()
    }
    kind = {}
    if tools.threshold is not None:
        kind, judges[SELECTOR]["threshold"] = {"kind": FUNDUS}, tools.threshold
    shape = shape_of(measured.folders[0].images)
    sets = {"real": measured.real, "train": measured.train}
    return kind | {
        "format": 2,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": config.metric.to_dict() | {"seed": config.seed, "image_shape": list(shape)},
        "judges": judges,
        "networks": {network.name: {"what": network.what, "sha256": network.sha256} for network in tools.named},
        "missing": tools.missing | missing,
        "sets": {name: set_facts(own) for name, own in sets.items() if own},
    }


def write_per_image(path: Path, models: Mapping[str, Sequence[Folder]], key: str = "aligned") -> None:
    """Write a CSV with a line per image: model, folder, path, caption, seed, alignment (column `key`), others."""
    extra = dict.fromkeys(name for folders in models.values() for folder in folders for name in folder.columns)
    rows = []
    for model, folders in models.items():
        for folder in folders:
            images = folder.images
            for i, image in enumerate(images.paths):
                numbers = [folder.columns[name][i] if name in folder.columns else None for name in extra]
                shown = [f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
                origin = [model, images.folder, image.relative_to(images.folder), images.captions[i]]
                rows.append([*origin, images.entry(i).get("seed"), f"{float(folder.aligned[i]):.6g}", *shown])
    write_table(path, ["model", "folder", "path", "caption", "seed", key, *extra], rows)

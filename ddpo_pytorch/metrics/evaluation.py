"""All measures of every folder and model of a report: the contents of metrics.json and per_image.csv."""

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from ml_collections import ConfigDict
from scipy.special import expit

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.metadata import requested_labels
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.metrics.alignment import measure_apr, measure_fundus_alignment
from ddpo_pytorch.metrics.comparison import Folder, compare, find_warnings, mean_reward, missing_blocks
from ddpo_pytorch.metrics.diversity import diversity_size, within_pairs, within_prompt_diversity
from ddpo_pytorch.metrics.feature_store import PIXELS, THUMBNAILS, FeatureStore
from ddpo_pytorch.metrics.fidelity import measure_fidelity, pair_images
from ddpo_pytorch.metrics.image_sets import ImageSet, match_prompts, shape_of
from ddpo_pytorch.metrics.image_statistics import measure_inception_score, measure_quality
from ddpo_pytorch.metrics.inputs import Sets, Tools
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_ratio, mean_over_runs
from ddpo_pytorch.metrics.memorisation import copies, find_neighbours, measure_memorisation, near_copies, pixel_hashes
from ddpo_pytorch.metrics.networks import POLICY, SELECTOR
from ddpo_pytorch.metrics.ssim import MAX_PAIRS, measure_pairs, pairs_by_name
from ddpo_pytorch.metrics.subgroups import measure_groups, name_groups
from ddpo_pytorch.metrics.tables import dig

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "torchmetrics", "lpips", "numpy", "scipy")
FUNDUS = "fundus"  # name of Selector and Policy together in metrics.json
# bounds of measures by name; all others lie in [0, 1]
INFINITE = (-np.inf, np.inf)
BOUNDS = dict.fromkeys(("KID", "MMD", "FID_infinity", "mean", "difference", "standardised", "rewards"), INFINITE)
BOUNDS |= dict.fromkeys(("FID", "density", "LPIPS", "LPIPS_within", "wasserstein"), (0, np.inf))
BOUNDS |= {"vendi": (1, np.inf), "IS": (1, np.inf), "pairwise_distance": (0, 2), "SSIM": (-1, 1)}


# --- every process: networks look at images ---


def run_networks(config: ConfigDict, sets: Sets, tools: Tools, accelerator: Accelerator) -> None:
    """Run all networks on all images and pairs that the cache lacks. Every process must call this."""
    metric, seed = config.metric, config.seed
    store = FeatureStore(Path(metric.cache_dir), accelerator, metric.batch_size, config.progress)
    judges = [judge for judge, _ in tools.judges.values()]
    networks = [PIXELS, THUMBNAILS, *judges, *tools.extractors.values(), *tools.statistics]
    every = [("train images", [sets.train]), ("real images", [sets.real]), *sets.models.items()]
    for title, images in ((title, images) for title, group in every for images in group if images):
        images.rows = store.features(title, images, networks)
        pairs = {} if images is sets.train else pairs_of(images, sets, tools, seed)
        for name, (network, partners, indices) in pairs.items():
            values = store.pairs(f"{title}: {name}", images, partners, indices, network)[:]
            if len(values):
                images.pairs[name] = np.array(indices), values[:, 0]


def pairs_of(images: ImageSet, sets: Sets, tools: Tools, seed: int) -> dict:
    """Return by measure the network, the partner set and the index pairs it runs on; real images get MS-SSIM only."""
    result = {}
    if "ms_ssim" in tools.pairs:
        for name, groups in (("MS_SSIM", np.zeros(len(images), dtype=int)), ("MS_SSIM_within", images.groups)):
            pairs = within_pairs(groups, seed, images.keys)[:MAX_PAIRS]
            result[name] = tools.pairs["ms_ssim"], images, pairs
    if images is sets.real:
        return result
    if "lpips" in tools.pairs:
        result["LPIPS_within"] = tools.pairs["lpips"], images, within_pairs(images.groups, seed, images.keys)
        if sets.real is not None:
            ours, theirs = ({path: i for i, path in enumerate(side.paths)} for side in (images, sets.real))
            paths = pair_images(images.samples, sets.real.samples, seed)
            result["LPIPS"] = tools.pairs["lpips"], sets.real, [(ours[a], theirs[b]) for a, b, _ in paths]
    if "ssim" in tools.pairs:
        pairs = pairs_by_name(images.keys, sets.pairs.keys, f"metric.pairs_path={str(sets.pairs.folder)!r}")
        if len(pairs) < len(images):
            logger.warning("%s: SSIM of %d of %d images, the rest are unpaired", images.folder, len(pairs), len(images))
        result["SSIM"] = tools.pairs["ssim"], sets.pairs, pairs
    return result


# --- the main process: numbers ---


class Context:
    """Settings, networks and sets that folders are measured against.

    `per_group`: images per prompt for diversity. `spaces`: names of the features in which distances to training images
    are measured. `baseline`: by space, distances of real images, except near copies, to their nearest training image.
    `key`: name of the alignment measure in metrics.json.
    """

    def __init__(self, config: ConfigDict, tools: Tools, sets: Sets):
        self.config, self.tools, self.sets, self.seed = config, tools, sets, config.seed
        self.per_group, self.spaces = diversity_size(sets.folders), [*tools.extractors, THUMBNAILS.name]
        self.key, self.baseline = "APR" if tools.threshold is None else "alignment", {}
        self.near_copies, real, train = None, sets.real, sets.train
        name_groups([*sets.folders, *filter(None, [real])], config.metric.groups)
        if real is not None and train is not None:
            self.near_copies = copies(real, train) | near_copies(real, train)
            for name in self.spaces:
                self.baseline[name] = find_neighbours(name, real, train)[0][~self.near_copies]


def set_facts(images: ImageSet, others: Mapping[str, ImageSet | None]) -> dict:
    """Return a set's entry in metrics.json, including how many of its images are copies of `others` (sets by kind)."""
    levels = images.rows["pixels"][:][:, 0]
    identical = len(images) - len(set(pixel_hashes(images)))
    result = images.describe() | {"identical_images": identical, "black_images": int((levels < 2).sum())}
    for kind, other in others.items():
        if other is not None:
            result[f"copies_of_{kind}_images"] = int(copies(images, other).sum())
            result[f"near_copies_of_{kind}_images"] = int(near_copies(images, other).sum())
    return result


def measure_folder(images: ImageSet, parts: tuple[np.ndarray, np.ndarray] | None, context: Context) -> Folder:
    """Measure everything that the context allows.

    `parts`: indices of real images and of `images` with the same mix of prompts; None for the real images themselves.
    """
    seed, captions, tools = context.seed, images.captions, context.tools
    real, train, quality = context.sets.real if parts else None, context.sets.train, context.config.metric.quality
    result = {"images": len(captions), "alignment": {}, "perception": {}, "diversity": {}}
    result["rewards"] = mean_reward(images, seed)
    columns: dict[str, Sequence] = {}
    if tools.threshold is not None:
        scores = (images.rows[name][:].squeeze(1) for name in (SELECTOR, POLICY))
        result["alignment"][FUNDUS], aligned, columns = measure_fundus_alignment(images, *scores, tools.threshold, seed)
        result["inception_score"] = measure_inception_score(images, seed)
    else:
        for number, (name, (_, labels)) in enumerate(tools.judges.items()):
            logits = images.rows[name][:]
            requested = requested_labels(captions, labels, images.table)
            block, hits = measure_apr(images, requested, labels, logits, seed)
            result["alignment"][name] = block
            columns |= {f"{name}_{label}": expit(logits[:, i]) for i, label in enumerate(labels)}
            if number == 0:
                aligned = hits
                result["label_accuracy"] = {label: block["attributes"][label]["accuracy"].value for label in labels}
    if quality:
        result["quality"], own_columns = measure_quality(images, real, quality, seed)
        columns |= own_columns
    if structure := measure_pairs(images, ("SSIM", "MS_SSIM", "MS_SSIM_within"), seed):
        result["structure"] = structure
    result["perception"] = measure_pairs(images, ("LPIPS", "LPIPS_within"), seed, share=True)
    if "LPIPS" in images.pairs:
        pairs, values = images.pairs["LPIPS"]
        paired = images.groups[pairs[:, 0]]
        means = {images.all_captions[g]: float(values[paired == g].mean()) for g in np.unique(paired)}
        result |= {"LPIPS_by_prompt": means, "LPIPS_pairs": len(pairs)}
        by_image = dict(zip(pairs[:, 0].tolist(), values.tolist(), strict=True))
        columns["lpips"] = [by_image.get(index) for index in range(len(captions))]
    size, groups = context.per_group, images.groups
    for name in tools.extractors:
        diverse = size > 1 and np.bincount(groups).max() >= size  # else no prompt has enough images
        result["diversity"][name] = within_prompt_diversity(images.rows[name], groups, size, seed) if diverse else None
    if real is not None:
        result["fidelity"] = {name: measure_fidelity(name, real, images, parts, seed) for name in tools.extractors}
    if train is not None:
        neighbours = {name: find_neighbours(name, images, train) for name in context.spaces}
        result["memorisation"] = {
            name: measure_memorisation(name, images, train, neighbours[name], context.baseline.get(name), seed)
            for name in neighbours
        }
        distances, indices = neighbours[context.spaces[0]]
        columns["nearest_train"] = [str(train.paths[i]) for i in indices]
        columns |= {"train_distance": distances, "thumbnail_distance": neighbours[THUMBNAILS.name][0]}
        columns["copy_of_train"] = copies(images, train).astype(int)
    values, space = {"aligned": aligned.astype(float)}, context.spaces[0]
    if (threshold := dig(result, "memorisation", space, "threshold")) is not None:
        values["closer"] = neighbours[space][0] < threshold
    facts = set_facts(images, {"real": context.sets.real, "training": train}) if parts else {}
    return Folder(images, result, facts, aligned, columns, values)


def summarise(folders: Sequence[Folder], fid_part: str, real: ImageSet | None, context: Context) -> dict:
    """Return a model's part of metrics.json: headline numbers (FID of `fid_part`) and its folders' combined blocks.

    Groups (sex, age, ...) are compared over the images of all folders together, with those of `real` if given.
    """
    result = combine([folder.result for folder in folders])
    images, space = [folder.images for folder in folders], context.spaces[0]
    if columns := images[0].names:
        shared = [name for name in folders[0].values if all(name in folder.values for folder in folders)]
        values = {name: np.concatenate([folder.values[name] for folder in folders]) for name in shared}
        result["groups"] = {
            column: measure_groups(images, real, column, space, values, context.seed) for column in columns
        }
    judge = next(iter(result["alignment"].values()))
    key, name = ("APR", "APR") if "APR" in judge else ("alignment", "fundus_alignment")

    def value(*path: str) -> float | None:
        return getattr(dig(result, *path), "value", None)

    headline = {
        name: judge[key].value,
        "FID": value("fidelity", "inception", fid_part, "FID"),
        "KID": value("fidelity", "inception", fid_part, "KID"),
        "LPIPS": value("perception", "LPIPS"),
        "reward": value("rewards"),
        "FD_judge": value("fidelity", "judge", "matched", "FID"),
        f"{name}_by_prompt": {caption: estimate.value for caption, estimate in judge["by_prompt"].items()},
    }
    return headline | {"LPIPS_pairs": 0} | result


def combine(parts: Sequence, name: str = "", of_set: bool = False):
    """Merge results of equal structure: average numbers, sum counts (minimum if `of_set`), recompute intervals."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        # a key that some parts lack (a caption without images) is averaged over the others
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
    """Return the judge's alignment of real images in the mix of `captions`, and the share of those covered."""
    wanted, held = Counter(captions), Counter(real.images.captions)
    weights = np.array([wanted[c] / held[c] for c in real.images.captions])
    covered = sum(wanted[c] for c in held if c in wanted) / len(captions)
    if not weights.any():
        return Estimate.missing("no real image of these captions"), 0.0
    return bootstrap_ratio(weights * real.aligned, weights, real.images.groups, seed), covered


def evaluate(config: ConfigDict, tools: Tools, sets: Sets) -> tuple[dict, dict[str, list[Folder]]]:
    """Return the content of metrics.json, and measured folders by model, "real" first if there are real images."""
    real, every, seed = sets.real, sets.folders, config.seed
    # without real images a folder takes their place, which does not affect the match
    real_part, *own_parts = match_prompts([images.groups for images in (real or every[0], *every)], seed)
    context, parts_of = Context(config, tools, sets), iter(own_parts)
    models = {
        name: [measure_folder(images, (real_part, next(parts_of)), context) for images in folders]
        for name, folders in sets.models.items()
    }
    reference = measure_folder(real, None, context) if real else None
    fid_part = "unmatched" if config.metric.fid == "compat" else "matched"
    missing = {} if real else {"FID, KID, LPIPS to real images": "metric.real_path is empty"}
    networks = [*tools.extractors.values(), *tools.statistics, *tools.pairs.values()]
    judges = {
        name: {"what": network.what, "sha256": network.sha256, "labels": list(labels)}
        for name, (network, labels) in tools.judges.items()
    }
    kind = {"subject": "dermoscopic" if set(every[0].all_captions) <= set(CAPTIONS) else "medical"}
    if tools.threshold is not None:
        kind, judges[SELECTOR]["threshold"] = {"kind": FUNDUS, "subject": FUNDUS}, tools.threshold
    result = kind | {
        "format": 2,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": config.metric.to_dict() | {"seed": seed, "image_shape": list(shape_of(every[0]))},
        "judges": judges,
        "networks": {network.name: {"what": network.what, "sha256": network.sha256} for network in networks},
        "missing": tools.missing | sets.missing | missing,
        "sets": {name: set_facts(images, {}) for name, images in (("real", real), ("train", sets.train)) if images},
        "warnings": find_warnings(context, models, len(real_part)),
        "models": {},
        "fid_part": fid_part,
    }
    if context.near_copies is not None:
        result["sets"]["real"]["near_copies_of_training_images"] = int(context.near_copies.sum())
    for name, folders in models.items():
        captions = [caption for folder in folders for caption in folder.images.captions]
        counts = Counter(captions)
        model = summarise(folders, fid_part, real, context) | {
            "folders": [folder.facts | {"made_with": dict(folder.images.made_with)} for folder in folders],
            "images_by_prompt": {caption: counts[caption] for caption in every[0].all_captions},
            "missing": missing_blocks(folders, real),
        }
        if reference:
            model["ceiling"], model["ceiling_share"] = ceiling(captions, reference, seed)
        result["models"][name] = model
    first, *others = models
    result["comparisons"] = [
        {"from": first, "to": name} | compare(models[first], models[name], seed, context.key) for name in others
    ]
    if reference:
        models = {"real": [reference]} | models
        result["real"] = summarise([reference], fid_part, None, context)
    return json.loads(json.dumps(result, default=Estimate.to_dict)), models


def write_per_image(path: Path, models: Mapping[str, Sequence[Folder]], key: str = "aligned") -> None:
    """Write a CSV with a line per image: model, folder, path, caption, seed, alignment (column `key`), ..."""
    extra = dict.fromkeys(name for folders in models.values() for folder in folders for name in folder.columns)
    rows = []
    for model, folder in ((model, folder) for model, folders in models.items() for folder in folders):
        images = folder.images
        for i, image in enumerate(images.paths):
            numbers = [folder.columns[name][i] if name in folder.columns else None for name in extra]
            shown = [f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
            origin = [model, images.folder, image.relative_to(images.folder), images.captions[i]]
            rows.append([*origin, images.entry(i).get("seed"), f"{float(folder.aligned[i]):.6g}", *shown])
    write_table(path, ["model", "folder", "path", "caption", "seed", key, *extra], rows)

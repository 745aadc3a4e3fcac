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
from ddpo_pytorch.metrics.comparison import Folder, compare, find_warnings
from ddpo_pytorch.metrics.diversity import DIVERSITY_IMAGES, within_pairs, within_prompt_diversity
from ddpo_pytorch.metrics.feature_store import PIXELS, THUMBNAILS, FeatureStore
from ddpo_pytorch.metrics.fidelity import measure_fidelity, pair_images
from ddpo_pytorch.metrics.image_sets import ImageSet, match_prompts, shape_of
from ddpo_pytorch.metrics.image_statistics import measure_inception_score, measure_quality
from ddpo_pytorch.metrics.inputs import Sets, Tools
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, bootstrap_ratio, mean_over_runs
from ddpo_pytorch.metrics.memorisation import copies, find_neighbours, measure_memorisation, near_copies, pixel_hashes
from ddpo_pytorch.metrics.networks import POLICY, SELECTOR
from ddpo_pytorch.metrics.ssim import MAX_PAIRS, measure_pairs
from ddpo_pytorch.metrics.subgroups import measure_groups, name_groups
from ddpo_pytorch.metrics.tables import dig
from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "torchmetrics", "lpips", "numpy", "scipy")
FUNDUS = "fundus"  # name of Selector and Policy together in metrics.json
# bounds of measures by name; all others lie in [0, 1]
INFINITE = (-np.inf, np.inf)
BOUNDS = dict.fromkeys(("KID", "MMD", "FID_infinity", "mean", "difference", "standardised", "rewards"), INFINITE)
BOUNDS |= dict.fromkeys(("FID", "density", "LPIPS", "LPIPS_within", "wasserstein"), (0, np.inf))
BOUNDS |= {"vendi": (1, np.inf), "IS": (1, np.inf), "pairwise_distance": (0, 2), "SSIM": (-1, 1)}


def run_networks(config: ConfigDict, sets: Sets, tools: Tools, accelerator: Accelerator) -> None:
    """Run all networks on all images and pairs that the cache lacks. Every process must call this."""
    metric, seed = config.metric, config.seed
    store = FeatureStore(Path(metric.cache_dir), accelerator, metric.batch_size, config.progress)
    judges = [judge for judge, _ in tools.judges.values()]
    networks = [PIXELS, THUMBNAILS, *judges, *tools.extractors.values(), *tools.statistics.values()]
    every = [("train images", [sets.train]), ("real images", [sets.real]), *sets.models.items()]
    for title, images in ((title, images) for title, group in every for images in group if images):
        images.rows = store.features(title, images, networks)
        for name, (network, partners, indices) in pairs_of(images, sets, tools, seed).items():
            if indices:
                values = store.pairs(f"{title}: {name}", images, partners, indices, network)[:]
                images.pairs[name] = np.array(indices), values[:, 0]


def pairs_of(images: ImageSet, sets: Sets, tools: Tools, seed: int) -> dict:
    """Return by measure the network, the partner set and the index pairs it runs on; real images get MS-SSIM only."""
    if images is sets.train:
        return {}
    within, result = within_pairs(images.groups, seed, images.keys), {}
    if network := tools.pairs.get("ms_ssim"):
        mixed = within_pairs(np.zeros(len(images), dtype=int), seed, images.keys)
        result["MS_SSIM"] = network, images, mixed[:MAX_PAIRS]
        result["MS_SSIM_within"] = network, images, within[:MAX_PAIRS]
    if images is sets.real:
        return result
    if network := tools.pairs.get("lpips"):
        result["LPIPS_within"] = network, images, within
        if sets.real is not None:
            result["LPIPS"] = network, sets.real, pair_images(images.samples, sets.real.samples, seed)
    if network := tools.pairs.get("ssim"):
        partners, names = {name: i for i, name in enumerate(sets.pairs.keys)}, images.keys
        pairs = [(i, partners[name]) for i, name in enumerate(names) if name in partners]
        if not pairs:
            lacking = f"metric.pairs_path={str(sets.pairs.folder)!r} has no image named as a generated one"
            hint = "SSIM compares images of equal names, set --config.metric.pairs_path= to skip it"
            raise UserError(f"{lacking}, e.g. {names[0]!r}; {hint}")
        if len(pairs) < len(images):
            logger.warning("%s: SSIM of %d of %d images, the rest are unpaired", images.folder, len(pairs), len(images))
        result["SSIM"] = network, sets.pairs, pairs
    return result


class Context:
    """Settings, networks and sets that folders are measured against.

    `per_group`: images per prompt for diversity, as many as every prompt has in every folder (but for those below 2),
    or 0. `spaces`: features in which distances to training images are measured. `baseline`: by space, distances of real
    images, but for near copies, to the nearest training image. `key`: name of the alignment measure.
    """

    def __init__(self, config: ConfigDict, tools: Tools, sets: Sets):
        self.config, self.tools, self.sets, self.seed = config, tools, sets, config.seed
        self.spaces = [*tools.extractors, THUMBNAILS.name]
        counts = [Counter(images.captions) for images in sets.folders]
        common = [min(count[caption] for count in counts) for caption in sets.folders[0].all_captions]
        self.per_group = min([DIVERSITY_IMAGES, *(n for n in common if n > 1)]) if max(common) > 1 else 0
        self.key, self.baseline, self.near_copies = "APR" if tools.threshold is None else "alignment", {}, None
        name_groups([*sets.folders, *filter(None, [sets.real])], config.metric.groups)
        if sets.real and sets.train:
            self.near_copies = copies(sets.real, sets.train) | near_copies(sets.real, sets.train)
            for name in self.spaces:
                self.baseline[name] = find_neighbours(name, sets.real, sets.train)[0][~self.near_copies]


def set_facts(images: ImageSet, others: Mapping[str, ImageSet | None]) -> dict:
    """Return a set's entry in metrics.json, including how many of its images are copies of `others` (sets by kind)."""
    result = images.describe() | {"identical_images": len(images) - len(set(pixel_hashes(images)))}
    result["black_images"] = int((images.rows["pixels"][:][:, 0] < 2).sum())
    for kind, other in others.items():
        if other:
            result[f"copies_of_{kind}_images"] = int(copies(images, other).sum())
            result[f"near_copies_of_{kind}_images"] = int(near_copies(images, other).sum())
    return result


def measure_folder(images: ImageSet, parts: tuple[np.ndarray, np.ndarray] | None, context: Context) -> Folder:
    """Measure all that the context allows; `parts`: indices of real and own images of one mix of prompts, or None."""
    seed, tools, sets, groups = context.seed, context.tools, context.sets, images.groups
    real, train, quality = sets.real if parts else None, sets.train, context.config.metric.quality
    columns, result = {}, {"images": len(images), "alignment": {}, "perception": {}, "diversity": {}}
    rewards = np.array([images.entry(i).get("reward") for i in range(len(images))], dtype=float)  # NaN for None
    logged, result["rewards"] = np.isfinite(rewards), Estimate.missing("image_log.json states no rewards")
    if logged.any():
        result["rewards"] = bootstrap_mean(rewards[logged], groups[logged], seed, resample_groups=True)
    if tools.threshold is not None:
        scores = (images.rows[name][:].squeeze(1) for name in (SELECTOR, POLICY))
        result["alignment"][FUNDUS], columns = measure_fundus_alignment(images, *scores, tools.threshold, seed)
        aligned = columns["alignment"]
        result["inception_score"] = measure_inception_score(images, seed)
    else:
        for name, (_, labels) in tools.judges.items():
            logits, requested = images.rows[name][:], requested_labels(images.captions, labels, images.table)
            result["alignment"][name], hits = measure_apr(images, requested, labels, logits, seed)
            if len(result["alignment"]) == 1:  # the first judge
                aligned = columns["aligned"] = hits
                attributes = result["alignment"][name]["attributes"]
                result["label_accuracy"] = {label: attributes[label]["accuracy"].value for label in labels}
            columns |= {f"{name}_{label}": expit(logits[:, i]) for i, label in enumerate(labels)}
    if quality:
        result["quality"], own_columns = measure_quality(images, real, quality, seed)
        columns |= own_columns
    if structure := measure_pairs(images, ("SSIM", "MS_SSIM", "MS_SSIM_within"), seed):
        result["structure"] = structure
    result["perception"] = measure_pairs(images, ("LPIPS", "LPIPS_within"), seed, share=True)
    if "LPIPS" in images.pairs:
        (indices, _), values = images.pairs["LPIPS"][0].T, images.pairs["LPIPS"][1]
        paired = groups[indices]
        means = {images.all_captions[g]: float(values[paired == g].mean()) for g in np.unique(paired)}
        result |= {"LPIPS_by_prompt": means, "LPIPS_pairs": len(values)}
        by_image = dict(zip(indices.tolist(), values.tolist(), strict=True))
        columns["lpips"] = [by_image.get(index) for index in range(len(images))]
    for name in tools.extractors:
        result["diversity"][name] = within_prompt_diversity(images.rows[name], groups, context.per_group, seed)
    if real:
        result["fidelity"] = {name: measure_fidelity(name, real, images, parts, seed) for name in tools.extractors}
    measures = {"aligned": aligned}
    if train:
        neighbours = {name: find_neighbours(name, images, train) for name in context.spaces}
        copied = copies(images, train)  # of the pixels, the same in every space
        result["memorisation"] = {
            name: {"copies": int(copied.sum())}
            | measure_memorisation(name, images, train, near, context.baseline.get(name), seed)
            for name, near in neighbours.items()
        }
        distances, indices = neighbours[context.spaces[0]]
        columns["nearest_train"] = [str(train.paths[i]) for i in indices]
        columns |= {"train_distance": distances, "thumbnail_distance": neighbours[THUMBNAILS.name][0]}
        columns["copy_of_train"] = copied.astype(int)
        if (threshold := result["memorisation"][context.spaces[0]].get("threshold")) is not None:
            measures["closer"] = distances < threshold
    facts = set_facts(images, {"real": sets.real, "training": train}) if parts else {}
    return Folder(images, result, facts, rewards, columns, measures)


def summarise(folders: Sequence[Folder], fid_part: str, real: ImageSet | None, context: Context) -> dict:
    """Return a model's part of metrics.json: headlines (FID of `fid_part`), combined folders, groups of images."""
    result = combine([folder.result for folder in folders])
    images, space = [folder.images for folder in folders], context.spaces[0]
    if images[0].names:
        values = {name: np.concatenate([folder.values[name] for folder in folders]) for name in folders[0].values}
        result["groups"] = {c: measure_groups(images, real, c, space, values, context.seed) for c in images[0].names}
    judge = next(iter(result["alignment"].values()))
    name = "APR" if context.key == "APR" else "fundus_alignment"
    inception = ("fidelity", "inception", fid_part)
    paths = {"FID": (*inception, "FID"), "KID": (*inception, "KID"), "LPIPS": ("perception", "LPIPS")}
    paths |= {"reward": ("rewards",), "FD_judge": ("fidelity", "judge", "matched", "FID")}
    headline = {key: getattr(dig(result, *path), "value", None) for key, path in paths.items()}
    by_prompt = {caption: estimate.value for caption, estimate in judge["by_prompt"].items()}
    return {name: judge[context.key].value} | headline | {f"{name}_by_prompt": by_prompt, "LPIPS_pairs": 0} | result


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
        runs, counts, bounds = mean_over_runs(values), [part.n for part in parts], BOUNDS.get(name, (0, 1))
        ends = [None if end is None else float(np.clip(end, *bounds)) for end in (runs.low, runs.high)]
        return Estimate(runs.value, *ends, min(counts) if of_set else sum(counts), runs.how)
    if isinstance(first, list):  # the closest pairs
        return sorted((entry for part in parts for entry in part), key=lambda entry: entry["distance"])[: len(first)]
    if isinstance(first, int):
        return min(parts) if of_set else sum(parts)
    return None if first is None else statistics.fmean(part for part in parts if part is not None)


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
    networks = [*tools.extractors.values(), *tools.statistics.values(), *tools.pairs.values()]
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
        "missing": tools.missing | sets.missing,
        "sets": {name: set_facts(images, {}) for name, images in (("real", real), ("train", sets.train)) if images},
        "warnings": find_warnings(context, models, len(real_part)),
        "models": {},
        "fid_part": fid_part,
    }
    if not real:
        result["missing"]["FID, KID, LPIPS to real images"] = "metric.real_path is empty"
    elif sets.train:
        result["sets"]["real"]["near_copies_of_training_images"] = int(context.near_copies.sum())
    for name, folders in models.items():
        counts = Counter(caption for folder in folders for caption in folder.images.captions)
        model = result["models"][name] = summarise(folders, fid_part, real, context) | {
            "folders": [folder.facts | {"made_with": dict(folder.images.made_with)} for folder in folders],
            "images_by_prompt": {caption: counts[caption] for caption in every[0].all_captions},
            "missing": {},
        }
        if not any(folders[0].result["diversity"].values()):
            model["missing"]["diversity"] = "no caption has two images in every folder"
        if real and not set(folders[0].images.captions) & set(real.captions):
            model["missing"] |= dict.fromkeys(("LPIPS", "fidelity"), "no caption is shared with the real images")
        if not any(folder.result["rewards"].n for folder in folders):
            model["missing"]["reward"] = folders[0].result["rewards"].how
        if reference:  # the judge's alignment of real images in the model's mix of captions, and the share covered
            held, hits = Counter(real.captions), reference.values["aligned"]
            weights = np.array([counts[caption] / held[caption] for caption in real.captions])
            model["ceiling"] = Estimate.missing("no real image of these captions")
            if weights.any():
                model["ceiling"] = bootstrap_ratio(weights * hits, weights, real.groups, seed)
            model["ceiling_share"] = sum(counts[caption] for caption in held) / counts.total()
    first, *others = models
    result["comparisons"] = [
        {"from": first, "to": name} | compare(models[first], models[name], seed, context.key) for name in others
    ]
    if reference:
        models = {"real": [reference]} | models
        result["real"] = summarise([reference], fid_part, None, context)
    return json.loads(json.dumps(result, default=Estimate.to_dict)), models


def write_per_image(path: Path, models: Mapping[str, Sequence[Folder]]) -> None:
    """Write a CSV with a line per image: model, folder, path, caption, seed, and the columns that any folder has."""
    measured = [(model, folder) for model, folders in models.items() for folder in folders]
    names, rows = list(dict.fromkeys(name for _, folder in measured for name in folder.columns)), []
    for model, folder in measured:
        images = folder.images
        for i, image in enumerate(images.paths):
            numbers = [folder.columns[name][i] if name in folder.columns else None for name in names]
            shown = [f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
            origin = [model, images.folder, image.relative_to(images.folder), images.captions[i]]
            rows.append([*origin, images.entry(i).get("seed"), *shown])
    write_table(path, ["model", "folder", "path", "caption", "seed", *names], rows)

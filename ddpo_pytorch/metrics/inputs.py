"""Inputs of metric.py from its configuration: folders by model, judges, feature networks."""

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from accelerate import Accelerator
from ml_collections import ConfigDict

from ddpo_pytorch.data.isic import ARTIFACTS, CAPTIONS, LABELS
from ddpo_pytorch.data.metadata import requested_labels
from ddpo_pytorch.data.sample_folder import list_samples
from ddpo_pytorch.metrics import networks
from ddpo_pytorch.metrics.feature_store import PIXELS, THUMBNAILS, Network
from ddpo_pytorch.metrics.image_sets import ImageSet, any_files, inspect_files, lacking_images, named_paths, shape_of
from ddpo_pytorch.metrics.image_statistics import SETS
from ddpo_pytorch.metrics.ssim import WINDOW
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import COUNT, OneOf, check_shape, read_json
from ddpo_pytorch.utils.settings import ONE_OR_MORE, check_choices, check_ranges

logger = logging.getLogger(__name__)

ESTIMATE = dict.fromkeys(("value", "low", "high"), OneOf((float, None))) | {"n": COUNT, "how": str}
EXTRACTORS = ("inception", "judge", *networks.ENCODERS)


def check_request(metric: ConfigDict) -> None:
    """Raise UserError for settings that are invalid or leave nothing to measure, before anything is computed."""
    given, judges = "--config.metric.classifier=FILE", "folder of train_rlhf.py, --config.metric.judges=DIR"
    if not metric.classifier and not metric.judges:
        raise UserError(f"metric.classifier is empty; give the H=4 judge, {given}, or for fundus images the {judges}")
    for name in ("classifier", "more_judges"):
        if metric.judges and metric[name]:
            both = f"metric.{name}={metric[name]!r} and metric.judges={metric.judges!r} are both given"
            raise UserError(f"{both}; empty the former for fundus images, the latter for dermoscopic ones")
    check_ranges(metric, {"batch_size": ONE_OR_MORE}, "metric.")
    check_choices(metric, {"fid": networks.FID_MODES}, "metric.")
    for chosen in metric.quality:
        check_choices({"quality": chosen}, {"quality": SETS}, "metric.")
    for chosen in metric.extractors:
        if chosen not in EXTRACTORS and not timm.is_model(chosen):
            raise UserError(f"metric.extractors has {chosen!r}; allowed are {', '.join(EXTRACTORS)} and timm's names")
    for name in ("output", "cache_dir"):
        folder = Path(metric[name])
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            reason = f"{str(existing)!r} is not a writable folder"
            raise UserError(f"metric.{name}={str(folder)!r} cannot be written: {reason}; choose another")
    read_results(metric.results)
    runs = named_paths(metric.logs, "metric.logs")
    names = [name for name, _ in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"metric.logs names several runs {repeated[0]!r}; give each run a name of its own")
    if empty := [run for _, run in runs if not (Path(run) / "metrics.jsonl").is_file()]:
        raise UserError(f"{empty[0]!r} in metric.logs holds no metrics.jsonl; give run folders that train.py wrote")


def read_results(files: str) -> dict[str, dict]:
    """Return the contents of comma-separated JSON files of membership.py or rate.py by path, or raise UserError."""
    contents = {}
    for path in filter(None, (piece.strip() for piece in files.split(","))):
        if not Path(path).is_file():
            raise UserError(f"metric.results names {path!r}, which does not exist; run membership.py or rate.py")
        advice = "give files of membership.py or rate.py as metric.results"
        contents[path] = read_json(path, {"title": str}, advice)
        _check_estimates(contents[path], repr(path), advice)
    return contents


def _check_estimates(tree: Any, source: str, advice: str) -> None:
    """Raise UserError for an estimate in `tree` (any dict with "how") that is none, and for numbers not in JSON."""
    if isinstance(tree, dict) and "how" in tree:
        check_shape(tree, ESTIMATE, source, advice)
    elif isinstance(tree, dict | list):
        fields = tree if isinstance(tree, dict) else {str(number): value for number, value in enumerate(tree)}
        check_shape(fields, {name: float for name, value in fields.items() if isinstance(value, float)}, source, advice)
        for value in fields.values():
            _check_estimates(value, source, advice)


@dataclass
class Sets:
    """Image sets of a report: folders by model; real images, training images and SSIM partners, each or None."""

    models: dict[str, list[ImageSet]]
    real: ImageSet | None
    train: ImageSet | None
    pairs: ImageSet | None = None
    missing: dict[str, str] = field(default_factory=dict)  # models without a folder, and why

    @property
    def folders(self) -> list[ImageSet]:
        """The folders of all models."""
        return [images for folders in self.models.values() for images in folders]


def find_sets(metric: ConfigDict, accelerator: Accelerator) -> Sets:
    """Find, check and hash all files of the request: models of `folders`, or else of compare_path and fake_path.

    Raises UserError as `inspect_files` and `list_samples` do. Models whose folder does not exist are `missing`.
    """
    prompts, main = list(metric.prompts), accelerator.is_main_process
    models, missing = {}, {}
    for name, folder in named_paths(metric.folders, "metric.folders"):
        models.setdefault(name, []).append(folder)
    if not metric.folders:
        if not metric.fake_path:
            raise UserError("metric.fake_path is empty; give eval.py's folder, --config.metric.fake_path=DIR")
        if metric.compare_path and not Path(metric.compare_path).exists():
            missing[metric.compare_name] = f"metric.compare_path={metric.compare_path!r} does not exist"
        elif metric.compare_path:
            if metric.compare_name == metric.fake_name:
                raise UserError(f"metric.compare_name and metric.fake_name are both {metric.fake_name!r}; rename one")
            models[metric.compare_name] = [metric.compare_path]
        models[metric.fake_name] = [metric.fake_path]
    if taken := sorted(models.keys() & {"real", "train"}):
        raise UserError(f"a model is named {taken[0]!r}, which stands for the {taken[0]} images; rename it")
    if main:
        for name, reason in missing.items():
            logger.warning("%s is not measured: %s", name, reason)
    given = {role: metric[f"{role}_path"] for role in ("real", "train", "pairs") if metric[f"{role}_path"]}
    folders = [(Path(folder), list_samples(folder, prompts)) for group in models.values() for folder in group]
    others = [
        any_files(folder) if role == "train" else (Path(folder), list_samples(folder, prompts))
        for role, folder in given.items()
    ]
    if unknown := set(prompts) - {*CAPTIONS, *(caption for _, samples in folders for _, caption in samples)}:
        raise UserError(f"no folder has images of {min(unknown)!r} in metric.prompts; give prompts that were sampled")
    sets = inspect_files([*others, *folders], accelerator.process_index, accelerator.num_processes, prompts)
    by_role, rest = dict(zip(given, sets, strict=False)), iter(sets[len(given) :])
    if main and "pairs" in given and by_role["pairs"].lacking:
        logger.warning("%s", lacking_images(by_role["pairs"].folder, by_role["pairs"].lacking))
    measured = [images for role, images in by_role.items() if role == "real"] + sets[len(given) :]
    known = sorted({column for images in measured for row in images.table for column in row})
    if unknown := set(metric.groups) - set(known):
        raise UserError(f"metric.groups has {min(unknown)!r}; columns of metadata.csv are {', '.join(known) or 'none'}")
    by_name = {name: [next(rest) for _ in group] for name, group in models.items()}
    for name, group in by_name.items():
        seen: dict[str, ImageSet] = {}
        for images in group:
            if (twin := seen.setdefault(images.describe()["sha256"], images)) is not images:
                raise UserError(f"{str(images.folder)!r} and {str(twin.folder)!r} of {name!r} hold the same images")
    return Sets(by_name, by_role.get("real"), by_role.get("train"), by_role.get("pairs"), missing)


@dataclass
class Tools:
    """Networks of a report, and reasons for `missing` ones. Judges have labels or, for fundus images, a `threshold`."""

    judges: dict[str, tuple[Network, tuple[str, ...]]]
    threshold: float | None = None
    extractors: dict[str, Network] = field(default_factory=dict)
    statistics: dict[str, Network] = field(default_factory=dict)  # image statistics, and Inception's logits
    pairs: dict[str, Network] = field(default_factory=dict)  # of two images: LPIPS, SSIM and MS-SSIM if measured
    missing: dict[str, str] = field(default_factory=dict)


def load_tools(metric: ConfigDict, accelerator: Accelerator, sets: Sets) -> Tools:
    """Load all available networks. Raises UserError for wrong files, and for images without the judges' labels."""
    device, side = accelerator.device, min(shape_of(sets.folders[0]))
    if metric.judges:
        selector, policy, features, threshold = networks.fundus_judges(metric.judges, device)
        tools = Tools({judge.name: (judge, ()) for judge in (selector, policy)}, threshold)
    else:
        logits, features, labels = networks.judge_network(metric.classifier, device)
        if labels == LABELS:
            heads = f"has {len(labels)} heads ({', '.join(labels)}); APR is judged by the four {', '.join(ARTIFACTS)}"
            other = "Others go into --config.metric.more_judges=NAME=FILE"
            raise UserError(f"metric.classifier={metric.classifier!r} {heads}. {other}")
        tools = Tools({logits.name: (logits, labels)})
        for name, path in named_paths(metric.more_judges, "metric.more_judges"):
            if name in (*tools.judges, *EXTRACTORS, PIXELS.name, THUMBNAILS.name, "lpips"):
                raise UserError(f"metric.more_judges names a judge {name!r}, which is taken; rename it")
            network, _, labels = networks.judge_network(path, device, name)
            tools.judges[name] = network, labels
        for images in [*sets.folders, *filter(None, [sets.real])]:
            for _, labels in tools.judges.values():
                requested_labels(images.captions, labels, images.table)
    tools.statistics |= {name: networks.quality_network(name) for name in metric.quality}
    for name, wanted in (("ssim", metric.pairs_path), ("ms_ssim", metric.judges)):
        if wanted and side < WINDOW:
            reason = f"images of {side} px are smaller than its window of {WINDOW}"
            tools.missing[name.upper().replace("_", "-")] = reason
        elif wanted:
            tools.pairs[name] = networks.similarity_network(name, side)
    inception = partial(networks.inception_network, metric.inception, metric.fid, device)
    loaders = {name: partial(networks.encoder_network, name, metric.encoders, device) for name in metric.extractors}
    loaders |= {"inception": inception, "judge": lambda: features}
    wanted = [
        (f"FID, KID, precision ... ({name})", tools.extractors, name, loaders[name]) for name in metric.extractors
    ]
    wanted.append(("LPIPS", tools.pairs, "lpips", partial(networks.lpips_network, metric.alexnet, device)))
    if metric.judges and "inception" in metric.extractors:
        wanted.append(("inception score", tools.statistics, "logits", partial(inception, layer="logits_unbiased")))
    with accelerator.main_process_first():  # one process downloads, the others find the file
        for title, group, name, load in wanted:
            try:
                group[name] = load()
            except networks.Unavailable as error:
                tools.missing[title] = str(error)
                logger.info("%s: n/a, %s", title, error)
    return tools

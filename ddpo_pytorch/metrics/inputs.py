"""Inputs of metric.py from its configuration: folders by model, judges, feature networks."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

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
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.settings import ONE_OR_MORE, check_choices, check_ranges

logger = logging.getLogger(__name__)

EXTRACTORS = ("inception", "judge", *networks.ENCODERS)
OTHER_NETWORKS = (*EXTRACTORS, PIXELS.name, THUMBNAILS.name, "lpips")
RESERVED = ("real", "train")


def check_request(metric: ConfigDict) -> None:
    """Raise UserError for settings that are invalid or leave nothing to measure, before anything is computed."""
    if not metric.classifier and not metric.judges:
        raise UserError(
            "metric.classifier is empty; give the H=4 judge, --config.metric.classifier=FILE, or for fundus images the "
            "folder of train_rlhf.py, --config.metric.judges=DIR"
        )
    for name in ("classifier", "more_judges"):
        if metric.judges and metric[name]:
            raise UserError(
                f"metric.{name}={metric[name]!r} and metric.judges={metric.judges!r} are both given; empty one: "
                "classifiers judge dermoscopic images, Selector and Policy judge fundus images"
            )
    check_ranges(metric, {"batch_size": ONE_OR_MORE}, "metric.")
    check_choices(metric, {"fid": networks.FID_MODES}, "metric.")
    for chosen in metric.quality:
        check_choices({"quality": chosen}, {"quality": tuple(SETS)}, "metric.")
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
    if repeated := [name for name, count in Counter(name for name, _ in runs).items() if count > 1]:
        raise UserError(f"metric.logs names several runs {repeated[0]!r}; give each run a name of its own")
    for _, run in runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            raise UserError(f"{run!r} in metric.logs holds no metrics.jsonl; give run folders that train.py wrote")


def read_results(files: str) -> dict[str, dict]:
    """Return the contents of comma-separated JSON files of membership.py or rate.py by path, or raise UserError."""
    contents = {}
    for path in filter(None, (piece.strip() for piece in files.split(","))):
        if not Path(path).is_file():
            raise UserError(f"metric.results names {path!r}, which does not exist; run membership.py or rate.py")
        contents[path] = read_json(path, {"title": str}, "give files of membership.py or rate.py as metric.results")
    return contents


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


def requested_models(metric: ConfigDict) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return folders by model, those in `folders` or else compare_path and fake_path, and why a model is missing."""
    models: dict[str, list[str]] = {}
    missing = {}
    for name, folder in named_paths(metric.folders, "metric.folders"):
        models.setdefault(name, []).append(folder)
    if not metric.folders:
        if not metric.fake_path:
            raise UserError("metric.fake_path is empty; give eval.py's folder, --config.metric.fake_path=DIR")
        if metric.compare_path and Path(metric.compare_path).exists():
            if metric.compare_name == metric.fake_name:
                raise UserError(f"metric.compare_name and metric.fake_name are both {metric.fake_name!r}; rename one")
            models[metric.compare_name] = [metric.compare_path]
        elif metric.compare_path:
            missing[metric.compare_name] = f"metric.compare_path={metric.compare_path!r} does not exist"
        models[metric.fake_name] = [metric.fake_path]
    for name in RESERVED:
        if name in models:
            raise UserError(f"a model is named {name!r}, which stands for the {name} images; rename it")
    return models, missing


def find_sets(metric: ConfigDict, accelerator: Accelerator) -> Sets:
    """Find, check and hash all files of the request. Raises UserError as `inspect_files` and `list_samples` do."""
    prompts = list(metric.prompts)

    def samples_of(folder: str) -> tuple[Path, list]:
        return Path(folder), list_samples(folder, prompts)

    models, missing = requested_models(metric)
    if accelerator.is_main_process:
        for name, reason in missing.items():
            logger.warning("%s is not measured: %s", name, reason)
    folders = [samples_of(folder) for group in models.values() for folder in group]
    real = [samples_of(metric.real_path)] if metric.real_path else []
    train = [any_files(metric.train_path)] if metric.train_path else []
    pairs = [samples_of(metric.pairs_path)] if metric.pairs_path else []
    if unknown := set(prompts) - {*CAPTIONS, *(caption for _, samples in folders for _, caption in samples)}:
        raise UserError(f"no folder has images of {min(unknown)!r} in metric.prompts; give prompts that were sampled")
    rank, processes = accelerator.process_index, accelerator.num_processes
    sets = inspect_files([*real, *train, *pairs, *folders], rank, processes, prompts)
    real_set, train_set, pair_set = (sets.pop(0) if given else None for given in (real, train, pairs))
    if pair_set is not None and pair_set.lacking and rank == 0:
        logger.warning("%s", lacking_images(pair_set.folder, pair_set.lacking))
    known = {column for images in [*sets, *filter(None, [real_set])] for row in images.table for column in row}
    if unknown := set(metric.groups) - known:
        raise UserError(
            f"metric.groups has {min(unknown)!r}; columns of metadata.csv are {', '.join(sorted(known)) or 'none'}"
        )
    rest = iter(sets)
    by_name = {name: [next(rest) for _ in group] for name, group in models.items()}
    for name, group in by_name.items():
        seen: dict[str, ImageSet] = {}
        for images in group:
            twin = seen.setdefault(images.describe()["sha256"], images)
            if twin is not images:
                raise UserError(f"{str(images.folder)!r} and {str(twin.folder)!r} of {name!r} hold the same images")
    return Sets(by_name, real_set, train_set, pair_set, missing)


@dataclass
class Tools:
    """Networks of a report, and reasons for `missing` ones. Judges have labels or, for fundus images, a `threshold`."""

    judges: dict[str, tuple[Network, tuple[str, ...]]]
    threshold: float | None = None
    extractors: dict[str, Network] = field(default_factory=dict)
    statistics: list[Network] = field(default_factory=list)  # image statistics, and Inception's logits
    pairs: dict[str, Network] = field(default_factory=dict)  # of two images: LPIPS, SSIM and MS-SSIM if measured
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def optional(self, title: str) -> Iterator[None]:
        """Continue without a network whose weights are unavailable, recording the reason in `missing[title]`."""
        try:
            yield
        except networks.Unavailable as error:
            self.missing[title] = str(error)
            logger.info("%s: n/a, %s", title, error)


def load_tools(metric: ConfigDict, accelerator: Accelerator, sets: Sets) -> Tools:
    """Load all available networks. Raises UserError for wrong files, and for images without the judges' labels."""
    device, side = accelerator.device, min(shape_of(sets.folders[0]))
    if metric.judges:
        selector, policy, features, threshold = networks.fundus_judges(metric.judges, device)
        tools = Tools({judge.name: (judge, ()) for judge in (selector, policy)}, threshold)
    else:
        tools, features = _load_classifiers(metric, device)
        for images in [*sets.folders, *filter(None, [sets.real])]:
            for _, labels in tools.judges.values():
                requested_labels(images.captions, labels, images.table)
    tools.statistics += [networks.quality_network(name) for name in metric.quality]
    for name, wanted in (("ssim", metric.pairs_path), ("ms_ssim", metric.judges)):
        if wanted and side < WINDOW:
            title = name.upper().replace("_", "-")
            tools.missing[title] = f"images of {side} px are smaller than its window of {WINDOW}"
        elif wanted:
            tools.pairs[name] = networks.similarity_network(name, side)
    inception = partial(networks.inception_network, metric.inception, metric.fid, device)
    loaders = {name: partial(networks.encoder_network, name, metric.encoders, device) for name in metric.extractors}
    loaders |= {"inception": inception, "judge": lambda: features}
    with accelerator.main_process_first():  # one process downloads, the others find the file
        for name in metric.extractors:
            with tools.optional(f"FID, KID, precision ... ({name})"):
                tools.extractors[name] = loaders[name]()
        with tools.optional("LPIPS"):
            tools.pairs["lpips"] = networks.lpips_network(metric.alexnet, device)
        if metric.judges and "inception" in metric.extractors:
            with tools.optional("inception score"):
                tools.statistics.append(inception(layer="logits_unbiased"))
    return tools


def _load_classifiers(metric: ConfigDict, device) -> tuple[Tools, Network]:
    logits, features, labels = networks.judge_network(metric.classifier, device)
    if labels == LABELS:
        raise UserError(
            f"metric.classifier={metric.classifier!r} has {len(labels)} heads ({', '.join(labels)}); APR is judged by "
            f"the four {', '.join(ARTIFACTS)}. Others go into --config.metric.more_judges=NAME=FILE"
        )
    judges = {logits.name: (logits, labels)}
    for name, path in named_paths(metric.more_judges, "metric.more_judges"):
        if name in (*judges, *OTHER_NETWORKS):
            raise UserError(f"metric.more_judges names a judge {name!r}, which is taken; rename it")
        network, _, judge_labels = networks.judge_network(path, device, name)
        judges[name] = (network, judge_labels)
    return Tools(judges), features

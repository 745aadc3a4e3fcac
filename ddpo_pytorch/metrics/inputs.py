"""What a configuration asks metric.py for: folders by model, judges, feature networks."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from ddpo_pytorch.data.isic import ARTIFACTS, CAPTIONS
from ddpo_pytorch.data.sample_folder import caption_of_folder
from ddpo_pytorch.metrics.feature_store import PIXELS, THUMBNAILS, Network
from ddpo_pytorch.metrics.fundus_networks import FundusJudges, fundus_judges, quality_network, structure_networks
from ddpo_pytorch.metrics.image_sets import ImageSet, any_files, caption_files, inspected, named_paths
from ddpo_pytorch.metrics.image_statistics import SETS
from ddpo_pytorch.metrics.networks import (
    FID_MODES,
    Unavailable,
    dinov2_network,
    inception_network,
    judge_network,
    lpips_network,
)
from ddpo_pytorch.metrics.ssim import WINDOW
from ddpo_pytorch.metrics.vocabulary import lacking_images
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import ONE_OR_MORE, check_choices, check_ranges

logger = logging.getLogger(__name__)

EXTRACTORS = ("inception", "judge", "dinov2")
OTHER_NETWORKS = (*EXTRACTORS, PIXELS.name, THUMBNAILS.name, "lpips")
RESERVED = ("real", "train")
JUDGE = "H4"  # the name under which metric.classifier stands in metrics.json


@dataclass
class Sets:
    """Image sets of a report: models by name, each a list of folders; real and training images and SSIM's, or None."""

    models: dict[str, list[ImageSet]]
    real: ImageSet | None
    train: ImageSet | None
    pairs: ImageSet | None = None


@dataclass
class Tools:
    """Networks of a report: judges by name with their labels, feature extractors, LPIPS; what is missing, and why.

    Of fundus images `fundus` holds the judges, without labels, and `statistics` the networks of image statistics and
    Inception's logits. `structure`: SSIM and MS-SSIM, as far as they are taken.
    """

    judges: dict[str, tuple[Network, tuple[str, ...]]]
    extractors: dict[str, Network] = field(default_factory=dict)
    lpips: Network | None = None
    missing: dict[str, str] = field(default_factory=dict)
    fundus: FundusJudges | None = None
    statistics: list[Network] = field(default_factory=list)
    structure: dict[str, Network] = field(default_factory=dict)

    @property
    def networks(self) -> list[Network]:
        """Those of a single image."""
        judges = [judge for judge, _ in self.judges.values()]
        return [PIXELS, THUMBNAILS, *judges, *self.extractors.values(), *self.statistics]


def check_request(metric: ConfigDict) -> None:
    """Raise UserError for a setting without which nothing can be measured, or that is not allowed."""
    _check_judges(metric)
    check_ranges(metric, {"batch_size": ONE_OR_MORE}, "metric.")
    check_choices(metric, {"fid": FID_MODES}, "metric.")
    for name in ("output", "cache_dir"):  # told before anything is computed
        _check_writable(Path(metric[name]), f"metric.{name}")
    for _, run in named_paths(metric.logs, "metric.logs"):
        if not (Path(run) / "metrics.jsonl").is_file():
            raise UserError(f"{run!r} in metric.logs holds no metrics.jsonl; give run folders that train.py wrote")
    for name in metric.extractors:
        if name not in EXTRACTORS:
            raise UserError(f"metric.extractors has {name!r}; allowed are {', '.join(EXTRACTORS)}")


def _check_judges(metric: ConfigDict) -> None:
    if not metric.classifier and not metric.judges:
        raise UserError(
            "metric.classifier is empty; give the H=4 judge, --config.metric.classifier=FILE, or for fundus images the "
            "folder of train_rlhf.py, --config.metric.judges=DIR"
        )
    if metric.classifier and metric.judges:
        raise UserError(
            f"metric.classifier={metric.classifier!r} and metric.judges={metric.judges!r} are both given; empty one of "
            "them: the classifier judges dermoscopic images, Selector and Policy judge fundus images"
        )
    if metric.judges and metric.more_judges:
        raise UserError(
            f"metric.more_judges={metric.more_judges!r} are classifiers of dermoscopic images, and metric.judges is "
            "given; empty one of them"
        )
    for name in metric.quality:
        if name not in SETS:
            raise UserError(f"metric.quality has {name!r}; allowed are {', '.join(SETS)}")


def _check_writable(folder: Path, name: str) -> None:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{name}={str(folder)!r} cannot be written ({str(place)!r} is no folder to write into)")


def requested_models(metric: ConfigDict) -> dict[str, list[str]]:
    """Folders by model: those of `folders`, else compare_path (where it holds samples) and fake_path."""
    if metric.folders:
        models: dict[str, list[str]] = {}
        for name, folder in named_paths(metric.folders, "metric.folders"):
            if Path(folder).resolve() in [Path(one).resolve() for one in models.setdefault(name, [])]:
                raise UserError(f"metric.folders gives {folder!r} twice for {name!r}; give each folder once")
            models[name].append(folder)
        return _check_names(models)
    if not metric.fake_path:
        raise UserError("metric.fake_path is empty; give the folder that eval.py wrote, --config.metric.fake_path=DIR")
    models = {metric.fake_name: [metric.fake_path]}
    if metric.compare_path and (Path(metric.compare_path) / "images").is_dir():
        if metric.compare_name == metric.fake_name:
            raise UserError(f"metric.compare_name and metric.fake_name are both {metric.fake_name!r}; name them apart")
        models = {metric.compare_name: [metric.compare_path]} | models
    elif metric.compare_path:
        logger.info("%s is left out: there are no samples in %s", metric.compare_name, metric.compare_path)
    return _check_names(models)


def _check_names(models: dict[str, list[str]]) -> dict[str, list[str]]:
    for name in RESERVED:
        if name in models:
            raise UserError(f"a model is named {name!r}, which stands for the {name} images; name it otherwise")
    return models


def find_sets(metric: ConfigDict, accelerator: Accelerator) -> Sets:
    """All files of the request, checked and hashed (see `inspected`, whose errors it raises, and `list_samples`)."""
    prompts = list(metric.prompts)
    if not metric.judges:
        prompts = [caption_of_folder(prompt.replace(" ", "_")) for prompt in prompts]
    models = requested_models(metric)
    found = [caption_files(folder, prompts) for folders in models.values() for folder in folders]
    real = [caption_files(metric.real_path, prompts)] if metric.real_path else []
    train = [any_files(metric.train_path)] if metric.train_path else []
    pairs = [caption_files(metric.pairs_path, prompts)] if metric.pairs_path else []
    if metric.judges and (unknown := set(prompts) - {caption for _, samples in found for _, caption in samples}):
        raise UserError(
            f"no folder has images of {sorted(unknown)[0]!r} in metric.prompts; give prompts that were drawn"
        )
    rank, processes = accelerator.process_index, accelerator.num_processes
    sets = inspected([*real, *train, *pairs, *found], rank, processes, prompts)
    real_set, train_set, pair_set = (sets.pop(0) if one else None for one in (real, train, pairs))
    if not metric.judges and (others := sorted(set(sets[0].vocabulary) - set(CAPTIONS))):
        raise UserError(
            f"metric.classifier judges the 32 ISIC captions, and a folder has {others[0]!r}; give the folder of "
            "train_rlhf.py for fundus images, --config.metric.judges=DIR --config.metric.classifier="
        )
    if pair_set is not None and pair_set.lacking and rank == 0:
        logger.warning("%s", lacking_images(pair_set.folder, pair_set.lacking))
    rest = iter(sets)
    by_name = {name: [next(rest) for _ in folders] for name, folders in models.items()}
    for name, own in by_name.items():
        contents = [images.about()["sha256"] for images in own]
        for number, content in enumerate(contents):
            if content in contents[:number]:
                twin = own[contents.index(content)].folder
                raise UserError(f"{str(own[number].folder)!r} and {str(twin)!r} of {name!r} hold the same images")
    return Sets(by_name, real_set, train_set, pair_set)


def load_tools(metric: ConfigDict, accelerator: Accelerator, side: int) -> Tools:
    """The judges and every network whose weights are at hand, for images whose shorter side is `side` pixels.

    Raises UserError for a wrong file or judge.
    """
    tools, features = (_fundus_tools if metric.judges else _classifiers)(metric, accelerator.device)
    tools.statistics += [quality_network(SETS[name]) for name in metric.quality]
    _choose_structure(tools, metric, side)
    _load_others(tools, features, metric, accelerator)
    return tools


def _fundus_tools(metric: ConfigDict, device: torch.device) -> tuple[Tools, Network]:
    judges = fundus_judges(metric.judges, device)
    tools = Tools({judge.name: (judge, ()) for judge in (judges.selector, judges.policy)}, fundus=judges)
    return tools, judges.features


def _choose_structure(tools: Tools, metric: ConfigDict, side: int) -> None:
    wanted = [name for name, use in (("ssim", metric.pairs_path), ("ms_ssim", metric.judges)) if use]
    networks = structure_networks(side)
    for name in wanted:
        if side < WINDOW:
            tools.missing[name.upper().replace("_", "-")] = (
                f"images of {side} px are smaller than its window of {WINDOW}"
            )
        else:
            tools.structure[name] = networks[name]


def _classifiers(metric: ConfigDict, device: torch.device) -> tuple[Tools, Network]:
    logits, features, labels = judge_network(JUDGE, metric.classifier, device)
    if labels != ARTIFACTS:
        raise UserError(
            f"metric.classifier={metric.classifier!r} has {len(labels)} heads ({', '.join(labels)}); APR is judged by "
            f"the four {', '.join(ARTIFACTS)}. Others go into --config.metric.more_judges=NAME=FILE"
        )
    tools = Tools({JUDGE: (logits, labels)})
    for name, path in named_paths(metric.more_judges, "metric.more_judges"):
        if name in (*tools.judges, *OTHER_NETWORKS):
            raise UserError(f"metric.more_judges names a judge {name!r}, which is taken; name it otherwise")
        network, _, judge_labels = judge_network(name, path, device)
        tools.judges[name] = (network, judge_labels)
    return tools, features


def _load_others(tools: Tools, features: Network, metric: ConfigDict, accelerator: Accelerator) -> None:
    """Feature extractors, LPIPS and, for the inception score of fundus images, Inception's logits."""
    device = accelerator.device
    loaders: dict[str, tuple[str, Callable[[], Network]]] = {
        "inception": (
            "FID, KID, precision ... (inception)",
            lambda: inception_network(metric.inception, metric.fid, device),
        ),
        "dinov2": ("FID, KID, precision ... (dinov2)", lambda: dinov2_network(metric.dinov2, device)),
        "judge": ("", lambda: features),
    }
    with accelerator.main_process_first():  # one process downloads, the others find the file
        for name in metric.extractors:
            title, load = loaders[name]
            tools.extractors |= {name: network} if (network := _attempt(tools, title, load)) else {}
        tools.lpips = _attempt(tools, "LPIPS", lambda: lpips_network(metric.alexnet, device))
        if tools.fundus is not None and "inception" in metric.extractors:
            logits = partial(inception_network, metric.inception, metric.fid, device, "logits_unbiased")
            tools.statistics += [network] if (network := _attempt(tools, "inception score", logits)) else []


def _attempt(tools: Tools, title: str, load: Callable[[], Network]) -> Network | None:
    try:
        return load()
    except Unavailable as error:
        tools.missing[title] = str(error)
        logger.info("%s: n/a, %s", title, error)
        return None

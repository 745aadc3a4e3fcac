"""Rounds of improvement: each changes the generator, measures it, and stops the run if the generator has collapsed.

Judges that did not choose any training images score images from fixed noise, so that rounds differ only in the
generator. Kernel distance to real images and diversity reveal when scores rise only because images exploit the judges.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict

from ddpo_pytorch.data.fundus import load_split
from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.generator.finetune_data import settings_of
from ddpo_pytorch.generator.pipeline import image_size, load_pipeline
from ddpo_pytorch.generator.text import check_tokens, has_mask
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.policy import DESCRIPTION as POLICY
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, Policy, load_judges
from ddpo_pytorch.judges.selector import DESCRIPTION, Selector
from ddpo_pytorch.judges.vit import read_judge
from ddpo_pytorch.metrics.fidelity import kernel_distance
from ddpo_pytorch.metrics.ssim import ms_ssim
from ddpo_pytorch.phantoms.damage import has_one_disc, vessel_contrast
from ddpo_pytorch.prompts import all_prompts, given_prompts
from ddpo_pytorch.rlhf.training import PATHS
from ddpo_pytorch.sampling import Sampler, plan
from ddpo_pytorch.training import run_folder
from ddpo_pytorch.training.setup import content_fingerprints, load_policy, make_task, try_reward
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints, with_contents
from ddpo_pytorch.utils.json_files import COUNT, parse_json
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number

CONTENTS = ("judges", "held_out_judges", "csv", "held_out_csv")  # compared by content, not by path
SAMPLE = ("scheduler", "num_steps", "eta", "guidance_scale")
FINETUNING = ("num_steps", "batch_size", "learning_rate", "ema_decay", "real_share")  # also of improve
KID_IMAGES = 4  # of real and of drawn images, for a standard error of KID
FREE = ("output", "rounds", "control_guidance")  # do not affect a round


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of a generator: means over `images` images.

    alignment is [selector >= threshold] * policy, scores are in [0, 1]; kid is the kernel distance to real images in
    the Selector's features; ms_ssim, between neighbouring images of a prompt, is higher for more similar ones. `guards`
    are distances to real images that are independent of the judges, by title, each with its standard error.
    """

    alignment: float
    selector: float
    pass_rate: float
    policy: float
    kid: float
    kid_error: float
    ms_ssim: float
    images: int
    guards: dict[str, list[float]]

    def cells(self) -> dict[str, str]:
        """Return the metrics as text by title, in the order of the table."""
        return {
            "held-out score": f"{self.alignment:.3f}",
            "passed": f"{self.pass_rate:.1%}",
            "selector": f"{self.selector:.3f}",
            "policy": f"{self.policy:.3f}",
            "KID (Selector's features)": f"{self.kid:.3g} ± {self.kid_error:.2g}",
            "MS-SSIM": f"{self.ms_ssim:.3f}",
            **{title: f"{value:.3g} ± {error:.2g}" for title, (value, error) in self.guards.items()},
            "images": str(self.images),
        }


SHAPE = dict.fromkeys(RoundMetrics.__dataclass_fields__, float) | {"guards": {str: (float, float)}}


@torch.no_grad()
def features_of(network: Selector | ArtifactClassifier, images: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return pooled features (N, D) of uint8 images (N, 3, H, W)."""
    device, parts = next(network.parameters()).device, []
    for part in images.split(batch_size):
        pixels = part.to(device).float() / 255
        if isinstance(network, ArtifactClassifier):
            parts.append(network.features(pixels))
        else:
            parts.append(network.encoder(network.preprocess(pixels)))
    return torch.cat(parts).float().cpu().numpy()


class Guards:
    """Distances of images to real ones that are independent of the judges.

    KID in the features of `network`, a timm backbone, if given; and for fundus images (`anatomy`) the differences in
    mean vessel contrast and in the share with exactly one optic disc, in standard deviations of the real images.
    """

    def __init__(
        self, real: torch.Tensor, network: ArtifactClassifier | None, anatomy: bool, seed: int, batch_size: int
    ):
        self.network, self.seed, self.batch_size = network, seed, batch_size
        self.features = network and features_of(network, real, batch_size)
        self.measures = {"vessels": vessel_contrast, "one disc": has_one_disc} if anatomy else {}
        self.real = {title: self._values(title, real) for title in self.measures}

    def __call__(self, images: torch.Tensor) -> dict[str, list[float]]:
        distances = {}
        if self.network:
            features = features_of(self.network, images, self.batch_size)
            distances[f"KID ({self.network.arch})"] = [*_kid(self.features, features, self.seed)]
        for title, real in self.real.items():
            values, scale = self._values(title, images), max(real.std(), 1e-3)
            error = values.std() / scale / len(values) ** 0.5
            distances[f"{title} (sd from real)"] = [abs(values.mean() - real.mean()) / scale, error]
        return distances

    def _values(self, title: str, images: torch.Tensor) -> np.ndarray:
        """Return a measure of the anatomy (N,) for uint8 images (N, 3, H, W)."""
        return np.array([self.measures[title](image) for image in images.permute(0, 2, 3, 1).numpy()], float)


def _kid(real: np.ndarray, features: np.ndarray, seed: int) -> tuple[float, float]:
    """Return KID of features (M, D) and (N, D) and its standard error. Raises UserError if it has none."""
    distance = kernel_distance(real, features, seed)
    if distance.high is None:  # with an error of 0, any rise of KID would count as a collapse
        problem = f"KID of {len(features)} drawn and {len(real)} real images has no standard error"
        advice = "raise improve.held_out_images, or give more images in improve.held_out_csv"
        raise UserError(f"{problem}; it needs {KID_IMAGES} of each: {advice}")
    return distance.value, (distance.high - distance.low) / (2 * 1.96)


def draw_fixed(sampler: Sampler, prompts: Sequence[str], count: int, seed: int, batch_size: int) -> torch.Tensor:
    """Sample `count` uint8 images per prompt, in order, from noise that depends on (seed, prompt, index) only.

    Raises UserError if an image is not finite.
    """
    jobs, parts = [(prompt, index) for prompt in prompts for index in range(count)], []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        texts = [prompt for prompt, _ in batch]
        images = sampler(texts, [derived_seed(seed, Stream.HELD_OUT, text_number(text), n) for text, n in batch])
        if not images.isfinite().all():
            raise UserError(f"an image in the batch of {texts[0]!r} is not finite; lower improve.learning_rate")
        parts.append(to_uint8(images).cpu())
    return torch.cat(parts)


def assess(
    images: torch.Tensor,
    prompts: Sequence[str],
    selector: Selector,
    policy: Policy,
    real: np.ndarray,
    seed: int,
    batch_size: int,
    guards: Callable[[torch.Tensor], dict[str, list[float]]] = lambda images: {},
) -> RoundMetrics:
    """Return the metrics of uint8 images (N, 3, H, W) with N prompts, where equal prompts are adjacent.

    `real`: the Selector's features (M, D) of real images; `guards`: such as `Guards`. Raises UserError for fewer than 4
    images of either.
    """
    quality, aligned = [], []
    for indices in torch.arange(len(images)).split(batch_size):
        pixels = images[indices].float() / 255
        quality.append(selector.score(pixels).cpu())
        aligned.append(policy.score(pixels, [prompts[index] for index in indices.tolist()]).cpu())
    quality, aligned = torch.cat(quality).double(), torch.cat(aligned).double()
    passed = selector.accepts(quality).double()
    kid, kid_error = _kid(real, features_of(selector, images, batch_size), seed)
    pairs = torch.tensor([i for i in range(1, len(prompts)) if prompts[i] == prompts[i - 1]])
    similar = [ms_ssim(images[part - 1].float() / 255, images[part].float() / 255) for part in pairs.split(batch_size)]
    return RoundMetrics(
        alignment=(passed * aligned).mean().item(),
        selector=quality.mean().item(),
        pass_rate=passed.mean().item(),
        policy=aligned.mean().item(),
        kid=kid,
        kid_error=kid_error,
        ms_ssim=torch.cat(similar).mean().item(),
        images=len(images),
        guards=guards(images),
    )


def check_independent(judges: str | Path, held_out_judges: str | Path) -> None:
    """Raise UserError if both folders hold the same Selector, or were trained on some of the same patients."""
    files, patients = [Path(folder) / SELECTOR_FILE for folder in (judges, held_out_judges)], []
    for file in files:  # stage 2 of the Policy may have had other ratings
        described = read_judge(file, "selector", DESCRIPTION), read_judge(file.with_name(POLICY_FILE), "policy", POLICY)
        patients.append({name for one, _ in described for name in one.get("origin", {}).get("patients", ())})
    common = patients[0] & patients[1]
    if sha256(files[0]) == sha256(files[1]) or common:
        reason = f"share {len(common)} patients with" if common else "are"
        problem = f"improve.held_out_judges {str(held_out_judges)!r} {reason} improve.judges {str(judges)!r}"
        advice = "train them on ratings of other patients (column `patient`)"
        raise UserError(f"{problem}; {advice}, so that they do not measure their own choices")


def collapse(history: Sequence[RoundMetrics], tolerance: float, kid_tolerance: float) -> str:
    """Return why the last of these rounds, the first being the initial generator, is a collapse, or "".

    A collapse is a held-out score more than `tolerance` below the best so far, KID or a guard more than `kid_tolerance`
    standard errors of the difference above its initial value, or 1 - MS-SSIM below half its initial value.
    """
    first, now, best = history[0], history[-1], max(metrics.alignment for metrics in history)
    if now.alignment < best - tolerance:
        return f"the held-out score fell to {now.alignment:.3f}, the best was {best:.3f}"
    pairs = {"KID to real images": ((first.kid, first.kid_error), (now.kid, now.kid_error))}
    pairs |= {title: (first.guards[title], now.guards[title]) for title in now.guards}
    for title, ((before, before_error), (value, value_error)) in pairs.items():
        error = math.hypot(before_error, value_error)
        if value > before + kid_tolerance * error:
            rise = f"{title} rose from {before:.4g} to {value:.4g}, by more than {kid_tolerance:g} standard errors"
            return f"{rise} ({error:.2g}) of the difference: the judges accept unrealistic images"
    if 1 - now.ms_ssim < (1 - first.ms_ssim) / 2:
        return f"images of a prompt became too similar: MS-SSIM rose from {first.ms_ssim:.3f} to {now.ms_ssim:.3f}"
    return ""


def best_round(history: Sequence[RoundMetrics], tolerance: float, kid_tolerance: float) -> int:
    """Return the number of the round with the highest score among those without a collapse."""
    sound = [n for n in range(len(history)) if not collapse(history[: n + 1], tolerance, kid_tolerance)]
    return max(sound, key=lambda n: history[n].alignment)


def read_history(path: Path) -> list[RoundMetrics]:
    """Return the metrics of rounds.jsonl, up to the first missing round."""
    measured: dict[int, RoundMetrics] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        where, advice = f"{str(path)!r} line {number}", "remove that line to measure its round again"
        entry = parse_json(line, SHAPE | {"round": COUNT}, where, advice)
        measured[entry["round"]] = RoundMetrics(**{name: entry[name] for name in SHAPE})
    return [measured[number] for number in itertools.takewhile(measured.__contains__, itertools.count())]


def method_fields(config: ConfigDict, method: str, judges: str | Path) -> dict[str, Any]:
    """Return the settings that rounds give to train_sd.py ("finetune") or to train.py ("ddpo", for these judges)."""
    if method == "ddpo":
        return {"reward_fn": "fundus_alignment", "reward_fn_kwargs.fundus_alignment.judges": str(judges)}
    fields = {"stage": "finetune", "kind": "fundus", "val_csv": "", "val_latents": ""}
    fields |= {name: config.improve[name] for name in ("csv", "data_path", *FINETUNING)}
    return {f"sd.{name}": value for name, value in fields.items()}


def config_of(config: ConfigDict, method: str) -> ConfigDict:
    """Return a copy of a configuration with `method_fields`, as the script of the method reads it in round 1."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(method_fields(config, method, config.improve.judges))
    return copy


def round_settings(config: ConfigDict, device: torch.device) -> dict[str, Any]:
    """Return what identifies the rounds of a folder: settings, and fingerprints of the files that they name.

    These are settings of all rounds and those that the scripts of the configured methods read. Loads what the scripts
    load, and so raises at once the UserErrors that they would raise hours later.
    """
    improve, pretrained = config.improve, config.pretrained
    ddpo = config_of(config, "ddpo") if "ddpo" in improve.methods else None
    settings = {f"improve.{name}": improve[name] for name in improve if name not in FREE + CONTENTS}
    settings |= {f"sample.{name}": config.sample[name] for name in SAMPLE}
    settings |= {f"sd.{name}": config.sd[name] for name in ("image_size", "resize")}  # of the real images
    settings |= {"seed": config.seed, "mixed_precision": config.mixed_precision}
    settings |= {f"contents.{name}": fingerprint(Path(improve[name])) for name in CONTENTS}
    cpu = torch.device("cpu")
    pipe = load_policy(ddpo, torch.float32, cpu) if ddpo else load_pipeline(pretrained.model, pretrained.revision)
    Sampler(pipe, *(config.sample[name] for name in SAMPLE))  # checks these
    height, width = image_size(pipe)
    if {height, width} != {config.sd.image_size}:
        problem = f"sd.image_size is {config.sd.image_size}, the generator draws {width} x {height} pixels"
        raise UserError(f"{problem}; give the generator's size, so that real images are compared at it")
    settings |= pipeline_fingerprints(pipe)
    if ddpo:
        task = make_task(ddpo, device)
        try_reward(ddpo, task, device, image_size(pipe))
        contents = content_fingerprints(ddpo, pipe, task)
        if ddpo.held_out.every:
            contents["held_out.classifier"] = fingerprint(with_contents(ddpo.held_out.classifier))
        read = ddpo.to_dict() | {run_folder.CONTENTS: contents}
        settings |= contents | run_folder.comparable(read, read, free=run_folder.FREE - run_folder.STOPPING)[0]
    if "finetune" in improve.methods:
        load_split(improve.csv, improve.data_path)
        settings |= settings_of(config_of(config, "finetune"), 1, {})
        if config.sd.text_encoder == "bert" and not has_mask(pipe.text_encoder):
            settings["contents.sd.bert"] = fingerprint(with_contents(config.sd.bert))
    if "finetune" in improve.methods or improve.update_policy:  # pools of generate.py
        load_judges(improve.judges, device)
        prompts = given_prompts(config.eval.prompts, "fundus")
        prompts = prompts or [prompt for prompt, _ in all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)]
        plan([(prompt, {}) for prompt in prompts], 1, config.seed)
        check_tokens(pipe.tokenizer, prompts)
        settings["pool prompts"] = fingerprint(prompts)
    if improve.update_policy:
        rlhf = config.rlhf
        for table in filter(None, (rlhf.ratings, rlhf.val_ratings)):
            read_ratings(table, rlhf.data_path, config.base_log_path)
        named = rlhf.to_dict().items()
        settings |= {f"rlhf.{name}": value for name, value in named if name not in PATHS or name == "data_path"}
        inputs = ("ratings", "val_ratings", "text_encoder", "autoencoder")
        settings |= {f"contents.rlhf.{name}": fingerprint(with_contents(rlhf[name])) for name in inputs}
    return settings

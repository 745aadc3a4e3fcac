"""Rounds of improvement: each changes the generator, measures it, and stops the run if it has collapsed.

Judges that took no part in choosing images score images of a fixed noise, so that rounds differ by the generator alone;
kernel distance to real images and diversity show whether a higher score comes from images that only please the judges.
"""

import logging
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.images import image_grid, load_pixels, save_picture, to_uint8
from ddpo_pytorch.generator.conditioning import save_model
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import merged_state_dict
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import Policy, load_judges
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.metrics.ssim import ms_ssim
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils.distributed import DTYPES
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_folder, sha256
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.json_files import COUNT, parse_json
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number

logger = logging.getLogger(__name__)
GRID_COLUMNS = 8
FINETUNING = ("num_steps", "batch_size", "learning_rate", "ema_decay", "real_share")
CONTENTS = ("judges", "held_out_judges", "csv", "held_out_csv")  # compared by content, wherever they are


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of a generator: means over `images` images.

    alignment is [selector >= threshold] * policy; selector and policy are mean scores in [0, 1]; kid is the kernel
    distance to real images in the Selector's features, with its standard error; ms_ssim is the mean over neighbouring
    images of the same prompt, higher where they are more similar.
    """

    alignment: float
    selector: float
    pass_rate: float
    policy: float
    kid: float
    kid_error: float
    ms_ssim: float
    images: int

    def describe(self) -> str:
        return (
            f"held-out score {self.alignment:.3f} (passed {self.pass_rate:.1%}, selector {self.selector:.3f}, policy "
            f"{self.policy:.3f}), KID {self.kid:.3g} +- {self.kid_error:.2g}, MS-SSIM {self.ms_ssim:.3f}"
        )


class Rounds:
    """The rounds of one output folder.

    Args:
        config: of improve.py.
        device: where held-out judges and drawing run.
        scripts: folder of the scripts.
        launch: command that starts the scripts of a round, e.g. "accelerate launch"; "": this Python.
        options: the command line's own options, which every script gets, too.
        load_weights: loads the outcome of a training, given as file or run folder, into a UNet.
    """

    def __init__(
        self,
        config: ConfigDict,
        device: torch.device,
        scripts: Path,
        launch: str,
        options: Sequence[str],
        load_weights: Callable[[nn.Module, Path], Any],
    ):
        self.load_weights = load_weights
        self.config, self.improve, self.device = config, config.improve, device
        self.scripts, self.launch, self.options = scripts, shlex.split(launch) or [sys.executable], options
        self.output = Path(self.improve.output)
        self.selector, self.policy = load_judges(self.improve.held_out_judges, device)
        rows, paths, _ = fundus.load_split(self.improve.held_out_csv, self.improve.data_path)
        self.prompts = fundus.caption_list(rows)
        real = torch.stack([load_pixels(path, config.sd.image_size, config.sd.resize) for path in paths])
        self.real = features_of(self.selector, real, config.eval.batch_size)

    def folder(self, number: int) -> Path:
        return self.output / f"round_{number}"

    def model(self, number: int) -> Path:
        """Return the folder of the generator after round `number`; round 0 is the initial one."""
        return self.folder(number) / "model" if number else Path(self.config.pretrained.model)

    def run(self, number: int) -> None:
        """Run one round, skipping methods that are finished."""
        model, methods = self.model(number - 1), self.improve.methods
        for place, method in enumerate(methods, 1):
            outcome = self.model(number) if place == len(methods) else self.folder(number) / f"model_{place - 1}"
            if not (outcome / "model_index.json").is_file():
                weights = (self._finetune if method == "finetune" else self._ddpo)(number, model)
                self._save_merged(model, weights, outcome)
            model = outcome

    def _save_merged(self, model: Path, weights: Path, outcome: Path) -> None:
        """Save `model` with other UNet weights, or with adapters merged into its UNet, as a folder of its own."""
        pipe = load_pipeline(str(model))
        self.load_weights(pipe.unet, weights)
        merged = merged_state_dict(pipe.unet)
        pipe = load_pipeline(str(model))
        pipe.unet.load_state_dict(merged)
        with atomic_folder(outcome) as temporary:
            save_model(pipe, temporary)

    def measure(self, number: int) -> RoundMetrics:
        """Draw images of the fixed noise with the model after round `number`, save a grid, and assess them."""
        config, sample, count = self.config, self.config.sample, self.improve.held_out_images
        dtype, size = DTYPES[config.mixed_precision], config.eval.batch_size
        pipe = load_pipeline(str(self.model(number)), config.pretrained.revision, "", dtype, self.device)
        sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
        images = draw_fixed(sampler, self.prompts, count, config.seed, size)
        grid = image_grid(images[::count][: 2 * GRID_COLUMNS].float() / 255, GRID_COLUMNS)  # one image a prompt
        save_picture(self.folder(number) / "grid.png", grid)
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        return assess(images, prompts, self.selector, self.policy, self.real, config.seed, size)

    def _finetune(self, number: int, model: Path) -> Path:
        """Train on the chosen images of a best-of-N pool, weighted by score, mixed with real ones."""
        improve, folder = self.improve, self.folder(number)
        fields = {"pretrained.model": model, "unet_path": ""}
        self._command("generate.py", number, fields | {"logdir": folder / "pool", "load_from": ""})
        table = self._real_table()
        fields |= {"sd.stage": "finetune", "sd.pool": folder / "pool", "sd.output": folder / "finetune"}
        fields |= {"sd.csv": table, "sd.data_path": improve.data_path, "sd.kind": "fundus"}
        fields |= {"sd.latents": self._latents_of(table), "sd.val_csv": "", "sd.val_latents": ""}
        self._command("train_sd.py", number, fields | {f"sd.{name}": improve[name] for name in FINETUNING})
        return folder / "finetune" / "pretrained_unet.safetensors"

    def _ddpo(self, number: int, model: Path) -> Path:
        """Run policy gradient on the judges' reward."""
        runs = self.folder(number) / "ddpo"
        # the fixed run name makes an interrupted run resume
        fields = {"pretrained.model": model, "unet_path": "", "logdir": runs, "run_name": "run"}
        fields |= {"reward_fn": "fundus_alignment", "reward_fn_kwargs.fundus_alignment.judges": self.improve.judges}
        self._command("train.py", number, fields)
        return runs / "run"

    def _command(self, script: str, number: int, fields: dict[str, Any]) -> None:
        """Run a script with this command's own options and these settings. Raises UserError if it fails."""
        fields = {"seed": self.config.seed + number, "log_with": self.config.log_with} | fields
        settings = [f"--config.{name}={value}" for name, value in fields.items()]
        logger.info("round %d: %s", number, script)
        if code := subprocess.run([*self.launch, str(self.scripts / script), *self.options, *settings]).returncode:
            raise UserError(
                f"round {number}: {script} ended with exit code {code}, see its last line; finished steps are in "
                f"{str(self.folder(number))!r}: rerun the same command to resume"
            )

    def _real_table(self) -> Path:
        """Return the table of real images to mix in: improve.csv, or its rows whose image the Selector passes."""
        improve, path = self.improve, self.output / "real.csv"
        if not improve.select_real:
            return Path(improve.csv)
        if not path.is_file():
            selector, _ = load_judges(improve.judges, self.device)
            rows, files, _ = fundus.load_split(improve.csv, improve.data_path)
            sd, size, kept = self.config.sd, self.config.eval.batch_size, []
            for start in range(0, len(rows), size):
                images = torch.stack([load_pixels(file, sd.image_size, sd.resize) for file in files[start:][:size]])
                passes = selector.passes(images.float() / 255).tolist()
                kept += [row for row, passed in zip(rows[start:][:size], passes, strict=True) if passed]
            if not kept:
                raise UserError(f"the Selector passes none of {len(rows)} real images; set improve.select_real=False")
            logger.info("the Selector passes %d of %d real images; the others are left out", len(kept), len(rows))
            fundus.write_table(path, kept)
        return path

    def _latents_of(self, table: Path) -> Path | str:
        """Return latents of a table's images from stage (i) or the first round, or "" if there are none."""
        stage_one = [Path(self.config.sd.output)] if self.config.sd.output else []
        for place in (*stage_one, self.folder(1) / "finetune"):
            latents = place / "latents" / "train"
            if (latents / INDEX).is_file() and LatentShards(latents).index["csv_sha256"] == sha256(table):
                return latents
        return ""


@torch.no_grad()
def features_of(selector: Selector, images: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return the Selector's pooled features (N, D) of uint8 images (N, 3, H, W)."""
    device = next(selector.parameters()).device
    parts = [selector.encoder(selector.preprocess(part.to(device).float() / 255)) for part in images.split(batch_size)]
    return torch.cat(parts).float().cpu().numpy()


def draw_fixed(sampler: Sampler, prompts: Sequence[str], count: int, seed: int, batch_size: int) -> torch.Tensor:
    """Draw `count` uint8 images of each prompt, in order, from noise that depends on (seed, prompt, index) only.

    Raises UserError if an image is not finite.
    """
    jobs = [
        (prompt, derived_seed(seed, Stream.HELD_OUT, text_number(prompt), index))
        for prompt in prompts
        for index in range(count)
    ]
    parts = []
    for start in range(0, len(jobs), batch_size):
        texts, seeds = zip(*jobs[start : start + batch_size], strict=True)
        images = sampler(texts, seeds)
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
) -> RoundMetrics:
    """Return the metrics of uint8 images (N, 3, H, W) with N prompts, in which equal ones are neighbours.

    `real` are the Selector's features (M, D) of real images. Raises UserError for fewer than 4 images of either.
    """
    quality, aligned = [], []
    for start in range(0, len(images), batch_size):
        pixels = images[start : start + batch_size].float() / 255
        quality.append(selector.score(pixels).cpu())
        aligned.append(policy.score(pixels, prompts[start : start + batch_size]).cpu())
    quality, aligned = torch.cat(quality).double(), torch.cat(aligned).double()
    passed = selector.accepts(quality).double()
    distance = kernel_distance(real, features_of(selector, images, batch_size), seed)
    if distance.high is None:  # an error of 0 would call every rise of KID a collapse
        raise UserError(
            f"KID of {len(images)} drawn and {len(real)} real images has no standard error; it needs 4 of each: raise "
            "improve.held_out_images, or give more images in improve.held_out_csv"
        )
    pairs = torch.tensor([i for i in range(1, len(prompts)) if prompts[i] == prompts[i - 1]])
    similar = [ms_ssim(images[part - 1].float() / 255, images[part].float() / 255) for part in pairs.split(batch_size)]
    return RoundMetrics(
        alignment=(passed * aligned).mean().item(),
        selector=quality.mean().item(),
        pass_rate=passed.mean().item(),
        policy=aligned.mean().item(),
        kid=distance.value,
        kid_error=(distance.high - distance.low) / (2 * 1.96),
        ms_ssim=torch.cat(similar).mean().item(),
        images=len(images),
    )


def collapse(history: Sequence[RoundMetrics], tolerance: float, kid_tolerance: float) -> str:
    """Return why the last of these rounds, which begin with the initial generator, is a collapse; "" if it is none.

    The held-out score fell by more than `tolerance` below the best so far; or KID rose above the initial one by more
    than `kid_tolerance` standard errors of the difference; or images of a prompt became so similar that 1 - MS-SSIM is
    less than half of the initial one.
    """
    first, now = history[0], history[-1]
    best = max(one.alignment for one in history)
    if now.alignment < best - tolerance:
        return f"the held-out score fell to {now.alignment:.3f}, the best was {best:.3f}"
    error = math.hypot(first.kid_error, now.kid_error)
    if len(history) > 1 and now.kid > first.kid + kid_tolerance * error:
        return (
            f"KID to real images rose from {first.kid:.4g} to {now.kid:.4g}, by more than {kid_tolerance:g} standard "
            f"errors ({error:.2g}) of the difference: the judges accept unrealistic images"
        )
    if 1 - now.ms_ssim < (1 - first.ms_ssim) / 2:
        return f"images of a prompt became too similar: MS-SSIM rose from {first.ms_ssim:.3f} to {now.ms_ssim:.3f}"
    return ""


def rounds_table(history: Sequence[RoundMetrics]) -> str:
    """Return the rounds as a Markdown table."""
    lines = ["| round | held-out score | passed | selector | policy | KID (Selector's features) | MS-SSIM | images |"]
    lines.append("|" + "---:|" * 8)
    for number, one in enumerate(history):
        scores = f"{one.alignment:.3f} | {one.pass_rate:.1%} | {one.selector:.3f} | {one.policy:.3f}"
        kid = f"{one.kid:.3g} ± {one.kid_error:.2g}"
        lines.append(f"| {number} | {scores} | {kid} | {one.ms_ssim:.3f} | {one.images} |")
    return "\n".join([*lines, ""])


def read_history(path: Path) -> list[RoundMetrics]:
    """Return the metrics of rounds.jsonl, up to the first missing round."""
    shape = {"round": COUNT} | {name: float for name in RoundMetrics.__dataclass_fields__}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    measured: dict[int, RoundMetrics] = {}
    for number, line in enumerate(lines, 1):
        entry = parse_json(line, shape, f"{str(path)!r} line {number}", "remove that line, to measure its round again")
        measured[entry["round"]] = RoundMetrics(**{name: entry[name] for name in RoundMetrics.__dataclass_fields__})
    history: list[RoundMetrics] = []
    while len(history) in measured:
        history.append(measured[len(history)])
    return history


def log_entry(number: int, metrics: RoundMetrics) -> dict[str, Any]:
    """Return a round's line of rounds.jsonl."""
    return {"round": number} | asdict(metrics)


def round_settings(config: ConfigDict) -> dict[str, Any]:
    """Return what identifies the rounds of a folder: settings, and fingerprints of the files behind them."""
    improve, pretrained = config.improve, config.pretrained
    settings = {f"improve.{name}": improve[name] for name in improve if name not in ("output", "rounds", *CONTENTS)}
    settings |= {f"sample.{name}": config.sample[name] for name in ("scheduler", "num_steps", "eta", "guidance_scale")}
    settings |= {"seed": config.seed, "mixed_precision": config.mixed_precision}
    settings |= pipeline_fingerprints(load_pipeline(pretrained.model, pretrained.revision))
    return settings | {f"contents.{name}": fingerprint(Path(improve[name])) for name in CONTENTS}

"""Improve the generator in rounds: train it on the judges' scores, then measure it with held-out judges.

    python scripts/improve.py --config config/fundus.py:improve

A round trains the generator by each of `improve.methods` in turn: "finetune" on the best images of a pool
(generate.py), weighted by the Policy's scores and mixed with real ones (train_sd.py); "ddpo" with the reward
fundus_alignment (train.py). With `improve.update_policy`, the Policy first learns from new images that the Selector
rates (stage 2 of train_rlhf.py). Held-out judges then score images from fixed noise; KID to real images and diversity
are measured as well, and the initial generator at other guidance scales as a control. A collapse of any of these ends
the run with a warning. The scripts run as separate commands, started by --launch, e.g. "accelerate launch
--num_processes 8". Each round's model is a folder that eval.py and train.py can load. Rerun the command to resume.
"""

import argparse
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from absl import flags
from ml_collections import ConfigDict

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.images import RESIZES, SYNTHETIC, image_grid, load_pixels, save_picture
from ddpo_pytorch.data.sample_folder import claim_folder
from ddpo_pytorch.generator import finetune_data
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import merge_lora
from ddpo_pytorch.generator.pipeline import load_pipeline, save_model
from ddpo_pytorch.judges.classifier import new_classifier
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, load_judges
from ddpo_pytorch.metrics.tables import to_markdown
from ddpo_pytorch.rlhf import rounds, training
from ddpo_pytorch.sampling import SAMPLING, Sampler
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.run_state import is_finished
from ddpo_pytorch.training.setup import batch_sizes, check_training
from ddpo_pytorch.utils import settings as allowed
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, make_accelerator
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_folder, atomic_write, locked, sha256, write_file, write_json
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.settings import Range, check_choices, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/fundus.py:improve")
flags.DEFINE_string("launch", "", "command that starts the scripts of a round, e.g. 'accelerate launch'; empty: python")
logger = logging.getLogger(__name__)
METHODS = ("finetune", "ddpo")
COUNTS = ("rounds", "num_candidates", "max_attempts", "num_steps", "batch_size")
RANGES = dict.fromkeys(COUNTS, allowed.ONE_OR_MORE) | {"images_per_prompt": allowed.UP_TO_A_MILLION}
RANGES |= {"held_out_images": Range("[2, 1000000]", whole=True)}
RANGES |= {"learning_rate": allowed.POSITIVE, "ema_decay": allowed.BELOW_ONE, "real_share": finetune_data.REAL_SHARE}
RANGES |= dict.fromkeys(("tolerance", "kid_tolerance"), allowed.NOT_NEGATIVE)
LOG = "rounds.jsonl"
GRID_COLUMNS = 8


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for unusable settings, including those of scripts that would only start hours later."""
    improve = config.improve
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("improve.py runs as one process; --launch='accelerate launch ...' is for the scripts it starts")
    for name in ("unet_path", "load_from"):
        if config[name]:
            raise UserError(f"{name} is {config[name]!r}; rounds start from a complete model, pretrained.model=DIR")
    for name in improve.methods or ("",):
        if name not in METHODS:
            raise UserError(f"improve.methods has {name!r}; allowed are one or more of {', '.join(METHODS)}")
    if len(set(improve.methods)) < len(improve.methods):
        raise UserError(f"improve.methods is {tuple(improve.methods)}; give each method once")
    check_ranges(config, SAMPLING | dict.fromkeys(("eval.batch_size", "sd.image_size"), allowed.ONE_OR_MORE))
    check_choices(config.sd, {"resize": RESIZES}, "sd.")
    check_ranges(improve, RANGES, "improve.")
    check_ranges(improve, {"num_candidates": Range(f"[1, {improve.max_attempts}]", whole=True)}, "improve.")
    for scale in improve.control_guidance:
        check_ranges({"control_guidance": scale}, {"control_guidance": allowed.FINITE}, "improve.")
    if improve.update_policy:
        training.check_settings(config.rlhf)
    if "finetune" in improve.methods:
        finetune_data.check_settings(rounds.config_of(config, "finetune").sd)
    if "ddpo" in improve.methods:
        check_training(config)
        batch_sizes(config.sample, config.train, processes=1)


class Rounds:
    """The rounds of one output folder; held-out judges and sampling run on `device`, scripts by the words `launch`."""

    def __init__(self, config: ConfigDict, device: torch.device, launch: list[str]):
        self.config, self.improve, self.output = config, config.improve, Path(config.improve.output)
        self.device, self.launch = device, launch
        self.selector, self.policy = load_judges(self.improve.held_out_judges, device)
        rows, paths, _ = fundus.load_split(self.improve.held_out_csv, self.improve.data_path)
        self.prompts = fundus.caption_list(rows)
        qualities = Counter(map(fundus.quality_of, rows))
        good = [path for row, path in zip(rows, paths, strict=True) if fundus.is_good(row)]
        if min(len(good), self.improve.held_out_images * len(self.prompts)) < rounds.KID_IMAGES:
            grades = ", ".join(f"{count} images of quality {value:g}" for value, count in sorted(qualities.items()))
            has = f"improve.held_out_csv {self.improve.held_out_csv!r} has {len(self.prompts)} captions and {grades}"
            needs = f"KID needs {rounds.KID_IMAGES} images of quality 3 (good) and as many drawn ones"
            raise UserError(f"{has}; {needs}: give more images, or raise improve.held_out_images")
        size, sd, improve = config.eval.batch_size, config.sd, self.improve
        pixels = torch.stack([load_pixels(path, sd.image_size, sd.resize) for path in good])
        self.real = rounds.features_of(self.selector, pixels, size)
        network = None
        if improve.guard:
            network = new_classifier(("guard",), 224, improve.guard, improve.guard_weights).eval().to(device)
        fundus_images = fundus.modality_of(self.prompts[0]) == fundus.MODALITY
        self.guards = rounds.Guards(pixels, network, fundus_images, config.seed, size)

    def folder(self, number: int) -> Path:
        return self.output / f"round_{number}"

    def model(self, number: int) -> Path:
        """Return the folder of the generator after round `number`; round 0 is the initial one."""
        return self.folder(number) / "model" if number else Path(self.config.pretrained.model)

    def judges(self, number: int) -> Path:
        """Return the folder of the judges that select in round `number`, with its updated Policy if there is one."""
        return self.folder(number) / "judges" if self.improve.update_policy and number else Path(self.improve.judges)

    def train(self, number: int) -> None:
        """Run one round, skipping steps that are finished."""
        model, methods = self.model(number - 1), self.improve.methods
        if self.improve.update_policy and not (self.judges(number) / POLICY_FILE).is_file():
            self._update_policy(number, model)
        for step, method in enumerate(methods, 1):
            outcome = self.model(number) if step == len(methods) else self.folder(number) / f"model_{step - 1}"
            if not (outcome / "model_index.json").is_file():
                weights = (self._finetune if method == "finetune" else self._ddpo)(number, model)
                # save `model` with the trained UNet, adapters merged, as a new folder; train_sd.py writes a whole model
                # if the text encoder is new as well
                source = str(weights.parent if (weights.parent / "model_index.json").is_file() else model)
                pipe = load_pipeline(source, self.config.pretrained.revision)
                load_weights(pipe.unet, weights)
                merge_lora(pipe.unet)
                with atomic_folder(outcome) as temporary:
                    save_model(pipe, temporary)
            model = outcome

    def measure(self, number: int, guidance_scale: float, grid_name: str = "grid.png") -> rounds.RoundMetrics:
        """Sample images from the fixed noise with the model after round `number`, save a grid, and assess them."""
        config, sample, count = self.config, self.config.sample, self.improve.held_out_images
        dtype, size, model = DTYPES[config.mixed_precision], config.eval.batch_size, str(self.model(number))
        pipe = load_pipeline(model, config.pretrained.revision, "", dtype, self.device)
        sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, guidance_scale)
        images = rounds.draw_fixed(sampler, self.prompts, count, config.seed, size)
        grid = image_grid(images[::count][: 2 * GRID_COLUMNS].float() / 255, GRID_COLUMNS)  # one image per prompt
        save_picture(self.folder(number) / grid_name, grid, SYNTHETIC)
        prompts, judges = [prompt for prompt in self.prompts for _ in range(count)], (self.selector, self.policy)
        return rounds.assess(images, prompts, *judges, self.real, config.seed, size, self.guards)

    def control(self, guidance_scale: float) -> rounds.RoundMetrics:
        """Assess the initial generator at another guidance scale, or return what an earlier run measured."""
        path = self.folder(0) / f"guidance_{guidance_scale:g}.json"
        if not path.is_file():
            write_json(path, vars(self.measure(0, guidance_scale, f"{path.stem}.png")))
        entry = read_json(path, rounds.SHAPE, "remove it to measure again")
        return rounds.RoundMetrics(**{name: entry[name] for name in rounds.SHAPE})

    def _draw_pool(self, number: int, model: Path, name: str, judges: Path) -> Path:
        """Sample best-of-N images into a folder of the round."""
        pool = self.folder(number) / name
        fields = {"pretrained.model": model, "unet_path": "", "load_from": "", "improve.judges": judges, "logdir": pool}
        self._command("generate.py", number, fields)
        return pool

    def _update_policy(self, number: int, model: Path) -> None:
        """Continue stage 2 of the Policy on new images of the generator, rated by the Selector."""
        before, after = self.judges(number - 1), self.judges(number)
        pool = self._draw_pool(number, model, "fresh", before)
        for source, copy in ((SELECTOR_FILE, SELECTOR_FILE), (POLICY_FILE, training.FIRST_POLICY)):
            write_file(after / copy, (before / source).read_bytes())
        fields = {"seed": self.config.seed, "rlhf.pool": pool, "rlhf.output": after, "rlhf.stages": (2,)}
        self._command("train_rlhf.py", number, fields)  # with stage 1's seed, which determines the split of ratings

    def _finetune(self, number: int, model: Path) -> Path:
        """Train on the selected images of a best-of-N pool, weighted by score and mixed with real ones."""
        weights = self.folder(number) / "finetune" / finetune_data.OUTCOMES["finetune"]
        if weights.is_file():  # written last; train_sd.py refuses a folder that has them
            return weights
        pool = self._draw_pool(number, model, "pool", self.judges(number))
        fields = {"pretrained.model": model, "unet_path": "", "sd.pool": pool, "sd.output": weights.parent}
        fields |= rounds.method_fields(self.config, "finetune", "") | {"sd.latents": ""}
        # the table's latents from stage (i) or the first round, if there are any
        for earlier in filter(None, (self.config.sd.output, self.folder(1) / "finetune")):
            latents = Path(earlier, "latents", "train")
            if (latents / INDEX).is_file() and LatentShards(latents).index["csv_sha256"] == sha256(self.improve.csv):
                fields["sd.latents"] = latents
                break
        self._command("train_sd.py", number, fields)
        return weights

    def _ddpo(self, number: int, model: Path) -> Path:
        """Run DDPO on the judges' reward. Raises UserError if it was stopped before its end."""
        runs = self.folder(number) / "ddpo"
        # the fixed run name makes an interrupted run resume
        fields = {"pretrained.model": model, "unet_path": "", "logdir": runs, "run_name": "run"}
        fields |= rounds.method_fields(self.config, "ddpo", self.judges(number))
        self._command("train.py", number, fields)
        if not is_finished(runs / "run", self.config):
            raise UserError(f"round {number}: train.py was stopped before its end; rerun the same command to resume")
        return runs / "run"

    def _command(self, script: str, number: int, fields: dict[str, Any]) -> None:
        """Run a script with this command's options and these settings. Raises UserError if it fails."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--launch", "-launch")
        fields = {"seed": self.config.seed + number, "log_with": self.config.log_with} | fields
        settings = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [*self.launch, str(Path(__file__).with_name(script)), *parser.parse_known_args()[1], *settings]
        logger.info("round %d: %s", number, script)
        torch.cuda.empty_cache()  # the script may need the last measurement's memory
        if code := subprocess.run(command).returncode:
            problem = f"round {number}: {script} ended with exit code {code}, see its last line"
            where = f"finished steps are in {str(self.folder(number))!r}"
            raise UserError(f"{problem}; {where}: rerun the same command to resume")


def launcher() -> list[str]:
    """Return the words of --launch. Raises UserError if they start no program."""
    try:
        words = shlex.split(FLAGS.launch) or [sys.executable]
    except ValueError as error:
        raise UserError(f"--launch={FLAGS.launch!r} cannot be read ({error}); close the quotation") from error
    if not shutil.which(words[0]):
        raise UserError(f"--launch={FLAGS.launch!r}: there is no program {words[0]!r}; give one that can be run")
    return words


def link_best(output: Path, model: Path) -> None:
    """Point the link `best` to a model's folder; a Hugging Face id has none, so it is named in a warning instead."""
    if not model.is_dir():
        (output / "best").unlink(missing_ok=True)
        paths = output / "best", model
        logger.warning("the best model is not a folder, so %s is not created; use pretrained.model=%s", *paths)
        return
    with atomic_write(output / "best") as temporary:
        temporary.unlink()
        # resolved, since ".." in a linked folder leads elsewhere
        temporary.symlink_to(os.path.relpath(model.resolve(), output.resolve()), target_is_directory=True)


def main(_) -> None:
    paths = ("output", "judges", "held_out_judges", "csv", "held_out_csv", "data_path")
    required = ["pretrained.model", *(f"improve.{name}" for name in paths)]
    config = expand_config(FLAGS.config, *required, *["rlhf.ratings"] * FLAGS.config.improve.update_policy)
    check_settings(config)
    launch = launcher()  # raises before models are loaded
    rounds.check_independent(config.improve.judges, config.improve.held_out_judges)
    improve, output = config.improve, Path(config.improve.output)
    if improve.update_policy:  # else train_rlhf.py would refuse them in the middle of a round
        training.check_sizes(config.rlhf, Path(improve.judges, SELECTOR_FILE), Path(improve.judges, POLICY_FILE))
    device = make_accelerator(config.mixed_precision, config.allow_tf32).device
    settings, run = rounds.round_settings(config, device), Rounds(config, device, launch)
    guidance = config.sample.guidance_scale
    with locked(output):
        claim_folder(output, settings, {"model": config.pretrained.model})
        log = JsonLines(output / LOG, keep=math.inf, counter="round")
        history = rounds.read_history(output / LOG)
        controls = {scale: run.control(scale) for scale in improve.control_guidance if scale != guidance}
        for number in range(improve.rounds + 1):
            done_before = number < len(history)
            if not done_before:
                if number:
                    run.train(number)
                history.append(run.measure(number, guidance))
                log.write({"round": number} | vars(history[-1]))
            summary = ", ".join(f"{title} {cell}" for title, cell in history[number].cells().items())
            logger.info("round %d: %s%s", number, summary, " (done before)" if done_before else "")
            if stop := rounds.collapse(history[: number + 1], improve.tolerance, improve.kid_tolerance):
                logger.warning("stopped after round %d: %s", number, stop)
                break
        best = rounds.best_round(history[: number + 1], improve.tolerance, improve.kid_tolerance)
        link_best(output, run.model(best))
        # the initial generator at other guidance scales stands after round 0
        rows = [{"round": str(number)} | metrics.cells() for number, metrics in enumerate(history)]
        rows[1:1] = [{"round": f"base, guidance {scale:g}"} | metrics.cells() for scale, metrics in controls.items()]
        table = to_markdown(pd.DataFrame(rows))
        write_file(output / "rounds.md", table)
    print(table)  # this command's output
    for scale, control in controls.items():
        if control.alignment >= history[best].alignment:
            scores = scale, control.alignment, best, history[best].alignment
            logger.warning("guidance %g without training scores %.3f, at least as much as round %d (%.3f)", *scores)
    logger.info("models, pools and metrics of all rounds are in %s; the best is round %d", output, best)


if __name__ == "__main__":
    cli(main)

"""Improve the generator in rounds: draw a pool, let the judges choose, learn from what they chose, measure.

    python scripts/improve.py --config config/fundus.py:improve

A round draws a best-of-N pool (scripts/generate.py), then changes the generator by each of `improve.methods` in turn:
"finetune" on the chosen images, weighted by the Policy's scores, among real ones (scripts/train_sd.py); "ddpo" with the
reward fundus_alignment (scripts/train.py). Judges that chose nothing then score images of fixed noise; KID to real
images and diversity are taken beside them. Rounds end early, and say so, when these show a collapse.

The scripts run as commands of their own; --launch="accelerate launch --num_processes 8" starts them so. Every round's
model is a folder that eval.py and train.py open. The same command again goes on with the round that it was in.
"""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.sample_folder import claim_folder
from ddpo_pytorch.generator.conditioning import save_model
from ddpo_pytorch.generator.finetune_data import REAL_SHARE
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import merged_state_dict
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import load_judges
from ddpo_pytorch.rlhf.rounds import (
    Standing,
    assess,
    collapse,
    describe,
    draw_fixed,
    passing,
    real_features,
    record,
    save_rounds_grid,
    table,
)
from ddpo_pytorch.sampling import SAMPLING, Sampler
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.setup import batch_sizes, check_training
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_folder, atomic_write, locked, sha256
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.json_files import COUNT, parse_json
from ddpo_pytorch.utils.settings import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, Range, check_ranges

FLAGS = flags.FLAGS
define_config(__file__, "experiment, e.g. config/fundus.py:improve")
flags.DEFINE_string("launch", "", "command that starts the scripts of a round, e.g. 'accelerate launch'; empty: python")
logger = logging.getLogger(__name__)
METHODS = ("finetune", "ddpo")
RANGES = {
    **dict.fromkeys(("rounds", "images_per_prompt", "num_candidates", "max_attempts"), ONE_OR_MORE),
    **dict.fromkeys(("num_steps", "batch_size"), ONE_OR_MORE),
    "held_out_images": Range("[2, inf)", whole=True),
    "learning_rate": POSITIVE,
    "ema_decay": BELOW_ONE,
    "real_share": REAL_SHARE,
    "tolerance": NOT_NEGATIVE,
    "kid_tolerance": NOT_NEGATIVE,
}
FINETUNING = ("num_steps", "batch_size", "learning_rate", "ema_decay", "real_share")
LOG = "rounds.jsonl"


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for a setting that cannot work."""
    improve = config.improve
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "start improve.py as one process; --launch='accelerate launch ...' is for the scripts that it runs"
        )
    for name in ("unet_path", "load_from"):
        if config[name]:
            raise UserError(
                f"{name} is {config[name]!r}; rounds begin from a whole model: give its folder, pretrained.model=DIR"
            )
    for name in improve.methods:
        if name not in METHODS:
            raise UserError(f"improve.methods has {name!r}; allowed are {', '.join(METHODS)}")
    if not improve.methods:
        raise UserError(f"improve.methods is empty; name one or more of {', '.join(METHODS)}")
    # also of the scripts that it runs: the first training begins hours after the start
    check_ranges(config, SAMPLING | {"eval.batch_size": ONE_OR_MORE})
    check_ranges(improve, RANGES, "improve.")
    if "ddpo" in improve.methods:
        check_training(config)
        batch_sizes(config.sample, config.train, processes=1)
    if Path(improve.judges).resolve() == Path(improve.held_out_judges).resolve():
        raise UserError(f"improve.held_out_judges are improve.judges, {improve.judges!r}; what chooses cannot judge")


class Rounds:
    """The rounds of one output folder."""

    def __init__(self, config: ConfigDict, device: torch.device):
        self.config, self.improve, self.device = config, config.improve, device
        self.output = Path(self.improve.output)
        self.selector, self.policy = load_judges(self.improve.held_out_judges, device)
        rows, paths, _ = fundus.load_split(self.improve.held_out_csv, self.improve.data_path)
        self.prompts = fundus.caption_list(rows)
        self.real = real_features(self.selector, paths, config.sd.image_size, config.sd.resize, config.eval.batch_size)

    def folder(self, number: int) -> Path:
        return self.output / f"round_{number}"

    def model(self, number: int) -> Path:
        """Where the generator after round `number` lies; round 0 is the one to begin with."""
        return self.folder(number) / "model" if number else Path(self.config.pretrained.model)

    def command(self, script: str, number: int, **fields) -> None:
        """Run a script with this command's own configuration and these fields. UserError where it fails."""
        words = iter(sys.argv[1:])
        own = []
        for word in words:
            if word.lstrip("-") == "launch":
                next(words, None)  # its value
            elif not word.lstrip("-").startswith("launch="):
                own.append(word)
        fields = {"seed": self.config.seed + number, "log_with": self.config.log_with, **fields}
        start = shlex.split(FLAGS.launch) or [sys.executable]
        place = Path(__file__).with_name(script)
        options = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
        logger.info("round %d: %s", number, script)
        if (code := subprocess.run([*start, str(place), *own, *options]).returncode) != 0:
            raise UserError(
                f"round {number}: {script} ended with exit code {code}, its last line says why; what is finished is in "
                f"{str(self.folder(number))!r}, and the same command goes on from there"
            )

    def run(self, number: int) -> None:
        """One round, from the generator before it to the one after it."""
        folder, model = self.folder(number), self.model(number - 1)
        for place, method in enumerate(self.improve.methods):
            last = place == len(self.improve.methods) - 1
            outcome = self.model(number) if last else folder / f"model_{place}"
            if (outcome / "model_index.json").is_file():
                model = outcome
                continue
            (self.finetune if method == "finetune" else self.ddpo)(number, model, outcome)
            model = outcome

    def finetune(self, number: int, model: Path, outcome: Path) -> None:
        """Supervised steps on the pool's chosen images, weighted, among real ones."""
        improve, folder = self.improve, self.folder(number)
        start = {"pretrained__model": model, "unet_path": ""}
        self.command("generate.py", number, **start, logdir=folder / "pool", load_from="")
        table = self.real_table()
        own = {"sd__latents": self.latents_of(table), "sd__val_csv": "", "sd__val_latents": ""}
        own |= {"sd__csv": table, "sd__data_path": improve.data_path, "sd__kind": "fundus"}
        own |= {f"sd__{name}": improve[name] for name in FINETUNING}
        own |= {"sd__stage": "finetune", "sd__pool": folder / "pool"}
        self.command("train_sd.py", number, **start, **own, sd__output=folder / "finetune")
        save_merged(model, folder / "finetune" / "pretrained_unet.safetensors", outcome)

    def real_table(self) -> Path:
        """The table of real images to mix in: improve.csv, or those of its rows whose image the Selector passes."""
        improve, path = self.improve, self.output / "real.csv"
        if not improve.select_real:
            return Path(improve.csv)
        if not path.is_file():
            selector, _ = load_judges(improve.judges, self.device)
            rows, files, _ = fundus.load_split(improve.csv, improve.data_path)
            size, resize = self.config.sd.image_size, self.config.sd.resize
            kept = passing(selector, files, size, resize, self.config.eval.batch_size)
            logger.info("of %d real images %d pass the Selector and are learned from", len(rows), len(kept))
            fundus.write_table(path, [rows[index] for index in kept])
        return path

    def latents_of(self, table: Path) -> Path | str:
        """Latents of a table's images that stage (i) or the first round has made; "" where there are none."""
        stage_one = [Path(self.config.sd.output)] if self.config.sd.output else []
        for place in (*stage_one, self.folder(1) / "finetune"):
            latents = place / "latents" / "train"
            if (latents / INDEX).is_file() and LatentShards(latents).index["csv_sha256"] == sha256(table):
                return latents
        return ""

    def ddpo(self, number: int, model: Path, outcome: Path) -> None:
        """Policy gradient on the judges' reward; the adapters are then merged into the UNet."""
        runs = self.folder(number) / "ddpo"
        # with a name of its own, a run that was stopped is gone on with
        fields = {"pretrained__model": model, "unet_path": "", "logdir": runs, "run_name": "run"}
        fields |= {"reward_fn": "fundus_alignment", "reward_fn_kwargs__fundus_alignment__judges": self.improve.judges}
        self.command("train.py", number, **fields)
        save_merged(model, runs / "run", outcome)

    def measure(self, number: int) -> Standing:
        config, improve = self.config, self.improve
        pretrained, sample = config.pretrained, config.sample
        dtype = DTYPES[config.mixed_precision]
        pipe = load_pipeline(str(self.model(number)), pretrained.revision, "", dtype, self.device)
        sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
        size, count = config.eval.batch_size, improve.held_out_images
        images = draw_fixed(sampler, self.prompts, count, config.seed, size)
        save_rounds_grid(self.folder(number) / "grid.png", images, count)
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        return assess(images, prompts, self.selector, self.policy, self.real, config.seed, size)


def read_history(path: Path) -> list[Standing]:
    """Return the rounds that have been measured, up to the first one that is missing."""
    shape = {"round": COUNT} | {name: float for name in Standing.__dataclass_fields__}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = {}
    for number, line in enumerate(lines, 1):
        entry = parse_json(line, shape, f"{str(path)!r} line {number}", "remove that line, to measure its round again")
        found[entry["round"]] = Standing(**{name: entry[name] for name in Standing.__dataclass_fields__})
    history: list[Standing] = []
    while len(history) in found:
        history.append(found[len(history)])
    return history


def point_to(link: Path, target: Path) -> None:
    """Make `link` a link to a folder, in the place of an earlier one."""
    with atomic_write(link) as temporary:
        temporary.unlink()
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def save_merged(model: Path, weights: Path, outcome: Path) -> None:
    """The model with these UNet weights, or with these adapters merged into it, as a folder of its own."""
    pipe = load_pipeline(str(model))
    load_weights(pipe.unet, weights)
    merged = merged_state_dict(pipe.unet)
    pipe = load_pipeline(str(model))
    pipe.unet.load_state_dict(merged)
    with atomic_folder(outcome) as temporary:
        save_model(pipe, temporary)


def settings_of(config: ConfigDict) -> dict:
    """Return what rounds have in common: settings, and fingerprints of the files behind them."""
    improve, pretrained = config.improve, config.pretrained
    files = ("judges", "held_out_judges", "csv", "held_out_csv")  # compared by content, wherever they lie
    settings = {f"improve.{name}": improve[name] for name in improve if name not in ("output", "rounds", *files)}
    settings |= {f"sample.{name}": config.sample[name] for name in ("scheduler", "num_steps", "eta", "guidance_scale")}
    settings |= {"seed": config.seed, "mixed_precision": config.mixed_precision}
    settings |= pipeline_fingerprints(load_pipeline(pretrained.model, pretrained.revision))
    for name in files:
        settings[f"contents.{name}"] = fingerprint(Path(improve[name]))
    return settings


def main(_) -> None:
    required = ("output", "judges", "held_out_judges", "csv", "held_out_csv", "data_path")
    config = expand_config(FLAGS.config, "pretrained.model", *(f"improve.{name}" for name in required))
    check_settings(config)
    improve, output = config.improve, Path(config.improve.output)
    rounds = Rounds(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with locked(output):
        claim_folder(output, settings_of(config), {"model": config.pretrained.model})
        log = JsonLines(output / LOG, keep=improve.rounds + 1, counter="round")
        history = read_history(output / LOG)
        for number in range(improve.rounds + 1):
            if number < len(history):
                logger.info("%s (done before)", describe(number, history[number]))
            else:
                if number:
                    rounds.run(number)
                history.append(rounds.measure(number))
                log.write(record(history[-1], round=number))
                logger.info("%s", describe(number, history[-1]))
            if stop := collapse(history[: number + 1], improve.tolerance, improve.kid_tolerance):
                logger.warning("stopped after round %d: %s", number, stop)
                break
        best = max(range(len(history)), key=lambda one: history[one].alignment)
        point_to(output / "best", rounds.model(best))
        with atomic_write(output / "rounds.md") as temporary:
            temporary.write_text(table(history))
    print(table(history))  # the product of this command
    logger.info("models, pools and measures of all rounds are in %s; best/ is round %d", output, best)


if __name__ == "__main__":
    cli(main)

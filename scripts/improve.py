"""Improve the generator in rounds: draw a pool, let the judges choose, learn from their choice, measure.

    python scripts/improve.py --config config/fundus.py:improve

A round draws a best-of-N pool (scripts/generate.py), then changes the generator by each of `improve.methods` in turn:
"finetune" on the chosen images, weighted by the Policy's scores and mixed with real ones (scripts/train_sd.py); "ddpo"
with the reward fundus_alignment (scripts/train.py). Held-out judges then score images of fixed noise; KID to real
images and diversity are measured as well. A collapse in any of these ends the run with a warning.

The scripts run as separate commands; --launch="accelerate launch --num_processes 8" sets how. Every round's model is a
folder that eval.py and train.py open. Rerun the same command to resume.
"""

import logging
import os
import sys
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict

from ddpo_pytorch.data.sample_folder import claim_folder
from ddpo_pytorch.generator.finetune_data import REAL_SHARE
from ddpo_pytorch.rlhf.rounds import Rounds, collapse, log_entry, read_history, round_settings, rounds_table
from ddpo_pytorch.sampling import SAMPLING
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.setup import batch_sizes, check_training
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_write, locked
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
LOG = "rounds.jsonl"


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for unusable settings, also those of the scripts, which start hours later."""
    improve = config.improve
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("improve.py runs as one process; --launch='accelerate launch ...' is for the scripts it starts")
    for name in ("unet_path", "load_from"):
        if config[name]:
            raise UserError(f"{name} is {config[name]!r}; rounds start from a complete model, pretrained.model=DIR")
    for name in improve.methods or ("",):
        if name not in METHODS:
            raise UserError(f"improve.methods has {name!r}; allowed are one or more of {', '.join(METHODS)}")
    check_ranges(config, SAMPLING | {"eval.batch_size": ONE_OR_MORE})
    check_ranges(improve, RANGES, "improve.")
    if "ddpo" in improve.methods:
        check_training(config)
        batch_sizes(config.sample, config.train, processes=1)
    if Path(improve.judges).resolve() == Path(improve.held_out_judges).resolve():
        raise UserError(
            f"improve.held_out_judges is {improve.held_out_judges!r}, as is improve.judges; give judges that choose no "
            "images"
        )


def own_options() -> list[str]:
    """Return this command's options without --launch."""
    options, words = [], iter(sys.argv[1:])
    for word in words:
        if word.lstrip("-") == "launch":
            next(words, None)  # its value
        elif not word.lstrip("-").startswith("launch="):
            options.append(word)
    return options


def main(_) -> None:
    required = ("output", "judges", "held_out_judges", "csv", "held_out_csv", "data_path")
    config = expand_config(FLAGS.config, "pretrained.model", *(f"improve.{name}" for name in required))
    check_settings(config)
    improve, output = config.improve, Path(config.improve.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = Rounds(config, device, Path(__file__).parent, FLAGS.launch, own_options(), load_weights)
    with locked(output):
        claim_folder(output, round_settings(config), {"model": config.pretrained.model})
        log = JsonLines(output / LOG, keep=improve.rounds + 1, counter="round")
        history = read_history(output / LOG)
        for number in range(improve.rounds + 1):
            done_before = number < len(history)
            if not done_before:
                if number:
                    rounds.run(number)
                history.append(rounds.measure(number))
                log.write(log_entry(number, history[-1]))
            note = " (done before)" if done_before else ""
            logger.info("round %d: %s%s", number, history[number].describe(), note)
            if stop := collapse(history[: number + 1], improve.tolerance, improve.kid_tolerance):
                logger.warning("stopped after round %d: %s", number, stop)
                break
        best = max(range(len(history)), key=lambda number: history[number].alignment)
        with atomic_write(output / "best") as temporary:
            temporary.unlink()
            temporary.symlink_to(os.path.relpath(rounds.model(best), output), target_is_directory=True)
        with atomic_write(output / "rounds.md") as temporary:
            temporary.write_text(rounds_table(history))
    print(rounds_table(history))  # the product of this command
    logger.info("models, pools and metrics of all rounds are in %s; best/ is round %d", output, best)


if __name__ == "__main__":
    cli(main)

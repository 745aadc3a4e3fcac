"""Learn Selector and Policy from experts' ratings of 1 to 3 in two stages (ddpo_pytorch/rlhf/reinforce.py).

    accelerate launch scripts/train_rlhf.py --config config/fundus.py:train_rlhf

Stage 1: both learn from all rated images; then the Selector's threshold is calibrated on held-out ratings. Stage 2: the
Policy continues on the images that the Selector passes and a share of others; the Selector, and so the meaning of its
threshold, stays fixed. Rerun the same command to resume a training that was stopped.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from ml_collections import ConfigDict

from ddpo_pytorch.data.fundus import check_images
from ddpo_pytorch.data.ratings import RatedImage, aggregate, agreement, check_classes, read_ratings, split_by_patient
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import (
    DESCRIPTION,
    POLICY_FILE,
    SELECTOR_FILE,
    Policy,
    TextFeatures,
    load_judges,
    save_policy,
)
from ddpo_pytorch.judges.selector import MLP_RATIO, Selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes, read_judge
from ddpo_pytorch.rlhf.rated_images import COLUMNS, RatedSet, best_threshold, read_rated, through_autoencoder
from ddpo_pytorch.rlhf.training import (
    StageTraining,
    all_scores,
    check_settings,
    chosen_samples,
    stage_settings,
    state_path,
)
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import JsonLines, atomic_write
from ddpo_pytorch.utils.json_files import COUNT
from ddpo_pytorch.utils.settings import SEED, check_ranges

FLAGS = flags.FLAGS
define_config(__file__, "experiment, e.g. config/fundus.py:train_rlhf")
logger = logging.getLogger(__name__)
FIRST_POLICY = "policy_stage_1.safetensors"  # initial weights of stage 2


def read_images(config: ConfigDict) -> tuple[list[RatedImage], list[RatedImage]]:
    """Return rated images to learn from, and of other patients to measure with."""
    rlhf = config.rlhf
    train = read_table(rlhf.ratings, rlhf.data_path, config.base_log_path)
    if rlhf.val_ratings:
        val, name = read_table(rlhf.val_ratings, rlhf.data_path, config.base_log_path), repr(rlhf.val_ratings)
        check_disjoint(train, val, rlhf)
    else:
        train, val = split_by_patient(train, rlhf.val_share, config.seed)
        name = f"the validation part of {rlhf.ratings!r}"
    for column in COLUMNS:
        if warning := check_classes(train, column):
            logger.warning("%s: %s", rlhf.ratings, warning)
    good = sum(image.quality >= 2 for image in val)
    if rlhf.threshold is None and not 0 < good < len(val):
        raise UserError(
            f"{name} has {good} images of quality 2 or more and {len(val) - good} below 2; the Selector's threshold "
            "needs both: rate more images, or give rlhf.threshold"
        )
    logger.info("learning from %d rated images, measuring with %d", len(train), len(val))
    return train, val


def read_table(path: str, root: str, within: str) -> list[RatedImage]:
    ratings = read_ratings(path, root, within)
    images = aggregate(ratings)
    check_images([image.path for image in images])
    numbers = " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in agreement(ratings).items())
    logger.info("%s: %d ratings of %d images; raters' agreement: %s", path, len(ratings), len(images), numbers)
    return images


def check_disjoint(train: Sequence[RatedImage], val: Sequence[RatedImage], rlhf: ConfigDict) -> None:
    """Raise UserError if training and validation share an image or a patient."""
    keys = {"image": lambda image: str(image.path.resolve())}
    if rlhf.data_path or Path(rlhf.ratings).resolve().parent == Path(rlhf.val_ratings).resolve().parent:
        keys["patient"] = lambda image: image.patient  # often a file's name, which has no meaning in another folder
    for what, key in keys.items():
        if common := sorted(set(map(key, train)) & set(map(key, val))):
            raise UserError(
                f"{rlhf.ratings!r} and {rlhf.val_ratings!r} share the {what} {common[0]!r}; give rlhf.val_ratings of "
                "other patients"
            )


def train(accelerator: Accelerator, training: StageTraining, output: Path, first_epoch: int) -> dict[str, Any]:
    """Run the rest of a stage and return its description. The stage's state stays in `output`."""
    log = JsonLines(output / "metrics.jsonl", accelerator.is_main_process, keep=first_epoch + training.epoch)
    for epoch in range(training.epoch, training.rlhf.num_epochs):
        entry = training.run_epoch()
        log.write({"epoch": first_epoch + epoch} | entry)
        for name, loss in entry["loss"].items():
            values = (f"{key} {'-' if value is None else format(value, '.3f')}" for key, value in entry[name].items())
            logger.info("stage %d epoch %d  %s: loss %.4f, %s", training.stage, epoch, name, loss, ", ".join(values))
        if accelerator.is_main_process:
            training.state.save(epoch=training.epoch)
    held_out, epochs = training.held_out(), first_epoch + training.epoch
    training.finish()
    return {"stage": training.stage, "epochs": epochs, "settings": training.settings, "held_out": held_out}


def first_stage(
    accelerator: Accelerator, config: ConfigDict, train_set: RatedSet, val_set: RatedSet, finished: dict[str, Any]
) -> None:
    """Train both judges on all ratings and calibrate the threshold; if `finished`, only compare the settings."""
    rlhf, output, networks = config.rlhf, Path(config.rlhf.output), new_judges(accelerator, config, train_set.prompts)
    if finished:
        settings = stage_settings(accelerator, 1, networks, train_set, val_set, rlhf, config.seed)
        if changed := difference(finished["settings"], json.loads(json.dumps(settings))):
            name, before, after = changed
            raise UserError(
                f"stage 1 in {str(output)!r} is of another training, with {name}={before}, now it is {after}; use the "
                "same value, another rlhf.output, or rlhf.stages=(2,) to continue from it unchanged"
            )
        return
    training = StageTraining(accelerator, 1, networks, train_set, val_set, rlhf, config.seed, output)
    origin = train(accelerator, training, output, 0)
    selector, policy = networks["selector"], networks["policy"]
    selector.origin = policy.origin = origin
    calibrate(selector, all_scores(accelerator, selector, val_set, rlhf.batch_size), val_set, rlhf.threshold)
    if accelerator.is_main_process:
        save_selector(selector, output / SELECTOR_FILE)
        save_policy(policy, output / POLICY_FILE)
        training.state.remove()
    accelerator.wait_for_everyone()


def new_judges(accelerator: Accelerator, config: ConfigDict, prompts: Sequence[str]) -> dict[str, Selector | Policy]:
    rlhf = config.rlhf
    sizes = {name: rlhf[name] for name in ("image_size", "patch_size", "width", "heads", "dropout", "stem")}
    with accelerator.local_main_process_first():  # one process downloads
        text = TextFeatures(rlhf.text_encoder, rlhf.text_tokens, accelerator.device)
    set_seed(config.seed)
    selector = Selector(VisionSizes(layers=rlhf.selector_layers, mlp_ratio=MLP_RATIO, **sizes))
    policy = Policy(VisionSizes(layers=rlhf.policy_layers, **sizes), text)
    policy.fit_text(prompts)
    return {"selector": selector, "policy": policy}


def calibrate(selector: Selector, scores: torch.Tensor, rated: RatedSet, given: float | None) -> None:
    """Set the Selector's threshold: the given one, else the best for the scores of these images."""
    if given is not None:
        selector.threshold, selector.calibration = given, {"how": "given as rlhf.threshold"}
    else:
        selector.threshold, youden = best_threshold(scores, rated.rewards["quality"])
        selector.calibration = {"how": "best J for ratings of 2 or more", "J": youden, "images": len(rated)}
        if youden <= 0:
            logger.warning("the Selector is no better than chance; its threshold is meaningless")
    share = selector.accepts(scores).double().mean().item()
    logger.info("threshold %.4f (%s) passes %.1f %%", selector.threshold, selector.calibration["how"], 100 * share)


def second_stage(accelerator: Accelerator, config: ConfigDict, train_set: RatedSet, val_set: RatedSet) -> None:
    """Train stage 1's Policy on images that the Selector passes, and a share of rejected ones."""
    rlhf, output = config.rlhf, Path(config.rlhf.output)
    selector, policy = load_judges(output, accelerator.device, rlhf.text_encoder)
    scores = all_scores(accelerator, selector, train_set, rlhf.batch_size)
    other_threshold = rlhf.threshold is not None and rlhf.threshold != selector.threshold
    if other_threshold:
        calibrate(selector, scores, train_set, rlhf.threshold)
    passed = selector.accepts(scores)
    chosen = chosen_samples(passed, rlhf.replay_share, config.seed)
    counts = int(passed.sum()), len(passed), len(chosen) - int(passed.sum())
    logger.info("stage 2: %d of %d images that the Selector passes, and %d that it rejects", *counts)
    networks, samples = {"policy": policy.requires_grad_(True)}, train_set.subset(chosen)
    training = StageTraining(accelerator, 2, networks, samples, val_set, rlhf, config.seed, output, scores[chosen])
    policy.origin = train(accelerator, training, output, policy.origin["epochs"])
    if accelerator.is_main_process:
        with atomic_write(output / FIRST_POLICY) as temporary:
            shutil.copyfile(output / POLICY_FILE, temporary)
        if other_threshold:
            save_selector(selector, output / SELECTOR_FILE)
        save_policy(policy, output / POLICY_FILE)
        training.state.remove()
    accelerator.wait_for_everyone()


def finished_stage(output: Path, stages: tuple[int, ...]) -> dict[str, Any]:
    """Return the description of the last finished stage in `output`, {} without one.

    Raises UserError if there is nothing to continue from, or nothing left to do.
    """
    if not (output / POLICY_FILE).exists():
        if stages[0] == 2:
            raise UserError(f"{str(output)!r} holds no judges of stage 1; run rlhf.stages=(1,2) or (1,)")
        if (output / SELECTOR_FILE).exists() and not state_path(output, 1).exists():
            raise UserError(f"{str(output / SELECTOR_FILE)!r} exists already; choose another rlhf.output or move it")
        return {}
    shape = DESCRIPTION | {"origin": {"stage": range(1, 3), "epochs": COUNT, "settings": dict}}
    finished = read_judge(output / POLICY_FILE, "policy", shape)[0]["origin"]
    if finished["stage"] >= stages[-1] and not state_path(output, finished["stage"]).exists():
        raise UserError(
            f"stage {finished['stage']} in {str(output)!r} is finished; choose another rlhf.output, or move it away"
        )
    return finished


def main(_) -> None:
    config = expand_config(FLAGS.config, "rlhf.output", "rlhf.ratings", "rlhf.text_encoder")
    check_ranges(config, {"seed": SEED})
    check_settings(config.rlhf)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.rlhf.output, "another rlhf.output"):
        learn(accelerator, config)


def learn(accelerator: Accelerator, config: ConfigDict) -> None:
    """Run the stages that are not finished."""
    rlhf, stages, output = config.rlhf, tuple(config.rlhf.stages), Path(config.rlhf.output)
    finished = finished_stage(output, stages)
    accelerator.wait_for_everyone()
    if finished and accelerator.is_main_process:  # killed after the last file of a stage was written
        state_path(output, finished["stage"]).unlink(missing_ok=True)
    if finished and finished["stage"] >= stages[-1]:
        logger.info("stage %d in %s is finished", finished["stage"], output)
        return
    train_set, val_set = (read_rated(rated, rlhf.image_size) for rated in read_images(config))
    if rlhf.autoencoder:
        vae = load_pipeline(rlhf.autoencoder, device=accelerator.device).vae
        train_set, val_set = (through_autoencoder(rated, vae, rlhf.batch_size) for rated in (train_set, val_set))
    if 1 in stages:
        first_stage(accelerator, config, train_set, val_set, finished)
    if 2 in stages:
        second_stage(accelerator, config, train_set, val_set)
    logger.info("Selector and Policy are in %s", output)


if __name__ == "__main__":
    cli(main)

"""Train Selector and Policy on experts' ratings of 1 to 3 in two stages (ddpo_pytorch/rlhf/reinforce.py).

    accelerate launch scripts/train_rlhf.py --config config/fundus.py:train_rlhf

Stage 1: both learn from all rated images, then the Selector's threshold is calibrated on held-out ratings. Stage 2: the
Policy continues on images that the Selector passes, a share of others, and optionally a pool (`rlhf.pool`) rated by the
Selector; the Selector and its threshold stay fixed. Rerun the same command to resume.
"""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from ddpo_pytorch.data.fundus import check_images
from ddpo_pytorch.data.ratings import RatedImage, aggregate, agreement, check_classes, read_ratings, split_by_patient
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.rlhf.rated_images import COLUMNS, read_pool, read_rated, through_autoencoder
from ddpo_pytorch.rlhf.training import check_output, check_settings, first_stage, second_stage, state_path
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import SEED, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/fundus.py:train_rlhf")
logger = logging.getLogger(__name__)


def read_images(config: ConfigDict) -> tuple[list[RatedImage], list[RatedImage]]:
    """Return rated images to learn from, and of other patients to measure with. Raises UserError for unusable ones."""
    rlhf, tables = config.rlhf, []
    for path in filter(None, (rlhf.ratings, rlhf.val_ratings)):
        ratings = read_ratings(path, rlhf.data_path, config.base_log_path)
        tables.append(aggregate(ratings))
        check_images([image.path for image in tables[-1]])
        statistics = agreement(ratings).items()
        numbers = " ".join(f"{name} {f'{v:.3f}' if isinstance(v, float) else v}" for name, v in statistics)
        logger.info("%s: %d ratings of %d images; raters' agreement: %s", path, len(ratings), len(tables[-1]), numbers)
    train, val = tables if rlhf.val_ratings else split_by_patient(tables[0], rlhf.val_share, config.seed)
    keys = {"image": lambda image: str(image.path.resolve())}
    if rlhf.data_path or Path(rlhf.ratings).resolve().parent == Path(rlhf.val_ratings).resolve().parent:
        keys["patient"] = lambda image: image.patient  # often a file name, which is meaningless in another folder
    for what, key in keys.items():
        if common := sorted(set(map(key, train)) & set(map(key, val))):
            both = f"{rlhf.ratings!r} and {rlhf.val_ratings!r}"
            raise UserError(f"{both} share the {what} {common[0]!r}; give rlhf.val_ratings of other patients")
    for column in COLUMNS:
        if warning := check_classes(train, column):
            logger.warning("%s: %s", rlhf.ratings, warning)
    good = sum(image.quality >= 2 for image in val)
    if rlhf.threshold is None and not 0 < good < len(val):
        counts = f"{good} validation images of quality 2 or more and {len(val) - good} below 2"
        advice = "the Selector's threshold needs both: rate more images, or give rlhf.threshold"
        raise UserError(f"{rlhf.val_ratings or rlhf.ratings!r} has {counts}; {advice}")
    logger.info("learning from %d rated images, measuring with %d", len(train), len(val))
    return train, val


def main(_) -> None:
    config = expand_config(FLAGS.config, "rlhf.output", "rlhf.ratings", "rlhf.text_encoder")
    check_ranges(config, {"seed": SEED})
    check_settings(config.rlhf)
    rlhf, stages, output = config.rlhf, tuple(config.rlhf.stages), Path(config.rlhf.output)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, output, "another rlhf.output"):
        check_output(rlhf)
        accelerator.wait_for_everyone()
        train_set, val_set = (read_rated(rated, rlhf.image_size, rlhf.resize) for rated in read_images(config))
        if rlhf.autoencoder:
            vae = load_pipeline(rlhf.autoencoder, device=accelerator.device).vae
            train_set, val_set = (through_autoencoder(rated, vae, rlhf.batch_size) for rated in (train_set, val_set))
        # generated images already come from an autoencoder
        pool = read_pool(rlhf.pool, rlhf.image_size) if rlhf.pool else None
        if 1 in stages:
            first_stage(accelerator, config, train_set, val_set)
        if 2 in stages:
            second_stage(accelerator, config, train_set + pool if pool else train_set, val_set)
        for stage in (1, 2) if accelerator.is_main_process else ():
            state_path(output, stage).unlink(missing_ok=True)
        logger.info("Selector and Policy are in %s", output)


if __name__ == "__main__":
    cli(main)

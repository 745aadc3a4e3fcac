"""Train or test the attribute classifier: six heads for the reward, four for the judge.

    accelerate launch --num_processes 1 scripts/train_isic_classifier.py --data_path DIR --num_classes 6

or, for any data set, one head for each of `--labels`, columns of tables file_name,text,... (data/metadata.py).
EfficientNet-B0, dropout 0.3, BCE with logits, AdamW with cosine decay, best epoch by validation loss. Rerun the same
command to resume.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from ddpo_pytorch.data.images import ImageFiles, decoded, rows_with_image, stem_of
from ddpo_pytorch.data.isic import LABELS, load_split
from ddpo_pytorch.data.metadata import read_metadata, requested_labels
from ddpo_pytorch.data.splits import drop_broken, read_splits
from ddpo_pytorch.generator.from_scratch import load_vae
from ddpo_pytorch.generator.latents import reconstruct
from ddpo_pytorch.judges import classifier
from ddpo_pytorch.judges.classifier_report import Report, best_thresholds, check_both_classes
from ddpo_pytorch.judges.classifier_training import FitState, Recipe, define_flags, fit, predict
from ddpo_pytorch.utils.cli import cli, expand_flags
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint

FLAGS = flags.FLAGS
define_flags()
flags.DEFINE_enum("mode", "train", ["train", "test"], "train a classifier, or report on the test split")
flags.DEFINE_list("labels", [], "instead of --num_classes: columns of 0 and 1 in tables file_name,text,... of any data")
flags.DEFINE_string("checkpoint_dir", "rl4med-out/classifier", "folder for the classifier and its reports")
flags.DEFINE_string("checkpoint", "", "classifier to start from, or to test (default: that in checkpoint_dir)")
flags.DEFINE_string("through_vae", "", "autoencoder or model: also test on its reconstructions, or train half on them")
flags.DEFINE_string("cache_dir", None, "folder for decoded images, by default <checkpoint_dir>/cache; '' = no cache")
flags.DEFINE_bool("pos_weight", False, "weight an attribute's positives by negatives/positives of the training split")
flags.DEFINE_float("focal_gamma", 0.0, "exponent of the focal loss; 0 is plain BCE", lower_bound=0)
flags.DEFINE_bool("quarter_turns", False, "also rotate training images by 90 degrees at random")
flags.DEFINE_float("ema_decay", 0.0, "decay of a running average of the weights, then validated and saved; 0 = none")
flags.DEFINE_integer("limit", 0, "rows to use of each split, 0 = all", lower_bound=0)
flags.DEFINE_bool("skip_broken", False, "skip damaged images with a warning instead of stopping")
flags.DEFINE_bool("calibrate_thresholds", False, "save the thresholds with the best F1 on val; only reports use them")
flags.DEFINE_bool("save_published", False, "also write artifact_classifier_train_H<n>.pth in the published format")
flags.DEFINE_integer("seed", Recipe.seed, "seed of initial weights, order, flips and dropout", lower_bound=0)

logger = logging.getLogger(__name__)
UNFINISHED = ".unfinished.pt"  # suffix of the training state, which is deleted at the end


def open_images(accelerator: Accelerator, tables: Sequence[str], size: int, names: tuple[str, ...]) -> list[Dataset]:
    """Return the images of each table, decoded to squares, with their labels."""
    files = []
    for table in tables:
        if FLAGS.labels:
            rows, paths, missing = rows_with_image(read_metadata(table), table, FLAGS.data_path, FLAGS.limit)
        else:
            rows, paths, missing = load_split(table, FLAGS.data_path, FLAGS.limit)
        if FLAGS.skip_broken:
            rows, paths = drop_broken(rows, paths)
        logger.info("%s: %d images, %d rows without one are skipped", table, len(rows), missing)
        labels = requested_labels([row.caption for row in rows], names, [row.fields for row in rows]).float()
        check_both_classes(labels, names, table, training=FLAGS.mode == "train")
        files.append(ImageFiles(paths, labels, size))
    cache = str(Path(FLAGS.checkpoint_dir) / "cache") if FLAGS.cache_dir is None else FLAGS.cache_dir
    with accelerator.local_main_process_first():
        return [decoded(one, cache) for one in files]


def load_checkpoint(path: str | Path, names: tuple[str, ...]) -> classifier.ArtifactClassifier:
    model = classifier.load_classifier(path)
    if model.labels != names:
        given, wanted = (f"{len(labels)} heads ({', '.join(labels)})" for labels in (model.labels, names))
        raise UserError(f"{str(path)!r} has {given}, not {wanted}; give the same --num_classes or --labels")
    return model


def autoencoder_change(accelerator: Accelerator, image_size: int) -> tuple[int, Callable | None, str]:
    """Return the size of images, and the reconstruction by --through_vae with its fingerprint, or None and ""."""
    if not FLAGS.through_vae:
        return image_size, None, ""
    folder = Path(FLAGS.through_vae)
    vae = load_vae(folder / "vae" if (folder / "vae").is_dir() else folder).to(accelerator.device)
    return vae.config.sample_size, partial(reconstruct, vae), fingerprint(vae)


def train(accelerator: Accelerator, names: tuple[str, ...], output: Path) -> None:
    recipe = Recipe(**{name: FLAGS[name].value for name in Recipe.__dataclass_fields__})
    published = output.with_name(f"artifact_classifier_train_H{len(names)}.pth")
    for path in (output, published) if FLAGS.save_published else (output,):
        if path.exists() and not output.with_suffix(UNFINISHED).exists():
            raise UserError(f"{str(path)!r} exists already; choose another --checkpoint_dir or move it away")
    tables = FLAGS.train_csv, FLAGS.val_csv
    if not FLAGS.labels:
        read_splits({"train": Path(FLAGS.train_csv), "val": Path(FLAGS.val_csv)})  # refuses an image in both
    elif both := set.intersection(*({stem_of(row.image).casefold() for row in read_metadata(path)} for path in tables)):
        problem = f"{FLAGS.train_csv!r} and {FLAGS.val_csv!r} share {len(both)} images, first {min(both)!r}"
        raise UserError(f"{problem}; split them")
    set_seed(FLAGS.seed)
    if FLAGS.checkpoint:
        model = load_checkpoint(FLAGS.checkpoint, names).requires_grad_(True)
        model.thresholds = dict.fromkeys(names, 0.5)  # those of the file belong to its weights
    else:
        with accelerator.local_main_process_first():  # one process downloads
            model = classifier.new_classifier(names, FLAGS.image_size, FLAGS.arch, FLAGS.weights)
    if FLAGS.save_published:
        classifier.check_publishable(model)
        if model.image_size != classifier.PUBLISHED_SIZE:
            logger.warning("%s will not state its image size; loaders assume %d", published, classifier.PUBLISHED_SIZE)
    size, change, change_name = autoencoder_change(accelerator, model.image_size)
    sets = open_images(accelerator, tables, size, names)

    def save(best: FitState) -> None:
        if FLAGS.calibrate_thresholds:
            model.thresholds = best_thresholds(best.logits, best.labels, model.labels)
        if accelerator.is_main_process:
            classifier.save_classifier(model, output)
            if FLAGS.save_published:
                classifier.save_published(model, published, best.epoch, best.val_loss, best.accuracy.mean().item())

    state = output.with_suffix(UNFINISHED)
    best = fit(
        accelerator, model, *sets, recipe, state_path=state, on_best=save, change=change, change_name=change_name
    )
    logger.info("best epoch %d, validation loss %.4f, saved in %s", best.epoch, best.val_loss, output)


def test(accelerator: Accelerator, names: tuple[str, ...], output: Path) -> None:
    path = Path(FLAGS.checkpoint or output)
    model = load_checkpoint(path, names)
    if path.with_suffix(UNFINISHED).exists():
        logger.warning("%s is the best epoch so far of an unfinished run", path)
    size, change, _ = autoencoder_change(accelerator, model.image_size)
    tests = {"_original": None, "_reconstructed": change} if change else {"": None}
    (files,) = open_images(accelerator, [FLAGS.test_csv], size, names)
    for name, change in tests.items():
        logits, labels = predict(accelerator, model, files, FLAGS.batch_size, FLAGS.num_workers, change)
        if accelerator.is_main_process:
            report = Report(logits, labels, model.labels, model.thresholds)
            logger.info("%s on %s%s\n%s", path, FLAGS.test_csv, name.replace("_", ", "), report.table())
            written = report.write(Path(FLAGS.checkpoint_dir) / f"test_H{len(names)}{name}")
            logger.info("written: %s", ", ".join(map(str, written)))


def main(_) -> None:
    required = ("data_path", "train_csv", "val_csv", "test_csv", "checkpoint_dir", "weights")
    expand_flags(FLAGS, required, optional=("checkpoint", "cache_dir", "through_vae"))
    accelerator = make_accelerator(FLAGS.mixed_precision, process_timeout=FLAGS.process_timeout)
    names = tuple(FLAGS.labels) or LABELS[: int(FLAGS.num_classes)]
    kind = "classifier" if FLAGS.labels else "artifact_classifier"
    output = Path(FLAGS.checkpoint_dir) / f"{kind}_H{len(names)}.safetensors"
    with locked_by_main(accelerator, FLAGS.checkpoint_dir, "another --checkpoint_dir"):
        (train if FLAGS.mode == "train" else test)(accelerator, names, output)


if __name__ == "__main__":
    cli(main)

"""Table 4: train classifiers on real images, and on real and synthetic images, and compare them.

    accelerate launch scripts/augment.py --data_path DIR --samples SD=FOLDER --samples SD-RL=FOLDER --ratios 1,balanced

Sample folders are those of eval.py; captions determine the labels. A subgroup is a combination of labels. With ratio r,
each subgroup of n real training images gets r x n synthetic ones; "balanced" fills each up to the size of the most
common subgroup. All runs (real; each folder x ratio; once per seed) use the same real validation and test images and,
with the same seed, the same initial weights; an epoch always has as many images as there are real ones. The test split
does not influence any of them.

Writes <output>/<name>_<ratio>/seed<n>/ with the classifier, its logits on the test split and settings.json, and
<output>/table4.md, .csv and .json. Rerun the same command to resume; with more seeds, ratios or folders, only the new
classifiers are trained.
"""

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, Dataset, Subset

from ddpo_pytorch.augmentation import plan as planning
from ddpo_pytorch.augmentation.plan import Data, Training
from ddpo_pytorch.augmentation.report import as_csv, compare, markdown, subgroups
from ddpo_pytorch.data.images import ImageFiles, decoded
from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.sample_folder import check_claim, claim_folder
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, new_classifier, save_classifier
from ddpo_pytorch.judges.classifier_training import FitState, Recipe, define_flags, fit, predict
from ddpo_pytorch.utils.cli import cli, expand_flags
from ddpo_pytorch.utils.distributed import locked_by_main, make_accelerator, run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, sha256, write_file
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.settings import SHARE, check_ranges
from ddpo_pytorch.utils.weights import read_safetensors

FLAGS = flags.FLAGS
define_flags()
flags.DEFINE_multi_string("samples", [], "NAME=FOLDER of synthetic images; repeat for each folder")
flags.DEFINE_string("ratios", "1", f"synthetic images per real one, separated by commas; or {planning.BALANCED}")
flags.DEFINE_string("seeds", "0,1,2", "seeds of initial weights, order, flips and drawn samples; 3 or more")
flags.DEFINE_string("output", "rl4med-out/augment", "folder for classifiers and tables")
flags.DEFINE_integer("limit", 0, "number of real training images, a fixed random subset; 0 = all", lower_bound=0)
flags.DEFINE_float("minority_share", 0.02, "subgroups below this share of the real training images are the minority")
flags.DEFINE_string("cache_dir", None, "folder for decoded images, by default <output>/cache; '' = no cache")

logger = logging.getLogger(__name__)
LOGITS = "test_logits.safetensors"
SPLITS = ("train", "val", "test")


def check_settings(trainings: Sequence[Training], data: Data, processes: int) -> dict[Path, dict[str, Any]]:
    """Return by folder the settings of its classifier and logits. Raises UserError for a folder with other settings."""

    def listing(files: ImageFiles) -> dict[str, Any]:
        # the digest is of names, contents and labels, but not of their folder
        return {"images": len(files), "digest": files.digest()}

    names = ("arch", "image_size", "num_epochs", "patience", "learning_rate", "mixed_precision")
    common = {name: FLAGS[name].value for name in names}
    common |= {"num_classes": int(FLAGS.num_classes), "images_per_step": FLAGS.batch_size * processes}
    weights = resolve(FLAGS.weights)
    common |= {"weights": sha256(weights) if weights.is_file() else FLAGS.weights}
    common |= {f"{split}_images": listing(data.files[split]) for split in SPLITS}
    settings = {}
    for training in trainings:
        folder, files = Path(FLAGS.output, training.folder), listing(data.training_files(training))
        settings[folder] = common | {"seed": training.seed, "train_images": files}
        if not check_claim(folder, settings[folder]) and (folder / LOGITS).exists():
            raise UserError(f"{str(folder)!r} holds {LOGITS} of unknown settings; delete it and rerun the same command")
    return settings


def new_model(accelerator: Accelerator) -> ArtifactClassifier:
    with accelerator.local_main_process_first():  # one process downloads
        return new_classifier(LABELS[: int(FLAGS.num_classes)], FLAGS.image_size, FLAGS.arch, FLAGS.weights)


def train(
    accelerator: Accelerator, training: Training, recipe: Recipe, data: Data, sets: Mapping[str, Dataset]
) -> None:
    """Train a classifier unless it exists; write it and its test logits. Raises UserError if they are not finite."""
    folder = Path(FLAGS.output, training.folder)
    path = folder / f"artifact_classifier_H{FLAGS.num_classes}.safetensors"
    state = path.with_name(f"{path.stem}.unfinished.pt")  # from the first epoch to the last
    trained = path.is_file() and not state.exists()
    accelerator.wait_for_everyone()  # all processes have checked before one of them writes
    if trained:
        model = load_classifier(path, accelerator.device)
    else:
        set_seed(training.seed)
        model, images = new_model(accelerator), sets["train"]
        if training.drawn:
            images = ConcatDataset([images, Subset(sets[training.source], training.drawn.places)])
            images.files = data.training_files(training)
            images.targets = images.files.targets  # `fit` reads both

        def save(_: FitState) -> None:
            if accelerator.is_main_process:
                save_classifier(model, path)

        real = len(data.files["train"])
        fit(accelerator, model, images, sets["val"], recipe, state_path=state, on_best=save, epoch_images=real)
    logits, labels = predict(accelerator, model, sets["test"], recipe.batch_size, recipe.num_workers)
    if not logits.isfinite().all():
        raise UserError(f"logits of {str(path)!r} are not finite; lower --learning_rate, with another --output")
    if accelerator.is_main_process:
        with atomic_write(folder / LOGITS) as temporary:
            save_file({"logits": logits, "labels": labels}, temporary)
    accelerator.wait_for_everyone()


def write_report(trainings: Sequence[Training], data: Data, seeds: Sequence[int]) -> str:
    """Write table4.md, .csv and .json, and return the Markdown. Raises UserError for damaged logits."""
    logits, truth = defaultdict(list), data.files["test"].targets.numpy() > 0
    for training in trainings:
        path = Path(FLAGS.output, training.folder, LOGITS)
        try:
            values = read_safetensors(path)[0].get("logits", torch.empty(0)).double().numpy()
        except UserError as error:
            raise UserError(f"{error} (delete {str(path)!r} and rerun the same command)") from error
        if values.shape != truth.shape or not np.isfinite(values).all():
            reason = f"logits of shape {values.shape} for {truth.shape}, or not finite"
            raise UserError(f"{str(path)!r} is damaged ({reason}); delete it and rerun the same command")
        logits[training.name].append(values)
    logits = {name: np.stack(per_seed) for name, per_seed in logits.items()}
    real, least = data.real, FLAGS.minority_share * len(data.captions["train"])
    minor = {caption for caption in CAPTIONS if real[caption] < least}  # also those without any real image
    chosen = {"all": None, "minority": np.array([caption in minor for caption in data.captions["test"]])}
    rows = []
    for group, images in chosen.items():
        rows += [{"group": group} | row for row in compare(logits, truth, LABELS[: truth.shape[1]], images)]
    drawn = {training.name: training.drawn for training in trainings if training.drawn}  # of any seed
    metadata = {
        "seeds": seeds,
        "minority_share": FLAGS.minority_share,
        "test_images": len(truth),
        "subgroups": subgroups(real, Counter(data.captions["test"]), minor, drawn),
        "flags": {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])},
        "tables": {name: sha256(FLAGS[name].value) for name in ("train_csv", "val_csv", "test_csv")},
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
    }
    text = markdown(rows, metadata)
    for suffix, content in ((".md", text), (".csv", as_csv(rows)), (".json", json.dumps(metadata | {"rows": rows}))):
        write_file(Path(FLAGS.output, f"table4{suffix}"), content)
    return text


def main(_) -> None:
    expand_flags(FLAGS, ("data_path", "train_csv", "val_csv", "test_csv", "output", "weights"), optional=("cache_dir",))
    folders, ratios = planning.parse_samples(FLAGS.samples), planning.parse_ratios(FLAGS.ratios)
    seeds = planning.parse_seeds(FLAGS.seeds)
    check_ranges({"minority_share": FLAGS.minority_share}, {"minority_share": SHARE}, "--")
    names = ("num_epochs", "patience", "batch_size", "learning_rate", "num_workers")
    recipes = {seed: Recipe(**{name: FLAGS[name].value for name in names}, seed=seed) for seed in seeds}
    accelerator = make_accelerator(FLAGS.mixed_precision, process_timeout=FLAGS.process_timeout)
    tables, output = {split: Path(FLAGS[f"{split}_csv"].value) for split in SPLITS}, FLAGS.output
    with locked_by_main(accelerator, output, "another --output"):
        sizes = int(FLAGS.num_classes), FLAGS.image_size, FLAGS.limit
        data = planning.read_data(tables, FLAGS.data_path, folders, *sizes)
        trainings = planning.plan(data.real, {name: data.captions[name] for name in folders}, ratios, seeds)
        if len(seeds) < 3:
            logger.warning("%d seed(s) cannot tell differences from chance; give 3 or more", len(seeds))
        settings = check_settings(trainings, data, accelerator.num_processes)
        remaining = [training for training in trainings if not Path(output, training.folder, LOGITS).is_file()]
        logger.info("%d training runs, %d are complete", len(trainings), len(trainings) - len(remaining))
        if remaining:
            new_model(accelerator)  # raises for unusable weights before images are decoded
            cache = Path(output, "cache") if FLAGS.cache_dir is None else FLAGS.cache_dir
            with accelerator.local_main_process_first():
                sets = {name: decoded(files, cache) for name, files in data.files.items()}
        for number, training in enumerate(remaining, 1):
            logger.info("training run %d of %d: %s, seed %d", number, len(remaining), training.name, training.seed)
            folder = Path(output, training.folder)
            run_on_main_process(accelerator, claim_folder, folder, settings[folder], {"training": training.name})
            train(accelerator, training, recipes[training.seed], data, sets)
        if accelerator.is_main_process:
            logger.info("\n%s\nin %s", write_report(trainings, data, seeds), Path(output, "table4.{md,csv,json}"))
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)

"""Table 4: do synthetic images help a classifier? Trains it on real images, and on real ones with some of a folder's.

    accelerate launch scripts/augment.py --data_path DIR --samples SD=FOLDER --samples SD-RL=FOLDER --ratios 1,balanced

Each folder of samples is one that eval.py writes; the captions are the labels. A subgroup is a combination of labels.
With ratio r each subgroup of n real training images gets r x n of the folder's, with "balanced" what it lacks of the
commonest one's number. Every training (real; each folder x ratio; each once a seed) has the same validation and test
images, all real, and as many updates an epoch: each draws as many images as there are real ones. Trainings of one seed
begin with the same weights. The test split has no influence on any of them.

Writes <output>/<name>_<ratio>/seed<n>/: the classifier, its logits on the test split, settings.json; and
<output>/table4.md, .csv and .json. The same command continues where it was stopped, and a later one with more seeds,
ratios or folders trains what is not there yet.
"""

import dataclasses
import hashlib
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, Dataset, Subset

from ddpo_pytorch.augmentation.compare import compare
from ddpo_pytorch.augmentation.plan import (
    BALANCED,
    Training,
    minority,
    parse_ratios,
    parse_samples,
    parse_seeds,
    plan,
)
from ddpo_pytorch.augmentation.report import as_csv, markdown, subgroups
from ddpo_pytorch.data.image_cache import decoded
from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import LABELS, Row, labels_of, load_split
from ddpo_pytorch.data.sample_folder import captions_without_images, claim_folder, list_samples, read_settings
from ddpo_pytorch.data.splits import read_splits
from ddpo_pytorch.judges.backbones import new_classifier
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.judges.classifier_report import one_sided
from ddpo_pytorch.judges.classifier_training import FitState, Recipe, fit, predict
from ddpo_pytorch.metrics.vocabulary import lacking_images
from ddpo_pytorch.utils.cli import cli, expand_flags
from ddpo_pytorch.utils.distributed import PROCESS_TIMEOUT, locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import atomic_write, sha256
from ddpo_pytorch.utils.published import resolve

FLAGS = flags.FLAGS
flags.DEFINE_string("data_path", None, "folder of <image>.jpg files", required=True)
flags.DEFINE_string("train_csv", "rl4med-out/data/splits/isic2019_train.csv", "training split")
flags.DEFINE_string("val_csv", "rl4med-out/data/splits/isic2019_val.csv", "validation split")
flags.DEFINE_string("test_csv", "rl4med-out/data/splits/isic2019_test.csv", "test split")
flags.DEFINE_multi_string("samples", [], "NAME=FOLDER of synthetic images; once for each folder")
flags.DEFINE_string("ratios", "1", f"synthetic images for each real one, several by commas; {BALANCED} is one as well")
flags.DEFINE_string("seeds", "0,1,2", "seeds of initial weights, order, flips and the samples drawn; 3 or more")
flags.DEFINE_string("output", "rl4med-out/augment", "folder for classifiers and tables")
flags.DEFINE_enum("num_classes", "4", ["4", "6"], "4: the artifacts; 6: artifacts and diseases")
flags.DEFINE_integer("num_epochs", Recipe.num_epochs, "epochs at most", lower_bound=1)
flags.DEFINE_integer(
    "patience", Recipe.patience, "stop after this many epochs without a better validation loss", lower_bound=1
)
flags.DEFINE_integer("batch_size", Recipe.batch_size, "images per process and step", lower_bound=1)
flags.DEFINE_integer("image_size", 512, "side in pixels images are resized to", lower_bound=32)
flags.DEFINE_float("learning_rate", Recipe.learning_rate, "AdamW learning rate; decays to 1e-6 along a cosine")
flags.DEFINE_string("arch", "efficientnet_b0", "timm architecture")
flags.DEFINE_string("weights", "imagenet", "imagenet, none, or a file whose backbone to start from")
flags.DEFINE_integer("limit", 0, "real training images, drawn at random but always the same; 0 = all", lower_bound=0)
flags.DEFINE_float("minority_share", 0.02, "subgroups below this share of the real training images are the minority")
flags.DEFINE_enum("mixed_precision", "no", ["no", "bf16", "fp16"], "arithmetic of the network; fp16 needs a GPU")
flags.DEFINE_string("cache_dir", None, "folder for decoded images, by default <output>/cache; '' keeps none")
flags.DEFINE_integer("num_workers", 0, "image loading processes", lower_bound=0)
flags.DEFINE_float("process_timeout", PROCESS_TIMEOUT, "seconds that a process waits for the others")

logger = logging.getLogger(__name__)
LOGITS = "test_logits.safetensors"


class Mixed(ConcatDataset):
    """Decoded images of two sets as one; `files` and `targets` say what they are, as behind a cache."""

    def __init__(self, real: Dataset, samples: Dataset, files: ImageFiles):
        super().__init__([real, samples])
        self.files, self.targets = files, files.targets


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and files of the three splits, and files, captions by name of each folder of samples."""

    rows: dict[str, list[Row]]
    files: dict[str, ImageFiles]
    samples: dict[str, ImageFiles]
    captions: dict[str, list[str]]

    @property
    def real(self) -> Counter:
        """Real training images by caption."""
        return Counter(row.caption for row in self.rows["train"])


def targets_of(labels: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([own[: int(FLAGS.num_classes)] for own in labels], dtype=torch.float32)


def read_data(folders: dict[str, Path]) -> Data:
    """Find all images. Raises UserError for what would stop a training or leave its table without a meaning."""
    tables = {"train": Path(FLAGS.train_csv), "val": Path(FLAGS.val_csv), "test": Path(FLAGS.test_csv)}
    read_splits(tables)  # refuses an image in two of them
    rows, files, samples, captions = {}, {}, {}, {}
    for split, table in tables.items():
        rows[split], paths, missing = load_split(table, FLAGS.data_path)
        if split == "train" and 0 < FLAGS.limit < len(paths):
            chosen = np.sort(np.random.default_rng(0).permutation(len(paths))[: FLAGS.limit])
            rows[split], paths = [rows[split][index] for index in chosen], [paths[index] for index in chosen]
        logger.info("%s: %d images, %d rows without one are skipped", table, len(paths), missing)
        files[split] = ImageFiles(paths, targets_of([row.labels for row in rows[split]]), FLAGS.image_size)
        for name, absent in one_sided(files[split].targets, LABELS[: int(FLAGS.num_classes)]):
            message = f"{str(table)!r} has no {absent} of {name!r} among its {len(paths)} images"
            if split != "test":
                raise UserError(f"{message}; training needs both: add such images, or raise --limit if you gave one")
            logger.warning("%s; its AUC is undefined", message)
    for name, folder in folders.items():
        found = list_samples(folder)
        captions[name] = [caption for _, caption in found]
        if lacking := captions_without_images(folder, found):
            logger.warning("%s", lacking_images(folder, lacking))
        labels = targets_of([labels_of(caption) for caption in captions[name]])
        samples[name] = ImageFiles([path for path, _ in found], labels, FLAGS.image_size)
        logger.info("%s: %d synthetic images of %d subgroups", folder, len(found), len(set(captions[name])))
    return Data(rows, files, samples, captions)


def listing(files: ImageFiles) -> dict[str, Any]:
    """How many images, and a hash of their names, sizes in bytes and labels, wherever their folder lies."""
    images = zip(files.paths, files.targets.int().tolist(), strict=True)
    about = json.dumps([[path.name, path.stat().st_size, labels] for path, labels in images])
    return {"images": len(files), "sha256": hashlib.sha256(about.encode()).hexdigest()}


def training_files(data: Data, training: Training) -> ImageFiles:
    """The real training images, then the samples drawn for this training."""
    files = data.files["train"]
    if training.drawn is None:
        return files
    own, places = data.samples[training.source], training.drawn.places
    paths = [*files.paths, *(own.paths[place] for place in places)]
    return ImageFiles(paths, torch.cat([files.targets, own.targets[places]]), files.size)


def settings_of(trainings: Sequence[Training], data: Data, processes: int) -> dict[Path, dict[str, Any]]:
    """By folder, what determines each classifier and its logits."""
    names = ("arch", "image_size", "num_epochs", "patience", "learning_rate", "mixed_precision")
    common = {name: FLAGS[name].value for name in names}
    common |= {"num_classes": int(FLAGS.num_classes), "images_per_step": FLAGS.batch_size * processes}
    weights = resolve(FLAGS.weights)
    common |= {"weights": sha256(weights) if weights.is_file() else FLAGS.weights}
    common |= {f"{split}_images": listing(files) for split, files in data.files.items()}
    return {
        Path(FLAGS.output, training.folder): common
        | {"seed": training.seed, "train_images": listing(training_files(data, training))}
        for training in trainings
    }


def refuse_changed(settings: dict[Path, dict[str, Any]]) -> None:
    """Raise UserError if one of the folders was begun with other settings; nothing has been written then."""
    for folder, new in settings.items():
        old = read_settings(folder)
        if changed := old and difference(old, json.loads(json.dumps(new))):
            name, before, now = changed
            raise UserError(
                f"{str(folder)!r} was made with {name} {before}, now it is {now}; choose another --output or move that "
                "one away"
            )


def warn(trainings: Sequence[Training], seeds: Sequence[int]) -> None:
    if len(seeds) < 3:
        logger.warning("%d seed(s) do not tell a difference from the luck of a training; give 3 or more", len(seeds))
    for training in trainings[: len(trainings) // len(seeds)]:
        if training.drawn and training.drawn.missing:
            missing = training.drawn.missing
            logger.warning(
                "%s: %d samples of %d captions are missing", training.name, sum(missing.values()), len(missing)
            )


def new_model(accelerator: Accelerator) -> ArtifactClassifier:
    with accelerator.local_main_process_first():  # one of them fetches
        return new_classifier(LABELS[: int(FLAGS.num_classes)], FLAGS.image_size, FLAGS.arch, FLAGS.weights)


def recipe_of(seed: int) -> Recipe:
    names = ("num_epochs", "patience", "batch_size", "learning_rate", "num_workers")
    return Recipe(**{name: FLAGS[name].value for name in names}, seed=seed)


def train(accelerator: Accelerator, training: Training, data: Data, sets: Mapping[str, Dataset]) -> None:
    """Train one classifier, unless it is there, and write it and its logits on the test split."""
    folder, recipe = Path(FLAGS.output, training.folder), recipe_of(training.seed)
    path = folder / f"artifact_classifier_H{FLAGS.num_classes}.safetensors"
    state = path.with_name(f"{path.stem}.unfinished.pt")  # from the first epoch to the last
    trained = path.is_file() and not state.exists()
    accelerator.wait_for_everyone()  # everyone has looked before anyone writes
    if trained:
        model = load_classifier(path, accelerator.device)
    else:
        set_seed(training.seed)
        model, images = new_model(accelerator), sets["train"]
        if training.drawn:
            samples = Subset(sets[training.source], training.drawn.places)
            images = Mixed(images, samples, training_files(data, training))

        def save(_: FitState) -> None:
            if accelerator.is_main_process:
                save_classifier(model, path)

        drawn = len(data.files["train"])
        fit(accelerator, model, images, sets["val"], recipe, state_path=state, on_best=save, epoch_images=drawn)
    logits, labels = predict(accelerator, model, sets["test"], recipe.batch_size, recipe.num_workers)
    if not logits.isfinite().all():
        raise UserError(f"{str(path)!r} gives logits that are not finite; lower --learning_rate, in another --output")
    if accelerator.is_main_process:
        with atomic_write(folder / LOGITS) as temporary:
            save_file({"logits": logits, "labels": labels}, temporary)
    accelerator.wait_for_everyone()


def read_logits(path: Path, files: ImageFiles) -> np.ndarray:
    """Return a classifier's logits (N, H) on the test split. Raises UserError for a damaged file."""
    try:
        logits = load_file(path)["logits"].double().numpy()
        if logits.shape == tuple(files.targets.shape) and np.isfinite(logits).all():
            return logits
        reason = f"logits of shape {logits.shape} for {tuple(files.targets.shape)}, or not finite"
    except (SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
    raise UserError(f"{str(path)!r} is damaged ({reason}); delete it, and the same command makes it again")


def write_report(trainings: Sequence[Training], data: Data, seeds: Sequence[int]) -> str:
    """Write table4.md, .csv and .json from the logits of all trainings; the table's text."""
    logits = defaultdict(list)
    for training in trainings:
        logits[training.name].append(read_logits(Path(FLAGS.output, training.folder, LOGITS), data.files["test"]))
    logits, truth = {name: np.stack(own) for name, own in logits.items()}, data.files["test"].targets.numpy() > 0
    minor = minority(data.real, FLAGS.minority_share)
    chosen = {"all": None, "minority": np.array([row.caption in minor for row in data.rows["test"]])}
    rows = [
        {"group": group} | row
        for group, images in chosen.items()
        for row in compare(logits, truth, LABELS[: truth.shape[1]], images)
    ]
    drawn = {training.name: training.drawn for training in trainings if training.drawn}  # counts are those of any seed
    about = {
        "seeds": seeds,
        "minority_share": FLAGS.minority_share,
        "test_images": len(truth),
        "subgroups": subgroups(data.real, Counter(row.caption for row in data.rows["test"]), minor, drawn),
        "flags": {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])},
        "tables": {name: sha256(FLAGS[name].value) for name in ("train_csv", "val_csv", "test_csv")},
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
    }
    text = markdown(rows, about)
    for suffix, content in ((".md", text), (".csv", as_csv(rows)), (".json", json.dumps(about | {"rows": rows}))):
        with atomic_write(Path(FLAGS.output, f"table4{suffix}")) as temporary:
            temporary.write_text(content)
    return text


def main(_) -> None:
    required = ("data_path", "train_csv", "val_csv", "test_csv", "output", "weights")
    expand_flags(FLAGS, required, optional=("cache_dir",))
    folders, ratios, seeds = parse_samples(FLAGS.samples), parse_ratios(FLAGS.ratios), parse_seeds(FLAGS.seeds)
    if not 0 <= FLAGS.minority_share <= 1:
        raise UserError(f"--minority_share={FLAGS.minority_share} is not a share; give a number from 0 to 1")
    for seed in seeds:
        recipe_of(seed)  # refuses values out of range
    accelerator = make_accelerator(FLAGS.mixed_precision, process_timeout=FLAGS.process_timeout)
    with locked_by_main(accelerator, FLAGS.output, "another --output"):
        augment(accelerator, folders, ratios, seeds)
    accelerator.end_training()


def augment(accelerator: Accelerator, folders: dict[str, Path], ratios: Sequence[Any], seeds: Sequence[int]) -> None:
    """Train what is not there yet and write the table."""
    data = read_data(folders)
    trainings = plan(data.real, data.captions, ratios, seeds)
    warn(trainings, seeds)
    settings = settings_of(trainings, data, accelerator.num_processes)
    refuse_changed(settings)
    open_ones = [one for one in trainings if not Path(FLAGS.output, one.folder, LOGITS).is_file()]
    logger.info("%d trainings, %d are there already", len(trainings), len(trainings) - len(open_ones))
    if open_ones:
        new_model(accelerator)  # what is wrong with it is wrong before images are decoded
        cache = Path(FLAGS.output, "cache") if FLAGS.cache_dir is None else FLAGS.cache_dir
        with accelerator.local_main_process_first():
            sets = {name: decoded(files, cache) for name, files in (data.files | data.samples).items()}
    for number, training in enumerate(open_ones, 1):
        logger.info("training %d of %d: %s, seed %d", number, len(open_ones), training.name, training.seed)
        if accelerator.is_main_process:
            folder = Path(FLAGS.output, training.folder)
            claim_folder(folder, settings[folder], {"training": training.name})
        train(accelerator, training, data, sets)
    if accelerator.is_main_process:
        logger.info("\n%s\nin %s", write_report(trainings, data, seeds), Path(FLAGS.output, "table4.{md,csv,json}"))


if __name__ == "__main__":
    cli(main)

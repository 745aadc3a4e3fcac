"""Train or test the attribute classifier: six heads for the reward, four for the judge.

    accelerate launch --num_processes 1 scripts/train_isic_classifier.py --data_path DIR --num_classes 6

EfficientNet-B0, dropout 0.3, BCE with logits, AdamW with cosine decay, best epoch by validation loss.
"""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import LABELS, load_split
from ddpo_pytorch.data.splits import drop_broken
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.judges.classifier import PUBLISHED_SIZE, ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.judges.report import Report, best_thresholds, one_sided
from ddpo_pytorch.judges.torchvision_names import check_publishable, save_published
from ddpo_pytorch.run import cli, make_accelerator

FLAGS = flags.FLAGS
flags.DEFINE_enum("mode", "train", ["train", "test"], "train a classifier, or report on the test split")
flags.DEFINE_string("data_path", None, "folder of <image>.jpg files", required=True)
flags.DEFINE_enum(
    "num_classes", "4", ["4", "6"], "4: the artifacts (the judge); 6: artifacts and diseases (the reward)"
)
flags.DEFINE_string("train_csv", "rl4med-out/data/splits/isic2019_train.csv", "training split")
flags.DEFINE_string("val_csv", "rl4med-out/data/splits/isic2019_val.csv", "validation split")
flags.DEFINE_string("test_csv", "rl4med-out/data/splits/isic2019_test.csv", "test split")
flags.DEFINE_string("checkpoint_dir", "rl4med-out/classifier", "folder for the classifier and its reports")
flags.DEFINE_string(
    "checkpoint", "", "classifier to start from (train) or to test; by default the one in checkpoint_dir"
)
flags.DEFINE_integer("num_epochs", 20, "epochs at most", lower_bound=1)
flags.DEFINE_integer("patience", 15, "stop after this many epochs without a better validation loss", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "images per process and step", lower_bound=1)
flags.DEFINE_integer("image_size", 512, "side in pixels images are resized to", lower_bound=32)
flags.DEFINE_float("learning_rate", 1e-4, "AdamW learning rate; decays to 1e-6 along a cosine")
flags.DEFINE_string("arch", "efficientnet_b0", "timm architecture")
flags.DEFINE_enum("weights", "imagenet", ["imagenet", "none"], "start from timm's ImageNet weights or from random ones")
flags.DEFINE_integer("limit", 0, "rows used of each split, 0 = all", lower_bound=0)
flags.DEFINE_bool("skip_broken", False, "leave out damaged images, with a warning, instead of stopping at them")
flags.DEFINE_bool(
    "calibrate_thresholds", False, "keep with the classifier the thresholds of best F1 on val; only reports use them"
)
flags.DEFINE_bool("save_published", False, "also write artifact_classifier_train_H<n>.pth in the published form")
flags.DEFINE_integer("seed", 42, "seed of initial weights, order and flips", lower_bound=0)
flags.DEFINE_integer("num_workers", 0, "image decoding processes", lower_bound=0)

logger = logging.getLogger(__name__)


def loader(csv_path: str, image_size: int, num_classes: int, train: bool) -> DataLoader:
    rows, paths, missing = load_split(csv_path, FLAGS.data_path, FLAGS.limit)
    if FLAGS.skip_broken:
        rows, paths = drop_broken(rows, paths)
    logger.info("%s: %d images, %d rows without one are skipped", csv_path, len(rows), missing)
    labels = torch.tensor([row.labels[:num_classes] for row in rows], dtype=torch.float32)
    for name, absent in one_sided(labels, LABELS[:num_classes]):
        message = f"{csv_path!r} has no {absent} of {name!r} among its {len(rows)} images"
        if FLAGS.mode == "train":
            raise UserError(f"{message}; training needs both: add such images, or raise --limit if you gave one")
        logger.warning("%s; its AUC is undefined", message)
    files = ImageFiles(paths, labels, image_size)
    generator = torch.Generator().manual_seed(FLAGS.seed)
    return DataLoader(files, FLAGS.batch_size, shuffle=train, generator=generator, num_workers=FLAGS.num_workers)


def random_flips(images: torch.Tensor) -> torch.Tensor:
    """Each image of (B, 3, H, W) mirrored left-right and top-bottom with probability 1/2 each."""
    for dim in (-1, -2):
        chosen = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(dim), images)
    return images


def check_heads(model: ArtifactClassifier, num_classes: int) -> None:
    if len(model.labels) != num_classes:
        raise UserError(f"the checkpoint has {len(model.labels)} heads, --num_classes is {num_classes}; give the same")


def build_model(num_classes: int) -> ArtifactClassifier:
    if FLAGS.checkpoint:
        model = load_classifier(FLAGS.checkpoint).requires_grad_(True)
        check_heads(model, num_classes)
        return model
    try:
        return ArtifactClassifier(LABELS[:num_classes], FLAGS.image_size, FLAGS.arch, FLAGS.weights == "imagenet")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"ImageNet weights of {FLAGS.arch!r} cannot be loaded ({type(error).__name__}); start from random weights "
            "with --weights=none, or fill the Hugging Face cache on a machine with a network"
        ) from error


def train(accelerator: Accelerator, num_classes: int, output: Path) -> None:
    published = output.with_name(f"artifact_classifier_train_H{num_classes}.pth")
    for path in (output, published) if FLAGS.save_published else (output,):
        if path.exists():
            raise UserError(f"{str(path)!r} exists already; choose another --checkpoint_dir or move it away")
    set_seed(FLAGS.seed)
    model = build_model(num_classes)
    if FLAGS.save_published:
        check_publishable(model)
        if model.image_size != PUBLISHED_SIZE:
            logger.warning("%s will not state its image size; readers take %d", published, PUBLISHED_SIZE)
    train_loader = loader(FLAGS.train_csv, model.image_size, num_classes, train=True)
    val_loader = loader(FLAGS.val_csv, model.image_size, num_classes, train=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLAGS.learning_rate, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FLAGS.num_epochs, eta_min=1e-6)
    plain = model
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    best_loss, best_epoch = float("inf"), -1
    for epoch in range(FLAGS.num_epochs):
        model.train()
        losses = []
        for images, labels in train_loader:
            pixels = plain.preprocess(random_flips(images.float() / 255))
            loss = F.binary_cross_entropy_with_logits(model(pixels), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        scheduler.step()
        logits, labels = evaluate(accelerator, model, plain, val_loader)
        val_loss = F.binary_cross_entropy_with_logits(logits, labels).item()
        accuracy = ((logits > 0) == (labels > 0)).float().mean(0)
        logger.info(
            "epoch %d: loss %.4f, val loss %.4f, val accuracy %s",
            epoch,
            torch.stack(losses).mean(),
            val_loss,
            " ".join(f"{name} {value:.3f}" for name, value in zip(plain.labels, accuracy, strict=True)),
        )
        if val_loss < best_loss:
            best_loss, best_epoch = val_loss, epoch
            if FLAGS.calibrate_thresholds:
                plain.thresholds = best_thresholds(logits, labels, plain.labels)
            if accelerator.is_main_process:
                save_classifier(plain, output)
                if FLAGS.save_published:
                    save_published(plain, published, epoch, val_loss, accuracy.mean().item())
        if epoch - best_epoch >= FLAGS.patience:
            logger.info("no better validation loss for %d epochs, stopping", FLAGS.patience)
            break
    accelerator.wait_for_everyone()
    if best_epoch < 0:
        raise UserError("the validation loss was never finite, nothing is saved; lower --learning_rate")
    logger.info("best epoch %d, validation loss %.4f, saved in %s", best_epoch, best_loss, output)
    if FLAGS.calibrate_thresholds:
        logger.info("thresholds of best F1 on val: %s", " ".join(f"{k} {v:.3f}" for k, v in plain.thresholds.items()))


@torch.no_grad()
def evaluate(accelerator, model, plain: ArtifactClassifier, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels (N, H) of a whole split, on every process."""
    model.eval()
    results = []
    for images, labels in batches:
        results.append(accelerator.gather_for_metrics((model(plain.preprocess(images.float() / 255)), labels)))
    logits, labels = (torch.cat(parts).cpu().float() for parts in zip(*results, strict=True))
    return logits, labels


def test(accelerator: Accelerator, num_classes: int, output: Path) -> None:
    path = Path(FLAGS.checkpoint or output)
    model = load_classifier(path, accelerator.device)
    check_heads(model, num_classes)
    batches = accelerator.prepare(loader(FLAGS.test_csv, model.image_size, num_classes, train=False))
    logits, labels = evaluate(accelerator, model, model, batches)
    if accelerator.is_main_process:
        report = Report(logits, labels, model.labels, model.thresholds)
        logger.info("%s on %s\n%s", path, FLAGS.test_csv, report.table())
        written = report.write(Path(FLAGS.checkpoint_dir) / f"test_H{num_classes}")
        logger.info("written: %s", ", ".join(map(str, written)))


def main(_) -> None:
    accelerator = make_accelerator("no")
    num_classes = int(FLAGS.num_classes)
    output = Path(FLAGS.checkpoint_dir) / f"artifact_classifier_H{num_classes}.safetensors"
    (train if FLAGS.mode == "train" else test)(accelerator, num_classes, output)


if __name__ == "__main__":
    cli(main)

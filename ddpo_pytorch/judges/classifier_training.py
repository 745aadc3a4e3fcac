"""Training of the attribute classifier, bit-exact on resume, and its logits for a whole set of images.

Order, flips and dropout of an epoch are functions of (seed, epoch, process), so a resumed run ends with the same
weights as an uninterrupted one. Batch-norm statistics are per process, as usual; the main process's are validated and
saved.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import flags
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import LARGEST_SIDE, ImageFiles, loader_options
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_report import ranking
from ddpo_pytorch.utils.distributed import PROCESS_TIMEOUT
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, derived_seed, generator_of
from ddpo_pytorch.utils.settings import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, SEED, ZERO_OR_MORE, check_ranges
from ddpo_pytorch.utils.training_state import TrainState

logger = logging.getLogger(__name__)
WEIGHT_DECAY, FINAL_LEARNING_RATE = 1e-4, 1e-6
RANGES = dict.fromkeys(("num_epochs", "patience", "batch_size"), ONE_OR_MORE) | {"num_workers": ZERO_OR_MORE}
RANGES |= {"learning_rate": POSITIVE, "focal_gamma": NOT_NEGATIVE, "ema_decay": BELOW_ONE, "seed": SEED}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training run; the defaults are the official ones. Raises UserError for values out of range.

    `batch_size` is per process; training stops after `patience` epochs without a better validation loss. Not in the
    paper: `pos_weight` and `focal_gamma` compensate for rare attributes; `quarter_turns` adds rotations by 90 degrees
    to the flips; `ema_decay` validates and keeps a running average of the weights (timm's ModelEmaV3, warm-up
    1 - (1 + step)^(-3/4)). The last two help when training from random weights. `num_workers` does not affect results.
    """

    num_epochs: int = 20
    patience: int = 15
    batch_size: int = 32
    learning_rate: float = 1e-4
    pos_weight: bool = False
    focal_gamma: float = 0.0
    quarter_turns: bool = False
    ema_decay: float = 0.0
    seed: int = 42
    num_workers: int = 0

    def __post_init__(self):
        check_ranges(vars(self), RANGES)


flags.disclaim_key_flags()  # so that --help lists these flags as those of the script


def define_flags() -> None:
    """Define the flags that the scripts which train classifiers have in common."""
    flags.DEFINE_string("data_path", None, "folder of <image>.jpg files", required=True)
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        flags.DEFINE_string(f"{split}_csv", f"rl4med-out/data/splits/isic2019_{split}.csv", f"{name} split")
    flags.DEFINE_enum("num_classes", "4", ["4", "6"], "4: the artifacts (judge); 6: artifacts and diseases (reward)")
    flags.DEFINE_integer("num_epochs", Recipe.num_epochs, "maximum number of epochs", lower_bound=1)
    flags.DEFINE_integer("patience", Recipe.patience, "stop after epochs without a better validation loss", 1)
    flags.DEFINE_integer("batch_size", Recipe.batch_size, "images per process and step", lower_bound=1)
    flags.DEFINE_integer("image_size", 512, "side in pixels to resize images to", 32, LARGEST_SIDE)
    flags.DEFINE_float("learning_rate", Recipe.learning_rate, "AdamW learning rate; decays to 1e-6 along a cosine")
    flags.DEFINE_string("arch", "efficientnet_b0", "timm architecture")
    flags.DEFINE_string("weights", "imagenet", "imagenet, none, or a file's backbone (timm's, torchvision's or ours)")
    flags.DEFINE_enum("mixed_precision", "no", ["no", "bf16", "fp16"], "arithmetic of the network; fp16 needs a GPU")
    flags.DEFINE_integer("num_workers", 0, "image loading processes", lower_bound=0)
    flags.DEFINE_float("process_timeout", PROCESS_TIMEOUT, "seconds that a process waits for the others")


@dataclasses.dataclass(frozen=True)
class FitState:
    """An epoch (counted from 0): its weights, and logits and labels (N, H) of the validation images.

    If half of the training images are changed, all validation images come twice: as they are, then changed.
    """

    epoch: int
    val_loss: float
    logits: torch.Tensor
    labels: torch.Tensor
    weights: Mapping[str, torch.Tensor]

    @property
    def accuracy(self) -> torch.Tensor:
        """Fraction of correct predictions (H,)."""
        return ((self.logits > 0) == (self.labels > 0)).float().mean(0)


def format_aucs(names: Sequence[str], logits: torch.Tensor, labels: torch.Tensor) -> str:
    """Return "name AUC" of every attribute for the log, from (N, H); nan where one class is absent."""
    columns = zip(names, logits.double().numpy().T, labels.numpy().T > 0, strict=True)
    ones = np.ones((1, len(labels)))
    return " ".join(f"{name} {ranking(ones, scores, truth)[0].item():.3f}" for name, scores, truth in columns)


def fit(
    accelerator: Accelerator,
    model: ArtifactClassifier,
    train: ImageFiles,
    val: ImageFiles,
    recipe: Recipe,
    *,
    state_path: Path | None = None,
    on_best: Callable[[FitState], None] | None = None,
    epoch_images: int | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    change_name: str = "",
) -> FitState:
    """Train `model` in place, load the weights of the epoch with the lowest validation loss, and return that epoch.

    AdamW (weight decay 1e-4), cosine decay to 1e-6, random flips. `pos_weight` (which needs both classes of every
    attribute) and `focal_gamma` also apply to the validation loss. `state_path` is written after each epoch, loaded if
    it exists, and removed at the end. `on_best` is called on every process for each better epoch while the model has
    its weights, and again after resuming, since files it wrote may have been lost. `epoch_images` is the number of
    images per epoch, by default all; runs on sets of different sizes can thus take the same number of steps. `change`
    transforms half of each batch, uint8 images in random order, and the validation loss is then the mean over images
    as they are and changed; `change_name` identifies it when resuming. Releases all that the accelerator prepared.

    Raises UserError for a damaged state or another run's, too few images, and a loss that was never finite.
    """
    drawn, device = len(train) if epoch_images is None else epoch_images, accelerator.device
    rank, processes = accelerator.process_index, accelerator.num_processes
    if drawn < processes:
        raise UserError(f"{drawn} training images per epoch are too few for {processes} processes; start fewer")
    seen = (None, change) if change else (None,)
    targets, positives = val.targets.float().repeat(len(seen), 1), (train.targets > 0).sum(0)
    pos_weight = (len(train) - positives) / positives if recipe.pos_weight else None  # (H,)
    loss_of = partial(attribute_loss, pos_weight=pos_weight, focal_gamma=recipe.focal_gamma)
    fused = device.type == "cuda" or None  # with fp16, other implementations wait for the GPU at each step
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=fused)
    scheduler = CosineAnnealingLR(optimizer, recipe.num_epochs, eta_min=FINAL_LEARNING_RATE)
    reset_scaler(accelerator)
    ema = None
    if recipe.ema_decay:
        ema = ModelEmaV3(model.to(device), recipe.ema_decay, use_warmup=True, warmup_power=0.75)
    evaluated = ema.module if ema else model
    network, optimizer = accelerator.prepare(model, optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema and ema.module}
    settings = {name: value for name, value in vars(recipe).items() if name != "num_workers"}
    settings |= {name: getattr(model, name) for name in ("labels", "arch", "image_size")}
    settings |= {"mixed_precision": accelerator.mixed_precision, "processes": processes, "change": change_name}
    settings |= {"initial weights": fingerprint(model), "epoch_images": drawn}
    for name, images in (("training images", train), ("validation images", val)):
        settings[name] = getattr(images, "files", images).digest()  # a cache is identified by the files behind it
    state = TrainState(state_path, settings, scaler=accelerator.scaler, **parts)
    batches = EpochBatches(len(train), drawn, recipe.batch_size, recipe.seed, rank, processes)
    loader = image_loader(train, batches, recipe.num_workers)

    def call_on_best(best: FitState) -> None:
        current = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(best.weights)
        on_best(best)
        model.load_state_dict(current)

    epoch, updates, loss, best = 0, 0, 0.0, None
    if progress := state.load():
        epoch, updates = progress["epoch"], progress["updates"]
        best = progress["best"] and FitState(**progress["best"], labels=targets)
        logger.info("resuming from %s: %d of %d epochs are done", state_path, epoch, recipe.num_epochs)
        if on_best and best:
            call_on_best(best)
    while epoch < recipe.num_epochs and epoch - 1 - (best.epoch if best else -1) < recipe.patience:
        if not math.isfinite(loss):
            logger.warning("the training loss is %s, stopping; lower the learning rate", loss)
            break
        batches.epoch, started, losses = epoch, time.perf_counter(), []
        network.train()
        # disable=None shows it on terminals only
        shown = tqdm(loader, unit="batch", leave=False, disable=None if accelerator.is_main_process else True)
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(recipe.seed, Stream.NOISE, epoch, rank))
            for images, labels in shown:
                if change:
                    images = torch.cat([change(images[: len(images) // 2]), images[len(images) // 2 :]])
                images = random_flips(images.to(device, non_blocking=True), recipe.quarter_turns)
                pixels = model.preprocess(images.float() / 255)
                with accelerator.autocast():
                    logits = network(pixels)
                batch_loss = loss_of(logits.float(), labels.to(device, non_blocking=True).float())
                accelerator.backward(batch_loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(batch_loss.detach())
                updates += 1
                if ema:
                    ema.update(model, updates)
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        speed = drawn / (time.perf_counter() - started)
        scheduler.step()
        for part in (model, ema.module) if ema else (model,):
            for buffer in part.buffers():
                broadcast(buffer)
        predictions = [predict(accelerator, evaluated, val, recipe.batch_size, recipe.num_workers, f) for f in seen]
        logits = torch.cat([logits for logits, _ in predictions])
        now = FitState(epoch, loss_of(logits, targets).item(), logits, targets, {})
        aucs = ", changed ".join(format_aucs(model.labels, *prediction) for prediction in predictions)
        logger.info(
            "epoch %d: loss %.4f, val loss %.4f, val AUC %s, val accuracy %.3f, %.0f images/s",
            *(epoch, loss, now.val_loss, aucs, now.accuracy.mean(), speed),
        )
        if better := now.val_loss < (best.val_loss if best else math.inf):
            weights = {name: value.detach().to("cpu", copy=True) for name, value in evaluated.state_dict().items()}
            best = dataclasses.replace(now, weights=weights)
        epoch += 1
        if accelerator.is_main_process:
            best_state = best and {name: value for name, value in vars(best).items() if name != "labels"}
            state.save(epoch=epoch, updates=updates, best=best_state)
        if better and on_best:  # after the state is saved: files of `on_best` never exist without one
            call_on_best(best)
    if best:
        model.load_state_dict(best.weights)
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state.remove()
    accelerator.wait_for_everyone()
    if best is None:
        raise UserError("the validation loss was never finite, nothing is saved; lower the learning rate")
    return best


def reset_scaler(accelerator: Accelerator) -> None:
    """Reset fp16's gradient scaler, which a previous run may have changed, to its initial state."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())


def attribute_loss(
    logits: torch.Tensor, labels: torch.Tensor, pos_weight: torch.Tensor | None = None, focal_gamma: float = 0.0
) -> torch.Tensor:
    """Return the mean over (N, H) of (1 - p)^focal_gamma w BCE(logit, label), p the probability of the true label.

    w is `pos_weight` (H,) where the label is 1, else 1; it replaces alpha in the focal loss of Lin et al. (2017).
    """
    weight = None if pos_weight is None else pos_weight.to(logits.device)
    losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")
    if focal_gamma:
        wrong = F.logsigmoid(torch.where(labels > 0, -logits, logits))  # log(1 - p); a power has no gradient at p = 1
        losses = losses * torch.exp(focal_gamma * wrong)
    return losses.mean()


class EpochBatches:
    """Batch sampler of this process; set `epoch` between epochs.

    Permutations of all images are concatenated, and epoch n is the n-th slice of `drawn` images. All processes get the
    same number of batches, whose sizes differ by at most one: a small batch would weigh as much as any other, and batch
    norm cannot train on a single image. Needs at least one image per process.
    """

    def __init__(self, images: int, drawn: int, batch_size: int, seed: int, rank: int, processes: int):
        self.images, self.drawn, self.seed, self.rank, self.processes = images, drawn, seed, rank, processes
        self.steps = max(1, min(math.ceil(drawn / (batch_size * processes)), drawn // processes))
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first, skipped = divmod(self.epoch * self.drawn, self.images)
        rounds = range(first, first + math.ceil((skipped + self.drawn) / self.images))
        order = [torch.randperm(self.images, generator=generator_of(self.seed, Stream.BATCHES, n)) for n in rounds]
        dealt = torch.cat(order)[skipped : skipped + self.drawn].tensor_split(self.steps * self.processes)
        return iter([batch.tolist() for batch in dealt[self.rank :: self.processes]])


def random_flips(images: torch.Tensor, quarter_turns: bool = False) -> torch.Tensor:
    """Flip images (B, 3, S, S) in x and y (`quarter_turns`: transpose them, too) with probability 1/2 each."""
    changes = (lambda batch: batch.flip(-1), lambda batch: batch.flip(-2), lambda batch: batch.transpose(-1, -2))
    for change in changes[: 3 if quarter_turns else 2]:
        chosen = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], change(images), images)
    return images


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    model: ArtifactClassifier,
    files: ImageFiles,
    batch_size: int,
    num_workers: int = 0,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels (N, H) of all images in order, float32 on the CPU of every process.

    Processes take whole batches in turn, so batches are the same for any number of processes. The model is put into
    eval mode. `change` replaces the uint8 images of a batch before they are preprocessed.
    """
    model.to(accelerator.device).eval()
    batches = [batch.tolist() for batch in torch.arange(len(files)).split(batch_size)]
    batches = batches[accelerator.process_index :: accelerator.num_processes]
    table = torch.zeros(len(files), len(model.labels), device=accelerator.device)
    for indices, (images, _) in zip(batches, image_loader(files, batches, num_workers), strict=True):
        images = change(images) if change else images
        pixels = model.preprocess(images.to(accelerator.device, non_blocking=True).float() / 255)
        with accelerator.autocast():
            table[indices] = model(pixels).float()
    # each row comes from one process and is zero in the others
    return accelerator.reduce(table, "sum").cpu(), files.targets.float()


def image_loader(files: ImageFiles, batches: Iterable[list[int]], num_workers: int) -> DataLoader:
    generator = torch.Generator()  # starting workers would otherwise advance the generator of flips and dropout
    return DataLoader(files, batch_sampler=batches, generator=generator, **loader_options(num_workers))

"""Training of the attribute classifier, resumable to the bit, and its logits for a whole set of images.

Order, flips and dropout of an epoch are functions of (seed, epoch, process), so that a resumed training ends with the
same weights as an uninterrupted one. Batch-norm statistics stay per process, as usual; those of the main process are
validated and saved.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multilabel_auroc
from tqdm.auto import tqdm

from ddpo_pytorch.data.image_cache import loader_options
from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_report import one_sided
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, derived_seed, generator_of
from ddpo_pytorch.utils.settings import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, SEED, ZERO_OR_MORE, check_ranges
from ddpo_pytorch.utils.training_state import TrainState

logger = logging.getLogger(__name__)
WEIGHT_DECAY = 1e-4
FINAL_LEARNING_RATE = 1e-6
RANGES = {
    **dict.fromkeys(("num_epochs", "patience", "batch_size"), ONE_OR_MORE),
    "learning_rate": POSITIVE,
    "focal_gamma": NOT_NEGATIVE,
    "ema_decay": BELOW_ONE,
    "seed": SEED,
    "num_workers": ZERO_OR_MORE,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training; the defaults are the official ones. Raises UserError for values outside their range.

    `batch_size` is per process; `learning_rate` decays to 1e-6 along a cosine, one step per epoch; `patience` is the
    number of epochs without a better validation loss that ends the training. Not in the paper: `pos_weight` and
    `focal_gamma` counter rare attributes (`attribute_loss`); `quarter_turns` adds rotations by 90 degrees to the flips;
    with `ema_decay` a running average of the weights is validated and kept (timm's ModelEmaV3, warming up as
    1 - (1 + step)^-3/4). The last two help a training from random weights. `num_workers` does not change the result.
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


@dataclasses.dataclass(frozen=True)
class FitState:
    """An epoch (counted from 0), with logits and labels (N, H) of the validation set."""

    epoch: int
    val_loss: float
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def accuracy(self) -> torch.Tensor:
        """Fraction of correct predictions (H,)."""
        return ((self.logits > 0) == (self.labels > 0)).float().mean(0)


@dataclasses.dataclass(frozen=True)
class FitResult:
    best_epoch: int
    best_loss: float
    epochs: int  # trained, before and after a resume


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
) -> FitResult:
    """Train `model` in place; it ends with the weights of the epoch with the lowest validation loss.

    AdamW (weight decay 1e-4), cosine decay to 1e-6, random flips; the validation loss is that of the training,
    `pos_weight` and `focal_gamma` included.

    Args:
        state_path: written after each epoch; an existing one is resumed, and it is removed at the end.
        on_best: called on every process for each better epoch while the model has its weights, and again after a
            resume, since the files that it wrote may have been lost.
        epoch_images: images of an epoch, by default each once. Successive epochs walk through successive permutations,
            so that trainings on sets of different sizes can make equally many updates.

    The accelerator forgets all objects that it had prepared. Raises UserError for a damaged state or one of another
    training, too few images, and a loss that was never finite.
    """
    trainer = _Trainer(accelerator, model, train, val, recipe, epoch_images, state_path)
    if trainer.resume():
        logger.info("resuming from %s: %d of %d epochs are done", state_path, trainer.epoch, recipe.num_epochs)
        if on_best and trainer.best:
            trainer.with_best_weights(on_best)
    while trainer.epoch < recipe.num_epochs and not trainer.out_of_patience():
        better = trainer.run_epoch()
        if accelerator.is_main_process:
            trainer.save()
        if better and on_best:  # after the state, so that its files never exist without one
            trainer.with_best_weights(on_best)
    result = trainer.finish()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trainer.state.remove()
    accelerator.wait_for_everyone()
    if result is None:
        raise UserError("the validation loss was never finite, nothing is saved; lower the learning rate")
    return result


class _Trainer:
    def __init__(self, accelerator, model, train, val, recipe: Recipe, epoch_images: int | None, path: Path | None):
        drawn = len(train) if epoch_images is None else epoch_images
        if drawn < accelerator.num_processes:
            raise UserError(f"{drawn} training images an epoch are too few for {accelerator.num_processes} processes")
        self.accelerator, self.plain, self.recipe, self.drawn, self.val = accelerator, model, recipe, drawn, val
        settings = _settings(accelerator, model, train, val, recipe) | {"epoch_images": drawn}
        self.pos_weight = None
        if recipe.pos_weight:
            self.pos_weight = positive_weights(train.targets, model.labels).to(accelerator.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, recipe.num_epochs, eta_min=FINAL_LEARNING_RATE
        )
        reset_scaler(accelerator)
        self.ema = None
        if recipe.ema_decay:
            self.ema = ModelEmaV3(model.to(accelerator.device), recipe.ema_decay, use_warmup=True, warmup_power=0.75)
        self.evaluated = self.ema.module if self.ema else model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.state = TrainState(
            path,
            settings,
            model=model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=accelerator.scaler,
            ema=self.ema and self.ema.module,
        )
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.batches = EpochBatches(len(train), drawn, recipe.batch_size, recipe.seed, rank, processes)
        self.train_loader = image_loader(train, self.batches, recipe.num_workers)
        self.val_loader = validation_loader(accelerator, val, recipe.batch_size, recipe.num_workers)
        self.epoch, self.updates, self.best, self.last_loss = 0, 0, None, 0.0

    def save(self) -> None:
        self.state.save(epoch=self.epoch, updates=self.updates, best=self.best)

    def resume(self) -> bool:
        progress = self.state.load()
        if progress:
            self.epoch, self.updates, self.best = (progress[name] for name in ("epoch", "updates", "best"))
        return bool(progress)

    def out_of_patience(self) -> bool:
        if not math.isfinite(self.last_loss):
            logger.warning("the training loss is %s, stopping; lower the learning rate", self.last_loss)
            return True
        stop = self.epoch - 1 - (self.best["epoch"] if self.best else -1) >= self.recipe.patience
        if stop:
            logger.info("no better validation loss for %d epochs, stopping", self.recipe.patience)
        return stop

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(logits.device)
        return attribute_loss(logits.float(), labels.float(), pos_weight, self.recipe.focal_gamma)

    def run_epoch(self) -> bool:
        """Train, validate and log one epoch; return whether it is the best one so far."""
        device, started = self.accelerator.device, time.perf_counter()
        self.batches.epoch = self.epoch
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.recipe.seed, Stream.NOISE, self.epoch, self.accelerator.process_index))
            loss = self._train()
        speed = self.drawn / (time.perf_counter() - started)
        self.scheduler.step()
        for network in (self.plain, self.ema.module) if self.ema else (self.plain,):
            for buffer in network.buffers():
                broadcast(buffer)
        logits, labels = all_logits(self.accelerator, self.evaluated, self.val_loader), self.val.targets.float()
        now = FitState(self.epoch, self.loss(logits, labels).item(), logits, labels)
        better = now.val_loss < (self.best["val_loss"] if self.best else math.inf)
        if better:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.evaluated.state_dict().items()}
            self.best = {"epoch": self.epoch, "val_loss": now.val_loss, "logits": logits, "weights": weights}
        logger.info(
            "epoch %d: loss %.4f, val loss %.4f, val AUC %s, val accuracy %.3f, %.0f images/s",
            *(self.epoch, loss, now.val_loss, _aucs(now, self.plain.labels), now.accuracy.mean(), speed),
        )
        self.epoch, self.last_loss = self.epoch + 1, loss
        return better

    def _train(self) -> float:
        """Run one pass over the epoch's images; return the mean loss of its updates."""
        accelerator, losses = self.accelerator, []
        self.model.train()
        hidden = None if accelerator.is_main_process else True  # None: shown on a terminal
        with tqdm(total=self.drawn, desc=f"epoch {self.epoch}", unit="image", leave=False, disable=hidden) as bar:
            for images, labels in self.train_loader:
                images = random_flips(images.to(accelerator.device, non_blocking=True), self.recipe.quarter_turns)
                pixels = self.plain.preprocess(images.float() / 255)
                with accelerator.autocast():
                    logits = self.model(pixels)
                loss = self.loss(logits, labels.to(accelerator.device, non_blocking=True))
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.updates += 1
                if self.ema:
                    self.ema.update(self.plain, self.updates)
                losses.append(loss.detach())
                bar.update(len(images) * accelerator.num_processes)
        return accelerator.reduce(torch.stack(losses).mean(), "mean").item()

    def with_best_weights(self, on_best: Callable[[FitState], None]) -> None:
        current = {name: value.clone() for name, value in self.plain.state_dict().items()}
        self.plain.load_state_dict(self.best["weights"])
        on_best(FitState(self.best["epoch"], self.best["val_loss"], self.best["logits"], self.val.targets.float()))
        self.plain.load_state_dict(current)

    def finish(self) -> FitResult | None:
        if self.best:
            self.plain.load_state_dict(self.best["weights"])
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return FitResult(self.best["epoch"], self.best["val_loss"], self.epoch) if self.best else None


def reset_scaler(accelerator: Accelerator) -> None:
    """Give the gradient scaler of fp16, which may have served another training, its initial state."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())


def _aucs(state: FitState, names: Sequence[str]) -> str:
    """Return "name AUC" of every attribute for the log; "-" where one class is absent."""
    if not torch.isfinite(state.logits).all():
        return "undefined"
    # at least two columns, which multilabel_auroc asks for
    logits, labels = (torch.cat([values, values[:, :1]], 1) for values in (state.logits, state.labels.long()))
    aucs = multilabel_auroc(logits, labels, logits.shape[1], average=None).tolist()
    undefined = {name for name, _ in one_sided(state.labels, names)}
    return " ".join(
        f"{name} -" if name in undefined else f"{name} {auc:.3f}" for name, auc in zip(names, aucs, strict=False)
    )


def _settings(
    accelerator: Accelerator, model: ArtifactClassifier, train: ImageFiles, val: ImageFiles, recipe: Recipe
) -> dict[str, Any]:
    """Return what identifies a training."""
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "num_workers"}
    return settings | {
        "labels": model.labels,
        "arch": model.arch,
        "image_size": model.image_size,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "initial weights": fingerprint(model),
        # of the files behind a cache
        "training images": getattr(train, "files", train).digest(),
        "validation images": getattr(val, "files", val).digest(),
    }


def attribute_loss(
    logits: torch.Tensor, labels: torch.Tensor, pos_weight: torch.Tensor | None = None, focal_gamma: float = 0.0
) -> torch.Tensor:
    """Return the mean over (N, H) of (1 - p)^focal_gamma w BCE(logit, label), p the probability of the true label.

    w is `pos_weight` (H,) where the label is 1, else 1. With gamma alone this is the focal loss of Lin et al. (2017)
    without its alpha, which w replaces.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight, reduction="none")
    if focal_gamma:
        wrong = F.logsigmoid(torch.where(labels > 0, -logits, logits))  # log(1 - p); a power has no gradient at p = 1
        losses = losses * torch.exp(focal_gamma * wrong)
    return losses.mean()


def positive_weights(labels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Return negatives / positives (H,) of labels (N, H). Raises UserError for an attribute that lacks either."""
    for name, absent in one_sided(labels, names):
        raise UserError(f"pos_weight needs both classes of every attribute; training has no {absent} of {name!r}")
    positives = (labels > 0).sum(0)
    return (len(labels) - positives) / positives


def epoch_order(images: int, drawn: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the indices (drawn,) of an epoch: slice `epoch` of permutations of all images laid end to end."""
    first, skipped = divmod(epoch * drawn, images)
    rounds = range(first, first + math.ceil((skipped + drawn) / images))
    order = [torch.randperm(images, generator=generator_of(seed, Stream.BATCHES, number)) for number in rounds]
    return torch.cat(order)[skipped : skipped + drawn]


def deal(order: torch.Tensor, batch_size: int, rank: int, processes: int) -> list[list[int]]:
    """Return the batches of one process. All processes get equally many; batch sizes differ by at most one.

    The number of batches is that of full ones plus a rest, but the rest is spread: an update on a few images would
    count as much as any other, and batch norm cannot train on a single image. Needs as many images as processes.
    """
    steps = max(1, min(math.ceil(len(order) / (batch_size * processes)), len(order) // processes))
    return [batch.tolist() for batch in order.tensor_split(steps * processes)[rank::processes]]


class EpochBatches:
    """Batch sampler of this process; set `epoch` between epochs."""

    def __init__(self, images: int, drawn: int, batch_size: int, seed: int, rank: int, processes: int):
        self.images, self.drawn, self.batch_size, self.seed = images, drawn, batch_size, seed
        self.rank, self.processes, self.epoch = rank, processes, 0

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.images, self.drawn, self.seed, self.epoch)
        return iter(deal(order, self.batch_size, self.rank, self.processes))


def random_flips(images: torch.Tensor, quarter_turns: bool = False) -> torch.Tensor:
    """Mirror each square image of (B, 3, S, S) left-right and top-bottom with probability 1/2 each.

    With `quarter_turns` it is also transposed with probability 1/2, which makes the eight symmetries equally likely.
    """
    changes = [lambda batch: batch.flip(-1), lambda batch: batch.flip(-2)]
    if quarter_turns:
        changes.append(lambda batch: batch.transpose(-1, -2))
    for change in changes:
        chosen = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], change(images), images)
    return images


def predict(
    accelerator: Accelerator, model: ArtifactClassifier, files: ImageFiles, batch_size: int, num_workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels (N, H) of all images in order, float32 on the CPU of every process.

    Processes take whole batches in turn, so a batch holds the same images for any number of them. The model moves to
    the accelerator's device and into eval mode.
    """
    loader = validation_loader(accelerator, files, batch_size, num_workers)
    return all_logits(accelerator, model.to(accelerator.device), loader), files.targets.float()


def image_loader(files: ImageFiles, batches: Iterable[list[int]], num_workers: int) -> DataLoader:
    # a generator of its own: starting workers would draw from the one that flips and dropout use
    generator = torch.Generator().manual_seed(0)
    return DataLoader(files, batch_sampler=batches, generator=generator, **loader_options(num_workers))


def validation_loader(accelerator: Accelerator, files: ImageFiles, batch_size: int, num_workers: int) -> DataLoader:
    batches = [batch.tolist() for batch in torch.arange(len(files)).split(batch_size)]
    return image_loader(files, batches[accelerator.process_index :: accelerator.num_processes], num_workers)


@torch.no_grad()
def all_logits(accelerator: Accelerator, model: ArtifactClassifier, loader: DataLoader) -> torch.Tensor:
    """Return logits (N, H) of the images behind a `validation_loader`, float32 on the CPU of every process."""
    model.eval()
    table = torch.zeros(len(loader.dataset), len(model.labels), device=accelerator.device)
    for indices, (images, _) in zip(loader.batch_sampler, loader, strict=True):
        pixels = model.preprocess(images.to(accelerator.device, non_blocking=True).float() / 255)
        with accelerator.autocast():
            table[indices] = model(pixels).float()
    return accelerator.reduce(table, "sum").cpu()  # every row comes from one process, the others have zeros there

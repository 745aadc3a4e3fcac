"""Training of the attribute classifier, resumable to the bit, and its logits for a whole set of images.

Order, flips and dropout of an epoch are functions of (seed, epoch, process), so that a training that was stopped and
started again ends with the weights of one that was not. Batch-norm statistics stay per process, as is usual; those of
the main process are the ones validated and saved.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_report import Report
from ddpo_pytorch.judges.epochs import EpochBatches, random_flips
from ddpo_pytorch.judges.losses import attribute_loss, positive_weights
from ddpo_pytorch.judges.prediction import all_logits, image_loader, validation_loader
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, derived_seed
from ddpo_pytorch.utils.settings import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, SEED, ZERO_OR_MORE, check_ranges
from ddpo_pytorch.utils.training_state import restore_state, save_state

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
    """How a classifier is trained; the defaults are the official ones. Raises UserError for values that cannot work.

    `batch_size` is per process, `learning_rate` decays to 1e-6 along a cosine, one step an epoch; `patience` is the
    number of epochs without a better validation loss that ends the training. `pos_weight` and `focal_gamma`, which are
    not in the paper, counter rare attributes (`attribute_loss`). Nor are `quarter_turns`, which beside the flips turns
    images by 90 degrees, and `ema_decay`, with which a running average of the weights is validated and kept (timm's
    ModelEmaV3, warming up as 1 - (1 + step)^-3/4): both help a training from random weights. `num_workers` has no
    influence on the result.
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
    """The best epoch so far (counted from 0), with logits and labels (N, H) of the validation set."""

    epoch: int
    val_loss: float
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of right predictions (H,)."""
        return ((self.logits > 0) == (self.labels > 0)).float().mean(0)


@dataclasses.dataclass(frozen=True)
class FitResult:
    best_epoch: int
    best_loss: float
    epochs: int  # trained, whether before or after a resume


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
    """Train `model` in place; it ends with the weights of the epoch of the lowest validation loss.

    AdamW (weight decay 1e-4), cosine decay to 1e-6, random flips; the validation loss is the training's (`pos_weight`
    and `focal_gamma` included). An epoch draws `epoch_images` images, by default each image once; otherwise successive
    epochs walk through successive permutations, so that trainings on sets of different size make equally many updates.

    After each epoch `state_path` is written whole; where it exists, the training goes on from it, and it is removed at
    the end. `on_best` is called on every process for each better epoch, while the model has its weights, and again when
    a training is resumed (what it writes may have been lost). The accelerator forgets what was prepared with it.

    Raises UserError for a state of another training, a damaged one, too few images, and a loss that was never finite.
    """
    fitting = _Fitting(accelerator, model, train, val, recipe, epoch_images)
    if state_path is not None and restore_state(state_path, fitting.belongs_to, fitting.resume):
        logger.info("resuming from %s: %d of %d epochs are done", state_path, fitting.epoch, recipe.num_epochs)
        if on_best and fitting.best:
            fitting.with_best_weights(on_best)
    while fitting.epoch < recipe.num_epochs and not fitting.out_of_patience():
        better = fitting.run_epoch()
        if state_path is not None and accelerator.is_main_process:
            save_state(state_path, fitting.state(), fitting.belongs_to)
        if better and on_best:  # after the state: files of an unfinished training never lie there without it
            fitting.with_best_weights(on_best)
    result = fitting.finish()
    accelerator.wait_for_everyone()
    if state_path is not None and accelerator.is_main_process:
        state_path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if result is None:
        raise UserError("the validation loss was never finite, nothing is saved; lower the learning rate")
    return result


class _Fitting:
    """A training between two epochs: everything that has to survive a stop is in `state`."""

    def __init__(self, accelerator, model, train, val, recipe: Recipe, epoch_images: int | None):
        drawn = len(train) if epoch_images is None else epoch_images
        if drawn < accelerator.num_processes:
            raise UserError(f"{drawn} training images an epoch are too few for {accelerator.num_processes} processes")
        self.accelerator, self.plain, self.recipe, self.drawn, self.val = accelerator, model, recipe, drawn, val
        self.belongs_to = _identity(accelerator, model, train, val, recipe) | {"epoch_images": drawn}
        self.pos_weight = None
        if recipe.pos_weight:
            self.pos_weight = positive_weights(train.targets, model.labels).to(accelerator.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, recipe.num_epochs, eta_min=FINAL_LEARNING_RATE
        )
        if accelerator.scaler is not None:  # it may have served another training
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
        self.average = None
        if recipe.ema_decay:
            self.average = ModelEmaV3(
                model.to(accelerator.device), recipe.ema_decay, use_warmup=True, warmup_power=0.75
            )
        self.network = self.average.module if self.average else model  # what is validated and kept
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.batches = EpochBatches(len(train), drawn, recipe.batch_size, recipe.seed, rank, processes)
        self.train_loader = image_loader(train, self.batches, recipe.num_workers)
        self.val_loader = validation_loader(accelerator, val, recipe.batch_size, recipe.num_workers)
        self.epoch, self.updates, self.best, self.last_loss = 0, 0, None, 0.0

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
        """Train, validate and log one epoch; whether it is the best one."""
        device, started = self.accelerator.device, time.perf_counter()
        self.batches.epoch = self.epoch
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.recipe.seed, Stream.NOISE, self.epoch, self.accelerator.process_index))
            loss = self._train()
        speed = self.drawn / (time.perf_counter() - started)
        self.scheduler.step()
        for network in (self.plain, self.average.module) if self.average else (self.plain,):
            for buffer in network.buffers():
                broadcast(buffer)
        logits = all_logits(self.accelerator, self.network, self.val_loader)
        val_loss = self.loss(logits, self.val.targets).item()
        now = FitState(self.epoch, val_loss, logits, self.val.targets.float())
        better = val_loss < (self.best["val_loss"] if self.best else math.inf)
        if better:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.network.state_dict().items()}
            self.best = {"epoch": self.epoch, "val_loss": val_loss, "logits": logits, "weights": weights}
        logger.info(
            "epoch %d: loss %.4f, val loss %.4f, val AUC %s, val accuracy %.3f, %.0f images/s",
            *(self.epoch, loss, val_loss, _aucs(now, self.plain.labels), now.accuracy.mean(), speed),
        )
        self.epoch, self.last_loss = self.epoch + 1, loss
        return better

    def _train(self) -> float:
        """One pass over the epoch's images; the mean loss of its updates."""
        accelerator, losses = self.accelerator, []
        self.model.train()
        shown = None if accelerator.is_main_process else True
        with tqdm(total=self.drawn, desc=f"epoch {self.epoch}", unit="image", leave=False, disable=shown) as bar:
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
                if self.average:
                    self.average.update(self.plain, self.updates)
                losses.append(loss.detach())
                bar.update(len(images) * accelerator.num_processes)
        return accelerator.reduce(torch.stack(losses).mean(), "mean").item()

    def best_epoch(self) -> FitState:
        return FitState(self.best["epoch"], self.best["val_loss"], self.best["logits"], self.val.targets.float())

    def with_best_weights(self, on_best: Callable[[FitState], None]) -> None:
        current = {name: value.clone() for name, value in self.plain.state_dict().items()}
        self.plain.load_state_dict(self.best["weights"])
        on_best(self.best_epoch())
        self.plain.load_state_dict(current)

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "weights": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "average": self.average and self.average.module.state_dict(),
            "updates": self.updates,
            "best": self.best,
        }

    def resume(self, state: dict) -> None:
        self.plain.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        self.epoch, self.updates, self.best = state["epoch"], state["updates"], state["best"]

    def finish(self) -> FitResult | None:
        if self.best:
            self.plain.load_state_dict(self.best["weights"])
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return FitResult(self.best["epoch"], self.best["val_loss"], self.epoch) if self.best else None


def _aucs(state: FitState, names: Sequence[str]) -> str:
    if not torch.isfinite(state.logits).all():
        return "undefined"
    rows = Report(state.logits, state.labels, names, resamples=0).attributes
    return " ".join(f"{row['what']} {'-' if row['auc'] is None else format(row['auc'], '.3f')}" for row in rows)


def _identity(
    accelerator: Accelerator, model: ArtifactClassifier, train: ImageFiles, val: ImageFiles, recipe: Recipe
) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "num_workers"}
    return settings | {
        "labels": model.labels,
        "arch": model.arch,
        "image_size": model.image_size,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "initial weights": fingerprint(model),
        "training images": _images_digest(train),
        "validation images": _images_digest(val),
    }


def _images_digest(files: ImageFiles) -> str:
    """Return the digest of the images, also of those behind a cache."""
    return getattr(files, "files", files).digest()

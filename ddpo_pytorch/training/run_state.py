"""Progress, logs and checkpoints of a training run: the state that outlives an epoch, and where it is written."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from ml_collections import ConfigDict
from PIL import Image
from torch import nn

from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.training import checkpoints
from ddpo_pytorch.training.held_out import Evaluation, HeldOut
from ddpo_pytorch.training.run_folder import CONTENTS, open_run, start_trackers, write_settings
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import JsonLines

logger = logging.getLogger(__name__)


class Remembered:
    """Base class that saves and restores the attributes that a class annotates."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).__annotations__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in type(self).__annotations__:
            setattr(self, name, state[name])


class RewardPlateau(Remembered):
    """The paper's stopping criterion: mean reward changed by less than `tolerance` in `patience` successive epochs."""

    previous: float | None = None
    quiet_epochs: int = 0

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience

    def update(self, reward: float) -> bool:
        """Record an epoch's mean reward; return whether training should stop (never with patience 0)."""
        quiet = self.previous is not None and abs(reward - self.previous) < self.tolerance
        self.quiet_epochs = self.quiet_epochs + 1 if quiet else 0
        self.previous = reward
        return self.stop

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.quiet_epochs


class BestAndCollapse(Remembered):
    """The best held-out evaluation of a run, and detection of collapse since then.

    The best evaluation is the first with the highest APR. A later one has *collapsed* when its APR, on the same
    prompts and noise, is lower by more than `tolerance`. If its mean reward is higher at the same time, the reward is
    being hacked; otherwise the policy has broken down. After `patience` collapsed evaluations in a row training should
    stop; 0 never stops.
    """

    best: dict[str, Any] | None = None  # {"epoch": epochs completed, "apr", "reward"}
    last: dict[str, Any] | None = None  # of the last evaluation
    collapsed: int = 0  # evaluations in a row up to the last one
    fingerprint: dict[str, Any] | None = None  # of the evaluations so far (`HeldOut.fingerprint`)

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience

    def update(self, epoch: int, apr: float, reward: float) -> bool:
        """Record the evaluation after `epoch` epochs; return whether it is the best so far."""
        self.last = {"epoch": epoch, "apr": apr, "reward": reward}
        if self.best is None or apr > self.best["apr"]:
            self.best, self.collapsed = self.last, 0
            return True
        self.collapsed = self.collapsed + 1 if self.best["apr"] - apr > self.tolerance else 0
        return False

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.collapsed

    @property
    def hacked(self) -> bool:
        """Return whether the reward has risen since the best evaluation, while APR fell."""
        return self.best is not None and self.last["reward"] > self.best["reward"]


def criteria(config: ConfigDict) -> tuple[RewardPlateau, BestAndCollapse]:
    """Return the stopping criteria of a run, in their initial state."""
    early, held_out = config.early_stop, config.held_out
    return RewardPlateau(early.tolerance, early.patience), BestAndCollapse(held_out.tolerance, held_out.patience)


def is_finished(folder: str | Path, config: ConfigDict) -> bool:
    """Return whether a run has all epochs or met a criterion; train.py also exits with code 0 after a stop signal."""
    progress, (plateau, watch) = checkpoints.read_progress(checkpoints.find_checkpoint(folder)), criteria(config)
    plateau.load_state_dict(progress["plateau"])
    watch.load_state_dict(progress["held_out"])
    return progress["epoch"] >= config.num_epochs or plateau.stop or watch.stop


class RunState(Remembered):
    """Progress, logs and checkpoints of a run of train.py, either a new one or one that is resumed.

    Every process keeps the progress; the main one, which knows `contents` (fingerprints of files behind the settings),
    writes metrics.jsonl (a line per epoch), held_out.jsonl (per evaluation: epochs completed, apr, reward,
    apr_by_prompt), config.json, checkpoint_<epochs completed>/ and best to a folder that is locked until `close`.
    `unet` and `optimizer` receive the state of a checkpoint. Raises as `open_run` and `load_checkpoint` do, and
    UserError if `held_out` is not comparable with earlier ones.
    """

    epoch: int = 0  # epochs completed
    global_step: int = 0  # optimizer updates taken
    skipped_updates: int = 0
    wandb_id: str | None = None

    def __init__(
        self,
        config: ConfigDict,
        contents: Mapping[str, str],
        accelerator: Accelerator,
        held_out: HeldOut | None,
        unet: nn.Module,
        optimizer: Any,
    ):
        self.accelerator, self.limit = accelerator, config.num_checkpoint_limit
        # None: advantages are taken over the whole batch, and the tracker stays empty
        self.tracker = PerPromptStatTracker(**(config.per_prompt_stat_tracking or {"buffer_size": 2, "min_count": 2}))
        self.plateau, self.watch = criteria(config)
        self._parts = {"tracker": self.tracker, "plateau": self.plateau, "held_out": self.watch}
        self.best_due = False  # the last evaluation was the best and its model is not saved yet
        self.settings = {**config.to_dict(), CONTENTS: dict(contents), "processes": accelerator.num_processes}
        with ExitStack() as lock:
            self.folder, checkpoint = run_on_main_process(accelerator, open_run, lock, self.settings)
            self.resumed = checkpoint is not None
            if self.resumed:
                self.load_state_dict(checkpoints.load_checkpoint(checkpoint, unet, optimizer, accelerator.scaler))
                best = self.watch.best
                if not run_on_main_process(accelerator, checkpoints.repair_best, self.folder, best and best["epoch"]):
                    gone = "the best checkpoint, after %d epochs (APR %.4f), is gone: %s will appear with a better one"
                    logger.warning(gone, best["epoch"], best["apr"], self.folder / checkpoints.BEST)
                logger.info("resumed from %s after %d epochs", checkpoint, self.epoch)
            before = self.watch.fingerprint
            if held_out and before and (changed := difference(before, held_out.fingerprint)):
                raise UserError(f"held-out evaluations had {changed}; give the same as before, or held_out.every=0")
            self._lock = lock.pop_all()

    def begin(self, log_with: str, project: str) -> None:
        """Write the settings, open the logs (dropping entries newer than the checkpoint) and start the trackers."""
        main = self.accelerator.is_main_process
        if main:
            write_settings(self.folder, self.settings, self.epoch, self.resumed)
        evaluated = self.epoch + 1 if self.watch.best else 0
        self.log = JsonLines(self.folder / "metrics.jsonl", main, keep=self.epoch)
        self.held_out_log = JsonLines(self.folder / "held_out.jsonl", main, keep=evaluated)
        self.wandb_id = start_trackers(self.accelerator, log_with, project, self.folder, self.settings, self.wandb_id)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as JSON-able values."""
        return super().state_dict() | {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def advance(self, updates: int, skipped_updates: int, reward_mean: float) -> None:
        """Count an epoch with these numbers of optimizer updates and its mean reward."""
        self.epoch, self.global_step = self.epoch + 1, self.global_step + updates
        self.skipped_updates += skipped_updates
        self.plateau.update(reward_mean)

    def write(self, entry: dict) -> None:
        """Log an epoch."""
        self.log.write(entry)
        self.accelerator.log(entry, step=self.global_step)
        text = "epoch {epoch}  reward {reward_mean:.4f} +- {reward_std:.4f}  |ratio-1| {first_ratio_deviation:.1e}  "
        text += "clipfrac {clipfrac:.3f}  grad norm {grad_norm:.4f}  {seconds:.1f} s"
        if "held_out_apr" in entry:
            text += "  held-out APR {held_out_apr:.4f} reward {held_out_reward:.4f}"
        logger.info("%s", text.format(**entry))

    def stop_reason(self, evaluated: bool) -> str | None:
        """Return why training should stop now, or None. `evaluated`: a held-out evaluation has just been made."""
        if self.plateau.stop:
            return f"mean reward changed by less than {self.plateau.tolerance:g} for {self.plateau.patience} epochs"
        if not evaluated or not self.watch.stop:
            return None
        what, went, advice = "the policy has collapsed", "went", "a lower train.learning_rate"
        if self.watch.hacked:
            what, went, advice = "the reward is being hacked", "rose", "train.kl_coef"
        best, last, best_folder = self.watch.best, self.watch.last, self.folder / checkpoints.BEST
        return (
            f"{what}: on held-out noise the reward {went} from {best['reward']:.4f} to {last['reward']:.4f} while APR "
            f"fell from {best['apr']:.4f} to {last['apr']:.4f}, in {self.watch.collapsed} evaluations in a row; the "
            f"best checkpoint, after {best['epoch']} epochs, is {best_folder}; try {advice}"
        )

    def add_evaluation(self, evaluation: Evaluation, held_out: HeldOut) -> dict:
        """Log an evaluation; return its fields for the epoch's log line. Sets `best_due` if it is the best so far."""
        self.watch.fingerprint = held_out.fingerprint
        self.held_out_log.write({"epoch": self.epoch} | asdict(evaluation))
        entry = {"held_out_apr": evaluation.apr, "held_out_reward": evaluation.reward}
        self.accelerator.log(entry, step=self.global_step)
        self.best_due = self.watch.update(self.epoch, evaluation.apr, evaluation.reward)
        return entry

    def save(self, unet: nn.Module, optimizer: Any) -> None:
        """Write checkpoint_<epochs completed> unless it exists; link it if `best_due`. Collective. Raises DiskFull."""
        accelerator, existing = self.accelerator, self.folder / f"checkpoint_{self.epoch}"
        best, self.best_due = self.best_due, False
        if run_on_main_process(accelerator, checkpoints.find_damage, existing) is None:
            if best:
                run_on_main_process(accelerator, checkpoints.link_best, self.folder, self.epoch)
            return
        taken = checkpoints.snapshot(unet, optimizer, accelerator.scaler, accelerator.is_main_process)

        def write() -> None:
            card = checkpoints.model_card(self.settings, taken[0], self.epoch)
            checkpoints.save_checkpoint(self.folder, taken, self.state_dict(), self.limit, best, card)

        run_on_main_process(accelerator, write)

    def log_image(self, image: Image.Image) -> None:
        """Send a picture to the trackers that support images. Main process only."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(image)[None]}, step=self.global_step, **layout)

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

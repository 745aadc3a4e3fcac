"""What a training run remembers beside its model, and the folder where it writes that down."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import nn

from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.training.checkpoints import (
    BEST,
    checkpoint_folder,
    epochs_completed,
    fault,
    is_whole,
    load_checkpoint,
    put_aside,
    recover_best,
    save_best,
    save_checkpoint,
    snapshot,
)
from ddpo_pytorch.training.held_out import Evaluation, HeldOut
from ddpo_pytorch.training.run_folder import CONTENTS, open_run, start_wandb, write_settings
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines

logger = logging.getLogger(__name__)


class RewardPlateau:
    """The paper's stopping criterion: mean reward changed by less than `tolerance` in `patience` successive epochs."""

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience
        self.previous: float | None = None
        self.quiet_epochs = 0

    def update(self, reward: float) -> bool:
        """Take this epoch's mean reward; True when training should stop. Never with patience 0."""
        quiet = self.previous is not None and abs(reward - self.previous) < self.tolerance
        self.quiet_epochs = self.quiet_epochs + 1 if quiet else 0
        self.previous = reward
        return self.stop

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.quiet_epochs

    def state_dict(self) -> dict:
        return {"previous": self.previous, "quiet_epochs": self.quiet_epochs}

    def load_state_dict(self, state: dict) -> None:
        self.previous, self.quiet_epochs = state["previous"], state["quiet_epochs"]


class BestAndCollapse:
    """The best of a run's held-out evaluations, and whether the policy has collapsed since.

    The best evaluation is the one of highest APR, the first of equals. A later one has *collapsed* when, on the same
    prompts and noise, its APR is lower by more than `tolerance`. Where its mean reward is higher than the best's at the
    same time, the reward is being hacked; where it is not, the policy itself has broken down.

    Args:
        tolerance: fall of APR, in [0, 1], that is put down to chance.
        patience: collapsed evaluations in a row after which training should stop; 0 never stops.

    Attributes:
        best, last: {"epoch": epochs completed, "apr", "reward"} of the best and of the last evaluation, or None.
        collapsed: collapsed evaluations in a row up to the last one.
    """

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.collapsed = 0

    def update(self, epoch: int, apr: float, reward: float) -> bool:
        """Take the evaluation after `epoch` epochs; True when it is the best so far."""
        self.last = {"epoch": epoch, "apr": apr, "reward": reward}
        if self.best is None or apr > self.best["apr"]:
            self.best, self.collapsed = self.last, 0
            return True
        self.collapsed = self.collapsed + 1 if self.best["apr"] - apr > self.tolerance else 0
        return False

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.collapsed

    @property
    def hacked(self) -> bool:
        """Whether the last evaluation has a higher reward than the best one: the reward rises while APR falls."""
        return self.best is not None and self.last["reward"] > self.best["reward"]

    def state_dict(self) -> dict:
        return {"best": self.best, "last": self.last, "collapsed": self.collapsed}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.last, self.collapsed = state["best"], state["last"], state["collapsed"]


class Record:
    """Progress, logs and checkpoints of a run. Every process keeps the progress, the main one alone writes.

    The folder holds metrics.jsonl (a line an epoch), held_out.jsonl (a line an evaluation: epochs completed, 0 before
    the first, apr, reward, apr_by_prompt), config.json, checkpoint_<epochs completed>/ and best/.

    Attributes:
        epoch, global_step: epochs and optimizer updates completed.
        skipped_updates: updates that were left out.
        tracker, plateau, watch: statistics that outlive an epoch, of rewards and of held-out evaluations.
        held_out_identity: settings of the held-out evaluations so far (`HeldOut.identity`); None before the first.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tracker: PerPromptStatTracker,
        plateau: RewardPlateau,
        watch: BestAndCollapse,
    ):
        self.accelerator = accelerator
        self.tracker, self.plateau, self.watch = tracker, plateau, watch
        self.epoch, self.global_step, self.skipped_updates, self.wandb_id = 0, 0, 0, None
        self.held_out_identity: dict | None = None
        self.resumed, self.stands_still, self.wandb_run = False, False, None
        self._held = ExitStack()
        self._line_due = False  # an epoch is complete and not yet in the log
        self._best_due: tuple[nn.Module, Any] | None = None  # its model is the best so far

    def open(
        self,
        logdir: str,
        run_name: str,
        resume_from: str,
        settings: Mapping[str, Any],
        unet: nn.Module,
        optimizer: Any,
    ) -> None:
        """Find the run's folder, which is this run's alone until `close` or the end of the main process; where there is
        a checkpoint to go on from, take weights, optimizer and progress of it.

        `settings` are the whole configuration: a folder begun with other ones is refused. Raises UserError as
        `open_run` and `load_checkpoint` do.
        """
        self.settings = {**settings, "processes": self.accelerator.num_processes}
        try:
            self.folder, checkpoint = open_run(
                self.accelerator, self._held, logdir, run_name, resume_from, self.settings
            )
            if checkpoint is not None:
                self._load(checkpoint, unet, optimizer)
        except BaseException:
            self._held.close()
            raise

    def _load(self, checkpoint: Path, unet: nn.Module, optimizer: Any) -> None:
        progress = load_checkpoint(checkpoint, unet, optimizer, self.accelerator.scaler)
        if missing := [name for name in ("global_step", "wandb_id", "tracker", "plateau") if name not in progress]:
            raise UserError(
                f"progress.json of {str(checkpoint)!r} lacks {missing[0]!r}; resume from another checkpoint"
            )
        self.epoch, self.global_step = progress["epoch"], progress["global_step"]
        self.skipped_updates = progress.get("skipped_updates", 0)
        self.wandb_id, self.resumed = progress["wandb_id"], True
        self.tracker.load_state_dict(progress["tracker"])
        self.plateau.load_state_dict(progress["plateau"])
        self.stands_still = self.plateau.stop
        if held_out := progress.get("held_out"):  # checkpoints from before there was such an evaluation lack it
            self.watch.load_state_dict(held_out)
            self.held_out_identity = held_out["identity"]
        logger.info("resumed from %s after %d epochs", checkpoint, self.epoch)

    def begin(self, wandb_mode: str, wandb_project: str) -> None:
        """Write down the settings, and open the logs, of which what is newer than the checkpoint is dropped."""
        main = self.accelerator.is_main_process
        if main:
            write_settings(self.folder, self.settings, self.epoch, self.resumed)
        self.log = JsonLines(self.folder / "metrics.jsonl", main, keep=self.epoch)
        self.held_out_log = JsonLines(
            self.folder / "held_out.jsonl", main, keep=self.epoch + 1 if self.watch.best else 0
        )
        if main:
            self.wandb_run = start_wandb(wandb_mode, wandb_project, self.folder, self.settings, self.wandb_id)
            self.wandb_id = self.wandb_run.id if self.wandb_run else None
            self._check_best()

    def _check_best(self) -> None:
        best = recover_best(self.folder)
        if best is not None and (reason := fault(best)):
            logger.warning("%s is damaged (%s) and was put aside as %s", best, reason, put_aside(best).name)
            best = None
        if self.watch.best and (best is None or epochs_completed(best) != self.watch.best["epoch"]):
            held = f"is after {epochs_completed(best)}" if best else "is not there"
            logger.warning(
                "the best held-out evaluation was after %d epochs (APR %.4f), but %s %s; a better one replaces it",
                self.watch.best["epoch"],
                self.watch.best["apr"],
                self.folder / BEST,
                held,
            )

    def state_dict(self) -> dict:
        """Progress, fit for JSON."""
        return {
            "epoch": self.epoch,
            "global_step": self.global_step,
            "skipped_updates": self.skipped_updates,
            "wandb_id": self.wandb_id,
            "tracker": self.tracker.state_dict(),
            "plateau": self.plateau.state_dict(),
            "held_out": self.watch.state_dict() | {"identity": self.held_out_identity},
        }

    def advance(self, updates: int, skipped_updates: int, reward_mean: float) -> None:
        """Count an epoch of so many optimizer updates, so many left out, and this mean reward."""
        self.epoch, self.global_step = self.epoch + 1, self.global_step + updates
        self.skipped_updates += skipped_updates
        self.stands_still, self._line_due = self.plateau.update(reward_mean), True

    def write(self, entry: dict) -> None:
        """Log an epoch; then keep its model where the evaluation after it was the best."""
        self.log.write(entry)
        self._line_due = False
        if self._best_due:
            self._save_best()
        if self.wandb_run:
            self.wandb_run.log(entry, step=self.global_step)
        shown = ("epoch", "reward_mean", "reward_std", "first_ratio_deviation", "clipfrac", "grad_norm", "seconds")
        logger.info(
            "epoch %d  reward %.4f +- %.4f  |ratio-1| %.1e  clipfrac %.3f  grad norm %.4f  %.1f s%s",
            *(entry[key] for key in shown),
            _shown_held_out(entry) if "held_out_apr" in entry else "",
        )

    def stop_reason(self, evaluated: bool) -> str | None:
        """Why training should stop after this epoch, on whose end there was a held-out evaluation or not; or None."""
        if self.stands_still:
            return f"mean reward changed by less than {self.plateau.tolerance:g} for {self.plateau.patience} epochs"
        if evaluated and self.watch.stop:
            best, last = self.watch.best, self.watch.last
            hacked = self.watch.hacked
            cause = "the reward is being hacked" if hacked else "the policy has collapsed"
            return (
                f"{cause}: on held-out noise the reward {'rose' if hacked else 'went'} from {best['reward']:.4f} to "
                f"{last['reward']:.4f} while APR fell from {best['apr']:.4f} to {last['apr']:.4f}, in "
                f"{self.watch.collapsed} evaluations in a row; the best checkpoint, after {best['epoch']} epochs, is "
                f"{self.folder / BEST}; try {'train.kl_coef' if hacked else 'a lower train.learning_rate'}"
            )
        return None

    def add_evaluation(self, evaluation: Evaluation, held_out: HeldOut, unet: nn.Module, optimizer: Any) -> dict:
        """Log an evaluation, and keep the model when it is the best so far. Returns what an epoch's line says of it."""
        self.held_out_identity = held_out.identity
        self.held_out_log.write({"epoch": self.epoch} | asdict(evaluation))
        entry = {"held_out_apr": evaluation.apr, "held_out_reward": evaluation.reward}
        if self.wandb_run:
            self.wandb_run.log(entry, step=self.global_step)
        if self.watch.update(self.epoch, evaluation.apr, evaluation.reward):
            self._best_due = (unet, optimizer)
            if not self._line_due:
                self._save_best()
        return entry

    def _save_best(self) -> None:
        # A run that has no other checkpoint goes on from the best one, whose epoch's line must then be in the log.
        taken = snapshot(*self._best_due, self.accelerator.scaler, self.accelerator.is_main_process)
        run_on_main_process(self.accelerator, save_best, self.folder, taken, self.state_dict())
        self._best_due = None

    def save(self, unet: nn.Module, optimizer: Any, limit: int) -> None:
        """Write checkpoint_<epochs completed>, unless a whole one is there; the newest `limit` stay.

        To be called between epochs, by every process. Raises UserError when the disk is full.
        """
        if run_on_main_process(self.accelerator, is_whole, checkpoint_folder(self.folder, self.epoch)):
            return
        taken = snapshot(unet, optimizer, self.accelerator.scaler, self.accelerator.is_main_process)
        run_on_main_process(self.accelerator, save_checkpoint, self.folder, self.epoch, taken, self.state_dict(), limit)

    def close(self) -> None:
        """End the W&B run, and leave the folder to others."""
        if self.wandb_run:
            self.wandb_run.finish()
        self._held.close()


def open_record(
    config: ConfigDict,
    contents: Mapping[str, str],
    accelerator: Accelerator,
    held_out: HeldOut | None,
    unet: nn.Module,
    optimizer: Any,
) -> Record:
    """Return the record of a new run of train.py or, with its weights loaded, of the one to resume.

    `contents` are fingerprints of the files behind the settings (needed on the main process).
    """
    plateau = RewardPlateau(config.early_stop.tolerance, config.early_stop.patience)
    watch = BestAndCollapse(config.held_out.tolerance, config.held_out.patience)
    # None: advantages are taken over the whole batch, and the tracker stays empty
    tracking = config.per_prompt_stat_tracking or {"buffer_size": 2, "min_count": 2}
    record = Record(accelerator, PerPromptStatTracker(**tracking), plateau, watch)
    settings = {**config.to_dict(), CONTENTS: dict(contents)}
    record.open(config.logdir, config.run_name, config.resume_from, settings, unet, optimizer)
    if held_out and record.held_out_identity:
        held_out.check_identity(record.held_out_identity)
    return record


def _shown_held_out(entry: dict) -> str:
    return f"  held-out APR {entry['held_out_apr']:.4f} reward {entry['held_out_reward']:.4f}"

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
from ddpo_pytorch.training.checkpoints import (
    BEST,
    Snapshot,
    checkpoint_folder,
    is_intact,
    link_best,
    load_checkpoint,
    repair_best,
    save_checkpoint,
    snapshot,
)
from ddpo_pytorch.training.held_out import Evaluation, HeldOut
from ddpo_pytorch.training.model_card import model_card
from ddpo_pytorch.training.run_folder import CONTENTS, open_run, start_trackers, write_settings
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.files import JsonLines

logger = logging.getLogger(__name__)


class RewardPlateau:
    """The paper's stopping criterion: mean reward changed by less than `tolerance` in `patience` successive epochs."""

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience
        self.previous: float | None = None
        self.quiet_epochs = 0

    def update(self, reward: float) -> bool:
        """Record an epoch's mean reward; return whether training should stop (never with patience 0)."""
        quiet = self.previous is not None and abs(reward - self.previous) < self.tolerance
        self.quiet_epochs = self.quiet_epochs + 1 if quiet else 0
        self.previous = reward
        return self.stop

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.quiet_epochs

    def state_dict(self) -> dict:
        return {"previous": self.previous, "quiet_epochs": self.quiet_epochs}

    def load_state_dict(self, state: dict) -> None:
        self.previous, self.quiet_epochs = state["previous"], state["quiet_epochs"]


class BestAndCollapse:
    """The best held-out evaluation of a run, and detection of collapse since then.

    The best evaluation has the highest APR (the first of equals). A later one has *collapsed* when its APR, on the same
    prompts and noise, is lower by more than `tolerance`. If its mean reward is higher at the same time, the reward is
    being hacked; otherwise the policy has broken down.

    Args:
        tolerance: drop in APR, in [0, 1], attributed to chance.
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

    def state_dict(self) -> dict:
        return {"best": self.best, "last": self.last, "collapsed": self.collapsed}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.last, self.collapsed = state["best"], state["last"], state["collapsed"]


class RunState:
    """Progress, logs and checkpoints of a run. Every process keeps the progress, the main process writes.

    The folder holds metrics.jsonl (one line per epoch), held_out.jsonl (one line per evaluation: epochs completed, apr,
    reward, apr_by_prompt), config.json, checkpoint_<epochs completed>/ and best.

    Attributes:
        epoch, global_step, skipped_updates: epochs completed, optimizer updates taken and skipped.
        tracker, plateau, watch: running statistics of rewards and of held-out evaluations.
        held_out_fingerprint: settings of the held-out evaluations so far (`HeldOut.fingerprint`), None before any.
        best_due: the last evaluation was the best and its model is not saved yet.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tracker: PerPromptStatTracker,
        plateau: RewardPlateau,
        watch: BestAndCollapse,
        limit: int,
    ):
        self.accelerator, self.limit = accelerator, limit
        self.tracker, self.plateau, self.watch = tracker, plateau, watch
        self.epoch, self.global_step, self.skipped_updates, self.wandb_id = 0, 0, 0, None
        self.held_out_fingerprint: dict | None = None
        self.resumed, self.best_due = False, False
        self._lock = ExitStack()

    def open(
        self, logdir: str, run_name: str, resume_from: str, settings: Mapping[str, Any], unet: nn.Module, optimizer: Any
    ) -> None:
        """Lock the run's folder until `close`, and load its checkpoint if there is one to resume from.

        `settings` is the whole configuration; a folder begun with other settings is refused. Raises UserError as
        `open_run` and `load_checkpoint` do.
        """
        self.settings = {**settings, "processes": self.accelerator.num_processes}
        try:
            self.folder, checkpoint = open_run(
                self.accelerator, self._lock, logdir, run_name, resume_from, self.settings
            )
            if checkpoint is not None:
                self._load(checkpoint, unet, optimizer)
        except BaseException:
            self._lock.close()
            raise

    def _load(self, checkpoint: Path, unet: nn.Module, optimizer: Any) -> None:
        progress = load_checkpoint(checkpoint, unet, optimizer, self.accelerator.scaler)
        for name in ("epoch", "global_step", "skipped_updates", "wandb_id"):
            setattr(self, name, progress[name])
        self.tracker.load_state_dict(progress["tracker"])
        self.plateau.load_state_dict(progress["plateau"])
        self.watch.load_state_dict(progress["held_out"])
        self.held_out_fingerprint = progress["held_out"]["fingerprint"]
        self.resumed = True
        best = self.watch.best
        if not run_on_main_process(self.accelerator, repair_best, self.folder, best and best["epoch"]):
            logger.warning(
                "the best held-out evaluation was after %d epochs (APR %.4f), but that checkpoint is gone; %s will "
                "appear with the next better one",
                best["epoch"],
                best["apr"],
                self.folder / BEST,
            )
        logger.info("resumed from %s after %d epochs", checkpoint, self.epoch)

    def begin(self, log_with: str, project: str) -> None:
        """Write the settings, open the logs (dropping what is newer than the checkpoint) and start the trackers."""
        main = self.accelerator.is_main_process
        if main:
            write_settings(self.folder, self.settings, self.epoch, self.resumed)
        self.log = JsonLines(self.folder / "metrics.jsonl", main, keep=self.epoch)
        self.held_out_log = JsonLines(
            self.folder / "held_out.jsonl", main, keep=self.epoch + 1 if self.watch.best else 0
        )
        self.wandb_id = start_trackers(self.accelerator, log_with, project, self.folder, self.settings, self.wandb_id)

    def state_dict(self) -> dict:
        """Return the progress as JSON-able values."""
        return {
            "epoch": self.epoch,
            "global_step": self.global_step,
            "skipped_updates": self.skipped_updates,
            "wandb_id": self.wandb_id,
            "tracker": self.tracker.state_dict(),
            "plateau": self.plateau.state_dict(),
            "held_out": self.watch.state_dict() | {"fingerprint": self.held_out_fingerprint},
        }

    def advance(self, updates: int, skipped_updates: int, reward_mean: float) -> None:
        """Count an epoch with these numbers of optimizer updates and its mean reward."""
        self.epoch, self.global_step = self.epoch + 1, self.global_step + updates
        self.skipped_updates += skipped_updates
        self.plateau.update(reward_mean)

    def write(self, entry: dict) -> None:
        """Log an epoch."""
        self.log.write(entry)
        self.accelerator.log(entry, step=self.global_step)
        shown = ("epoch", "reward_mean", "reward_std", "first_ratio_deviation", "clipfrac", "grad_norm", "seconds")
        evaluation = ""
        if "held_out_apr" in entry:
            evaluation = f"  held-out APR {entry['held_out_apr']:.4f} reward {entry['held_out_reward']:.4f}"
        logger.info(
            "epoch %d  reward %.4f +- %.4f  |ratio-1| %.1e  clipfrac %.3f  grad norm %.4f  %.1f s%s",
            *(entry[key] for key in shown),
            evaluation,
        )

    def stop_reason(self, evaluated: bool) -> str | None:
        """Return why training should stop now, or None. `evaluated`: a held-out evaluation has just been made."""
        if self.plateau.stop:
            return f"mean reward changed by less than {self.plateau.tolerance:g} for {self.plateau.patience} epochs"
        if evaluated and self.watch.stop:
            best, last, hacked = self.watch.best, self.watch.last, self.watch.hacked
            return (
                f"{'the reward is being hacked' if hacked else 'the policy has collapsed'}: on held-out noise the "
                f"reward {'rose' if hacked else 'went'} from {best['reward']:.4f} to {last['reward']:.4f} while APR "
                f"fell from {best['apr']:.4f} to {last['apr']:.4f}, in {self.watch.collapsed} evaluations in a row; "
                f"the best checkpoint, after {best['epoch']} epochs, is {self.folder / BEST}; try "
                f"{'train.kl_coef' if hacked else 'a lower train.learning_rate'}"
            )
        return None

    def add_evaluation(self, evaluation: Evaluation, held_out: HeldOut) -> dict:
        """Log an evaluation; return the fields of the epoch's log line. The best one so far makes `best_due` True."""
        self.held_out_fingerprint = held_out.fingerprint
        self.held_out_log.write({"epoch": self.epoch} | asdict(evaluation))
        entry = {"held_out_apr": evaluation.apr, "held_out_reward": evaluation.reward}
        self.accelerator.log(entry, step=self.global_step)
        self.best_due = self.watch.update(self.epoch, evaluation.apr, evaluation.reward)
        return entry

    def save(self, unet: nn.Module, optimizer: Any) -> None:
        """Write checkpoint_<epochs completed> unless it exists undamaged; let best point to it where that is due.

        Every process calls it after the epoch was logged. Raises UserError when the disk is full.
        """
        best, self.best_due = self.best_due, False
        if run_on_main_process(self.accelerator, is_intact, checkpoint_folder(self.folder, self.epoch)):
            if best:
                run_on_main_process(self.accelerator, link_best, self.folder, self.epoch)
            return
        taken = snapshot(unet, optimizer, self.accelerator.scaler, self.accelerator.is_main_process)
        run_on_main_process(self.accelerator, self._write, taken, best)

    def _write(self, taken: Snapshot, best: bool) -> None:
        card = model_card(self.settings, taken.file, self.epoch)
        save_checkpoint(self.folder, taken, self.state_dict(), self.limit, best, card)

    def log_image(self, image: Image.Image) -> None:
        """Send a picture to the trackers that take pictures. Main process only."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(image)[None]}, step=self.global_step, **layout)

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()


def open_run_state(
    config: ConfigDict,
    contents: Mapping[str, str],
    accelerator: Accelerator,
    held_out: HeldOut | None,
    unet: nn.Module,
    optimizer: Any,
) -> RunState:
    """Return the state of a new run of train.py or, with its weights loaded, of the run to resume.

    contents: fingerprints of the files behind the settings (main process only).
    """
    plateau = RewardPlateau(config.early_stop.tolerance, config.early_stop.patience)
    watch = BestAndCollapse(config.held_out.tolerance, config.held_out.patience)
    # None: advantages are taken over the whole batch, and the tracker stays empty
    tracking = config.per_prompt_stat_tracking or {"buffer_size": 2, "min_count": 2}
    state = RunState(accelerator, PerPromptStatTracker(**tracking), plateau, watch, config.num_checkpoint_limit)
    settings = {**config.to_dict(), CONTENTS: dict(contents)}
    state.open(config.logdir, config.run_name, config.resume_from, settings, unet, optimizer)
    if held_out and state.held_out_fingerprint:
        held_out.check_fingerprint(state.held_out_fingerprint)
    return state

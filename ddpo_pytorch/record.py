"""What a training run remembers beside its model, and the folder where it writes that down."""

import logging
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from torch import nn

from ddpo_pytorch.checkpointing import BEST, epochs_completed, load_checkpoint, recover_best, save_best, save_checkpoint
from ddpo_pytorch.held_out import Evaluation, HeldOut
from ddpo_pytorch.run import JsonLines, open_run, start_wandb
from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.stopping import BestAndCollapse, RewardPlateau

logger = logging.getLogger(__name__)


class Record:
    """Progress, logs and checkpoints of a run. Every process keeps the progress, the main one alone writes.

    The folder holds metrics.jsonl (a line an epoch), held_out.jsonl (a line an evaluation: epochs completed, 0 for the
    base model, apr, reward, apr_by_prompt), config.json, checkpoint_<epochs completed>/ and best/.

    Attributes:
        epoch, global_step: epochs and optimizer updates completed.
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
        self.epoch, self.global_step, self.wandb_id = 0, 0, None
        self.held_out_identity: dict | None = None
        self.resumed = False

    def open(self, logdir: str, run_name: str, resume_from: str, unet: nn.Module, optimizer: Any) -> None:
        """Find the run's folder; where there is a checkpoint to go on from, take weights, optimizer and progress of it.

        Raises UserError as `open_run` and `load_checkpoint` do.
        """
        self.folder, checkpoint = open_run(self.accelerator, logdir, run_name, resume_from)
        if checkpoint is None:
            return
        progress = load_checkpoint(checkpoint, unet, optimizer, self.accelerator.scaler)
        self.epoch, self.global_step = progress["epoch"], progress["global_step"]
        self.wandb_id, self.resumed = progress["wandb_id"], True
        self.tracker.load_state_dict(progress["tracker"])
        self.plateau.load_state_dict(progress["plateau"])
        if held_out := progress.get("held_out"):  # checkpoints from before there was such an evaluation lack it
            self.watch.load_state_dict(held_out)
            self.held_out_identity = held_out["identity"]
        logger.info("resumed from %s after %d epochs", checkpoint, self.epoch)

    def begin(self, settings: dict, settings_text: str, wandb_mode: str, wandb_project: str) -> None:
        """Open the logs, of which what is newer than the checkpoint is dropped, and write down the settings."""
        main = self.accelerator.is_main_process
        self.log = JsonLines(self.folder / "metrics.jsonl", main, keep=self.epoch)
        self.held_out_log = JsonLines(
            self.folder / "held_out.jsonl", main, keep=self.epoch + 1 if self.watch.best else 0
        )
        self.wandb_run = None
        if main:
            name = f"config_{self.epoch:04d}.json" if self.resumed else "config.json"
            (self.folder / name).write_text(settings_text)
            self.wandb_run = start_wandb(wandb_mode, wandb_project, self.folder, settings, self.wandb_id)
            self.wandb_id = self.wandb_run.id if self.wandb_run else None
            self._check_best()

    def _check_best(self) -> None:
        best = recover_best(self.folder)
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
            "wandb_id": self.wandb_id,
            "tracker": self.tracker.state_dict(),
            "plateau": self.plateau.state_dict(),
            "held_out": self.watch.state_dict() | {"identity": self.held_out_identity},
        }

    def advance(self, updates: int, reward_mean: float) -> None:
        """Count an epoch of so many optimizer updates and this mean reward."""
        self.epoch, self.global_step = self.epoch + 1, self.global_step + updates
        self.stands_still = self.plateau.update(reward_mean)

    def write(self, entry: dict) -> None:
        """Log an epoch."""
        self.log.write(entry)
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
            return (
                f"on held-out noise the reward rose from {best['reward']:.4f} to {last['reward']:.4f} while APR fell "
                f"from {best['apr']:.4f} to {last['apr']:.4f}, in {self.watch.collapsed} evaluations in a row; the "
                f"best checkpoint, after {best['epoch']} epochs, is {self.folder / BEST}"
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
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                save_best(self.folder, unet, optimizer, self.accelerator.scaler, self.state_dict())
        return entry

    def save(self, unet: nn.Module, optimizer: Any, limit: int) -> None:
        """Write checkpoint_<epochs completed>; the newest `limit` stay."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_checkpoint(self.folder, self.epoch, unet, optimizer, scaler, self.state_dict(), limit)

    def close(self) -> None:
        if self.wandb_run:
            self.wandb_run.finish()


def _shown_held_out(entry: dict) -> str:
    return f"  held-out APR {entry['held_out_apr']:.4f} reward {entry['held_out_reward']:.4f}"

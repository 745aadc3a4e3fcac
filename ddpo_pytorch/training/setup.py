"""What scripts need around their algorithm: accelerator, batch geometry, checked settings, peak memory."""

import logging
import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from ddpo_pytorch.utils.distributed import check_sharding, sharding_asked
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import (
    BELOW_ONE,
    FINITE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    SEED,
    SHARE,
    ZERO_OR_MORE,
    Range,
    check_choices,
    check_pair,
    check_ranges,
)

logger = logging.getLogger(__name__)
# what batch_geometry computes with
BATCHES = {
    "sample.batch_size": ONE_OR_MORE,
    "sample.num_batches_per_epoch": ONE_OR_MORE,
    "sample.images_per_prompt": ONE_OR_MORE,
    "sample.num_steps": ONE_OR_MORE,
    "train.batch_size": ONE_OR_MORE,
    "train.gradient_accumulation_steps": ONE_OR_MORE,
    "train.num_inner_epochs": ONE_OR_MORE,
    "train.timesteps_per_forward": ONE_OR_MORE,
    "train.timestep_fraction": Range("(0, 1]"),
}
# Numeric settings of train.py. With a value outside its range, training fails, or runs and learns nothing.
TRAINING = BATCHES | {
    "seed": SEED,
    "num_epochs": ONE_OR_MORE,
    "save_freq": ONE_OR_MORE,
    "num_checkpoint_limit": ONE_OR_MORE,
    "sample.guidance_scale": FINITE,
    "train.learning_rate": POSITIVE,
    "train.adam_beta1": BELOW_ONE,
    "train.adam_beta2": BELOW_ONE,
    "train.adam_weight_decay": NOT_NEGATIVE,
    "train.adam_epsilon": POSITIVE,
    "train.max_skipped_updates": ONE_OR_MORE,
    "train.max_grad_norm": Range("(0, inf]"),  # infinity: gradients are not clipped
    "train.adv_clip_max": POSITIVE,
    "train.clip_range": POSITIVE,
    "train.lora_rank": ONE_OR_MORE,
    "train.kl_coef": NOT_NEGATIVE,
    "early_stop.patience": ZERO_OR_MORE,
    "early_stop.tolerance": NOT_NEGATIVE,
    "held_out.every": ZERO_OR_MORE,
    "held_out.images_per_prompt": ONE_OR_MORE,
    "held_out.patience": ZERO_OR_MORE,
    "held_out.tolerance": BELOW_ONE,  # APR never falls by 1 or more
}
ADVANTAGES = ("per_prompt", "group", "global")


@dataclass(frozen=True)
class Geometry:
    """How samples, processes and optimizer updates of an epoch fit together; only local_samples is per process."""

    processes: int
    local_samples: int
    updates: int
    timestep_window: tuple[int, int]
    train_timesteps: int
    timesteps_per_forward: int

    @property
    def samples(self) -> int:
        return self.local_samples * self.processes

    @property
    def forwards(self) -> int:
        """Forward passes of the UNet for a train batch."""
        return self.train_timesteps // self.timesteps_per_forward

    def describe(self) -> str:
        per_update = self.samples // self.updates
        return (
            f"{self.samples} samples an epoch ({self.local_samples} on each of {self.processes} processes), "
            f"{self.updates} updates of {per_update} samples x {self.train_timesteps} timesteps"
        )


def batch_geometry(sample: ConfigDict, train: ConfigDict, processes: int) -> Geometry:
    """Check that all batch sizes divide and return the counts. Raises UserError with both numbers where they do not."""
    check_ranges({"sample": sample, "train": train}, BATCHES)
    local = sample.batch_size * sample.num_batches_per_epoch
    per_update = train.batch_size * train.gradient_accumulation_steps
    if local % per_update:
        raise UserError(
            f"sample.batch_size x sample.num_batches_per_epoch = {local} samples a process do not divide into "
            f"updates of train.batch_size x train.gradient_accumulation_steps = {per_update}; make it a multiple"
        )
    if local % sample.images_per_prompt:
        raise UserError(
            f"sample.images_per_prompt={sample.images_per_prompt} does not divide the {local} samples of a process"
        )
    low, high = check_pair("train.timestep_window", train.timestep_window, SHARE)
    first, last = math.floor(low * sample.num_steps), math.ceil(high * sample.num_steps)
    timesteps = int((last - first) * train.timestep_fraction)
    if timesteps < 1:
        raise UserError(
            f"train.timestep_fraction={train.timestep_fraction} of {last - first} timesteps is less than one; raise it"
        )
    if timesteps % train.timesteps_per_forward:
        raise UserError(
            f"train.timesteps_per_forward={train.timesteps_per_forward} does not divide the {timesteps} timesteps that "
            "each sample is trained on; give a divisor, or change train.timestep_fraction"
        )
    return Geometry(processes, local, local // per_update, (first, last), timesteps, train.timesteps_per_forward)


def check_training(config: ConfigDict) -> None:
    """Raise UserError for settings of train.py that cannot train, or train something other than what was asked for."""
    check_ranges(config, TRAINING)
    check_choices(config, {"train.advantage": ADVANTAGES, "wandb": ("auto", "disabled")})
    if config.sample.guidance_scale > 1 and not config.train.cfg:
        raise UserError(
            f"train.cfg is False but sample.guidance_scale is {config.sample.guidance_scale}: samples drawn with "
            "guidance cannot be scored without it; set train.cfg=True, or sample.guidance_scale=1"
        )
    scheduler = config.sample.get("scheduler", "ddim")
    if scheduler != "ddim":
        raise UserError(
            f"sample.scheduler is {scheduler!r}; train.py needs 'ddim', whose steps have log-probabilities to "
            "train on: set sample.scheduler=ddim"
        )
    if config.train.kl_coef and not config.use_lora:
        raise UserError("train.kl_coef needs use_lora=True: the base model is the UNet with its adapters off")
    if sharding_asked():
        check_sharding(config.use_lora, config.train.use_8bit_adam, config.mixed_precision)
    _check_statistics(config.per_prompt_stat_tracking)
    if config.held_out.patience and not config.held_out.every:
        raise UserError(
            f"held_out.patience is {config.held_out.patience} but held_out.every is 0: nothing is evaluated; set "
            "held_out.every, or held_out.patience=0"
        )


def _check_statistics(tracking: ConfigDict | None) -> None:
    """Refuse per-prompt statistics that could only have a standard deviation of 0, or would never be used."""
    if tracking is None:
        return
    two = Range("[2, inf)", whole=True)  # one reward has no standard deviation, and gets advantage 0
    check_ranges(tracking, {"buffer_size": two, "min_count": two}, "per_prompt_stat_tracking.")
    if tracking.min_count > tracking.buffer_size:
        raise UserError(
            f"per_prompt_stat_tracking.min_count is {tracking.min_count} but only buffer_size={tracking.buffer_size} "
            "rewards are remembered, so no prompt would ever use its own statistics; raise buffer_size, or set "
            "per_prompt_stat_tracking=None to normalize over the whole batch"
        )

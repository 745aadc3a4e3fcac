"""What scripts need around their algorithm: accelerator, batch geometry, checked settings, peak memory."""

import logging
import math
import os
import resource
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from accelerate.utils.environment import parse_flag_from_env
from ml_collections import ConfigDict

from ddpo_pytorch.utils.cores import available_cores, thread_limit
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
from ddpo_pytorch.utils.sharding import check_sharding, sharding_accelerator, sharding_asked

logger = logging.getLogger(__name__)
PROCESS_TIMEOUT = 24 * 3600.0
LONGEST_TIMEOUT = 365 * 24 * 3600
UNKNOWN_TO_SCRIPTS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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


def make_accelerator(
    mixed_precision: str,
    allow_tf32: bool = True,
    gradient_accumulation_steps: int = 1,
    may_shard: bool = False,
    process_timeout: float = PROCESS_TIMEOUT,
) -> Accelerator:
    """Return an Accelerator that follows these settings, not those of the launcher or of ACCELERATE_* variables.

    On a CPU the processes of a machine share its cores, within the user's limit on threads (see `thread_limit`).

    Args:
        mixed_precision: "no", "bf16", or on a GPU "fp16".
        gradient_accumulation_steps: backward passes for each step of the optimizer.
        may_shard: the caller can train a model that is divided among processes, as FSDP settings of the launcher ask.
        process_timeout: seconds that a process waits for the others, e.g. while one of them decodes images.

    Raises UserError for other values, and for launchers' features that the scripts do not have.
    """
    if sharding_asked() and not may_shard:
        raise UserError("the launcher asks for FSDP, which only train.py knows; take another file of config/accelerate")
    check_launcher(mixed_precision, gradient_accumulation_steps)
    if mixed_precision not in DTYPES:
        raise UserError(f"mixed_precision is {mixed_precision!r}; allowed are {', '.join(DTYPES)}")
    if not 0 < process_timeout <= LONGEST_TIMEOUT:
        raise UserError(
            f"process_timeout is {process_timeout}; it must be above 0 and at most {LONGEST_TIMEOUT} seconds"
        )
    on_cpu = _flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu and mixed_precision == "fp16":
        raise UserError("mixed_precision is 'fp16', which needs a GPU; on a CPU give mixed_precision=no or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))
    if sharding_asked():
        accelerator = sharding_accelerator(on_cpu, mixed_precision, waiting)
    else:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed_precision,
            # as a plugin: ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides a plain number
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=gradient_accumulation_steps),
            dynamo_backend="no",
            kwargs_handlers=[waiting],
        )
    if on_cpu:  # after Accelerate, which may set a number of its own
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, min(share, thread_limit())))
    return accelerator


def check_launcher(mixed_precision: str, gradient_accumulation_steps: int) -> None:
    """Refuse what a launcher asks for and no script can do (UserError); log what it asks for and settings decide."""
    for variable, feature in UNKNOWN_TO_SCRIPTS.items():
        if _flag(variable):
            raise UserError(f"the launcher asks for {feature} ({variable}), which no script knows; launch without it")
    for variable, used in (
        ("ACCELERATE_MIXED_PRECISION", mixed_precision),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(gradient_accumulation_steps)),
        ("ACCELERATE_DYNAMO_BACKEND", "no"),
    ):
        asked = os.environ.get(variable, "").lower()
        if asked not in ("", "no", "1", used):  # launchers set "no" and "1" where they are asked for nothing
            logger.info("%s=%s of the launcher is not used: the settings of this command decide", variable, asked)


def _flag(variable: str) -> bool:
    """Return whether an environment variable is on, in the words that Accelerate reads."""
    try:
        return parse_flag_from_env(variable)
    except ValueError as error:
        raise UserError(f"{variable} is {os.environ[variable]!r}; give true or false") from error


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


def peak_memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

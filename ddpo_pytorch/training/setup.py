"""What scripts need around their algorithm: accelerator, batch geometry, checked settings, peak memory."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule
from ddpo_pytorch.generator.cpu_kernels import fuse_lora, run_batch_on_all_cores
from ddpo_pytorch.generator.lora import add_lora
from ddpo_pytorch.generator.pipeline import load_pipeline, set_schedule
from ddpo_pytorch.prompts import PROMPT_LISTS, Prompt, all_prompts, get_prompt_fn
from ddpo_pytorch.rewards import RewardFn, build_reward, check_prompts, parse_spec
from ddpo_pytorch.rollout import draw_prompts
from ddpo_pytorch.sampling import Sampling
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.held_out import HeldOut, load_judge
from ddpo_pytorch.utils.distributed import check_sharding, sharding_requested
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
    if sharding_requested():
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


def load_policy(
    pretrained: ConfigDict,
    unet_path: str,
    sample: ConfigDict,
    train: ConfigDict,
    use_lora: bool,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    load_from: str = "",
) -> StableDiffusionPipeline:
    """Load the pipeline of `config.pretrained` and `unet_path`, with its schedule, frozen but for the policy.

    The policy is in float32: LoRA adapters of `config.train`, or the whole UNet. Adapters start from a function of
    `seed` that changes nothing; with `load_from`, which eval.py reads in the same way, the policy starts from the
    weights there. The rest is in `dtype`. Raises UserError for files that do not fit, and for a schedule that cannot be
    trained.
    """
    pipe = load_pipeline(pretrained.model, pretrained.revision, unet_path, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    set_schedule(pipe, sample.num_steps)
    check_schedule(pipe.scheduler, sample.eta)
    # what convolutions are fastest in; but FSDP divides contiguous weights only
    for part in (pipe.vae,) if sharding_requested() else (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    if use_lora:
        add_lora(pipe.unet, train.lora_rank, train.lora_targets, seed)
        fuse_lora(pipe.unet)
    else:
        pipe.unet.float().requires_grad_(True)
    if load_from:
        logger.info("training starts from %s", load_weights(pipe.unet, load_from, adapters=use_lora))
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if train.compile:
        pipe.unet.compile_repeated_blocks()
    elif device.type == "cpu" and torch.get_num_threads() > 1 and not sharding_requested():
        run_batch_on_all_cores(pipe.unet, torch.get_num_threads())
    return pipe


TRIED_PROMPTS = 32  # of a function without a list of its prompts; the reward is tried on them before training


class Objective(NamedTuple):
    """Attributes:
    prompt_fn: draws a prompt and its metadata.
    prompts: all that it can draw, or None where that is not known.
    reward_fn: scores images of them.
    held_out: the evaluation at fixed noise, or None if it is off.
    """

    prompt_fn: Callable[..., Prompt]
    prompts: list[Prompt] | None
    reward_fn: RewardFn
    held_out: HeldOut | None


def make_objective(
    prompt_fn: str,
    prompt_fn_kwargs: ConfigDict,
    reward_fn: str,
    reward_fn_kwargs: ConfigDict,
    held_out: ConfigDict,
    sample: ConfigDict,
    seed: int,
    device: torch.device,
) -> Objective:
    """The objective that these settings name, of which each part has been tried on the prompts.

    Raises UserError for what does not exist, does not fit, or cannot be judged.
    """
    draw = get_prompt_fn(prompt_fn, **prompt_fn_kwargs)
    reward = build_reward(reward_fn, reward_fn_kwargs.to_dict(), device)
    sampled = dict(zip(*draw_prompts(draw, seed, 0, TRIED_PROMPTS), strict=True))
    prompts = all_prompts(prompt_fn, **prompt_fn_kwargs) if prompt_fn in PROMPT_LISTS else None
    check_prompts(reward, list(sampled.items()) if prompts is None else prompts)
    if not held_out.every:
        return Objective(draw, prompts, reward, None)
    judged = all_prompts(prompt_fn, **prompt_fn_kwargs)
    rewarding = [reward_fn_kwargs.get(name, {}).get("classifier") for name in parse_spec(reward_fn)]
    judge = load_judge(held_out.classifier, filter(None, rewarding), device)
    evaluation = HeldOut(judge, judged, held_out.images_per_prompt, seed, Sampling.of(sample))
    return Objective(draw, prompts, reward, evaluation)

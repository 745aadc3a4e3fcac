"""Setup of train.py: checked settings, batch sizes, the task (prompts and reward) and the policy."""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.cpu_kernels import fuse_lora, run_batch_on_all_cores
from ddpo_pytorch.generator.lora import adapter_fingerprint, add_lora, cast_adapters
from ddpo_pytorch.generator.pipeline import load_pipeline, set_schedule
from ddpo_pytorch.prompts import PROMPT_LISTS, Prompt, all_prompts, get_prompt_fn
from ddpo_pytorch.rewards import Reward, build_reward, check_prompts, parse_spec
from ddpo_pytorch.rollout import draw_prompts
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.training.held_out import HeldOut, load_judge
from ddpo_pytorch.training.run_folder import parse_trackers
from ddpo_pytorch.utils import settings as allowed
from ddpo_pytorch.utils.distributed import sharding_requested
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints, with_contents
from ddpo_pytorch.utils.settings import Range, check_choices, check_pair, check_ranges

logger = logging.getLogger(__name__)
RANGES = {  # outside of which training fails, or runs and learns nothing
    allowed.ONE_OR_MORE: (
        *("num_epochs", "save_freq", "num_checkpoint_limit", "train.max_skipped_updates", "train.lora_rank"),
        *("sample.batch_size", "sample.num_batches_per_epoch", "sample.images_per_prompt", "sample.num_steps"),
        *("train.batch_size", "train.gradient_accumulation_steps", "train.num_inner_epochs"),
        "train.timesteps_per_forward",
    ),
    allowed.UP_TO_A_MILLION: ("held_out.images_per_prompt",),
    allowed.ZERO_OR_MORE: ("early_stop.patience", "held_out.every", "held_out.patience"),
    allowed.POSITIVE: ("train.learning_rate", "train.adam_epsilon", "train.adv_clip_max", "train.clip_range"),
    allowed.NOT_NEGATIVE: ("train.adam_weight_decay", "train.kl_coef", "early_stop.tolerance"),
    allowed.BELOW_ONE: ("train.adam_beta1", "train.adam_beta2", "held_out.tolerance"),
    allowed.FINITE: ("sample.guidance_scale",),
    Range("(0, 1]"): ("train.timestep_fraction",),
    Range("(0, inf]"): ("train.max_grad_norm",),  # inf: gradients are not clipped
    allowed.SEED: ("seed",),
}
TRAINING = {name: interval for interval, names in RANGES.items() for name in names}
# (setting, value that FSDP does not support, one that it does)
WITHOUT_FSDP = (("use_lora", True, False), ("train.use_8bit_adam", True, False), ("mixed_precision", "fp16", "bf16"))
COMPILED_VARIANTS = 64  # of a block, by width, batch size and need of gradients; beyond, it runs uncompiled
TRIED_PROMPTS = 32  # prompts to try the reward on, if not all are known


def check_training(config: ConfigDict) -> None:
    """Raise UserError for settings of train.py that are out of range or contradict each other."""
    check_ranges(config, TRAINING)
    # other schedulers of eval.py have no log-probabilities
    check_choices(config, {"train.advantage": ("per_prompt", "group", "global"), "sample.scheduler": ("ddim",)})
    parse_trackers(config.log_with)
    sample, train, held_out = config.sample, config.train, config.held_out
    problems = [
        (sample.guidance_scale > 1 and not train.cfg, f"train.cfg is False at guidance_scale {sample.guidance_scale}"),
        # the base model of the KL divergence is the UNet with its adapters off
        (train.kl_coef and not config.use_lora, f"train.kl_coef is {train.kl_coef} but use_lora is False"),
        (held_out.patience and not held_out.every, f"held_out.patience is {held_out.patience} but held_out.every is 0"),
    ]
    if (tracking := config.per_prompt_stat_tracking) is not None:
        two, name = Range("[2, inf)", whole=True), "per_prompt_stat_tracking."  # one reward has standard deviation 0
        check_ranges(tracking, {"buffer_size": two, "min_count": two}, name)
        high, most = tracking.min_count, tracking.buffer_size
        problems.append((high > most, f"{name}min_count is {high} but buffer_size is {most}, so it is never reached"))
    for name, bad, use in WITHOUT_FSDP if sharding_requested() else ():
        problems.append((config[name] == bad, f"{name} is {bad!r} under FSDP, which needs {use}"))
    if found := [problem for wrong, problem in problems if wrong]:
        raise UserError(f"{found[0]}: change one of the two")


@dataclass(frozen=True)
class BatchSizes:
    """Counts of samples, updates and timesteps in an epoch; `local_samples` is per process."""

    processes: int
    local_samples: int
    updates: int
    timestep_window: tuple[int, int]
    train_timesteps: int
    forwards: int  # UNet forward passes per train batch

    @property
    def samples(self) -> int:
        return self.local_samples * self.processes

    def describe(self) -> str:
        samples = f"{self.samples} samples per epoch ({self.local_samples} on each of {self.processes} processes)"
        per_update = f"{self.samples // self.updates} samples x {self.train_timesteps} timesteps"
        return f"{samples}, {self.updates} updates of {per_update}"


def batch_sizes(sample: ConfigDict, train: ConfigDict, processes: int) -> BatchSizes:
    """Derive the counts from settings that passed `check_training`. Raises UserError if they do not divide evenly."""
    local = sample.batch_size * sample.num_batches_per_epoch
    per_update = train.batch_size * train.gradient_accumulation_steps
    low, high = check_pair("train.timestep_window", train.timestep_window, allowed.SHARE)
    # rounded, since 0.28 * 50 is 14.000000000000002
    first, last = math.floor(round(low * sample.num_steps, 9)), math.ceil(round(high * sample.num_steps, 9))
    timesteps = int(round((last - first) * train.timestep_fraction, 9))
    if timesteps < 1:
        share = f"train.timestep_fraction={train.timestep_fraction}"
        raise UserError(f"{share} of {last - first} timesteps is less than one; raise it")
    if local % per_update:
        samples = f"sample.batch_size x sample.num_batches_per_epoch = {local} samples per process"
        update = f"train.batch_size x train.gradient_accumulation_steps = {per_update}"
        raise UserError(f"{samples} do not divide into updates of {update}; make it a multiple")
    if local % (images := sample.images_per_prompt):
        problem = f"sample.images_per_prompt={images} does not divide the {local} samples per process"
        raise UserError(f"{problem}; give a divisor, or change sample.num_batches_per_epoch")
    if timesteps % (forward := train.timesteps_per_forward):
        problem = f"train.timesteps_per_forward={forward} does not divide the {timesteps} trained timesteps of a sample"
        raise UserError(f"{problem}; give a divisor, or change train.timestep_fraction")
    return BatchSizes(processes, local, local // per_update, (first, last), timesteps, timesteps // forward)


def in_half_on_gpu(config: ConfigDict, device: torch.device) -> bool:
    """Return whether the UNet runs in half precision on a GPU."""
    return device.type == "cuda" and config.mixed_precision != "no"


def rollout_batch_size(config: ConfigDict, device: torch.device) -> int:
    """Return the rollout's batch size: sample.batch_size, or that of the update in half precision on a GPU.

    There, other shapes select other kernels, whose rounding alone changes log-probs: in bfloat16 by up to 4.7e-4, far
    beyond the clip range of 1e-4.
    """
    if in_half_on_gpu(config, device):
        return config.train.batch_size * config.train.timesteps_per_forward
    return config.sample.batch_size


def rollout_needs_grad_mode(config: ConfigDict, device: torch.device) -> bool:
    """Return whether the rollout needs gradients enabled: without, compiled half-precision passes round differently."""
    return config.train.compile and in_half_on_gpu(config, device)


@dataclass(frozen=True)
class Task:
    """Prompts to draw and the reward to earn."""

    prompt_fn: Callable[..., Prompt]
    prompts: list[Prompt] | None  # all that prompt_fn can return, or None if unknown
    reward_fn: Reward
    held_out: HeldOut | None  # None if it is off


def make_task(config: ConfigDict, device: torch.device) -> Task:
    """Build the configured task. Raises UserError for an invalid part."""
    held_out, prompts, evaluation = config.held_out, None, None
    prompt_fn = get_prompt_fn(config.prompt_fn, **config.prompt_fn_kwargs)
    reward_fn = build_reward(config.reward_fn, config.reward_fn_kwargs.to_dict(), device)
    if config.prompt_fn in PROMPT_LISTS or held_out.every:
        prompts = all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)
    drawn = _first_prompts(config, prompt_fn)
    listed = dict(prompts or drawn)
    if missing := [prompt for prompt, _ in drawn if prompt not in listed]:
        problem = f"returned {missing[0]!r}, which its list in PROMPT_LISTS lacks"
        raise UserError(f"prompt function {config.prompt_fn!r} {problem}; add it there")
    if held_out.every:
        part = parse_spec(config.reward_fn).get("isic_classifier_reward")
        registered = part is not None and not part.path  # a reward of the user's may have a classifier of any kind
        rewarding = [config.reward_fn_kwargs.isic_classifier_reward.classifier] if registered else []
        judge = load_judge(held_out.classifier, rewarding, device)
        evaluation = HeldOut(judge, prompts, held_out.images_per_prompt, config.seed, Sampling.of(config.sample))
    return Task(prompt_fn, prompts, reward_fn, evaluation)


def _first_prompts(config: ConfigDict, prompt_fn: Callable[..., Prompt]) -> list[Prompt]:
    return list(dict(zip(*draw_prompts(prompt_fn, config.seed, 0, TRIED_PROMPTS), strict=True)).items())


def try_reward(config: ConfigDict, task: Task, device: torch.device, size: tuple[int, int]) -> None:
    """Try the reward on the task's prompts, with batches and image sizes of the rollout. Raises as `check_prompts`."""
    prompts = _first_prompts(config, task.prompt_fn) if task.prompts is None else task.prompts
    check_prompts(task.reward_fn, prompts, device, rollout_batch_size(config, device), size)


def load_policy(config: ConfigDict, dtype: torch.dtype, device: torch.device) -> StableDiffusionPipeline:
    """Load the pipeline, frozen in `dtype`, with a trainable policy in float32: LoRA adapters or the whole UNet.

    Raises UserError for files that do not fit, and for a schedule that cannot be trained.
    """
    pretrained, train = config.pretrained, config.train
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    set_schedule(pipe, config.sample.num_steps)
    check_schedule(pipe.scheduler, config.sample.eta)
    # fastest for convolutions, but FSDP shards contiguous weights only
    for part in (pipe.vae,) if sharding_requested() else (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    if config.use_lora:
        add_lora(pipe.unet, train.lora_rank, train.lora_targets, config.seed)
        if in_half_on_gpu(config, device):
            cast_adapters(pipe.unet)
        elif device.type == "cpu" or not config.allow_tf32:  # TF32 would round W + up down back to W
            fuse_lora(pipe.unet)
    else:
        pipe.unet.float().requires_grad_(True)
    if config.load_from:
        logger.info("training starts from %s", load_weights(pipe.unet, config.load_from, adapters=config.use_lora))
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if train.compile:
        torch._dynamo.config.cache_size_limit = COMPILED_VARIANTS
        pipe.unet.compile_repeated_blocks()
    elif device.type == "cpu" and torch.get_num_threads() > 1 and not sharding_requested():
        run_batch_on_all_cores(pipe.unet, torch.get_num_threads())
    return pipe


def content_fingerprints(config: ConfigDict, pipe: StableDiffusionPipeline, task: Task) -> dict[str, str]:
    """Return fingerprints behind the settings: base model, adapter to start from, rewards, prompts, functions' code."""
    contents = pipeline_fingerprints(pipe)
    contents["load_from"] = config.load_from and (adapter_fingerprint(pipe.unet) or contents["model.unet"])
    kwargs, functions = config.reward_fn_kwargs.to_dict(), {"prompts": config.prompt_fn}
    for name, part in parse_spec(config.reward_fn).items():
        contents[f"reward.{name}"] = fingerprint(with_contents(kwargs.get(name, {})))
        functions[f"reward.{name}"] = part.path
    contents["prompts"] = fingerprint(task.prompts or with_contents(config.prompt_fn_kwargs.to_dict()))
    for name, path in functions.items():
        module = sys.modules.get(path.rpartition(":")[0])  # of "module:function"; none for a function in a registry
        if (file := getattr(module, "__file__", None)) and Path(file).is_file():
            contents[f"{name}.code"] = fingerprint(Path(file))
    return contents

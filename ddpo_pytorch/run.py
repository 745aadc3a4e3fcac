"""What scripts need around their algorithm: accelerator, batch geometry, run folder, logs."""

import json
import logging
import math
import netrc
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from ml_collections import ConfigDict

from ddpo_pytorch.checkpointing import checkpoints, epochs_completed, find_checkpoint
from ddpo_pytorch.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(
    mixed_precision: str, allow_tf32: bool = True, gradient_accumulation_steps: int = 1
) -> Accelerator:
    """An Accelerator for "no", "bf16" or "fp16" (the last on a GPU only). Raises UserError for anything else."""
    if mixed_precision not in DTYPES:
        raise UserError(f"mixed_precision is {mixed_precision!r}; allowed are {', '.join(DTYPES)}")
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if on_cpu and mixed_precision == "fp16":
        raise UserError("mixed_precision is 'fp16', which needs a GPU; on a CPU give mixed_precision=no or bf16")
    if on_cpu:
        # launchers set one thread a process; share the cores instead.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    return Accelerator(
        cpu=on_cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=gradient_accumulation_steps
    )


class JsonLines:
    """An append-only file of one JSON object a line; silent on every process but the main one.

    Of an existing file, entries whose `counter` is below `keep` stay: a resumed run repeats those after its checkpoint.
    """

    def __init__(self, path: str | Path, active: bool = True, keep: int | None = None, counter: str = "epoch"):
        self.path, self.active = Path(path), active
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if keep is not None and self.path.is_file():
                lines = self.path.read_text().splitlines(keepends=True)
                # the last line of a killed run may be torn
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)[counter] < keep]
                self.path.write_text("".join(kept))

    def write(self, entry: dict) -> None:
        if self.active:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


@dataclass(frozen=True)
class Geometry:
    """How samples, processes and optimizer updates of an epoch fit together; only local_samples is per process."""

    processes: int
    local_samples: int
    updates: int
    timestep_window: tuple[int, int]
    train_timesteps: int

    @property
    def samples(self) -> int:
        return self.local_samples * self.processes

    def describe(self) -> str:
        per_update = self.samples // self.updates
        return (
            f"{self.samples} samples an epoch ({self.local_samples} on each of {self.processes} processes), "
            f"{self.updates} updates of {per_update} samples x {self.train_timesteps} timesteps"
        )


def batch_geometry(sample: ConfigDict, train: ConfigDict, processes: int) -> Geometry:
    """Check that all batch sizes divide and return the counts. Raises UserError with both numbers where they do not."""
    local = sample.batch_size * sample.num_batches_per_epoch
    per_update = train.batch_size * train.gradient_accumulation_steps
    if min(local, per_update, train.num_inner_epochs, sample.images_per_prompt, sample.num_steps) < 1:
        raise UserError(
            "batch sizes, batch counts, num_inner_epochs, images_per_prompt and num_steps must be 1 or more"
        )
    if local % per_update:
        raise UserError(
            f"sample.batch_size x sample.num_batches_per_epoch = {local} samples a process do not divide into "
            f"updates of train.batch_size x train.gradient_accumulation_steps = {per_update}; make it a multiple"
        )
    if local % sample.images_per_prompt:
        raise UserError(
            f"sample.images_per_prompt={sample.images_per_prompt} does not divide the {local} samples of a process"
        )
    low, high = train.timestep_window
    if not 0 <= low < high <= 1 or not 0 < train.timestep_fraction <= 1:
        raise UserError(
            f"train.timestep_window={(low, high)} must satisfy 0 <= start < end <= 1 and "
            f"train.timestep_fraction={train.timestep_fraction} must lie in (0, 1]"
        )
    first, last = math.floor(low * sample.num_steps), math.ceil(high * sample.num_steps)
    timesteps = int((last - first) * train.timestep_fraction)
    if timesteps < 1:
        raise UserError(
            f"train.timestep_fraction={train.timestep_fraction} of {last - first} timesteps is less than one; raise it"
        )
    return Geometry(processes, local, local // per_update, (first, last), timesteps)


def check_training(config: ConfigDict) -> None:
    """Refuse settings of train.py that would train something other than what was asked for (UserError)."""
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
    if config.train.advantage not in ("per_prompt", "group", "global"):
        raise UserError(f"train.advantage is {config.train.advantage!r}; allowed are per_prompt, group and global")
    if config.wandb not in ("auto", "disabled"):
        raise UserError(f"wandb is {config.wandb!r}; allowed are 'auto' and 'disabled'")
    for name, least in (
        ("seed", 0),
        ("num_epochs", 1),
        ("save_freq", 1),
        ("num_checkpoint_limit", 1),
        ("per_prompt_stat_tracking.buffer_size", 1),
        ("per_prompt_stat_tracking.min_count", 1),
        ("early_stop.patience", 0),
        ("early_stop.tolerance", 0),
        ("held_out.every", 0),
        ("held_out.images_per_prompt", 1),
        ("held_out.patience", 0),
        ("held_out.tolerance", 0),
    ):
        if not config[name] >= least:  # NaN is refused as well
            raise UserError(f"{name} is {config[name]}; it must be {least} or more")
    if config.held_out.patience and not config.held_out.every:
        raise UserError(
            f"held_out.patience is {config.held_out.patience} but held_out.every is 0: nothing is evaluated; set "
            "held_out.every, or held_out.patience=0"
        )
    for name in ("learning_rate", "clip_range", "adv_clip_max", "max_grad_norm"):
        if not config.train[name] > 0:
            raise UserError(f"train.{name} is {config.train[name]}; it must be above 0")


def open_run(accelerator: Accelerator, logdir: str, run_name: str, resume_from: str) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to continue from, agreed between processes.

    A new run gets a new folder `<logdir>/<run_name>` (date and time without a name); an existing one is an error.
    Resuming goes on in the folder of the checkpoint and must start from the newest there, so nothing is overwritten; a
    `run_name` beside it, which experiments of config/dgx.py have, is not used.
    """
    if resume_from:
        checkpoint = find_checkpoint(resume_from)
        newest = (checkpoints(checkpoint.parent) or [checkpoint])[-1]
        if epochs_completed(newest) > epochs_completed(checkpoint):
            raise UserError(
                f"{str(checkpoint)!r} is not the newest checkpoint of its run; continuing would overwrite "
                f"{newest.name}: resume from that, or copy the checkpoint into a folder of its own"
            )
        if run_name and Path(run_name).name != checkpoint.resolve().parent.name:
            logger.info("run_name %r is not used: resume_from continues a run in its own folder", run_name)
        return checkpoint.parent, checkpoint
    name = broadcast_object_list([run_name or time.strftime("%Y.%m.%d_%H.%M.%S")])[0]
    run_dir = Path(logdir) / name
    if run_dir.exists():
        raise UserError(
            f"run folder {str(run_dir)!r} exists already; choose another --config.run_name, continue it with "
            f"--config.resume_from={run_dir} if it holds a checkpoint, or move it away"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True)
    return run_dir, None


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None) -> Any:
    """A Weights & Biases run, or None when `mode` is "disabled". Without a key it records offline and never asks."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    import wandb  # here, so that training also runs where it is not installed

    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    return wandb.init(
        project=project,
        name=run_dir.name,
        dir=str(run_dir),
        config=config,
        id=run_id,
        resume="allow" if run_id else None,
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def peak_memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

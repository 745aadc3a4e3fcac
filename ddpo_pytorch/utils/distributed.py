"""Multiple processes: the accelerator, work on the main process only, stop signals, and FSDP.

`accelerate launch --config_file config/accelerate/fsdp.yaml` shards gradients and optimizer state (ZeRO-2, Rajbhandari
et al. 2020): PyTorch's `fully_shard` splits every tensor of the UNet along its first dimension, on GPUs and CPUs. Files
hold full tensors, so any number of processes can resume a checkpoint, with or without FSDP. Passes of a sharded UNet,
forward and backward, are collective: every process must run equally many.
"""

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate import utils as accelerate_utils
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ddpo_pytorch.utils.cores import available_cores, thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked
from ddpo_pytorch.utils.settings import Range, check_choices, check_ranges

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROCESS_TIMEOUT = 24 * 3600.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
UNSUPPORTED = [f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")]
logger = logging.getLogger(__name__)


def make_accelerator(
    mixed_precision: str,
    allow_tf32: bool = True,
    gradient_accumulation_steps: int = 1,
    may_shard: bool = False,
    process_timeout: float = PROCESS_TIMEOUT,
    growth_interval: int = 2000,
) -> Accelerator:
    """Return an Accelerator that follows these settings, not those of the launcher or of ACCELERATE_* variables.

    On a CPU the processes of a machine share its cores, within the user's limit on threads (see `thread_limit`). Under
    FSDP, `prepare` shards a UNet and its optimizer: weights and accumulated gradients are float32, "bf16" is the dtype
    of forward and backward passes.

    `may_shard`: the caller supports FSDP. `process_timeout`: seconds that a process waits for the others.
    `growth_interval`: steps after which the gradient scaler of fp16 doubles its scale. Raises UserError for invalid
    values, and for features of the launcher that the scripts do not support.
    """
    if (sharding := sharding_requested()) and not may_shard:
        raise UserError("the launcher requests FSDP, which only train.py supports; use another config file")
    if requested := [variable for variable in UNSUPPORTED if _flag(variable)]:
        raise UserError(f"the launcher sets {requested[0]}, which is not supported; launch without it")
    used = {"MIXED_PRECISION": mixed_precision, "GRADIENT_ACCUMULATION_STEPS": str(gradient_accumulation_steps)}
    for name, value in (used | {"DYNAMO_BACKEND": "no"}).items():
        requested = os.environ.get(f"ACCELERATE_{name}", "").lower()
        if requested not in ("", "no", "1", value):  # "no" and "1" are the launchers' defaults
            logger.info("ACCELERATE_%s=%s of the launcher has no effect: the configuration decides", name, requested)
    settings = {"mixed_precision": mixed_precision, "process_timeout": process_timeout}
    check_choices(settings, {"mixed_precision": tuple(DTYPES)})
    check_ranges(settings, {"process_timeout": Range("(0, 31536000]")})  # seconds, up to a year
    on_cpu = _flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu and mixed_precision == "fp16":
        raise UserError("mixed_precision is 'fp16', which needs a GPU; on a CPU use no or bf16")
    if on_cpu and mixed_precision == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning("mixed_precision bf16 is many times slower than 'no' on a CPU without AVX-512")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    plugin = accelerate_utils.FullyShardedDataParallelPlugin() if sharding else None
    if sharding and plugin.fsdp_version != 2:
        raise UserError(f"the FSDP version is {plugin.fsdp_version}; set fsdp_version: 2 in the launcher's file")
    if sharding and mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # a plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides a plain number. FSDP shards gradients after each
    # backward pass: unsharded ones, Accelerate's default, would take as much memory as the weights
    accumulation = accelerate_utils.GradientAccumulationPlugin(gradient_accumulation_steps, sync_each_batch=sharding)
    waiting = accelerate_utils.InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))
    scaling = accelerate_utils.GradScalerKwargs(growth_interval=growth_interval)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed_precision,
            fsdp_plugin=plugin,
            gradient_accumulation_plugin=accumulation,
            dynamo_backend="no",
            kwargs_handlers=[waiting, scaling],
        )
    except ValueError as error:  # a WORLD_SIZE that another launch left behind
        problem = f"the launcher's environment variables do not fit together ({error})"
        raise UserError(f"{problem}; start with accelerate launch, or unset WORLD_SIZE, RANK and LOCAL_RANK") from error
    if sharding and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate ignores the plugin without a GPU; PyTorch's FSDP works with gloo
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if on_cpu:  # after Accelerate, which may have set another number
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, min(share, thread_limit())))
    place = f"CPU, threads {torch.get_num_threads()}" if on_cpu else torch.cuda.get_device_name(accelerator.device)
    logger.info("processes %d, each on %s, mixed_precision %s", accelerator.num_processes, place, mixed_precision)
    return accelerator


def sharding_requested() -> bool:
    """Return whether the launcher requests FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _flag(variable: str) -> bool:
    """Return whether an environment variable is on, parsed as Accelerate does. Raises UserError."""
    try:
        return parse_flag_from_env(variable)
    except ValueError as error:
        raise UserError(f"{variable} is {os.environ[variable]!r}; set it to true or false") from error


def run_on_main_process(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function(*arguments)` on the main process while the others wait; return its result on every process.

    If it raises UserError or OSError, the main process raises it and the others exit with code 2, silently.
    """
    result = [None, False]  # the value, and whether the function failed
    if accelerator.is_main_process:
        try:
            result = [function(*arguments), False]
        except (UserError, OSError):
            accelerate_utils.broadcast_object_list([None, True])
            raise
    value, failed = accelerate_utils.broadcast_object_list(result)
    if failed:
        sys.exit(2)  # the main process reports the reason
    return value


@contextmanager
def locked_by_main(accelerator: Accelerator, folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """Lock a folder on the main process (`files.locked`). Call on every process; all exit if another run holds it."""
    with ExitStack() as held:
        run_on_main_process(accelerator, held.enter_context, locked(folder, instead))
        yield


class StopRequested(Exception):
    """Raised on every process after one of them received a stop signal."""


class StopRequest:
    """A context in which SIGTERM and SIGUSR1 are recorded instead of ending the process."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.name = ""  # of the signal received; "" if none yet

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name
        logger.warning("%s: stopping after the current batch of samples or the epoch's updates", self.name)

    def check(self) -> None:
        """Raise StopRequested on every process if one of them received a signal. Collective."""
        stop = bool(self.name)
        if self._accelerator.num_processes > 1:  # a single process need not wait for its GPU
            stop = self._accelerator.reduce(torch.tensor(float(stop), device=self._accelerator.device), "sum").item()
        if stop:
            raise StopRequested


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to a device; from the CPU to a GPU, without waiting for work queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory_gib() -> float:
    """Return the peak memory of this process so far, on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor on every process. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(owner: nn.Module | torch.optim.Optimizer, main: bool) -> dict[str, Any] | None:
    """Return the full state dict of a UNet or optimizer on the CPU if `main`, else None. Collective."""
    # torch.distributed.checkpoint.state_dict would not do: it steps an optimizer without state before saving it, and it
    # keeps the saved memory order of moments, which fused optimizers then mix up with the parameter's

    def gather(tensor: torch.Tensor) -> torch.Tensor | None:
        full = full_tensor(tensor)  # one at a time, to save memory
        return full.detach().cpu() if main else None

    state = accelerate_utils.recursively_apply(gather, owner.state_dict())
    return state if main else None


def load_weights_into(unet: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a full state dict; a sharded UNet takes this process's shards. Not collective."""
    local = unet.state_dict()
    unet.load_state_dict({key: _part(value, local.get(key)) for key, value in weights.items()})


def load_optimizer_into(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a full state dict into an optimizer, sharded or not. Raises ValueError if it is of other parameters."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))  # load_state_dict checks that their numbers agree
    parts = {
        number: {key: _part(value, by_number.get(number)) for key, value in memory.items()}
        for number, memory in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _part(value: Any, like: torch.Tensor | None) -> Any:
    """Return a tensor sharded and laid out in memory as `like`; anything else, or of another shape, unchanged."""
    if not isinstance(value, torch.Tensor) or like is None or value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        value = value.to(like.device, memory_format=torch.contiguous_format)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    # fused optimizers walk through memory, so the order (channels_last or not) must be the parameter's
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)

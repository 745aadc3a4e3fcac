"""Full fine-tunes whose gradients and optimizer state are divided among processes (ZeRO-2, Rajbhandari et al. 2020).

`accelerate launch --config_file config/accelerate/fsdp.yaml` asks for it through the environment. Accelerate then
divides every tensor of the UNet by its first dimension (PyTorch's `fully_shard`), on GPUs and, with gloo, on CPUs. The
functions below are all that the rest of the project needs to know: what is written to a file is whole, whoever wrote
it, so a checkpoint can be resumed by any number of processes, divided or not.

A forward or backward pass of a divided UNet is a collective: every process must make equally many.
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
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
)
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ddpo_pytorch.utils.cores import available_cores, thread_limit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked


def sharding_asked() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_sharding(use_lora: bool, use_8bit_adam: bool, mixed_precision: str) -> None:
    """Raise UserError for settings of train.py that cannot be combined with FSDP."""
    if use_lora:
        raise UserError(
            "use_lora is True under FSDP, which has little to divide then; set use_lora=False, or launch with another "
            "file of config/accelerate"
        )
    if use_8bit_adam:
        raise UserError("train.use_8bit_adam is True, and bitsandbytes cannot divide its states; set it to False")
    if mixed_precision == "fp16":
        raise UserError("mixed_precision is 'fp16', which FSDP lacks here; set mixed_precision=bf16 or no")


def sharding_accelerator(cpu: bool, mixed_precision: str, *handlers: KwargsHandler) -> Accelerator:
    """An Accelerator whose `prepare` divides a UNet and its optimizer as the launcher's FSDP settings say.

    Weights are kept in float32 and gradients are added up in it; "bf16" is the type that forward and backward passes
    compute in. Gradients are divided after each backward pass: to keep them whole while they accumulate, as is
    Accelerate's habit, would cost as much memory as the weights.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(f"FSDP is of version {plugin.fsdp_version}; set fsdp_version: 2 in the launcher's file")
    if mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_each_batch=True),
        dynamo_backend="no",
        kwargs_handlers=list(handlers),
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes FSDP to be for GPUs and leaves the plugin aside, but PyTorch's works with gloo just as well
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is without division, on every process. Collective where it is divided."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(unet: nn.Module, main: bool) -> dict[str, torch.Tensor] | None:
    """The state dict on the CPU, whole, for the process that is `main`; None for the others.

    Where the UNet is divided this is a collective: every process must call it.
    """
    return _gather(unet.state_dict(), main)


def gather_optimizer(optimizer: torch.optim.Optimizer, main: bool) -> dict[str, Any] | None:
    """The same for an optimizer: its state dict as it would be without division."""
    return _gather(optimizer.state_dict(), main)


def load_weights_into(unet: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """`unet.load_state_dict` of a whole state dict, of which a divided UNet takes this process's part.

    No collective: every process reads the file, and tensors go to the device one by one.
    """
    own = unet.state_dict()
    unet.load_state_dict({key: _part(value, own[key]) if key in own else value for key, value in weights.items()})


def load_optimizer_into(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The same for an optimizer. Raises ValueError, as PyTorch does, if the state is of other parameters."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(zip(names, own, strict=False))  # that their numbers agree is checked by load_state_dict
    parts = {name: _like_parameter(entry, like.get(name)) for name, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _gather(value: Any, main: bool) -> Any:
    if isinstance(value, dict):
        gathered = {key: _gather(item, main) for key, item in value.items()}
        return gathered if main else None
    if isinstance(value, list | tuple):
        return type(value)([_gather(item, main) for item in value])
    if isinstance(value, torch.Tensor):
        value = full_tensor(value)  # one at a time, so that no more than that has to fit beside the divided ones
        return value.detach().cpu() if main else None
    return value


def _like_parameter(entry: dict[str, Any], parameter: torch.Tensor | None) -> dict[str, Any]:
    """Of an optimizer's memory of a parameter, what has that parameter's shape is divided and laid out as it is."""
    shape = None if parameter is None else parameter.shape
    return {
        key: _part(value, parameter) if isinstance(value, torch.Tensor) and value.shape == shape else value
        for key, value in entry.items()
    }


def _part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.shape != like.shape:  # load_state_dict says what is wrong
        return value
    if isinstance(like, DTensor):
        value = value.to(like.device, memory_format=torch.contiguous_format)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    # fused optimizers go through memory, so a tensor in another order (channels_last or not) would be mixed up
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def run_on_main_process(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns on the main process, on every process; where it fails there, all of them end.

    The others wait meanwhile. The main process raises what `function` raised (UserError or OSError), the others exit
    with code 2 and say nothing.
    """
    value, failure = None, None
    if accelerator.is_main_process:
        try:
            value = function(*arguments)
        except (UserError, OSError) as error:
            failure = error
    value, failed = broadcast_object_list([value, failure is not None])
    if failure is not None:
        raise failure
    if failed:
        sys.exit(2)  # the main process says why
    return value


@contextmanager
def locked_by_main(accelerator: Accelerator, folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """Keep a folder for this command, whose main process locks it (`files.locked`); every process calls this.

    Where another command has the folder, all of them end, as in `run_on_main_process`.
    """
    with ExitStack() as held:
        run_on_main_process(accelerator, held.enter_context, locked(folder, instead))
        yield


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the signals are noted, instead of ending the process."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.name = ""  # of the signal that this process got, or "" if none yet

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name
        logger.warning("%s: stopping at the next batch of samples, or after the update that is under way", self.name)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. A collective: every process calls it at the same places."""
        flag = torch.tensor(float(bool(self.name)), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum").item())


PROCESS_TIMEOUT = 24 * 3600.0


LONGEST_TIMEOUT = 365 * 24 * 3600


UNKNOWN_TO_SCRIPTS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def peak_memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

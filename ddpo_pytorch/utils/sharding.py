"""Full fine-tunes whose gradients and optimizer state are divided among processes (ZeRO-2, Rajbhandari et al. 2020).

`accelerate launch --config_file config/accelerate/fsdp.yaml` asks for it through the environment. Accelerate then
divides every tensor of the UNet by its first dimension (PyTorch's `fully_shard`), on GPUs and, with gloo, on CPUs. The
functions below are all that the rest of the project needs to know: what is written to a file is whole, whoever wrote
it, so a checkpoint can be resumed by any number of processes, divided or not.

A forward or backward pass of a divided UNet is a collective: every process must make equally many.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin, KwargsHandler
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ddpo_pytorch.utils.errors import UserError


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


def whole(tensor: torch.Tensor) -> torch.Tensor:
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
        value = whole(value)  # one at a time, so that no more than that has to fit beside the divided ones
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

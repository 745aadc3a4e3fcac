"""Gradients of adapters for each row of a batch by itself, from one backward pass over all of it.

An adapter weight W takes part in a row i as y_i = W x_i, so that its gradient is the sum of g_i^T x_i over rows, with
g_i the gradient of y_i. The sum is what autograd keeps; here the terms are kept (Goodfellow 2015).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F

from ddpo_pytorch.generator.cpu_kernels import LinearWithLora, fusible, is_fused
from ddpo_pytorch.generator.threads import first_row

Gradients = dict[nn.Parameter, torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]


def has_row_gradients(unet: nn.Module) -> bool:
    """Whether adapters of linear layers are all that is trained."""
    layers = [module for module in unet.modules() if isinstance(module, lora.Linear)]
    adapters = {weight for layer in layers for narrow in (layer.lora_A, layer.lora_B) for weight in narrow.parameters()}
    return bool(adapters) and {weight for weight in unet.parameters() if weight.requires_grad} == adapters


@contextmanager
def row_gradients(unet: nn.Module, rows: int, adapter: str = "default") -> Iterator[Gradients]:
    """Within it, backward passes through `unet` on batches of `rows` rows add to what is yielded, and to nothing else.

    That is {weight: (rows, *weight.shape)}, float32 or wider, at first 0. A backward pass has to be
    `torch.autograd.grad` with the adapters' weights as inputs, its results are of no use.
    """
    found: Gradients = {}
    with ExitStack() as stack:

        def replace(module: nn.Module, forward: Callable, *arguments: Any) -> None:
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = partial(forward, module, module.forward, found, *arguments)

        for layer in (module for module in unet.modules() if isinstance(module, lora.Linear)):
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            found[down.weight] = down.weight.new_zeros(rows, *down.weight.shape)
            found[up.weight] = up.weight.new_zeros(rows, *up.weight.T.shape).mT  # in the order of memory it is added to
            replace(down, _narrow)
            replace(up, _narrow)
            if is_fused(layer):
                replace(layer, _fused, down.weight, up.weight)
        yield found


def _narrow(linear: nn.Linear, plain: Forward, found: Gradients, x: torch.Tensor) -> torch.Tensor:
    """`down` or `up` alone."""
    if not torch.is_grad_enabled():
        return plain(x)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _LinearWithKept.apply(x, linear.weight, dtype, found, first_row())


def _fused(
    layer: lora.Linear, plain: Forward, found: Gradients, down: nn.Parameter, up: nn.Parameter, x: torch.Tensor
) -> torch.Tensor:
    """A layer with both of them fused into its weight."""
    if not torch.is_grad_enabled() or not fusible(layer, x):
        return plain(x)
    base = layer.base_layer
    return _FusedWithKept.apply(x, base.weight, base.bias, down, up, found, first_row())


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """(rows, positions, features)."""
    return x.reshape(len(x), -1, x.shape[-1])


class _LinearWithKept(torch.autograd.Function):
    """y = W x in `dtype`, as autocast has it; backward keeps the gradients of W."""

    @staticmethod
    def forward(ctx, x, weight, dtype, found, first):
        ctx.weight, ctx.found, ctx.first, ctx.dtype = weight, found, first, x.dtype
        x, cast = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast)
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx, grad):
        x, cast = ctx.saved_tensors
        kept = ctx.found[ctx.weight][ctx.first : ctx.first + len(x)]
        kept.baddbmm_(_by_row(grad).mT.to(kept.dtype), _by_row(x).to(kept.dtype))
        return (grad @ cast).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None


class _FusedWithKept(LinearWithLora):
    """The fused layer; backward keeps the gradients of its adapter."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, found, first):
        ctx.weights, ctx.found, ctx.first = (down, up), found, first
        return LinearWithLora.forward(ctx, x, weight, bias, down, up)

    @staticmethod
    def backward(ctx, grad):
        x, merged, down, up = ctx.saved_tensors
        x_rows, grad_rows = _by_row(x), _by_row(grad)
        down_rows, up_rows = (ctx.found[weight][ctx.first : ctx.first + len(x)] for weight in ctx.weights)
        down_rows.baddbmm_(up.T @ grad_rows.mT, x_rows)
        up_rows.mT.baddbmm_(down @ x_rows.mT, grad_rows)
        return grad @ merged if ctx.needs_input_grad[0] else None, None, None, None, None, None, None

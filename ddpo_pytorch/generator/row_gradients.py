"""Gradients of adapters for each row of a batch by itself, from one backward pass over all of it.

An adapter weight W takes part in a row i as y_i = W x_i, so that its gradient is the sum of g_i^T x_i over rows, with
g_i the gradient of y_i. The sum is what autograd keeps; here the terms are kept (Goodfellow 2015).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ddpo_pytorch.generator.fused_lora import LinearWithLora, fusible, is_fused
from ddpo_pytorch.generator.threads import first_row

Gradients = dict[nn.Parameter, torch.Tensor]


def has_row_gradients(unet: nn.Module) -> bool:
    """Whether adapters are all that is trained, and all of linear layers."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(isinstance(layer, lora.Linear) for layer in layers)


@contextmanager
def row_gradients(unet: nn.Module, rows: int, adapter: str = "default") -> Iterator[Gradients]:
    """Within it, backward passes through `unet` on batches of `rows` rows add to what is yielded, and to nothing else.

    That is {weight: (rows, *weight.shape)}, float32 or wider, at first 0. The backward pass has to be
    `torch.autograd.grad` with the adapters' weights as inputs, its results are of no use.
    """
    found: Gradients = {}
    with ExitStack() as stack:
        for layer in (module for module in unet.modules() if isinstance(module, lora.Linear)):
            narrow = layer.lora_A[adapter], layer.lora_B[adapter]
            for linear in narrow:
                found[linear.weight] = linear.weight.new_zeros(rows, *linear.weight.shape)
                stack.callback(linear.register_forward_hook(partial(_after_linear, found)).remove)
            if is_fused(layer):
                stack.callback(setattr, layer, "forward", layer.forward)
                layer.forward = partial(_fused, layer, layer.forward, found, *(linear.weight for linear in narrow))
        yield found


def _after_linear(found: Gradients, linear: nn.Linear, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return _Kept.apply(y, args[0], linear.weight, found, first_row()) if y.requires_grad else y


def _fused(layer: lora.Linear, plain, found: Gradients, down: nn.Parameter, up: nn.Parameter, x: torch.Tensor):
    if not torch.is_grad_enabled() or not fusible(layer, x):
        return plain(x)
    base = layer.base_layer
    return _LinearWithKept.apply(x, base.weight, base.bias, down, up, found, first_row())


def _keep(found: Gradients, weight: nn.Parameter, first: int, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Add grad_i^T x_i of rows first, first + 1, ..., summed over all but the first and the last dimension."""
    rows = len(x)
    product = grad.reshape(rows, -1, grad.shape[-1]).mT @ x.reshape(rows, -1, x.shape[-1])
    found[weight][first : first + rows] += product


class _Kept(torch.autograd.Function):
    """y of y = W x; backward keeps the gradients of W."""

    @staticmethod
    def forward(ctx, y, x, weight, found, first):
        ctx.save_for_backward(x.to(y.dtype))
        ctx.weight, ctx.found, ctx.first = weight, found, first
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        _keep(ctx.found, ctx.weight, ctx.first, grad, *ctx.saved_tensors)
        return grad, None, None, None, None


class _LinearWithKept(LinearWithLora):
    """The fused layer; backward keeps the gradients of its adapter."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, found, first):
        ctx.weights, ctx.found, ctx.first = (down, up), found, first
        return LinearWithLora.forward(ctx, x, weight, bias, down, up)

    @staticmethod
    def backward(ctx, grad):
        x, merged, down, up = ctx.saved_tensors
        _keep(ctx.found, ctx.weights[0], ctx.first, grad @ up, x)
        _keep(ctx.found, ctx.weights[1], ctx.first, grad, x @ down.T)
        return grad @ merged if ctx.needs_input_grad[0] else None, None, None, None, None, None, None

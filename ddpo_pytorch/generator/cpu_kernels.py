"""LoRA in one matrix product: W' x with W' = W + up down, instead of W x + up (down x).

The sum of the weights costs next to nothing beside their product with a batch of activations, which the two narrow
products, their scaling and the additions, forward and backward, do not. Not in half precision, which would round small
updates away when they are added to W.
"""

from functools import partial

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F


class LinearWithLora(torch.autograd.Function):
    """y = x W'^T + b, with gradients of x, down and up; W and b are frozen."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up):
        merged = torch.addmm(weight, up, down)
        ctx.save_for_backward(x, merged, down, up)
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, grad):
        x, merged, down, up = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = (grad_rows @ merged).view(x.shape) if ctx.needs_input_grad[0] else None
        # dW' = grad^T x, and so d down = up^T dW', d up = dW' down^T, without ever forming dW'. Products with the few
        # dimensions first are three times as fast on a CPU at rank 4.
        return grad_x, None, None, (up.T @ grad_rows.T) @ rows, ((down @ rows.T) @ grad_rows).T


def fuse_lora(unet: nn.Module, adapter: str = "default") -> None:
    """Have every linear layer with an adapter compute so, except in half precision and under autocast."""
    for module in unet.modules():
        if isinstance(module, lora.Linear):
            module.forward = partial(_forward, module, adapter)


def is_fused(layer: lora.Linear) -> bool:
    """Whether `fuse_lora` has been there."""
    return "forward" in vars(layer)


def fusible(layer: lora.Linear, x: torch.Tensor) -> bool:
    """Whether the layer computes so now: its adapter is on, and nothing is in half precision."""
    on = not (layer.disable_adapters or layer.merged)
    return on and layer.base_layer.weight.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)


def _forward(layer: lora.Linear, adapter: str, x: torch.Tensor) -> torch.Tensor:
    if not fusible(layer, x):
        return type(layer).forward(layer, x)
    base, down, up = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LinearWithLora.apply(x, base.weight, base.bias, down, up)

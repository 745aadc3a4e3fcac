"""Speed-ups for small UNets on a CPU: LoRA fused into one matrix product, and batches split among threads.

`fuse_lora`: W' x with W' = W + up down, instead of W x + up (down x). Adding the weights is cheap compared to their
product with a batch of activations; two narrow products with scaling and additions, forward and backward, are not.

`run_batch_on_all_cores`: PyTorch splits every operation among its threads. In a small UNet operations are too short for
that: threads would wait for each other hundreds of times per pass. Here each takes some rows through the whole UNet.
"""

from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from itertools import accumulate

import torch
from peft.tuners import lora
from torch import nn

from ddpo_pytorch.generator.lora import ADAPTER


class LinearWithLora(torch.autograd.Function):
    """y = x W'^T + b of x (..., in), frozen W (out, in) and b; gradients of x, down (rank, in) and up (out, rank)."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up):
        merged = torch.addmm(weight, up, down)
        ctx.save_for_backward(x, merged, down, up)
        return nn.functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx, grad):
        x, merged, down, up = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = (grad_rows @ merged).view(x.shape) if ctx.needs_input_grad[0] else None
        # dW' = grad^T x, so d down = up^T dW' and d up = dW' down^T, without ever forming dW'. Multiplying by the
        # narrow matrix first is three times as fast on a CPU at rank 4; so is grad_rows @ up as up^T @ grad_rows^T.
        return grad_x, None, None, (grad_rows @ up).T @ rows, ((down @ rows.T) @ grad_rows).T


def fuse_lora(unet: nn.Module) -> None:
    """Fuse the adapter into every linear layer that has one; has no effect in half precision or under autocast."""
    for module in unet.modules():
        if isinstance(module, lora.Linear):
            module.forward = partial(_fused_forward, module)


def is_fused(layer: lora.Linear) -> bool:
    """Return whether `fuse_lora` replaced the layer's forward."""
    return "forward" in vars(layer)


def fusible(layer: lora.Linear, x: torch.Tensor) -> bool:
    """Return whether the adapter is enabled, and neither weights nor autocast are in half precision."""
    enabled = not (layer.disable_adapters or layer.merged)
    return enabled and layer.base_layer.weight.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)


def _fused_forward(layer: lora.Linear, x: torch.Tensor) -> torch.Tensor:
    if not fusible(layer, x):
        return type(layer).forward(layer, x)
    base, down, up = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return LinearWithLora.apply(x, base.weight, base.bias, down, up)


# index in the UNet's batch of the first row that the current thread computes
FIRST_ROW: ContextVar[int] = ContextVar("first_row", default=0)


class _Rows(torch.autograd.Function):
    """Run the parts of a batch in parallel; backward is parallel, too, and adds up the parts' gradients."""

    @staticmethod
    def forward(ctx, pool, passes, weights, *_):
        outputs = list(pool.map(torch.enable_grad()(lambda run: run()[0]), passes))
        ctx.pool, ctx.outputs, ctx.weights = pool, outputs, weights
        return torch.cat([output.detach() for output in outputs])

    @staticmethod
    def backward(ctx, grad):
        parts = zip(ctx.outputs, grad.split([len(output) for output in ctx.outputs]), strict=True)
        backward = partial(torch.autograd.grad, allow_unused=True)
        gradients = ctx.pool.map(lambda part: backward(part[0], ctx.weights, part[1]), parts)
        sums = [None if grads[0] is None else sum(grads) for grads in zip(*gradients, strict=True)]
        ctx.outputs = None  # frees the parts' graphs
        return None, None, None, *sums


def run_batch_on_all_cores(unet: nn.Module, threads: int) -> None:
    """Split each batch of `unet`, unless it is smaller or under autocast, among `threads` single-threaded threads."""
    pool, forward = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)), unet.forward

    def run(x, t, context, mask, first=0, return_dict=False):
        FIRST_ROW.set(first)
        return forward(x, t, encoder_hidden_states=context, encoder_attention_mask=mask, return_dict=return_dict)

    def split_forward(sample, timesteps, encoder_hidden_states, encoder_attention_mask=None, return_dict=False):
        inputs = sample, timesteps, encoder_hidden_states, encoder_attention_mask
        if len(sample) < threads or torch.is_autocast_enabled(sample.device.type):
            return run(*inputs, return_dict=return_dict)
        parts = [[None] * threads if tensor is None else tensor.tensor_split(threads) for tensor in inputs]
        starts = list(accumulate(map(len, parts[0]), initial=0))[:-1]
        passes = [partial(run, *part) for part in zip(*parts, starts, strict=True)]
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        if torch.is_grad_enabled() and weights:
            return (_Rows.apply(pool, passes, weights, *weights),)
        return (torch.cat(list(pool.map(torch.no_grad()(lambda run: run()[0]), passes))),)

    unet.forward = split_forward

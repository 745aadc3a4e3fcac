"""A UNet whose batches are divided among the cores of a CPU.

PyTorch's own threads divide every operation, and the UNet of a small model is made of operations too short for that:
they wait for each other some hundred times in a pass. Here each thread takes some of the rows through all of the UNet,
forward and backward, alone on its core.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from itertools import accumulate

import torch
from torch import nn

_first_row: ContextVar[int] = ContextVar("first_row", default=0)


def first_row() -> int:
    """Which row of the UNet's batch this thread's part begins with."""
    return _first_row.get()


class _Rows(torch.autograd.Function):
    """Outputs of all parts; backward takes all parts back at the same time and adds up their gradients."""

    @staticmethod
    def forward(ctx, pool, passes, weights, *_):
        outputs = list(pool.map(torch.enable_grad()(lambda run: run()), passes))
        ctx.pool, ctx.outputs, ctx.weights = pool, outputs, weights
        return torch.cat([output.detach() for output in outputs])

    @staticmethod
    def backward(ctx, grad):
        parts = zip(ctx.outputs, grad.split([len(output) for output in ctx.outputs]), strict=True)
        found = ctx.pool.map(lambda part: torch.autograd.grad(part[0], ctx.weights, part[1], allow_unused=True), parts)
        sums = [None if grads[0] is None else sum(grads) for grads in zip(*found, strict=True)]
        ctx.outputs = None  # and with them all that was kept for this
        return None, None, None, *sums


def divide_among_threads(unet: nn.Module, threads: int) -> None:
    """Have `unet` run so, in this many threads. Passes under autocast, and batches of fewer rows, run as before.

    Each thread has one of PyTorch's (torch.set_num_threads(1)); outside of the UNet nothing changes.
    """
    pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
    unet.forward = partial(_forward, unet, unet.forward, pool, threads)


def _forward(
    unet: nn.Module,
    whole: Callable[..., tuple[torch.Tensor]],
    pool: ThreadPoolExecutor,
    threads: int,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    return_dict: bool = False,
) -> tuple[torch.Tensor]:
    if len(sample) < threads or torch.is_autocast_enabled(sample.device.type):
        return whole(
            sample,
            timesteps,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )

    def run(x, t, context, mask, first):
        _first_row.set(first)
        return whole(x, t, encoder_hidden_states=context, encoder_attention_mask=mask, return_dict=False)[0]

    inputs = [tensor.tensor_split(threads) for tensor in (sample, timesteps, encoder_hidden_states)]
    no_mask = encoder_attention_mask is None
    inputs.append([None] * threads if no_mask else encoder_attention_mask.tensor_split(threads))
    starts = list(accumulate(map(len, inputs[0]), initial=0))[:-1]
    passes = [partial(run, *part) for part in zip(*inputs, starts, strict=True)]
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and weights:
        return (_Rows.apply(pool, passes, weights, *weights),)
    return (torch.cat(list(pool.map(torch.no_grad()(lambda run: run()), passes))),)

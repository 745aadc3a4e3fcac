"""The gradient of an epoch's first update, taken while sampling.

Until the first update the policy is the one that samples, so PPO's ratio is 1 and its gradient that of REINFORCE:

    -1 / (N T) sum_i A_i sum_t grad log p(x_{i,t-1} | x_{i,t}, c_i)

(N samples of the update, T trained timesteps each, A clipped; the clip of the ratio is not active at 1). The advantages
A need the rewards of the whole epoch, the inner sum does not: it is taken right after each step was drawn, while the
UNet's activations are there, and kept for each sample. That spares the update the forward passes of its samples.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F

from ddpo_pytorch.generator.cpu_kernels import LinearWithLora, first_row, fusible, is_fused
from ddpo_pytorch.training.setup import Geometry

logger = logging.getLogger(__name__)


class ScoreGradients:
    """Gradients of trajectories' log-probs (their score functions) with respect to the adapters.

    They are kept in the host's memory: 4 bytes for each adapter weight and sample.

    Args:
        accelerator: averages over processes, and scales with mixed_precision fp16.
        unet: the bare UNet, with adapters (see `has_row_gradients`).
        samples: of this process in the first update.
        batch_size: samples to draw at once; a backward pass needs the memory of an update's with as many rows.
        window: first and last + 1 of the timesteps that are trained on.
        passes: rows of the UNet's batch for each sample, 2 with guidance.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        unet: nn.Module,
        samples: int,
        batch_size: int,
        window: tuple[int, int],
        passes: int,
    ):
        self.samples, self.batch_size = samples, batch_size
        self._accelerator, self._unet, self._window, self._passes = accelerator, unet, window, passes
        self._terms = samples * (window[1] - window[0])
        self._weights = [weight for weight in unet.parameters() if weight.requires_grad]
        self._sums = torch.zeros(samples, sum(weight.numel() for weight in self._weights))

    @contextmanager
    def of(self, first: int, count: int) -> Iterator["ScoreGradients"]:
        """Within it `take` is about the samples first ... first + count - 1 of the first update, in its order."""
        with row_gradients(self._unet, self._passes * count) as found:
            yield self
        parts = (found[weight].reshape(self._passes, count, -1).sum(dim=0) for weight in self._weights)
        self._sums[first : first + count] = torch.cat(list(parts), dim=1).to("cpu", torch.float32)

    def wants(self, step: int) -> bool:
        """Whether step `step` of the trajectories is trained on, and has to be drawn with gradients enabled."""
        return self._window[0] <= step < self._window[1]

    def take(self, log_probs: torch.Tensor) -> None:
        """Add the gradients of a step's log-probs (B,), one of each sample."""
        # divided as in an update's loss, so that a gradient scaler finds the magnitudes that it is used to
        total, scaler = log_probs.sum() / self._terms, self._accelerator.scaler
        total = total if scaler is None else scaler.scale(total)
        with torch.autocast(log_probs.device.type, enabled=False):  # which is for forward passes
            torch.autograd.grad(total, self._weights, allow_unused=True)

    def set_gradients(self, advantages: torch.Tensor) -> None:
        """Give the weights the update's gradient, averaged over processes.

        advantages: (samples,) of the first update's samples in their order, clipped.
        """
        mean = self._accelerator.reduce((-advantages.cpu() @ self._sums).to(advantages.device), "mean")
        for weight, part in zip(self._weights, mean.split([weight.numel() for weight in self._weights]), strict=True):
            weight.grad = part.view_as(weight).clone()


def while_sampling(
    accelerator: Accelerator, unet: nn.Module, geometry: Geometry, sample: ConfigDict, train: ConfigDict
) -> ScoreGradients | None:
    """What takes the first updates' gradients, or None where `train` does not want that or it is not possible.

    It is where adapters of linear layers are all that is trained, on every timestep of the window, without a KL term
    and without compiled blocks.
    """
    window = geometry.timestep_window
    partly = geometry.train_timesteps < window[1] - window[0]
    if not train.gradients_while_sampling or partly or train.kl_coef or train.compile or not has_row_gradients(unet):
        return None
    rows = train.batch_size * train.timesteps_per_forward
    samples = geometry.local_samples // geometry.updates
    logger.info("gradients of an epoch's first update are taken while sampling, %d samples at once", min(rows, samples))
    return ScoreGradients(accelerator, unet, samples, min(rows, samples), window, 2 if sample.guidance_scale > 1 else 1)


def rollout_batches(
    order: Sequence[int], size: int, gradients: ScoreGradients | None
) -> list[tuple[list[int], AbstractContextManager]]:
    """Samples to draw together, and within what: those of the first update, first in `order`, within `gradients.of`."""
    first = gradients.samples if gradients else 0
    batches = []
    for start in range(0, first, gradients.batch_size if gradients else 1):
        batch = list(order[start : min(start + gradients.batch_size, first)])
        batches.append((batch, gradients.of(start, len(batch))))
    for start in range(first, len(order), size):
        batches.append((list(order[start : start + size]), nullcontext()))
    return batches


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

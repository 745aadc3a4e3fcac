"""The gradient of an epoch's first update, taken while sampling.

Before the first update the policy is the one that sampled, so PPO's ratio is 1 and its gradient is that of REINFORCE:

    -1 / (N T) sum_i A_i sum_t grad log p(x_{i,t-1} | x_{i,t}, c_i)

(N samples in the update, T trained timesteps each, A clipped; at ratio 1 the clip is not active). The advantages A need
the rewards of the whole epoch, but the inner sum does not: it is computed right after each step is sampled, while the
UNet's activations exist, and kept per sample. This saves the forward passes of the update.

Per-sample gradients come from one backward pass over the batch: an adapter weight W acts on row i as y_i = W x_i, so
its gradient is the sum over rows of g_i^T x_i, with g_i the gradient of y_i (Goodfellow 2015). Autograd keeps only the
sum; the layers below keep its terms.
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

from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import GradMode
from ddpo_pytorch.generator.cpu_kernels import FIRST_ROW, LinearWithLora, fusible, is_fused
from ddpo_pytorch.generator.lora import ADAPTER
from ddpo_pytorch.training.setup import BatchSizes
from ddpo_pytorch.utils.distributed import to_device

Gradients = dict[nn.Parameter, torch.Tensor]
Window = tuple[int, int]  # first trained step, last + 1
Forward = Callable[[torch.Tensor], torch.Tensor]
logger = logging.getLogger(__name__)


class RolloutGradients(GradMode):
    """Per-sample gradients of trajectories' log-probs with respect to the adapters, in CPU memory.

    This process has `samples` in the first update, drawn `batch_size` at a time. Steps in `window` are
    trained on. A sample takes `passes` rows of the bare UNet's batch (2 with guidance).
    """

    def __init__(
        self, accelerator: Accelerator, unet: nn.Module, samples: int, batch_size: int, window: Window, passes: int
    ):
        self.samples, self.batch_size = samples, batch_size
        self._accelerator, self._unet, self._window, self._passes = accelerator, unet, window, passes
        self._terms = samples * (window[1] - window[0])
        self._weights = [weight for weight in unet.parameters() if weight.requires_grad]
        count, on_gpu = sum(weight.numel() for weight in self._weights), accelerator.device.type == "cuda"
        self._sums = torch.zeros(samples, count, pin_memory=on_gpu)  # pinned: copies to it are asynchronous

    @contextmanager
    def recording(self, first: int, count: int) -> Iterator["RolloutGradients"]:
        """Attribute gradients added by `take` to samples [first, first + count) of the first update, in its order."""
        with per_sample_gradients(self._unet, self._passes * count) as gradients:
            yield self
        parts = (gradients[weight].reshape(self._passes, count, -1).sum(dim=0) for weight in self._weights)
        self._sums[first : first + count].copy_(torch.cat(list(parts), dim=1), non_blocking=True)

    def wants(self, step: int) -> bool:
        """Return whether a step is trained on."""
        return self._window[0] <= step < self._window[1]

    def take(self, log_probs: torch.Tensor) -> None:
        """Add the gradients of a step's log-probs (B,)."""
        # divided as in the update's loss, so that a gradient scaler sees the usual magnitudes
        total, scaler = log_probs.sum() / self._terms, self._accelerator.scaler
        total = total if scaler is None else scaler.scale(total)
        with torch.autocast(log_probs.device.type, enabled=False):  # autocast is for forward passes only
            torch.autograd.grad(total, self._weights, allow_unused=True)

    def set_gradients(self, advantages: torch.Tensor) -> None:
        """Set the weights' gradients, given the clipped advantages (samples,) of the first update, in its order."""
        weights = -advantages.cpu()  # waits for the device, and thus for the copies to the sums
        mean = self._accelerator.reduce(to_device(weights @ self._sums, advantages.device), "mean")
        for weight, part in zip(self._weights, mean.split([weight.numel() for weight in self._weights]), strict=True):
            weight.grad = part.view_as(weight).clone()


def rollout_gradients(
    accelerator: Accelerator, unet: nn.Module, sizes: BatchSizes, sample: ConfigDict, train: ConfigDict
) -> RolloutGradients | None:
    """Return the `RolloutGradients` of a run, or None if they are switched off or impossible."""
    window = sizes.timestep_window
    # only adapters of linear layers are trained, on every timestep of the window, with no loss but the policy's
    layers = [module for module in unet.modules() if isinstance(module, lora.Linear)]
    adapters = {weight for layer in layers for linear in (layer.lora_A, layer.lora_B) for weight in linear.parameters()}
    only_adapters = bool(adapters) and {weight for weight in unet.parameters() if weight.requires_grad} == adapters
    possible = only_adapters and sizes.train_timesteps == window[1] - window[0] and not train.compile
    if not (train.gradients_while_sampling and possible) or train.kl_coef:
        return None
    samples = sizes.local_samples // sizes.updates
    batch_size = min(train.batch_size * train.timesteps_per_forward, samples)
    logger.info("gradients of an epoch's first update are taken while sampling, %d samples at a time", batch_size)
    return RolloutGradients(accelerator, unet, samples, batch_size, window, 2 if sample.guidance_scale > 1 else 1)


def rollout_batches(
    order: Sequence[int], size: int, gradients: RolloutGradients | None
) -> list[tuple[list[int], AbstractContextManager]]:
    """Return batches of samples, each with the context to draw it in; those of the first update come first."""
    batches, first = [], gradients.samples if gradients else 0
    for start in range(0, first, gradients.batch_size if gradients else size):
        batch = list(order[start : min(start + gradients.batch_size, first)])
        batches.append((batch, gradients.recording(start, len(batch))))
    return batches + [(list(order[at : at + size]), nullcontext()) for at in range(first, len(order), size)]


@contextmanager
def per_sample_gradients(unet: nn.Module, rows: int) -> Iterator[Gradients]:
    """Yield {weight: (rows, *weight.shape)}, float32 or wider, to which backward passes add the gradient of each row.

    Backward passes are `torch.autograd.grad` of `rows` rows with respect to the adapters; ignore what they return.
    """
    gradients: Gradients = {}
    with ExitStack() as stack:

        def replace(module: nn.Module, forward: Callable, *arguments: Any) -> None:
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = partial(forward, module, module.forward, gradients, *arguments)

        for layer in (module for module in unet.modules() if isinstance(module, lora.Linear)):
            down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            gradients[down.weight] = down.weight.new_zeros(rows, *down.weight.shape)
            gradients[up.weight] = up.weight.new_zeros(rows, *up.weight.T.shape).mT  # transposed, as backward adds
            replace(down, _linear_forward)
            replace(up, _linear_forward)
            if is_fused(layer):
                replace(layer, _fused_forward, down.weight, up.weight)
        yield gradients


def _linear_forward(linear: nn.Linear, plain: Forward, gradients: Gradients, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return plain(x)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _PerSampleLinear.apply(x, linear.weight, dtype, gradients, FIRST_ROW.get())


def _fused_forward(
    layer: lora.Linear, plain: Forward, gradients: Gradients, down: nn.Parameter, up: nn.Parameter, x: torch.Tensor
) -> torch.Tensor:
    if not torch.is_grad_enabled() or not fusible(layer, x):
        return plain(x)
    base = layer.base_layer
    return _PerSampleFused.apply(x, base.weight, base.bias, down, up, gradients, FIRST_ROW.get())


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """Reshape (rows, ..., features) to (rows, positions, features)."""
    return x.reshape(len(x), -1, x.shape[-1])


class _PerSampleLinear(torch.autograd.Function):
    """y = W x in `dtype`, as under autocast; backward adds the gradients of W per row."""

    @staticmethod
    def forward(ctx, x, weight, dtype, gradients, first):
        ctx.weight, ctx.gradients, ctx.first, ctx.dtype = weight, gradients, first, x.dtype
        x, cast = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast)
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx, grad):
        x, cast = ctx.saved_tensors
        rows = ctx.gradients[ctx.weight][ctx.first : ctx.first + len(x)]
        rows.baddbmm_(_by_row(grad).mT.to(rows.dtype), _by_row(x).to(rows.dtype))
        return (grad @ cast).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None


class _PerSampleFused(LinearWithLora):
    """A linear layer with its adapter fused in; backward adds the gradients of the adapter per row."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, gradients, first):
        ctx.weights, ctx.gradients, ctx.first = (down, up), gradients, first
        return LinearWithLora.forward(ctx, x, weight, bias, down, up)

    @staticmethod
    def backward(ctx, grad):
        x, merged, down, up = ctx.saved_tensors
        x_rows, grad_rows = _by_row(x), _by_row(grad)
        down_rows, up_rows = (ctx.gradients[weight][ctx.first : ctx.first + len(x)] for weight in ctx.weights)
        down_rows.baddbmm_((grad_rows @ up).mT, x_rows)
        up_rows.mT.baddbmm_(down @ x_rows.mT, grad_rows)
        return grad @ merged if ctx.needs_input_grad[0] else None, None, None, None, None, None, None

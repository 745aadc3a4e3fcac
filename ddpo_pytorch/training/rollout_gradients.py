"""The gradient of an epoch's first update, taken while sampling.

Until the first update the policy is the one that samples, so PPO's ratio is 1 and its gradient that of REINFORCE:

    -1 / (N T) sum_i A_i sum_t grad log p(x_{i,t-1} | x_{i,t}, c_i)

(N samples of the update, T trained timesteps each, A clipped; the clip of the ratio is not active at 1). The advantages
A need the rewards of the whole epoch, the inner sum does not: it is taken right after each step was drawn, while the
UNet's activations are there, and kept for each sample. That spares the update the forward passes of its samples.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import nn

from ddpo_pytorch.training.row_gradients import has_row_gradients, row_gradients
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

"""AdamW, in full or in 8 bits, and updates that leave out gradients which are not finite."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from ml_collections import ConfigDict

from ddpo_pytorch.utils.distributed import full_tensor
from ddpo_pytorch.utils.errors import UserError


def make_adamw(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], use_8bit_adam: bool, **settings: Any
) -> torch.optim.Optimizer:
    """AdamW of parameters or groups of them, with `settings` (lr, betas, eps, weight_decay).

    use_8bit_adam takes bitsandbytes'; UserError without that package. All weights are updated in one fused kernel.
    """
    if not use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("use_8bit_adam=True needs bitsandbytes: pip install it, or set it to False") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def make_optimizer(train: ConfigDict, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the settings of `config.train`; use_8bit_adam takes bitsandbytes' (UserError without that package)."""
    return make_adamw(
        parameters,
        train.use_8bit_adam,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )


class GuardedOptimizer:
    """Steps of an optimizer, of which those with a loss or gradient that is not finite are left out and counted.

    Args:
        accelerator, optimizer: as prepared; with mixed_precision fp16 its gradient scaler does the leaving out.
        max_grad_norm: norm over all parameters to which gradients are scaled down.
        limit: steps in a row that may be left out.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, max_grad_norm: float, limit: int):
        self._accelerator, self._optimizer = accelerator, optimizer
        self._max_grad_norm, self._limit = max_grad_norm, limit
        self._in_a_row = self.skipped = 0

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor | None:
        """Clip gradients and update, then clear them. Returns the norm before clipping, None if the step was left out.

        Raises UserError at `limit` steps in a row. Processes agree, as their gradients are averaged.
        """
        grad_norm = full_tensor(self._accelerator.clip_grad_norm_(parameters, self._max_grad_norm))
        if left_out := not grad_norm.isfinite():
            if self._accelerator.scaler is not None:
                self._optimizer.step()  # which leaves it out, and lowers the scale
        else:
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._in_a_row = self._in_a_row + 1 if left_out else 0
        self.skipped += left_out
        if self._in_a_row >= self._limit:
            raise UserError(
                f"{self._in_a_row} updates in a row had a gradient that is not finite and were left out; go on from "
                "the last checkpoint with a lower train.learning_rate, or with mixed_precision bf16 or no"
            )
        return None if left_out else grad_norm

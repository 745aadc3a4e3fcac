"""AdamW in 32 or 8 bits, and steps that skip non-finite gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from ml_collections import ConfigDict

from ddpo_pytorch.utils.distributed import full_tensor
from ddpo_pytorch.utils.errors import UserError


def make_adamw(parameters: Iterable[Any], use_8bit_adam: bool, **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW, fused or bitsandbytes' in 8 bits (UserError if absent), with lr, betas, eps and weight_decay."""
    if not use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("use_8bit_adam=True needs bitsandbytes: pip install it, or set it to False") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def make_optimizer(train: ConfigDict, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with the settings of `config.train`."""
    rate, betas = train.learning_rate, (train.adam_beta1, train.adam_beta2)
    decay, eps = train.adam_weight_decay, train.adam_epsilon
    return make_adamw(parameters, train.use_8bit_adam, lr=rate, betas=betas, weight_decay=decay, eps=eps)


class GuardedOptimizer:
    """Optimizer wrapper that clips gradients to `max_grad_norm` over all parameters and skips non-finite steps.

    `optimizer` was prepared by `accelerator`, whose gradient scaler does the skipping with fp16. `limit` skipped steps
    in a row abort the run.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, max_grad_norm: float, limit: int):
        self._accelerator, self._optimizer, self._max_grad_norm = accelerator, optimizer, max_grad_norm
        self._limit, self._in_a_row = limit, 0  # skipped steps

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor | None:
        """Clip gradients, update and clear them; return the norm before clipping, or None if the step was skipped.

        Raises UserError after `limit` skipped steps in a row. All processes agree, since gradients are averaged.
        """
        grad_norm = full_tensor(self._accelerator.clip_grad_norm_(parameters, self._max_grad_norm))
        skipped = not grad_norm.isfinite()
        if not skipped or self._accelerator.scaler is not None:  # a scaler skips the step itself and lowers the scale
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= self._limit:
            advice = "resume from the last checkpoint with a lower train.learning_rate, or mixed_precision bf16 or no"
            raise UserError(f"{self._in_a_row} updates in a row had a non-finite gradient; {advice}")
        return None if skipped else grad_norm

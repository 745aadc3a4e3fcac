"""AdamW, in full or in 8 bits."""

from collections.abc import Iterable
from typing import Any

import torch

from ddpo_pytorch.errors import UserError


def make_adamw(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], use_8bit_adam: bool, **settings: Any
) -> torch.optim.Optimizer:
    """AdamW of parameters or groups of them, with `settings` (lr, betas, eps, weight_decay).

    use_8bit_adam takes bitsandbytes'; UserError without that package.
    """
    if not use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("use_8bit_adam=True needs bitsandbytes: pip install it, or set it to False") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)

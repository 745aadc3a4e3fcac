"""The loss with which Selector and Policy learn from ratings.

A judge gives an image the score p = sigmoid(z) in (0, 1), experts give it the reward R = (r - 1) / 2 for a rating r of
1, 2 or 3. The score itself is the action; nothing is sampled. With sg() for stop-gradient, the advantage is

    A = sg(R - p)          on all rated images (stage 1),
    A = sg(R - V)          with the baseline V = sg(p) (stage 2),

and the loss is the mean over samples of w L, w = expert level / 3, where L is one of

    symmetric_log   -(max(A, 0) log p + max(-A, 0) log(1 - p))      dL/dz = -A (1 - p) for A > 0, -A p for A < 0
    log             -A log p                                        dL/dz = -A (1 - p)
    delta           -A p                                            dL/dz = -A p (1 - p)

A gradient step raises p if R > p, lowers it if R < p, and has no effect at p = R. "log" is REINFORCE as in the official
code, which used |R - p| instead of A and thus raised the scores of bad images; "delta" is the update in its
documentation, p + alpha (R - p) grad p. Far from the reward, "delta" is slow for p near 0 or 1, "log" for p near 1, the
symmetric form for neither. Since the action is deterministic and the baseline is the score, this regresses the score on
the reward: "delta" has exactly the gradient of (R - p)^2 / 2. Stage 2's advantage is stage 1's without dropout.
"""

import torch
from torch.nn.functional import logsigmoid

from ddpo_pytorch.utils.settings import check_choices

OBJECTIVES = ("symmetric_log", "log", "delta")


def advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return signed advantages R - V (B,), detached. `values` are scores or a baseline in [0, 1]."""
    _check_shapes(rewards=rewards, values=values)
    return (rewards - values).detach()


def reinforce_loss(
    logits: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, objective: str = "symmetric_log"
) -> torch.Tensor:
    """Return the mean of w L over samples, a scalar; see the module docstring.

    Gradients flow to `logits` (B,); `advantages` (B,) and `weights` (B,), 0 or more, are constants. Raises ValueError
    if shapes differ, UserError for an unknown objective.
    """
    _check_shapes(logits=logits, advantages=advantages, weights=weights)
    check_choices({"objective": objective}, {"objective": OBJECTIVES}, "rlhf.")
    advantages, weights = advantages.detach(), weights.detach()
    if objective == "delta":
        gains = advantages * logits.sigmoid()
    elif objective == "log":
        gains = advantages * logsigmoid(logits)
    else:  # log(1 - sigmoid(z)) is logsigmoid(-z)
        gains = advantages.clamp(min=0) * logsigmoid(logits) + (-advantages).clamp(min=0) * logsigmoid(-logits)
    return -(weights * gains).mean()


def _check_shapes(**values: torch.Tensor) -> None:
    """Raise ValueError if shapes differ: (B,) and (B, 1) would broadcast to all pairs of samples."""
    if len({value.shape for value in values.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        raise ValueError(f"all must have the same shape, not {shapes}")

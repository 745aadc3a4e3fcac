"""The rule by which Selector and Policy learn from ratings.

A judge gives an image the score p = sigmoid(z) in (0, 1); experts gave it the reward R = (r - 1) / 2, from a rating r
of 1, 2 or 3. No action is drawn: the score is the action. With sg() for "as a constant", the advantage is

    A = sg(R - p)          on all rated images (stage 1),
    A = sg(R - V)          with the baseline V = sg(p) (stage 2),

and the loss is the mean over samples of w L, w = (expert level / 3) x (importance weight), where L is one of

    symmetric_log   -(max(A, 0) log p + max(-A, 0) log(1 - p))      dL/dz = -A (1 - p) for A > 0, -A p for A < 0
    log             -A log p                                        dL/dz = -A (1 - p)
    delta           -A p                                            dL/dz = -A p (1 - p)

A gradient step raises p where R > p, lowers it where R < p, and rests at p = R. "log" is REINFORCE as in the public
code, whose |R - p| in place of A sent scores of bad images up; "delta" is the update that its documentation states,
p + alpha (R - p) grad p. It is slow where p is near 0 or 1 and the reward is far away, "log" is where p is near 1; the
symmetric form is slow at neither end.

Since the action is deterministic and the baseline is the score, this REINFORCE is regression of the score on the
reward: "delta" has exactly the gradient of (R - p)^2 / 2. Stage 2's advantage is that of stage 1 but for dropout; what
changes in stage 2 is the set of samples, the learning rate and, where asked for, the importance weight.
"""

import torch
from torch.nn.functional import logsigmoid

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import POSITIVE, check_pair

OBJECTIVES = ("symmetric_log", "log", "delta")


def advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Signed advantages R - V (B,), without a gradient. `values` are scores or a baseline in [0, 1]."""
    if rewards.shape != values.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and values {tuple(values.shape)} must have one shape")
    return (rewards - values).detach()


def reinforce_loss(
    logits: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, objective: str = "symmetric_log"
) -> torch.Tensor:
    """Mean of w L over samples, a scalar: see the head of this file.

    Args:
        logits: (B,) of the scores, with gradients.
        advantages: (B,) from `advantages`; no gradient passes through them.
        weights: (B,) of the samples, 0 or more.
        objective: one of OBJECTIVES.

    Raises:
        UserError: another objective.
        ValueError: shapes differ; (B,) against (B, 1) would pair every sample with every other.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"rlhf.objective is {objective!r}; allowed are {', '.join(OBJECTIVES)}")
    if not logits.shape == advantages.shape == weights.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, advantages {tuple(advantages.shape)} and weights {tuple(weights.shape)} "
            "must have one shape"
        )
    advantages, weights = advantages.detach(), weights.detach()
    if objective == "delta":
        gains = advantages * logits.sigmoid()
    elif objective == "log":
        gains = advantages * logsigmoid(logits)
    else:  # log(1 - sigmoid(z)) is logsigmoid(-z)
        gains = advantages.clamp(min=0) * logsigmoid(logits) + (-advantages).clamp(min=0) * logsigmoid(-logits)
    return -(weights * gains).mean()


def importance_weights(
    selector_scores: torch.Tensor, policy_scores: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """sg(P_selector / P_policy) (B,), clipped to [low, high], then divided by its mean; no gradient."""
    check_pair("rlhf.importance_range", (low, high), POSITIVE, equal=True)
    ratio = selector_scores.detach() / policy_scores.detach().clamp(min=torch.finfo(torch.float32).tiny)
    ratio = ratio.clamp(low, high)
    return ratio / ratio.mean()

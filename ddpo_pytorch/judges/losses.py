"""The loss of the attribute classifier: BCE, and the two options against rare attributes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ddpo_pytorch.judges.classifier_report import one_sided
from ddpo_pytorch.utils.errors import UserError


def attribute_loss(
    logits: torch.Tensor, labels: torch.Tensor, pos_weight: torch.Tensor | None = None, focal_gamma: float = 0.0
) -> torch.Tensor:
    """Mean over (N, H) of (1 - p)^focal_gamma w BCE(logit, label), p the probability given to the true label.

    w is `pos_weight` (H,) where the label is 1, else 1. With gamma alone this is the focal loss of Lin et al. (2017)
    without its alpha, whose place w takes.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight, reduction="none")
    if focal_gamma:
        wrong = F.logsigmoid(torch.where(labels > 0, -logits, logits))  # log(1 - p); a power has no gradient at p = 1
        losses = losses * torch.exp(focal_gamma * wrong)
    return losses.mean()


def positive_weights(labels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Negatives / positives (H,) of labels (N, H). Raises UserError for an attribute that lacks either."""
    for name, absent in one_sided(labels, names):
        raise UserError(f"pos_weight needs both classes of every attribute; training has no {absent} of {name!r}")
    positives = (labels > 0).sum(0)
    return (len(labels) - positives) / positives

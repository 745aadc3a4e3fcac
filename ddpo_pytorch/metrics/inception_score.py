"""The inception score (Salimans et al. 2016): how sure Inception is of each image, and how varied of all.

It knows ImageNet's classes, none of which is a retina: on medical images it says little, and is given because the
document names it.
"""

import numpy as np

from ddpo_pytorch.metrics.arrays import finite

SPLITS = 10
# images that a part needs: as many as there are classes. The score of fewer grows with their number (that of n images
# is at most n), so dividing them would lower it.
PART_IMAGES = 1000


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of exp(E KL(p(y|x) || p(y))), at least 1 and at most the classes.

    logits (N, C) of N images in random order (parts are consecutive rows); p(y) is the mean of p(y|x) over a part.
    Raises ValueError for fewer images than parts, NaN and infinity.
    """
    logits = finite(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"an inception score of {splits} parts needs as many images, got {len(logits)}")
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        shifted = rows - rows.max(axis=1, keepdims=True)
        log_given = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        given = np.exp(log_given)
        log_whole = np.log(np.maximum(given.mean(axis=0), np.finfo(float).tiny))
        # the divergence is at least 0 but for rounding
        scores.append(max(1.0, float(np.exp((given * (log_given - log_whole)).sum(axis=1).mean()))))
    return float(np.mean(scores)), float(np.std(scores))


def split_count(images: int) -> int:
    """Return the number of parts for so many images: up to ten, of at least 1,000 images each, or one."""
    return max(1, min(SPLITS, images // PART_IMAGES))

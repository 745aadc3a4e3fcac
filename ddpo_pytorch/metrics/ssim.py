"""Structural similarity: SSIM of pairs of equal file names, MS-SSIM between generated images (lower: more diverse).

Not torchmetrics', which averages over the padded border (0.616, not 0.495 at 64 px) and has no MS-SSIM below 176 px.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.functional as tvf
from torch.nn.functional import avg_pool2d

from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for images in [0, 1]
# exponents of the five scales (Wang, Simoncelli and Bovik 2003, table 1)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MAX_PAIRS = 1000  # per set


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity (B,) of images (B, C, H, W) in [0, 1] (Wang, Bovik et al. 2004).

    Gaussian window of 11 x 11 and sigma 1.5; mean over channels and positions where the window is inside the image.
    """
    return _similarity(x.double(), y.double())[0]  # in float32 variances of flat images are noise of the order of C2


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the multi-scale structural similarity (B,) of images (B, C, H, W) in [0, 1] (Wang et al. 2003).

    prod_j cs_j^w_j * ssim_M^w_M over M = `scale_count` scales, each averaging 2 x 2 pixels of the previous one. The
    first M exponents are scaled to the sum of all five. Negative means become 0.
    """
    x, y = x.double(), y.double()
    count = scale_count(min(x.shape[-2:]))
    weights = (np.array(SCALES[:count]) * sum(SCALES) / sum(SCALES[:count])).tolist()
    result = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        full, contrast = _similarity(x, y)
        result = result * (full if scale == count - 1 else contrast).clamp(min=0) ** weight
    return result


def scale_count(side: int) -> int:
    """Return the number of MS-SSIM scales (1 to 5) at which a window fits into images with this shorter side."""
    return sum(side // 2**scale >= WINDOW for scale in range(len(SCALES)))


def measure_pairs(images: ImageSet, names: Sequence[str], seed: int, share: bool = False) -> dict[str, Estimate]:
    """Return the means of those measures of pairs of images (`ImageSet.pairs`) that the set has.

    Intervals resample pairs as if independent, though an image may be in two of them, and prompts too, except for
    MS_SSIM, whose pairs mix prompts. `share`: as for `bootstrap_mean`.
    """
    result = {}
    for name in filter(images.pairs.get, names):
        pairs, values = images.pairs[name]
        groups = np.zeros(len(pairs), dtype=int) if name == "MS_SSIM" else images.groups[pairs[:, 0]]
        result[name] = bootstrap_mean(values, groups, seed, resample_groups=name != "MS_SSIM", share=share)
    return result


def _similarity(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means (B,) of ssim = l * cs and of the contrast-structure term cs."""
    blurred = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # one channel: depthwise is slow on a CPU
    for kernel in ([WINDOW, 1], [1, WINDOW]):
        blurred = tvf.gaussian_blur(blurred, kernel, [SIGMA, SIGMA])
    inside = slice(WINDOW // 2, -(WINDOW // 2))  # where the window does not reach into the padding
    # (B, C, 1, H - 10, W - 10) each
    mean_x, mean_y, square_x, square_y, product = blurred[..., inside, inside].unflatten(0, (5, *x.shape[:2]))
    variance_x, variance_y = (square_x - mean_x**2).clamp(min=0), (square_y - mean_y**2).clamp(min=0)
    contrast = (2 * (product - mean_x * mean_y) + C2) / (variance_x + variance_y + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)

"""Structural similarity: SSIM of given pairs, and MS-SSIM between generated images as a measure of diversity.

SSIM compares an image with the one that it should be. Unpaired generation has no such image, so that SSIM is taken of
pairs that the user gives by name and of no others; the mean MS-SSIM of pairs of generated images tells how alike they
are: lower is more diverse.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ddpo_pytorch.utils.errors import UserError

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for images in [0, 1]
# exponents of the five scales (Wang, Simoncelli and Bovik 2003, table 1)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# pairs of a set, whose cost is as for so many images
MOST_PAIRS = 1000


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,) of images (B, C, H, W) in [0, 1], sides at least 11 (Wang, Bovik et al. 2004).

    Gaussian window of 11 x 11 and sigma 1.5; mean over the positions at which it lies inside the image, and channels.
    Raises ValueError for unequal shapes and smaller images.
    """
    return _similarity(*_pair(x, y))[0]


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity (B,) of images (B, C, H, W) in [0, 1] (Wang, Simoncelli and Bovik 2003).

    prod_j cs_j^w_j * ssim_M^w_M over M = `scale_count` scales, each of half the sides of the one before (means of 2 x 2
    pixels). Below 176 px there are fewer than five; then the first M exponents are scaled to the sum of all. Means that
    are negative count as 0. Raises as `ssim`.
    """
    x, y = _pair(x, y)
    count = scale_count(min(x.shape[-2:]))
    weights = np.array(SCALES[:count]) * sum(SCALES) / sum(SCALES[:count])
    result = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(weights):
        whole, contrast = _similarity(x, y)
        result = result * (whole if scale == count - 1 else contrast).clamp(min=0) ** float(weight)
        if scale < count - 1:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result


def scale_count(side: int) -> int:
    """Scales of MS-SSIM at which images of this shorter side (in pixels) still hold a window: 1 to 5."""
    return sum(side // 2**scale >= WINDOW for scale in range(len(SCALES)))


def pairs_by_name(names: Sequence[str], others: Sequence[str], what: str) -> list[tuple[int, int]]:
    """(position in `names`, position in `others`) of every name that both have; raises UserError if there is none."""
    position = {name: index for index, name in enumerate(others)}
    pairs = [(index, position[name]) for index, name in enumerate(names) if name in position]
    if not pairs:
        raise UserError(
            f"{what} has no image named as a generated one, e.g. {names[0]!r}; SSIM is taken of pairs of equal names, "
            "set --config.metric.pairs_path= to do without"
        )
    return pairs


def circle_pairs(keys: Sequence[str], seed: int, most: int = MOST_PAIRS) -> list[tuple[int, int]]:
    """Pairs of positions of images of any prompts: each with the next in a circle, of which the first `most` pairs.

    The order hangs on the seed and the images' different keys alone, wherever they stand in the list. Three images or
    more give as many pairs, two give one, one gives none.
    """
    order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed} {keys[i]}".encode()).digest())
    following = order[1:] + order[:1] if len(order) > 2 else order[1:]
    return list(zip(order, following, strict=False))[:most]


def _pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.shape != y.shape or x.dim() != 4 or min(x.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs two (B, C, H, W) of {WINDOW} px or more a side, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    return x.double(), y.double()  # in float32 the variances of flat images are noise of the order of C2


def _similarity(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (B,) of ssim = l cs and of the contrast-structure term cs."""
    count, channels = x.shape[:2]
    mean_x, mean_y, square_x, square_y, product = _blurred(torch.cat([x, y, x * x, y * y, x * y])).split(count)
    spread_x, spread_y = (square_x - mean_x**2).clamp(min=0), (square_y - mean_y**2).clamp(min=0)
    contrast = (2 * (product - mean_x * mean_y) + C2) / (spread_x + spread_y + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) under the window, at positions where it lies inside: (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    planes = images.flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return planes.view(*images.shape[:2], *planes.shape[-2:])

"""What looks at fundus images: Selector, Policy, image statistics, structural similarity, Inception's classes."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, load_judges
from ddpo_pytorch.metrics.feature_store import Network
from ddpo_pytorch.metrics.image_statistics import QualitySet
from ddpo_pytorch.metrics.networks import Device, key_of
from ddpo_pytorch.metrics.ssim import ms_ssim, scale_count, ssim
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256

SELECTOR, POLICY = "selector", "policy"
PAIRS_AT_ONCE = 8  # their windows take 60 times the memory of the images


@dataclass(frozen=True)
class FundusJudges:
    """Selector and Policy as networks of one column, the Selector's features, and the score from which it passes."""

    selector: Network
    policy: Network
    features: Network
    threshold: float


def fundus_judges(folder: str | Path, device: Device = "cpu") -> FundusJudges:
    """The judges of a folder of train_rlhf.py; the Policy reads captions.

    Raises UserError as `load_judges` does, and for a Selector without a threshold.
    """
    selector, policy = load_judges(folder, device)
    files = [Path(folder) / name for name in (SELECTOR_FILE, POLICY_FILE)]
    if selector.threshold is None:
        raise UserError(f"the Selector {str(files[0])!r} has no threshold; train_rlhf.py sets it at the end of stage 1")
    digests = [sha256(file) for file in files]
    name, size = Path(folder).name, selector.sizes.image_size
    return FundusJudges(
        Network(
            SELECTOR,
            f"Selector of {name}, {size} px, passes from {selector.threshold:.4g}",
            digests[0],
            key_of("selector", digests[0]),
            lambda images: selector.score(images)[:, None],
        ),
        Network(
            POLICY,
            f"Policy of {name}, {policy.sizes.image_size} px",
            digests[1],
            key_of(f"policy {policy.text.fingerprint}", digests[1]),
            lambda images, captions: policy.score(images, captions)[:, None],
            reads_captions=True,
        ),
        Network(
            "judge",
            f"class token of the Selector of {name}, {size} px",
            digests[0],
            key_of("selector features", digests[0]),
            lambda images: selector.encoder(selector.preprocess(images)),
        ),
        float(selector.threshold),
    )


def quality_network(chosen: QualitySet) -> Network:
    """Statistics of single images, (B, 1 + F): whether the image has a field of view (0 or 1), and the statistics."""

    def run(images: torch.Tensor) -> torch.Tensor:
        rows = []
        for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
            found = chosen.measure(np.ascontiguousarray(pixels))
            rows.append((0.0, *[0.0] * len(chosen.columns)) if found is None else (1.0, *found))
        return torch.tensor(rows, dtype=torch.float64)

    about = f"quality {chosen.name} 1 scipy {scipy.__version__}"
    return Network(quality_name(chosen.name), chosen.about, "", hashlib.sha256(about.encode()).hexdigest(), run)


def quality_name(chosen: str) -> str:
    """Name of the network of a set of statistics."""
    return f"quality {chosen}"


def structure_networks(side: int) -> dict[str, Network]:
    """SSIM and MS-SSIM of two images whose shorter side is `side` pixels."""
    scales = scale_count(side)
    what = f"MS-SSIM, {scales} scales" + ("" if scales == 5 else ", their exponents scaled to the sum of all five")
    return {
        "ssim": _pairwise("ssim", "SSIM, Gaussian window of 11 px and sigma 1.5", ssim),
        "ms_ssim": _pairwise("ms_ssim", what, ms_ssim),
    }


def _pairwise(name: str, what: str, similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Network:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(PAIRS_AT_ONCE), y.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([similarity(*part) for part in parts])[:, None]

    return Network(name, what, "", hashlib.sha256(f"{name} 1 torch {torch.__version__}".encode()).hexdigest(), run)

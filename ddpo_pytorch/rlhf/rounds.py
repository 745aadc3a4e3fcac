"""What a round of improvement is judged by, and when the rounds have collapsed.

Judges that chose nothing score images of a fixed noise, so that rounds differ by the generator alone; the kernel
distance to real images and the diversity tell whether a rising score was bought with pictures that please the judges.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpo_pytorch.data.images import image_grid, load_pixels, save_picture, to_uint8
from ddpo_pytorch.judges.policy import Policy
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.metrics.kernel import kernel_distance
from ddpo_pytorch.metrics.ssim import ms_ssim
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number

GRID_COLUMNS = 8


@dataclass(frozen=True)
class Standing:
    """How good a generator is. Means over `images` images: scores in [0, 1], distance, similarity.

    alignment is [selector >= tau] * policy; kid is taken in the Selector's features to real images, with its standard
    error; ms_ssim is the mean over neighbouring images of a prompt, higher where they resemble each other more.
    """

    alignment: float
    selector: float
    pass_rate: float
    policy: float
    kid: float
    kid_error: float
    ms_ssim: float
    images: int


@torch.no_grad()
def features_of(selector: Selector, images: torch.Tensor, batch_size: int) -> np.ndarray:
    """The Selector's pooled features (N, D) of uint8 images (N, 3, H, W)."""
    device = next(selector.parameters()).device
    parts = [selector.encoder(selector.preprocess(part.to(device).float() / 255)) for part in images.split(batch_size)]
    return torch.cat(parts).float().cpu().numpy()


def real_features(selector: Selector, paths: Sequence[Path], size: int, resize: str, batch_size: int) -> np.ndarray:
    """The same of image files, made square."""
    return features_of(selector, torch.stack([load_pixels(path, size, resize) for path in paths]), batch_size)


def passing(selector: Selector, paths: Sequence[Path], size: int, resize: str, batch_size: int) -> list[int]:
    """Which image files, made square, the Selector passes. Raises UserError where it passes none."""
    kept: list[int] = []
    for start in range(0, len(paths), batch_size):
        images = torch.stack([load_pixels(path, size, resize) for path in paths[start : start + batch_size]])
        kept += (start + selector.passes(images.float() / 255).nonzero().flatten()).tolist()
    if not kept:
        raise UserError(f"the Selector passes none of {len(paths)} real images; set improve.select_real=False")
    return kept


def draw_fixed(sampler: Sampler, prompts: Sequence[str], count: int, seed: int, batch_size: int) -> torch.Tensor:
    """`count` images of each prompt, prompt by prompt, from noise that depends on (seed, prompt, index): uint8.

    Raises UserError where one is not finite.
    """
    jobs = [
        (prompt, derived_seed(seed, Stream.HELD_OUT, text_number(prompt), index))
        for prompt in prompts
        for index in range(count)
    ]
    parts = []
    for start in range(0, len(jobs), batch_size):
        texts, seeds = zip(*jobs[start : start + batch_size], strict=True)
        images = sampler(texts, seeds)
        if not images.isfinite().all():
            raise UserError(f"an image of {texts[0]!r}, or one beside it, is not finite; lower improve.learning_rate")
        parts.append(to_uint8(images).cpu())
    return torch.cat(parts)


def assess(
    images: torch.Tensor,
    prompts: Sequence[str],
    selector: Selector,
    policy: Policy,
    real: np.ndarray,
    seed: int,
    batch_size: int,
) -> Standing:
    """The standing of uint8 images (N, 3, H, W) of N prompts, of which equal ones are neighbours.

    `real` are the Selector's features (M, D) of real images. Raises UserError for fewer than 4 images of either.
    """
    quality, aligned = [], []
    for part, texts in zip(images.split(batch_size), _chunks(prompts, batch_size), strict=True):
        pixels = part.float() / 255
        quality.append(selector.score(pixels).cpu())
        aligned.append(policy.score(pixels, texts).cpu())
    quality, aligned = torch.cat(quality).double(), torch.cat(aligned).double()
    passed = selector.accepts(quality).double()
    distance = kernel_distance(real, features_of(selector, images, batch_size), seed)
    if distance.high is None:  # an error of 0 would call every rise of KID a collapse
        raise UserError(
            f"KID of {len(images)} drawn and {len(real)} real images has no standard error; it needs 4 of each: raise "
            "improve.held_out_images, or give more images in improve.held_out_csv"
        )
    error = (distance.high - distance.low) / (2 * 1.96)
    pairs = torch.tensor([i for i in range(1, len(prompts)) if prompts[i] == prompts[i - 1]])
    similar = [ms_ssim(images[part - 1].float() / 255, images[part].float() / 255) for part in pairs.split(batch_size)]
    return Standing(
        alignment=(passed * aligned).mean().item(),
        selector=quality.mean().item(),
        pass_rate=passed.mean().item(),
        policy=aligned.mean().item(),
        kid=distance.value,
        kid_error=error,
        ms_ssim=torch.cat(similar).mean().item(),
        images=len(images),
    )


def _chunks(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def collapse(history: Sequence[Standing], tolerance: float, kid_tolerance: float) -> str:
    """Why the last of these rounds is a collapse, in words; "" where it is none. The first one is the start.

    The held-out score has fallen by more than `tolerance` below the best so far; or KID has risen above that of the
    start by more than `kid_tolerance` standard errors of the difference; or the images of a prompt have become so alike
    that 1 - MS-SSIM is less than half of that of the start.
    """
    first, now = history[0], history[-1]
    best = max(one.alignment for one in history)
    if now.alignment < best - tolerance:
        return f"the held-out score fell to {now.alignment:.3f}, the best was {best:.3f}"
    spread = math.hypot(first.kid_error, now.kid_error)
    if len(history) > 1 and now.kid > first.kid + kid_tolerance * spread:
        return (
            f"KID to real images rose from {first.kid:.4g} to {now.kid:.4g}, by more than {kid_tolerance:g} standard "
            f"errors ({spread:.2g}) of the difference: the judges are pleased by what is not real"
        )
    if 1 - now.ms_ssim < (1 - first.ms_ssim) / 2:
        return f"images of a prompt became alike: their MS-SSIM rose from {first.ms_ssim:.3f} to {now.ms_ssim:.3f}"
    return ""


def describe(number: int, standing: Standing) -> str:
    """One line for people."""
    one = standing
    return (
        f"round {number}: held-out score {one.alignment:.3f} (passed {one.pass_rate:.1%}, selector {one.selector:.3f}, "
        f"policy {one.policy:.3f}), KID {one.kid:.3g} +- {one.kid_error:.2g}, MS-SSIM {one.ms_ssim:.3f}"
    )


def table(history: Sequence[Standing]) -> str:
    """The rounds as a Markdown table."""
    head = "| round | held-out score | passed | selector | policy | KID (Selector's features) | MS-SSIM | images |\n"
    lines = [head, "|" + "---:|" * 8 + "\n"]
    for number, one in enumerate(history):
        scores = f"{one.alignment:.3f} | {one.pass_rate:.1%} | {one.selector:.3f} | {one.policy:.3f}"
        kid = f"{one.kid:.3g} ± {one.kid_error:.2g}"
        lines.append(f"| {number} | {scores} | {kid} | {one.ms_ssim:.3f} | {one.images} |\n")
    return "".join(lines)


def save_rounds_grid(path: Path, images: torch.Tensor, count: int) -> None:
    """The first image of each of the first prompts, of which there are `count` each, in rows."""
    save_picture(path, image_grid(images[::count][: 2 * GRID_COLUMNS].float() / 255, GRID_COLUMNS))


def record(standing: Standing, **more: Any) -> dict[str, Any]:
    """What rounds.jsonl states about a round."""
    return more | asdict(standing)

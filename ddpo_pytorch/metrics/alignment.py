"""Alignment of images with their prompts.

Dermoscopic images: APR, the artifact prevalence rate of equation (3), the share of images in which a judge sees exactly
what the caption says. Fundus images: the Policy's score of images that pass the Selector.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.functional.classification import multilabel_exact_match

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, bootstrap_ratio


def aligned_images(requested: torch.Tensor, predictions: torch.Tensor) -> np.ndarray:
    """Return (N,): 1 if all H 0/1 predictions of an image equal the requested labels, else 0; the mean is APR."""
    pair = predictions.long()[..., None], requested.long()[..., None]
    return multilabel_exact_match(*pair, requested.shape[1], multidim_average="samplewise").double().numpy()


def apr_by_prompt(aligned: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Return APR of each ISIC caption that has images, in the official order; aligned (N,) from `aligned_images`."""
    captions = np.array(captions)
    return {caption: float(aligned[captions == caption].mean()) for caption in CAPTIONS if caption in captions}


def measure_apr(
    images: ImageSet, requested: torch.Tensor, labels: Sequence[str], logits: np.ndarray, seed: int
) -> tuple[dict, np.ndarray]:
    """Return APR over all images and by prompt, numbers of each label, and `aligned_images` (N,).

    requested (N, H) of 0 and 1, logits (N, H). Recall: share of the images whose prompt requests a label that show it
    to the judge; precision: share of the images that show it whose prompt requests it.
    """
    aligned, groups, attributes = aligned_images(requested, torch.from_numpy(logits > 0)), images.groups, {}
    for name, target, seen in zip(labels, requested.numpy().T.astype(float), (logits > 0).T.astype(float), strict=True):
        precision, recall = (bootstrap_ratio(target * seen, whole, groups, seed) for whole in (seen, target))
        accuracy = bootstrap_mean(target == seen, groups, seed, resample_groups=False)
        attributes[name] = {"precision": precision, "recall": recall, "accuracy": accuracy}
        attributes[name] |= {"requested": int(target.sum()), "seen": int(seen.sum())}
    apr = bootstrap_mean(aligned, groups, seed, resample_groups=True)
    return {"APR": apr, "by_prompt": estimates_by_prompt(aligned, images, seed), "attributes": attributes}, aligned


def measure_fundus_alignment(
    images: ImageSet, selector: np.ndarray, policy: np.ndarray, threshold: float, seed: int
) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the judges' block of metrics.json, and columns of per_image.csv; alignment is [s >= threshold] * p."""
    passes = selector.astype(np.float32) >= np.float32(threshold)  # in float32, as `Selector.accepts`
    columns = {"alignment": np.where(passes, policy, 0.0), "selector": selector, "policy": policy}
    values = columns | {"pass_rate": passes.astype(float)}
    block: dict = {name: bootstrap_mean(x, images.groups, seed, resample_groups=True) for name, x in values.items()}
    block["by_prompt"] = estimates_by_prompt(columns["alignment"], images, seed)
    return block, columns | {"passes": passes.astype(int)}


def estimates_by_prompt(values: np.ndarray, images: ImageSet, seed: int) -> dict[str, Estimate]:
    """Return the mean of values (N,) per prompt, with intervals over its images."""
    groups = images.groups
    parts = {images.all_captions[number]: values[groups == number] for number in np.unique(groups)}
    return {c: bootstrap_mean(part, np.zeros(len(part)), seed, resample_groups=False) for c, part in parts.items()}

"""Comparison of two models, and warnings about how to read the numbers.

Models sampled from the same noise are compared image by image, others over equal mixes of prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpo_pytorch.metrics.image_sets import ImageSet, lacking_images, list_captions, match_prompts, sort_captions
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, bootstrap_unpaired_difference, mcnemar, sign_flip_p

# settings of eval.py in which compared folders may differ
OWN_SETTINGS = ("weights_sha256", "prompts", "classifier", "classifier_sha256", "load_from")
OWN_SETTINGS += ("model.unet", "model.text_encoder", "model.vae")
FEW_PROMPTS = 6  # with fewer, a sign-flip test cannot reach p < 0.05
FEW_IMAGES = 2048  # Inception's features; with fewer images the covariance is singular and FID's bias large
# fields of `set_facts` to warn of, and how the warning describes the images
WARNED_COUNTS = {
    "black_images": "black",
    "identical_images": "identical to another one",
    "copies_of_training_images": "identical to training images",
    "near_copies_of_training_images": "copies or near copies (by thumbnail) of training images",
    "copies_of_real_images": "identical to real images",
}


@dataclass
class Folder:
    """A measured folder: its part of metrics.json, facts about the set, and arrays (N,) about each image."""

    images: ImageSet
    result: dict
    facts: dict
    aligned: np.ndarray  # 0 or 1, for fundus images the alignment in [0, 1]
    columns: dict[str, Sequence]  # of per_image.csv
    values: dict[str, np.ndarray]  # measures (N,) by which groups of images are compared


def mean_reward(images: ImageSet, seed: int) -> Estimate:
    """Return the mean reward that eval.py logged; missing if it ran without a classifier."""
    rewards = np.array([images.entry(i).get("reward") for i in range(len(images))], dtype=float)  # NaN for None
    if not (logged := np.isfinite(rewards)).any():
        return Estimate.missing("image_log.json states no rewards")
    return bootstrap_mean(rewards[logged], images.groups[logged], seed, resample_groups=True)


def compare(first: Sequence[Folder], second: Sequence[Folder], seed: int, key: str = "APR") -> dict:
    """Return APR or alignment (`key`) of the second model minus the first's, paired if they share their noise.

    Unpaired models are reduced to the same number of images of every common prompt. "from_..." and "to_..." are means
    over the compared images.
    """
    reasons = [pairing_fault(a.images, b.images) for a, b in zip(first, second, strict=False)]
    if len(first) != len(second):
        reasons.append(f"{len(first)} and {len(second)} folders")
    reason = next(filter(None, reasons), "")
    a, groups_a = _aligned(first)
    if reason:
        b, groups_b = _aligned(second)
        chosen_a, chosen_b = match_prompts([groups_a, groups_b], seed)
        a, groups_a, b, groups_b = a[chosen_a], groups_a[chosen_a], b[chosen_b], groups_b[chosen_b]
        result = {"paired": False, "reason": reason, "pairs": 0, "p": None, "p_by_prompt": None}
        result[key] = bootstrap_unpaired_difference(a, groups_a, b, groups_b, seed)
    else:
        b = np.empty(0)
        for one, other in zip(first, second, strict=True):
            value = dict(zip(other.images.keys, other.aligned.astype(float), strict=True))
            b = np.append(b, [value[key] for key in one.images.keys])
        result = {"paired": True, "reason": "", "pairs": len(a)} | _paired_tests(a, b, groups_a, seed, key)
        result[key] = bootstrap_mean(b - a, groups_a, seed, resample_groups=True, share=False)
    rates = {f"{end}_{key}": float(x.mean()) if len(x) else None for end, x in (("from", a), ("to", b))}
    return result | rates | {"prompts": len(np.unique(groups_a))}


def _aligned(folders: Sequence[Folder]) -> tuple[np.ndarray, np.ndarray]:
    """Return alignment (N,) and prompts (N,) of the images of all folders."""
    aligned = np.concatenate([folder.aligned for folder in folders]).astype(float)
    return aligned, np.concatenate([folder.images.groups for folder in folders])


def _paired_tests(a: np.ndarray, b: np.ndarray, groups: np.ndarray, seed: int, key: str) -> dict:
    if key == "APR":
        gained, lost, p = mcnemar(a, b)
        test = "p: McNemar, exact"
    else:
        gained, lost, p = int((b > a).sum()), int((b < a).sum()), sign_flip_p(b - a, np.arange(len(a)), seed)
        test = "p: sign flips of the pairs' differences"
    few = len(np.unique(groups)) < FEW_PROMPTS
    by_prompt = None if few else sign_flip_p(b - a, groups, seed)
    test += "; p_by_prompt: sign flips of the prompts' mean differences"
    test += f", none below {FEW_PROMPTS} prompts, which cannot make it small" if few else ""
    return {"p": p, "p_by_prompt": by_prompt, "gained": gained, "lost": lost, "test": test}


def pairing_fault(a: ImageSet, b: ImageSet) -> str:
    """Return why two folders' images are not pairs from the same noise, with the first that differs, or ""."""
    position = {key: index for index, key in enumerate(b.keys)}
    for index, key in enumerate(a.keys):
        if key not in position:
            return f"{a.paths[index]} has no counterpart in {b.folder}"
        seeds = a.entry(index).get("seed"), b.entry(position[key]).get("seed")
        if None in seeds:
            folder = a.folder if seeds[0] is None else b.folder
            return f"{folder}/image_log.json states no seed for {key}"
        if seeds[0] != seeds[1]:
            return f"{a.paths[index]} was drawn from seed {seeds[0]}, {b.paths[position[key]]} from {seeds[1]}"
    return "" if len(a) == len(b) else f"{a.folder} has {len(a)} images, {b.folder} {len(b)}"


def find_warnings(context, models: Mapping[str, Sequence[Folder]], matched: int) -> list[str]:
    """Return warnings about sets that differ, overlap, are small (`matched` images each) or contain faulty images."""
    every = [folder for folders in models.values() for folder in folders]
    real, near, lines = context.sets.real, context.near_copies, []
    captions_of = {name: {c for folder in own for c in folder.images.captions} for name, own in models.items()}
    captions = set().union(*captions_of.values())
    if near is not None and near.any():
        lines.append(
            f"{near.sum()} of {len(near)} real images {_are(near.sum())} copies or near copies of training images, "
            f"first {real.paths[int(near.argmax())]}; they are left out of the memorisation baseline only"
        )
    if real and (lacking := sort_captions(captions - set(real.captions))):
        lines.append(
            f"{real.folder} has no image of {len(lacking)} generated captions, which count in {context.key} but "
            f"not in LPIPS or matched distances: {list_captions(lacking)}"
        )
    if real and matched < 2:
        lines.append(f"no matched distances: only {matched} images per set remain after matching captions")
    elif real and matched < FEW_IMAGES:
        distances = "FID is" if "inception" in context.tools.extractors else "Frechet distances of few images are"
        lines.append(
            f"matched distances use {matched} images per set: {distances} biased upwards below {FEW_IMAGES} images and "
            "comparable only at equal numbers; KID is unbiased"
        )
    for name, present in captions_of.items():
        if lacking := sort_captions(captions - present):
            lines.append(
                f"{name} has no images of {len(lacking)} captions that others have, which count in the others' "
                f"{context.key} but not in matched distances: {list_captions(lacking)}"
            )
    sets = [*filter(None, [real]), *context.sets.folders]
    lines += [lacking_images(images.folder, images.lacking) for images in sets if images.lacking]
    counts = sorted({len(folder.images) for folder in every})
    if len(counts) > 1:
        lines.append(f"sets hold {' and '.join(map(str, counts))} images: unmatched distances are not comparable")
    for number, folder in enumerate(every):
        facts = folder.facts
        a, b = every[0].images, folder.images
        for name, one in a.made_with.items():
            other = b.made_with.get(name, one)
            if one != other and name not in OWN_SETTINGS:
                lines.append(
                    f"{a.folder} was made with {name} {one}, {b.folder} with {name} {other}; differences between them "
                    "are not due to their weights alone"
                )
        for key, what in WARNED_COUNTS.items():
            if facts.get(key):
                lines.append(f"{facts['path']}: {facts[key]} of {facts['images']} images {_are(facts[key])} {what}")
        for other in every[:number]:
            if facts["sha256"] == other.facts["sha256"]:
                lines.append(f"{folder.images.folder} and {other.images.folder} hold the same images")
    return lines


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def missing_blocks(folders: Sequence[Folder], real: ImageSet | None) -> dict[str, str]:
    """Return by block why a model lacks numbers that the settings request."""
    missing = {}
    if not any(folders[0].result["diversity"].values()):
        missing["diversity"] = "no caption has two images in every folder"
    if real is not None and not set(folders[0].images.captions) & set(real.captions):
        missing["LPIPS"] = missing["fidelity"] = "no caption is shared with the real images"
    rewards = [folder.result["rewards"] for folder in folders]
    if not any(reward.n for reward in rewards):
        missing["reward"] = rewards[0].how
    return missing

"""Comparison of two models, image by image if they share their noise; warnings about how to read the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpo_pytorch.metrics.fidelity import frechet_change
from ddpo_pytorch.metrics.image_sets import ImageSet, lacking_images, list_captions, match_prompts, sort_captions
from ddpo_pytorch.metrics.intervals import bootstrap_mean, bootstrap_unpaired_difference, mcnemar, sign_flip_p

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
    """A measured folder: its part of metrics.json, facts about the set, and arrays (N,) about each image.

    `rewards` are those of the log, NaN for images without one.
    """

    images: ImageSet
    result: dict
    facts: dict
    rewards: np.ndarray
    columns: dict[str, Sequence]  # of per_image.csv
    values: dict[str, np.ndarray]  # by which groups are compared: "aligned" (0 or 1, of fundus images in [0, 1]), ...


def compare(first: Sequence[Folder], second: Sequence[Folder], seed: int, key: str = "APR") -> dict:
    """Return APR or alignment (`key`) of the second model minus the first's, paired if they share their noise.

    Unpaired ones are reduced to equal numbers of each common prompt. "from_...", "to_...": means of compared images.
    Of pairs also "reward", the change of the mean if every image has one, and, of one folder each, "FD", that of the
    matched Frechet distance by feature space.
    """
    reasons = [pairing_fault(one.images, other.images) for one, other in zip(first, second, strict=False)]
    if len(first) != len(second):
        reasons.append(f"{len(first)} and {len(second)} folders")
    reason = next(filter(None, reasons), "")
    a, b = (np.concatenate([folder.values["aligned"] for folder in own]) for own in (first, second))
    groups, groups_b = (np.concatenate([folder.images.groups for folder in own]) for own in (first, second))
    result: dict = {"paired": not reason, "reason": reason}
    if reason:
        chosen_a, chosen_b = match_prompts([groups, groups_b], seed)
        a, groups, b, groups_b = a[chosen_a], groups[chosen_a], b[chosen_b], groups_b[chosen_b]
        result |= {"pairs": 0, "p": None, "p_by_prompt": None}
        result[key] = bootstrap_unpaired_difference(a, groups, b, groups_b, seed)
    else:
        names = [[(i, name) for i, folder in enumerate(own) for name in folder.images.keys] for own in (first, second)]
        position = {name: index for index, name in enumerate(names[1])}
        order = [position[name] for name in names[0]]
        b, rewards = b[order], [np.concatenate([folder.rewards for folder in own]) for own in (first, second)]
        if np.isfinite(risen := rewards[1][order] - rewards[0]).all():
            result["reward"] = bootstrap_mean(risen, groups, seed, resample_groups=True, share=False)
        gained, lost = int((b > a).sum()), int((b < a).sum())
        if key == "APR":
            p, test = mcnemar(gained, lost), "p: McNemar, exact"
        else:
            p, test = sign_flip_p(b - a, np.arange(len(a)), seed), "p: sign flips of the pairs' differences"
        test += "; p over prompts: sign flips of the prompts' mean differences"
        if few := len(np.unique(groups)) < FEW_PROMPTS:
            test += f", none below {FEW_PROMPTS} prompts, which cannot make it small"
        result |= {"pairs": len(a), "p": p, "p_by_prompt": None if few else sign_flip_p(b - a, groups, seed)}
        result |= {"gained": gained, "lost": lost, "test": test}
        result[key] = bootstrap_mean(b - a, groups, seed, resample_groups=True, share=False)
        before, after = (own[0].result.get("fidelity", {}) for own in (first, second))
        if len(first) == 1 and first[0].images.keys == second[0].images.keys:  # else groups left out are not pairs
            spaces = [space for space, parts in before.items() if "FID" in parts["matched"]]
            result["FD"] = {s: frechet_change(before[s]["matched"]["FID"], after[s]["matched"]["FID"]) for s in spaces}
    rates = {f"{end}_{key}": float(x.mean()) if len(x) else None for end, x in (("from", a), ("to", b))}
    return result | rates | {"prompts": len(np.unique(groups))}


def pairing_fault(a: ImageSet, b: ImageSet) -> str:
    """Return why two folders' images are not pairs from the same noise, with the first that differs, or ""."""
    position = {key: index for index, key in enumerate(b.keys)}
    for index, key in enumerate(a.keys):
        if key not in position:
            return f"{a.paths[index]} has no counterpart in {b.folder}"
        seed, other = a.entry(index).get("seed"), b.entry(position[key]).get("seed")
        if None in (seed, other):
            return f"{(a if seed is None else b).folder}/image_log.json states no seed for {key}"
        if seed != other:
            return f"{a.paths[index]} was drawn from seed {seed}, {b.paths[position[key]]} from {other}"
    return "" if len(a) == len(b) else f"{a.folder} has {len(a)} images, {b.folder} {len(b)}"


def find_warnings(context, models: Mapping[str, Sequence[Folder]], matched: int) -> list[str]:
    """Return warnings about sets that differ, overlap, are small (`matched` images each) or contain faulty images."""
    every = [folder for folders in models.values() for folder in folders]
    real, near, key, lines = context.sets.real, context.near_copies, context.key, []
    captions_of = {name: {c for folder in own for c in folder.images.captions} for name, own in models.items()}
    captions = set().union(*captions_of.values())
    if near is not None and near.any():
        copies = f"{near.sum()} of {len(near)} real images {_are(near.sum())} copies or near copies of training images"
        example = real.paths[int(near.argmax())]
        lines.append(f"{copies}, first {example}; they are left out of the memorisation baseline only")
    if real and (lacking := sort_captions(captions - set(real.captions))):
        what = f"{len(lacking)} generated captions, which count in {key} but not in LPIPS or matched distances"
        lines.append(f"{real.folder} has no image of {what}: {list_captions(lacking)}")
    if real and matched < 2:
        lines.append(f"no matched distances: only {matched} images per set remain after matching captions")
    elif real and matched < FEW_IMAGES:
        biased = "FID is" if "inception" in context.tools.extractors else "Fréchet distances of few images are"
        biased += f" biased upwards below {FEW_IMAGES} images and comparable only at equal numbers; KID is unbiased"
        lines.append(f"matched distances use {matched} images per set: {biased}")
    for name, present in captions_of.items():
        if lacking := sort_captions(captions - present):
            what = f"{len(lacking)} captions that others have, which count in the others' {key} but not in matched"
            lines.append(f"{name} has no images of {what} distances: {list_captions(lacking)}")
    sets = [*filter(None, [real]), *context.sets.folders]
    lines += [lacking_images(images.folder, images.lacking) for images in sets if images.lacking]
    counts = sorted({len(folder.images) for folder in every})
    if len(counts) > 1:
        lines.append(f"sets hold {' and '.join(map(str, counts))} images: unmatched distances are not comparable")
    first = every[0].images
    for number, folder in enumerate(every):
        facts, images = folder.facts, folder.images
        for name, one in first.made_with.items():
            other = images.made_with.get(name, one)
            if one != other and name not in OWN_SETTINGS:
                made = f"{first.folder} was made with {name} {one}, {images.folder} with {name} {other}"
                lines.append(f"{made}; differences between them are not due to their weights alone")
        for fact, what in WARNED_COUNTS.items():
            if count := facts.get(fact):
                lines.append(f"{facts['path']}: {count} of {facts['images']} images {_are(count)} {what}")
        twins = [other.images.folder for other in every[:number] if facts["sha256"] == other.facts["sha256"]]
        lines += [f"{images.folder} and {twin} hold the same images" for twin in twins]
    return lines


def _are(count: int) -> str:
    return "is" if count == 1 else "are"

"""What is measured of fundus images alone: the judges' scores, image statistics, structure, the inception score.

Each function takes what networks said about a set (`measure.Side`) and returns a part of metrics.json.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ddpo_pytorch.metrics.fundus_networks import POLICY, SELECTOR, quality_name
from ddpo_pytorch.metrics.image_statistics import SETS, distances, summary
from ddpo_pytorch.metrics.inception_score import PART_IMAGES, inception_score, split_count
from ddpo_pytorch.metrics.intervals import Quantity, bootstrap_mean
from ddpo_pytorch.metrics.measures import Side
from ddpo_pytorch.metrics.networks import LOGITS

JUDGES = "fundus"  # the name under which Selector and Policy together stand in metrics.json
# pairs (P, 2) and values (P,) by measure: "SSIM" of (index here, index there), "MS_SSIM", "MS_SSIM_within" of own pairs
Structure = Mapping[str, tuple[np.ndarray, np.ndarray]]


def fundus_alignment(side: Side, threshold: float, seed: int) -> tuple[dict, np.ndarray, dict[str, np.ndarray]]:
    """The judges' block, the alignment (N,) of each image, and the columns of per_image.csv.

    Alignment is [s >= threshold] * p of Selector score s and Policy score p in [0, 1]: 0 for an image that does not
    pass. Means over images have intervals over prompts and images, as APR has; those of a prompt, over its images.
    """
    selector, policy = (_column(side, name) for name in (SELECTOR, POLICY))
    passes = selector.astype(np.float32) >= np.float32(threshold)  # the comparison that the Selector makes
    aligned, groups = np.where(passes, policy, 0.0), side.groups
    values = {"alignment": aligned, "selector": selector, "pass_rate": passes.astype(float), "policy": policy}
    block: dict = {name: bootstrap_mean(column, groups, seed, resample_groups=True) for name, column in values.items()}
    block["by_prompt"] = {
        side.images.vocabulary[number]: bootstrap_mean(
            aligned[groups == number], groups[groups == number], seed, resample_groups=False
        )
        for number in np.unique(groups)
    }
    return block, aligned, {"selector": selector, "policy": policy, "passes": passes.astype(int)}


def quality(side: Side, real: Side | None, names: Sequence[str], seed: int) -> tuple[dict, dict[str, list]]:
    """Blocks by set of statistics (`quality.SETS`), and the columns of per_image.csv.

    A block holds the number of images, that of images without a field of view, which are left out, and for each
    statistic mean, spread and, of generated images, distances to the real ones.
    """
    blocks, columns = {}, {}
    for name in names:
        found, rows = _statistics(side, name)
        theirs = None if real is None or real is side else _statistics(real, name)
        groups = side.groups[found]
        block = {"images": int(found.sum()), "no_field": int((~found).sum()), "statistics": {}}
        for number, statistic in enumerate(SETS[name].columns):
            own = summary(rows[found, number], groups, seed)
            if theirs is not None:
                kept, others = theirs
                own |= distances(rows[found, number], groups, others[kept, number], real.groups[kept], seed)
            block["statistics"][statistic] = own
            shown = zip(found, rows[:, number], strict=True)
            columns[f"{name} {statistic}"] = [float(value) if good else None for good, value in shown]
        blocks[name] = block
    return blocks, columns


def structure(side: Side, found: Structure, seed: int) -> dict[str, Quantity]:
    """Mean SSIM of the given pairs, mean MS-SSIM of pairs of any prompts and of pairs of the same prompt.

    Intervals resample pairs, those within prompts also prompts; an image is in two pairs, which is not reckoned with.
    """
    result = {}
    for name, (pairs, values) in found.items():
        groups = side.groups[pairs[:, 0]] if name != "MS_SSIM" else np.zeros(len(pairs), dtype=int)
        result[name] = bootstrap_mean(values, groups, seed, resample_groups=name != "MS_SSIM", share=False)
    return result


def inception_block(side: Side, seed: int) -> dict | None:
    """The inception score of all images in a seeded order, and its standard deviation over the parts."""
    if LOGITS not in side.rows:
        return None
    order = np.random.default_rng([seed, 4]).permutation(len(side.images))
    parts = split_count(len(order))
    mean, spread = inception_score(side.rows[LOGITS].take(order), parts)
    how = f"{parts} part{'s' * (parts > 1)} of {len(order) // parts} images"
    if parts > 1:
        how += f", standard deviation {spread:.3g}"
    elif len(order) < PART_IMAGES:
        how += f": below {PART_IMAGES} the score grows with the number of images, compare equal numbers only"
    return {"IS": Quantity(mean, None, None, len(order), how), "sd": spread if parts > 1 else None, "parts": parts}


def _column(side: Side, name: str) -> np.ndarray:
    return np.concatenate(list(side.rows[name].chunks()))[:, 0]


def _statistics(side: Side, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool: whether an image has a field of view; (N, F) its statistics, 0 where it has none."""
    rows = np.concatenate(list(side.rows[quality_name(name)].chunks()))
    return rows[:, 0] > 0, rows[:, 1:]

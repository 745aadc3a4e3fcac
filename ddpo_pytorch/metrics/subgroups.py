"""Groups of images by a column of metadata.csv, such as sex, age or site, and the largest gap between them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ddpo_pytorch.data.tables import number
from ddpo_pytorch.metrics.fidelity import kernel_distance
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import REPLICATES, Estimate, bootstrap_mean, difference_interval

MOST_VALUES = 8  # numeric columns with more distinct values are binned at their quartiles
UNKNOWN = "not stated"


def name_groups(sets: Sequence[ImageSet], columns: Sequence[str]) -> None:
    """Set `names` of each set by column; numbers with many values are binned at quartiles over all sets."""
    for column in columns:
        for images in sets:
            cells = [row.get(column) or UNKNOWN for row in images.table] or [UNKNOWN] * len(images)
            images.names[column] = np.array(cells)
        every = np.concatenate([images.names[column] for images in sets])
        stated = every[every != UNKNOWN].tolist()
        if len(set(stated)) <= MOST_VALUES or None in (values := list(map(number, stated))):
            continue
        cuts = np.unique(np.quantile(values, (0.25, 0.5, 0.75)))
        bins = [f"below {cuts[0]:g}", *(f"{low:g} to {high:g}" for low, high in zip(cuts, cuts[1:], strict=False))]
        bins.append(f"{cuts[-1]:g} and above")  # a bin contains its lower end
        name_of = {cell: bins[np.searchsorted(cuts, number(cell), "right")] for cell in stated} | {UNKNOWN: UNKNOWN}
        for images in sets:
            images.names[column] = np.array([name_of[cell] for cell in images.names[column]])


def largest_gap(values: np.ndarray, names: np.ndarray, prompts: np.ndarray, seed: int) -> dict[str, Estimate | float]:
    """Return "gap", the largest difference of group means of values (N,), and its p-value, "p", by permutation.

    Images of a prompt (N,) are alike. So if each prompt has one group, as captions that state it, whole prompts are
    permuted, else the images of each prompt among themselves; and the interval resamples prompts of both groups (images
    if all share one prompt). It ignores that the two groups were selected as extremes, which makes the gap too large on
    average; the permutation test over all groups accounts for it. Groups of one image are ignored.
    """
    used = [name for name in np.unique(names) if (names == name).sum() > 1]
    if len(used) < 2:
        return {"gap": Estimate.missing("fewer than two groups of two images")}
    keep = np.flatnonzero(np.isin(names, used))
    keep = keep[np.argsort(prompts[keep], kind="stable")]
    values, prompts, owner = values[keep].astype(float), prompts[keep], np.searchsorted(used, names[keep])
    _, starts = np.unique(prompts, return_index=True)
    sums, sizes, strata = values, np.ones(len(values)), prompts
    sides = [(values[owner == group], prompts[owner == group]) for group in range(len(used))]
    if len(np.unique(np.stack([prompts, owner], axis=1), axis=0)) == len(starts):  # each prompt has one group
        sums, sizes = (np.add.reduceat(column, starts) for column in (sums, sizes))
        owner, strata = owner[starts], np.zeros(len(starts))

    def group_means(order: np.ndarray) -> np.ndarray:
        return np.bincount(owner, sums[order]) / np.bincount(owner, sizes[order])

    means, rng = group_means(np.arange(len(owner))), np.random.default_rng([seed, 7])
    low, *_, high = means.argsort(kind="stable").tolist()  # two groups, even if all means are equal
    observed, both = float(np.ptp(means)), [sides[low], sides[high]]
    permuted = (np.lexsort((rng.random(len(owner)), strata)) for _ in range(REPLICATES))
    extreme = sum(np.ptp(group_means(order)) >= observed - 1e-12 for order in permuted)
    count, how, several = sum(len(side) for side, _ in both), f"{used[high]} minus {used[low]}; ", len(starts) > 1
    if several and min(len(np.unique(own)) for _, own in both) < 2:
        gap = Estimate(observed, None, None, count, f"{how}no interval: a group of one prompt")
    else:
        ends = difference_interval(*both, [[seed, low], [seed, high]], resample_groups=several)
        how += f"percentile bootstrap of these two, {REPLICATES} replicates over {'prompts' if several else 'images'}"
        gap = Estimate(observed, *ends, count, how)
    return {"gap": gap, "p": (1 + extreme) / (1 + REPLICATES)}


def measure_groups(
    folders: Sequence[ImageSet], real: ImageSet | None, column: str, space: str, values: Mapping, seed: int
) -> dict:
    """Return n (of all folders), the mean of each of `values` (N,) and KID for each group of one column, and the gaps.

    KID in one feature space is to the real images of the group, or to all if it has fewer than 4; it needs 4 per side.
    """
    blocks: dict[str, dict] = {}
    names = np.concatenate([images.names[column] for images in folders])
    prompts = np.concatenate([images.groups for images in folders])
    features = np.concatenate([images.rows[space][:] for images in folders]) if real is not None else None
    for name in np.unique(names).tolist():
        chosen = names == name
        blocks[name] = {"n": int(chosen.sum())}
        for measure, own in values.items():
            blocks[name][measure] = bootstrap_mean(own[chosen], prompts[chosen], seed, resample_groups=False)
        if real is not None and min(len(real), chosen.sum()) >= 4:
            same = np.flatnonzero(real.names[column] == name)
            references = real.rows[space][same if len(same) >= 4 else slice(None)]
            blocks[name]["KID"] = kernel_distance(references, features[chosen], seed, 10)
    gaps = {measure: largest_gap(numbers, names, prompts, seed) for measure, numbers in values.items()}
    distances = {name: block["KID"] for name, block in blocks.items() if "KID" in block}
    if len(distances) > 1:
        low, high = (pick(distances, key=lambda name: distances[name].value) for pick in (min, max))
        value, count = distances[high].value - distances[low].value, distances[low].n + distances[high].n
        half = np.hypot(*(distances[x].high - distances[x].value for x in (low, high)))
        gaps["KID"] = {"gap": Estimate.around(value, half, count, f"{high} minus {low}; standard errors of both")}
    return {"groups": blocks, "gaps": gaps}

"""Two models against each other: on the shared noise where there is one, over equal mixes of prompts elsewhere."""

from collections.abc import Sequence

import numpy as np

from ddpo_pytorch.metrics.evaluation import Folder
from ddpo_pytorch.metrics.intervals import (
    bootstrap_difference,
    bootstrap_unpaired_difference,
    mcnemar,
    sign_permutation_p,
)
from ddpo_pytorch.metrics.measures import Side, same_counts

# settings of eval.py that may differ between two folders of which one is compared with the other
OWN_SETTINGS = ("weights_sha256", "prompts", "classifier", "classifier_sha256", "load_from")
OWN_SETTINGS += ("model.unet", "model.text_encoder", "model.vae")
# with fewer prompts no pattern of signs has a probability below 5 %
FEW_PROMPTS = 6


def compare(first: Sequence[Folder], second: Sequence[Folder], seed: int, key: str = "APR") -> dict:
    """APR of one model minus that of another: paired where both were drawn from the same noise, unpaired elsewhere.

    With `key` "alignment" it is the mean of the images' alignment, whose paired tests flip the signs of differences.
    Unpaired, both are reduced to equally many images of every prompt that both have, drawn by the seed. The two rates
    beside the difference are of the images that were compared.
    """
    reasons = [pairing_fault(a.side, b.side) for a, b in zip(first, second, strict=False)]
    if len(first) != len(second):
        reasons.append(f"{len(first)} and {len(second)} folders")
    reason = next(filter(None, reasons), "")
    if reason:
        a, groups_a, b, groups_b = _same_mix(first, second, seed)
        result = {"paired": False, "reason": reason, "pairs": 0, "p": None, "p_by_prompt": None}
        result[key] = bootstrap_unpaired_difference(a, groups_a, b, groups_b, seed)
    else:
        a, b, groups_a = (
            np.concatenate(column).astype(float) for column in zip(*map(_pairs, first, second), strict=True)
        )
        prompts = len(np.unique(groups_a))
        by_prompt = sign_permutation_p(b - a, groups_a, seed) if prompts >= FEW_PROMPTS else None
        if key == "APR":
            gained, lost, p = mcnemar(a, b)
            test = "p: McNemar, exact"
        else:
            gained, lost, p = int((b > a).sum()), int((b < a).sum()), sign_permutation_p(b - a, np.arange(len(a)), seed)
            test = "p: sign flips of the pairs' differences"
        test += "; p_by_prompt: sign flips of the prompts' mean differences"
        if by_prompt is None:
            test += f", none below {FEW_PROMPTS} prompts, which cannot make it small"
        result = {"paired": True, "reason": "", "pairs": len(a), "p": p, "p_by_prompt": by_prompt}
        result |= {key: bootstrap_difference(a, b, groups_a, seed), "gained": gained, "lost": lost, "test": test}
    rates = {f"{end}_{key}": float(x.mean()) if len(x) else None for end, x in (("from", a), ("to", b))}
    return result | rates | {"prompts": len(np.unique(groups_a))}


def _same_mix(first: Sequence[Folder], second: Sequence[Folder], seed: int) -> tuple[np.ndarray, ...]:
    columns = []
    for folders in (first, second):
        hits = np.concatenate([folder.aligned for folder in folders]).astype(float)
        columns.append((hits, np.concatenate([folder.side.groups for folder in folders])))
    kept = same_counts([groups for _, groups in columns], seed)
    return tuple(column[indices] for pair, indices in zip(columns, kept, strict=True) for column in pair)


def pairing_fault(first: Side, second: Side) -> str:
    """Why two folders' images are not pairs from the same noise; "" if they are. Names the first image that differs."""
    a, b = first.images, second.images
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


def _pairs(first: Folder, second: Folder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = {key: index for index, key in enumerate(second.side.images.keys)}
    order = [position[key] for key in first.side.images.keys]
    return first.aligned, second.aligned[order], first.side.groups


def different_settings(first: Side, second: Side) -> list[str]:
    """Lines for settings of eval.py, other than the model, in which two folders differ."""
    a, b = first.images.made_with, second.images.made_with
    names = [name for name in a if name in b and name not in OWN_SETTINGS and a[name] != b[name]]
    return [
        f"{first.images.folder} was made with {n} {a[n]}, {second.images.folder} with {n} {b[n]}; a difference between "
        "them is not one between their weights alone"
        for n in names
    ]

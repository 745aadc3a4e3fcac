"""Numbers behind the report's sentences: verdicts, ceilings, copies, changes of diversity.

`result` is the content of metrics.json. A quantity is a mapping {"value", "low", "high", "n", "how"}, of which the
numbers may be None.
"""

from collections.abc import Iterable, Mapping
from typing import Any

REAL = "real images"
# The smallest p of a test that flips the signs of G prompts is 2 / 2^G: above 0.05 for fewer than these.
FEW_PROMPTS = 6
FEW_IMAGES = 2048  # below it, Frechet distances are strongly biased
SPREAD = {"vendi": ".2f", "pairwise_distance": ".4g", "LPIPS_within": ".3f"}  # measures of diversity and their format
COPIES = ("copies_of_training_images", "near_copies_of_training_images")
COPIES += ("copies_of_real_images", "near_copies_of_real_images")


def dig(tree: Any, *keys: Any) -> Any:
    """Return tree[k1][k2]..., or None where a level is absent or null."""
    for key in keys:
        if not isinstance(tree, Mapping) or tree.get(key) is None:
            return None
        tree = tree[key]
    return tree


def union(mappings: Iterable[Mapping | None]) -> list:
    """Return the keys of several mappings, each once, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or {}))


def measure_of(result: Mapping) -> str:
    """Return the name in metrics.json of how well images show their prompts: "APR", or "alignment" of fundus images."""
    return "alignment" if result.get("kind") == "fundus" else "APR"


def main_judge(result: Mapping) -> str:
    """Return the name of the judge of APR, the first one; "fundus" for Selector and Policy together."""
    return result.get("kind") or next(iter(result["judges"]))


def aligned(result: Mapping, values: Mapping | None, caption: str | None = None) -> dict | None:
    """Return APR or alignment of a model or of the real images as a quantity, over all captions or over one."""
    block = dig(values, "alignment", main_judge(result))
    return dig(block, measure_of(result)) if caption is None else dig(block, "by_prompt", caption)


def sides(result: Mapping) -> dict[str, Mapping]:
    """Return the measured blocks by name: the models, then real images if there are any."""
    return result["models"] | ({REAL: result["real"]} if "real" in result else {})


def comparisons(result: Mapping) -> list[dict[str, Any]]:
    """Return the comparisons of models that have a difference, each with its verdict.

    "shared" is the number of prompts that both have, None where neither has others; "few" tells that these are too few
    for a test over prompts. "reward" holds both mean rewards where the reward rose and APR or alignment did not.
    """
    models, measure, found = result["models"], measure_of(result), []
    for one in result["comparisons"]:
        word, base, other = verdict(one, measure), models[one["from"]], models[one["to"]]
        if not word:
            continue
        rewards = base.get("reward"), other.get("reward")
        hacked = None not in rewards and rewards[1] > rewards[0] and word in ("worse", "unclear")
        prompts = max(sum(map(bool, own["images_by_prompt"].values())) for own in (base, other))
        found.append(
            {
                "base": one["from"],
                "other": one["to"],
                "verdict": word,
                "difference": one[measure],
                "before": one[f"from_{measure}"],
                "after": one[f"to_{measure}"],
                "tests": tests(one),
                "reward": rewards if hacked else None,
                "prompts": one["prompts"],
                "shared": one["prompts"] if one["prompts"] < prompts else None,
                "few": one["prompts"] < FEW_PROMPTS and one["p_by_prompt"] is None,
            }
            | {key: one.get(key) for key in ("paired", "reason", "pairs", "gained", "lost", "test")}
        )
    return found


def verdict(comparison: Mapping, measure: str = "APR") -> str:
    """Return better, worse, unclear (0 in the interval, or p >= 0.05), unknown (no interval) or "" (no difference)."""
    value, low, high = (comparison[measure][key] for key in ("value", "low", "high"))
    if value is None:
        return ""
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high or any(p >= 0.05 for p in tests(comparison).values()):
        return "unclear"
    return "better" if low > 0 else "worse"


def tests(comparison: Mapping) -> dict[str, float]:
    """Return p over images and p over prompts, whose images are not independent, where they exist."""
    named = {"p": comparison["p"], "p over prompts": comparison["p_by_prompt"]}
    return {name: p for name, p in named.items() if p is not None}


def ceilings(result: Mapping) -> list[dict[str, Any]]:
    """Return the judge's agreement with real images in the models' mixes of captions, equal ones grouped.

    "share" is the share of the models' images whose captions have real images, None where all have.
    """
    groups: dict[tuple, dict] = {}
    for name, values in result["models"].items():
        quantity, share = values.get("ceiling"), values.get("ceiling_share")
        if dig(quantity, "value") is not None:
            key = share, quantity["value"], quantity["low"], quantity["high"]
            group = groups.setdefault(key, {"names": [], "share": share if share < 1 else None, "agreement": quantity})
            group["names"].append(name)
    return list(groups.values())


def changes_of_diversity(result: Mapping) -> list[dict[str, Any]]:
    """Return for each comparison and measure of diversity the change: fell, rose or same (as far as digits are shown).

    "overlap" tells whether the intervals overlap; None where one is missing.
    """
    models, changes = result["models"], []
    for one in result["comparisons"]:
        base, other = models[one["from"]], models[one["to"]]
        paths = [("diversity", name, key) for name in base.get("diversity") or {} for key in list(SPREAD)[:2]]
        for path in [*paths, ("perception", "LPIPS_within")]:
            before, after = dig(base, *path), dig(other, *path)
            if dig(before, "value") is None or dig(after, "value") is None:
                continue
            form = SPREAD[path[-1]]
            same = format(before["value"], form) == format(after["value"], form)
            ends = [quantity[end] for quantity in (before, after) for end in ("low", "high")]
            changes.append(
                {
                    "base": one["from"],
                    "other": one["to"],
                    "measure": path[-1],
                    "extractor": path[1],
                    "form": form,
                    "before": before,
                    "after": after,
                    "change": "same" if same else "fell" if after["value"] < before["value"] else "rose",
                    "overlap": None if None in ends else ends[0] <= ends[3] and ends[2] <= ends[1],
                }
            )
    return changes


def copies(values: Mapping) -> dict[str, int]:
    """Return the counts `COPIES` that are not 0, over a model's folders."""
    counts = {key: sum(folder.get(key) or 0 for folder in values.get("folders") or []) for key in COPIES}
    return {key: count for key, count in counts.items() if count}


def fewest_images(values: Mapping) -> int:
    """Return the fewest generated images behind a Frechet distance of a model; without any, those of a folder."""
    parts = [block.get(kind) for block in (values.get("fidelity") or {}).values() for kind in ("matched", "unmatched")]
    numbers = [part["n"] for part in parts if dig(part, "FID", "value") is not None]
    return min(numbers or [folder["images"] for folder in values["folders"]])


def missing(result: Mapping) -> dict[str, str]:
    """Return what could not be measured, and why: of the whole measurement, then of single models."""
    found = dict(result["missing"])
    for model, values in result["models"].items():
        found |= {f"{name} of {model}": reason for name, reason in values["missing"].items()}
    return found

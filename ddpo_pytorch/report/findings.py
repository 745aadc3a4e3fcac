"""Numbers in the report's sentences and tables; `result` is the content of metrics.json, in which they may be None."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from ddpo_pytorch.metrics.comparison import FEW_PROMPTS
from ddpo_pytorch.metrics.image_sets import sort_captions
from ddpo_pytorch.metrics.tables import ABSENT, FUNDUS_COLUMNS, TABLE3_COLUMNS, dig, model_table, number, sides

FIDELITY = (
    ("FID ↓", ("FID",), ".4g", 1),
    ("FID of ∞ images ↓", ("FID_infinity",), ".4g", 1),
    ("KID ↓", ("KID",), ".3g", 1),
    ("MMD, Gaussian ↓ (x 1000)", ("MMD",), ".3g", 1000),
    ("Two-sample test ↓ (%)", ("C2ST",), ".1f", 100),
    *((f"{name.capitalize()} ↑", (name,), ".3f", 1) for name in ("precision", "recall", "density", "coverage")),
    ("Images", ("n",), "d", 1),
)
FLAWS = ("black_images", "copies_of_training_images", "near_copies_of_training_images")
FLAWS += ("copies_of_real_images", "near_copies_of_real_images")


def measure_of(result: Mapping) -> str:
    """Return the key of the alignment measure in metrics.json: "APR", or "alignment" for fundus images."""
    return "alignment" if result.get("kind") == "fundus" else "APR"


def aligned(result: Mapping, values: Mapping | None, caption: str | None = None) -> dict | None:
    """Return APR or alignment of a model or of the real images as an estimate, over all captions or for one."""
    block = dig(values, "alignment", result.get("kind") or next(iter(result["judges"])))
    return dig(block, measure_of(result)) if caption is None else dig(block, "by_prompt", caption)


def comparisons(result: Mapping) -> list[dict[str, Any]]:
    """Return the comparisons of models that have a difference, with further fields for the page.

    "shared": number of common prompts, or None if these are all; "few": too few for a test over prompts; "hacked": both
    mean rewards if the reward of pairs rose beyond its interval but APR or alignment did not, else None.
    """
    models, measure, rows = result["models"], measure_of(result), []
    for row in result["comparisons"]:
        both = models[row["from"]], models[row["to"]]
        if word := verdict(row, measure):
            rewards = [side.get("reward") for side in both]
            hacked = (dig(row, "reward", "low") or 0) > 0 and word in ("worse", "unclear")
            prompts = max(sum(map(bool, side["images_by_prompt"].values())) for side in both)
            shared = row["prompts"] if row["prompts"] < prompts else None
            few = row["prompts"] < FEW_PROMPTS and row["p_by_prompt"] is None
            more = {"tests": tests(row), "hacked": rewards if hacked else None, "shared": shared, "few": few}
            rows.append(row | more | {"verdict": word})
    return rows


def verdict(comparison: Mapping, measure: str = "APR") -> str:
    """Return "better", "worse", "unclear" (0 in interval or p >= 0.05), "unknown" (no interval) or "" (no value)."""
    value, low, high = (comparison[measure][key] for key in ("value", "low", "high"))
    if value is None:
        return ""
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high or any(p >= 0.05 for p in tests(comparison).values()):
        return "unclear"
    return "better" if low > 0 else "worse"


def tests(comparison: Mapping) -> dict[str, float]:
    """Return p over images and, since images of a prompt are correlated, p over prompts, where they exist."""
    named = {"p": comparison["p"], "p over prompts": comparison["p_by_prompt"]}
    return {name: p for name, p in named.items() if p is not None}


def lost_diversity(result: Mapping) -> list[tuple[str, str, str, str, str, bool]]:
    """Return (model, other, measure, before, after, intervals apart) of each comparison's first loss of diversity."""
    lost = []
    for row in result["comparisons"]:
        for title, path, form in _spread(result):
            before, after = (dig(result["models"][row[end]], *path) for end in ("from", "to"))
            if None in (dig(before, "value"), dig(after, "value")):
                continue
            if float(format(after["value"], form)) < float(format(before["value"], form)):
                apart = None not in (before["low"], after["high"]) and after["high"] < before["low"]
                lost.append((row["from"], row["to"], title, number(before, form), number(after, form), apart))
                break
    return lost


def _spread(result: Mapping) -> list[tuple]:
    """Return (title, path, format) of the measures of diversity, in every feature space."""
    spaces = _union(side.get("diversity") for side in sides(result).values())
    columns = [(f"Vendi score ({space})", ("diversity", space, "vendi"), ".2f") for space in spaces]
    columns += [(f"Pairwise distance ({s})", ("diversity", s, "pairwise_distance"), ".4g") for s in spaces]
    return [*columns, ("LPIPS within prompts", ("perception", "LPIPS_within"), ".3f")]


def flaws(values: Mapping) -> dict[str, int]:
    """Return the nonzero counts of `FLAWS`, summed over a model's folders."""
    counts = {key: sum(folder.get(key) or 0 for folder in values.get("folders") or []) for key in FLAWS}
    return {key.replace("_", " "): count for key, count in counts.items() if count}


def missing(result: Mapping) -> dict[str, str]:
    """Return what could not be measured, and why: for all models, then for single ones."""
    reasons = dict(result["missing"])
    for model, values in result["models"].items():
        reasons |= {f"{name} of {model}": reason for name, reason in values["missing"].items()}
    return reasons


def methods(result: Mapping) -> dict[str, list[str]]:
    """Return how the intervals of each block were computed, with "…" in place of numbers, which may differ."""
    ways = defaultdict(set)
    for (block, *_), estimate in (pair for side in sides(result).values() for pair in _estimates(side)):
        if estimate["low"] is not None:
            ways[block].add(re.sub(r"\d[\d.,e+-]*\b", "…", estimate["how"]))
    return {block: sorted(texts) for block, texts in ways.items()}


def _estimates(tree: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Yield (path, estimate) of every estimate in a tree."""
    if isinstance(tree, Mapping) and "how" in tree:
        yield keys, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _estimates(value, *keys, name)


def _union(mappings) -> list[str]:
    """Return the keys of several mappings, each once, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or {}))


def _measures(columns: list[tuple], parts: Mapping[str, Mapping], fid_part: str = "matched") -> pd.DataFrame:
    """Return a row per measure that at least one part has, and a column per part."""
    table = model_table(columns, parts, fid_part).set_index("Model").T
    return table[(table != ABSENT).any(axis=1)]


def headline(result: Mapping) -> pd.DataFrame:
    """Return the main numbers of all models and of the real images."""
    parts, fundus = sides(result), result.get("kind")
    columns = list(FUNDUS_COLUMNS if fundus else TABLE3_COLUMNS)
    others = [] if fundus else list(result["judges"])[1:]
    columns += [(f"APR ↑ (%), {name}", ("alignment", name, "APR"), ".2f", 100) for name in others]
    columns += [(f"Ceiling of {measure_of(result)} (%)", ("ceiling",), ".2f", 100)]
    columns += [("Images with a ceiling (%)", ("ceiling_share",), ".1f", 100)]
    columns += [(f"{title} ↑", path, form, 1) for title, path, form in _spread(result)[:1]]
    for space in _union(side.get("memorisation") for side in parts.values())[:1]:
        columns += [(f"Closer to training images (%), {space}", ("memorisation", space, "share_closer"), ".2f", 100)]
    return _measures(columns, parts, result["fid_part"])


def prompt_table(result: Mapping) -> pd.DataFrame:
    """Return images and APR or alignment of every caption that has images."""
    real_counts = dig(result, "sets", "real", "images_by_prompt")
    counts = {name: side.get("images_by_prompt", real_counts) for name, side in sides(result).items()}
    table = pd.DataFrame(index=sort_captions(c for by_caption in counts.values() for c, n in by_caption.items() if n))
    for name, side in sides(result).items():
        table[f"n {name}"] = [str(counts[name].get(caption, 0)) for caption in table.index]
        shown = [number(aligned(result, side, caption), ".1f", 100) for caption in table.index]
        table[f"{measure_of(result)} {name} (%)"] = shown
    return table


def attribute_tables(result: Mapping) -> dict[str, pd.DataFrame]:
    """Return precision and recall of the requested attributes, a table per judge."""
    tables: dict[str, dict] = defaultdict(lambda: defaultdict(dict))
    for name, side in sides(result).items():
        for judge, block in side["alignment"].items():
            for label, values in block.get("attributes", {}).items():
                row = tables[judge][label.replace("_", " ")]
                row |= {f"{key} {name} (%)": number(values[key], ".1f", 100) for key in ("precision", "recall")}
                row[f"requested, seen {name}"] = f"{values['requested']}, {values['seen']}"
    return {judge: pd.DataFrame.from_dict(rows, orient="index") for judge, rows in tables.items()}


def fidelity_tables(result: Mapping) -> dict[str, pd.DataFrame]:
    """Return distances of matched and unmatched images to real ones by feature space; FID only for Inception."""
    tables, models = {}, result["models"].items()
    for space in _union(side.get("fidelity") for _, side in models):
        kinds = [(name, side, kind) for name, side in models for kind in ("matched", "unmatched")]
        parts = {f"{name}, {kind}": dig(side, "fidelity", space, kind) or {} for name, side, kind in kinds}
        table = tables[space] = _measures(FIDELITY, parts)
        if space != "inception":
            table.index = table.index.str.replace("FID", "Frechet distance").str.replace("KID", "Kernel distance")
    return tables


def size_curves(result: Mapping, space: str) -> pd.DataFrame:
    """Return FID and KID in a feature space by number of images per side, from all to a quarter."""
    rows = defaultdict(dict)
    for name, side in result["models"].items():
        for size, values in (dig(side, "fidelity", space, "matched", "curve") or {}).items():
            rows[size] |= {f"Frechet {name}": f"{values['FID']:.4g}", f"Kernel {name}": f"{values['KID']:.3g}"}
    return pd.DataFrame.from_dict(rows, orient="index")


def group_tables(result: Mapping) -> dict[str, pd.DataFrame]:
    """Return n, alignment, KID and nearness of each group, and the largest gaps, a table per metadata column."""
    tables: dict[str, dict] = defaultdict(lambda: defaultdict(dict))
    shown = (("aligned", f"{measure_of(result)} {{}} (%)", ".1f", 100), ("KID", "KID {} (x 1000)", ".3g", 1000))
    shown += (("closer", "Closer to training images {} (%)", ".1f", 100),)
    for name, side in sides(result).items():
        for column, block in (side.get("groups") or {}).items():
            rows, gaps = tables[column], {key: entry["gap"] for key, entry in block["gaps"].items()}
            for group, values in (*block["groups"].items(), ("Largest gap", gaps)):
                rows[group][f"n {name}"] = str(values.get("n", ""))
                rows[group] |= {title.format(name): number(values.get(key), *form) for key, title, *form in shown}
            p = {key: entry["p"] for key, entry in block["gaps"].items() if "p" in entry}
            rows["p of the gap"] |= {t.format(name): f"{p[key]:.3g}" for key, t, *_ in shown if key in p}
    frames = {column: pd.DataFrame.from_dict(rows, orient="index").fillna("") for column, rows in tables.items()}
    return {column: frame.loc[:, ~frame.isin(["", ABSENT]).all()] for column, frame in frames.items()}


def sanity_table(result: Mapping) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return each degraded set's metrics ("*": interval is apart), and their changes in half-widths of the first's."""
    models = result["sanity"]["models"]
    first = next(iter(models.values()))
    columns = [(f"{measure_of(result)} (%)", ("alignment", "{judge}", measure_of(result)), ".1f", 100)]
    for space in first.get("fidelity") or {}:
        for title, path, *form in FIDELITY:
            name = re.sub(" [↑↓]", "", title)
            columns += [(f"{name} ({space})", ("fidelity", space, "matched", *path), *form)]
    columns += [("LPIPS", ("perception", "LPIPS"), ".3f", 1), *((*entry, 1) for entry in _spread({"models": models}))]
    for space in first.get("memorisation") or {}:
        columns += [(f"Closer (%), {space}", ("memorisation", space, "share_closer"), ".1f", 100)]
        columns += [(f"Authentic (%), {space}", ("memorisation", space, "authenticity"), ".1f", 100)]
    judge, texts, moves = next(iter(first["alignment"])), defaultdict(dict), defaultdict(dict)
    for title, path, form, scale in columns:
        path = [judge if key == "{judge}" else key for key in path]
        base = dig(first, *path)
        for name, model in models.items():
            value, bracket, ends = number(now := dig(model, *path), form, scale).partition(" [")
            if isinstance(now, Mapping) and None not in (now["low"], base["low"]) and base["low"] < base["high"]:
                moves[title][name] = (now["value"] - base["value"]) / (base["high"] - base["low"]) * 2
                value += "*" * (now["low"] > base["high"] or now["high"] < base["low"])
            texts[title][name] = value + bracket + ends
    table = pd.DataFrame.from_dict(texts, orient="index")
    return table[(table != ABSENT).any(axis=1)], pd.DataFrame.from_dict(moves, orient="index")


def result_tables(result: Mapping) -> dict[str, tuple[pd.DataFrame, str]]:
    """Return by title the estimates in other commands' JSON files, by their path in it, and how they were computed."""
    tables = {}
    for file, content in result.get("results", {}).items():
        estimates = {": ".join(path).replace("_", " "): estimate for path, estimate in _estimates(content)}
        rows = {name: {"Value": number(value, ".3g"), "n": str(value["n"])} for name, value in estimates.items()}
        methods = "; ".join(dict.fromkeys(estimate["how"] for estimate in estimates.values()))
        title = content["title"] if content["title"] not in tables else f"{content['title']} ({file})"
        tables[title] = pd.DataFrame.from_dict(rows, orient="index"), f"Intervals: {methods}. From {file}."
    return tables


def nearness_table(result: Mapping) -> pd.DataFrame:
    """Return diversity within prompts and nearness to training images."""
    columns = [(f"{title} ↑", path, form, 1) for title, path, form in _spread(result)]
    for space in _union(side.get("memorisation") for side in sides(result).values()):
        path = "memorisation", space
        columns += [
            (f"Closer to training images (%), {space}", (*path, "share_closer"), ".2f", 100),
            (f"Threshold of closer, {space}", (*path, "threshold"), ".4g", 1),
            (f"Authentic ↑ (%), {space}", (*path, "authenticity"), ".1f", 100),
            ("Pixel copies of training images", (*path, "copies"), "d", 1),
        ]
    return _measures(columns, sides(result))

"""Effect of synthetic images on a classifier (table 4): measures, differences, intervals; as Markdown and CSV."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ddpo_pytorch.augmentation.plan import Draw
from ddpo_pytorch.data.isic import CAPTIONS, short_caption
from ddpo_pytorch.judges.classifier_report import measure, resampled
from ddpo_pytorch.metrics.tables import to_markdown

MEASURES = ("f1", "accuracy", "auc")
MACRO = "macro average"
RESAMPLES = 2000
UNDEFINED = "-"
TITLES = {"f1": "F1", "accuracy": "accuracy (%)", "auc": "AUC"}
COLUMNS = ("group", "attribute", "training", "measure", "mean", "sd", "difference", "low", "high", "p")
COLUMNS += ("seeds_agree", "resamples", "images", "support")
Row = Mapping[str, Any]


def compare(
    logits: Mapping[str, np.ndarray],
    truth: np.ndarray,
    names: Sequence[str],
    chosen: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure classifiers on the same test images, and compare them with those of the first training set.

    `logits`: (S, N, H) by training set, S seeds each; `truth` (N, H) bool; `chosen` (N,) bool, the images to include.
    Returns a row for each attribute of `names` and their macro average, each training set and each of `MEASURES`:

    - mean and sd (n - 1) over seeds, values of each seed, images, and support, the images with the attribute;
    - difference of the mean from the first training set's, with the 2.5 % and 97.5 % quantiles (low, high) of a
      bootstrap over all N test images, with the same resamples for all seeds and training sets;
    - p = 2 min(P(difference <= 0), P(difference >= 0)) over resamples, with the observed one included in both;
    - seeds_agree: for all seeds, the difference from the first training set at that seed has the same sign.

    Undefined values are None: AUC with one class absent, F1 without support, sd of one seed. The macro average is over
    the attributes that are defined; resamples with an undefined measure are ignored. Returns [] if no image is chosen.
    """
    keep = np.ones(len(truth), bool) if chosen is None else chosen
    if not keep.any():
        return []
    first, every = next(iter(logits)), np.ones((1, len(truth)))
    support = truth[keep].sum(0)
    both_classes = (support > 0) & (support < keep.sum())
    # (H, measures), in the order of MEASURES
    defined = np.stack([support > 0, np.full(len(support), True), both_classes], -1)

    def scores(name: str, weights: np.ndarray) -> np.ndarray:
        """Return (S, R, H + 1, measures) of R resamples, with the macro average last."""
        measured = [measure(of_seed[keep], truth[keep], weights[:, keep]) for of_seed in logits[name]]
        for one in measured:  # without support, F1 is 0 or undefined for any classifier
            one["f1"] = np.where(one["tp"] + one["fn"] > 0, one["f1"], np.nan)
        values = np.stack([np.stack([one[key] for key in MEASURES], -1) for one in measured])
        with np.errstate(invalid="ignore"):
            macro = np.where(defined, values, 0).sum(2, keepdims=True) / defined.sum(0)
        return np.concatenate([values, macro], 2)

    point = {name: scores(name, every)[:, 0] for name in logits}
    means = {}  # (resamples, H + 1, measures), of the same resamples for all training sets
    for name in logits:
        parts = [scores(name, weights).mean(0) for weights in resampled(len(truth), resamples, seed)]
        means[name] = np.concatenate(parts)
    rows, support = [], [*support.tolist(), None]
    for column, attribute in enumerate((*names, MACRO)):
        for name in logits:
            for index, key in enumerate(MEASURES):
                values = point[name][:, column, index]
                known = not np.isnan(values).any()
                row = {"attribute": attribute, "training": name, "measure": key, "images": int(keep.sum())}
                row |= {"support": support[column], "mean": float(values.mean()) if known else None}
                row["sd"] = float(values.std(ddof=1)) if known and len(values) > 1 else None
                row["values"] = values.tolist() if known else [None] * len(values)
                if name != first:
                    of_each_seed = values - point[first][:, column, index]
                    row |= _difference(of_each_seed, (means[name] - means[first])[:, column, index])
                rows.append(row)
    return rows


def _difference(of_each_seed: np.ndarray, resampled_means: np.ndarray) -> dict[str, Any]:
    observed, values = of_each_seed.mean(), resampled_means[~np.isnan(resampled_means)]
    if np.isnan(observed) or not len(values):
        return dict.fromkeys(("difference", "low", "high", "p", "seeds_agree")) | {"resamples": 0}
    low, high = np.quantile(values, [0.025, 0.975])
    p = min(1.0, 2 * (min((values <= 0).sum(), (values >= 0).sum()) + 1) / (len(values) + 1))
    agree = bool((of_each_seed > 0).all() or (of_each_seed < 0).all())
    numbers = {"difference": observed, "low": low, "high": high, "p": p}
    return {key: float(value) for key, value in numbers.items()} | {"seeds_agree": agree, "resamples": len(values)}


def subgroups(
    real: Mapping[str, int], test: Mapping[str, int], minor: Container[str], drawn: Mapping[str, Draw]
) -> dict[str, dict[str, Any]]:
    """Return by caption the number of real training and test images, and of synthetic and missing ones by training."""
    return {
        caption: {"real": real.get(caption, 0), "test": test.get(caption, 0), "minority": caption in minor}
        | {"synthetic": {name: draw.counts.get(caption, 0) for name, draw in drawn.items()}}
        | {"missing": {name: draw.missing[caption] for name, draw in drawn.items() if caption in draw.missing}}
        for caption in CAPTIONS
        if real.get(caption) or test.get(caption)
    }


def markdown(rows: Sequence[Row], metadata: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown.

    `rows`: from `compare`, each with a "group", "all" or "minority". `metadata`: "seeds", "minority_share", the number
    of "test_images", and "subgroups" from the function of that name.
    """
    everyone, minor = ([row for row in rows if row["group"] == group] for group in ("all", "minority"))
    groups, share, seeds = metadata["subgroups"], 100 * metadata["minority_share"], metadata["seeds"]
    differences = sum(row.get("difference") is not None for row in rows)
    parts = [
        "# Table 4: classifiers trained on real and on synthetic images\n",
        f"Mean ± standard deviation over {len(seeds)} training runs (seeds {', '.join(map(str, seeds))}) on the same "
        "real validation and test images, with the same number of updates per epoch. An attribute is present where its "
        "probability is above 0.5.\n",
        "Differences are from training on real images alone, with a 95 % interval and a two-sided p from "
        f"{RESAMPLES} paired resamples of the test images: they cover the choice of test images, not that of seeds. * "
        "marks an interval without 0, *? one where the seeds disagree on the sign. By chance, about "
        f"{0.05 * differences:.0f} of {differences} differences would have such an interval.\n",
        f"'{UNDEFINED}' is undefined: AUC with one class absent, F1 without a positive. Macro averages leave it out.\n",
    ]
    if any(group["missing"] for group in groups.values()):
        parts.append("**Samples were missing**: in the last table, 'n of m' is n where m were requested.\n")
    if len(seeds) < 3:
        parts.append(f"**{len(seeds)} seed(s) are too few** to tell differences from chance; give 3.\n")
    names = [short_caption(caption) for caption, group in groups.items() if group["minority"] and group["test"]]
    parts += [
        f"## All test images: {metadata['test_images']}\n",
        *_tables(everyone),
        "## Minority subgroups\n",
        f"The {minor[0]['images'] if minor else 0} test images whose combination of labels makes up less than "
        f"{share:g} % of the real training images ({', '.join(names) or 'none'}).\n",
        *(_tables(minor) if minor else ()),
        "## Images by subgroup\n",
    ]
    # "n of m" if m were requested and only n found, and sums
    every = list(groups.values())
    counts = pd.DataFrame([{"test": group["test"], "real": group["real"]} | group["synthetic"] for group in every])
    missing = pd.DataFrame([group["missing"] for group in every], columns=counts.columns).fillna(0).astype(int)
    counts.loc["all"], missing.loc["all"] = counts.sum(), missing.sum()
    cells = counts.astype(str).where(missing == 0, counts.astype(str) + " of " + (counts + missing).astype(str))
    cells.insert(0, "labels", [*map(short_caption, groups), "all"])
    cells.insert(1, "minority", [*("yes" if group["minority"] else "" for group in every), ""])
    return "\n".join([*parts, to_markdown(cells.rename(columns=lambda name: name.replace("real + ", "+ ")))])


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of F1 / accuracy as in the paper, then a table per attribute with all measures."""
    cells = pd.DataFrame([{key: row[key] for key in ("attribute", "training")} | _cells(row) for row in rows])
    pairs = cells[cells["measure"] != "auc"].groupby(["training", "attribute"], sort=False)["short"].agg(" / ".join)
    yield to_markdown(pairs.unstack(sort=False).rename_axis("F1 / accuracy (%)").reset_index())
    for attribute, group in cells.groupby("attribute", sort=False):
        parts = [
            part.set_index("training")[["mean", "difference", "p"]].rename(columns={"mean": TITLES[key]})
            for key, part in group.groupby("measure", sort=False)
        ]
        row = next(row for row in rows if row["attribute"] == attribute)
        support = "" if row["support"] is None else f": in {row['support']} of {row['images']} images"
        table = pd.concat(parts, axis=1).rename_axis("trained on").reset_index()
        yield f"### {attribute}{support}\n\n{to_markdown(table)}"


def _cells(row: Row) -> dict[str, str]:
    """Format a row: the mean as in the paper, the mean with sd, the difference and its p."""
    scale, digits = (100, 2) if row["measure"] == "accuracy" else (1, 3)
    star, difference, p = "", "", ""
    if "difference" in row and row["difference"] is None:
        difference = p = UNDEFINED
    elif "difference" in row:
        if not row["low"] <= 0 <= row["high"]:
            star = "*" if row["seeds_agree"] else "*?"  # two "(*)" in a cell would be emphasis in Markdown
        difference = "{} [{}, {}]".format(*(f"{scale * row[key]:+.{digits}f}" for key in ("difference", "low", "high")))
        difference, p = difference + star, "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
    mean = UNDEFINED if row["mean"] is None else f"{scale * row['mean']:.{digits}f}"
    sd = "" if row["sd"] is None else f" ± {scale * row['sd']:.{digits}f}"
    return {"measure": row["measure"], "difference": difference, "p": p, "short": mean + star, "mean": mean + sd}


def as_csv(rows: Sequence[Row]) -> str:
    """Return CSV with a line per group, attribute, training set and measure, as ratios; undefined cells are empty."""
    table = pd.DataFrame(rows)
    values = pd.DataFrame(table.pop("values").tolist()).rename(columns=lambda number: f"value_{number + 1}")
    integers = dict.fromkeys(("resamples", "images", "support"), "Int64") | {"seeds_agree": "boolean"}
    return pd.concat([table.reindex(columns=COLUMNS).astype(integers), values], axis=1).to_csv(index=False)

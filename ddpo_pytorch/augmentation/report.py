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
COLUMNS = ("group", "attribute", "training", "measure", "mean", "sd", "difference", "low", "high", "p") + (
    "seeds_agree", "resamples", "images", "support"
)  # fmt: skip
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
    defined = ~np.isnan(_scores(logits[first][0], truth, every, keep)[0])

    def of_seeds(name: str, weights: np.ndarray) -> np.ndarray:
        """Return (S, R, H + 1, measures), with the macro average last."""
        values = np.stack([_scores(seed_logits, truth, weights, keep) for seed_logits in logits[name]])
        with np.errstate(invalid="ignore"):
            macro = np.where(defined, values, 0).sum(2, keepdims=True) / defined.sum(0)
        return np.concatenate([values, macro], 2)

    point = {name: of_seeds(name, every)[:, 0] for name in logits}
    samples = {name: [] for name in logits}
    for weights in resampled(len(truth), resamples, seed):
        for name in logits:
            samples[name].append(of_seeds(name, weights).mean(0))
    means = {name: np.concatenate(parts) for name, parts in samples.items()}

    rows, support = [], truth[keep].sum(0).tolist()
    for column, attribute in enumerate((*names, MACRO)):
        for name in logits:
            for index, key in enumerate(MEASURES):
                values = point[name][:, column, index]
                row = {"attribute": attribute, "training": name, "measure": key, "images": int(keep.sum())}
                row |= {"support": None if attribute == MACRO else support[column]} | _over_seeds(values)
                if name != first:
                    of_each_seed = values - point[first][:, column, index]
                    row |= _difference(of_each_seed, (means[name] - means[first])[:, column, index])
                rows.append(row)
    return rows


def _scores(logits: np.ndarray, truth: np.ndarray, weights: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return (R, H, measures) of one classifier."""
    measured = measure(logits[keep], truth[keep], weights[:, keep])
    # without support, F1 is 0 or undefined for any classifier
    measured["f1"] = np.where(measured["tp"] + measured["fn"] > 0, measured["f1"], np.nan)
    return np.stack([measured[key] for key in MEASURES], -1)


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    if np.isnan(values).any():
        return {"mean": None, "sd": None, "values": [None] * len(values)}
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "sd": sd, "values": values.tolist()}


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
    parts += [f"## All test images: {metadata['test_images']}\n", *_tables(everyone), "## Minority subgroups\n"]
    names = [short_caption(caption) for caption, group in groups.items() if group["minority"] and group["test"]]
    parts.append(
        f"The {minor[0]['images'] if minor else 0} test images whose combination of labels makes up less than "
        f"{share:g} % of the real training images ({', '.join(names) or 'none'}).\n"
    )
    parts += _tables(minor) if minor else []
    return "\n".join([*parts, "## Images by subgroup\n", _subgroup_table(groups)])


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of F1 / accuracy as in the paper, then a table per attribute with all measures."""
    cells = pd.DataFrame([{key: row[key] for key in ("attribute", "training")} | _cells(row) for row in rows])
    pairs = cells[cells["measure"] != "auc"].groupby(["training", "attribute"], sort=False)["short"].agg(" / ".join)
    summary = pairs.unstack(sort=False).rename_axis("F1 / accuracy (%)").reset_index()
    yield to_markdown(summary)
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
    star, mean = "", _value(row, row["mean"])
    cells = {"measure": row["measure"], "difference": "", "p": ""}
    if "difference" in row and row["difference"] is None:
        cells |= {"difference": UNDEFINED, "p": UNDEFINED}
    elif "difference" in row:
        if not row["low"] <= 0 <= row["high"]:
            star = "*" if row["seeds_agree"] else "*?"  # two "(*)" in a cell would be emphasis in Markdown
        difference, low, high = (_value(row, row[key], "+") for key in ("difference", "low", "high"))
        cells["difference"] = f"{difference} [{low}, {high}]{star}"
        cells["p"] = "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
    sd = "" if row["sd"] is None else f" ± {_value(row, row['sd'])}"
    return cells | {"short": f"{mean}{star}", "mean": f"{mean}{sd}"}


def _value(row: Row, value: float | None, sign: str = "") -> str:
    if value is None:
        return UNDEFINED
    return format(100 * value, f"{sign}.2f") if row["measure"] == "accuracy" else format(value, f"{sign}.3f")


def _subgroup_table(groups: Mapping[str, Mapping]) -> str:
    """Return the images of each occurring caption, "n of m" if m were requested and only n found, and their sums."""
    every = list(groups.values())
    counts = pd.DataFrame([{"test": group["test"], "real": group["real"]} | group["synthetic"] for group in every])
    missing = pd.DataFrame([group["missing"] for group in every], columns=counts.columns).fillna(0).astype(int)
    counts.loc["all"], missing.loc["all"] = counts.sum(), missing.sum()
    cells = counts.astype(str).where(missing == 0, counts.astype(str) + " of " + (counts + missing).astype(str))
    cells.insert(0, "labels", [*map(short_caption, groups), "all"])
    cells.insert(1, "minority", [*("yes" if group["minority"] else "" for group in every), ""])
    cells.columns = [name.replace("real + ", "+ ") for name in cells]
    return to_markdown(cells)


def as_csv(rows: Sequence[Row]) -> str:
    """Return CSV with a line per group, attribute, training set and measure, as ratios; undefined cells are empty."""
    table = pd.DataFrame(rows)
    values = pd.DataFrame(table.pop("values").tolist()).rename(columns=lambda number: f"value_{number + 1}")
    integers = dict.fromkeys(("resamples", "images", "support"), "Int64") | {"seeds_agree": "boolean"}
    return pd.concat([table.reindex(columns=COLUMNS).astype(integers), values], axis=1).to_csv(index=False)

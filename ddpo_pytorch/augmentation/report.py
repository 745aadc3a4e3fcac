"""Table 4 as Markdown and CSV, from the rows of `augmentation.compare`."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from ddpo_pytorch.augmentation.compare import MEASURES, RESAMPLES
from ddpo_pytorch.augmentation.plan import Draw
from ddpo_pytorch.data.isic import CAPTIONS, short_caption
from ddpo_pytorch.metrics.tables import to_markdown

UNDEFINED = "-"
TITLES = {"f1": "F1", "accuracy": "accuracy (%)", "auc": "AUC"}
COLUMNS = ("group", "attribute", "training", "measure", "mean", "sd", "difference", "low", "high", "p") + (
    "seeds_agree", "resamples", "images", "support"
)  # fmt: skip
Row = Mapping[str, Any]


def subgroups(
    real: Mapping[str, int], test: Mapping[str, int], minor: Container[str], drawn: Mapping[str, Draw]
) -> dict[str, dict[str, Any]]:
    """Return by caption the real training and test images, and synthetic and missing ones by training set."""
    return {
        caption: {
            "real": real.get(caption, 0),
            "test": test.get(caption, 0),
            "minority": caption in minor,
            "synthetic": {name: draw.counts.get(caption, 0) for name, draw in drawn.items()},
            "missing": {name: draw.missing[caption] for name, draw in drawn.items() if caption in draw.missing},
        }
        for caption in CAPTIONS
        if real.get(caption) or test.get(caption)
    }


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return the whole report.

    `rows`: those of `compare`, with a "group", "all" or "minority". `about`: seeds, minority_share, number of
    test_images, and "subgroups" as the function of that name returns them.
    """
    everyone, minor = ([row for row in rows if row["group"] == group] for group in ("all", "minority"))
    groups, share = about["subgroups"], 100 * about["minority_share"]
    parts = ["# Table 4: classifiers trained on real and on synthetic images\n", _introduction(rows, about)]
    parts += [f"## All test images: {about['test_images']}\n", *_tables(everyone), "## Minority subgroups\n"]
    if minor:
        names = [short_caption(caption) for caption, group in groups.items() if group["minority"] and group["test"]]
        parts.append(
            f"The {minor[0]['images']} test images whose combination of labels makes up less than {share:g} % of the "
            f"real training images ({', '.join(names)}).\n"
        )
        parts += _tables(minor)
    else:
        parts.append(f"No test image has a combination of labels below {share:g} % of the real training images.\n")
    return "\n".join([*parts, "## Images by subgroup\n", _subgroup_table(groups)])


def _introduction(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    seeds = about["seeds"]
    differences = sum(row.get("difference") is not None for row in rows)
    parts = [
        f"Mean ± standard deviation over {len(seeds)} trainings (seeds {', '.join(map(str, seeds))}). An attribute is "
        "present where its probability is above 0.5. All trainings have the same real validation and test images, "
        "epochs at most and updates per epoch; those of one seed start from the same weights and differ in the samples "
        "drawn.",
        "Differences are to the training on real images alone, of the means over seeds, with a 95 % interval and a "
        f"two-sided p from {RESAMPLES} paired resamples of the test images. Both cover the choice of test images, not "
        "that of seeds: a difference should also be large compared with the standard deviations. * marks an interval "
        "without 0, *? one where the seeds disagree on the sign. By chance, about "
        f"{0.05 * differences:.0f} of {differences} differences would have such an interval, more where trainings "
        "scatter.",
        f"Undefined is '{UNDEFINED}': AUC with one class absent, F1 without a positive. Macro averages leave it out.",
    ]
    if any(group["missing"] for group in about["subgroups"].values()):
        parts.append("**Samples were missing**: in the last table, 'n of m' is n where m were requested.")
    if len(seeds) < 3:
        parts.append(f"**{len(seeds)} seed(s) are too few** to tell a difference from the luck of a training; give 3.")
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of F1 / accuracy as in the paper, then one per attribute with all measures."""
    cells = pd.DataFrame([{key: row[key] for key in ("attribute", "training")} | _cells(row) for row in rows])
    pairs = cells[cells["measure"] != "auc"].groupby(["training", "attribute"], sort=False)["short"].agg(" / ".join)
    summary = pairs.unstack(sort=False).rename_axis("F1 / accuracy (%)").reset_index()
    yield to_markdown(summary)
    for attribute, own in cells.groupby("attribute", sort=False):
        header, columns = ["trained on"], [own["training"].unique()]
        for key in MEASURES:
            measured = own[own["measure"] == key]
            header += [TITLES[key], "difference", "p"]
            columns += [measured["mean"], measured["difference"], measured["p"]]
        row = next(row for row in rows if row["attribute"] == attribute)
        support = "" if row["support"] is None else f": in {row['support']} of {row['images']} images"
        table = pd.DataFrame(list(zip(*columns, strict=True)), columns=header)
        yield f"### {attribute}{support}\n\n{to_markdown(table)}"


def _cells(row: Row) -> dict[str, str]:
    """Return a row's texts: the mean as in the paper, the mean with sd, the difference and its p."""
    star, mean = _star(row), _value(row, row["mean"])
    sd = "" if row["sd"] is None else f" ± {_value(row, row['sd'])}"
    cells = {"measure": row["measure"], "short": f"{mean}{star}", "mean": f"{mean}{sd}", "difference": "", "p": ""}
    if "difference" not in row:
        return cells
    if row["difference"] is None:
        return cells | {"difference": UNDEFINED, "p": UNDEFINED}
    difference, low, high = (_value(row, row[key], "+") for key in ("difference", "low", "high"))
    p = "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
    return cells | {"difference": f"{difference} [{low}, {high}]{star}", "p": p}


def _star(row: Row) -> str:
    if row.get("difference") is None or row["low"] <= 0 <= row["high"]:
        return ""
    return "*" if row["seeds_agree"] else "*?"  # "(*)" twice in a cell would be Markdown's emphasis


def _value(row: Row, value: float | None, sign: str = "") -> str:
    if value is None:
        return UNDEFINED
    return format(100 * value, f"{sign}.2f") if row["measure"] == "accuracy" else format(value, f"{sign}.3f")


def _subgroup_table(groups: Mapping[str, Mapping]) -> str:
    """Return the images of each caption that occurs, "n of m" where m were requested and n found, and their sums."""
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
    """Return a line per group, attribute, training set and measure; empty is undefined. Measures are ratios."""
    table = pd.DataFrame(rows)
    values = pd.DataFrame(table.pop("values").tolist()).rename(columns=lambda number: f"value_{number + 1}")
    whole = dict.fromkeys(("resamples", "images", "support"), "Int64") | {"seeds_agree": "boolean"}
    return pd.concat([table.reindex(columns=COLUMNS).astype(whole), values], axis=1).to_csv(index=False)

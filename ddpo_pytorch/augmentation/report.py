"""Table 4 as Markdown and CSV, from the rows of `augmentation.compare`."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from ddpo_pytorch.augmentation.compare import MEASURES, RESAMPLES
from ddpo_pytorch.augmentation.plan import Draw
from ddpo_pytorch.data.isic import CAPTIONS, short_caption
from ddpo_pytorch.data.tables import table_text
from ddpo_pytorch.metrics.tables import markdown_table

UNDEFINED = "-"
TITLES = {"f1": "F1", "accuracy": "accuracy (%)", "auc": "AUC"}
COLUMNS = ("group", "attribute", "training", "measure", "mean", "sd", "difference", "low", "high", "p") + (
    "seeds_agree", "resamples", "images", "support"
)  # fmt: skip
Row = Mapping[str, Any]


def subgroups(
    real: Mapping[str, int], test: Mapping[str, int], minor: Container[str], drawn: Mapping[str, Draw]
) -> dict[str, dict[str, Any]]:
    """By caption that occurs: its real training and test images, and synthetic and missing ones by training set."""
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
    """The whole report.

    `rows` have a "group", "all" or "minority", beside what `compare` gives. `about` has seeds, minority_share, the
    number of test_images, and "subgroups" as the function of that name gives them.
    """
    everyone, minor = ([row for row in rows if row["group"] == group] for group in ("all", "minority"))
    groups, share = about["subgroups"], 100 * about["minority_share"]
    parts = ["# Table 4: classifiers trained on real and on synthetic images\n", _reading(rows, about)]
    parts.append(f"## All test images: {about['test_images']}\n\n{_headline(everyone)}")
    parts += _attributes(everyone)
    parts.append("## Minority subgroups\n")
    names = [short_caption(caption) for caption, group in groups.items() if group["minority"] and group["test"]]
    if minor:
        parts.append(
            f"The {minor[0]['images']} test images whose combination of labels makes up less than {share:g} % of the "
            f"real training images ({', '.join(names)}).\n\n{_headline(minor)}"
        )
        parts += _attributes(minor)
    else:
        parts.append(f"No test image has a combination of labels below {share:g} % of the real training images.\n")
    parts.append(f"## Images by subgroup\n\n{_subgroup_table(groups)}")
    return "\n".join(parts)


def _reading(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    seeds, differences = about["seeds"], [row for row in rows if row.get("difference") is not None]
    lines = [
        f"Mean ± standard deviation over {len(seeds)} trainings (seeds {', '.join(map(str, seeds))}); present is what "
        "has a probability above 0.5. All trainings have the same real validation and test images, epochs at most and "
        "updates in an epoch; those of one seed begin with the same weights and differ in the samples drawn.",
        "",
        "Differences are to the training on real images alone, of the means over seeds, with a 95 % interval and a "
        f"two-sided p from {RESAMPLES} paired resamples of the test images. Both cover the choice of test images, not "
        "that of seeds: a difference is to be believed if it is also large beside the standard deviations. "
        "* marks an interval without 0, *? one where seeds do not even agree on the sign; of "
        f"{len(differences)} differences, about {0.05 * len(differences):.0f} would have such an interval by chance, "
        "and more where trainings scatter.",
        "",
        f"Undefined is '{UNDEFINED}': AUC with one class absent, F1 without a positive. Macro averages leave it out.",
    ]
    if any(group["missing"] for group in about["subgroups"].values()):
        lines += ["", "**Samples were missing**: in the last table, 'n of m' is n where m were asked for."]
    if len(seeds) < 3:
        lines += ["", f"**{len(seeds)} seed(s) are too few** to tell a difference from the luck of a training; give 3."]
    return "\n".join(lines) + "\n"


def _headline(rows: Sequence[Row]) -> str:
    """The paper's form: F1 / accuracy, a row a training set, a column an attribute."""
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    found = {(row["training"], row["attribute"], row["measure"]): row for row in rows}
    lines = []
    for training in dict.fromkeys(row["training"] for row in rows):
        cells = []
        for attribute in attributes:
            pair = [found[training, attribute, key] for key in ("f1", "accuracy")]
            cells.append(" / ".join(f"{_value(row, row['mean'])}{_star(row)}" for row in pair))
        lines.append([training, *cells])
    return markdown_table(["F1 / accuracy (%)", *attributes], lines)


def _attributes(rows: Sequence[Row]) -> list[str]:
    """A table for each attribute: a row a training set, each measure with its difference and p."""
    header = ["trained on"]
    for key in MEASURES:
        header += [TITLES[key], "difference", "p"]
    parts = []
    for attribute in dict.fromkeys(row["attribute"] for row in rows):
        own = [row for row in rows if row["attribute"] == attribute]
        lines = []
        for training in dict.fromkeys(row["training"] for row in own):
            cells = {row["measure"]: row for row in own if row["training"] == training}
            lines.append([training, *(cell for key in MEASURES for cell in _cells(cells[key]))])
        support = "" if own[0]["support"] is None else f": in {own[0]['support']} of {own[0]['images']} images"
        parts.append(f"### {attribute}{support}\n\n{markdown_table(header, lines)}")
    return parts


def _subgroup_table(groups: Mapping[str, Mapping]) -> str:
    """Images of each caption that occurs, "n of m" where m were asked for and n are there."""
    trainings = list(next(iter(groups.values()))["synthetic"])
    header = ["labels", "minority", "test", "real", *(f"+ {name.removeprefix('real + ')}" for name in trainings)]
    lines = []
    for caption, group in groups.items():
        synthetic = [_of(group["synthetic"][name], group["missing"].get(name, 0)) for name in trainings]
        counts = [str(group["test"]), str(group["real"]), *synthetic]
        lines.append([short_caption(caption), "yes" if group["minority"] else "", *counts])
    sums = [str(sum(group[key] for group in groups.values())) for key in ("test", "real")]
    for name in trainings:
        missing = sum(group["missing"].get(name, 0) for group in groups.values())
        sums.append(_of(sum(group["synthetic"][name] for group in groups.values()), missing))
    return markdown_table(header, [*lines, ["all", "", *sums]])


def _of(count: int, missing: int) -> str:
    return f"{count} of {count + missing}" if missing else str(count)


def _cells(row: Row) -> tuple[str, str, str]:
    sd = "" if row["sd"] is None else f" ± {_value(row, row['sd'])}"
    mean = f"{_value(row, row['mean'])}{sd}"
    if "difference" not in row:
        return mean, "", ""
    if row["difference"] is None:
        return mean, UNDEFINED, UNDEFINED
    difference, low, high = (_value(row, row[key], "+") for key in ("difference", "low", "high"))
    return mean, f"{difference} [{low}, {high}]{_star(row)}", "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _star(row: Row) -> str:
    if row.get("difference") is None or row["low"] <= 0 <= row["high"]:
        return ""
    return "*" if row["seeds_agree"] else "*?"  # "(*)" twice in a cell would be Markdown's emphasis


def _value(row: Row, value: float | None, sign: str = "") -> str:
    if value is None:
        return UNDEFINED
    return format(100 * value, f"{sign}.2f") if row["measure"] == "accuracy" else format(value, f"{sign}.3f")


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each group, attribute, training set and measure; empty is undefined. Measures are ratios."""
    seeds = len(rows[0]["values"])
    columns = (*COLUMNS, *(f"value_{number}" for number in range(1, seeds + 1)))
    return table_text(
        columns, (row | {f"value_{number}": value for number, value in enumerate(row["values"], 1)} for row in rows)
    )

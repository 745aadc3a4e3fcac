"""The tables of fidelity, diversity and nearness to training images."""

from collections.abc import Mapping, Sequence

from ddpo_pytorch.report.cells import (
    Cell,
    Head,
    Table,
    count,
    counted,
    dig,
    estimate,
    in_folders,
    methods,
    plain,
    union,
)
from ddpo_pytorch.report.headline import REAL
from ddpo_pytorch.report.wording import wording_of

# rows of a fidelity table: key, title, what is good, form.
FIDELITY = (
    ("FID", "FID", "lower is better", ".4g"),
    ("KID", "KID", "lower is better", ".3g"),
    ("precision", "Precision", "0 to 1, higher is better", ".3f"),
    ("recall", "Recall", "0 to 1, higher is better", ".3f"),
    ("density", "Density", "higher is better", ".3f"),
    ("coverage", "Coverage", "0 to 1, higher is better", ".3f"),
)


def fidelity_tables(result: Mapping) -> list[Table]:
    """A table an extractor: for each model, real and generated images matched in prompt mix and number, and all."""
    models, tables = result.get("models") or {}, []
    for extractor in union(values.get("fidelity") for values in models.values()):
        blocks = {name: dig(values, "fidelity", extractor) for name, values in models.items()}
        columns = [
            (name, kind, block[kind])
            for name, block in blocks.items()
            for kind in ("matched", "unmatched")
            if dig(block, kind)
        ]
        if not columns:
            continue
        names = list(dict.fromkeys(name for name, _, _ in columns))
        header = [
            [Head(name, "", sum(column[0] == name for column in columns)) for name in names],
            [Head(kind) for _, kind, _ in columns],
        ]
        table = Table(f"Features of {_the(extractor)}", "", header, [], wide=len(columns) > 4)
        images = [_numbers(column, models[name].get("folders"), kind) for name, kind, column in columns]
        table.rows.append((Head("Images", "generated, real"), images))
        for key, title, small, form in FIDELITY:
            row = [dig(column, key) for _, _, column in columns]
            if any(row):
                cells = [estimate(one, form) if one else Cell("\u2013") for one in row]
                title = distance_name(extractor, key) if key in ("FID", "KID") else title
                table.rows.append((Head(title, small), cells))
        how = methods(dig(column, key) for _, _, column in columns for key, *_ in FIDELITY)
        table.text = _about(result, extractor) + (f" In brackets: 95 % intervals ({how})." if how else "")
        if extractor == "judge":
            table.text += f" {wording_of(result).caution}"
        tables.append(table)
    return tables


def distance_name(extractor: str, key: str = "FID") -> str:
    """FID and KID are distances in Inception's features, and no others."""
    return key if extractor == "inception" else {"FID": "Frechet distance", "KID": "Kernel distance"}[key]


def _the(extractor: str) -> str:
    return "the judge" if extractor == "judge" else extractor


def _numbers(column: Mapping, folders: Sequence[Mapping] | None, kind: str) -> Cell:
    """Images that a distance rests on; of a model's several folders each has its own distance, over as many."""
    number = count(column.get("n"))
    real = count(column["n_real"]) if column.get("n_real") is not None else number
    several = in_folders(column.get("n"), folders, kind == "unmatched") if len(folders or ()) > 1 else ""
    return Cell(f"{number}, {real}", several)


def _about(result: Mapping, extractor: str) -> str:
    network = dig(result, "networks", extractor) or {}
    features = counted(network["features"], "feature") if network.get("features") else ""
    text = ", ".join(str(part) for part in (network.get("what"), features) if part)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def diversity_table(result: Mapping) -> Table | None:
    """Spread of images of the same prompt: real images where measured, and the models."""
    sides = ({REAL: result["real"]} if result.get("real") else {}) | dict(result.get("models") or {})
    rows, quantities = [], []
    measures = [
        (("diversity", extractor, key), title, extractor, form)
        for extractor in union(values.get("diversity") for values in sides.values())
        for key, title, form in (
            ("vendi", "Vendi score", ".2f"),
            ("pairwise_distance", "Pairwise distance", ".4g"),
        )
    ]
    measures.append((("perception", "LPIPS_within"), "LPIPS within prompts", "AlexNet", ".3f"))
    for keys, title, small, form in measures:
        row = [dig(values, *keys) for values in sides.values()]
        if any(one and one.get("value") is not None for one in row):
            rows.append((Head(title, small), [estimate(one, form) if one else Cell("\u2013") for one in row]))
            quantities += row
    if not rows:
        return None
    how = methods(quantities)
    text = "Higher is more varied." + (f" In brackets: 95 % intervals ({how})." if how else "")
    return Table("Diversity", "", [[Head(name) for name in sides]], rows, text)


def memorisation_table(result: Mapping) -> Table | None:
    """Share of images nearer to training images than the threshold, for each extractor and model."""
    sides, rows, quantities = dict(result.get("models") or {}), [], []
    if dig(result, "real", "memorisation"):
        sides = {REAL: result["real"]} | sides
    for extractor in union(values.get("memorisation") for values in sides.values()):
        found = [dig(values, "memorisation", extractor) or {} for values in sides.values()]
        closer = [one.get("share_closer") for one in found]
        quantities += closer
        rows.append((Head("Share closer", f"%, {extractor}"), [estimate(one, ".2f", 100) for one in closer]))
        rows.append(
            (Head("Threshold", f"distance, {extractor}"), [Cell(plain(one.get("threshold"), ".4g")) for one in found])
        )
        rows.append((Head("Copies", "images, pixel for pixel"), [Cell(count(one.get("copies"))) for one in found]))
    if not rows:
        return None
    how = methods(quantities)
    text = f"In brackets: 95 % intervals ({how})." if how else ""
    return Table("Nearness to training images", "", [[Head(name) for name in sides]], rows, text)

"""The tables of fundus images: judges, distances and structure; and the document's table 1, image statistics."""

from collections.abc import Mapping

from ddpo_pytorch.report.cells import NOT_AVAILABLE, Cell, Head, Table, count, dig, estimate, finite, methods, plain
from ddpo_pytorch.report.findings import main_judge
from ddpo_pytorch.report.headline import REAL, brackets
from ddpo_pytorch.report.wording import FUNDUS, wording_of

# title, small type, where it stands in a model's block, form, scale
ROWS = (
    ("Selector", "mean score, higher is better", ("alignment", "fundus", "selector"), ".3f", 1),
    ("Pass rate", "% that the Selector passes", ("alignment", "fundus", "pass_rate"), ".2f", 100),
    ("Policy", "mean score, higher is better", ("alignment", "fundus", "policy"), ".3f", 1),
    ("Alignment", "%, Policy's score if it passes", ("alignment", "fundus", "alignment"), ".2f", 100),
    ("FID", "lower is better", ("fidelity", "inception", "matched", "FID"), ".2f", 1),
    ("KID", "lower is better", ("fidelity", "inception", "matched", "KID"), ".3g", 1),
    (
        "Frechet distance",
        "features of the Selector, lower is better",
        ("fidelity", "judge", "matched", "FID"),
        ".4g",
        1,
    ),
    ("Kernel distance", "features of the Selector, lower is better", ("fidelity", "judge", "matched", "KID"), ".3g", 1),
    ("Inception score", "1 or more, higher is better", ("inception_score", "IS"), ".2f", 1),
    ("SSIM", "to the paired image, higher is better", ("structure", "SSIM"), ".3f", 1),
    ("MS-SSIM", "pairs of any prompts, lower is more varied", ("structure", "MS_SSIM"), ".3f", 1),
    ("MS-SSIM, same prompt", "lower is more varied", ("structure", "MS_SSIM_within"), ".3f", 1),
)
ABOUT = {
    "legacy": "Whole frame, grey levels in [0, 1], as in the document's table 1.",
    "fov": "Inside the field of view, without its rim; of the green channel in [0, 1].",
}


W1 = " W1: Wasserstein distance of the images' values, in standard deviations of the real images."


def _sides(result: Mapping) -> dict[str, Mapping]:
    return ({REAL: result["real"]} if result.get("real") else {}) | dict(result.get("models") or {})


def fundus_table(result: Mapping) -> Table | None:
    """Judges, distances, inception score, structure of the models and the real images; what none has is left out."""
    if wording_of(result) is not FUNDUS or not result.get("models"):
        return None
    sides, quantities = dict(result["models"]) | ({REAL: result["real"]} if result.get("real") else {}), []
    heads = [Head(name, f"n = {count(values.get('images'))}") for name, values in sides.items()]
    table = Table("Fundus images: judges, distances, structure", "", [heads], [])
    for title, small, keys, form, scale in ROWS:
        found = [dig(values, *keys) for values in sides.values()]
        if any(finite(dig(one, "value")) is not None for one in found):
            cells = [estimate(one, form, scale) if one else Cell("\u2013") for one in found]
            if keys[-1] == "IS":
                spreads = [finite(dig(values, "inception_score", "sd")) for values in sides.values()]
                cells = [
                    cell if spread is None else Cell(cell.text, f"± {plain(spread)} over parts")
                    for cell, spread in zip(cells, spreads, strict=True)
                ]
            table.rows.append((Head(title, small), cells))
            quantities += found
    table.text = brackets(quantities)
    return table


def quality_tables(result: Mapping) -> list[Table]:
    """Table 1, a table a set of statistics: real images and models, and the models' distances to the real images."""
    sides, tables = _sides(result), []
    shape = dig(result, "settings", "image_shape") or ()
    where = f" At {shape[1]} x {shape[0]} px, generated and real." if len(shape) == 2 else ""
    names = list(dict.fromkeys(name for values in sides.values() for name in values.get("quality") or {}))
    for name in names:
        blocks = {side: dig(values, "quality", name) for side, values in sides.items() if dig(values, "quality", name)}
        compared = {side for side in blocks if side != REAL and REAL in blocks}
        header, second = [], []
        for side, block in blocks.items():
            header.append(Head(side, f"n = {count(block.get('images'))}", 4 if side in compared else 2))
            second += [Head("mean"), Head("sd")]
            second += [Head("difference", "to real"), Head("the same", "in sd of real")] if side in compared else []
        table, quantities = Table(f"Table 1. Image statistics: {name}", "", [header, second], [], wide=True), []
        for statistic in next(iter(blocks.values()))["statistics"]:
            cells = []
            for side, block in blocks.items():
                found = block["statistics"].get(statistic) or {}
                quantities += [found.get("mean"), found.get("difference")]
                cells += [estimate(found.get("mean"), ".4f"), Cell(plain(found.get("sd"), ".4f"))]
                if side in compared:
                    cells.append(estimate(found.get("difference"), "+.4f"))
                    apart = plain(found.get("wasserstein"))
                    small = "" if apart == NOT_AVAILABLE else f"W1 {apart}"
                    cells.append(Cell(plain(dig(found, "standardised", "value"), "+.2f"), small))
            table.rows.append((Head(statistic), cells))
        how = methods(quantities)
        without = {side: block["no_field"] for side, block in blocks.items() if block.get("no_field")}
        table.text = (
            ABOUT.get(name, "")
            + where
            + (W1 if compared else "")
            + (f" In brackets: 95 % intervals ({how})." if how else "")
        )
        if without:
            counts = ", ".join(f"{count(number)} of {side}" for side, number in without.items())
            table.text += f" Images without a field of view, left out: {counts}."
        tables.append(table)
    return tables


def judges_text(result: Mapping) -> str:
    """What the measure of alignment is, with the name of its judge."""
    words, judge = wording_of(result), main_judge(result)
    return words.explained.format(judge=f" ({judge})" if judge else "")

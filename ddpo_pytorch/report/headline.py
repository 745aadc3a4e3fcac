"""The first table of the page: every model's main numbers, their differences, and real images beside them."""

from collections.abc import Iterable, Mapping

from ddpo_pytorch.report.cells import (
    NOT_AVAILABLE,
    Cell,
    Head,
    Table,
    count,
    dig,
    estimate,
    finite,
    methods,
    plain,
    share,
    union,
)
from ddpo_pytorch.report.findings import apr_of, main_judge, pairing_note, partial, verdict
from ddpo_pytorch.report.wording import difference_of, wording_of

REAL = "real images"
# what a number needs beside the samples, and the words under which metrics.json may say why it is missing.
NEEDS_REAL = {"FID", "KID", "LPIPS", "FD_judge", "share closer"}
WORDS = {
    "FID": ("FID", "fidelity"),
    "KID": ("KID", "FID", "fidelity"),
    "FD_judge": ("FD_judge", "fidelity"),
    "LPIPS": ("LPIPS", "perception"),
    "share closer": ("memoris", "closer", "training"),
    "diversity": ("divers", "vendi"),
}


def reason_missing(result: Mapping, metric: str, model: str = "") -> str:
    """Why a number is n/a: what metrics.json says under `missing`, of this model first; else what was not given."""
    for missing in (dig(result, "models", model, "missing"), result.get("missing")):
        for word in WORDS.get(metric, (metric,)):
            for name, reason in (missing or {}).items():
                if word.lower() in name.lower():
                    return f"{name}: {reason}"
    sets = result.get("sets") or {}
    if metric in NEEDS_REAL and "real" not in sets:
        return f"{metric}: no real images were given to compare with"
    if metric == "share closer" and "train" not in sets:
        return f"{metric}: no training images were given"
    return f"{metric}: not measured, and metrics.json does not say why"


def all_missing(result: Mapping) -> dict[str, str]:
    """What could not be measured, and why: of the whole measurement, then of single models."""
    found = dict(result.get("missing") or {})
    for model, values in (result.get("models") or {}).items():
        found |= {f"{name} of {model}": reason for name, reason in (values.get("missing") or {}).items()}
    return found


def headline(result: Mapping) -> Table:
    """A row a metric, a column a model; then differences of APR, and real images where there are some."""
    models, judge, real = result.get("models") or {}, main_judge(result), result.get("real")
    words = wording_of(result)
    sides = models | ({REAL: real} if real else {})
    differences = [one for one in result.get("comparisons") or [] if verdict(one)]
    heads = [Head(name, _number(values, name == REAL)) for name, values in sides.items()]
    changes = [Head("difference", f"{one['to']} \u2212 {one['from']}") for one in differences]
    split = len(models)
    table = Table("The result in numbers", "", [heads[:split] + changes + heads[split:]], [])
    for metric, head, cells in _headline_rows(sides, models, judge, words.Measure):
        cells = [explained(table, result, metric, cell, name) for name, cell in zip(sides, cells, strict=True)]
        change = [_difference(table, one) if metric == "APR" else Cell("") for one in differences]
        table.rows.append((head, cells[:split] + change + cells[split:]))
        if metric == "APR" and any(finite(dig(values, "ceiling", "value")) is not None for values in models.values()):
            cells = [_ceiling(table, values) for values in sides.values()]
            head = Head(f"Ceiling of {words.measure}", "%, judge on real images mixed by caption as the model's")
            table.rows.append((head, cells[:split] + [Cell("")] * len(differences) + cells[split:]))
    quantities = [apr_of(values, judge) for values in sides.values()] + [difference_of(one) for one in differences]
    quantities += [values.get("ceiling") for values in models.values()]
    for values in sides.values():
        quantities += [with_interval(values, metric) for metric in ("FID", "KID", "LPIPS", "FD_judge")]
    tests = dict.fromkeys(one["test"] for one in differences if one.get("test"))
    table.text = brackets(quantities) + "".join(f" Tests of the difference: {test}." for test in tests)
    return table


def _number(values: Mapping, real: bool) -> str:
    folders = values.get("folders") or []
    several = f" in {len(folders)} folders" if len(folders) > 1 else ""
    return f"{'as they are, ' if real else ''}n = {count(values.get('images'))}{several}"


def _difference(table: Table, comparison: Mapping) -> Cell:
    cell, note = estimate(difference_of(comparison), "+.2f", 100), pairing_note(comparison)
    return Cell(cell.text, cell.small, table.note(note) if note else "")


def _ceiling(table: Table, values: Mapping) -> Cell:
    """The judge on real images in the mix of captions of a model, with a note where some have no real image."""
    cell, held = estimate(values.get("ceiling"), ".2f", 100), finite(values.get("ceiling_share"))
    if finite(dig(values, "ceiling", "value")) is None:
        return Cell("\u2013")
    if not partial(held):
        return cell
    note = f"the captions of {share(held)} of the model's images have real images; the ceiling is that of these"
    return Cell(cell.text, cell.small, table.note(note))


def _headline_rows(
    sides: Mapping, models: Mapping, judge: str | None, measure: str
) -> list[tuple[str, Head, list[Cell]]]:
    spread = next(iter(union(values.get("diversity") for values in sides.values())), None)
    near = next(iter(union(values.get("memorisation") for values in models.values())), None)
    each = list(sides.values())
    unit = f"Vendi score, {spread}" if spread else "Vendi score"
    rows = [("APR", Head(measure, "%, higher is better"), [estimate(apr_of(v, judge), ".2f", 100) for v in each])]
    for metric, small, form in (
        ("FID", "lower is better", ".2f"),
        ("KID", "lower is better", ".3g"),
        ("LPIPS", "to real images, lower is better", ".3f"),
        ("FD_judge", "in features of the judge, lower is better", ".4g"),
    ):
        title = "Frechet distance" if metric == "FD_judge" else metric
        rows.append((metric, Head(title, small), [estimate(with_interval(v, metric), form) for v in each]))
    if measure == "APR" or any(v.get("reward") is not None for v in each):
        rows.append(
            ("reward", Head("Reward", "mean, higher is better"), [Cell(plain(v.get("reward"), ".3f")) for v in each])
        )
    vendi = [estimate(dig(v, "diversity", spread, "vendi")) for v in each]
    rows.append(("diversity", Head("Diversity", f"{unit}, higher is more varied"), vendi))
    closer = [estimate(dig(v, "memorisation", near, "share_closer"), ".2f", 100) for v in each]
    small = "%, 1 % is expected of new real images" + (f", {near}" if near else "")
    return [*rows, ("share closer", Head("Closer to training images", small), closer)]


def explained(table: Table, result: Mapping, metric: str, cell: Cell, name: str) -> Cell:
    """A cell of this model, or of the real images; with a note saying why where it is n/a."""
    if cell.text != NOT_AVAILABLE:
        return cell
    return Cell("\u2013") if name == REAL else Cell(cell.text, "", table.note(reason_missing(result, metric, name)))


def with_interval(values: Mapping, metric: str) -> dict:
    """A headline number with the interval of the quantity that it was taken from, found by its value."""
    value, name = finite(values.get(metric)), "FID" if metric == "FD_judge" else metric
    blocks = (values.get("fidelity") or {}).values()
    distances = [dig(block, kind, name) for kind in ("matched", "unmatched") for block in blocks]
    for quantity in [dig(values, "perception", metric), *distances]:
        if value is not None and finite(dig(quantity, "value")) == value:
            return dict(quantity)
    return {"value": value}


def brackets(quantities: Iterable[Mapping | None]) -> str:
    """How the intervals in brackets were made; "" without any."""
    how = methods(quantities)
    return f"In brackets: 95 % intervals ({how})." if how else ""

"""The tables of alignment: tables 2 and 3, every prompt, every attribute, further judges."""

from collections.abc import Mapping, Sequence

from ddpo_pytorch.data.isic import DISEASES, PAPER_ORDER, SINGLE_ARTIFACT_CAPTIONS
from ddpo_pytorch.metrics.vocabulary import in_order
from ddpo_pytorch.report.cells import (
    Cell,
    Head,
    Table,
    count,
    counted,
    dig,
    estimate,
    finite,
    percent,
    union,
)
from ddpo_pytorch.report.findings import apr_of, main_judge
from ddpo_pytorch.report.headline import REAL, brackets, explained, with_interval
from ddpo_pytorch.report.wording import DERMOSCOPIC, wording_of


def table2(result: Mapping) -> Table | None:
    """The paper's table 2: the 8 captions with one artifact; real images above, and the judge's agreement on them."""
    if wording_of(result) is not DERMOSCOPIC:
        return None
    judge = main_judge(result)
    artifacts = [name for name in PAPER_ORDER if name not in DISEASES]
    captions = [SINGLE_ARTIFACT_CAPTIONS[disease, artifact] for disease in DISEASES for artifact in artifacts]
    header = [
        [Head(DISEASES[disease], "", len(artifacts)) for disease in DISEASES],
        [Head(artifact.replace("_", " ")) for _ in DISEASES for artifact in artifacts],
    ]
    table = Table("Table 2. Prompts with one artifact", "", header, [], wide=True)
    for key, title in (("real", "# Real sample"), ("train", "# Training sample")):
        numbers = dig(result, "sets", key, "images_by_prompt") or {}
        if any(numbers.values()):  # zeros everywhere: files whose captions are unknown
            table.rows.append((Head(title, "images"), [Cell(count(numbers.get(caption, 0))) for caption in captions]))
    shown = {}
    for name, values in _sides(result).items():
        quantities = [apr_of_prompt(values, judge, caption) for caption in captions]
        if any(finite(one.get("value")) is not None for one in quantities):
            head = Head("Judge on real images", "%, the ceiling") if name == REAL else Head(name, "APR, %")
            table.rows.append((head, [estimate(one, ".2f", 100, ".1f") for one in quantities]))
            shown[name] = quantities
    if not shown:
        return None
    table.text = "APR in percent. " + brackets(one for quantities in shown.values() for one in quantities)
    return table


def _sides(result: Mapping) -> dict[str, Mapping]:
    return ({REAL: result["real"]} if result.get("real") else {}) | dict(result.get("models") or {})


def apr_of_prompt(values: Mapping | None, judge: str | None, caption: str) -> dict:
    """APR of one caption as a quantity."""
    return dig(values, "alignment", judge, "by_prompt", caption) or {"value": dig(values, "APR_by_prompt", caption)}


def table3(result: Mapping) -> Table | None:
    """The paper's table 3 with intervals: all prompts together, a row a model."""
    if wording_of(result) is not DERMOSCOPIC:
        return None
    models, judge = result.get("models") or {}, main_judge(result)
    columns = [("APR", "% \u2191", ".2f"), ("FID", "\u2193", ".2f"), ("LPIPS", "\u2193", ".3f")]
    columns += [("FD_judge", "\u2193", ".4g"), ("reward", "\u2191", ".3f")]
    titles = {"FD_judge": "FD, judge", "reward": "Reward"}
    header = [[*(Head(titles.get(name, name), small) for name, small, _ in columns), Head("Images")]]
    table, quantities = Table("Table 3. All prompts", "", header, []), []
    for name, values in models.items():
        cells = []
        for metric, _, form in columns:
            quantity = apr_of(values, judge) if metric == "APR" else with_interval(values, metric)
            cell = estimate(quantity, form, 100 if metric == "APR" else 1)
            cells.append(explained(table, result, metric, cell, name))
            quantities.append(quantity)
        table.rows.append((Head(name), [*cells, Cell(count(values.get("images")))]))
    table.text = brackets(quantities)
    return table if table.rows else None


def prompt_table(result: Mapping) -> Table | None:
    """Every caption that has images: real images, and for each model images and APR."""
    judge, sides, measure = main_judge(result), _sides(result), wording_of(result).Measure
    counts = {name: values.get("images_by_prompt") or {} for name, values in sides.items()}
    counts[REAL] = counts.get(REAL) or dig(result, "sets", "real", "images_by_prompt") or {}
    listed = {c for numbers in counts.values() for c, number in numbers.items() if number}
    listed |= {c for v in sides.values() for c in [*(v.get("APR_by_prompt") or {}), *_judged(v, judge)]}
    if not listed:
        return None
    captions = in_order(listed)
    begin = common_beginning(captions)
    names = [name for name in counts if counts[name] or name in sides]
    names = [name for name in (REAL, *(result.get("models") or {})) if name in names]
    header = [
        [Head(name, "", 2) for name in names],
        [head for _ in names for head in (Head("n"), Head(measure, "%"))],
    ]
    table, quantities = (
        Table(
            "The only prompt" if len(captions) == 1 else f"All {len(captions)} prompts", "Prompt", header, [], wide=True
        ),
        [],
    )
    for caption in captions:
        cells = []
        for name in names:
            apr = apr_of_prompt(sides.get(name), judge, caption)
            number = counts[name].get(caption, 0) if counts[name] else apr.get("n")
            cells += [Cell(count(number)), estimate(apr, ".1f", 100)]
            quantities.append(apr)
        table.rows.append((Head(caption[len(begin) :]), cells))
    start = f"Each prompt begins with \u201c{begin.strip()}\u201d. " if begin else ""
    table.text = start + brackets(quantities)
    return table


def _judged(values: Mapping, judge: str | None) -> Mapping:
    return dig(values, "alignment", judge, "by_prompt") or {}


def common_beginning(texts: Sequence[str]) -> str:
    """The words, with the space behind them, with which all texts begin; "" for a single text."""
    if len(texts) < 2:
        return ""
    words = 0
    while all(len(text.split(" ")) > words + 1 for text in texts) and len({t.split(" ")[words] for t in texts}) == 1:
        words += 1
    return "".join(f"{word} " for word in texts[0].split(" ")[:words])


def attribute_tables(result: Mapping) -> list[Table]:
    """For each judge, precision and recall of the attributes that prompts request, models side by side."""
    sides, tables = _sides(result), []
    for judge in union(values.get("alignment") for values in sides.values()):
        found = {name: dig(values, "alignment", judge, "attributes") for name, values in sides.items()}
        found = {name: labels for name, labels in found.items() if labels}
        if not found:
            continue
        kinds = (("precision", "%"), ("recall", "%"), ("n", "asked, seen"))
        header = [
            [Head(name, "", len(kinds)) for name in found],
            [Head(kind, small) for _ in found for kind, small in kinds],
        ]
        table, quantities = Table(f"Attributes, judged by {judge}", "", header, [], wide=True), []
        for label in union(found.values()):
            cells = []
            for labels in found.values():
                values = labels.get(label) or {}
                quantities += [values.get("precision"), values.get("recall")]
                cells += [estimate(values.get(kind), ".1f", 100) for kind in ("precision", "recall")]
                cells.append(Cell(f"{count(values.get('requested'))}, {count(values.get('seen'))}"))
            table.rows.append((Head(label.replace("_", " ")), cells))
        table.text = (
            "Precision: share of the images in which the judge sees the attribute that were asked for it; recall: "
            "share of the images asked for it in which the judge sees it. " + brackets(quantities)
        )
        tables.append(table)
    return tables


def judge_table(result: Mapping) -> Table | None:
    """APR by every judge, where there are several."""
    sides, judges = _sides(result), result.get("judges") or {}
    names = union([judges, *(values.get("alignment") for values in sides.values())])
    if len(names) < 2 or wording_of(result) is not DERMOSCOPIC:
        return None
    heads = [Head(name, "APR, %, as they are" if name == REAL else "APR, %") for name in sides]
    table, quantities = Table("Further judges", "Judge", [heads], []), []
    for judge in names:
        labels = ", ".join(str(label).replace("_", " ") for label in dig(judges, judge, "labels") or ())
        row = [dig(values, "alignment", judge, "APR") for values in sides.values()]
        quantities += row
        table.rows.append((Head(judge, labels), [estimate(one, ".2f", 100) for one in row]))
    table.text = (
        "An image counts when all labels that a judge has agree with the prompt, so judges with more labels are "
        "stricter. " + brackets(quantities)
    )
    return table


def apr_line(result: Mapping, caption: str) -> str:
    """APR of one caption for all models, and its number of real images, in one line above its pictures."""
    judge, parts = main_judge(result), []
    for name, values in (result.get("models") or {}).items():
        apr = apr_of_prompt(values, judge, caption)
        if finite(apr.get("value")) is not None:
            parts.append(f"{name} {percent(apr['value'], '.1f')} %")
    real = dig(result, "sets", "real", "images_by_prompt")
    number = "" if real is None else counted(real.get(caption, 0), "real image")
    return "; ".join(
        part for part in (f"{wording_of(result).Measure} " + ", ".join(parts) if parts else "", number) if part
    )

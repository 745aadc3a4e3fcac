"""The report: one HTML file that loads nothing, with numbers, curves, pictures and cards of one measurement.

The templates hold the words and the layout of tables; `findings` holds the numbers behind the sentences.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpo_pytorch.metrics.image_sets import sort_captions
from ddpo_pytorch.metrics.tables import fundus_table, table2, table3
from ddpo_pytorch.report import findings
from ddpo_pytorch.report.curves import curves, read_runs
from ddpo_pytorch.report.findings import REAL, dig, union
from ddpo_pytorch.report.pictures import Album, Samples, closest_pairs, grids, rarest_first
from ddpo_pytorch.report.provenance import flatten, read_config
from ddpo_pytorch.utils.files import atomic_write

OPEN_GRIDS = 8  # prompts whose pictures are not folded away
MOST_GRIDS = 64  # prompts with pictures
MINI = "assets/mini/"  # folder of the weights of the phantom world
NOT_AVAILABLE = "n/a"


def write_report(output: str | Path, result: Mapping[str, Any], samples: Samples, runs: Sequence[Path]) -> Path:
    """Write `output`/report.html atomically and return its path.

    `result`: the content of metrics.json. `samples`: (file, caption) lists by name, "real" (optional) and the models in
    their order; equal stems of a caption are the same noise. `runs`: run folders of scripts/train.py. Image files that
    cannot be read are named among the page's warnings. Raises UserError for a run folder that cannot be read.
    """
    path = Path(output) / "report.html"
    text = environment().get_template("page.html.j2").render(page_content(result, samples, runs))
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@cache
def environment() -> Environment:
    """Return the templates, which escape every text, with the functions that they use."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, share, count, counted, interval, estimate, methods, flatten)
    functions = (number, cell, row, from_text, common_beginning, dig, union, Cell, Row)
    templates.filters |= {function.__name__: function for function in filters}
    templates.globals |= {function.__name__: function for function in functions}
    templates.globals |= {"findings": findings, "REAL": REAL}
    return templates


def page_content(result: Mapping, samples: Samples, runs: Sequence[Path]) -> dict[str, Any]:
    """Return the template's variables."""
    models, album = result["models"], Album()
    captions = list(dict.fromkeys(caption for files in samples.values() for _, caption in files))
    order = rarest_first(captions, dig(result, "sets", "real", "images_by_prompt"))[:MOST_GRIDS]
    pictures = grids(samples, order, album)
    memorised = [
        (name, extractor, block)
        for name, values in models.items()
        for extractor, block in (values.get("memorisation") or {}).items()
    ]
    sheets = [(name, extractor, closest_pairs(block["closest"], name, album)) for name, extractor, block in memorised]
    shown = sum(picture is not None for grid in pictures for picture in dict(grid.rows).get("real", ()))
    shown += sum(pair.training is not None for *_, pairs in sheets for pair in pairs)
    configs = [(Path(run).name, config) for run in runs if (config := read_config(run))]
    files = {"real": [path for path, _ in samples.get("real", ())]}
    files["train"] = [pair["train"] for *_, block in memorised for pair in block["closest"]]
    return {
        "result": result,
        "models": models,
        "real": result.get("real"),
        "sides": findings.sides(result),
        "fundus": result.get("kind") == "fundus",
        "measure": findings.measure_of(result),
        "judge": findings.main_judge(result),
        "created": _moment(result["created"]),
        "comparisons": findings.comparisons(result),
        "changes": findings.changes_of_diversity(result),
        **_main_tables(result),
        "captions": sort_captions(_measured_captions(result)),
        "curves": curves(read_runs(runs)),
        "grids": pictures[:OPEN_GRIDS],
        "more_grids": pictures[OPEN_GRIDS:],
        "all_prompts": len(captions),
        "memorised": memorised,
        "sheets": [sheet for sheet in sheets if sheet[2]],
        "real_thumbnails": shown,
        "first_file": {name: Path(paths[0]).name for name, paths in files.items() if paths},
        "configs": configs,
        "mini_generator": any(MINI in str(dig(config, "pretrained", "model")) for _, config in configs),
        "mini_judge": MINI in str(result["settings"]["classifier"]),
        "unreadable": album.unreadable,
    }


def _moment(created: str) -> str:
    return f"{datetime.fromisoformat(created):%d %B %Y, %H:%M %Z}"


def _main_tables(result: Mapping) -> dict[str, pd.DataFrame]:
    models, real = result["models"], result.get("real")
    if result.get("kind") == "fundus":
        return {"fundus_table": fundus_table(models, real, result["fid_part"])}
    counts = dig(result, "sets", "real", "images_by_prompt")
    return {"table2": table2(models, real, counts), "table3": table3(models, result["fid_part"])}


def _measured_captions(result: Mapping) -> set[str]:
    counts = [values["images_by_prompt"] for values in result["models"].values()]
    counts.append(dig(result, "sets", "real", "images_by_prompt") or {})
    return {caption for numbers in counts for caption, images in numbers.items() if images}


class Cell(NamedTuple):
    """A cell of a table: its text, the text in small type below it, how the interval there was made."""

    text: str
    small: str = ""
    how: str = ""


class Row(NamedTuple):
    """A row of a table: its head, the text in small type below it, its cells."""

    head: str
    small: str
    cells: list[Cell]


def cell(quantity: Mapping | float | None, form: str = ".2f", scale: float = 1, absent: str = NOT_AVAILABLE) -> Cell:
    """Return a number, or a quantity with its interval below it; `absent` if there is none."""
    if not isinstance(quantity, Mapping):
        quantity = {"value": quantity}
    if quantity["value"] is None:
        return Cell(absent)
    ends = interval(quantity, form, scale)
    return Cell(number(quantity["value"], form, scale), ends, quantity["how"] if ends else "")


def row(head: str, small: str, blocks: Mapping[str, Mapping], path: Sequence[str], form: str, scale: float = 1) -> Row:
    """Return a row of the quantity at `path` in each block; without any, one of no cells."""
    cells = [cell(dig(block, *path), form, scale, absent="\u2013") for block in blocks.values()]
    return Row(head, small, cells if any(one.text != "\u2013" for one in cells) else [])


def from_text(table: pd.DataFrame, transposed: bool = False) -> tuple[list[tuple[str, str]], list[Row]]:
    """Return heads and rows of a table of scripts/metric.py, intervals in small type; transposed without n/a rows."""
    lines = [list(table), *table.to_numpy().tolist()]
    if transposed:
        lines = [line for line in zip(*lines, strict=True) if set(line[1:]) != {NOT_AVAILABLE}]
    heads = [(text, "") for text in lines[0][1:]]
    return heads, [Row(line[0], "", [_split(text) for text in line[1:]]) for line in lines[1:]]


def _split(text: str) -> Cell:
    value, bracket, ends = text.replace("-", "\u2212").partition(" [")
    return Cell(value, bracket.strip() + ends)


def common_beginning(texts: Sequence[str]) -> str:
    """Return the words, with the space behind them, that all texts begin with; "" for a single text."""
    words = os.path.commonprefix([text.split(" ")[:-1] for text in texts]) if len(texts) > 1 else []
    return "".join(f"{word} " for word in words)


def number(value: float | None, form: str = ".2f", scale: float = 1) -> str:
    """Return `scale * value` in `form` with a true minus sign, or "n/a"."""
    return NOT_AVAILABLE if value is None else format(value * scale, form).replace("-", "\u2212")


def share(ratio: float | None) -> str:
    """Return a ratio in percent."""
    return NOT_AVAILABLE if ratio is None else f"{number(ratio, '.1f', 100)}\u00a0%"


def count(value: int) -> str:
    """Return an integer with a separator of thousands."""
    return f"{value:,}"


def counted(value: int, noun: str) -> str:
    """Return a number of things: "1 image", "2 images"; the noun's plural takes an s."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def interval(quantity: Mapping, form: str = ".2f", scale: float = 1) -> str:
    """Return the interval "[low, high]" of a quantity, or ""."""
    low, high = quantity.get("low"), quantity.get("high")
    return "" if low is None or high is None else f"[{number(low, form, scale)}, {number(high, form, scale)}]"


def estimate(quantity: Mapping, form: str = "") -> str:
    """Return a quantity for a sentence, with its interval; in percent without a `form`."""
    if form:
        return f"{number(quantity['value'], form)} {interval(quantity, form)}".strip()
    return f"{share(quantity['value'])} {interval(quantity, '.1f', 100)}".strip()


def methods(rows: Iterable[Row]) -> str:
    """Return how the intervals in these rows were made, each way once.

    Ways that differ in numbers only ("exact binomial, 24 trials", "..., 16 trials") are one, with dots for the numbers.
    """
    ways = defaultdict(set)
    for how in (one.how for line in rows for one in line.cells if one.how):
        ways[re.sub(r"\d[\d.,e+-]*\b", "\u2026", how)].add(how)
    return "; ".join(next(iter(texts)) if len(texts) == 1 else pattern for pattern, texts in ways.items())

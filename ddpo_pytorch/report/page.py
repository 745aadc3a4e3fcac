"""The report: a self-contained HTML file. The templates contain all prose; `findings` computes the numbers in it."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpo_pytorch.data.sample_folder import title_of
from ddpo_pytorch.metrics.tables import ABSENT, dig, main_tables, number
from ddpo_pytorch.report import findings
from ddpo_pytorch.report.curves import curves, heatmap, read_config, read_runs
from ddpo_pytorch.report.pictures import Album, Samples, rarest_first
from ddpo_pytorch.utils.files import write_file

OPEN_GRIDS = 8  # prompts whose pictures are not folded away
MOST_GRIDS = 64  # prompts with pictures


def write_report(output: str | Path, result: Mapping[str, Any], samples: Samples, runs: Mapping[str, str]) -> Path:
    """Write `output`/report.html atomically and return its path. Raises UserError for an unreadable run folder.

    `result`: the content of metrics.json. `samples`: (file, caption) lists by name, "real" (optional) and the models in
    order; images of a caption with equal stems come from the same noise. `runs`: run folders of train.py by name.
    Unreadable images are listed among the page's warnings.
    """
    path = Path(output) / "report.html"
    options = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    templates.filters |= {function.__name__: function for function in (counted, estimate, bounds)}
    templates.filters["json"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    templates.globals |= {"dig": dig, "findings": findings}
    write_file(path, templates.get_template("page.html.j2").render(page_content(result, samples, runs)))
    return path


def page_content(result: Mapping, samples: Samples, runs: Mapping[str, str]) -> dict[str, Any]:
    """Return the template's variables."""
    models, album, tables = result["models"], Album(), main_tables(result)
    captions = list(dict.fromkeys(caption for files in samples.values() for _, caption in files))
    counts = dig(result, "sets", "real", "images_by_prompt")
    grids = album.grids(samples, rarest_first(captions, counts)[:MOST_GRIDS])
    sheets = [
        (name, space, album.closest_pairs(block["closest"], name))
        for name, model in models.items()
        for space, block in (model.get("memorisation") or {}).items()
    ]
    title = title_of("real", samples.get("real", ()))
    shown = sum(picture is not None for grid in grids for picture in grid["rows"].get(title, ()))
    shown += sum(pair["training"] is not None for *_, pairs in sheets for pair in pairs)
    configs = {name: config for name, run in runs.items() if (config := read_config(run))}
    folders = {f"{name} images": [block] for name, block in result["sets"].items()}
    folders |= {name: model["folders"] for name, model in models.items()}
    images = {
        name: [{k: x for k, x in one.items() if k != "images_by_prompt"} for one in own]
        for name, own in folders.items()
    }
    details = {
        "Settings of the measurement": result["settings"],
        "Judges and networks": result["judges"] | result["networks"],
        "Images": images,
        "Methods of the 95 % intervals": findings.methods(result),
        "Versions": result["versions"] | {"measured at": result["created"]},
    }
    details |= {f"Training run {name}": config for name, config in configs.items()}
    sanity, moves = findings.sanity_table(result) if "sanity" in result else (None, None)
    return {
        "result": result,
        "models": models,
        "real": result.get("real"),
        "fundus": result.get("kind") == "fundus",
        "measure": findings.measure_of(result),
        "created": f"{datetime.fromisoformat(result['created']):%d %B %Y, %H:%M %Z}",
        "comparisons": findings.comparisons(result),
        "table1": tables.get("table1"),
        "table2": tables.get("table2"),
        "curves": curves(read_runs(runs)),
        "sanity": sanity,
        "heatmap": None if sanity is None else heatmap(moves, "Change by degradation, in half-widths of the interval"),
        "grids": grids,
        "open_grids": OPEN_GRIDS,
        "all_prompts": len(captions),
        "sheets": [sheet for sheet in sheets if sheet[2]],
        "real_thumbnails": shown,
        "details": details,
        "configs": configs,
        "unreadable": album.unreadable,
    }


def bounds(quantity: Mapping) -> str:
    """Format the interval of a difference of ratios as "[low, high]" in percentage points."""
    return number(quantity, "+.1f", 100).replace("-", "\u2212").partition(" ")[2]


def estimate(ratio: Mapping | float | None) -> str:
    """Format a ratio, with its interval if it has one, in percent."""
    value, _, ends = number(ratio, ".1f", 100).partition(" [")
    return value if value == ABSENT else f"{value}\u00a0%" + (f" [{ends}" if ends else "")


def counted(value: int, noun: str) -> str:
    """Format a count: "1 image", "2 images"; the plural takes an s."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"

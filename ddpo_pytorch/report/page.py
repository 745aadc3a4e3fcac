"""The report: a self-contained HTML file. The templates contain all prose; `findings` computes the numbers in it."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpo_pytorch.data.sample_folder import title_of
from ddpo_pytorch.metrics.tables import NOT_AVAILABLE, dig, main_tables, number
from ddpo_pytorch.report import findings
from ddpo_pytorch.report.curves import curves, heatmap, read_config, read_runs
from ddpo_pytorch.report.pictures import Album, Samples, rarest_first
from ddpo_pytorch.utils.files import write_file

OPEN_GRIDS = 8  # prompts whose pictures are not folded away
MOST_GRIDS = 64  # prompts with pictures


def write_report(output: str | Path, result: Mapping[str, Any], samples: Samples, runs: Mapping[str, str]) -> Path:
    """Write `output`/report.html atomically and return its path.

    `result`: the content of metrics.json. `samples`: (file, caption) lists by name, "real" (optional) and the models in
    order; images of a caption with equal stems come from the same noise. `runs`: run folders of train.py by name.
    Unreadable images are listed among the page's warnings. Raises UserError for an unreadable run folder.
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
    models, real, album = result["models"], result.get("real"), Album()
    captions = list(dict.fromkeys(caption for files in samples.values() for _, caption in files))
    counts = dig(result, "sets", "real", "images_by_prompt")
    grids = album.grids(samples, rarest_first(captions, counts)[:MOST_GRIDS])
    blocks = {name: values.get("memorisation") or {} for name, values in models.items()}
    memorised = [(name, space, block["closest"]) for name, spaces in blocks.items() for space, block in spaces.items()]
    sheets = [(name, space, album.closest_pairs(closest, name)) for name, space, closest in memorised]
    title = title_of("real", samples.get("real", ()))
    shown = sum(picture is not None for grid in grids for picture in dict(grid.rows).get(title, ()))
    shown += sum(pair["training"] is not None for *_, pairs in sheets for pair in pairs)
    configs = {name: config for name, run in runs.items() if (config := read_config(run))}
    tables = main_tables(result)
    sanity, moves = findings.sanity_table(result) if "sanity" in result else (None, None)
    return {
        "result": result,
        "models": models,
        "real": real,
        "fundus": result.get("kind") == "fundus",
        "measure": findings.measure_of(result),
        "created": f"{datetime.fromisoformat(result['created']):%d %B %Y, %H:%M %Z}",
        "comparisons": findings.comparisons(result),
        **{name: tables.get(name) for name in ("table1", "table2")},
        "curves": curves(read_runs(runs)),
        "sanity": sanity,
        "heatmap": None if sanity is None else heatmap(moves, "Change by degradation, in half-widths of the interval"),
        "grids": grids,
        "open_grids": OPEN_GRIDS,
        "all_prompts": len(captions),
        "sheets": [sheet for sheet in sheets if sheet[2]],
        "real_thumbnails": shown,
        "details": details(result) | {f"Training run {name}": config for name, config in configs.items()},
        "configs": configs,
        "unreadable": album.unreadable,
    }


def details(result: Mapping) -> dict[str, Any]:
    """Return the provenance of the numbers by title: settings, networks, images, interval methods, versions."""
    sets = {f"{name} images": [block] for name, block in result["sets"].items()}
    sets |= {name: model["folders"] for name, model in result["models"].items()}
    images = {
        name: [{key: value for key, value in folder.items() if key != "images_by_prompt"} for folder in folders]
        for name, folders in sets.items()
    }
    return {
        "Settings of the measurement": result["settings"],
        "Judges and networks": result["judges"] | result["networks"],
        "Images": images,
        "Methods of the 95 % intervals": findings.methods(result),
        "Versions": result["versions"] | {"measured at": result["created"]},
    }


def bounds(quantity: Mapping) -> str:
    """Format the interval of a difference of ratios as "[low, high]" in percentage points."""
    return number(quantity, "+.1f", 100).replace("-", "\u2212").partition(" ")[2]


def estimate(ratio: Mapping | float | None) -> str:
    """Format a ratio, with its interval if it has one, in percent."""
    value, _, ends = number(ratio, ".1f", 100).partition(" [")
    return value if value == NOT_AVAILABLE else f"{value}\u00a0%" + (f" [{ends}" if ends else "")


def counted(value: int, noun: str) -> str:
    """Format a count: "1 image", "2 images"; the plural takes an s."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"

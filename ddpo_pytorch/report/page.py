"""The report as one HTML file that loads nothing: numbers, curves, pictures and cards of one measurement."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpo_pytorch.report import tables
from ddpo_pytorch.report.card import data_card, model_card
from ddpo_pytorch.report.cells import counted, dig, letter
from ddpo_pytorch.report.findings import findings, remarks
from ddpo_pytorch.report.fundus_tables import fundus_table, judges_text, quality_tables
from ddpo_pytorch.report.headline import all_missing, headline
from ddpo_pytorch.report.pictures import Album, Grid, Samples, closest_pairs, grids, rarest_first
from ddpo_pytorch.report.plots import curves, read_runs
from ddpo_pytorch.report.provenance import listings, read_config
from ddpo_pytorch.report.quality_sentences import copy_sentences, diversity_sentences, memorisation_sentences
from ddpo_pytorch.report.quality_tables import diversity_table, fidelity_tables, memorisation_table
from ddpo_pytorch.report.wording import wording_of
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write

FORMAT = 2
OPEN_GRIDS = 8  # prompts whose pictures are not folded away
MOST_GRIDS = 64  # prompts with pictures


def write_report(
    output: str | Path, result: Mapping[str, Any], samples: Samples, runs: Sequence[Path], title: str = ""
) -> Path:
    """Write `output`/report.html whole and return its path.

    `result`: the content of metrics.json (format 2). `samples`: (file, caption) lists by name, "real" (optional) and
    the models in their order; equal stems of a caption are the same noise. `runs`: run folders of scripts/train.py.
    `title`: "" is that of the kind of images.
    Raises UserError for a result of another format and for a run folder that cannot be read. Image files that cannot
    be read are named among the page's warnings.
    """
    if result.get("format") != FORMAT:
        raise UserError(
            f"the metrics have format {result.get('format')!r}, this report reads {FORMAT}; run scripts/metric.py again"
        )
    path = Path(output) / "report.html"
    text = render(page_content(result, samples, runs, title or wording_of(result).title))
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(content: Mapping[str, Any]) -> str:
    """The page of `page_content`'s values; every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"letter": letter, "counted": counted}
    return environment.get_template("page.html.j2").render(content)


def page_content(result: Mapping, samples: Samples, runs: Sequence[Path], title: str) -> dict[str, Any]:
    """What the template shows, by name; a block without content is empty and appears in no heading."""
    album, configs = Album(), [read_config(run) for run in runs]
    blocks = _picture_blocks(result, samples, album)
    sheets = _sheets(result, album)
    real = samples.get("real")
    content = {
        "title": title,
        "created": _moment(result.get("created")),
        "explained": judges_text(result),
        "measure": wording_of(result).measure,
        "findings": findings(result),
        "remarks": remarks(result),
        "headline": headline(result) if result.get("models") else None,
        "alignment": [t for t in (tables.table2(result), tables.table3(result), fundus_table(result)) if t],
        "prompts": tables.prompt_table(result),
        "attributes": tables.attribute_tables(result),
        "judges": tables.judge_table(result),
        "statistics": quality_tables(result),
        "fidelity": fidelity_tables(result),
        "curves": curves(read_runs(runs)),
        "blocks": blocks[:OPEN_GRIDS],
        "more_blocks": blocks[OPEN_GRIDS:],
        "noise": f"{_left_out(samples)}{_noise(result, samples)}",
        "diversity": diversity_table(result),
        "diversity_sentences": diversity_sentences(result),
        "memorisation": memorisation_table(result),
        "memorisation_sentences": copy_sentences(result) + memorisation_sentences(result),
        "sheets": sheets,
        "listings": listings(result, runs),
        "missing": all_missing(result),
        "model_card": model_card(result, configs, _embedded(blocks, sheets)),
        "data_card": data_card(result, {"real": real[0][0] if real else None, "train": _training_file(result)}),
        "warnings": [*(result.get("warnings") or []), *(f"{p} cannot be read as an image" for p in album.unreadable)],
    }
    return content | {"contents": _contents(content)}


def _moment(created: str | None) -> str:
    """An ISO time as a date and a time for readers; as it is, if it is none."""
    try:
        return f"{datetime.fromisoformat(created or ''):%d %B %Y, %H:%M %Z}".strip()
    except ValueError:
        return created or ""


def _picture_blocks(result: Mapping, samples: Samples, album: Album) -> list[tuple[Grid, str]]:
    """(grid, line above it) of every caption, rarest first by the number of real images."""
    captions = list(dict.fromkeys(caption for files in samples.values() for _, caption in files))
    order = rarest_first(captions, dig(result, "sets", "real", "images_by_prompt"))[:MOST_GRIDS]
    return [(grid, tables.apr_line(result, grid.caption)) for grid in grids(samples, order, album)]


def _sheets(result: Mapping, album: Album) -> list[tuple[str, str, list]]:
    """(model, extractor, pairs) of every contact sheet that has pairs."""
    sheets = []
    for name, values in (result.get("models") or {}).items():
        for extractor, found in (values.get("memorisation") or {}).items():
            if pairs := closest_pairs(found.get("closest") or [], name, album):
                sheets.append((name, extractor, pairs))
    return sheets


def _training_file(result: Mapping) -> str | None:
    """Any training image's file, of those nearest to samples."""
    blocks = [
        block
        for values in (result.get("models") or {}).values()
        for block in (values.get("memorisation") or {}).values()
    ]
    return next((one["train"] for block in blocks for one in block.get("closest") or []), None)


def _embedded(blocks: Sequence[tuple[Grid, str]], sheets: Sequence[tuple[str, str, list]]) -> int:
    """How many real and training images the page shows."""
    real = sum(
        picture is not None for grid, _ in blocks for name, row in grid.rows if name == "real" for picture in row
    )
    return real + sum(pair.training is not None for *_, pairs in sheets for pair in pairs)


def _left_out(samples: Samples) -> str:
    """That not all prompts are shown, in words; "" where they are."""
    number = len({caption for files in samples.values() for _, caption in files})
    return f"Of {number} prompts the first {MOST_GRIDS} are shown. " if number > MOST_GRIDS else ""


def _noise(result: Mapping, samples: Samples) -> str:
    """Whether the columns of the grids share their noise, in words; "" for fewer than two models."""
    models = [name for name in samples if name != "real"]
    if len(models) < 2:
        return ""
    unpaired = [one for one in result.get("comparisons") or [] if not one.get("paired")]
    if unpaired:
        return f"The models' images are not from the same noise: {unpaired[0].get('reason') or 'no reason recorded'}."
    if not result.get("comparisons"):
        return "Images of a column have the same file name in each model's folder."
    return "Generated images of a column come from the same noise; real images have no partner."


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(anchor, title) of the sections that have something to show."""
    sections = (
        ("alignment", "Alignment with the prompt", ("alignment", "prompts", "attributes", "judges")),
        ("statistics", "Image statistics", ("statistics",)),
        ("fidelity", "Fidelity", ("fidelity",)),
        ("curves", "Training", ("curves",)),
        ("pictures", "Samples by prompt", ("blocks",)),
        (
            "near",
            "Diversity and nearness to training images",
            ("diversity", "memorisation", "memorisation_sentences", "sheets"),
        ),
        ("provenance", "Settings, versions, hashes", ("listings", "missing")),
        ("card", "Model card and data card", ("model_card",)),
    )
    return [(anchor, name) for anchor, name, keys in sections if any(content[key] for key in keys)]

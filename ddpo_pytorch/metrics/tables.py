"""The paper's tables 2 and 3 with 95 % intervals, as Markdown, CSV and LaTeX; "n/a" is what could not be measured."""

from collections.abc import Mapping, Sequence

from ddpo_pytorch.data.isic import SINGLE_ARTIFACT_CAPTIONS
from ddpo_pytorch.data.tables import table_text

# the paper's column order and titles of table 2.
ARTIFACT_TITLES = {"hair": "Hair", "gel_bubble": "Gel", "ink": "Ink", "ruler": "Ruler"}
DISEASE_ORDER = ("MEL", "NV")
NOT_AVAILABLE = "n/a"
# beside a formatted number: its interval in brackets
Table = tuple[list[str], list[list[str]]]


def table2(models: Mapping[str, Mapping], real: Mapping | None = None, real_images: Mapping | None = None) -> Table:
    """APR in percent for the 8 captions with one artifact: a row a model.

    `models` and `real` are parts of metrics.json by name; real images are the judge's ceiling, `real_images` their
    number by caption, the paper's first row.
    """
    keys = [(disease, artifact) for disease in DISEASE_ORDER for artifact in ARTIFACT_TITLES]
    captions = [SINGLE_ARTIFACT_CAPTIONS[key] for key in keys]
    header = ["", *(f"{disease} {ARTIFACT_TITLES[artifact]}" for disease, artifact in keys)]
    rows = []
    if real_images is not None:
        rows.append(["# Real Sample", *(str(real_images.get(caption, 0)) for caption in captions)])
    for name, part in [*models.items(), *([("real images", real)] if real else [])]:
        by_prompt = next(iter(part["alignment"].values()))["by_prompt"]
        rows.append([f"APR ↑ (%) {name}", *(percent(by_prompt.get(caption)) for caption in captions)])
    return header, rows


def table3(models: Mapping[str, Mapping], fid_part: str = "matched") -> Table:
    """APR (%), FID, KID, LPIPS, the Frechet distance in the judge's features and mean reward over all captions.

    `fid_part`: "matched" or "unmatched" (see `measure.fidelity`).
    """
    header = ["Model", "APR ↑ (%)", "FID ↓", "KID ↓ (x 1000)", "LPIPS ↓", "FD-judge ↓", "Reward ↑", "Images"]
    rows = []
    for name, part in models.items():
        inception = (part.get("fidelity") or {}).get("inception", {}).get(fid_part, {})
        judge = (part.get("fidelity") or {}).get("judge", {}).get("matched", {})
        rows.append(
            [
                name,
                percent(next(iter(part["alignment"].values()))["APR"]),
                number(inception.get("FID"), ".2f"),
                number(inception.get("KID"), ".2f", 1000),
                number((part.get("perception") or {}).get("LPIPS"), ".3f"),
                number(judge.get("FID"), ".4g"),  # the scale of its features is the judge's own
                NOT_AVAILABLE if part["reward"] is None else f"{part['reward']:.3f}",
                str(part["images"]),
            ]
        )
    return header, rows


def percent(quantity: Mapping | None) -> str:
    """A ratio {"value", "low", "high"} in percent with its interval."""
    return number(quantity, ".2f", 100)


def number(quantity: Mapping | None, form: str, scale: float = 1) -> str:
    """A quantity {"value", "low", "high"} times `scale`, with its interval where there is one."""
    if quantity is None or quantity["value"] is None:
        return NOT_AVAILABLE
    text = format(scale * quantity["value"], form)
    if quantity["low"] is None or quantity["high"] is None:
        return text
    return f"{text} [{format(scale * quantity['low'], form)}, {format(scale * quantity['high'], form)}]"


def markdown(table: Table) -> str:
    """In aligned Markdown, the first column to the left and the others to the right."""
    return markdown_table(*table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned Markdown, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ([cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in [header, rule, *rows])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(table: Table) -> str:
    """Return the table as CSV; an interval stands in the cell of its number."""
    return table_text(*table)


def latex(table: Table) -> str:
    """As a LaTeX tabular with booktabs rules."""
    header, rows = table
    lines = [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(_tex, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_TEX = {"\\": r"\textbackslash{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "~": r"\textasciitilde{}"}
_TEX |= {"^": r"\textasciicircum{}"} | {character: "\\" + character for character in "&%$#_{}"}


def _tex(cell: str) -> str:
    return "".join(_TEX.get(character, character) for character in cell)

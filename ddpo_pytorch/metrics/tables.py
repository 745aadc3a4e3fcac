"""Tables of metrics.json with 95 % intervals, as pandas DataFrames of text; "n/a" if a number was not measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ddpo_pytorch.data.isic import SINGLE_ARTIFACT_CAPTIONS
from ddpo_pytorch.data.tables import table_text

# the paper's column order and titles of table 2
ARTIFACT_TITLES = {"hair": "Hair", "gel_bubble": "Gel", "ink": "Ink", "ruler": "Ruler"}
REAL = "real images"
ABSENT = "n/a"
# columns of table 3 and of the fundus table: title, path in a model's part of metrics.json, format, scale. "{fid}"
# stands for "matched" or "unmatched", "{judge}" for the first judge.
_FID = ("FID ↓", ("fidelity", "inception", "{fid}", "FID"), ".2f", 1)
_KID = ("KID ↓ (x 1000)", ("fidelity", "inception", "{fid}", "KID"), ".2f", 1000)
_FD_JUDGE = ("FD-judge ↓", ("fidelity", "judge", "matched", "FID"), ".4g", 1)  # in the judge's own scale
TABLE3_COLUMNS = (
    ("APR ↑ (%)", ("alignment", "{judge}", "APR"), ".2f", 100),
    *(_FID, _KID, ("LPIPS ↓", ("perception", "LPIPS"), ".3f", 1), _FD_JUDGE),
    ("Reward ↑", ("rewards",), ".3f", 1),
    ("Images", ("images",), "d", 1),
)
FUNDUS_COLUMNS = (
    ("Selector ↑", ("alignment", "{judge}", "selector"), ".3f", 1),
    ("Pass rate ↑ (%)", ("alignment", "{judge}", "pass_rate"), ".2f", 100),
    ("Policy ↑", ("alignment", "{judge}", "policy"), ".3f", 1),
    ("Alignment ↑ (%)", ("alignment", "{judge}", "alignment"), ".2f", 100),
    *(_FID, _KID, _FD_JUDGE),
    ("KID-judge ↓ (x 1000)", ("fidelity", "judge", "matched", "KID"), ".4g", 1000),
    ("IS ↑", ("inception_score", "IS"), ".2f", 1),
    ("SSIM ↑", ("structure", "SSIM"), ".3f", 1),
    ("MS-SSIM ↓", ("structure", "MS_SSIM"), ".3f", 1),
    ("MS-SSIM within prompts ↓", ("structure", "MS_SSIM_within"), ".3f", 1),
    ("Images", ("images",), "d", 1),
)


def main_tables(result: Mapping) -> dict[str, pd.DataFrame]:
    """Return by name the tables of metrics.json's content: table1, table2 and table3, or fundus, as far as measured."""
    models, tables = result["models"], {"table1": table1(result)} if result["settings"]["quality"] else {}
    if result.get("kind") == "fundus":
        table = tables["fundus"] = model_table(FUNDUS_COLUMNS, sides(result), result["fid_part"])
        deviations = [dig(part, "inception_score", "sd") for part in sides(result).values()]
        table["IS ↑"] += ["" if sd is None else f" ± {sd:.2f}" for sd in deviations]
        return tables
    if result["subject"] == "dermoscopic":
        tables["table2"] = table2(models, result.get("real"), dig(result, "sets", "real", "images_by_prompt"))
    return tables | {"table3": model_table(TABLE3_COLUMNS, models, result["fid_part"])}


def sides(result: Mapping) -> dict[str, Mapping]:
    """Return the measured blocks by name: the models, then real images if there are any."""
    return result["models"] | ({REAL: result["real"]} if "real" in result else {})


def table1(result: Mapping) -> pd.DataFrame:
    """Return a row per image statistic: mean, standard deviation and n of each set, and distances to the real images.

    Distances: the difference of means, also in standard deviations of the real images, and the 1-Wasserstein distance
    in the latter unit.
    """
    (height, width), parts, rows = result["settings"]["image_shape"], sides(result), []
    names = [name for name in (REAL, *result["models"]) if name in parts]
    for chosen in result["settings"]["quality"]:
        for statistic in parts[names[0]]["quality"][chosen]["statistics"]:
            row = {f"at {width} x {height} px": f"{chosen}: {statistic}"}
            for name in names:
                numbers = parts[name]["quality"][chosen]["statistics"][statistic]
                row |= {name: number(numbers["mean"], ".4f"), f"sd {name}": number(numbers["sd"], ".4f")}
                row[f"n {name}"] = str(parts[name]["quality"][chosen]["images"])
                if "difference" in numbers:
                    row[f"{name} - real"] = number(numbers["difference"], ".4f")
                    row[f"{name} - real (sd)"] = number(numbers["standardised"], ".2f")
                    row[f"W1 {name} (sd)"] = number(numbers["wasserstein"], ".2f")
            rows.append(row)
    return pd.DataFrame(rows)


def table2(models: Mapping, real: Mapping | None = None, real_images: Mapping | None = None) -> pd.DataFrame:
    """Return APR in percent for the 8 captions with one artifact, a row per model after one of `real_images` counts."""
    captions = {
        f"{disease} {title}": SINGLE_ARTIFACT_CAPTIONS[disease, artifact]
        for disease in ("MEL", "NV")
        for artifact, title in ARTIFACT_TITLES.items()
    }
    rows = []
    if real_images is not None:
        counts = {column: str(real_images.get(caption, 0)) for column, caption in captions.items()}
        rows.append({"": "# Real Sample"} | counts)
    for name, part in (models | ({REAL: real} if real else {})).items():
        by_prompt = next(iter(part["alignment"].values()))["by_prompt"]
        cells = {column: number(by_prompt.get(caption), ".2f", 100) for column, caption in captions.items()}
        rows.append({"": f"APR ↑ (%) {name}"} | cells)
    return pd.DataFrame(rows)


def model_table(columns: Sequence[tuple], parts: Mapping[str, Mapping], fid_part: str = "matched") -> pd.DataFrame:
    """Return a row of text per part of metrics.json; `columns`: (title, path, format, scale) as `TABLE3_COLUMNS`."""
    rows = []
    for name, part in parts.items():
        names = {"{fid}": fid_part, "{judge}": next(iter(part.get("alignment", [""])))}
        cells = {
            title: number(dig(part, *(names.get(key, key) for key in path)), form, scale)
            for title, path, form, scale in columns
        }
        rows.append({"Model": name} | cells)
    return pd.DataFrame(rows)


def dig(tree: Any, *keys: str) -> Any:
    """Return tree[k1][k2]..., or None where a level is absent or null."""
    for key in keys:
        if not isinstance(tree, Mapping) or tree.get(key) is None:
            return None
        tree = tree[key]
    return tree


def number(estimate: Mapping | float | None, form: str, scale: float = 1) -> str:
    """Format a number, or an estimate {"value", "low", "high"} with its interval, times `scale`."""
    ends = estimate if isinstance(estimate, Mapping) else {"value": estimate, "low": None, "high": None}
    value, low, high = (x if x is None else format(scale * x, form) for x in map(ends.get, ("value", "low", "high")))
    text = ABSENT if value is None else value
    return text if None in (value, low, high) else f"{text} [{low}, {high}]"


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table in aligned Markdown, the first column on the left and the others on the right."""
    alignment = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=alignment) + "\n"


def to_csv(table: pd.DataFrame) -> str:
    """Return the table as CSV, safe for spreadsheets (`table_text`); an interval is in the cell of its number."""
    return table_text(list(table.columns), table.to_numpy().tolist())


def to_latex(table: pd.DataFrame) -> str:
    """Return the table as a LaTeX tabular with booktabs rules."""
    text = table.to_latex(index=False, escape=True, column_format="l" + "r" * (table.shape[1] - 1))
    return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")

"""Curves of training runs: an SVG per quantity inside the page, one for light and one for dark screens."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import parse_json

# Okabe and Ito's colours, which the colour-blind can tell apart; each run has its own marker and dashes as well.
COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    "dark": ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")
INK = {"light": "#33383d", "dark": "#d9d6cf"}
GRID = {"light": "#dcdad4", "dark": "#3d4146"}
# key in metrics.jsonl: label of the axis, factor
CURVES = {
    "reward_mean": ("mean reward", 1),
    "held_out_apr": ("APR (%)", 100),
    "held_out_reward": ("mean reward", 1),
    "approx_kl": ("approximate KL", 1),
    "kl_to_base": ("KL", 1),
    "clipfrac": ("share (%)", 100),
    "grad_norm": ("norm", 1),
}


@dataclass(frozen=True)
class Plot:
    """A figure: the quantity, data URIs for light and dark screens, first and last (epoch, value) of each run."""

    key: str
    light: str
    dark: str
    ends: list[tuple[str, tuple[float, float], tuple[float, float]]]


def read_runs(runs: Sequence[Path]) -> dict[str, list[dict]]:
    """Return the entries of each run's metrics.jsonl and held_out.jsonl by name; equal names get their parent's first.

    A torn last line of a run that is still writing is skipped. Raises UserError for a folder without the file and for
    any other line that is no JSON object.
    """
    names = [Path(run).name for run in runs]
    entries = {}
    for run, name in zip(map(Path, runs), names, strict=True):
        path = run / "metrics.jsonl"
        if not path.is_file():
            raise UserError(
                f"run folder {str(run)!r} holds no metrics.jsonl; give a folder that scripts/train.py wrote"
            )
        lines = _with_held_out(_read_lines(path), run / "held_out.jsonl")
        entries[name if names.count(name) == 1 else f"{run.parent.name}/{name}"] = lines
    return entries


def _with_held_out(entries: list[dict], path: Path) -> list[dict]:
    """Return the entries with the evaluations of held_out.jsonl in place of their own.

    Its epochs count completed ones, from 0, the base model: the policy whose samples' reward was logged at that epoch.
    """
    if not path.is_file():
        return entries
    kept = [{key: value for key, value in entry.items() if not key.startswith("held_out_")} for entry in entries]
    return kept + [
        {"epoch": line["epoch"]} | {f"held_out_{key}": line[key] for key in ("apr", "reward") if key in line}
        for line in _read_lines(path)
        if "epoch" in line
    ]


def _read_lines(path: Path) -> list[dict]:
    content, entries = path.read_bytes(), []
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(parse_json(line, {"epoch?": float}, f"{str(path)!r} line {number}", "remove that line"))
        except UserError:
            if number < len(lines) or content.endswith(b"\n"):
                raise
    return entries


def series(entries: Sequence[Mapping], key: str, factor: float = 1) -> np.ndarray:
    """Return (N, 3): epoch, value and standard deviation (NaN without one), where `key` was logged as finite."""
    deviation = key.replace("_mean", "_std") if key.endswith("_mean") else ""
    points = [
        (entry.get("epoch", index), factor * _number(entry.get(key)), factor * _number(entry.get(deviation)))
        for index, entry in enumerate(entries)
        if math.isfinite(_number(entry.get(key)))
    ]
    return np.array(points, float).reshape(-1, 3)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def curves(runs: Mapping[str, Sequence[Mapping]]) -> list[Plot]:
    """Return a plot of each quantity that at least one run logged. `runs`: entries by name, see `read_runs`."""
    plots = []
    for key, (axis, factor) in CURVES.items():
        found = {name: series(entries, key, factor) for name, entries in runs.items()}
        if any(map(len, found.values())):
            ends = [
                (name, tuple(points[0, :2]), tuple(points[-1, :2])) for name, points in found.items() if len(points)
            ]
            plots.append(Plot(key, *(_draw(found, axis, scheme) for scheme in INK), ends))
    return plots


def _draw(found: Mapping[str, np.ndarray], axis: str, scheme: str) -> str:
    """Return the figure as a data URI of an SVG; its bytes depend on the points alone."""
    style = {"svg.hashsalt": "report", "font.size": 9, "font.family": "DejaVu Sans", "axes.linewidth": 0.6}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[scheme]
    )
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(found.items()):
            if len(points):
                _line(axes, index, name, points, COLOURS[scheme])
        axes.set(xlabel="epoch", ylabel=axis, axisbelow=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        axes.grid(color=GRID[scheme], linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if len(found) > 1:
            above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
            axes.legend(**above, frameon=False, fontsize=8, handlelength=3, borderpad=0.1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _line(axes: Axes, index: int, name: str, points: np.ndarray, colours: Sequence[str]) -> None:
    epochs, values, deviations = points.T
    colour = colours[index % len(colours)]
    if np.isfinite(deviations).any():
        axes.fill_between(epochs, values - deviations, values + deviations, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        epochs,
        values,
        DASHES[index % len(DASHES)],
        color=colour,
        marker=MARKERS[index % len(MARKERS)],
        markersize=3.6,
        markevery=max(1, len(points) // 12),
        linewidth=1.4,
        label=(" " if name.startswith("_") else "") + name.replace("$", r"\$"),  # matplotlib hides _ and reads $
    )

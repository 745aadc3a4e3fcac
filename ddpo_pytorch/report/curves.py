"""Curves of training runs, an SVG per quantity as a data URI for the page."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import parse_json, read_json

# Okabe and Ito's colour-blind safe palette; runs also differ in markers and dashes
LINES = cycler(color=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
LINES += cycler(marker=("o", "s", "^", "D", "v", "P"), linestyle=("-", "--", "-.", ":", "-", "--"))
STYLE = {"svg.hashsalt": "report", "font.size": 11, "axes.linewidth": 0.6, "axes.prop_cycle": LINES, "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#dcdad4"}
# key in metrics.jsonl: title, factor
CURVES = {
    "reward_mean": ("Reward, mean ± standard deviation over an epoch's samples", 1),
    "held_out_apr": ("APR (%) on held-out noise, by a judge that gives no reward", 100),
    "held_out_reward": ("Reward on held-out noise", 1),
    "approx_kl": ("KL to the sampling policy, 0.5 mean(d²) of the log-ratios d of an epoch", 1),
    "kl_to_base": ("KL to the model without adapters", 1),
    "clipfrac": ("Ratios outside the clip range (%)", 100),
    "grad_norm": ("Gradient norm before clipping", 1),
}


class Plot(NamedTuple):
    """A figure: title, data URI, and alternative text with the first and last value of each run."""

    title: str
    source: str
    alt: str


def read_config(run: str | Path) -> dict:
    """Return a training run's last settings, or {} if there are none. Raises UserError for a damaged file."""
    paths = [*Path(run).glob("config.json"), *sorted(Path(run).glob("config_*.json"))]  # later starts have a number
    return read_json(paths[-1]) if paths else {}


def read_runs(runs: Mapping[str, str | Path]) -> dict[str, list[dict]]:
    """Return the entries of metrics.jsonl and held_out.jsonl in each run folder, by the run's name.

    Evaluations in held_out.jsonl replace those in metrics.jsonl; their epoch is the number of completed ones, 0 for the
    base model. An incomplete last line of an active run is skipped. Raises UserError for a missing metrics.jsonl, and
    for other lines that are not JSON objects.
    """
    entries = {}
    for name, run in ((name, Path(folder)) for name, folder in runs.items()):
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"run folder {str(run)!r} holds no metrics.jsonl; give a folder that train.py wrote")
        entries[name] = _read_lines(run / "metrics.jsonl")
        if (run / "held_out.jsonl").is_file():
            lines = [{key: x for key, x in line.items() if not key.startswith("held_out_")} for line in entries[name]]
            held_out = _read_lines(run / "held_out.jsonl")
            lines += [{k if k == "epoch" else f"held_out_{k}": x for k, x in line.items()} for line in held_out]
            entries[name] = lines
    return entries


def _read_lines(path: Path) -> list[dict]:
    content, entries = path.read_bytes(), []
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                entries.append(parse_json(line, {"epoch?": float}, f"{str(path)!r} line {number}", "remove that line"))
        except UserError:
            if number < len(lines) or content.endswith(b"\n"):
                raise
    return entries


def series(entries: Sequence[Mapping], key: str, factor: float = 1) -> np.ndarray:
    """Return (N, 3): epoch, value and standard deviation (NaN if not logged) of entries with a finite `key`."""

    def number(entry: Mapping, name: str) -> float:
        return factor * entry[name] if isinstance(entry.get(name), int | float) else math.nan

    deviation = key.replace("_mean", "_std") if key.endswith("_mean") else ""
    points = [(line.get("epoch", i), number(line, key), number(line, deviation)) for i, line in enumerate(entries)]
    return np.array([point for point in points if math.isfinite(point[1])], float).reshape(-1, 3)


def curves(runs: Mapping[str, Sequence[Mapping]]) -> list[Plot]:
    """Return a plot of each quantity that at least one run logged. `runs`: from `read_runs`."""
    plots = []
    for key, (title, factor) in CURVES.items():
        logged = {name: points for name, run in runs.items() if len(points := series(run, key, factor))}
        ends = [
            f"{name}: {first[1]:.4g} at epoch {first[0]:g}, {last[1]:.4g} at epoch {last[0]:g}"
            for name, (first, last) in ((name, points[[0, -1]]) for name, points in logged.items())
        ]
        if logged:
            plots.append(Plot(title, _draw(logged), f"{title}. {'; '.join(ends)}"))
    return plots


def heatmap(moves: pd.DataFrame, title: str) -> Plot:
    """Plot numbers by row and column, blue below 0 and red above, saturated beyond +-5."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):  # narrow, so that labels are legible on phones
        figure = Figure(figsize=(4, 2.6 + 0.36 * len(moves)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(moves.to_numpy(float), cmap="RdBu_r", vmin=-5, vmax=5, aspect="auto")
        axes.set_xticks(range(moves.shape[1]), moves.columns, rotation=90)
        axes.set_yticks(range(len(moves)), [textwrap.fill(name, 26) for name in moves.index], linespacing=0.9)
        figure.colorbar(image, label="half-widths", extend="both", orientation="horizontal", aspect=30)
        source = _svg(figure)
    rows = (f"{name}: {row.abs().idxmax()} {row[row.abs().idxmax()]:+.1f}" for name, row in moves.iterrows())
    return Plot(title, source, f"{title}. Largest of each row: {'; '.join(rows)}")


def _draw(runs: Mapping[str, np.ndarray]) -> str:
    """Return the figure as a data URI of an SVG; its bytes depend only on the points."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3), layout="constrained")
        axes = figure.subplots()
        for name, (epochs, values, deviations) in ((name, points.T) for name, points in runs.items()):
            label = (" " if name.startswith("_") else "") + name.replace("$", r"\$")  # matplotlib hides _ and parses $
            every = max(1, len(epochs) // 12)
            (line,) = axes.plot(epochs, values, label=label, markersize=3.6, markevery=every, linewidth=1.4)
            low, high = values - deviations, values + deviations  # NaN is not drawn
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.16, linewidth=0)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        if len(runs) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=10, handlelength=3)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

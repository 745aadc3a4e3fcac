"""Curves of training runs, a figure a quantity, as SVG inside the page: one for light, one for dark screens."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
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
# key, title, axis, factor, note
CURVES = (
    (
        "reward_mean",
        "Reward",
        "mean reward",
        1,
        "Mean over the samples of an epoch; the band is \u00b1 1 standard deviation.",
    ),
    ("held_out_apr", "APR during training", "APR (%)", 100, "On held-out noise, by a judge that gives no reward."),
    ("held_out_reward", "Reward on held-out noise", "mean reward", 1, "The reward of the held-out samples."),
    (
        "approx_kl",
        "KL to the sampling policy",
        "approximate KL",
        1,
        "0.5 mean(d\u00b2) of the log-ratio d within an epoch.",
    ),
    ("kl_to_base", "KL to the base model", "KL", 1, "Divergence from the model without adapters."),
    ("clipfrac", "Clipped ratios", "share (%)", 100, "Share of the ratios that the loss clipped."),
    ("grad_norm", "Gradient norm", "norm", 1, "Before clipping."),
)


@dataclass(frozen=True)
class Plot:
    """A figure: title, data URIs for light and dark screens, a line about it, text for those who do not see it."""

    title: str
    light: str
    dark: str
    note: str
    alt: str


def read_runs(runs: Sequence[Path]) -> dict[str, list[dict]]:
    """Entries of each run's metrics.jsonl and held_out.jsonl by folder name; equal names get their parent's first.

    A last line that is torn, because the run is still writing, is left out. Raises UserError for a folder without the
    file and for any other line that is no JSON object.
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
    """Entries with the held-out evaluations of a file in place of their own.

    Its epochs are epochs completed, from 0, the base model: of the policy whose samples' reward stands at that epoch.
    """
    if not path.is_file():
        return entries
    kept = [{key: value for key, value in entry.items() if not key.startswith("held_out_")} for entry in entries]
    names = {"apr": "held_out_apr", "reward": "held_out_reward"}
    return kept + [
        {"epoch": line["epoch"], **{names[key]: line[key] for key in names if key in line}}
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


def series(entries: Sequence[Mapping], key: str) -> list[tuple[float, float, float]]:
    """(epoch, value, standard deviation or NaN) where `key` was logged as a finite number."""
    points = []
    for index, entry in enumerate(entries):
        value = entry.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            spread = entry.get(key.replace("_mean", "_std")) if key.endswith("_mean") else None
            spread = spread if isinstance(spread, int | float) else math.nan
            points.append((float(entry.get("epoch", index)), float(value), float(spread)))
    return points


def curves(runs: Mapping[str, Sequence[Mapping]]) -> list[Plot]:
    """A plot for each quantity that at least one run logged. `runs`: entries by name, as `read_runs` gives them."""
    plots = []
    for key, title, axis, factor, note in CURVES:
        found = {name: series(entries, key) for name, entries in runs.items()}
        if not any(found.values()):
            continue
        images = {scheme: _draw(found, axis, factor, scheme) for scheme in INK}
        alt = f"{title} by epoch. " + " ".join(
            f"{name}: {factor * points[0][1]:.4g} at epoch {points[0][0]:g}, {factor * points[-1][1]:.4g} at epoch "
            f"{points[-1][0]:g}."
            for name, points in found.items()
            if points
        )
        plots.append(Plot(title, images["light"], images["dark"], note, alt))
    return plots


def _draw(found: Mapping[str, Sequence[tuple]], axis: str, factor: float, scheme: str) -> str:
    style = {"svg.hashsalt": "report", "font.size": 9, "font.family": "DejaVu Sans", "axes.linewidth": 0.6}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[scheme]
    )
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(found.items()):
            if points:
                _line(axes, index, name, points, factor, COLOURS[scheme])
        axes.set_xlabel("epoch")
        axes.set_ylabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        axes.grid(color=GRID[scheme], linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(found) > 1:
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1, 1),
                ncols=2,
                frameon=False,
                fontsize=8,
                handlelength=3,
                borderpad=0.1,
            )
        buffer = io.BytesIO()
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _line(axes, index: int, name: str, points: Sequence[tuple], factor: float, colours: Sequence[str]) -> None:
    epochs, values, spreads = zip(*points, strict=True)
    values, spreads = [factor * v for v in values], [factor * s for s in spreads]
    colour, marker = colours[index % len(colours)], MARKERS[index % len(MARKERS)]
    low, high = ([v + sign * s for v, s in zip(values, spreads, strict=True)] for sign in (-1, 1))
    if any(math.isfinite(s) for s in spreads):
        axes.fill_between(epochs, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        epochs,
        values,
        DASHES[index % len(DASHES)],
        color=colour,
        marker=marker,
        markersize=3.6,
        markevery=max(1, len(points) // 12),
        linewidth=1.4,
        label=(" " if name.startswith("_") else "") + name.replace("$", r"\$"),  # matplotlib hides _ and reads $
    )

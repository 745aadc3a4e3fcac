"""Performance of a classifier on a labelled split: ranking, decisions and calibration, with intervals.

Written as CSV and JSON (one row per attribute, then one per combination of labels) and as two figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure, SubFigure
from scipy.special import expit

from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.utils.cores import product
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, write_json

BINS = 15
RESAMPLES = 1000
# measures with an interval, in the order of the columns, and their titles in the table
MEASURES = {
    "prevalence": "prevalence",
    "auc": "AUC",
    "average_precision": "avg. precision",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "accuracy": "accuracy",
    "specificity": "specificity",
    "ece": "ECE",
}
COUNTS = ("tp", "fp", "fn", "tn")
COLUMNS = ("what", "support", "threshold", *COUNTS) + tuple(
    column for name in MEASURES for column in (name, f"{name}_low", f"{name}_high")
)
_CHUNK = 100  # resamples measured at once; bounds the memory


class Report:
    """Measures of logits (N, H) against labels (N, H) of 0 and 1; `rows` has the attributes first, then combinations.

    An attribute is predicted as present where sigmoid(logit) > its threshold, 0.5 where `thresholds` names none. Each
    attribute's row holds, besides `support` (images that have it), the threshold and the counts tp, fp, fn, tn:

    - auc: probability that an image with the attribute gets a higher logit than one without, ties counting one half;
    - average_precision: mean over the images with the attribute of the precision at their logit, without interpolation;
    - precision, recall, f1, accuracy, specificity at the threshold; prevalence, the share of images with the attribute;
    - ece: expected calibration error over 15 bins of sigmoid(logit) of equal width, the mean of
      |share with the attribute - mean sigmoid(logit)| weighted by the images of each bin.

    `<measure>_low` and `_high` are the 2.5 % and 97.5 % quantiles over `resamples` bootstrap samples of whole images
    drawn with `seed`; samples in which a measure is undefined do not count. A combination of labels that occurs ("only
    hair+MEL") has its support and, as recall, the share of its images all of whose labels are predicted exactly.
    Undefined values (no denominator, or an AUC with one class absent) are None.

    Raises UserError for logits that are not finite.
    """

    def __init__(
        self,
        logits: torch.Tensor | np.ndarray,
        labels: torch.Tensor | np.ndarray,
        names: Sequence[str],
        thresholds: Mapping[str, float] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ):
        self.names, self.resamples = tuple(names), resamples
        self.logits, self.truth = _checked(logits, labels, self.names)
        self.thresholds = np.array([(thresholds or {}).get(name, 0.5) for name in self.names])
        self.probabilities = expit(self.logits)
        self.attributes = self._attributes(seed)
        self.combinations = self._combinations()
        self.rows = self.attributes + self.combinations

    def _attributes(self, seed: int) -> list[dict]:
        images = len(self.truth)

        def measured(weights: np.ndarray) -> dict[str, np.ndarray]:
            return measure(self.logits, self.truth, weights, self.thresholds)

        point = measured(np.ones((1, images)))
        chunks = [measured(weights) for weights in resampled(images, self.resamples, seed)]
        rows = []
        for index, name in enumerate(self.names):
            row = dict.fromkeys(COLUMNS) | {"what": name, "threshold": float(self.thresholds[index])}
            row |= {count: int(point[count][0, index]) for count in COUNTS}
            row["support"] = row["tp"] + row["fn"]
            for key in MEASURES:
                samples = np.concatenate([chunk[key][:, index] for chunk in chunks] or [np.empty(0)])
                row |= _interval(key, point[key][0, index], samples)
            rows.append(row)
        return rows

    def _combinations(self) -> list[dict]:
        exact = ((self.probabilities > self.thresholds) == self.truth).all(1)
        present, group = np.unique(self.truth, axis=0, return_inverse=True)
        rows = []
        for index, combination in enumerate(present):
            matches = exact[group.reshape(-1) == index]
            on = [name for name, value in zip(self.names, combination, strict=True) if value]
            row = dict.fromkeys(COLUMNS) | {"what": f"only {'+'.join(on) or 'none'}", "support": len(matches)}
            rows.append(row | {"recall": float(matches.mean())})
        return rows

    def table(self) -> str:
        """Return the report as text: a column per attribute, a line per measure; then the combinations."""
        cells = {"support": [str(row["support"]) for row in self.attributes]}
        cells["threshold"] = [f"{row['threshold']:.3f}" for row in self.attributes]
        cells |= {title: [_cell(row, key) for row in self.attributes] for key, title in MEASURES.items()}
        attributes = pd.DataFrame.from_dict(cells, orient="index", columns=self.names)
        combinations = pd.DataFrame(
            [(row["support"], f"{row['recall']:.3f}") for row in self.combinations],
            index=[row["what"] for row in self.combinations],
            columns=["images", "all predicted exactly"],
        )
        note = f"{len(self.truth)} images; in brackets 95 % intervals from {self.resamples} resamples; - is undefined"
        return f"{note}\n{attributes.to_string()}\n\n{combinations.to_string()}"

    def write(self, stem: str | Path) -> list[Path]:
        """Write <stem>.csv, .json, _confusion.png and _reliability.png, each atomically; return the paths."""
        names = (".csv", ".json", "_confusion.png", "_reliability.png")
        table, rows, *pictures = paths = [Path(f"{stem}{name}") for name in names]
        write_table(table, COLUMNS, self.rows)
        write_json(rows, self.rows)
        figures = confusion_figure(self.attributes), reliability_figure(self.probabilities, self.truth, self.names)
        for path, figure in zip(pictures, figures, strict=True):
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png")
        return paths


def confusion_figure(rows: Sequence[Mapping]) -> Figure:
    """Draw each attribute's counts, the truth in rows and the prediction in columns, shaded by the share of the row.

    `rows` have what, threshold, tp, fp, fn, tn.
    """
    figure, panels = _panels(len(rows), 3.2, 3.2)
    for row, panel in zip(rows, panels, strict=True):
        ax = panel.subplots()
        counts = np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]])
        totals = counts.sum(1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros((2, 2)), where=totals > 0)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (y, x), count in np.ndenumerate(counts):
            percent = f"{100 * shares[y, x]:.1f} %" if totals[y, 0] else "no image"
            colour = "white" if shares[y, x] > 0.5 else "black"
            ax.text(x, y, f"{count}\n{percent}", ha="center", va="center", color=colour)
        ax.set_xticks((0, 1), ("absent", "present"))
        ax.set_yticks((0, 1), ("absent", "present"), rotation=90, va="center")
        ax.set(title=row["what"], xlabel=f"predicted (threshold {row['threshold']:.3f})", ylabel="truth")
    return figure


def reliability_figure(probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str], bins: int = BINS) -> Figure:
    """Draw each attribute's observed frequency over the mean predicted probability in `bins` bins of equal width.

    Calibrated probabilities lie on the dashed diagonal. The area of a point grows with the images in its bin, which are
    counted below. `probabilities` and `truth` are (N, H).
    """
    figure, panels = _panels(len(names), 3.6, 4.8)
    for name, predicted, observed, panel in zip(names, probabilities.T, truth.T, panels, strict=True):
        ax, below = panel.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        bin_of = np.minimum((predicted * bins).astype(int), bins - 1)
        counts = np.bincount(bin_of, minlength=bins)
        used = np.flatnonzero(counts)
        x = [predicted[bin_of == index].mean() for index in used]
        y = [observed[bin_of == index].mean() for index in used]
        ax.plot((0, 1), (0, 1), "--", color="grey")
        ax.plot(x, y, alpha=0.4)
        ax.scatter(x, y, 20 + 130 * counts[used] / counts.max(), zorder=3)  # one image must not look like hundreds
        ax.set(title=name, ylabel="observed frequency", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        bars = below.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins)
        below.bar_label(bars, [str(count or "") for count in counts], fontsize=6)
        below.set(xlabel="mean predicted probability", ylabel="images", yticks=(), ylim=(0, 1.3 * counts.max()))
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[SubFigure]]:
    """Return a figure with `count` panels of this size in inches, in up to three columns."""
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = Figure((columns * width, rows * height), dpi=120, layout="constrained")
    return figure, list(figure.subfigures(rows, columns, squeeze=False).flat)[:count]


def resampled(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` bootstrap samples of `images` images as weights (r, images): how often each image occurs."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        yield weights.astype(np.float64)


def measure(
    logits: np.ndarray, truth: np.ndarray, weights: np.ndarray, thresholds: np.ndarray | float = 0.5
) -> dict[str, np.ndarray]:
    """Return counts and measures (R, H) of R samples, in which image n occurs weights[r, n] times; NaN if undefined.

    `logits` (N, H) are finite, `truth` (N, H) is bool, `thresholds` are one or (H,). `Report` defines the measures.
    Weights, which torchmetrics lacks, make a bootstrap of thousands of samples a matter of seconds.
    """
    probabilities = expit(logits)
    predicted = probabilities > thresholds
    total = weights.sum(1, keepdims=True).repeat(truth.shape[1], 1)
    tp, fp, fn, tn = (
        weights @ chosen.astype(np.float64)
        for chosen in (truth & predicted, ~truth & predicted, truth & ~predicted, ~truth & ~predicted)
    )
    ranking = [_ranking(weights, *columns) for columns in zip(logits.T, truth.T, strict=True)]
    gaps = [_gap(weights, *columns) for columns in zip(probabilities.T, truth.T, strict=True)]
    return dict(
        tp=tp, fp=fp, fn=fn, tn=tn,
        prevalence=_quotient(tp + fn, total),
        auc=np.stack([auc for auc, _ in ranking], 1),
        average_precision=np.stack([precision for _, precision in ranking], 1),
        precision=_quotient(tp, tp + fp),
        recall=_quotient(tp, tp + fn),
        f1=_quotient(2 * tp, 2 * tp + fp + fn),
        accuracy=_quotient(tp + tn, total),
        specificity=_quotient(tn, tn + fp),
        ece=np.stack(gaps, 1),
    )  # fmt: skip


def one_sided(labels: torch.Tensor, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (attribute, "positive" or "negative") for every class that no row of labels (N, H) has."""
    counts, absent = (labels > 0).sum(0).tolist(), []
    for name, positives in zip(names, counts, strict=True):
        absent += [(name, "positive")] * (positives == 0) + [(name, "negative")] * (positives == len(labels))
    return absent


def best_thresholds(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return for each attribute the threshold on sigmoid(logit) with the highest F1 on logits, labels (N, H).

    It lies half-way between the two probabilities that it separates; of equally good ones the nearest to 0.5 is taken.
    An attribute without a positive keeps 0.5. Raises UserError for logits that are not finite.
    """
    thresholds, (scores, truth) = {}, _checked(logits, labels, names)
    for index, name in enumerate(names):
        values, group = np.unique(expit(scores[:, index]), return_inverse=True)
        claimed = np.bincount(group.reshape(-1))[::-1].cumsum()[::-1]  # images at this probability or above
        hits = np.bincount(group.reshape(-1), weights=truth[:, index])[::-1].cumsum()[::-1]
        f1 = 2 * hits / (claimed + hits[0])
        below = np.concatenate([[0.0], values[:-1]])
        middles = (below + values) / 2
        candidates = np.where(middles < values, middles, below)[f1 == f1.max()]  # adjacent floats have no middle
        thresholds[name] = float(min(candidates, key=lambda value: abs(value - 0.5))) if hits[0] else 0.5
    return thresholds


def _checked(logits, labels, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels) > 0
    if scores.shape != truth.shape or scores.ndim != 2 or scores.shape[1] != len(names) or not len(scores):
        raise ValueError(f"logits {scores.shape} and labels {truth.shape} are not (N, {len(names)}) with N > 0")
    if not np.isfinite(scores).all():
        raise UserError("the classifier's logits are not finite; its training has diverged: lower the learning rate")
    return scores, truth


def _ranking(weights: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUC and average precision (R,) of one attribute for weights (R, N); NaN where a class is absent."""
    order = np.argsort(-scores)
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of groups with equal scores, highest first
    weights, truth = weights[:, order], truth[order]
    positives = np.add.reduceat(weights * truth, starts, axis=1)
    negatives = np.add.reduceat(weights * ~truth, starts, axis=1)
    hits, misses = positives.cumsum(1), negatives.cumsum(1)
    all_positives, all_negatives = hits[:, -1], misses[:, -1]
    beaten = all_negatives[:, None] - misses + negatives / 2
    auc = _quotient((positives * beaten).sum(1), all_positives * all_negatives)
    precision = hits / np.maximum(hits + misses, 1)
    return auc, _quotient((positives * precision).sum(1), all_positives)


def _gap(weights: np.ndarray, probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (R,) of one attribute for weights (R, N)."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    excess = np.zeros((len(truth), BINS))
    excess[np.arange(len(truth)), bins] = truth - probabilities
    return _quotient(np.abs(product(weights, excess.T)).sum(1), weights.sum(1))


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _interval(measure: str, point: float, values: np.ndarray) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    if np.isnan(point) or not len(values):
        return {measure: None if np.isnan(point) else float(point)}
    low, high = np.quantile(values, [0.025, 0.975])
    return {measure: float(point), f"{measure}_low": float(low), f"{measure}_high": float(high)}


def _cell(row: Mapping, measure: str) -> str:
    value, low, high = (row[key] for key in (measure, f"{measure}_low", f"{measure}_high"))
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"

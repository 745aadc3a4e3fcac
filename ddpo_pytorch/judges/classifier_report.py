"""Performance of a classifier on a labelled split: ranking, decisions and calibration, with intervals and figures."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import expit
from torchmetrics.utilities.plot import plot_confusion_matrix

from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.utils.cores import product
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, write_json

logger = logging.getLogger(__name__)
BINS, RESAMPLES = 15, 1000
COUNTS = ("tp", "fp", "fn", "tn")
# each has an interval
MEASURES = ("prevalence", "auc", "average_precision", "precision", "recall", "f1", "accuracy", "specificity", "ece")
WITH_INTERVAL = {name: (name, f"{name}_low", f"{name}_high") for name in MEASURES}
COLUMNS = ("what", "support", "threshold", *COUNTS, *chain.from_iterable(WITH_INTERVAL.values()))
_CHUNK = 100  # resamples measured at once; bounds the memory


class Report:
    """Measures of logits (N, H) against labels (N, H) of 0 and 1; `rows` lists attributes first, then combinations.

    An attribute is predicted as present where sigmoid(logit) > its threshold, by default 0.5. Its row has support
    (images with the attribute), threshold, tp, fp, fn, tn, and MEASURES: AUC, in which ties count one half; average
    precision without interpolation; precision, recall, F1, accuracy and specificity at the threshold; prevalence; and
    the expected calibration error over 15 bins of sigmoid(logit) of equal width (`calibration_error`).

    `<measure>_low` and `_high` are the 2.5 % and 97.5 % quantiles over `resamples` bootstrap samples of whole images
    drawn with `seed`; samples in which a measure is undefined are ignored. Images drawn twice increase the calibration
    error, so its quantiles are reflected at the value (basic bootstrap); as few images make the value too large, it may
    lie above its interval. Each occurring combination of labels ("exactly hair+MEL") has support and, as recall, the
    share of its images with all labels predicted correctly. Undefined values (no denominator, or one class absent) are
    None. Raises UserError for logits that are not finite.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        names: Sequence[str],
        thresholds: Mapping[str, float] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ):
        self.names, self.resamples = tuple(names), resamples
        scores, self.truth = _checked(logits, labels)
        limits = np.array([(thresholds or {}).get(name, 0.5) for name in self.names])
        self.probabilities, images = expit(scores), len(scores)
        point = measure(scores, self.truth, np.ones((1, images)), limits)
        chunks = [measure(scores, self.truth, weights, limits) for weights in resampled(images, resamples, seed)]
        drawn = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in MEASURES}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a measure that is undefined in every resample
            ranges = {key: np.nanquantile(values, [0.025, 0.975], axis=0) for key, values in drawn.items()}
        ranges["ece"] = np.clip(2 * point["ece"] - ranges["ece"][::-1], 0, 1)
        self.attributes = []
        for index, name in enumerate(self.names):
            counts = {key: int(point[key][0, index]) for key in COUNTS}
            row = {"what": name, "support": counts["tp"] + counts["fn"], "threshold": float(limits[index])} | counts
            for key, columns in WITH_INTERVAL.items():
                values = (point[key][0, index], *ranges[key][:, index])
                row |= {c: None if np.isnan(v) else float(v) for c, v in zip(columns, values, strict=True)}
            self.attributes.append(row)
        table = pd.DataFrame(self.truth, columns=self.names)
        table["exact"] = ((self.probabilities > limits) == self.truth).all(1)
        self.combinations = []
        for present, exact in table.groupby(list(self.names))["exact"]:
            row = {"what": f"exactly {'+'.join(compress(names, present)) or 'none'}", "support": len(exact)}
            self.combinations.append(dict.fromkeys(COLUMNS) | row | {"recall": float(exact.mean())})
        self.rows = self.attributes + self.combinations

    def table(self) -> str:
        """Return the report as text: a column per attribute and a line per measure, then the combinations."""
        cells = {}
        for row in self.attributes:
            cells[row["what"]] = {"support": row["support"], "threshold": f"{row['threshold']:.3f}"}
            for key, columns in WITH_INTERVAL.items():
                value, low, high = ("-" if row[column] is None else f"{row[column]:.3f}" for column in columns)
                cells[row["what"]][key] = f"{value} [{low}, {high}]"
        combinations = pd.DataFrame(self.combinations)[["what", "support", "recall"]].round(3)
        note = f"{len(self.truth)} images; in brackets 95 % intervals from {self.resamples} resamples; - is undefined"
        return f"{note}\n{pd.DataFrame(cells).to_string()}\n\n{combinations.to_string(index=False)}"

    def write(self, stem: str | Path) -> list[Path]:
        """Write <stem>.csv, .json, _confusion.png and _reliability.png, each atomically; return the paths."""
        names = (".csv", ".json", "_confusion.png", "_reliability.png")
        table, rows, *pictures = paths = [Path(f"{stem}{name}") for name in names]
        write_table(table, COLUMNS, self.rows)
        write_json(rows, self.rows)
        counts = torch.tensor([[[row["tn"], row["fp"]], [row["fn"], row["tp"]]] for row in self.attributes])
        confusion, _ = plot_confusion_matrix(counts, labels=self.names, cmap="Blues")
        confusion.set_size_inches(10, 7.5)
        figures = confusion, reliability_figure(self.probabilities, self.truth, self.names)
        for path, figure in zip(pictures, figures, strict=True):
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png")
        return paths


def reliability_figure(probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> Figure:
    """Plot observed frequencies over mean probabilities (N, H) of 15 bins, by attribute; area grows with images."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure((columns * 3.6, rows * 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for name, predicted, observed, ax in zip(names, probabilities.T, truth.T, axes, strict=False):
        bins = pd.DataFrame({"predicted": predicted, "observed": observed}).groupby(_bins(predicted, BINS))
        means, counts = bins.mean(), bins.size()
        ax.plot((0, 1), (0, 1), "--", color="grey")
        ax.plot(means["predicted"], means["observed"], alpha=0.4)
        ax.scatter(means["predicted"], means["observed"], 20 + 130 * counts / counts.max(), zorder=3)
        ax.set(title=name, xlabel="mean predicted probability", ylabel="observed frequency")
        ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    return figure


def resampled(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` bootstrap samples of `images` images as weights (r, images): how often each image occurs."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def measure(
    logits: np.ndarray, truth: np.ndarray, weights: np.ndarray, thresholds: np.ndarray | float = 0.5
) -> dict[str, np.ndarray]:
    """Return counts and measures (R, H) of R samples, in which image n occurs weights[r, n] times; NaN if undefined.

    `logits` (N, H) are finite, `truth` (N, H) is bool, `thresholds` is a number or (H,). `Report` defines the measures.
    torchmetrics has no such weights, which make a bootstrap of thousands of samples take seconds.
    """
    probabilities = expit(logits)
    predicted = probabilities > thresholds
    total = weights.sum(1, keepdims=True).repeat(truth.shape[1], 1)
    outcomes = truth & predicted, ~truth & predicted, truth & ~predicted, ~truth & ~predicted
    tp, fp, fn, tn = (weights @ chosen.astype(np.float64) for chosen in outcomes)
    rankings = [ranking(weights, *columns) for columns in zip(logits.T, truth.T, strict=True)]
    gaps = [calibration_error(weights, *columns, BINS) for columns in zip(probabilities.T, truth.T, strict=True)]
    auc, average_precision = np.stack(rankings, 2)
    return dict(
        tp=tp, fp=fp, fn=fn, tn=tn,
        prevalence=_quotient(tp + fn, total),
        auc=auc, average_precision=average_precision, ece=np.stack(gaps, 1),
        precision=_quotient(tp, tp + fp),
        recall=_quotient(tp, tp + fn),
        f1=_quotient(2 * tp, 2 * tp + fp + fn),
        accuracy=_quotient(tp + tn, total),
        specificity=_quotient(tn, tn + fp),
    )  # fmt: skip


def check_both_classes(labels: torch.Tensor, names: Sequence[str], table: str | Path, training: bool) -> None:
    """Warn of each attribute with only one class in a table's labels (N, H); if `training`, raise UserError instead."""
    for name, positives in zip(names, (labels > 0).sum(0).tolist(), strict=True):
        if 0 < positives < len(labels):
            continue
        absent = "negative" if positives else "positive"
        message = f"{str(table)!r} has no {absent} of {name!r} among its {len(labels)} images"
        if training:
            raise UserError(f"{message}; training needs both: add such images, or raise --limit if you gave one")
        logger.warning("%s; its AUC is undefined", message)


def best_thresholds(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return for each attribute the threshold on sigmoid(logit) with the highest F1 on logits and labels (N, H).

    It lies half-way between the two probabilities that it separates; of thresholds with equal F1, the nearest to 0.5
    is taken. Without positives it is 0.5. Raises UserError for logits that are not finite.
    """
    thresholds, (scores, truth) = {}, _checked(logits, labels)
    for index, name in enumerate(names):
        values, group = np.unique(expit(scores[:, index]), return_inverse=True)
        claimed = np.bincount(group.reshape(-1))[::-1].cumsum()[::-1]  # images with at least this probability
        hits = np.bincount(group.reshape(-1), weights=truth[:, index])[::-1].cumsum()[::-1]
        f1 = 2 * hits / (claimed + hits[0])
        below = np.concatenate([[0.0], values[:-1]])
        middles = (below + values) / 2
        candidates = np.where(middles < values, middles, below)[f1 == f1.max()]  # adjacent floats have no middle
        thresholds[name] = float(min(candidates, key=lambda value: abs(value - 0.5))) if hits[0] else 0.5
    return thresholds


def _checked(logits: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    if not logits.isfinite().all():
        raise UserError("the classifier's logits are not finite; its training has diverged: lower the learning rate")
    return logits.double().numpy(), (labels > 0).numpy()


def ranking(weights: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUC and average precision (R,) of scores (N,) for weights (R, N); NaN if a class is absent."""
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


def calibration_error(weights: np.ndarray, probabilities: np.ndarray, observed: np.ndarray, bins: int) -> np.ndarray:
    """Return the mean of |mean observed - mean probability| over bins, weighted by images: (R,) for weights (R, N)."""
    excess = np.zeros((len(observed), bins))
    excess[np.arange(len(observed)), _bins(probabilities, bins)] = observed - probabilities
    return _quotient(np.abs(product(weights, excess.T)).sum(1), weights.sum(1))


def _bins(probabilities: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((probabilities * bins).astype(int), bins - 1)


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)

"""What a classifier is worth on a labelled split: ranking, decisions and calibration, with intervals.

Written as CSV and JSON (one row an attribute, then one a combination of labels) and as two pictures.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ddpo_pytorch.data.tables import table_text
from ddpo_pytorch.judges.report_pictures import confusion_picture, reliability_picture
from ddpo_pytorch.utils.cores import product
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write

BINS = 15
RESAMPLES = 1000
# measures that have an interval, in the order of the columns, and their titles in the table.
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
    - ece: expected calibration error. sigmoid(logit) falls into 15 bins of equal width; the bins' gaps
      |share with the attribute - mean sigmoid(logit)| are averaged, weighted by their images.

    `<measure>_low` and `_high` are the 2.5 % and 97.5 % quantiles over `resamples` bootstrap samples of whole images
    drawn with `seed`; samples in which a measure is undefined do not count. A combination of labels that occurs ("only
    hair+MEL") has its support and, as recall, the share of its images all of whose labels are predicted exactly.
    A quotient without a denominator is None, as is an AUC where one class is absent.

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
        self.thresholds = {name: (thresholds or {}).get(name, 0.5) for name in self.names}
        self.logits, self.truth = _checked(logits, labels, self.names)
        self.probabilities = _sigmoid(self.logits)
        self.predicted = self.probabilities > np.array(list(self.thresholds.values()))
        self.rows = self._attributes(seed) + self._combinations()

    @property
    def attributes(self) -> list[dict]:
        return self.rows[: len(self.names)]

    @property
    def combinations(self) -> list[dict]:
        return self.rows[len(self.names) :]

    def _attributes(self, seed: int) -> list[dict]:
        images = len(self.truth)
        about = self.logits, self.truth
        thresholds = np.array(list(self.thresholds.values()))
        point = {name: values[0] for name, values in measure(*about, np.ones((1, images)), thresholds).items()}
        chunks = [measure(*about, weights, thresholds) for weights in resampled(images, self.resamples, seed)]
        rows = []
        for index, name in enumerate(self.names):
            row = dict.fromkeys(COLUMNS) | {"what": name, "threshold": self.thresholds[name]}
            row |= {count: int(point[count][index]) for count in COUNTS}
            row["support"] = row["tp"] + row["fn"]
            for key in MEASURES:
                values = np.concatenate([chunk[key][:, index] for chunk in chunks] or [np.empty(0)])
                row |= _interval(key, point[key][index], values)
            rows.append(row)
        return rows

    def _combinations(self) -> list[dict]:
        exact = (self.predicted == self.truth).all(1)
        present, group = np.unique(self.truth, axis=0, return_inverse=True)
        rows = []
        for index, combination in enumerate(present):
            matches = exact[group.reshape(-1) == index]
            on = [name for name, value in zip(self.names, combination, strict=True) if value]
            row = dict.fromkeys(COLUMNS) | {"what": f"only {'+'.join(on) or 'none'}", "support": len(matches)}
            rows.append(row | {"recall": float(matches.mean())})
        return rows

    def table(self) -> str:
        """The report as text: a column an attribute, measures with their intervals below; then the combinations."""
        lines = [["", *self.names], ["support", *(str(row["support"]) for row in self.attributes)]]
        lines.append(["threshold", *(f"{row['threshold']:.3f}" for row in self.attributes)])
        for measure, title in MEASURES.items():
            lines.append([title, *(_cell(row, measure) for row in self.attributes)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            f"{len(self.truth)} images; in brackets 95 % intervals from {self.resamples} resamples; - is undefined",
            *("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines),
        ]
        width = max(len(row["what"]) for row in self.combinations)
        text += ["", f"{'labels of an image':{width}}  images  all predicted exactly"]
        text += [f"{row['what']:{width}}  {row['support']:6d}  {row['recall']:.3f}" for row in self.combinations]
        return "\n".join(text)

    def write(self, stem: str | Path) -> list[Path]:
        """Write <stem>.csv, .json, _confusion.png and _reliability.png, each of them whole or not at all."""
        contents = {
            ".csv": table_text(COLUMNS, self.rows).encode(),
            ".json": (json.dumps(self.rows, indent=1) + "\n").encode(),
        }
        for name, picture in (
            ("confusion", confusion_picture(self.attributes)),
            ("reliability", reliability_picture(self.probabilities, self.truth, self.names, BINS)),
        ):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            contents[f"_{name}.png"] = buffer.getvalue()
        written = []
        for suffix, content in contents.items():
            path = Path(f"{stem}{suffix}")
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
            written.append(path)
        return written


def resampled(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`resamples` bootstrap samples of `images` images, in portions (r, images) of how often each image occurs."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        yield weights.astype(np.float64)


def measure(
    logits: np.ndarray, truth: np.ndarray, weights: np.ndarray, thresholds: np.ndarray | float = 0.5
) -> dict[str, np.ndarray]:
    """Counts and measures (R, H) of R samples, in which image n occurs weights[r, n] times; NaN where undefined.

    `logits` (N, H) are finite, `truth` (N, H) is bool, `thresholds` are one or (H,). `Report` says what is measured.
    """
    probabilities = _sigmoid(logits)
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
    """(attribute, "positive" or "negative") for every class that no row of labels (N, H) has."""
    counts, absent = (labels > 0).sum(0).tolist(), []
    for name, positives in zip(names, counts, strict=True):
        absent += [(name, "positive")] * (positives == 0) + [(name, "negative")] * (positives == len(labels))
    return absent


def best_thresholds(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """For each attribute the threshold on sigmoid(logit) with the highest F1 on logits, labels (N, H).

    It lies half-way between the two neighbouring probabilities it separates; of equally good ones the nearest to 0.5.
    An attribute without a positive keeps 0.5. Raises UserError for logits that are not finite.
    """
    thresholds, (scores, truth) = {}, _checked(logits, labels, names)
    for index, name in enumerate(names):
        values, group = np.unique(_sigmoid(scores[:, index]), return_inverse=True)
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


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(logits / 2)) / 2  # exp(-logit) would overflow


def _ranking(weights: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision (R,) of one attribute for weights (R, N); NaN where a class is absent."""
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
    """Expected calibration error (R,) of one attribute for weights (R, N)."""
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

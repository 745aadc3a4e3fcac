"""Effect of synthetic images on a classifier (table 4): measures on the same test images, differences, intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpo_pytorch.judges.classifier_report import measure, resampled

MEASURES = ("f1", "accuracy", "auc")
MACRO = "macro average"
RESAMPLES = 2000


def compare(
    logits: Mapping[str, np.ndarray],
    truth: np.ndarray,
    names: Sequence[str],
    chosen: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure classifiers on the same test images, and compare them with those of the first training set.

    `logits`: (S, N, H) by training set, S seeds each; `truth` (N, H) bool; `chosen` (N,) bool, the images that count.
    Returns a row for each attribute of `names` and their macro average, each training set and each of `MEASURES`:

    - mean and sd (n - 1) over seeds, values of each seed, images, and support, the images with the attribute;
    - difference of the means to the first training set, with the 2.5 % and 97.5 % quantiles (low, high) of a bootstrap
      over all N test images, whose resamples are the same for all seeds and training sets;
    - p = 2 min(P(difference <= 0), P(difference >= 0)) over resamples, the observed one counted in both;
    - seeds_agree: the differences of all seeds, each to the first training set's same seed, have one sign.

    Undefined values are None: AUC with one class absent, F1 without support, sd of one seed. The macro average is over
    the attributes that are defined; resamples in which a measure is undefined are left out. [] if no image is chosen.
    """
    keep = np.ones(len(truth), bool) if chosen is None else chosen
    if not keep.any():
        return []
    first, every = next(iter(logits)), np.ones((1, len(truth)))
    defined = ~np.isnan(_scores(logits[first][0], truth, every, keep)[0])

    def of_seeds(name: str, weights: np.ndarray) -> np.ndarray:
        """Return (S, R, H + 1, measures), the macro average last."""
        values = np.stack([_scores(one, truth, weights, keep) for one in logits[name]])
        with np.errstate(invalid="ignore"):
            macro = np.where(defined, values, 0).sum(2, keepdims=True) / defined.sum(0)
        return np.concatenate([values, macro], 2)

    point = {name: of_seeds(name, every)[:, 0] for name in logits}
    samples = {name: [] for name in logits}
    for weights in resampled(len(truth), resamples, seed):
        for name in logits:
            samples[name].append(of_seeds(name, weights).mean(0))
    means = {name: np.concatenate(parts) for name, parts in samples.items()}

    rows, support = [], truth[keep].sum(0).tolist()
    for column, attribute in enumerate((*names, MACRO)):
        for name in logits:
            for index, key in enumerate(MEASURES):
                values = point[name][:, column, index]
                row = {"attribute": attribute, "training": name, "measure": key, "images": int(keep.sum())}
                row |= {"support": None if attribute == MACRO else support[column]} | _over_seeds(values)
                if name != first:
                    of_each_seed = values - point[first][:, column, index]
                    row |= _difference(of_each_seed, (means[name] - means[first])[:, column, index])
                rows.append(row)
    return rows


def _scores(logits: np.ndarray, truth: np.ndarray, weights: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return (R, H, measures) of one classifier."""
    measured = measure(logits[keep], truth[keep], weights[:, keep])
    # without support, F1 is 0 or undefined for any classifier
    measured["f1"] = np.where(measured["tp"] + measured["fn"] > 0, measured["f1"], np.nan)
    return np.stack([measured[key] for key in MEASURES], -1)


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    if np.isnan(values).any():
        return {"mean": None, "sd": None, "values": [None] * len(values)}
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "sd": sd, "values": values.tolist()}


def _difference(of_each_seed: np.ndarray, resampled_means: np.ndarray) -> dict[str, Any]:
    observed, values = of_each_seed.mean(), resampled_means[~np.isnan(resampled_means)]
    if np.isnan(observed) or not len(values):
        return dict.fromkeys(("difference", "low", "high", "p", "seeds_agree")) | {"resamples": 0}
    low, high = np.quantile(values, [0.025, 0.975])
    p = min(1.0, 2 * (min((values <= 0).sum(), (values >= 0).sum()) + 1) / (len(values) + 1))
    agree = bool((of_each_seed > 0).all() or (of_each_seed < 0).all())
    numbers = {"difference": observed, "low": low, "high": high, "p": p}
    return {key: float(value) for key, value in numbers.items()} | {"seeds_agree": agree, "resamples": len(values)}

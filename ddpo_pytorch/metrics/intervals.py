"""Numbers with 95 % intervals: bootstrap over prompts and images, paired tests, t intervals over generation seeds.

Images of one prompt resemble each other, so that prompts are the unit of an interval meant for prompts like these
(`resample_groups`); for the prompts at hand and no others it is the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpo_pytorch.metrics.arrays import finite
from ddpo_pytorch.metrics.resampling import Sample, replicate_means

REPLICATES = 2000


@dataclass(frozen=True)
class Quantity:
    """A number, its 95 % interval (None where there is none), the images it rests on, how the interval was made."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    how: str

    @classmethod
    def missing(cls, why: str) -> "Quantity":
        """No number, with the reason."""
        return cls(None, None, None, 0, why)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """For JSON: numbers that are not finite become None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        kept = {
            name: None if value is None or not math.isfinite(value) else float(value) for name, value in numbers.items()
        }
        return {**kept, "n": int(self.n), "how": self.how}


def bootstrap_mean(
    values: np.ndarray,
    groups: np.ndarray,
    seed: int,
    *,
    resample_groups: bool,
    replicates: int = REPLICATES,
    share: bool = True,
) -> Quantity:
    """Mean of the values (N,) of all images, with a percentile interval; groups (N,) are the images' prompts.

    resample_groups draws prompts with replacement and images within each drawn prompt, else images within the prompts
    as they are. `resampling.replicate_means` has the details. Values that are all 0 or all 1 leave nothing to resample;
    their interval is the exact binomial one (Clopper-Pearson), counting prompts or images as the independent trials,
    unless they are no `share` of anything (a contrast of 1).
    """
    values, groups = _columns(groups, "values", values)
    if not len(values):
        return Quantity.missing("no images")
    if share and len(values) > 1 and values[0] in (0, 1) and (values == values[0]).all():
        prompts, value = len(np.unique(groups)), float(values[0])
        trials = prompts if resample_groups and prompts > 1 else len(values)
        return Quantity(value, *_all_equal(value, trials), len(values), f"exact binomial, {trials} trials")
    return _resampled(values, groups, seed, resample_groups, replicates)


def bootstrap_difference(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, seed: int, *, replicates: int = REPLICATES
) -> Quantity:
    """Mean of b - a over images (N,) that share their noise, resampling prompts and, within them, pairs."""
    a, b, groups = _columns(groups, "values", a, b)
    if not len(a):
        return Quantity.missing("no pairs")
    return _resampled(b - a, groups, seed, True, replicates)


def bootstrap_unpaired_difference(
    a: np.ndarray, groups_a: np.ndarray, b: np.ndarray, groups_b: np.ndarray, seed: int
) -> Quantity:
    """mean(b) - mean(a) of images (N,) and (M,) that do not pair up, over the prompts that both have.

    Each replicate draws the same prompts for both sides, and images independently. n counts the images of both. The
    difference is one of two mixes of prompts, unless both sides have their images in the same proportions.
    """
    a, groups_a = _columns(groups_a, "values of a", a)
    b, groups_b = _columns(groups_b, "values of b", b)
    shared = np.intersect1d(groups_a, groups_b)
    if not len(shared):
        return Quantity.missing("no prompt in common")
    sides = []
    for values, groups in ((a, groups_a), (b, groups_b)):
        kept = np.isin(groups, shared)
        sides.append(Sample(values[kept, None], groups[kept]))
    draws_a, draws_b = replicate_means(sides, seed, resample_groups=True, replicates=REPLICATES)
    value = float(sides[1].mean[0] - sides[0].mean[0])
    low, high = _percentiles((draws_b - draws_a)[:, 0])
    images = sides[0].images + sides[1].images
    how = _how(REPLICATES, f"{len(shared)} prompts of both sides and their images, not paired")
    return Quantity(value, float(low), float(high), images, how)


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, groups: np.ndarray, seed: int) -> Quantity:
    """sum(numerator) / sum(denominator) over images (N,), such as precision and recall; images resampled in prompts.

    n counts the images with a denominator. Replicates whose denominator is 0 are left out. A share of exactly 0 or 1
    has the exact binomial interval, as in `bootstrap_mean`.
    """
    numerator, denominator, groups = _columns(groups, "values", numerator, denominator)
    images, total = int(np.count_nonzero(denominator)), denominator.sum()
    if total == 0:
        return Quantity.missing("the denominator is 0")
    value = float(numerator.sum() / total)
    counts = np.isin(denominator, (0, 1)).all() and np.isin(numerator, (0, 1)).all()
    if counts and value in (0, 1) and (numerator <= denominator).all():
        return Quantity(value, *_all_equal(value, images), images, f"exact binomial, {images} trials")
    sample = Sample(np.stack([numerator, denominator], axis=1), groups)
    draws = replicate_means([sample], seed, resample_groups=False, replicates=REPLICATES)[0]
    draws = draws[draws[:, 1] > 0]
    low, high = _percentiles(draws[:, 0] / draws[:, 1])
    how = _how(len(draws), f"images within {len(np.unique(groups))} prompts")
    return Quantity(value, float(low), float(high), images, how)


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """(pairs 0 -> 1, pairs 1 -> 0, exact two-sided p) of paired 0/1 outcomes (N,) (McNemar 1947).

    Of the g + l pairs that changed, each is a gain with probability 1/2 under the null: p = 2 P(X <= min(g, l)), at
    most 1. Pairs count as independent: where images of a prompt change together, `sign_permutation_p` is the test.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1 or not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError(f"McNemar's test needs two equally long arrays of 0 and 1, got shapes {a.shape} and {b.shape}")
    gained, lost = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())
    changed, few = gained + lost, min(gained, lost)
    logs = [
        math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) - changed * math.log(2)
        for k in range(few + 1)
    ]
    top = max(logs)  # the sum is taken relative to its largest term, which alone may be below the smallest float
    return gained, lost, min(1.0, 2 * math.exp(top) * math.fsum(math.exp(value - top) for value in logs))


def sign_permutation_p(differences: np.ndarray, groups: np.ndarray, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of a sign-flip test on the prompts' mean differences: the null is symmetry around 0.

    The statistic is the absolute mean over prompts, every prompt with the same weight. Up to 12 prompts all 2^G signs
    are tried (so p is at least 2 / 2^G); beyond, `draws` random ones, and p = (1 + as extreme) / (1 + draws).
    """
    differences, groups = _columns(groups, "differences", differences)
    if not len(differences):
        raise ValueError("a sign-flip test needs at least one difference")
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(index, differences) / counts
    # sums that differ by rounding only are ties, and ties are as extreme
    bound = abs(means.sum()) - 1e-12 * np.abs(means).sum()
    if len(means) <= 12:
        signs = 1 - 2 * (np.arange(2 ** len(means))[:, None] >> np.arange(len(means)) & 1)
        return float(np.mean(np.abs(signs @ means) >= bound))
    rng, extreme, chunk = np.random.default_rng(seed), 0, max(1, 4_000_000 // len(means))
    for start in range(0, draws, chunk):
        signs = rng.integers(0, 2, (min(chunk, draws - start), len(means)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ means) >= bound).sum())
    return (1 + extreme) / (1 + draws)


def over_runs(values: Sequence[float]) -> Quantity:
    """Mean of one number per generation seed, with a t interval from three seeds on; n counts the seeds."""
    values = finite(values, "runs")
    if not len(values):
        return Quantity.missing("no runs")
    mean, runs = float(values.mean()), len(values)
    if runs < 3:
        return Quantity(mean, None, None, runs, f"{runs} generation seed{'s' * (runs > 1)}: an interval needs 3")
    half = t_quantile(runs - 1) * float(values.std(ddof=1)) / math.sqrt(runs)
    return Quantity(mean, mean - half, mean + half, runs, f"t interval over {runs} generation seeds")


def t_quantile(degrees: int) -> float:
    """The t with P(|T| <= t) = 0.95 for an integer number of degrees of freedom.

    With angle = atan(t / sqrt(degrees)) the probability is a finite sum of powers of its cosine (Abramowitz and Stegun,
    26.7.3 and 26.7.4), rising in the angle, which bisection therefore finds.
    """
    low, high = 0.0, math.pi / 2
    while high - low > 1e-15:
        angle = (low + high) / 2
        cosine, total = math.cos(angle), 0.0
        term = cosine if degrees % 2 else 1.0
        for power in range(3 if degrees % 2 else 2, degrees + 1, 2):
            total += term
            term *= cosine * cosine * (power - 1) / power
        share = math.sin(angle) * total
        if degrees % 2:
            share = (angle + share) * 2 / math.pi
        low, high = (angle, high) if share < 0.95 else (low, angle)
        if angle in (0.0, math.pi / 2) or (low + high) / 2 in (low, high):
            break
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _columns(groups: np.ndarray, what: str, *columns: np.ndarray) -> list[np.ndarray]:
    """The columns (N,) as finite float64, and the groups (N,), all equally long."""
    arrays = [finite(np.asarray(column).reshape(-1), what) for column in columns]
    arrays.append(np.asarray(groups).reshape(-1))
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"{what} and groups must be equally long, got {[len(array) for array in arrays]}")
    return arrays


def _resampled(values: np.ndarray, groups: np.ndarray, seed: int, resample_groups: bool, replicates: int) -> Quantity:
    """Mean of values (N,), at least one, with its bootstrap interval."""
    mean, prompts = float(values.mean()), len(np.unique(groups))
    if len(values) == 1:
        return Quantity(mean, None, None, 1, "one image: no interval")
    sample = Sample(values[:, None], groups)
    draws = replicate_means([sample], seed, resample_groups=resample_groups, replicates=replicates)[0][:, 0]
    within = f"images within {prompts} prompts" if prompts > 1 else "the prompt's images"
    units = f"{prompts} prompts and their images" if resample_groups else within
    low, high = np.clip(_percentiles(draws), values.min(), values.max())  # as no mean lies outside
    return Quantity(mean, float(low), float(high), len(values), _how(replicates, units))


def _percentiles(draws: np.ndarray) -> np.ndarray:
    return np.percentile(draws, [2.5, 97.5])


def _how(replicates: int, units: str) -> str:
    return f"percentile bootstrap, {replicates} replicates over {units}"


def _all_equal(share: float, trials: int) -> tuple[float, float]:
    """The Clopper-Pearson interval of 0 or all of `trials`."""
    edge = 0.025 ** (1 / trials)
    return (0.0, 1 - edge) if share == 0 else (edge, 1.0)

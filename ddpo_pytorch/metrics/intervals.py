"""Numbers with 95 % intervals: bootstrap over prompts and images, paired tests, t intervals over generation seeds.

Images of one prompt are correlated: intervals that should hold for similar prompts resample prompts
(`resample_groups`), intervals for exactly these prompts resample images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from scipy import stats

REPLICATES, FLIPS = 2000, 10_000
CHUNK = 2_000_000  # random numbers drawn at a time
JACKKNIFE_GROUPS = 10
Array = np.ndarray
MAX_LEVELS = 8  # distinct values up to which the bootstrap draws counts instead of images


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval (None if there is none), the number of images, and the interval's method.

    `left_out` (G,): of a jackknife whose estimates may be subtracted, the value without each group of images.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    how: str
    left_out: Array | None = field(default=None, compare=False, repr=False)

    @classmethod
    def missing(cls, why: str) -> Self:
        """Return an estimate without a number, with the reason."""
        return cls(None, None, None, 0, why)

    @classmethod
    def around(cls, value: float, half: float, n: int, how: str, bounds: tuple = (-math.inf, math.inf)) -> Self:
        """Return value +- half, clipped to `bounds`."""
        return cls(value, *np.clip([value - half, value + half], *bounds).tolist(), n, how)

    @classmethod
    def binomial(cls, share: float, trials: int, images: int) -> Self:
        """Return a share of `trials` with its exact interval (Clopper-Pearson)."""
        low, high = stats.binomtest(round(share * trials), trials).proportion_ci(0.95, "exact")
        return cls(float(share), float(low), float(high), images, f"exact binomial, {trials} trials")

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return the fields for JSON; numbers that are not finite become None."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        shown = {name: float(x) if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
        return shown | {"n": int(self.n), "how": self.how}


def finite(features: Any, what: str, first: int = 0) -> Array:
    """Return `features` (N, ...), rows `first` ... of `what`, as float64. Raises ValueError for NaN and infinity."""
    features = np.asarray(features, dtype=np.float64)
    good = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not good.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(good))} holds NaN or infinity")
    return features


def unit_rows(features: Array, what: str, first: int = 0) -> Array:
    """Return finite rows (N, F) scaled to length 1. Raises ValueError for NaN, infinity and a row of zeros."""
    features = finite(features, what, first)
    scale = np.abs(features).max(axis=1, keepdims=True, initial=0)
    if not scale.all():
        raise ValueError(f"{what}: row {first + int(np.argmin(scale))} is zero, so it has no cosine distance")
    features = features / scale  # squares of very large or small numbers would overflow
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def bootstrap_mean(
    values: Array, groups: Array, seed: int, *, resample_groups: bool, replicates: int = REPLICATES, share: bool = True
) -> Estimate:
    """Return the mean of values (N,) of images of prompts `groups` (N,), with a bootstrap interval.

    Resampling values that are all 0 or all 1 has no effect: if they are a `share`, they get the exact binomial interval
    (Clopper-Pearson) with prompts or images as trials. Differences of pairs are not shares.
    """
    values, groups = _columns(groups, values)
    if not len(values):
        return Estimate.missing("no images")
    mean, prompts = float(values.mean()), len(np.unique(groups))
    if len(values) == 1:
        return Estimate(mean, None, None, 1, "one image: no interval")
    if share and values[0] in (0, 1) and (values == values[0]).all():
        trials = prompts if resample_groups and prompts > 1 else len(values)
        return Estimate.binomial(values[0], trials, len(values))
    (draws,) = replicate_means([(values, groups)], seed, resample_groups=resample_groups, replicates=replicates)
    ends = np.clip(np.percentile(draws, [2.5, 97.5]), values.min(), values.max()).tolist()
    units = f"images within {prompts} prompts" if prompts > 1 else "the prompt's images"
    units = f"{prompts} prompts and their images" if resample_groups else units
    return Estimate(mean, *ends, len(values), f"percentile bootstrap, {replicates} replicates over {units}")


def bootstrap_unpaired_difference(a: Array, groups_a: Array, b: Array, groups_b: Array, seed: int) -> Estimate:
    """Return mean(b) - mean(a) of unpaired images (N,) and (M,) over shared prompts; both resample the same ones."""
    shared = np.intersect1d(groups_a, groups_b)
    if not len(shared):
        return Estimate.missing("no prompt in common")
    sides = [_columns(groups_a, a), _columns(groups_b, b)]
    sides = [[column[np.isin(groups, shared)] for column in (values, groups)] for values, groups in sides]
    draws_a, draws_b = replicate_means(sides, seed, resample_groups=True)
    (a, _), (b, _) = sides
    ends = np.percentile(draws_b - draws_a, [2.5, 97.5]).tolist()
    how = f"percentile bootstrap, {REPLICATES} replicates over {len(shared)} prompts of both sides and their images"
    return Estimate(float(b.mean() - a.mean()), *ends, len(a) + len(b), f"{how}, not paired")


def difference_interval(a: tuple, b: tuple, seeds: Sequence, resample_groups: bool) -> list[float]:
    """Return the ends of the interval of mean(b) - mean(a); each side is (values, prompts), seeds are one for each."""
    (draws_a,) = replicate_means([a], seeds[0], resample_groups=resample_groups)
    (draws_b,) = replicate_means([b], seeds[1], resample_groups=resample_groups)
    return np.percentile(draws_b - draws_a, [2.5, 97.5]).tolist()


def bootstrap_ratio(numerator: Array, denominator: Array, groups: Array, seed: int) -> Estimate:
    """Return sum(numerator) / sum(denominator) over images (N,), such as recall; n counts images with a denominator.

    Replicates of images with denominator 0 are dropped. Ratios that are all 0 or all 1 get the exact binomial interval.
    """
    numerator, denominator, groups = _columns(groups, numerator, denominator)
    images, total = int(np.count_nonzero(denominator)), denominator.sum()
    if total == 0:
        return Estimate.missing("the denominator is 0")
    value = float(numerator.sum() / total)
    if not numerator.any() or (numerator == denominator).all():
        return Estimate.binomial(value, images, images)
    (draws,) = replicate_means([(np.stack([numerator, denominator], axis=1), groups)], seed, resample_groups=False)
    draws = draws[draws[:, 1] > 0]
    ends = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5]).tolist()
    how = f"percentile bootstrap, {len(draws)} replicates over images within {len(np.unique(groups))} prompts"
    return Estimate(value, *ends, images, how)


def _columns(groups: Array, *columns: Array) -> list[Array]:
    """Return the columns (N,) as finite float64, and the groups (N,). Raises ValueError for unequal lengths."""
    arrays = [finite(np.asarray(column).reshape(-1), "values") for column in columns] + [np.asarray(groups).reshape(-1)]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"values and groups must be equally long, got {[len(array) for array in arrays]}")
    return arrays


def jackknife_half_width(value: float, left_out: Array, sizes: Sequence[int]) -> float:
    """Return half the width of a value's interval; left_out (G,): the value without each of G random image groups.

    t times the standard error, weighted for unequal groups (Busing, Meijer and van der Leeden 1999).
    """
    shares = np.asarray(sizes) / np.sum(sizes)
    centre = len(shares) * value - ((1 - shares) * left_out).sum()
    pseudo = (value - (1 - shares) * left_out) / shares
    error = np.sqrt(((pseudo - centre) ** 2 * shares / (1 - shares)).mean())
    return float(stats.t.ppf(0.975, len(shares) - 1) * error)


def jackknife(measure: Callable[[Array], float], count: int, seed: int, bounds: tuple[float, float]) -> Estimate:
    """Return measure(indices) of all `count` images with a jackknife interval, clipped to `bounds`."""
    value = measure(np.arange(count))
    if count < 2 * JACKKNIFE_GROUPS:
        return Estimate(value, None, None, count, f"no interval below {2 * JACKKNIFE_GROUPS} images")
    groups = np.array_split(np.random.default_rng([seed, 10]).permutation(count), JACKKNIFE_GROUPS)
    left_out = np.array([measure(np.setdiff1d(np.arange(count), group)) for group in groups])
    half = jackknife_half_width(value, left_out, [len(group) for group in groups])
    return Estimate.around(value, half, count, f"jackknife over {JACKKNIFE_GROUPS} random groups of the images", bounds)


class GroupedSample:
    """Values (N, V) of N images in G prompts: counts (G,), means (G, V), noise (G, V) = variance of resampled means.

    A replicate needs only the sum over a prompt's resampled images. For few distinct values (0 and 1), one multinomial
    draw of their counts yields it; otherwise images are drawn. `cost` is the number of random numbers per replicate.
    """

    def __init__(self, values: Array, groups: Array):
        order = np.argsort(groups, kind="stable")
        _, self.starts, self.counts = np.unique(groups[order], return_index=True, return_counts=True)
        self.cost, self.mean, self._values = len(values), values.mean(axis=0), values[order]
        self.means = np.add.reduceat(self._values, self.starts) / self.counts[:, None]
        residuals = self._values - np.repeat(self.means, self.counts, axis=0)
        self.noise = np.add.reduceat(residuals**2, self.starts) / (self.counts**2)[:, None]
        self.weights = (self.counts / len(values))[:, None]
        levels, index = np.unique(self._values, axis=0, return_inverse=True)
        self.levels = levels if len(levels) <= MAX_LEVELS else None
        if self.levels is not None:
            one_hot = np.eye(len(levels))[index.reshape(-1)]
            self._shares = np.add.reduceat(one_hot, self.starts) / self.counts[:, None]  # (G, C)
            self.cost = self._shares.size

    def draw(self, prompts: Array, rng: np.random.Generator) -> Array:
        """Return means (..., V) of as many images as each of these prompts (...) has, drawn with replacement."""
        counts = self.counts[prompts]
        if self.levels is not None:
            return rng.multinomial(counts, self._shares[prompts]) @ self.levels / counts[..., None]
        lengths = counts.reshape(-1)
        positions = rng.random(int(lengths.sum()))
        positions *= np.repeat(lengths, lengths)
        images = positions.astype(np.int64)
        images += np.repeat(self.starts[prompts].reshape(-1), lengths)
        sums = np.add.reduceat(self._values[images], np.cumsum(lengths) - lengths)
        return sums.reshape(*prompts.shape, -1) / counts[..., None]


def replicate_means(sides: Sequence, seed: Any, *, resample_groups: bool, replicates: int = REPLICATES) -> list[Array]:
    """Return (replicates, V) bootstrap means over all images of each side (values (N,) or (N, V), prompts (N,)).

    All sides have the same G prompts. Without `resample_groups`, each prompt's images are resampled. With it, G prompts
    are drawn with replacement (the same for all sides) and images within them. The prompts' means already contain the
    noise of their images, which the second step adds again, so they are first shrunk such that both steps have the
    variance of the first alone, or that of the images if larger (Davison and Hinkley 1997, section 3.8). As with any
    bootstrap, intervals from few prompts are too narrow: by 3 % for 20, by 11 % for 5.
    """
    samples = [GroupedSample(values.reshape(len(values), -1), groups) for values, groups in sides]
    rng, prompts = np.random.default_rng(seed), len(samples[0].counts)
    chunk = max(1, CHUNK // max(prompts, sum(sample.cost for sample in samples)))
    shrinkage = _shrinkage(samples) if resample_groups else 1.0
    results: list[list[Array]] = [[] for _ in samples]
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = np.broadcast_to(np.arange(prompts), (rows, prompts))
        if resample_groups:
            drawn = rng.integers(0, prompts, (rows, prompts))
        for sample, result in zip(samples, results, strict=True):
            prompt_means = sample.means[drawn]  # (rows, G, V)
            means = sample.draw(drawn, rng) - prompt_means + sample.mean + shrinkage * (prompt_means - sample.mean)
            weights = sample.counts[drawn][..., None]
            result.append((weights * means).sum(axis=1) / weights.sum(axis=1))
    return [np.concatenate(result) for result in results]


def _shrinkage(samples: Sequence[GroupedSample]) -> Array:
    """Return the factor (V,) of prompts' deviations: sqrt(1 - images' variance / prompts' variance), at least 0."""
    deviations = [sample.weights * (sample.means - sample.mean) for sample in samples]
    total = deviations[0] if len(samples) == 1 else deviations[1] - deviations[0]  # of two samples: their difference
    between = (total**2).sum(axis=0)
    within = sum((sample.weights**2 * sample.noise).sum(axis=0) for sample in samples)
    return np.sqrt(np.clip(1 - within / np.where(between > 0, between, np.inf), 0, 1)) * (between > 0)


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of independent 0/1 pairs, of which `gained` rose and `lost` fell (McNemar 1947)."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip_p(differences: Array, groups: Array, seed: int) -> float:
    """Return the two-sided p of a sign-flip test on the prompts' mean differences; the null is symmetry around 0.

    Up to 12 prompts, all patterns of signs are enumerated; beyond that, FLIPS are sampled, and
    p = (1 + number as extreme) / (1 + FLIPS). Not scipy's permutation_test, which takes minutes for many pairs.
    """
    differences, groups = _columns(groups, differences)
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(index, differences) / counts
    bound = abs(means.sum()) - 1e-12 * np.abs(means).sum()  # sums that differ by rounding are as extreme
    if len(means) <= 12:
        signs = 1 - 2 * (np.arange(2 ** len(means))[:, None] >> np.arange(len(means)) & 1)
        return float(np.mean(np.abs(signs @ means) >= bound))
    rng, extreme, chunk = np.random.default_rng(seed), 0, max(1, 4_000_000 // len(means))
    for start in range(0, FLIPS, chunk):
        signs = rng.integers(0, 2, (min(chunk, FLIPS - start), len(means)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ means) >= bound).sum())
    return (1 + extreme) / (1 + FLIPS)


def mean_over_runs(values: Sequence[float]) -> Estimate:
    """Return the mean of one number per generation seed, with a t interval for at least three; n counts the seeds."""
    values = finite(values, "runs")
    mean, runs = float(values.mean()), len(values)
    if runs < 3:
        return Estimate(mean, None, None, runs, f"{runs} generation seed{'s' * (runs > 1)}: an interval needs 3")
    half = float(stats.t.ppf(0.975, runs - 1) * values.std(ddof=1) / math.sqrt(runs))
    return Estimate.around(mean, half, runs, f"t interval over {runs} generation seeds")

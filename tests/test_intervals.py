"""Intervals against the naive bootstrap, scipy and simulations with a known truth; paired tests; t intervals."""

import json
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats

from ddpo_pytorch.metrics import intervals


def clustered(seed):
    """Return binary values (288,) with mean 1/2 and their prompts (288,), whose rates vary."""
    rng, groups = np.random.default_rng([seed, 17]), np.repeat(np.arange(24), 12)
    rates = rng.beta(1 / 0.3, 1 / 0.3, 24)
    return (rng.random(len(groups)) < rates[groups]).astype(float), groups


def paired(a, b, groups, seed, **options):
    return intervals.bootstrap_mean(b.astype(float) - a, groups, seed, resample_groups=True, share=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("resample_groups", [True, False])
def test_replicates_are_those_of_the_naive_bootstrap(resample_groups):
    # prompts differ by far more than the noise of their images, and have different numbers of them
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(12) * 3, rng.integers(50, 100, 12)))
    values = rng.permutation(np.linspace(0.02, 0.98, 12))[groups // 3]
    values = (rng.random(len(groups)) < values) * 1.0 if resample_groups else rng.normal(size=len(groups)) + 10 * values
    estimate = intervals.bootstrap_mean(values, groups, 5, resample_groups=resample_groups, replicates=8_000)
    # two-level bootstrap means in plain loops
    rng, members, expected = np.random.default_rng(6), [values[groups == group] for group in np.unique(groups)], []
    for _ in range(8_000):
        drawn = rng.integers(0, len(members), len(members)) if resample_groups else range(len(members))
        expected.append(np.mean(np.concatenate([rng.choice(members[i], len(members[i])) for i in drawn])))
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12) and estimate.n == len(groups)
    # 8,000 replicates know a 2.5 % percentile to about 3 % of the standard deviation; four times that
    ends = pytest.approx(np.percentile(expected, [2.5, 97.5]), abs=0.12 * np.std(expected), rel=0)
    assert (estimate.low, estimate.high) == ends


def over_prompts(seed):
    return intervals.bootstrap_mean(*clustered(seed), seed, resample_groups=True, replicates=500)


def difference(seed, pairs=False):
    rng, groups = np.random.default_rng([seed, 5]), np.repeat(np.arange(24), 10)
    easy, gain = rng.uniform(0.1, 0.5, 24), rng.uniform(0, 0.4, 24)
    a, b = rng.random(240) < easy[groups], rng.random(240) < (easy + gain)[groups]
    if pairs:
        return paired(a, b, groups, seed, replicates=500)
    return intervals.bootstrap_unpaired_difference(a, groups, b, groups, seed)


SEEN, RIGHT = np.linspace(0.2, 0.7, 6), np.linspace(0.9, 0.3, 6)


def ratio(seed):
    rng, groups = np.random.default_rng([seed, 7]), np.repeat(np.arange(6), 30)
    denominator = rng.random(180) < SEEN[groups]
    return intervals.bootstrap_ratio(denominator & (rng.random(180) < RIGHT[groups]), denominator, groups, seed)


TRUTHS = {over_prompts: 0.5, difference: 0.2, partial(difference, pairs=True): 0.2}
TRUTHS[ratio] = (SEEN * RIGHT).sum() / SEEN.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("simulate", "truth"), TRUTHS.items())
def test_intervals_cover_the_truth(simulate, truth):
    estimates = [simulate(seed) for seed in range(300)]
    assert 0.90 < np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) < 0.99


def test_values_that_are_all_equal_one_none_and_not_usable():
    zeros, groups = np.zeros(40), np.arange(40) % 8
    for values, of_prompts, counts in ((zeros, False, (0, 40)), (zeros + 1, True, (8, 8))):
        found = intervals.bootstrap_mean(values, groups, 0, resample_groups=of_prompts)
        expected = scipy.stats.binomtest(*counts).proportion_ci(0.95, "exact")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    other = intervals.bootstrap_mean(zeros + 0.25, groups, 0, resample_groups=True)
    assert (other.value, other.low, other.high) == (0.25, 0.25, 0.25)
    same = paired(zeros, zeros + 1, groups, 0)  # a difference is no share
    assert (same.value, same.low, same.high) == (1, 1, 1)
    one = intervals.bootstrap_mean(np.array([0.5]), np.array([3]), 0, resample_groups=True)
    assert (one.value, one.low, one.high, one.n) == (0.5, None, None, 1)
    nothing, zeros, ones = np.empty(0), np.zeros(2), np.ones(2)
    for none in (
        intervals.bootstrap_mean(nothing, nothing, 0, resample_groups=True),
        intervals.bootstrap_ratio(zeros, zeros, zeros, 0),
        intervals.bootstrap_unpaired_difference(ones, zeros, ones, ones, 0),
    ):
        assert none.value is None and none.low is None and none.n == 0 and none.how
    with pytest.raises(ValueError, match="row 3"):
        intervals.bootstrap_mean(np.array([1, 1, 1, np.nan, 1]), np.zeros(5), 0, resample_groups=False)
    with pytest.raises(ValueError, match="equally long.*5, 4, 5"):
        intervals.bootstrap_ratio(np.ones(5), np.ones(4), np.zeros(5), 0)


def test_results_depend_on_the_seed_and_not_on_the_order_of_images():
    values, groups = clustered(0)
    first = intervals.bootstrap_mean(values, groups, 1, resample_groups=True)
    order = np.random.default_rng(0).permutation(len(values))
    assert intervals.bootstrap_mean(values[order], groups[order], 1, resample_groups=True) == first
    assert intervals.bootstrap_mean(values, groups, 2, resample_groups=True) != first


def test_unpaired_differences_draw_the_same_prompts_for_both_sides():
    # prompts differ widely, and every b is its prompt's a plus 1: only shared draws leave no more than image noise
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(10), 100)
    a, b = groups * 100 + rng.normal(size=1000), groups * 100 + 1 + rng.normal(size=1000)
    estimate = intervals.bootstrap_unpaired_difference(a, groups, b, groups, 0)
    assert estimate.value == pytest.approx(b.mean() - a.mean(), abs=1e-9) and estimate.n == 2000
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 1000), rel=0.15)


def test_a_ratio_by_hand_and_its_exact_edges():
    seen, right = np.array([1, 1, 0, 1, 1]), np.array([1, 0, 0, 1, 1])
    estimate = intervals.bootstrap_ratio(right, seen, np.zeros(5), 0)
    assert estimate.value == 0.75 and estimate.n == 4 and 0 <= estimate.low < 0.75 < estimate.high <= 1
    edge = intervals.bootstrap_ratio(seen, seen, np.zeros(5), 0)
    assert edge.low == pytest.approx(scipy.stats.binomtest(4, 4).proportion_ci().low) and edge.high == 1
    weighted = intervals.bootstrap_ratio(0.3 * seen, 0.3 * seen, np.zeros(5), 0)
    assert (weighted.value, weighted.low, weighted.n) == (1, edge.low, 4)


@pytest.mark.parametrize("gained, lost", [(0, 0), (7, 7), (3, 14), (900, 300)])
def test_mcnemar_is_the_binomial_test_of_the_changes(gained, lost):
    n = gained + lost
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)
    assert intervals.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("prompts", [9, 14])
def test_sign_flips_equal_scipys_over_all_signs(prompts):
    rng = np.random.default_rng(prompts)
    groups = np.repeat(np.arange(prompts), rng.integers(1, 7, prompts))
    differences = rng.normal(0.4, 1, len(groups))
    means = np.array([differences[groups == group].mean() for group in range(prompts)])
    exact = scipy.stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    tolerance = 1e-12 if prompts == 9 else 5 * math.sqrt(exact / 10_000)  # 14 have more patterns than the draws
    assert intervals.sign_flip_p(differences, groups, 0) == pytest.approx(exact, abs=tolerance)


def test_an_interval_over_runs_needs_three_and_estimates_become_json():
    values = [0.5, 0.6, 0.58, 0.61]
    estimate = intervals.mean_over_runs(values)
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-9) and estimate.n == 4
    two = intervals.mean_over_runs(values[:2])
    assert two.value == pytest.approx(0.55) and two.low is None and two.high is None
    estimate = intervals.Estimate(np.float64(0.5), math.nan, math.inf, np.int64(3), "so")
    expected = {"value": 0.5, "low": None, "high": None, "n": 3, "how": "so"}
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False)) == expected

"""Paired tests, t intervals over generation seeds, and quantities as JSON, against scipy and under the null."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from ddpo_pytorch.metrics.intervals import Quantity, mcnemar, over_runs, sign_permutation_p, t_quantile


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (7, 7), (3, 14), (40, 5), (2100, 1900), (900, 3000)])
def test_mcnemar_equals_scipy(gained, lost):
    a = np.repeat([0, 1, 0, 1], [gained, lost, 11, 13])
    b = np.repeat([1, 0, 0, 1], [gained, lost, 11, 13])
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(a, b)[:2] == (gained, lost)
    assert mcnemar(a, b)[2] == pytest.approx(expected, rel=1e-8)


def test_mcnemar_refuses_other_numbers():
    for a in (np.array([0, 2]), np.array([0, 1, 1])):
        with pytest.raises(ValueError, match="0 and 1"):
            mcnemar(a, np.array([0, 1]))


def test_the_sign_flip_test_equals_scipys():
    rng = np.random.default_rng(8)
    groups = np.repeat(np.arange(9), rng.integers(1, 7, 9))
    differences = rng.normal(0.4, 1, len(groups))
    means = np.array([differences[groups == group].mean() for group in range(9)])
    expected = scipy.stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_permutation_p(differences, groups, 0) == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_signs_approach_all_signs():
    rng = np.random.default_rng(9)
    means = rng.normal(0.5, 1, 14)
    signs = 1 - 2 * (np.arange(2**14)[:, None] >> np.arange(14) & 1)
    exact = np.mean(np.abs(signs @ means) >= abs(means.sum()) - 1e-9)
    sampled = sign_permutation_p(means, np.arange(14), 1, draws=100_000)
    assert sampled == pytest.approx(exact, abs=5 * math.sqrt(exact / 100_000))


@pytest.mark.parametrize("prompts", [10, 20])
def test_p_values_under_the_null_are_uniform(prompts):
    groups = np.repeat(np.arange(prompts), 5)
    values = []
    for seed in range(400):
        rng = np.random.default_rng([seed, 11])
        effect = rng.normal(size=prompts)  # prompts change, in both directions alike
        values.append(sign_permutation_p(effect[groups] + rng.normal(size=len(groups)), groups, seed, draws=999))
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(values) <= 0.05) < 0.09


# --- runs ---


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 57, 200, 1001])
def test_t_quantiles_equal_scipys(degrees):
    assert t_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)


def test_an_interval_over_runs_needs_three():
    values = [0.5, 0.6, 0.58, 0.61]
    quantity = over_runs(values)
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert (quantity.low, quantity.high) == pytest.approx(expected, rel=1e-9) and quantity.n == 4
    two = over_runs(values[:2])
    assert two.value == pytest.approx(0.55) and two.low is None and two.high is None


def test_quantities_become_json():
    quantity = Quantity(np.float64(0.5), math.nan, math.inf, np.int64(3), "so")
    assert json.loads(json.dumps(quantity.to_dict(), allow_nan=False)) == {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 3,
        "how": "so",
    }
    assert Quantity.missing("no weights").to_dict()["how"] == "no weights"

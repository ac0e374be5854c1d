"""Intervals against scipy and numbers worked by hand; the verdict rule, case by case."""

import math

import pytest
from scipy import stats

from replib.analysis.statistics import estimate, paired_gain, statement, verdict


def test_interval_equals_scipy():
    values = [91.2, 92.4, 90.9, 93.0, 91.7]
    got = estimate(values)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)
    assert got.n == 5 and got.mean == pytest.approx(91.84)


def test_interval_by_hand():
    """n = 2: t(0.975, 1) = 12.7062; values 1 and 3 have s = sqrt(2)."""
    got = estimate([1.0, 3.0])
    assert got.high - got.mean == pytest.approx(12.7062, abs=1e-4)


def test_one_seed_has_no_interval():
    got = estimate([90.0])
    assert (got.low, got.high, got.smallest_effect) == (-math.inf, math.inf, math.inf)
    assert "one seed" in statement(got)


def test_gains_are_paired_over_common_seeds():
    gain = paired_gain({0: 90.0, 1: 80.0, 2: 70.0}, {1: 79.0, 2: 68.0, 3: 1.0})
    assert gain.points == (1.0, 2.0)
    assert paired_gain({0: 1.0}, {1: 1.0}) is None


def test_smallest_effect_has_the_power_it_promises():
    """Simulated: a true effect of that size is told from 0 in about 80 % of experiments."""
    n, deviation = 8, 1.0
    quantiles = stats.t.ppf([0.975, 0.8], n - 1).sum()
    effect = quantiles * deviation / math.sqrt(n)
    draws = stats.norm(effect, deviation).rvs((20000, n), random_state=0)
    p = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.03)
    spread = [effect + deviation * z for z in (-1, 1, -1, 1, -1, 1, -1, 1)]
    scale = estimate(spread).deviation
    assert estimate(spread).smallest_effect == pytest.approx(effect * scale)


GAIN = estimate([0.9, 1.1, 1.0, 1.2])  # about 1.05, interval about [0.84, 1.26]
NOISE = estimate([-1.0, 1.0, 0.5, -0.4])


@pytest.mark.parametrize(
    "gain, published, comparable, want",
    [
        (None, 1.0, True, "not run"),
        (GAIN, None, True, "not comparable"),
        (GAIN, 1.0, False, "not comparable"),
        (GAIN, 1.0, True, "reproduced"),
        (GAIN, 6.38, True, "not reproduced"),
        (NOISE, 0.3, True, "within noise"),
        (NOISE, 6.38, True, "not reproduced"),
        (estimate([1.0]), 6.38, True, "within noise"),
    ],
)
def test_verdict(gain, published, comparable, want):
    assert verdict(gain, published, comparable) == want


@pytest.mark.parametrize(
    "values, word",
    [([1, 1.1, 0.9], "better"), ([-1, -1.1, -0.9], "worse"), ([-1, 1, 0.1], "no difference")],
)
def test_statement_says_the_sign(values, word):
    assert statement(estimate(values)).startswith(word)

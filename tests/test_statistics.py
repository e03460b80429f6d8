"""Means and their errors, intervals, and what a difference between two models is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from cratescope.score import inference
from cratescope.score.inference import (
    Mean,
    compare_neurons,
    compare_seeds,
    interval,
    mean_of,
    mean_over_layers,
    needed,
    variance_over_layers,
)

seeds = st.integers(0, 10_000)


def test_standard_error_of_a_layer_is_sd_over_root_n() -> None:
    values = [0.1, 0.4, -0.2, 0.3]
    found = mean_of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.standard_deviation == pytest.approx(np.std(values, ddof=1))
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 2)


def test_too_few_values_have_no_error_and_none_have_no_mean() -> None:
    assert mean_of([]) == Mean(None, None, None)
    assert mean_of([0.25]) == Mean(0.25, None, None)


def test_model_mean_is_unweighted_and_its_error_adds_in_squares() -> None:
    layers = [Mean(0.1, 0.03, None), Mean(0.3, 0.04, None)]
    found = mean_over_layers(layers)
    assert found.mean == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(math.hypot(0.03, 0.04) / 2)


def test_a_layer_without_a_score_is_left_out_of_the_model_mean() -> None:
    layers = [Mean(None, None, None), Mean(0.3, 0.04, None)]
    assert mean_over_layers(layers) == Mean(0.3, pytest.approx(0.04), None)
    assert mean_over_layers(layers[:1]) == Mean(None, None, None)
    assert variance_over_layers(layers) == 0.0
    assert variance_over_layers(layers[:1]) is None


def test_variance_over_layers_is_the_population_variance_of_the_paper() -> None:
    # CRATE 2L, top-and-random, x100: layers 7.8 and 8.3, variance .06.
    assert variance_over_layers([Mean(7.8, None, None), Mean(8.3, None, None)]) == pytest.approx(0.0625)


def test_errors_shrink_with_the_number_of_neurons() -> None:
    rng = np.random.default_rng(0)
    few, many = (mean_of(list(rng.normal(size=n))).standard_error for n in (50, 5000))
    assert few is not None and many is not None
    assert few / many == pytest.approx(10, rel=0.3)


def test_the_interval_of_many_neurons_is_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    layers = [list(rng.normal(0.1, 0.2, size=400)), list(rng.normal(0.3, 0.1, size=400))]
    error = mean_over_layers([mean_of(layer) for layer in layers]).standard_error
    mean = float(np.mean([np.mean(layer) for layer in layers]))
    assert error is not None
    assert interval(layers) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert interval(layers) == interval(layers) != interval(layers, seed=1)
    assert interval([[0.1], layers[0]]) is None and interval([]) is None
    assert interval([[], layers[0]]) == interval([layers[0]])


def test_the_interval_of_very_many_neurons_is_that_of_their_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of skewed values, and beside a small layer that is still resampled neuron by neuron."""
    rng = np.random.default_rng(0)
    large, small = rng.beta(0.3, 3, size=25_000).tolist(), rng.normal(0.3, 0.1, size=50).tolist()
    for layers in ([large], [large, small]):
        error = mean_over_layers([mean_of(layer) for layer in layers]).standard_error
        quick = interval(layers)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "MANY", 10**9)
            exact = interval(layers)
        assert error is not None and quick is not None and exact is not None
        assert quick == pytest.approx(exact, abs=0.2 * error) and quick == interval(layers) != exact


def test_resamples_are_the_same_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=700).tolist()
    whole = interval([values])
    monkeypatch.setattr(inference, "_AT_ONCE", 5000)
    assert interval([values]) == pytest.approx(whole, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 30), st.integers(2, 30))
def test_neurons_of_one_layer_are_compared_by_welchs_test(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, size=n), rng.normal(0, 2, size=m)
    found, right = compare_neurons([a.tolist()], [b.tolist()]), stats.ttest_ind(a, b, equal_var=False)
    assert found is not None
    assert found.p == pytest.approx(right.pvalue) and found.difference == pytest.approx(a.mean() - b.mean())
    bounds = right.confidence_interval()
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))
    assert found.effect == pytest.approx(found.difference / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    back = compare_neurons([b.tolist()], [a.tolist()])
    assert back is not None and back.difference == -found.difference and back.p == pytest.approx(found.p)


def test_layers_count_alike_whatever_their_number_of_neurons() -> None:
    found = compare_neurons([[1.0, 1.2], [3.0, 3.1] * 50], [[0.0, 0.1], [0.0, 0.2] * 50])
    assert found is not None and found.difference == pytest.approx((1.05 + 2.95) / 2)
    assert compare_neurons([[1.0, 1.2]], [[0.0, 0.1], [1.0, 2.0]]) is None
    assert compare_neurons([[1.0]], [[0.0, 0.1]]) is None
    assert compare_neurons([[1.0, 1.0]], [[0.0, 0.0]]) is None


def test_the_p_value_is_below_five_percent_in_five_percent_of_equal_models() -> None:
    rng = np.random.default_rng(3)
    found = [compare_neurons(*rng.normal(size=(2, 2, 20)).tolist()) for _ in range(600)]
    assert np.mean([item.p < 0.05 for item in found if item]) == pytest.approx(0.05, abs=0.02)


def test_seeds_in_common_are_paired_and_others_are_not() -> None:
    a, b = {0: 0.10, 1: 0.15, 2: 0.12}, {0: 0.08, 1: 0.12, 2: 0.11}
    paired, right = compare_seeds(a, b), stats.ttest_rel(list(a.values()), list(b.values()))
    assert paired is not None and paired.paired and paired.p == pytest.approx(right.pvalue)
    differences = np.array([0.02, 0.03, 0.01])
    assert paired.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    apart = compare_seeds(a, {seed + 7: value for seed, value in b.items()})
    assert apart is not None and not apart.paired and apart.p > paired.p
    assert compare_seeds({0: 0.1}, b) is None


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("effect", [0.1, -0.5, 2.0])
def test_the_number_needed_has_the_power_it_says(effect: float, paired: bool) -> None:
    """Simulated: with that many values a side 4 tests in 5 find the difference, with a third fewer clearly less."""
    n = needed(effect, paired)
    assert n is not None
    rng = np.random.default_rng(0)

    def power(n: int) -> float:
        a, b = rng.normal(effect, 1, size=(1000, n)), rng.normal(size=(1000, n))
        test = stats.ttest_1samp(a, 0, axis=1) if paired else stats.ttest_ind(a, b, axis=1)
        return float(np.mean(test.pvalue < 0.05))

    assert power(n) == pytest.approx(0.8, abs=0.04 if n > 12 else 0.15)
    if n > 12:
        assert power(n * 2 // 3) < 0.7


def _exact_power(effect: float, n: int, paired: bool) -> float:
    """P(|T| > critical) by adaptive quadrature over S, the root of the chi-square in T's denominator over freedom."""
    freedom = n - 1 if paired else 2 * (n - 1)
    shift, critical = effect * np.sqrt(n if paired else n / 2), stats.t.ppf(0.975, freedom)

    def integrand(s: float) -> float:
        exceeds = stats.norm.cdf(shift - critical * s) + stats.norm.cdf(-shift - critical * s)
        return float(exceeds * 2 * freedom * s * stats.chi2.pdf(freedom * s * s, freedom))

    near = 9 / np.sqrt(2 * freedom)  # S is about 1, with a deviation of 1 / sqrt(2 freedom)
    bounds = max(1 - near, 0), 1 + near
    return float(integrate.quad(integrand, *bounds, points=(1, shift / critical), limit=200)[0])


@pytest.mark.parametrize("paired", [False, True])
def test_every_effect_needs_the_fewest_values_that_have_the_power(paired: bool) -> None:
    """scipy's noncentral t is NaN for many effects between 4 and 12, which once read as enough."""
    for effect in (*np.geomspace(0.05, 20, 50).tolist(), *np.linspace(4.5, 11.5, 29).tolist()):
        n = needed(effect, paired)
        assert n is not None and _exact_power(effect, n, paired) >= 0.8
        assert n == 2 or _exact_power(effect, n - 1, paired) < 0.8
    assert (needed(8.27, paired=True), needed(10.7, paired=True), needed(12.0, paired=True)) == (3, 3, 2)


def test_what_is_not_there_is_never_found() -> None:
    assert needed(0.0) is None and needed(math.nan) is None
    assert needed(50.0) == 2

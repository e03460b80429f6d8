"""Correlation, means and their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cratescope.neurons.statistics import Mean, is_constant, mean_of, mean_over_layers, pearson, variance_over_layers

seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(3, 200), st.floats(1e-3, 1e3))
def test_pearson_equals_numpys_corrcoef(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), rng.normal(size=n) * scale + rng.normal()
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_pearson_does_not_mind_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=50), rng.normal(size=50)
    value = pearson(a, b)
    assert value is not None
    assert pearson(a, scale * b + offset) == pytest.approx(value, abs=1e-8)
    assert pearson(a, -b) == pytest.approx(-value, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=20))
def test_pearson_of_a_side_with_itself_is_one_at_any_size(values: list[float]) -> None:
    side = np.array(values)
    assume(np.ptp(side / 1e300) > 1e-6)
    with np.errstate(over="ignore"):
        value = pearson(side, side)
    assert value == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5, 1e-30])
def test_a_constant_side_has_no_correlation(value: float) -> None:
    varied, constant = np.linspace(0, 1, 7), np.full(7, value)
    assert pearson(varied, constant) is None
    assert pearson(constant, varied) is None
    assert is_constant(constant) and not is_constant(varied)
    assert is_constant(np.zeros(0)) and is_constant(np.ones(1))


def test_pearson_of_float32_activations_is_computed_in_float64() -> None:
    rng = np.random.default_rng(1)
    a = (1000 + rng.normal(size=5000) * 1e-2).astype(np.float32)
    b = rng.normal(size=5000)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.astype(np.float64), b)[0, 1], abs=1e-12)


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

"""Means of scores with their errors and intervals, and whether two models differ: over neurons, and over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cratescope.score.measures import COVERAGE, RESAMPLES

POWER = 0.8
"""Chance to find a difference that is there, in how many neurons or seeds are needed."""

MANY = 20_000
"""Values of a layer; of more, no resamples are drawn one by one."""
_AT_ONCE = 2**23
"""Counts of resamples in memory at a time."""


class Mean(NamedTuple):
    """A mean, its standard error and the sample's standard deviation; None where there are too few values."""

    mean: float | None
    standard_error: float | None
    standard_deviation: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """Mean over neurons: standard deviation with n - 1, standard error sd / sqrt(n)."""
    if not values:
        return Mean(None, None, None)
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Mean(mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Mean(mean, deviation / math.sqrt(len(values)), deviation)


def mean_over_layers(layers: Sequence[Mean]) -> Mean:
    """Unweighted mean over the layers that have one, with standard error sqrt(sum se^2) / L; no deviation.

    The layers are fixed, not a sample of layers, so their spread is not part of the error (it is given separately).
    """
    found = [layer for layer in layers if layer.mean is not None]
    if not found:
        return Mean(None, None, None)
    mean = math.fsum(layer.mean for layer in found if layer.mean is not None) / len(found)
    errors = [layer.standard_error for layer in found if layer.standard_error is not None]
    if len(errors) < len(found):
        return Mean(mean, None, None)
    return Mean(mean, math.sqrt(math.fsum(error**2 for error in errors)) / len(found), None)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate, of which `right` of n are; sound for few questions and rates near 0 or 1."""
    z = statistics.NormalDist().inv_cdf(0.5 + COVERAGE / 2)
    rate, scale = right / n, 1 + z**2 / n
    middle, half = rate + z**2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def variance_over_layers(layers: Sequence[Mean]) -> float | None:
    """Population variance of the layer means, as in the paper's tables."""
    means = [layer.mean for layer in layers if layer.mean is not None]
    return float(np.var(means)) if means else None


def interval(
    layers: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over layers (one layer: of its mean), neurons drawn within each layer.

    A neuron's score already contains the luck of its windows, so drawing neurons covers both. None if a layer has
    fewer than two values.

    In a layer of more than `MANY` values the means of the resamples are drawn from the normal distribution that they
    tend to, which has the bootstrap's own mean and variance (of the values, over n). By Berry and Esseen's theorem its
    distribution function is off by at most 0.47 r / sqrt(n), where r is the mean of |x - mean|^3 over sd^3: 0.5 % for
    r = 1.6 (a normal distribution's) and n = 20,000.
    """
    found = [np.asarray(values, dtype=np.float64) for values in layers if len(values)]
    if not found or min(map(len, found)) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled(values, rng, resamples) for values in found], axis=0)
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _resampled(values: Float[np.ndarray, " n"], rng: np.random.Generator, resamples: int) -> Float[np.ndarray, " r"]:
    """Means of resamples of the values."""
    n = len(values)
    if n > MANY:
        return rng.normal(values.mean(), values.std() / math.sqrt(n), resamples)
    rows = max(_AT_ONCE // n, 1)
    chances = np.full(n, 1 / n)
    steps = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    # Not a product of matrices, whose last digits depend on the number of threads.
    return np.concatenate([(rng.multinomial(n, chances, size=step) * values).sum(1) / n for step in steps])


class Difference(NamedTuple):
    """A's mean minus B's: with its error, a two-sided p-value of a t test, the effect size and an interval of 95 %.

    effect: the difference in standard deviations of what was compared (neurons, or seeds). paired: were seeds paired?
    """

    difference: float
    standard_error: float
    p: float
    effect: float
    low: float
    high: float
    paired: bool


def _tested(difference: float, error: float, freedom: float, deviation: float, paired: bool) -> Difference | None:
    if not error > 0:
        return None
    from scipy.special import stdtr, stdtrit  # not at the top: a card of one neuron tests nothing

    reach = float(stdtrit(freedom, (1 + COVERAGE) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Difference(difference, error, p, difference / deviation, difference - reach, difference + reach, paired)


def compare_neurons(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Difference | None:
    """Two models by the scores of their neurons, layer by layer: Welch's t test of the mean over layers.

    Neuron 7 of one model has nothing to do with neuron 7 of another, so neurons are not paired; layers are, each
    with equal weight. Effect: difference / root of the mean variance within a layer. The test is about *these
    two trained models*, not of their families: for that see `compare_seeds`. None with too few neurons in a layer.
    """
    if len(a) != len(b) or not a or min(map(len, [*a, *b])) < 2:
        return None
    layers = [(statistics.fmean(one) - statistics.fmean(other)) for one, other in zip(a, b, strict=True)]
    variances = [(statistics.variance(values), len(values)) for values in (*a, *b)]
    parts = [(variance / n / len(a) ** 2, n) for variance, n in variances]
    total = sum(part for part, _ in parts)
    if total <= 0:
        return None
    freedom = total**2 / sum(part**2 / (n - 1) for part, n in parts)
    deviation = math.sqrt(statistics.fmean(variance for variance, _ in variances))
    return _tested(statistics.fmean(layers), math.sqrt(total), freedom, deviation, paired=False)


def compare_seeds(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """Two families by the means of their training runs, by seed: a t test with the seed as the unit.

    Runs of one seed read the same text in the same order, so the test is paired when both families have the same seeds
    (effect: mean difference / its standard deviation over seeds), and Welch's otherwise (effect: difference / root of
    the mean variance over seeds). None with fewer than two seeds per side.
    """
    if min(len(a), len(b)) < 2:
        return None
    if a.keys() == b.keys():
        differences = mean_of([a[seed] - b[seed] for seed in sorted(a)])
        mean, error, deviation = (value or 0.0 for value in differences)
        return _tested(mean, error, len(a) - 1, deviation, paired=True)
    return compare_neurons([list(a.values())], [list(b.values())])


def needed(effect: float, paired: bool = False) -> int | None:
    """Values per side (pairs, if `paired`) that a two-sided t test at 5 % needs to find `effect` in 80 % of cases.

    From the noncentral t distribution. None for an effect of 0.
    """
    if not effect or not math.isfinite(effect):
        return None
    high = 2
    while _power(effect, high, paired) < POWER:
        high *= 2
        if high > 2**40:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(effect, middle, paired) >= POWER else (middle, high)
    return max(high, 2)


def _power(effect: float, n: int, paired: bool) -> float:
    """P(|T| > critical) of T = (Z + shift) / S, averaged over S = sqrt(chi-square / freedom).

    By quadrature, since scipy's nctdtr and nct.cdf are NaN for many shifts above about 4.
    """
    from scipy.special import ndtr, stdtrit

    freedom = n - 1 if paired else 2 * (n - 1)
    shift = abs(effect) * math.sqrt(n if paired else n / 2)
    critical = float(stdtrit(freedom, (1 + COVERAGE) / 2))
    reach = 8 / math.sqrt(2 * freedom)  # beyond it there is less than 1e-10 of S
    d = np.linspace(max(-1 + 1e-12, -reach), reach, 4001)
    density = np.exp((freedom - 1) * np.log1p(d) - freedom * (d + d * d / 2))
    exceeds = ndtr(shift - critical * (1 + d)) + ndtr(-shift - critical * (1 + d))
    return float(np.trapezoid(density * exceeds, d) / np.trapezoid(density, d))

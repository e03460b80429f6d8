"""Means of scores over neurons and layers, with their errors and intervals: the only place where they are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cratescope.score.inference import interval, mean_of, mean_over_layers, variance_over_layers

Values = Mapping[int, Mapping[int, float]]
"""A value per layer and neuron index, of the neurons that have one."""


@dataclass(frozen=True)
class Estimate:
    """A mean over neurons, or over layers of neurons; plain, not x100.

    low, high: bootstrap interval of 95 % over neurons. variance_over_layers: population variance, of several layers.
    n: values that went into it. Everything is None where there are too few.
    """

    mean: float | None
    standard_error: float | None
    standard_deviation: float | None = None
    low: float | None = None
    high: float | None = None
    variance_over_layers: float | None = None
    n: int = 0


NOTHING = Estimate(None, None)


def of_layer(values: Mapping[int, float], bounds: bool = True) -> Estimate:
    """Mean over the neurons of one layer."""
    found = list(values.values())
    mean = mean_of(found)
    low, high = (interval([found]) if bounds else None) or (None, None)
    return Estimate(*mean, low, high, n=len(found))


def of_model(values: Values, bounds: bool = True) -> Estimate:
    """Mean over layers, each counting alike."""
    layers = [list(values[layer].values()) for layer in sorted(values)]
    means = [mean_of(layer) for layer in layers]
    mean = mean_over_layers(means)
    low, high = (interval(layers) if bounds else None) or (None, None)
    variance = variance_over_layers(means)
    return Estimate(mean.mean, mean.standard_error, None, low, high, variance, sum(map(len, layers)))


def gains(own: Values, control: Values) -> dict[int, dict[int, float]]:
    """Own score minus the control's, of every neuron that has both; all layers of `own` are there."""
    return {
        layer: {index: value - control[layer][index] for index, value in row.items() if index in control.get(layer, {})}
        for layer, row in own.items()
    }


def over(own: Estimate, copy: Estimate) -> Estimate:
    """The gain of a mean over that of other neurons (those of the untrained copy)."""
    if own.mean is None or copy.mean is None:
        return NOTHING
    return Estimate(own.mean - copy.mean, in_quadrature(own.standard_error, copy.standard_error))


def in_quadrature(*errors: float | None) -> float | None:
    """The error of a sum of independent parts; None where that of a part is not known."""
    return None if None in errors else math.hypot(*(error or 0 for error in errors))


def finite(value: float | None) -> float | None:
    """`value`, or None where there is no number."""
    return value if value is not None and math.isfinite(value) else None

"""The numbers scores are made of: correlation, means with standard errors, and their mean over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Mean(NamedTuple):
    """A mean, its standard error and the sample's standard deviation; None where there are too few values."""

    mean: float | None
    standard_error: float | None
    standard_deviation: float | None


def is_constant(values: Float[np.ndarray, " n"]) -> bool:
    """Has it no variation to correlate with? True for fewer than two values."""
    return len(values) < 2 or bool(np.all(values == values[0]))


def pearson(truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"]) -> float | None:
    """Pearson correlation, -1..1; None when either side is constant, for which it is undefined."""
    if is_constant(truth) or is_constant(simulated):
        return None
    a, b = (values - values.mean() for values in (truth.astype(np.float64), simulated.astype(np.float64)))
    # Each side by its own largest value first: squares of very large or small activations leave the float range.
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1.0, 1.0))


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

    The layers are fixed, not a sample of layers, so their spread is no part of the error (it is given on its own).
    """
    found = [layer for layer in layers if layer.mean is not None]
    if not found:
        return Mean(None, None, None)
    mean = math.fsum(layer.mean for layer in found if layer.mean is not None) / len(found)
    errors = [layer.standard_error for layer in found if layer.standard_error is not None]
    if len(errors) < len(found):
        return Mean(mean, None, None)
    return Mean(mean, math.sqrt(math.fsum(error**2 for error in errors)) / len(found), None)


def variance_over_layers(layers: Sequence[Mean]) -> float | None:
    """Population variance of the layer means, as in the paper's tables."""
    means = [layer.mean for layer in layers if layer.mean is not None]
    return float(np.var(means)) if means else None

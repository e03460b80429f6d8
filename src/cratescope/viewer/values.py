"""Numbers as JSON can hold them: finite or null, with as many digits as a reader needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

DIGITS = 5
"""Significant digits of numbers in tables and cards."""


def number(value: Any, digits: int = DIGITS) -> float | int | None:
    """`value` to some significant digits; None where it is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}")


def numbers(values: Float[np.ndarray, " n"] | Iterable[float], digits: int = DIGITS) -> list[float | None]:
    """The same of many at once."""
    found = np.asarray(values, dtype=np.float64)
    known = np.isfinite(found)
    safe = np.where(known, found, 0.0)
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        size = np.floor(np.log10(np.abs(safe)))
        scale = 10.0 ** np.clip(digits - 1 - np.where(np.isfinite(size), size, 0), -300, 300)
        short = np.round(safe * scale) / scale
    short = np.where(np.isfinite(short), short, safe).tolist()
    if known.all():
        return short
    return [value if there else None for value, there in zip(short, known.tolist(), strict=True)]


def finite(value: Any) -> Any:
    """A JSON value in which every number is finite: others become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

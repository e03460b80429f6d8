"""Formatting of numbers and tokens for readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cratescope.neurons.records import Histogram
from cratescope.results.estimates import finite

Decode = Callable[[Sequence[int]], list[str]]
"""Gives the texts of token ids."""
_BARS = " ▁▂▃▄▅▆▇█"


def number(value: float | None, digits: int = 1, scale: float = 100, sign: bool = False) -> str:
    """Format `value` times `scale` with a true minus sign; a dash if there is no number."""
    shown = finite(value)
    if shown is None:
        return "–"
    text = f"{shown * scale:{'+' if sign else ''}z,.{digits}f}"
    return text.replace("-", "−")


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage, with more digits when it is small."""
    small = finite(fraction) is not None and 0 < (fraction or 0) < 0.01
    return f"{number(fraction, 3 if small else 1)} %"


def count(value: float | None) -> str:
    """Format a large number, such as 1.84M; a dash if there is none."""
    if value is None:
        return "–"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


# Control characters would break the page or be invisible: show their pictures.
_VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32)}
_VISIBLE |= {0x7F: 0x2421, ord("\n"): "↵", ord("\t"): "⇥", ord("\r"): "␍"}
# So would those that steer a terminal in one byte, and those that turn the direction of the text around them.
_VISIBLE |= {
    code: f"⟨{code:04X}⟩"
    for code in (*range(0x80, 0xA0), *range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def visible(token: str) -> str:
    """Make line breaks, tabs and control characters of `token` visible; a token of spaces becomes dots.

    One of other spaces, such as no-break ones, becomes their numbers.
    """
    if not token.strip(" "):
        return "·" * len(token) or "∅"
    shown = token.translate(_VISIBLE)
    return shown if shown.strip() else "".join(f"⟨{ord(one):04X}⟩" for one in shown)


def sparkline(histogram: Histogram, maximum: float, bins: int) -> str:
    """Draw bars for `bins` equal intervals from the lowest edge to `maximum`, by the logarithm of their tokens.

    A bin of the histogram that spans several intervals is spread over them evenly.
    """
    ends = np.stack([histogram.low, histogram.high], 1).reshape(-1)
    ends = np.minimum(np.nan_to_num(ends), maximum)  # far outside of half precision bins are endless
    total = np.cumsum(histogram.count)
    below = np.stack([total - histogram.count, total], 1).reshape(-1)
    at_edges = np.interp(np.linspace(ends[0], maximum, bins + 1), ends, below)
    at_edges[0] = 0
    heights = np.log1p(np.diff(at_edges))
    return "".join(_BARS[step] for step in np.ceil(heights / heights.max() * (len(_BARS) - 1)).astype(int))

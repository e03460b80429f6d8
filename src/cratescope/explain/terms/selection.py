"""The windows that an explanation by terms is chosen on: tokens that no protocol shows or scores.

They are the windows of each stratum by quantile, and those top windows whose rank no protocol uses. A token that a
protocol uses in another window (by rank or by level, which may share tokens with these) has no weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from cratescope.errors import UserError
from cratescope.explain.protocols import Pick, Protocol
from cratescope.neurons.records import QUANTILES, NeuronRecord, Window

TOP = 0.5
"""Weight of a token of a top window, beside 1 in a stratum."""
TOP_PEAK = 0.01
"""Weight of the token that a top window was chosen for."""


@dataclass(frozen=True, eq=False)
class Selected:
    """A window to select terms on, with a weight (w,) for each token; 0 for those that a protocol shows or scores."""

    window: Window
    weights: Float[np.ndarray, " w"]


def selected(record: NeuronRecord, protocols: Sequence[Protocol]) -> list[Selected]:
    """The windows of a neuron that none of `protocols` shows or scores, weighted so as to stand for uniform text.

    A window is drawn for its peak, and the tokens around that are as good as drawn uniformly: they weigh 1. A peak
    weighs as much as its stratum's share of all text says, relative to the mean of the windows, and at most 1.

    Raises:
        UserError: the record has no windows by quantile, or of other quantiles than `collect` takes.
    """
    if len(record.by_quantile) != len(QUANTILES) - 1:
        neuron, n = record.neuron, len(record.by_quantile)
        raise UserError(
            f"layer {neuron.layer} neuron {neuron.index} of {neuron.model}: records have {n or 'no'} samples "
            f"by_quantile, and terms are chosen on {len(QUANTILES) - 1}; run `cratescope collect --strata`, or use "
            "another explainer"
        )
    used = _Used.of([window for pick in _picks(protocols, record) for window in pick.windows(record)])
    found = [(window, 1.0, weight) for window, weight in _by_quantile(record)]
    found += [(window, TOP, TOP_PEAK) for window in _spare(record, protocols)]
    return [_weighted(window, weight, peak, used) for window, weight, peak in found]


def selection_windows(record: NeuronRecord, protocols: Sequence[Protocol]) -> list[Window]:
    """The windows of `selected`, without the weights, which take longer."""
    return [*(window for stratum in record.by_quantile for window in stratum.windows), *_spare(record, protocols)]


def _spare(record: NeuronRecord, protocols: Sequence[Protocol]) -> list[Window]:
    """The top windows whose rank no protocol uses."""
    ranks = {rank for pick in _picks(protocols, record) if pick.source == "top" for rank in _ranks(pick, record)}
    return [window for rank, window in enumerate(record.top) if rank not in ranks]


def _picks(protocols: Iterable[Protocol], record: NeuronRecord) -> Iterable[Pick]:
    """What the protocols show and score, where the record has it."""
    for protocol in protocols:
        yield from (pick for pick in (*protocol.set.picks, *protocol.picks) if getattr(record, pick.source))


def _ranks(pick: Pick, record: NeuronRecord) -> Iterable[int]:
    return range(len(record.top)) if pick.ranks is None else pick.ranks


def _by_quantile(record: NeuronRecord) -> list[tuple[Window, float]]:
    """Windows of the strata with the weights of their peaks."""
    masses = np.diff(QUANTILES)
    shares = [
        (window, mass / len(stratum.windows))
        for mass, stratum in zip(masses, record.by_quantile, strict=True)
        for window in stratum.windows
    ]
    mean = np.mean([share for _, share in shares]) if shares else 1.0
    return [(window, min(float(share / mean), 1.0)) for window, share in shares]


def _weighted(window: Window, weight: float, peak: float, used: _Used) -> Selected:
    weights = np.full(len(window.tokens), weight)
    weights[window.peak] = peak
    weights[used.tokens(window)] = 0
    return Selected(window, weights)


@dataclass(frozen=True, eq=False)
class _Used:
    """Windows that protocols use: excerpt, first token and the one past the last."""

    excerpt: Int[np.ndarray, " m"]
    start: Int[np.ndarray, " m"]
    end: Int[np.ndarray, " m"]

    @classmethod
    def of(cls, windows: Sequence[Window]) -> _Used:
        keys = np.array(sorted({window.key for window in windows}), dtype=np.int64).reshape(-1, 3)
        return cls(keys[:, 0], keys[:, 1], keys[:, 1] + keys[:, 2])

    def tokens(self, window: Window) -> Bool[np.ndarray, " w"]:
        """Which tokens of a window are in one of these."""
        found = np.zeros(len(window.tokens), dtype=bool)
        first, last = window.start, window.start + len(window.tokens)
        for row in np.flatnonzero((self.excerpt == window.excerpt) & (self.start < last) & (self.end > first)):
            found[max(self.start[row] - first, 0) : self.end[row] - first] = True
        return found

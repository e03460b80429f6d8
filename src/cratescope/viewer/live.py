"""Live text: what a model makes of a text that is being typed, token by token, and which units fire on it.

One pass per text; its activations are kept, so that other tokens, another order or other filters only rank them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from cratescope.errors import UserError
from cratescope.files import misfit
from cratescope.neurons.records import read_columns
from cratescope.viewer.loaded import Loaded, Models
from cratescope.viewer.opened import Opened, OpenedSite, Units
from cratescope.viewer.values import number, numbers

Order = Literal["activation", "maximum", "surprise"]
"""Units by their largest value on the chosen tokens: as it is, as a share of the maximum in their records, or by its
quantile among all values there. Units that are silent on these tokens, or lack what they are ordered by, are left out.
"""
LIKELIEST = 5
MOST_SHOWN, SHOWN = 1000, 50
VALUE_DIGITS = 4
REQUEST = {
    "runs?": [str],
    "text": str,
    "order?": {"by?": str, "tokens?": [int]},
    "limit?": int,
    "hide?": {"density_above?": (float, None), "first_token?": bool},
}


@dataclass(frozen=True)
class Asked:
    """What of a text is wanted. tokens: places that units are ordered by; none for all."""

    text: str
    by: Order = "activation"
    tokens: tuple[int, ...] = ()
    limit: int = SHOWN
    density_above: float | None = None
    first_token: bool = False

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Asked:
        """Raises UserError: not of the shape `REQUEST`, or a value out of range."""
        if wrong := misfit(request, REQUEST, "the request"):
            raise UserError(f"{wrong}; send runs, text, order, limit and hide as docs/viewer.md says")
        order, hide = request.get("order", {}), request.get("hide", {})
        by, limit = order.get("by", "activation"), request.get("limit", SHOWN)
        if by not in get_args(Order):
            raise UserError(f"order.by {by!r:.80}: choose from {', '.join(get_args(Order))}")
        if limit < 1:
            raise UserError(f"limit {limit}: has to be 1 or more")
        tokens = tuple(order.get("tokens", ()))
        return cls(
            request["text"],
            by,
            tokens,
            min(limit, MOST_SHOWN),
            hide.get("density_above"),
            hide.get("first_token", False),
        )


class Quantiles:
    """The histograms of all units of a layer end to end, by which the quantile of any activation is found at once.

    A histogram has a row of edges, rising, and the share of tokens below each; rows are padded to the longest.
    """

    def __init__(self, site: OpenedSite, layer: int) -> None:
        table = read_columns(site.file(layer), ["index", "histogram"], whole=False).sort_by("index")
        bins = table.column("histogram").combine_chunks()
        counts = np.diff(bins.offsets.to_numpy())
        flat = bins.flatten()
        low, high, count = (flat.field(name).to_numpy().astype(np.float64) for name in ("low", "high", "count"))
        width = int(counts.max(initial=1))
        rows = np.repeat(np.arange(len(counts)), counts)
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (len(counts), width)
        self.low, self.high = np.full(shape, np.inf), np.full(shape, np.inf)
        self.count, self.known = np.zeros(shape), counts > 0
        self.low[rows, columns], self.high[rows, columns], self.count[rows, columns] = low, high, count
        self.below = np.cumsum(self.count, 1) - self.count
        self.total = np.maximum(self.count.sum(1), 1)

    def of(self, row: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The share of a unit's tokens with at most this activation, evenly spread inside a bin; NaN without one."""
        place = self._bin(row, values)
        at = np.maximum(place, 0)
        low, high = self.low[row, at], self.high[row, at]
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1), nan=1.0)
        found = (self.below[row, at] + inside * self.count[row, at]) / self.total[row]
        return np.where(self.known[row], np.where(place < 0, 0.0, found), np.nan)

    def _bin(self, row: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The last bin that begins at or below each value, by bisection of all at once; -1 below the first."""
        first, last = np.full(len(row), -1), np.full(len(row), self.low.shape[1] - 1)
        while (first < last).any():
            middle = (first + last + 1) // 2
            right = self.low[row, np.maximum(middle, 0)] <= values
            first, last = np.where(right, middle, first), np.where(right, last, middle - 1)
        return first


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model made of a text: `values` (t, n) of all its units, and its predictions.

    own (t - 1,): log-probability of each token but the first. likeliest, logprobs (t, k): tokens after each.
    place, index (n,): where each unit is. density, maximum (n,): of its record, NaN where it has none.
    """

    loaded: Loaded
    text: str
    ids: Sequence[int]
    own: Float[np.ndarray, " s"]
    likeliest: Int[np.ndarray, "t k"]
    logprobs: Float[np.ndarray, "t k"]
    values: Float[np.ndarray, "t n"]
    place: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    density: Float[np.ndarray, " n"]
    maximum: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, loaded: Loaded, text: str) -> Reading:
        """Errors as of `Loaded.ids`."""
        ids = loaded.ids(text)
        predicted, found = loaded.read(ids)
        widths = [found[number].shape[1] for number in sorted(found)]
        place = np.repeat(np.arange(len(widths)), widths)
        index = np.concatenate([np.arange(width) for width in widths])
        values = np.concatenate([found[number] for number in sorted(found)], 1)
        numbers = [_recorded(loaded, name, widths) for name in ("density", "maximum")]
        own = predicted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        best = predicted.topk(min(LIKELIEST, predicted.shape[1]))
        likeliest, logprobs = best.indices.numpy(), best.values.numpy()
        return cls(loaded, text, ids, own, likeliest, logprobs, values, place, index, *numbers)

    @property
    def listed(self) -> Bool[np.ndarray, " n"]:
        """Units that can be shown: those with a record, or all of a site without records."""
        bare = np.array([place.opened is None for place in self.loaded.places])
        return ~np.isnan(self.density) | bare[self.place]


def _recorded(loaded: Loaded, name: str, widths: Sequence[int]) -> Float[np.ndarray, " n"]:
    """A number from the records of all units; NaN where there is none."""
    found = [np.full(width, np.nan) for width in widths]
    for column, place in zip(found, loaded.places, strict=True):
        if place.units is not None and len(place.units):
            column[place.units.index] = place.units.numbers[name]
    return np.concatenate(found)


class Live:
    """Readings of the last text of each run. To be used by one thread at a time."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._last: dict[str, Reading] = {}
        self._quantiles: dict[tuple[str, str, int], Quantiles] = {}

    def answer(self, runs: Sequence[Opened], asked: Asked) -> dict[str, Any]:
        """What each run's model makes of the text."""
        return {"runs": [self._run(opened, asked) for opened in runs]}

    def _run(self, opened: Opened, asked: Asked) -> dict[str, Any]:
        start = time.perf_counter()
        reading = self._reading(opened, asked.text)
        chosen, keys = self._ranked(reading, asked)
        units = [self._unit(reading, unit, keys[unit]) for unit in chosen.tolist()]
        took = 1000 * (time.perf_counter() - start)
        return {
            "run": opened.name,
            "tokens": opened.decode(reading.ids),
            **_predictions(opened, reading),
            "neurons": units,
            "total": reading.values.shape[1],
            "problems": reading.loaded.problems,
            "milliseconds": number(took, 4),
        }

    def _reading(self, opened: Opened, text: str) -> Reading:
        last = self._last.get(opened.name)
        if last is None or last.text != text:
            self._last.pop(opened.name, None)  # two readings of a large model need not be in memory at once
            last = self._last[opened.name] = Reading.of(self.models.of(opened), text)
        return last

    def _ranked(self, reading: Reading, asked: Asked) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " n"]]:
        """The first units in the order asked for, and what every unit is ordered by."""
        values = reading.values[_chosen(reading, asked)].max(0).astype(np.float64)
        keys = self._keys(reading, asked.by, values)
        shown = _shown(reading, asked) & np.isfinite(keys) & (values != 0)
        order = np.lexsort((-values, -np.where(shown, keys, -np.inf)))
        return order[shown[order]][: asked.limit], keys

    def _keys(self, reading: Reading, by: Order, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """What units are ordered by, from one value of each."""
        if by == "surprise":
            return self._surprise(reading, values)
        with np.errstate(divide="ignore", invalid="ignore"):
            return values / reading.maximum if by == "maximum" else values

    def _surprise(self, reading: Reading, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The quantile of one value of each unit among all of its own; NaN where it is silent or has no histogram."""
        found = np.full(len(values), np.nan)
        for number_ in range(len(reading.loaded.places)):
            there = np.flatnonzero((reading.place == number_) & (values != 0) & ~np.isnan(reading.density))
            found[there] = self._quantile(reading, number_, reading.index[there], values[there])
        return found

    def _quantile(
        self, reading: Reading, place: int, index: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Of values of units of one place that all have records."""
        where = reading.loaded.places[place]
        units = where.units
        if where.opened is None or units is None or not len(index):
            return np.full(len(index), np.nan)
        key = reading.loaded.opened.name, where.name, where.layer
        if key not in self._quantiles:
            self._quantiles[key] = Quantiles(where.opened, where.layer)
        return self._quantiles[key].of(np.searchsorted(units.index, index), values)

    def _unit(self, reading: Reading, unit: int, key: float) -> dict[str, Any]:
        place, index = int(reading.place[unit]), int(reading.index[unit])
        where, values = reading.loaded.places[place], reading.values[:, unit].astype(np.float64)
        row = _row(where.units, index)
        surprise = None
        if row is not None:
            quantile = self._quantile(reading, place, np.full(len(values), index), values)
            surprise = None if np.isnan(quantile).all() else numbers(np.where(values == 0, np.nan, quantile), 6)
        return {
            "site": where.name,
            "layer": where.layer,
            "index": index,
            "values": numbers(values, VALUE_DIGITS),
            "surprise": surprise,
            "key": number(float(key), 6),
            "density": number(float(reading.density[unit])),
            "text": where.opened.texts(where.layer)[row] if where.opened and row is not None else "",
            "recorded": row is not None,
        }


def _row(units: Units | None, index: int) -> int | None:
    return None if units is None else units.place(index)


def _chosen(reading: Reading, asked: Asked) -> list[int]:
    """Places of the tokens that units are ordered by. UserError: the text has no such token."""
    n = len(reading.ids)
    if any(not 0 <= token < n for token in asked.tokens):
        raise UserError(f"order.tokens: {reading.loaded.opened.name} reads {n} tokens; they are counted from 0")
    chosen = sorted({*asked.tokens}) or [*range(n)]
    rest = [token for token in chosen if token or not asked.first_token]
    return rest or chosen


def _shown(reading: Reading, asked: Asked) -> Bool[np.ndarray, " n"]:
    """Units that are not hidden."""
    listed = reading.listed
    return listed if asked.density_above is None else listed & ~(reading.density > asked.density_above)


def _predictions(opened: Opened, reading: Reading) -> dict[str, Any]:
    """Each token's log-probability given those before it, and what is likeliest after it."""
    likeliest = [
        [{"text": text, "logprob": logprob} for text, logprob in zip(opened.decode(tokens), numbers(row), strict=True)]
        for tokens, row in zip(reading.likeliest.tolist(), reading.logprobs, strict=True)
    ]
    return {"logprobs": [None, *numbers(reading.own)], "top": likeliest}

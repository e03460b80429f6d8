"""Merge the shards of a layer into its records: add sums in shard order and choose windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from cratescope.neurons.records import QUANTILES, STRATIFICATIONS, list_column, stratum_lists, window_array
from cratescope.neurons.strata import (
    FRACTION,
    PER_LEVEL,
    PER_QUANTILE,
    PER_RANK,
    TWELFTHS,
    Ladder,
    bin_edges,
    bins_of,
    cutoffs,
    quantile_places,
)
from cratescope.neurons.streaming import SUMS, Plan, Pool, count_tokens, new_pools

TOKENS_LISTED = 10
LEAST_COUNT = 5
"""A token id seen less often has a mean that says little; it is not listed."""
FAR = 1 << 50
"""A start that no window has."""


@dataclass(frozen=True)
class Windows:
    """Windows of all neurons of a layer, by neuron: position (m,) in the whole text, activations (m, w)."""

    neuron: Int64[np.ndarray, " m"]
    position: Int64[np.ndarray, " m"]
    activations: Float[np.ndarray, "m w"]

    def starts(self, plan: Plan) -> Int64[np.ndarray, " m"]:
        """Position of each window's first token in its excerpt."""
        place = torch.from_numpy(self.position % plan.context)
        return plan.start(place, self.activations.shape[1]).numpy()

    def take(self, rows: np.ndarray) -> Windows:
        return Windows(self.neuron[rows], self.position[rows], self.activations[rows])

    def column(
        self, plan: Plan, excerpts: Integer[np.ndarray, "n t"], list_of: np.ndarray, n_lists: int
    ) -> pa.ListArray:
        """Build a column of lists of windows; `list_of` (m,), rising, assigns each window to a list."""
        excerpt, start = self.position // plan.context, self.starts(plan)
        width = self.activations.shape[1]
        tokens = excerpts[excerpt[:, None], start[:, None] + np.arange(width)]
        widths = np.full(len(start), width)
        peak = self.position % plan.context - start
        array = window_array(tokens.reshape(-1), self.activations.reshape(-1), widths, excerpt, start, peak)
        return list_column(np.bincount(list_of, minlength=n_lists), array)


@dataclass(frozen=True)
class Totals:
    """All shards of a layer together; see `LayerStatistics`."""

    sums: dict[str, Tensor]
    maximum: Float[Tensor, " h"]
    random: Float[Tensor, "h r w"]
    pools: list[Pool]

    @classmethod
    def of(cls, plan: Plan, shards: Iterable[dict[str, Tensor]]) -> Totals:
        """Add up shards given in text order."""
        sums: dict[str, Tensor] = {}
        maximum = torch.full((plan.n_neurons,), -torch.inf)
        random = torch.zeros(plan.draws.size, plan.window)
        pools = new_pools(plan)
        for shard in shards:
            for name in SUMS:
                if name in sums:
                    sums[name] += shard[name]
                else:
                    sums[name] = shard[name].double() if name == "token_sums" else shard[name]
            maximum = torch.maximum(maximum, shard["maximum"])
            random[shard["random.slot"]] = shard["random.activations"]
            for number, pool in enumerate(pools):
                prefix = f"pool{number}."
                windows = {name.removeprefix(prefix): x for name, x in shard.items() if name.startswith(prefix)}
                if windows:
                    pool.offer(windows)
            del shard, windows  # frees memory before the next one is read
        return cls(sums, maximum, random.view(*plan.draws.shape, plan.window), pools)


def columns(plan: Plan, totals: Totals, excerpts: Integer[np.ndarray, "n t"], labels: dict[str, Any]) -> dict[str, Any]:
    """The columns of `records.SCHEMA`; `labels` are model, site and layer, `excerpts` the tokens that were read."""
    h, n_tokens = plan.n_neurons, int(totals.sums["n_tokens"])
    sums = totals.sums["sums"].numpy()
    active = sums[0]
    top = _pooled(totals.pools[0], 1)
    random = _random_windows(plan, totals, top)
    return {
        **{name: [value] * h for name, value in labels.items()},
        **{"index": plan.chosen.index, "n_tokens": np.full(h, n_tokens), "maximum": totals.maximum.double().numpy()},
        **_moments(plan, n_tokens, sums[1:]),
        **{"density": active / n_tokens, "dead": active == 0},
        **{name: w.column(plan, excerpts, w.neuron, h) for name, w in (("top", top), ("random", random))},
        **_strata_columns(plan, totals, excerpts, top, random),
        "histogram": _histograms(plan, totals),
        **_token_columns(plan, totals, excerpts),
    }


def _moments(plan: Plan, n: int, sums: Float[np.ndarray, "4 h"]) -> dict[str, np.ndarray]:
    """Compute moments from sums of powers of (a - centre) scale; no shape moments for a constant neuron."""
    centre, scale = (x.double().numpy() for x in (plan.pilot.centre, plan.pilot.scale))
    m1, m2, m3, m4 = sums / n
    variance = np.maximum(m2 - m1**2, 0)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    varies = variance > 1e-14 * m2
    variance, third, fourth = (np.where(varies, moment, 0.0) for moment in (variance, third, fourth))
    spread = np.where(varies, variance, np.nan)
    shape = {"skewness": third / spread**1.5, "kurtosis": fourth / spread**2}
    return {
        "mean": centre + m1 / scale,
        "variance": variance / scale**2,
        "third": third / scale**3,
        "fourth": fourth / scale**4,
        **{name: pa.array(value, pa.float64(), mask=~varies) for name, value in shape.items()},
    }


def _pooled(pool: Pool, groups_a_neuron: int) -> Windows:
    found = pool.windows()
    if not found:
        return Windows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1), np.float32))
    return Windows((found["group"] // groups_a_neuron).numpy(), found["position"].numpy(), found["activations"].numpy())


def _random_windows(plan: Plan, totals: Totals, top: Windows) -> Windows:
    """The first draws that share no token with a top window or with one another."""
    h, r = plan.draws.shape
    drawn = Windows(np.repeat(np.arange(h), r), plan.draws.reshape(-1), totals.random.flatten(0, 1).numpy())
    return drawn.take(disjoint(plan, drawn, plan.random, _start_matrix(plan, top, plan.window)))


def disjoint(plan: Plan, windows: Windows, n: int, taken: Int64[np.ndarray, "h k"]) -> Bool[np.ndarray, " m"]:
    """The first `n` windows of every neuron that share no token with `taken` or with one another."""
    width = windows.activations.shape[1]
    first = np.searchsorted(windows.neuron, np.arange(plan.n_neurons))
    rank = np.arange(len(windows.neuron)) - first[windows.neuron]
    starts = _start_matrix(plan, windows, width)
    chosen, left = np.zeros(starts.shape, dtype=bool), np.full(plan.n_neurons, n)
    # A column for each window taken or yet to be: what was taken before, then what is chosen here.
    taken = np.concatenate([taken, np.full(starts.shape, 2 * FAR)], 1)
    for column, start in enumerate(starts.T):
        known = taken[:, : column - starts.shape[1]]
        clash = (np.abs(known - start[:, None]) < width).any(1)
        chosen[:, column] = (start < FAR) & ~clash & (left > 0)
        left -= chosen[:, column]
        taken[chosen[:, column], column - starts.shape[1]] = start[chosen[:, column]]
    return chosen[windows.neuron, rank]


def _start_matrix(plan: Plan, windows: Windows, width: int) -> Int64[np.ndarray, "h k"]:
    """Start of each neuron's windows when cut to `width`, counted over all excerpts and padded with FAR."""
    rank = np.arange(len(windows.neuron)) - np.searchsorted(windows.neuron, windows.neuron)
    starts = np.full((plan.n_neurons, rank.max(initial=-1) + 1), FAR)
    excerpt, place = np.divmod(windows.position, plan.context)
    # Excerpts are set apart, so that windows of two of them never overlap.
    starts[windows.neuron, rank] = excerpt * 3 * plan.context + plan.start(torch.from_numpy(place), width).numpy()
    return starts


def _strata_columns(
    plan: Plan, totals: Totals, excerpts: Integer[np.ndarray, "n t"], top: Windows, random: Windows
) -> dict[str, pa.ListArray]:
    """The three stratifications; empty lists when no strata were asked for."""
    if not plan.ladders:
        return {name: pa.array([[]] * plan.n_neurons) for name in STRATIFICATIONS}
    counts = totals.sums["histogram"].T.contiguous()
    widths = (ladder.window for ladder in plan.ladders)
    taken = [np.concatenate([_start_matrix(plan, w, width) for w in (top, random)], 1) for width in widths]
    long, short = (Sample.of(plan, ladder, pool) for ladder, pool in zip(plan.ladders, totals.pools[1:], strict=True))
    return {
        "by_quantile": long.column(_rank_bounds(plan, totals, counts, QUANTILES), PER_QUANTILE, taken[0], excerpts),
        "by_rank": short.column(_rank_bounds(plan, totals, counts, (0.0, *TWELFTHS)), PER_RANK, taken[1], excerpts),
        "by_level": short.column(_level_bounds(plan, totals), PER_LEVEL, taken[1], excerpts),
    }


@dataclass(frozen=True)
class Bounds:
    """Strata of every neuron: places (h, s + 1) and activations (h, s + 1); `by_value` selects which one decides."""

    places: Int64[Tensor, "h b"]
    values: Float[Tensor, "h b"]
    by_value: bool


def _rank_bounds(plan: Plan, totals: Totals, counts: Int64[Tensor, "h bins"], ranks: tuple[float, ...]) -> Bounds:
    places = quantile_places(counts, torch.tensor(ranks, dtype=torch.float64).expand(len(counts), -1))
    if ranks[0] == 0:  # the place of the first token, not of the first bin
        places[:, 0] = (counts > 0).int().argmax(1) * FRACTION
    edges = torch.from_numpy(bin_edges())
    values = edges[places // FRACTION] / plan.pilot.scale[:, None].double()
    return Bounds(places, torch.minimum(values, totals.maximum[:, None].double()), by_value=False)


def _level_bounds(plan: Plan, totals: Totals) -> Bounds:
    values = totals.maximum.clamp(min=0)[:, None].double() * torch.arange(1, 13) / 12
    places = bins_of((values * plan.pilot.scale[:, None]).float()).long() * FRACTION
    return Bounds(places, values, by_value=True)


@dataclass(frozen=True)
class Sample:
    """The windows kept by a ladder's pool, by neuron and priority, with their places and activations."""

    plan: Plan
    ladder: Ladder
    bars: Int64[Tensor, "h c"]
    windows: Windows
    priority: Int64[Tensor, " m"]
    place: Int64[Tensor, " m"]
    value: Float[Tensor, " m"]

    @classmethod
    def of(cls, plan: Plan, ladder: Ladder, pool: Pool) -> Sample:
        found, windows = pool.windows(), _pooled(pool, ladder.n_cells)
        order = np.lexsort((found["key"].numpy(), windows.neuron))
        windows = windows.take(order)
        neuron, position = torch.from_numpy(windows.neuron), torch.from_numpy(windows.position)
        peak = windows.position % plan.context - windows.starts(plan)
        value = torch.from_numpy(windows.activations[np.arange(len(peak)), peak])
        place = bins_of(value * plan.pilot.scale[neuron]).long() * FRACTION + plan.drawn(neuron, position)[1]
        bars = pool.bar.view(-1, ladder.n_cells)
        return cls(plan, ladder, bars, windows, found["key"][torch.from_numpy(order)], place, value.double())

    def column(
        self, bounds: Bounds, n: int, taken: Int64[np.ndarray, "h k"], excerpts: Integer[np.ndarray, "n t"]
    ) -> pa.ListArray:
        """Build the strata column with up to `n` windows each; the rarest strata choose first."""
        h, s = bounds.places.shape[0], bounds.places.shape[1] - 1
        rows, strata = [], []
        for stratum in reversed(range(s)):
            inside = np.flatnonzero(self._inside(bounds, stratum).numpy())
            candidates = self.windows.take(inside)
            chosen = inside[disjoint(self.plan, candidates, n, taken)]
            rows.append(chosen)
            strata.append(np.full(len(chosen), stratum))
            taken = np.concatenate([taken, _start_matrix(self.plan, self.windows.take(chosen), self.ladder.window)], 1)
        row = np.concatenate(rows)
        list_of = self.windows.neuron[row] * s + np.concatenate(strata)
        order = np.argsort(list_of, kind="stable")
        lists = self.windows.take(row[order]).column(self.plan, excerpts, list_of[order], h * s)
        low, high = (x.reshape(-1).numpy() for x in (bounds.values[:, :-1], bounds.values[:, 1:]))
        return stratum_lists(np.full(h, s), low, high, lists)

    def _inside(self, bounds: Bounds, stratum: int) -> Bool[Tensor, " m"]:
        """Mask of the windows in a stratum whose priority is low enough that none of it is missing."""
        neuron = torch.from_numpy(self.windows.neuron)
        low, high = bounds.places[:, stratum], bounds.places[:, stratum + 1]
        if bounds.by_value:
            low_value, high_value = bounds.values[neuron, stratum], bounds.values[neuron, stratum + 1]
            highest = stratum == bounds.places.shape[1] - 2
            inside = (self.value >= low_value) & ((self.value < high_value) | (highest & (self.value > 0)))
            high = high + FRACTION  # the upper bound lies within its bin
        else:
            inside = (self.place >= low[neuron]) & (self.place < high[neuron])
        return inside & (self.priority < cutoffs(self.ladder, self.bars, low, high)[neuron])


def _histograms(plan: Plan, totals: Totals) -> pa.ListArray:
    """Non-empty bins with their edges in activations."""
    counts = totals.sums["histogram"].T.numpy()
    neuron, bin_ = np.nonzero(counts)
    scale = plan.pilot.scale.double().numpy()[neuron]
    edges = bin_edges()
    arrays = [edges[bin_] / scale, edges[bin_ + 1] / scale, counts[neuron, bin_]]
    array = pa.StructArray.from_arrays([pa.array(x) for x in arrays], names=["low", "high", "count"])
    return list_column(np.bincount(neuron, minlength=plan.n_neurons), array)


def _token_columns(plan: Plan, totals: Totals, excerpts: Integer[np.ndarray, "n t"]) -> dict[str, pa.ListArray]:
    """The token ids with the highest and the lowest mean."""
    counts = count_tokens(excerpts)
    slots = plan.slots.numpy()
    token = np.flatnonzero((slots < plan.n_slots) & (counts >= LEAST_COUNT))
    means = totals.sums["token_sums"].numpy()[slots[token]].T / counts[token]
    n = min(TOKENS_LISTED, len(token))
    best, worst = (torch.from_numpy(sign * means).topk(n).indices.numpy() for sign in (1, -1))
    found = {}
    for name, chosen in (("top_tokens", best), ("bottom_tokens", worst)):
        arrays = [token[chosen], np.take_along_axis(means, chosen, 1), counts[token][chosen]]
        fields = [pa.array(x.reshape(-1)) for x in arrays]
        array = pa.StructArray.from_arrays(fields, names=["token", "mean", "count"])
        found[name] = list_column(np.full(len(chosen), chosen.shape[1]), array)
    return found

"""Uniformly drawn windows from every part of a neuron's distribution, in one pass: how, and how exactly.

Every token of the text has, for every neuron, a priority: a random number that depends on (seed, layer, neuron,
position) alone. The windows of a stratum are those of its tokens of lowest priority, hence a uniform draw.

Where a token lies in the distribution is its *place* = bin + fraction. The bin is that of its activation: 1024 bins
that rise with the value, 16 to an octave. The fraction is random again, so that tokens of one bin, ties above all (the
zeros of a ReLU), stand in random order. The pass counts every bin exactly, so the place of a quantile is known exactly,
and a token is at most one bin away from the rank it is given: 1/16 of its value, 2^-21 of the pilot's peak near zero.

A pass cannot know the quantiles beforehand. A small pilot cuts the places into cells, fine towards the top, and every
cell keeps the tokens of lowest priority. A stratum is read from the cells it meets, up to the priority where the first
of them is cut off; below it nothing is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

N_BINS = 1024
SCALED_PEAK = 4
"""Activations are scaled by a power of two so that the pilot's largest lies in [2^3, 2^4)."""
FRACTION = 1 << 20
"""Places are integers: FRACTION x bin + fraction."""
ROWS = 4096
"""Tokens drawn uniformly from the whole text as candidates of every neuron."""
LATER = 1 << 31
"""Priorities of the drawn tokens lie below, those of other tokens (looked at only in the tail) from it on."""
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)

TWELFTHS = tuple(k / 12 for k in range(1, 12))
PER_QUANTILE, PER_RANK, PER_LEVEL = 10, 20, 10
"""Windows of a stratum (paper: 20 of every rank interval)."""
SHORT = 8
"""Tokens in the windows by rank and by level (paper: -4..+3)."""


def bins_of(scaled: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The bin of scaled activations: sign, exponent and four bits of the mantissa in half precision, rising."""
    prefix = scaled.half().view(torch.int16).int() >> 6
    return torch.where(prefix < 0, -1 - prefix, prefix + N_BINS // 2)


def bin_edges() -> Float64[np.ndarray, " 1025"]:
    """Lower edges of the bins and the last upper one, in scaled activations; beyond half precision they are infinite.

    Rounding to half precision may lift a value over the edge above it, by at most 2^-11 of it (2^-25 near zero).
    """
    with np.errstate(invalid="ignore"):
        upward = (np.arange(N_BINS // 2 + 1, dtype=np.uint32) << 6).clip(max=0x7C00).astype(np.uint16)
    rising = upward.view(np.float16).astype(np.float64)
    rising[np.argmax(rising)] = 65520  # from here on a number rounds to infinity
    return np.concatenate([-rising[:0:-1], rising])


def draw(salt: int, neuron: Int64[Tensor, "*_"], position: Int64[Tensor, "*_"]) -> tuple[Tensor, Tensor]:
    """Priority in [0, 2^31) and fraction in [0, FRACTION) of every (neuron, position), for shapes that broadcast.

    Each is hashed to 64 bits; the product with an odd number shuffles the hashes of the positions for every neuron.
    """
    x = (_hash(neuron + salt) | 1) * _hash(position - salt)
    return (x >> 33) & (LATER - 1), (x >> 12) & (FRACTION - 1)


def _hash(x: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """splitmix64 (Steele, Lea and Flood 2014), a bijection of 64-bit numbers."""
    x = x * _MIX[0]
    for bits, factor in ((30, _MIX[1]), (27, _MIX[2]), (31, 1)):
        # A shift to the right that brings in zeros; the machine's brings in the sign.
        x = (x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))) * factor
    return x


def quantile_places(counts: Int64[Tensor, "h bins"], ranks: Float64[Tensor, "h r"]) -> Int64[Tensor, "h r"]:
    """The smallest place below which the fraction `ranks` of the counted tokens lies."""
    below = counts.cumsum(1)
    wanted = ranks * below[:, -1:]
    bin_ = torch.searchsorted(below.double(), wanted.contiguous()).clamp(max=counts.shape[1] - 1)
    here = counts.gather(1, bin_)
    fraction = (wanted - (below.gather(1, bin_) - here)) / here.clamp(min=1)
    return bin_ * FRACTION + (fraction * FRACTION).round().long().clamp(0, FRACTION)


@dataclass(frozen=True)
class Ladder:
    """Cells of places: `edges` between them, rising; each cell keeps `keep` windows of `window` tokens.

    bars: what a priority has to lie below to be looked at; only drawn tokens are candidates below the tail.
    n_below: edges below that where the tail begins; the cells above that one have every token as a candidate.
    """

    edges: Int64[Tensor, "h e"]
    bars: Int64[Tensor, "h c"]
    n_below: int
    keep: int
    window: int

    @property
    def n_cells(self) -> int:
        return self.edges.shape[1] + 1


@dataclass(frozen=True)
class Pilot:
    """Estimates for each neuron from a few excerpts read first; they affect only how fast and how full results are.

    centre: median, what moments are taken about. scale: a power of two that brings the largest to [2^3, 2^4).
    counts: tokens in each bin.
    """

    centre: Float[Tensor, " h"]
    scale: Float[Tensor, " h"]
    counts: Int64[Tensor, "h bins"]

    @classmethod
    def of(cls, activations: Float[Tensor, "n h"]) -> Pilot:
        columns = activations.T.contiguous()
        peak = columns.abs().amax(1)
        # A neuron that is silent here is taken to be as large as the loudest one.
        peak = torch.where(peak > 0, peak, peak.max())
        exponent = torch.frexp(peak).exponent.clamp(-100, 100)
        scale = torch.ldexp(torch.ones_like(peak), SCALED_PEAK - exponent)
        bins = bins_of(columns * scale[:, None])
        counts = torch.zeros(len(columns), N_BINS, dtype=torch.int64)
        counts.scatter_add_(1, bins.long(), torch.ones(1, dtype=torch.int64).expand_as(bins))
        return cls(columns.median(1).values, scale, counts)

    def active_per_token(self) -> float:
        """Approximate number of neurons that are non-zero on a token."""
        return float((1 - self.counts[:, N_BINS // 2] / self.counts.sum(1)).sum())

    def tail(self) -> Int64[Tensor, " h"]:
        """The bin from which on every token of the text is a candidate: at most 2^-8 of the pilot's tokens."""
        above = self.counts.flip(1).cumsum(1).flip(1)
        return (above > above[:, :1] >> 8).sum(1)

    def ladder(self, n_drawn: int, ranks: tuple[float, ...], octaves: int, keep: int, window: int) -> Ladder:
        """Cells at `ranks`, halving ones in the tail, and half octaves above the largest activation of the pilot."""
        h, n_below, tail = len(self.counts), len(ranks), self.tail()[:, None]
        in_tail = (self.counts * (torch.arange(N_BINS) >= tail)).sum(1, keepdim=True) / self.counts.sum(1, keepdim=True)
        halves = 1 - in_tail.double() * 0.5 ** torch.arange(1, 5)
        fixed = torch.tensor(ranks, dtype=torch.float64).expand(h, -1)
        inside = quantile_places(self.counts, torch.cat([fixed, halves], 1))
        highest = ((self.counts > 0) * torch.arange(N_BINS)).amax(1, keepdim=True)
        above = (highest + 1 + 8 * torch.arange(2 * octaves)) * FRACTION
        edges = torch.cat([inside[:, :n_below], tail * FRACTION, inside[:, n_below:], above], 1)
        # Far more than `keep` of the tokens drawn from a cell lie below this; the others need not be looked at.
        share = torch.cat([fixed, 1 - in_tail], 1).diff(dim=1, prepend=torch.zeros(h, 1))
        low = 1.5 * (keep + 3 * keep**0.5) / (n_drawn * share)
        bars = torch.full((h, edges.shape[1] + 1), 2 * LATER)
        bars[:, : n_below + 1] = (LATER * low.clamp(max=1)).long()
        return Ladder(edges, bars, n_below, keep, window)

    def ladders(self, n_drawn: int, window: int, context: int) -> tuple[Ladder, Ladder]:
        """Two ladders: for windows by quantile, and for those by rank and by level."""
        halving = (0.4, *(1 - 0.5**k for k in range(1, 7)), 0.99)
        twelfths = (*TWELFTHS, *(1 - 0.5**k / 12 for k in range(1, 4)))
        return (
            self.ladder(n_drawn, halving, 0, PER_QUANTILE + 8, window),
            self.ladder(n_drawn, twelfths, 3, PER_RANK + 12, min(SHORT, context)),
        )


def cutoffs(ladder: Ladder, bars: Int64[Tensor, "h c"], low: Int64[Tensor, " h"], high: Int64[Tensor, " h"]) -> Tensor:
    """The priority (h,) below which every token with a place in [low, high) is known, from the cells' own."""
    ends = torch.tensor([[0], [N_BINS * FRACTION]]).expand(-1, len(bars))
    start = torch.cat([ends[0][:, None], ladder.edges], 1)
    end = torch.cat([ladder.edges, ends[1][:, None]], 1)
    met = (start < high[:, None]) & (end > low[:, None])
    return torch.where(met, bars, 2 * LATER).amin(1)

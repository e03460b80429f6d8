"""Statistics of one layer in one pass over its activations, in memory that does not grow with the text.

Sums are taken block by block while a block is in the cache, in the same blocks whatever the batch size. Windows are
kept in pools that hold the best few of each group; a bar at the worst of them turns nearly every later token away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from cratescope.errors import UserError
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.sample import Chosen
from cratescope.neurons.strata import FRACTION, LATER, N_BINS, ROWS, Ladder, Pilot, bin_edges, bins_of, draw

BLOCK = 1 << 17
"""Activations worked on at once: half a megabyte, so that they stay in a core's cache."""
CHUNK = 16
"""Tokens whose largest activation decides whether they are looked at one by one."""
SUMS = ("n_tokens", "sums", "histogram", "token_sums")
"""Statistics that add up over shards."""


@dataclass(frozen=True)
class Plan:
    """Choice of what to keep of a layer: made before the pass, and the same for every batch, shard and worker.

    draws (h, r): uniformly drawn positions among n_excerpts x context; more than windows are wanted, because one that
    overlaps a window already taken is passed over. slots: the row of each token id in the table of sums, the last row
    for ids not kept. rows: drawn positions whose activations are candidates for the strata, rising. chosen: which
    neurons of the layer are looked at, the h neurons of all else.
    """

    top: int
    per_excerpt: int
    random: int
    window: int
    context: int
    salt: int
    draws: Int64[np.ndarray, "h r"]
    slots: Int64[Tensor, " v"]
    n_slots: int
    rows: Int64[Tensor, " rows"]
    pilot: Pilot
    ladders: tuple[Ladder, ...]
    chosen: Chosen

    @classmethod
    def of(
        cls,
        config: CollectConfig,
        layer: int,
        pilot: Pilot,
        excerpts: Integer[np.ndarray, "n t"],
        chosen: Chosen | None = None,
    ) -> Plan:
        """All neurons unless some are `chosen`. A neuron's draws depend on (seed, layer, neuron) alone."""
        chosen = chosen or Chosen.every(len(pilot.scale))
        context, window = excerpts.shape[1], min(config.window, excerpts.shape[1])
        spare = config.random // 2 + 4 if config.random else 0
        generator = np.random.default_rng([config.seed, layer])
        # Drawn for the whole layer, so that a neuron's are the same in every sample.
        draws = generator.integers(0, excerpts.size, size=(chosen.width, config.random + spare))[chosen.index]
        salt = int(generator.integers(0, 1 << 62))
        rows = generator.choice(excerpts.size, min(ROWS, excerpts.size), replace=False, shuffle=False)
        slots, n_slots = token_slots(excerpts, config.tokens)
        ladders = pilot.ladders(len(rows), window, context) if config.strata else ()
        kept = (config.top, config.per_excerpt, config.random, window, context)
        return cls(*kept, salt, draws, slots, n_slots, torch.from_numpy(np.sort(rows)), pilot, ladders, chosen)

    @property
    def n_neurons(self) -> int:
        return len(self.pilot.scale)

    def start(self, position: Tensor, window: int) -> Tensor:
        """First token of the window of a place in an excerpt: half a window before it, moved inside the excerpt."""
        return (position - window // 2).clamp(0, self.context - window)

    def drawn(self, neuron: Int64[Tensor, "*m"], position: Int64[Tensor, "*_"]) -> tuple[Tensor, Tensor]:
        """Priority and fraction (`draw`) of places among the chosen neurons, and positions in the text."""
        return draw(self.salt, torch.from_numpy(self.chosen.index)[neuron], position)

    def tail_values(self) -> Float[Tensor, " h"]:
        """A value that no activation in the tail lies below."""
        edge = torch.from_numpy(bin_edges())[self.pilot.tail()]
        return ((edge - edge.abs() * 2.0**-10 - 2.0**-24) / self.pilot.scale).float()


def token_slots(excerpts: Integer[np.ndarray, "n t"], n_kept: int) -> tuple[Int64[Tensor, " v"], int]:
    """A row for each of the `n_kept` most frequent token ids, the lower id first among equals; how many rows."""
    counts = count_tokens(excerpts)
    kept = np.argsort(-counts, kind="stable")[: min(n_kept, np.count_nonzero(counts))]
    slots = np.full(len(counts), len(kept))
    slots[np.sort(kept)] = np.arange(len(kept))
    return torch.from_numpy(slots), len(kept)


def count_tokens(excerpts: Integer[np.ndarray, "n t"]) -> Int64[np.ndarray, " v"]:
    """Count each token id, piece by piece, because NumPy would convert the whole text to 64-bit numbers."""
    n_ids = int(excerpts.max(initial=0)) + 1
    pieces = np.array_split(excerpts, -(-excerpts.size // BLOCK))
    return sum((np.bincount(piece.reshape(-1), minlength=n_ids) for piece in pieces), np.zeros(n_ids, dtype=np.int64))


class Pool:
    """A store of the `keep` windows with the smallest keys offered to each group; among equal keys, the first offered.

    Keys are integers in [0, 2^33). bar (groups,): a window whose key is not below its group's cannot be among them.
    """

    def __init__(self, keep: int, bar: Int64[Tensor, " groups"]) -> None:
        self.keep = keep
        self.bar = bar.clone()
        self._held: list[dict[str, Tensor]] = []
        self._size = 0

    def offer(self, windows: dict[str, Tensor]) -> None:
        """`group` (m,), `key` (m,), and whatever else belongs to each window."""
        self._held.append(windows)
        self._size += len(windows["key"])
        if self._size > 1.5 * self.keep * len(self.bar):
            self.windows()

    def windows(self) -> dict[str, Tensor]:
        """The windows kept, by group and key."""
        if not self._held:
            return {}
        group, key = (torch.cat([windows[name] for windows in self._held]) for name in ("group", "key"))
        # What was kept is in order already, which NumPy's stable sort makes use of.
        order = torch.from_numpy(((group << 33) + key).numpy().argsort(kind="stable"))
        group = group[order]
        rank = torch.arange(len(group)) - torch.searchsorted(group, torch.arange(len(self.bar)))[group]
        last = rank == self.keep - 1
        self.bar[group[last]] = key[order[last]]
        order = order[rank < self.keep]
        kept = {name: torch.cat([windows[name] for windows in self._held])[order] for name in self._held[0]}
        self._held, self._size = [kept], len(order)
        return kept


def new_pools(plan: Plan) -> list[Pool]:
    """Empty pools: the top windows of every neuron, and for each ladder the windows of every cell."""
    positive = _top_key(torch.zeros(plan.n_neurons))
    return [Pool(plan.top, positive), *(Pool(ladder.keep, ladder.bars.flatten()) for ladder in plan.ladders)]


class LayerStatistics:
    """Streaming statistics of one layer over excerpts that come in rising order, cut into shards by `take_shard`.

    sums (5, h), float64: the number of non-zero activations, and sums of the first four powers of (a - centre) scale.
    maximum (h,). histogram (bins, h). token_sums (slots + 1, h): sums of a by token id.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        h, pilot = plan.n_neurons, plan.pilot
        self._sums = {
            "n_tokens": torch.zeros(1, dtype=torch.int64),
            "sums": torch.zeros(5, h, dtype=torch.float64),
            "histogram": torch.zeros(N_BINS if plan.ladders else 0, h, dtype=torch.int64),
            "token_sums": torch.zeros(plan.n_slots + 1, h),
        }
        self._maximum = torch.full((h,), -torch.inf)
        self._random: list[dict[str, Tensor]] = []
        self._top, *self._strata = new_pools(plan)
        self._tail = plan.tail_values()
        self._zero_bins = torch.arange(h, dtype=torch.int32) + N_BINS // 2 * h
        rows = min(plan.context, max(CHUNK, BLOCK // h // CHUNK * CHUNK))
        self._scratch = torch.empty(2, rows, h)
        self._shift = pilot.centre * pilot.scale
        self._half = torch.empty(rows, h, dtype=torch.float16)

    def update(self, activations: Float[Tensor, "b t h"], tokens: Int64[Tensor, "b t"], first_excerpt: int) -> None:
        """Add the next excerpts, numbered from `first_excerpt` on. UserError names an activation that is not finite."""
        activations = activations.detach().float().cpu().contiguous()
        flat = activations.flatten(0, 1)
        highest = self._add_sums(activations, first_excerpt)
        self._maximum = torch.maximum(self._maximum, highest.amax((0, 1)))
        self._sums["n_tokens"] += len(flat)
        self._sums["token_sums"].index_add_(0, self.plan.slots[tokens.cpu().flatten()], flat)
        offset = first_excerpt * self.plan.context
        self._offer_top(activations, highest, offset)
        self._take_random(flat, offset)
        if self._strata:
            self._offer_rows(flat, offset)
            self._offer_tail(flat, offset)

    def take_shard(self, first_excerpt: int) -> dict[str, Tensor]:
        """Take what the excerpts from `first_excerpt` on have added; sums restart at zero, pools keep their bars."""
        shard = {name: value.clone() for name, value in self._sums.items()} | {"maximum": self._maximum.clone()}
        # Half precision keeps sign and magnitude, so the bins of negative numbers were counted in falling order.
        negative, positive = shard["histogram"].tensor_split(2)
        shard["histogram"] = torch.cat([negative.flip(0), positive])
        for value in self._sums.values():
            value.zero_()
        self._maximum.fill_(-torch.inf)
        shard |= {f"random.{name}": torch.cat([one[name] for one in self._random]) for name in self._random[0]}
        self._random = []
        for number, pool in enumerate((self._top, *self._strata)):
            windows = pool.windows()
            own = windows["position"] >= first_excerpt * self.plan.context if windows else None
            shard |= {f"pool{number}.{name}": value[own] for name, value in windows.items()}
        return shard

    def _add_sums(self, activations: Float[Tensor, "b t h"], first_excerpt: int) -> Float[Tensor, "b c h"]:
        """Powers, counts and histogram of every block; returns the largest activation of every chunk."""
        b, t, h = activations.shape
        bins = torch.empty(b, t, h, dtype=torch.int32) if self._strata else None
        rows = self._scratch.shape[1]
        highest = []
        before = self._sums["sums"].clone()
        for excerpt in range(b):
            for start in range(0, t, rows):
                block = activations[excerpt, start : start + rows]
                self._add_block(block, None if bins is None else bins[excerpt, start : start + rows])
                highest.append(_chunk_maxima(block))
        if not self._sums["sums"].isfinite().all():
            refuse_not_finite(activations, first_excerpt, self.plan.chosen.index)
            scaled = (activations.double() - self.plan.pilot.centre) * self.plan.pilot.scale
            powers = torch.stack([scaled**power for power in range(1, 5)])  # too large for float32
            self._sums["sums"][1:] = before[1:] + powers.sum((1, 2))
        if bins is not None:
            # Neurons side by side: then the many in the bin of zero are counted in one sweep over memory.
            self._sums["histogram"] += torch.bincount(bins.view(-1), minlength=N_BINS * h).view(N_BINS, h)
        return torch.cat(highest).view(b, -1, h)

    def _add_block(self, block: Float[Tensor, "r h"], bins: Tensor | None) -> None:
        """Overwrite a factor with each product, since memory already in the cache costs half as much."""
        first, second = self._scratch[:, : len(block)]
        sums = [torch.sign(block, out=first).abs_().sum(0)]
        torch.mul(block, self.plan.pilot.scale, out=first)
        if bins is not None:
            half = self._half[: len(block)].copy_(first).view(torch.int16)
            bins.copy_(half.bitwise_right_shift_(6))
            torch.add(self._zero_bins, bins, alpha=bins.shape[1], out=bins)
        sums.append(first.sub_(self._shift).sum(0))
        sums.append(torch.mul(first, first, out=second).sum(0))
        sums.append(first.mul_(second).sum(0))
        sums.append(second.mul_(second).sum(0))
        self._sums["sums"] += torch.stack(sums)

    def _offer_top(self, activations: Float[Tensor, "b t h"], highest: Float[Tensor, "b c h"], offset: int) -> None:
        """Offer the best windows of each excerpt, no two sharing a token."""
        t, h = activations.shape[1:]
        excerpt, neuron = (_top_key(highest.amax(1)) < self._top.bar).nonzero(as_tuple=True)
        if self.plan.per_excerpt == 1:
            # The chunk of the maximum is known, so only its tokens need looking at.
            chunk = highest.transpose(1, 2)[excerpt, neuron].argmax(1)
            place = (chunk[:, None] * CHUNK + torch.arange(CHUNK)).clamp(max=t - 1)
            values = torch.take(activations, ((excerpt * t)[:, None] + place) * h + neuron[:, None])
            place = place.gather(1, values.argmax(1, keepdim=True))[:, 0]
        else:
            row, place = self._greedy(activations[excerpt, :, neuron])
            excerpt, neuron = excerpt[row], neuron[row]
        flat, position = activations.view(-1, h), excerpt * t + place
        key = _top_key(flat[position, neuron])
        better = key < self._top.bar[neuron]
        neuron, position, key = neuron[better], position[better], key[better]
        self._offer(self._top, flat, offset, self.plan.window, neuron, neuron, position, key)

    def _greedy(self, columns: Float[Tensor, "m t"]) -> tuple[Tensor, Tensor]:
        """Row and place of the best `per_excerpt` windows of every row, highest first chosen, sorted by place."""
        starts = self.plan.start(torch.arange(self.plan.context), self.plan.window)
        picks = []
        for _ in range(self.plan.per_excerpt):
            value, place = columns.max(1)
            picks.append(torch.where(value.isfinite(), place, -1))
            columns = columns.masked_fill((starts - starts[place, None]).abs() < self.plan.window, -torch.inf)
        places = torch.stack(picks, 1).sort(1).values
        row, pick = (places >= 0).nonzero(as_tuple=True)
        return row, places[row, pick]

    def _take_random(self, flat: Float[Tensor, "n h"], offset: int) -> None:
        draws = self.plan.draws
        slots = np.flatnonzero((draws >= offset) & (draws < offset + len(flat)))
        slots = slots[np.argsort(draws.reshape(-1)[slots], kind="stable")]
        position = torch.from_numpy(draws.reshape(-1)[slots] - offset)
        neuron = torch.from_numpy(slots // max(draws.shape[1], 1))
        windows = self._windows(flat, neuron, position, self.plan.window)
        self._random.append({"slot": torch.from_numpy(slots), "activations": windows})

    def _offer_rows(self, flat: Float[Tensor, "n h"], offset: int) -> None:
        """Offer the drawn tokens of this batch to every neuron."""
        rows = self._rows(len(flat), offset)
        neuron = torch.arange(flat.shape[1])[:, None]
        self._offer_strata(flat, neuron, rows[None], flat[rows].T.contiguous(), offset, 0)

    def _offer_tail(self, flat: Float[Tensor, "n h"], offset: int) -> None:
        """Offer all other tokens to the neurons in whose tail they lie."""
        # NumPy compares and searches several times as fast as PyTorch does on a CPU.
        at = torch.from_numpy(np.flatnonzero(flat.numpy() >= self._tail.numpy()))
        drawn = torch.zeros(len(flat), dtype=torch.bool)
        drawn[self._rows(len(flat), offset)] = True
        at = at[~drawn[at // flat.shape[1]], None]
        value, neuron = flat.view(-1)[at], at % flat.shape[1]
        self._offer_strata(flat, neuron, at // flat.shape[1], value, offset, LATER)

    def _rows(self, n_tokens: int, offset: int) -> Int64[Tensor, " m"]:
        """Places of the drawn tokens in a batch of `n_tokens`."""
        low, high = torch.searchsorted(self.plan.rows, torch.tensor([offset, offset + n_tokens]))
        return self.plan.rows[low:high] - offset

    def _offer_strata(
        self,
        flat: Float[Tensor, "n h"],
        neuron: Int64[Tensor, "g 1"],
        position: Int64[Tensor, "_ _"],
        value: Float[Tensor, "g m"],
        offset: int,
        later: int,
    ) -> None:
        """Offer tokens to the cells of their places; `position` is (1, m) or (g, 1), in the batch."""
        pilot = self.plan.pilot
        priority, fraction = self.plan.drawn(neuron, position + offset)
        place = bins_of(value * pilot.scale[neuron]).long() * FRACTION + fraction
        priority = priority + later
        for ladder, pool in zip(self.plan.ladders, self._strata, strict=True):
            below = ladder.n_below if later else 0  # lower cells would see only a part of their tokens
            cell = torch.searchsorted(ladder.edges[neuron[:, 0], below:], place, right=True) + below
            group = neuron * ladder.n_cells + cell
            wanted = (priority < pool.bar[group]) & (cell >= below + bool(later))
            # By position: the windows of neighbouring neurons lie in the same lines of the cache.
            at = wanted.T.nonzero(as_tuple=True)
            found = [x.expand_as(place).T[at] for x in (group, neuron, position, priority)]
            self._offer(pool, flat, offset, ladder.window, *found)

    def _offer(
        self,
        pool: Pool,
        flat: Float[Tensor, "n h"],
        offset: int,
        window: int,
        group: Int64[Tensor, " m"],
        neuron: Int64[Tensor, " m"],
        position: Int64[Tensor, " m"],
        key: Int64[Tensor, " m"],
    ) -> None:
        """Cut out the windows of positions in the batch and offer them."""
        windows = self._windows(flat, neuron, position, window)
        pool.offer({"group": group, "key": key, "position": position + offset, "activations": windows})

    def _windows(
        self, flat: Float[Tensor, "n h"], neuron: Int64[Tensor, " m"], position: Int64[Tensor, " m"], window: int
    ) -> Float[Tensor, "m w"]:
        """The activations around positions in the batch."""
        place = position % self.plan.context
        first = position - place + self.plan.start(place, window)
        return flat.unfold(0, window, 1)[first, neuron]


def _top_key(activations: Float[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """A key below 2^31 - 1 for positive activations, falling as they rise, because their bits rise with them."""
    return LATER - 1 - activations.view(torch.int32).long()


def _chunk_maxima(block: Float[Tensor, "r h"]) -> Float[Tensor, "c h"]:
    whole = len(block) // CHUNK * CHUNK
    maxima = block[:whole].unflatten(0, (-1, CHUNK)).amax(1)
    return maxima if whole == len(block) else torch.cat([maxima, block[whole:].amax(0, keepdim=True)])


def refuse_not_finite(
    activations: Float[Tensor, "b t h"], first_excerpt: int, index: Int64[np.ndarray, " h"] | None = None
) -> None:
    """Raise UserError with the neuron and the position of the first activation that is NaN or infinite.

    index: of the neurons in the layer, where they are not all of it.
    """
    wrong = (~activations.isfinite()).nonzero()
    if len(wrong):
        excerpt, token, neuron = wrong[0].tolist()
        value = activations[excerpt, token, neuron].item()
        neuron = neuron if index is None else index[neuron]
        raise UserError(f"neuron {neuron} is {value} at excerpt {first_excerpt + excerpt}, token {token}")

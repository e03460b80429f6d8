"""Nearest units, by what they write and by what they do: within a run, and across the runs that were opened.

By weights: the cosine of output directions (neurons/directions.py), within a run, since two models' residual streams
have nothing to do with each other. By activation: the correlation on the same held-out tokens, also across runs of the
same data. Both are computed in the background when a card first asks for them, and kept in RUN/nearest.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from queue import PriorityQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float16, Float32, Int

from cratescope.errors import UserError, first_line
from cratescope.files import slug
from cratescope.viewer.opened import Opened, OpenedSite
from cratescope.viewer.pairs import Best, Columns, compare, read_best, write_best
from cratescope.viewer.quiet import Quiet
from cratescope.viewer.turns import Turns
from cratescope.viewer.values import number

if TYPE_CHECKING:
    from cratescope.viewer.loaded import Loaded, Models

Kind = Literal["weights", "activation"]
VERSION = 1
TOKENS, CONTEXT = 16_384, 256
"""Tokens that activations are compared on, in excerpts of so many."""
HELD = 1 << 29
"""Bytes of activations of one run that are held; a larger run is compared on fewer tokens."""
SHOWN = 10
LONGEST_PAUSE = 2.0
"""Seconds that the next block or batch waits for requests that are being answered."""
BATCH = 4
"""Excerpts that are read in one turn, so that a page does not wait long."""


@dataclass(frozen=True)
class Side:
    """One site of one run."""

    opened: Opened
    site: OpenedSite

    @property
    def key(self) -> tuple[str, str]:
        return self.opened.name, self.site.name

    @property
    def n(self) -> int:
        return sum(len(self.site.units(layer)) for layer in self.site.layers)

    def row(self, layer: int, index: int) -> int | None:
        """The place of a unit among all of the site; None without a record."""
        before = sum(len(self.site.units(one)) for one in self.site.layers if one < layer)
        place = self.site.units(layer).place(index)
        return None if place is None else before + place

    def addresses(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Layer and index of every unit."""
        units = [self.site.units(layer) for layer in self.site.layers]
        layers = np.repeat(self.site.layers, [len(one) for one in units])
        return layers, np.concatenate([one.index for one in units])

    def identity(self) -> dict[str, Any]:
        """What decides its units and what they do."""
        about = {name: self.site.identity.get(name) for name in ("model_sha256", "sae_sha256", "site")}
        return about | {
            "name": self.site.name,
            "units": {layer: len(self.site.units(layer)) for layer in self.site.layers},
        }


@dataclass(frozen=True)
class Pair:
    """Two sites to be compared."""

    kind: Kind
    one: Side
    other: Side

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, *self.one.key, *self.other.key

    @property
    def turned(self) -> Pair:
        return Pair(self.kind, self.other, self.one)

    @property
    def title(self) -> str:
        return f"{self.one.opened.name} {self.one.site.name} with {self.other.opened.name} {self.other.site.name}"

    @property
    def path(self) -> Any:
        """The file that the best of `one` are kept in."""
        name = slug(f"{self.kind} {self.one.site.name} {self.other.opened.name} {self.other.site.name}")
        return self.one.opened.run.root / "nearest" / f"{name}.safetensors"

    @property
    def length(self) -> int:
        """Tokens in an excerpt."""
        return min(CONTEXT, *(one.opened.manifest["context"] or CONTEXT for one in (self.one, self.other)))

    @property
    def tokens(self) -> int:
        """How many tokens both are compared on, if there are so many; 0 of weights."""
        if self.kind == "weights":
            return 0
        return min(tokens_of(one.opened) for one in (self.one, self.other)) // self.length * self.length

    def identity(self) -> dict[str, Any]:
        about = {"version": VERSION, "kind": self.kind, "one": self.one.identity(), "other": self.other.identity()}
        return about | {"tokens": self.tokens, "length": self.length, "data": data_of_run(self.one.opened)}


def tokens_of(opened: Opened) -> int:
    """How many tokens a run's activations are held of."""
    units = sum(Side(opened, site).n for site in opened.sites.values())
    return max(min(TOKENS, HELD // (2 * max(units, 1))), CONTEXT)


def data_of_run(opened: Opened) -> str:
    return str(opened.manifest["data"]["manifest_sha256"])


@dataclass(frozen=True, eq=False)
class Sample:
    """Activations (t, n) of all units of a site on the same tokens, each as a share of its largest."""

    values: Float16[np.ndarray, "t n"]

    def columns(self, n_tokens: int) -> Columns:
        """Standardised over the first `n_tokens`: products of columns are correlations."""

        def some(units: slice) -> Float32[np.ndarray, "t m"]:
            found = self.values[:n_tokens, units].astype(np.float32)
            found -= found.mean(0)
            return unit_length(found)

        return some


def unit_length(columns: Float32[np.ndarray, "t m"]) -> Float32[np.ndarray, "t m"]:
    """Columns of length 1; those of length 0 stay."""
    length = np.sqrt((columns**2).sum(0))
    return columns / np.where(length > 1e-6, length, np.inf)


class Nearest:
    """Computes pairs of sites in a thread of its own, those first that somebody waits for."""

    def __init__(
        self, runs: Iterable[Opened], models: Callable[[], Models], turns: Turns, quiet: Quiet | None = None
    ) -> None:
        """quiet: what is waited for before the first pair is computed."""
        self.runs, self.models, self.turns, self.quiet = [*runs], models, turns, quiet
        self._found: dict[tuple[str, ...], Best | str] = {}
        self._asked: dict[tuple[str, ...], int] = {}
        self._waiting: PriorityQueue[tuple[int, int, Pair]] = PriorityQueue()
        self._count = itertools.count()
        self._samples: dict[tuple[str, int], dict[str, Sample]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rank = 0
        self.progress = ""

    def of(self, opened: Opened, site: OpenedSite, layer: int, index: int) -> dict[str, Any]:
        """The nearest units of one, or what is being done to find them, or why they cannot be found."""
        if opened.can_run is not True:
            return {"error": f"no nearest units: {opened.can_run}"}
        if all(opened is not one for one in self.runs):
            return {"error": "nearest units are found for the runs that were opened, not for milestones"}
        me = Side(opened, site)
        row = me.row(layer, index)
        pairs = [pair for kind in ("weights", "activation") for pair in self._pairs(kind, me)]
        found = [(pair, self._ask(pair, 1)) for pair in pairs]
        if any(best is None for _, best in found):
            return {"computing": self.progress or True}
        errors = [best for _, best in found if isinstance(best, str)]
        if row is None or len(errors) == len(found):
            return {"error": errors[0] if errors else "this unit has no record"}
        listed = {kind: self._listed(found, kind, me, row) for kind in ("weights", "activation")}
        return listed | {"n_tokens": max((b.n_tokens for _, b in found if isinstance(b, Best)), default=0)}

    def twins(self, one: Side, other: Side) -> dict[str, Any] | None:
        """Every unit of a site with the one of another that does most alike; None while that is being found.

        UserError: the two cannot be compared.
        """
        for side in (one, other):
            if side.opened.can_run is not True:
                raise UserError(f"{side.opened.name}: {side.opened.can_run}")
        if data_of_run(one.opened) != data_of_run(other.opened):
            raise UserError(
                f"{one.opened.name} and {other.opened.name} have different data, so there are no tokens that both "
                "read; train or collect both on one data folder"
            )
        pair = Pair("activation", one, other)
        best, back = self._ask(pair, 0), self._ask(pair.turned, 0)
        if best is None or back is None:
            return None
        if isinstance(best, str) or isinstance(back, str):
            raise UserError(best if isinstance(best, str) else str(back))
        return _twins(pair, best, back)

    def _pairs(self, kind: Kind, me: Side) -> list[Pair]:
        """All that a unit of this site is compared with."""
        runs = [me.opened] if kind == "weights" else self.runs
        others = [one for one in runs if one.can_run is True and data_of_run(one) == data_of_run(me.opened)]
        return [Pair(kind, me, Side(one, site)) for one in others for site in one.sites.values()]

    def _ask(self, pair: Pair, rank: int) -> Best | str | None:
        """What was found, or why nothing can be; None if it is yet to be computed. rank: lower ones come first."""
        with self._lock:
            if pair.key in self._found:
                return self._found[pair.key]
            if self._asked.get(pair.key, 9) > rank:
                self._asked[pair.key] = rank
                self._waiting.put((rank, next(self._count), pair))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return None

    def _listed(
        self, found: list[tuple[Pair, Best | str | None]], kind: Kind, me: Side, row: int
    ) -> list[dict[str, Any]]:
        """The best within the run, then those of other runs."""
        rows = []
        for pair, best in found:
            if pair.kind == kind and isinstance(best, Best):
                layers, indices = pair.other.addresses()
                there = best.row[row] >= 0
                for other, value in zip(best.row[row][there].tolist(), best.value[row][there].tolist(), strict=True):
                    rows.append((value, pair.other, int(layers[other]), int(indices[other])))
        rows.sort(key=lambda one: -one[0])
        within = [one for one in rows if one[1].opened is me.opened][:SHOWN]
        across = [one for one in rows if one[1].opened is not me.opened][:SHOWN]
        return [_entry(*one) for one in (*within, *across)]

    def _work(self) -> None:
        if self.quiet is not None:
            self.quiet.wait()
        while True:
            self._rank, _, pair = self._waiting.get()
            if pair.key in self._found:
                continue
            try:
                best, back = self._compute(pair)
                found: dict[tuple[str, ...], Best | str] = {pair.turned.key: back, pair.key: best}
            except UserError as error:
                found = dict.fromkeys((pair.key, pair.turned.key), str(error))
            except Exception as error:  # noqa: BLE001 (a bug of ours: it must not end this thread)
                found = dict.fromkeys((pair.key, pair.turned.key), f"a bug of the viewer's ({first_line(error)})")
            with self._lock:
                self._found |= found
            self.progress = ""
            if self._waiting.empty():
                self._samples.clear()

    def _compute(self, pair: Pair) -> tuple[Best, Best]:
        kept = [read_best(one.path, one.identity(), one.one.n) for one in (pair, pair.turned)]
        if kept[0] is not None and kept[1] is not None:
            return kept[0], kept[1]
        same = pair.one.key == pair.other.key
        sides = [pair.one] if same else [pair.one, pair.other]
        if pair.kind == "weights":
            n_tokens, columns = 0, [self._directions(side) for side in sides]
        else:
            samples = [self._sample(side, pair.length) for side in sides]
            n_tokens = min(pair.tokens, *(len(one.values) for one in samples))
            columns = [one.columns(n_tokens) for one in samples]
        tell = partial(self._tell, pair.title)
        found = compare(columns[0], pair.one.n, columns[-1], pair.other.n, same, n_tokens, tell)
        for each, best in zip((pair, pair.turned), found, strict=True):
            write_best(each.path, best, each.identity())
        return found

    def _tell(self, what: str, share: float) -> None:
        """Say how far it is, and let requests go first unless somebody waits for just this."""
        self.progress = f"{what}: {100 * share:.0f} %"
        if self.quiet is not None and self._rank:
            self.quiet.wait(0.0, LONGEST_PAUSE)

    def _directions(self, side: Side) -> Columns:
        """What every unit of a site writes into the residual stream."""
        from cratescope.neurons.directions import output_directions

        def found() -> list[Float32[np.ndarray, "m d"]]:
            loaded = self.models().of(side.opened)
            places = [place for place in loaded.places if place.name == side.site.name and place.opened]
            rows = []
            for place in places:
                every = output_directions(loaded.model, place.site, place.layer).cpu().numpy()
                rows.append(every[side.site.units(place.layer).index])
            return rows

        rows = self.turns.do(found).result()
        if not rows:
            raise UserError(f"{side.opened.name} {side.site.name}: its records are not of the model in its folder")
        every = unit_length(np.concatenate(rows).astype(np.float32).T)
        return lambda units: every[:, units]

    def _sample(self, side: Side, length: int) -> Sample:
        """What a side does on held-out text, in excerpts of `length` tokens."""
        key = side.opened.name, length
        if key not in self._samples:
            while len(self._samples) > 1:  # those of two runs are held at most
                self._samples.pop(next(iter(self._samples)))
            self._samples[key] = self._read(side.opened, length)
        found = self._samples[key].get(side.site.name)
        if found is None:
            raise UserError(f"{side.opened.name} {side.site.name}: its records are not of the model in its folder")
        return found

    def _read(self, opened: Opened, length: int) -> dict[str, Sample]:
        """Activations of all sites of a run on its held-out text, by site."""
        loaded: Loaded = self.turns.do(lambda: self.models().of(opened)).result()
        excerpts = _excerpts(opened, length, tokens_of(opened))
        sites = {place.name for place in loaded.places if place.opened}
        values = {name: np.zeros((excerpts.size, Side(opened, opened.sites[name]).n), np.float16) for name in sites}
        for start in range(0, len(excerpts), BATCH):
            batch = excerpts[start : start + BATCH]
            found = self.turns.do(partial(loaded.activations, batch)).result()
            where = slice(start * length, start * length + batch.size)
            for name, rows in values.items():
                rows[where] = _shares(loaded, name, found)
            self._tell(f"reading text with {opened.name}", start / len(excerpts))
        return {name: Sample(rows) for name, rows in values.items()}


def _excerpts(opened: Opened, length: int, n_tokens: int) -> Int[np.ndarray, "b t"]:
    """Held-out text in an order such that fewer excerpts are the first of more, and are spread like them."""
    from cratescope.lm.load import data_of

    split = data_of(opened.run, None).split("heldout")
    room = min(TOKENS, split.n_tokens) // length
    order = np.random.default_rng(0).permutation(room)
    return split.spaced(room, length)[order][: n_tokens // length]


def _shares(loaded: Loaded, name: str, found: dict[int, Float32[np.ndarray, "t h"]]) -> Float32[np.ndarray, "t n"]:
    """Activations of the units of a site that have records, as shares of the largest in these."""
    parts = []
    for number_, place in enumerate(loaded.places):
        if place.name == name and place.units is not None:
            largest = np.abs(place.units.numbers["maximum"])
            scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0).astype(np.float32)
            parts.append(np.clip(found[number_][:, place.units.index] / scale, -1e4, 1e4))
    return np.concatenate(parts, 1)


def _entry(value: float, side: Side, layer: int, index: int) -> dict[str, Any]:
    place = side.site.units(layer).place(index)
    text = "" if place is None else side.site.texts(layer)[place]
    about = {"run": side.opened.name, "site": side.site.name, "layer": layer, "index": index}
    return about | {"value": number(value, 4), "text": text}


def _twins(pair: Pair, best: Best, back: Best) -> dict[str, Any]:
    """The most correlated pairs first."""
    layers, indices = (one.tolist() for one in pair.one.addresses())
    other_layers, other_indices = (one.tolist() for one in pair.other.addresses())
    firsts, values, backs = best.row[:, 0].tolist(), best.value[:, 0].tolist(), back.row[:, 0].tolist()
    pairs = [
        {
            "layer": layers[row],
            "index": indices[row],
            "other_layer": other_layers[other],
            "other_index": other_indices[other],
            "correlation": number(values[row], 4),
            "back": backs[other] == row,
        }
        for row, other in enumerate(firsts)
        if other >= 0
    ]
    pairs.sort(key=lambda one: -one["correlation"])
    sides = {
        name: {"run": side.opened.name, "site": side.site.name} for name, side in (("a", pair.one), ("b", pair.other))
    }
    return sides | {"pairs": pairs, "n_tokens": best.n_tokens}

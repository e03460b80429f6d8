"""Search for words in explanations and in the top windows of all units.

Windows are cut from the same excerpts again and again, so the excerpts are put together once from the windows, as one
text; what is found there belongs to every unit that has a window around it. Of each unit the window counts in which its
peak is nearest to what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from cratescope.errors import UserError
from cratescope.neurons.records import read_columns
from cratescope.viewer.opened import Opened, OpenedSite

LONGEST_QUERY = 200
MOST_HITS = 100
"""Of each field."""
MOST_PLACES = 3_000
"""Places in the text of a site that are looked at; there are more only for words that say nothing."""
AROUND = 60
"""Characters of a snippet before and after what was found."""
GAP = -1
"""Stands between excerpts, and where no window is."""


@dataclass(frozen=True, eq=False)
class _Windows:
    """m windows: the cell of the text that each begins at, its width, the place of its peak, its rank, its unit."""

    cell: Int[np.ndarray, " m"]
    width: Int[np.ndarray, " m"]
    peak: Int[np.ndarray, " m"]
    rank: Int[np.ndarray, " m"]
    layer: Int[np.ndarray, " m"]
    index: Int[np.ndarray, " m"]

    def at(self, rows: Any) -> _Windows:
        return _Windows(*(column[rows] for column in vars(self).values()))


class WindowText:
    """The text of all top windows of a site, and the windows in it, by the cell that they begin at."""

    def __init__(self, site: OpenedSite, strings: Callable[[Sequence[int]], list[str]]) -> None:
        cells = _Cells()
        parts = [cells.put(layer, _top(site, layer)) for layer in site.layers]
        tokens = cells.tokens()
        placed = [vars(cells.placed(*part)).values() for part in parts]
        windows = _Windows(*(np.concatenate(columns) for columns in zip(*placed, strict=True)))
        self.windows = windows.at(np.argsort(windows.cell, kind="stable"))
        self.widest = int(windows.width.max(initial=1))
        ids, places = np.unique(tokens, return_inverse=True)
        known = np.array(
            ["\0" if i == GAP else text for i, text in zip(ids, strings(ids.tolist()), strict=True)], object
        )
        lengths = np.array([len(text) for text in known.tolist()], dtype=np.int64)[places]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.text = "".join(known[places].tolist()).replace("\u0130", "i")
        self.lower = self.text.lower()

    def find(self, query: str) -> tuple[_Windows, Int[np.ndarray, " m"], Int[np.ndarray, " m"], bool]:
        """The best window of each unit, the best unit first, with the character that was found; and if there are more.

        Also gives how far each window's peak is from what was found, in tokens.
        """
        places, more = _places(self.lower, query)
        cells = np.searchsorted(self.starts, places, side="right") - 1
        low = np.searchsorted(self.windows.cell, cells - self.widest + 1)
        high = np.searchsorted(self.windows.cell, cells, side="right")
        found = np.repeat(np.arange(len(places)), high - low)
        rows = np.arange(len(found)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + low[found]
        inside = self.windows.cell[rows] + self.windows.width[rows] > cells[found]
        found, rows = found[inside], rows[inside]
        windows = self.windows.at(rows)
        distance = np.abs(windows.cell + windows.peak - cells[found])
        order = np.lexsort((windows.rank, distance, windows.index, windows.layer))
        unit = np.stack([windows.layer[order], windows.index[order]])
        first = np.concatenate([[True], (np.diff(unit, axis=1) != 0).any(0)])[: len(order)]
        best = order[first]
        best = best[np.lexsort((windows.index[best], windows.layer[best], windows.rank[best], distance[best]))]
        return windows.at(best), places[found[best]], distance[best], more

    def snippet(self, cell: int, width: int, place: int, query: str) -> tuple[str, list[list[int]]]:
        """The part of a window around a place, and where the query stands in it."""
        start, end = int(self.starts[cell]), int(self.starts[cell + width])
        low, high = max(start, place - AROUND), min(end, place + len(query) + AROUND)
        text = self.text[low:high]
        return text, marks(text, query)


class _Cells:
    """The tokens of windows, those of an excerpt in a row; windows that do not fit in stand apart, each for itself.

    Windows of one excerpt say different things where their records were imported and nothing is known of excerpts.
    """

    def __init__(self) -> None:
        self.grid = np.full((0, 1), GAP, dtype=np.int32)
        self.rows: dict[int, int] = {}
        self.apart: list[np.ndarray] = []
        self.n_apart = 0

    def put(self, layer: int, top: Mapping[str, np.ndarray]) -> tuple[_Windows, Bool[np.ndarray, " m"]]:
        """Windows of a layer, and which stand apart: the cells of these count from the end of the grid.

        The cells of the others are `row * 2^32 + column` until `placed` knows how long a row is.
        """
        width, start = top["width"], top["start"]
        row = self._rows(top["excerpt"], int((start + width).max(initial=0)) + 1)
        owner = np.repeat(np.arange(len(width)), width)
        column = np.arange(len(owner)) - np.repeat(np.cumsum(width) - width - start, width)
        cells, tokens = row[owner] * self.grid.shape[1] + column, top["tokens"]
        flat = self.grid.reshape(-1)
        odd = _any(owner, (flat[cells] != GAP) & (flat[cells] != tokens), len(width))
        flat[cells[~odd[owner]]] = tokens[~odd[owner]]
        odd |= _any(owner, flat[cells] != tokens, len(width))
        cell = (row << 32) + start
        cell[odd] = self._put_apart(tokens[odd[owner]], width[odd])
        return _Windows(cell, width, top["peak"], top["rank"], np.full(len(width), layer), top["index"]), odd

    def placed(self, windows: _Windows, odd: Bool[np.ndarray, " m"]) -> _Windows:
        """The windows with the cells where they stand in `tokens`."""
        cell = (windows.cell >> 32) * self.grid.shape[1] + (windows.cell & 0xFFFFFFFF)
        return replace(windows, cell=np.where(odd, windows.cell + self.grid.size, cell))

    def tokens(self) -> Int[np.ndarray, " c"]:
        return np.concatenate([self.grid.reshape(-1), *self.apart])

    def _rows(self, excerpt: Int[np.ndarray, " m"], span: int) -> Int[np.ndarray, " m"]:
        """The row of each window, with room for all."""
        names, place = np.unique(excerpt, return_inverse=True)
        rows = np.array([self.rows.setdefault(name, len(self.rows)) for name in names.tolist()], dtype=np.int64)
        more = len(self.rows) - len(self.grid), max(span - self.grid.shape[1], 0)
        if any(more):
            self.grid = np.pad(self.grid, ((0, more[0]), (0, more[1])), constant_values=GAP)
        return rows[place]

    def _put_apart(self, tokens: Int[np.ndarray, " s"], width: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Where each of some windows, whose tokens stand end to end, begins among those that stand apart."""
        place = np.cumsum(width + 1) - width - 1  # one more: a gap after each
        row = np.full(int((width + 1).sum()), GAP, dtype=np.int32)
        row[np.repeat(place, width) + np.arange(len(tokens)) - np.repeat(np.cumsum(width) - width, width)] = tokens
        self.apart.append(row)
        self.n_apart += len(row)
        return place + self.n_apart - len(row)


def _any(owner: Int[np.ndarray, " s"], wrong: Bool[np.ndarray, " s"], n: int) -> Bool[np.ndarray, " n"]:
    """Which of n windows have a token that is wrong."""
    return np.bincount(owner[wrong], minlength=n) > 0


def _top(site: OpenedSite, layer: int) -> dict[str, np.ndarray]:
    """The top windows of all units of a layer, tokens end to end."""
    table = read_columns(site.file(layer), ["index", "top"], whole=False)
    lists = pa.concat_arrays(table.column("top").chunks)
    counts = np.diff(lists.offsets.to_numpy())
    flat = lists.flatten()
    tokens = flat.field("tokens")
    found = {name: flat.field(name).to_numpy().astype(np.int64) for name in ("excerpt", "start", "peak")}
    found["tokens"] = tokens.flatten().to_numpy()
    found["width"] = np.diff(tokens.offsets.to_numpy()).astype(np.int64)
    found["index"] = np.repeat(table.column("index").to_numpy(), counts)
    found["rank"] = np.arange(len(found["index"])) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def _places(text: str, query: str) -> tuple[Int[np.ndarray, " k"], bool]:
    """Where the query stands in a text, at the beginning of a word if it begins with one; and if there are more."""
    word, place = query[0].isalnum(), text.find(query)
    found: list[int] = []
    while place >= 0 and len(found) < MOST_PLACES:
        if not (word and place and text[place - 1].isalnum()):
            found.append(place)
        place = text.find(query, place + 1)
    return np.array(found, dtype=np.int64), place >= 0


def marks(text: str, query: str) -> list[list[int]]:
    """Where the query stands in a short text, as [from, to]."""
    places, _ = _places(text.replace("\u0130", "i").lower(), query)
    return [[place, place + len(query)] for place in places.tolist()]


class Search:
    """Explanations and windows of all runs that were opened; the windows' text is put together when first needed."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], WindowText] = {}

    def find(self, runs: Sequence[Opened], text: str) -> dict[str, Any]:
        """Units whose explanation, or one of whose windows, has these words as they are written, in any case.

        problems: why there is nothing of a site that cannot be read.

        Raises:
            UserError: a longer query than `LONGEST_QUERY`.
        """
        query = text.strip().replace("\u0130", "i").lower()
        if len(query) > LONGEST_QUERY:
            raise UserError(f"q: give at most {LONGEST_QUERY} characters")
        if not query:
            return {"hits": [], "truncated": False, "problems": []}
        sites = [(opened, site) for opened in runs for site in opened.sites.values()]
        said: list[dict[str, Any]] = []
        readable: list[tuple[Opened, OpenedSite]] = []
        problems: list[str] = []
        for opened, site in sites:
            try:
                said += _explanations(opened, site, query)
                self.text(opened, site)
                readable.append((opened, site))
            except UserError as error:
                problems.append(str(error))
        seen, more = self._windows(readable, query)
        truncated = more or max(len(said), len(seen)) > MOST_HITS
        return {"hits": [*said[:MOST_HITS], *seen[:MOST_HITS]], "truncated": truncated, "problems": problems}

    def text(self, opened: Opened, site: OpenedSite) -> WindowText:
        """The windows of a site, put together."""
        key = opened.name, site.name
        if key not in self._texts:
            self._texts[key] = WindowText(site, opened.decode)
        return self._texts[key]

    def _windows(self, sites: Sequence[tuple[Opened, OpenedSite]], query: str) -> tuple[list[dict[str, Any]], bool]:
        """The best units of all sites: those whose peak is nearest to what was found come first."""
        found, any_more = [], False
        for opened, site in sites:
            text = self.text(opened, site)
            windows, places, distance, more = text.find(query)
            any_more |= more or len(places) > MOST_HITS
            rows = zip(*(column.tolist() for column in (*vars(windows).values(), places, distance)), strict=True)
            for place, row in enumerate(rows):
                if place == MOST_HITS:
                    break
                found.append((row[-1], row[3], text, opened.name, site.name, row))
        found.sort(key=lambda one: one[:2])
        return [_hit(*one[2:], query) for one in found], any_more


def _hit(text: WindowText, run: str, site: str, row: Sequence[int], query: str) -> dict[str, Any]:
    cell, width, _, _, layer, index, place, _ = row
    snippet, found = text.snippet(cell, width, place, query)
    about = {"run": run, "site": site, "layer": layer, "index": index, "field": "window"}
    return about | {"snippet": snippet, "marks": found}


def _explanations(opened: Opened, site: OpenedSite, query: str) -> Iterator[dict[str, Any]]:
    for layer in site.layers:
        units = site.units(layer)
        for row, text in enumerate(site.texts(layer)):
            if text and (found := marks(text, query)):
                about = {"run": opened.name, "site": site.name, "layer": layer, "index": int(units.index[row])}
                yield about | {"field": "explanation", "snippet": text, "marks": found}

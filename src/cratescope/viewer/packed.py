"""JSON values made short for an export: windows fewer and narrower, tokens as numbers, histograms without their edges.

page/shards.js unpacks them (`unpacked`).
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cratescope.viewer.cards import Labelled

Json = dict[str, Any]

WIDTH = 32
"""Tokens of a window, around its peak."""
FIRST = {"top": 10, "random": 4}
"""Windows of these kinds that are kept; of others, one per stratum."""
PER_STRATUM = 1
WINDOW = ("kind", "label", "tokens", "activations", "simulated", "peak", "excerpt", "start")
BINS = {"low", "high", "count"}
WORD = re.compile(r"[^\W_]+")
NEAR = 2
"""Tokens before and after a peak whose words are found first."""
LONGEST_WORD = 40
"""Characters; what is longer is no word that anyone looks for."""


@dataclass
class Words:
    """Strings by number, in the order in which they came."""

    numbers: dict[str, int] = field(default_factory=dict)

    def of(self, strings: Iterable[str]) -> list[int]:
        return [self.numbers.setdefault(one, len(self.numbers)) for one in strings]


@dataclass
class Packer:
    """Makes cards short; `words` and `edges` say what its numbers mean."""

    words: Words
    edges: dict[tuple[float, float], int] = field(default_factory=dict)

    def pack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.pack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == BINS:
            return self._bins(value)
        if "tokens" in value and "activations" in value:
            row = value | {"tokens": self.words.of(value["tokens"])}
            return {"$window": [row.get(name) for name in WINDOW]}
        return {key: self.pack(item) for key, item in value.items()}

    def _bins(self, histogram: Json) -> Json:
        """The numbers of its bins as differences, which repeat."""
        pairs = zip(histogram["low"], histogram["high"], strict=True)
        bins = [self.edges.setdefault(pair, len(self.edges)) for pair in pairs]
        steps = [after - before for before, after in zip([0, *bins], bins, strict=False)]
        return {"$bins": steps, "count": histogram["count"]}


def few(windows: Sequence[Labelled]) -> list[Labelled]:
    """Of each kind, or of each stratum of a kind, the first ones; those that were simulated before others."""
    groups: dict[tuple[str, str], list[Labelled]] = defaultdict(list)
    for window in windows:
        kind, label, _, _ = window
        groups[kind, "" if kind in FIRST else label].append(window)
    found: list[Labelled] = []
    for (kind, _), group in groups.items():
        ordered = group if kind == "top" else sorted(group, key=lambda window: window[3] is None)
        found += ordered[: FIRST.get(kind, PER_STRATUM)]
    return found


def narrow(card: Json) -> Json:
    """The card with narrower windows, and without its histogram, which the layer's own script has."""
    life = [stage | {"top": [*map(cut, stage.get("top", ()))]} for stage in card["life"]]
    rest = {key: value for key, value in card.items() if key not in ("histogram", "quantiles")}
    return rest | {"windows": [*map(cut, card["windows"])], "life": life}


def cut(window: Json) -> Json:
    """The `WIDTH` tokens around the peak, as `Window.cut` does it."""
    n = len(window["tokens"])
    if n <= WIDTH:
        return window
    first = min(max(window["peak"] - WIDTH // 2, 0), n - WIDTH)
    rows = {name: window[name] and window[name][first : first + WIDTH] for name in ("tokens", "activations", "simulated")}
    return window | rows | {"peak": window["peak"] - first, "start": window["start"] + first}


def words_of(card: Json) -> tuple[set[str], set[str]]:
    """Words of a card's windows, in small letters: those near the peak of a top window, and all others."""
    near = _words("".join(_around(window)) for window in card["windows"] if window["kind"] == "top")
    return near, _words("".join(window["tokens"]) for window in card["windows"]) - near


def _around(window: Json) -> list[str]:
    return window["tokens"][max(window["peak"] - NEAR, 0) : window["peak"] + NEAR + 1]


def _words(texts: Iterable[str]) -> set[str]:
    found = {word for text in texts for word in WORD.findall(text.replace("\u0130", "i").lower())}
    return {word for word in found if len(word) <= LONGEST_WORD}


def script(name: str, value: Any) -> str:
    """A script that hands a JSON value, or bytes as they are, to the page."""
    raw = value if isinstance(value, bytes) else compact(value).encode()
    packed = base64.b64encode(gzip.compress(raw, mtime=0)).decode()
    return f'Cratescope.shard({json.dumps(name)}, "{packed}");\n'


def compact(value: Any) -> str:
    """JSON without spaces. ValueError: a number that is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)

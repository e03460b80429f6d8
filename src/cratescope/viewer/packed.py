"""JSON values made short for an export, and the scripts that hand them to the page.

Cards have fewer and narrower windows, tokens and other units as numbers, and histograms without their edges;
page/shards.js unpacks them (`unpacked`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratescope.files import slug, write_text
from cratescope.viewer.cards import Labelled

Json = dict[str, Any]

WIDTH = 24
"""Tokens of a window, around its peak."""
FIRST = {"top": 10, "random": 4}
"""Windows of these kinds that are kept; of others, one per stratum."""
PER_STRATUM = 1
RAISED = ("raises", "lowers", "measured_raises", "measured_lowers")
TOKENS_RAISED = 10
"""Tokens that are kept of each list of effects."""
WINDOW = ("kind", "label", "tokens", "activations", "simulated", "peak", "excerpt", "start")
BINS = {"low", "high", "count"}
UNIT = {"run", "site", "layer", "index", "value", "text"}
TOKENS = {
    frozenset({"text", "mean", "count"}): "$mean",
    frozenset({"text", "logit"}): "$logit",
    frozenset({"text", "change", "probability"}): "$change",
}
"""Tokens with numbers, by their fields: how each is called when it is short."""
Address = tuple[str, str, int, int]
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
    """Makes cards short; `words`, `units` and `edges` say what its numbers mean.

    units: numbers by run, site, layer and index.
    """

    words: Words
    units: Mapping[Address, int] = field(default_factory=dict)
    edges: dict[tuple[float, float], int] = field(default_factory=dict)

    def pack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.pack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == BINS:
            return self._bins(value)
        if value.keys() == UNIT:
            return {"$unit": [self.units[_address(value)], value["value"]]}
        if "tokens" in value and "activations" in value:
            row = value | {"tokens": self.words.of(value["tokens"])}
            return {"$window": [row.get(name) for name in WINDOW]}
        if kind := TOKENS.get(names := frozenset(value)):
            numbers = [value[name] for name in sorted(names - {"text"})]
            return {kind: [*self.words.of([value["text"]]), *numbers]}
        return {key: self.pack(item) for key, item in value.items()}

    def _bins(self, histogram: Json) -> Json:
        """The numbers of its bins as differences, which repeat."""
        pairs = zip(histogram["low"], histogram["high"], strict=True)
        bins = [self.edges.setdefault(pair, len(self.edges)) for pair in pairs]
        steps = [after - before for before, after in zip([0, *bins], bins, strict=False)]
        return {"$bins": steps, "count": histogram["count"]}


def _address(value: Json) -> Address:
    return value["run"], value["site"], value["layer"], value["index"]


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
    """The card with narrower windows and fewer tokens, and without its histogram, which the layer's script has."""
    life = [stage | {"top": [*map(cut, stage.get("top", ()))]} for stage in card["life"]]
    effects = card["effects"] and card["effects"] | {name: card["effects"][name][:TOKENS_RAISED] for name in RAISED}
    rest = {key: value for key, value in card.items() if key not in ("histogram", "quantiles")}
    return rest | {"windows": [*map(cut, card["windows"])], "effects": effects, "life": life}


def cut(window: Json) -> Json:
    """The `WIDTH` tokens around the peak, as `Window.cut` does it."""
    n = len(window["tokens"])
    if n <= WIDTH:
        return window
    first = min(max(window["peak"] - WIDTH // 2, 0), n - WIDTH)
    rows = {
        name: window[name] and window[name][first : first + WIDTH] for name in ("tokens", "activations", "simulated")
    }
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


def compact(value: Any) -> str:
    """JSON without spaces. ValueError: a number that is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class Scripts:
    """The scripts in a folder. Each hands a JSON value, or bytes, to the page by a name that no other one has."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._names: set[str] = set()
        self._same: dict[str, str] = {}

    def put(self, value: Any, *parts: object) -> str:
        """Write a script and return its name, made of `parts`, however these are spelled."""
        whole = "-".join(slug(str(part)) for part in parts)
        name, again = whole, 2
        while name.lower() in self._names:  # there are disks that do not tell capitals from small letters
            name, again = f"{whole}-again-{again}", again + 1
        self._names.add(name.lower())
        raw = value if isinstance(value, bytes) else compact(value).encode()
        packed = base64.b64encode(gzip.compress(raw, mtime=0)).decode()
        write_text(self.folder / f"{name}.js", f'Cratescope.shard("{name}", "{packed}");\n')
        return name

    def put_once(self, value: Any, *parts: object) -> str:
        """The same, but what was put once before has that name."""
        digest = hashlib.sha256(compact(value).encode()).hexdigest()
        if digest not in self._same:
            self._same[digest] = self.put(value, *parts)
        return self._same[digest]

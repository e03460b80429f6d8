"""Protocols: which windows of a neuron an explanation is made from, which it is scored on, and by what measure.

docs/evaluation.md has them as a table, with their sources. No window that is scored on shares a token with one that is
explained from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cratescope.errors import UserError
from cratescope.neurons.records import NeuronRecord, Window

Source = Literal["top", "random", "by_quantile", "by_rank", "by_level"]
ON_UNIFORM_TEXT = ("balanced", "unseen", "specific")
"""Measures of protocols that score windows drawn uniformly alone, where counts of words and widths are those of text.

Beside a protocol's own measure they are the ones that are shown of single neurons, with intervals.
"""


@dataclass(frozen=True)
class Pick:
    """Some windows of one list of a neuron's record, cut to `width` tokens around their peaks.

    ranks: places in the list, in every stratum of a stratification; None for all. Places that a neuron has no window
    for are passed over.
    """

    source: Source
    ranks: Sequence[int] | None
    width: int = 64

    def windows(self, record: NeuronRecord) -> Iterator[Window]:
        found = getattr(record, self.source)
        lists = (found,) if self.source in ("top", "random") else tuple(stratum.windows for stratum in found)
        if not lists:
            neuron = record.neuron
            raise UserError(
                f"layer {neuron.layer} neuron {neuron.index} of {neuron.model}: records have no windows {self.source}, "
                "which the protocol needs; run `cratescope collect --strata`, or choose another of --protocols"
            )
        for windows in lists:
            ranks = range(len(windows)) if self.ranks is None else self.ranks
            yield from (windows[rank].cut(self.width) for rank in ranks if rank < len(windows))

    def meets(self, other: Pick) -> bool:
        """Could a window be in both?"""
        if self.source != other.source:
            return False
        return self.ranks is None or other.ranks is None or bool(set(self.ranks) & set(other.ranks))


@dataclass(frozen=True)
class ExplanationSet:
    """The windows that an explanation is made from. `name` stands in paths and tables, so no two sets may share it."""

    name: str
    picks: tuple[Pick, ...]

    def windows(self, record: NeuronRecord) -> tuple[Window, ...]:
        return _windows(self.picks, record)

    @property
    def protocols(self) -> list[Protocol]:
        """All protocols that score explanations of this set."""
        return [protocol for protocol in PROTOCOLS.values() if protocol.set.name == self.name]

    def again(self, turn: int) -> ExplanationSet:
        """The set for the `turn`th further explanation of a neuron, made from as many other top windows; itself for 0.

        Their ranks follow one another among those that this set's protocols do not use and other protocols do: the
        rest is left to select explanations on.

        Raises:
            UserError: there are not so many, or the set is not of top windows alone.
        """
        if not turn:
            return self
        ranks, width = self.picks[0].ranks or (), self.picks[0].width
        spare = sorted(_top_ranks(PROTOCOLS.values()) - _top_ranks(self.protocols))
        others = spare[(turn - 1) * len(ranks) : turn * len(ranks)]
        if len(self.picks) > 1 or len(others) < len(ranks):
            most = 0 if len(self.picks) > 1 else len(spare) // len(ranks)
            names = ", ".join(protocol.name for protocol in self.protocols)
            raise UserError(f"--windows {turn}: at most {most} for what {names} explains from; give fewer")
        return ExplanationSet(self.name, (Pick("top", others, width),))


@dataclass(frozen=True)
class Protocol:
    """What an explanation is scored on.

    set: what it is made from; protocols of one set share explanations and simulations.
    measures: the protocol's own measure first. source: who described it.
    """

    name: str
    set: ExplanationSet
    picks: tuple[Pick, ...]
    measures: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if any(one.meets(other) for one in self.set.picks for other in self.picks):
            raise ValueError(f"protocol {self.name}: a window would both explain and score")

    def windows(self, record: NeuronRecord) -> tuple[Window, ...]:
        """Windows to score on, in the order of the picks; the order does not change a pooled correlation."""
        return _windows(self.picks, record)


def _top_ranks(protocols: Iterable[Protocol]) -> set[int]:
    """Ranks of the top windows that these protocols explain from or score."""
    picks = (pick for protocol in protocols for pick in (*protocol.set.picks, *protocol.picks))
    return {rank for pick in picks if pick.source == "top" for rank in pick.ranks or ()}


def _windows(picks: Iterable[Pick], record: NeuronRecord) -> tuple[Window, ...]:
    return tuple(window for pick in picks for window in pick.windows(record))


_PAPER = "Bai and Ma 2025, after Bills et al. 2023"
_EVEN_RANDOM = Pick("random", range(0, 10, 2))

TOP = ExplanationSet("top", (Pick("top", range(0, 10, 2)),))
ANTHROPIC = ExplanationSet(
    "anthropic", (Pick("top", range(0, 15), 8), Pick("by_rank", (0, 1), 8), Pick("random", range(0, 5), 8))
)
BRICKEN = ExplanationSet(
    "bricken", (Pick("top", range(0, 10), 8), Pick("by_level", (0, 1), 8), Pick("random", range(0, 5), 8))
)
# Splits of five, taken in turn: train, calibration, valid and test of the top windows, the last three of the random
# ones. Train explains and valid scores.
OPENAI = ExplanationSet("openai", (Pick("top", range(0, 20, 4)),))

_CORRELATIONS = ("pearson", "spearman")
_UNIFORM = (*_CORRELATIONS, "cosine", "auprc", "f1", "iou", *ON_UNIFORM_TEXT)
_ANTHROPIC = (
    *(Pick("top", range(15, 25), 8), Pick("by_rank", (2, 3), 8), Pick("random", range(5, 10), 8)),
    # Out of context: of the eight tokens those from 3 to 5, the peak and one on either side.
    Pick("top", range(25, 35), 3),
)
_BRICKEN = (
    *(Pick("top", range(10, 16), 8), Pick("by_level", (2, 3), 8), Pick("random", range(5, 15), 8)),
    Pick("top", range(16, 38), 3),
)
_OPENAI = (Pick("top", range(2, 20, 4)), Pick("random", range(1, 15, 3)))
_EVERY = (
    Protocol("top-and-random", TOP, (_EVEN_RANDOM, Pick("top", range(1, 10, 2))), _CORRELATIONS, _PAPER),
    Protocol("random-only", TOP, (_EVEN_RANDOM,), (*_CORRELATIONS, *ON_UNIFORM_TEXT), _PAPER),
    Protocol("uniform", TOP, (Pick("random", None),), _UNIFORM, "Oikarinen et al. 2025"),
    Protocol("anthropic", ANTHROPIC, _ANTHROPIC, _CORRELATIONS, "Bai and Ma 2025, after Bricken et al. 2023"),
    Protocol("bricken", BRICKEN, _BRICKEN, _CORRELATIONS[::-1], "Bricken et al. 2023"),
    Protocol("openai", OPENAI, _OPENAI, _CORRELATIONS, "Bills et al. 2023"),
)
PROTOCOLS = {protocol.name: protocol for protocol in _EVERY}


def protocols_named(names: Sequence[str]) -> dict[ExplanationSet, list[Protocol]]:
    """The named protocols by explanation set. Raises UserError: there is no such protocol, or none is named."""
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise UserError(f"--protocols {' '.join(unknown)}: not a protocol; choose from {', '.join(PROTOCOLS)}")
    found: dict[ExplanationSet, list[Protocol]] = {}
    for protocol in (PROTOCOLS[name] for name in dict.fromkeys(names)):
        found.setdefault(protocol.set, []).append(protocol)
    return found


def sources(protocols: Iterable[Protocol]) -> set[Source]:
    """Where the windows come from that these protocols explain from or score on."""
    return {pick.source for protocol in protocols for pick in (*protocol.set.picks, *protocol.picks)}


def scoring_windows(protocols: Iterable[Protocol], record: NeuronRecord) -> list[Window]:
    """Every window that one of the protocols scores on, once."""
    found = (window for protocol in protocols for window in protocol.windows(record))
    return list({window.key: window for window in found}.values())

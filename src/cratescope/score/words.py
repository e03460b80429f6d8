"""Which word each scored token belongs to, for the measures that look at words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cratescope.explain.config import SELECTED, TERMS
from cratescope.explain.protocols import PROTOCOLS, Protocol, Source, sources
from cratescope.explain.shown import same_word
from cratescope.neurons.records import NeuronRecord, Window


@dataclass(frozen=True, eq=False)
class Words:
    """The words of n scored tokens.

    number (n,): equal for tokens of equal words, from 0 in the order in which they come. unseen (n,): is the word in
    none of the windows that the explanation was made from?
    """

    number: Int[np.ndarray, " n"]
    unseen: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, scored: Sequence[Window], known: Sequence[Window], reader: Reader) -> Words:
        """The words of `scored` windows joined together; the explanation was made from the `known` ones."""
        n = sum(len(window.tokens) for window in scored)
        words, first, number = np.unique(reader.read([*scored, *known]), return_index=True, return_inverse=True)
        unseen = np.ones(len(words), dtype=bool)
        unseen[number[n:]] = False
        rank = np.argsort(np.argsort(first))
        return cls(rank[number[:n]], unseen[number[:n]])


WordsOf = Callable[[Protocol, NeuronRecord], Words]
"""The words of a neuron's tokens that a protocol scores."""


def words_for(explainer: str, reader: Reader, turns: Collection[int] = (0,)) -> WordsOf:
    """The words as they are to somebody who has read the windows that the explainer's explanation was made from.

    turns: which windows it or its candidates were shown (`Explained.turns`).

    A control has the same words as the neuron's own explanation, so that both are scored on the same tokens.
    """

    def words(protocol: Protocol, record: NeuronRecord) -> Words:
        return Words.of(protocol.windows(record), known_windows(explainer, protocol, record, turns), reader)

    return words


def sources_read(explainer: str, protocols: Iterable[Protocol]) -> set[Source]:
    """Which windows of a record are scored by the protocols or read as the explainer's `known_windows`."""
    return sources(protocols) | ({"top", "by_quantile"} if explainer in (TERMS, SELECTED) else set())


def known_windows(
    explainer: str, protocol: Protocol, record: NeuronRecord, turns: Collection[int] = (0,)
) -> Sequence[Window]:
    """The windows that the explainer's explanation of a neuron was made from: `unseen` leaves their words out."""
    shown = [window for turn in sorted(turns) for window in protocol.set.again(turn).windows(record)]
    if explainer not in (TERMS, SELECTED):
        return shown
    from cratescope.explain.terms.selection import selection_windows  # slow to import

    chosen_on = selection_windows(record, [*PROTOCOLS.values()])
    return [*chosen_on, *shown] if explainer == SELECTED else chosen_on


class Reader:
    """Reads tokens as words: whole ones as they stand in their window, in lower case and without the spaces around.

    A word is cut at the window's ends, as it is for whoever reads the window. Signs are words of their own token; so
    is an id that the vocabulary, `vocabulary_strings` of the tokenizer, does not have.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Most words are one token, so what these are is looked up once."""
        self._texts = vocabulary
        self._numbers: dict[str, int] = {}
        self._spelled: dict[bytes, int] = {}
        self._alone = np.array([*(self._numbers.setdefault(_word(text), len(self._numbers)) for text in vocabulary), 0])
        places: dict[str, int] = {}
        ends = [(text[:1], text[-1:]) for text in (*vocabulary, " ")]  # the last for ids that are not there
        self._ends = np.array([[places.setdefault(end, len(places)) for end in both] for both in ends])
        self._characters = [*places]

    def read(self, windows: Sequence[Window]) -> Int[np.ndarray, " n"]:
        """A number for each token of the windows joined together, equal for those of equal words."""
        tokens = np.concatenate([window.tokens for window in windows] or [np.zeros(0)]).astype(np.int64)
        place = np.where((tokens >= 0) & (tokens < len(self._texts)), tokens, len(self._texts))
        number = np.repeat(np.arange(len(windows)), [len(window.tokens) for window in windows])
        begins = np.append(True, ~self._joined(place) | (np.diff(number) > 0))[: len(tokens)]
        first = np.flatnonzero(begins)
        length = np.diff(first, append=len(tokens))
        found = self._alone[place[first]]
        longer = np.flatnonzero((length > 1) | (place[first] == len(self._texts)))
        size, raw = tokens.itemsize, tokens.tobytes()
        ends = zip((size * first[longer]).tolist(), (size * (first + length)[longer]).tolist(), strict=True)
        known = self._spelled
        found[longer] = [known[ids] if (ids := raw[a:b]) in known else self._number(ids) for a, b in ends]
        return np.repeat(found, length)

    def _joined(self, place: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " m"]:
        """Of every token after the first: is it of one word with the one before it?"""
        before, after = self._ends[place[:-1], 1], self._ends[place[1:], 0]
        pairs, pair = np.unique(before * len(self._characters) + after, return_inverse=True)
        ends = zip(*np.divmod(pairs, len(self._characters)), strict=True)
        return np.array([_same_word(self._characters[one], self._characters[other]) for one, other in ends], bool)[pair]

    def _number(self, ids: bytes) -> int:
        """Of the word that is spelled with these tokens, a new one for a new word."""
        tokens = np.frombuffer(ids, np.int64).tolist()
        texts = [self._texts[token] if 0 <= token < len(self._texts) else f"<{token}>" for token in tokens]
        self._spelled[ids] = self._numbers.setdefault(_word("".join(texts)), len(self._numbers))
        return self._spelled[ids]


_same_word = functools.cache(same_word)


def _word(text: str) -> str:
    """Spaces alone remain what they are."""
    return (text.strip(" ") or text).lower()

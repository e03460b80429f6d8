"""The values of readings on the tokens of windows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cratescope.explain.simulators.readings import BEFORE, Listed, Literal, Placed, Reading
from cratescope.explain.terms.features import Features
from cratescope.explain.terms.language import Among, Back
from cratescope.explain.terms.phrases import Term, What, Where
from cratescope.explain.terms.texts import together

WHOLE, FIRST, LAST = slice(None), slice(1), slice(-1, None)
"""Which tokens of a quoted text count: the word after "part of" is behind its last one, that before it its first."""

SENTENCE = "at the start of a sentence"


@dataclass(frozen=True, eq=False)
class Reader:
    """Values of readings on the tokens (n,) of some texts.

    listed: the values of what the language model lists for a phrase, none below 0. What is literal has the value
    `most`. What is placed has its own value where the place holds; next to Y it holds where Y has a value above 0.
    """

    features: Features
    listed: Callable[[str], Float[np.ndarray, " n"]]
    most: float

    def __call__(self, reading: Reading | None, part: slice = WHOLE) -> Float[np.ndarray, " n"]:
        match reading:
            case None:
                return np.full(len(self.features.texts.tokens), self.most)
            case Listed(phrase):
                return self.listed(phrase)
            case Literal(whats):
                return self.most * np.max([self._is(what, part) for what in whats], axis=0)
            case Placed(what, place, other):
                return self(what, part) * self._where(place, other)

    # What is literal: 1 where it is so, 0 elsewhere.

    def _is(self, what: What, part: slice) -> Float[np.ndarray, " n"]:
        if what.kind == "word":
            return self._quoted(what.text, part)
        if what.kind == "class":
            pattern = self.features.lexicon.language.spellings.get(what.text)
            signs = self._spelled(lambda word: pattern is not None and any(map(pattern.fullmatch, signs_of(word))))
            return np.maximum(self.features.value(Term(what, None, 1)), signs)
        return self._spelled(lambda word: has_affix(word, what))

    def _spelled(self, is_it: Callable[[str], bool]) -> Float[np.ndarray, " n"]:
        texts = self.features.texts
        return np.array([*map(is_it, texts.distinct), False], dtype=np.float64)[texts.spelling][texts.word]

    def _quoted(self, text: str, part: slice) -> Float[np.ndarray, " n"]:
        """Tokens of every occurrence of a text, in capitals or not, that does not begin or end inside a word."""
        texts = self.features.texts
        pattern = re.compile(r"\s+".join(map(re.escape, text.split())), re.IGNORECASE)
        found = np.zeros(len(texts.tokens))
        for strings, start, end in zip(texts.strings, texts.bounds, texts.bounds[1:], strict=False):
            window, ends = "".join(strings), np.cumsum([len(string) for string in strings])
            for match in pattern.finditer(window):
                if not any(inside_word(window, place) for place in match.span()):
                    low, high = np.searchsorted(ends, match.start(), "right"), np.searchsorted(ends, match.end())
                    found[start:end][low : high + 1][part] = 1
        return found

    # Where words stand: from 0 to 1.

    def _where(self, place: str, other: Reading | None) -> Float[np.ndarray, " n"]:
        texts = self.features.texts
        if other is None:
            return self._sentence() if place == SENTENCE else self.features.value(Term(None, Where(place), 1))
        if place == BEFORE:
            return self._beside(texts.ahead, self._holds(other, FIRST)[texts.first])
        match self.features.lexicon.language.places[place]:
            case Back(back):
                return self._beside(texts.back(back), self._holds(other, LAST)[texts.last])
            case Among(last):
                near = self._holds(other, WHOLE)[texts.first][~texts.is_blank]
                return self.features.shares(near[:, None], last)[texts.word, 0]
        raise AssertionError(f"{place} stands by itself")

    def _holds(self, other: Reading, part: slice) -> Float[np.ndarray, " n"]:
        return np.sign(self(other, part))  # NaN stays, and is reported

    def _beside(self, neighbour: Int[np.ndarray, " u"], values: Float[np.ndarray, " u"]) -> Float[np.ndarray, " n"]:
        """For every token the value of the word that is next to its word; 0 where there is none (-1)."""
        return np.where(neighbour >= 0, values[neighbour], 0)[self.features.texts.word]

    def _sentence(self) -> Float[np.ndarray, " n"]:
        """Behind the end of a sentence; unlike in the language of terms line breaks may stand between."""
        texts = self.features.texts
        ends, breaks = (
            self.features.value(Term(What("class", name), None, 1))[texts.first]
            for name in ("ends of sentences", "line breaks")
        )
        written = np.where((breaks > 0) | texts.is_blank, -1, np.arange(len(ends)))
        before = np.append(-1, np.maximum.accumulate(written)[:-1])
        return self._beside(np.where(texts.window[before] == texts.window, before, -1), ends)


def signs_of(word: str) -> list[str]:
    """The signs in a word or in a run of signs."""
    return [character for character in word if not character.isalnum()]


def has_affix(word: str, what: What) -> bool:
    """Does a longer word of letters have this ending or beginning?"""
    lower = word.lower()
    has = lower.endswith if what.kind == "ending" else lower.startswith
    return has(what.text) and len(lower) > len(what.text) and lower.isalpha()


def inside_word(text: str, place: int) -> bool:
    """Are the characters before and behind a place of one word?"""
    return 0 < place < len(text) and together(text[place - 1], text[place])

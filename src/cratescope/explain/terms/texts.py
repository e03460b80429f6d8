"""The words of windows of tokens: pieces that stand together without a space make one word, which may be a sign.

Everything is found for many windows at once. A window is all there is: what stands before it is not known.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from cratescope.errors import UserError
from cratescope.explain.shown import same_word
from cratescope.neurons.records import Window

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Beginnings of the names of letters that are written without spaces between words: there each token is a word."""
_LEAST_LETTERS = 0.01
"""Share of a tokenizer's tokens that hold a letter or digit, below which they are no texts."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The text of every token id of a tokenizer, with the space before a word that begins there (`token_strings`)."""

    strings: tuple[str, ...]

    @classmethod
    def of(cls, strings: Sequence[str]) -> Vocabulary:
        """The texts of ids from 0, and an empty one for every id that the tokenizer does not have.

        Raises:
            UserError: hardly a token holds a letter or a digit.
        """
        cls._check(strings)
        return cls((*strings, ""))

    @staticmethod
    def _check(strings: Sequence[str]) -> None:
        readable = sum(any(map(str.isalnum, text)) for text in strings)
        if readable < _LEAST_LETTERS * len(strings) or not readable:
            raise UserError(
                f"tokenizer: {readable} of its {len(strings)} tokens hold a letter or a digit, and terms are about "
                "words; give the model's own tokenizer, or use an explainer other than terms"
            )

    @cached_property
    def _ends(self) -> tuple[Int[np.ndarray, " v"], Int[np.ndarray, " v"], list[str]]:
        """The first and the last character of each token, as places in a list of characters."""
        places: dict[str, int] = {}
        first, last = (
            np.array([places.setdefault(text[end], len(places)) for text in padded], dtype=np.int64)
            for padded, end in (
                ([text or " " for text in self.strings], 0),
                ([text or " " for text in self.strings], -1),
            )
        )
        return first, last, list(places)

    def joined(self, before: Int[np.ndarray, " n"], after: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether each token of `after` goes on with the word that the token of `before` ends in."""
        first, last, characters = self._ends
        pairs, place = np.unique(last[before] * len(characters) + first[after], return_inverse=True)
        known = [
            together(characters[i], characters[j]) for i, j in zip(*np.divmod(pairs, len(characters)), strict=True)
        ]
        return np.array(known, dtype=bool)[place]


@functools.cache
def together(before: str, after: str) -> bool:
    """Are these two characters, next to each other, of one word? Letters without spaces between words never are."""
    return same_word(before, after) and not (_is_unspaced(before) and _is_unspaced(after))


def _is_unspaced(character: str) -> bool:
    return not character.isascii() and character.isalpha() and unicodedata.name(character, "").startswith(_UNSPACED)


@dataclass(frozen=True, eq=False)
class Texts:
    """The tokens (n,) of windows end to end, and their words (u,), in the order of the text.

    word: (n,) which word a token is of. window: (u,) the window of each word. first: (u,) its first token.
    distinct: the different words of all windows, sorted, as written but without spaces around. spelling: (u,) which of
    them each word is. bounds: first token of each window, and n. opens: whether a window is at the start of what the
    model read.
    """

    vocabulary: Vocabulary
    tokens: Int[np.ndarray, " n"]
    opens: Bool[np.ndarray, " w"]
    bounds: Int[np.ndarray, " w+1"]
    word: Int[np.ndarray, " n"]
    first: Int[np.ndarray, " u"]
    window: Int[np.ndarray, " u"]
    spelling: Int[np.ndarray, " u"]
    distinct: list[str]

    @classmethod
    def of(cls, windows: Sequence[Window], vocabulary: Vocabulary) -> Texts:
        """Of the tokens of windows, and of whether they are at the start of what the model read; of nothing else.

        Ids that the tokenizer does not have are empty texts.
        """
        bounds = np.cumsum([0, *(len(window.tokens) for window in windows)])
        tokens = np.concatenate([window.tokens for window in windows] or [np.zeros(0)]).astype(np.int64)
        unknown = len(vocabulary.strings) - 1
        tokens = np.where((tokens >= 0) & (tokens < unknown), tokens, unknown)
        number = np.repeat(np.arange(len(windows)), np.diff(bounds))
        begins = np.ones(len(tokens), dtype=bool)
        inside = np.flatnonzero(number[1:] == number[:-1]) + 1
        begins[inside] = ~vocabulary.joined(tokens[inside - 1], tokens[inside])
        first = np.flatnonzero(begins)
        spelling, distinct = _spellings(tokens, first, vocabulary.strings)
        opens = np.array([window.start == 0 for window in windows], dtype=bool)
        word = np.cumsum(begins) - 1
        return cls(vocabulary, tokens, opens, bounds, word, first, number[first], spelling, distinct)

    @cached_property
    def last(self) -> Int[np.ndarray, " u"]:
        """The last token of each word."""
        return np.append(self.first[1:], len(self.tokens)) - 1

    @cached_property
    def is_blank(self) -> Bool[np.ndarray, " u"]:
        """Words that are only spaces."""
        return np.array([not word.strip(" \t\u00a0") for word in self.distinct], dtype=bool)[self.spelling]

    @cached_property
    def before(self) -> Int[np.ndarray, " u"]:
        """Number of words that are not blank before each word, in all windows."""
        return np.cumsum(~self.is_blank) - ~self.is_blank

    @cached_property
    def starts(self) -> Int[np.ndarray, " u"]:
        """`before` of the first word of each word's window."""
        first = np.searchsorted(self.window, np.arange(len(self.opens)))
        return self.before[np.minimum(first, max(len(self.before) - 1, 0))][self.window]

    def back(self, words: int) -> Int[np.ndarray, " u"]:
        """The word so many words before each one, blank ones not counted; -1 where the window has none."""
        filled = np.flatnonzero(~self.is_blank)
        place = self.before - words
        return np.where(place >= self.starts, filled[np.maximum(place, 0)], -1) if len(filled) else place * 0 - 1

    @cached_property
    def ahead(self) -> Int[np.ndarray, " u"]:
        """The word after each one, blank ones not counted; -1 where the window has none."""
        filled = np.flatnonzero(~self.is_blank)
        place = self.before + ~self.is_blank
        found = np.append(filled, -1)[np.minimum(place, len(filled))]
        return np.where((found >= 0) & (self.window[found] == self.window), found, -1)

    @cached_property
    def strings(self) -> list[list[str]]:
        """The texts of the tokens of each window."""
        return [
            [self.vocabulary.strings[token] for token in self.tokens[start:end].tolist()]
            for start, end in itertools.pairwise(self.bounds)
        ]


def _spellings(
    tokens: Int[np.ndarray, " n"], first: Int[np.ndarray, " u"], strings: Sequence[str]
) -> tuple[Int[np.ndarray, " u"], list[str]]:
    """Which of the distinct words each word is: words of the same tokens are found first, piece by piece."""
    length = np.diff(np.append(first, len(tokens)))
    same = tokens[first]
    samples: list[int] = []
    group = np.zeros(len(first), dtype=np.int64)
    left = np.arange(len(first))
    for piece in range(1, int(length.max(initial=0)) + 1):
        # `same` tells apart the words still `left` by their first `piece` tokens.
        ends = length[left] == piece
        _, sample, place = np.unique(same[ends], return_index=True, return_inverse=True)
        group[left[ends]] = place + len(samples)
        samples += left[ends][sample].tolist()
        left, same = left[~ends], same[~ends]
        if len(left):
            _, same = np.unique(same * len(strings) + tokens[first[left] + piece], return_inverse=True)
    ids, starts = tokens.tolist(), first[samples].tolist()
    ends = (first + length)[samples].tolist()
    texts = [_text("".join([strings[token] for token in ids[a:b]])) for a, b in zip(starts, ends, strict=True)]
    distinct = sorted(set(texts))
    places = {text: place for place, text in enumerate(distinct)}
    return np.array([places[text] for text in texts], dtype=np.int64)[group], distinct


def _text(text: str) -> str:
    return text.strip(" ") or text

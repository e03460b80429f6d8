"""The value of every term on every token of some windows, from the text alone.

A term about a word has one value for each distinct word, so its values are kept as a table of words, and the tokens
as rows of it (`Block`): sums over tokens become products of sparse matrices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int, Num

from cratescope.explain.terms.language import (
    Among,
    Back,
    First,
    Inside,
    Language,
    Place,
    Repeated,
    Rest,
    Start,
    begins_with,
    ends_in,
)
from cratescope.explain.terms.phrases import Term, What, Where
from cratescope.explain.terms.texts import Texts, Vocabulary

FEWEST = 4
"""A share of X is one of at least so many words: one X at the beginning of a window is not all there is."""
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
Parts = tuple[What | None, Where | None]


@dataclass(frozen=True, eq=False)
class Block:
    """Terms whose value on a token is that of a row of a table: values[t, j] = table[rows[t], j]."""

    terms: Sequence[Parts]
    rows: Int[np.ndarray, " n"]
    table: sp.csr_array

    @cached_property
    def _columns(self) -> sp.csc_array:
        return self.table.tocsc()

    @cached_property
    def squares(self) -> sp.csr_array:
        return self.table.multiply(self.table).tocsr()

    def values(self, terms: Sequence[int], tokens: slice = slice(None)) -> Float[np.ndarray, "n j"]:
        """The values of some of the terms on some of the tokens."""
        return self._columns[:, terms].toarray()[self.rows[tokens]]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """What a language says of single words, remembered; all neurons, layers and runs of any tokenizer share one."""

    language: Language
    _rows: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def named(self) -> list[What]:
        """All that a word may be that has a name: classes, endings, beginnings."""
        language = self.language
        return [
            *(What("class", name) for name in language.classes),
            *(What("ending", text) for text in language.endings),
            *(What("beginning", text) for text in language.beginnings),
        ]

    @cached_property
    def column(self) -> dict[What, int]:
        """The place of each in `named`."""
        return {what: column for column, what in enumerate(self.named)}

    def table(self, words: Sequence[str]) -> sp.csr_array:
        """1 for each word (row) and each of `named` that it is; a last row of zeros stands for no word."""
        known = self._rows
        for word in words:
            if word not in known:
                known[word] = self._row(word)
        rows = [known[word] for word in words]
        starts = np.cumsum([0, *map(len, rows), 0])
        columns = np.fromiter(itertools.chain.from_iterable(rows), np.int64, starts[-1])
        return sp.csr_array((np.ones(len(columns)), columns, starts), (len(words) + 1, len(self.named)))

    def _row(self, word: str) -> list[int]:
        language = self.language
        found = [What("class", name) for name in language.classes_of(word)]
        found += [What("ending", text) for text in language.endings_of(word)]
        found += [What("beginning", text) for text in language.beginnings_of(word)]
        return [self.column[what] for what in found]


@dataclass(frozen=True, eq=False)
class Features:
    """The terms of a language on the tokens (n,) of some texts."""

    texts: Texts
    lexicon: Lexicon

    def value(self, term: Term) -> Float[np.ndarray, " n"]:
        """From 0 to 1 on every token."""
        found = np.ones(len(self.texts.tokens))
        if term.what is not None:
            found = found * self._what(term.what)
        return found if term.where is None else found * self._where(term.where)

    def _what(self, what: What) -> Float[np.ndarray, " n"]:
        texts = self.texts
        if what.kind == "piece":
            return (self._pieces == what.text).astype(np.float64)
        return self._spelled(what)[texts.spelling][texts.word]

    def _place(self, place: Place) -> Float[np.ndarray, " n"]:
        """The value of a place that stands by itself."""
        match place:
            case First(after):
                return self._first(after)
            case Inside():
                return self._inside(place)
            case Repeated(letters):
                return self._repeated(letters)
            case Start():
                return self._start(place)
            case Rest():
                return self._rest()
        raise AssertionError(f"{place} needs another word")

    def _spelled(self, what: What) -> Float[np.ndarray, " words"]:
        """1 for each distinct word that is `what`, by its spelling alone, and 0 for no word."""
        if (column := self.lexicon.column.get(what)) is not None:
            return self._columns[:, [column]].toarray()[:, 0]
        words = [word.lower() for word in self.texts.distinct]
        is_it = {"word": str.__eq__, "ending": ends_in, "beginning": begins_with}[what.kind]
        return np.array([*(is_it(word, what.text) for word in words), False], dtype=np.float64)

    def _where(self, where: Where) -> Float[np.ndarray, " n"]:
        place = self.lexicon.language.places[where.place]
        if where.other is None:
            return self._place(place)
        spelled = self._spelled(where.other)
        if isinstance(place, Among):
            there = spelled[self.texts.spelling[~self.texts.is_blank]]
            return self.shares(there[:, None], place.last)[self.texts.word, 0]
        assert isinstance(place, Back)
        return spelled[self._behind(place)]

    # Blocks of candidates.

    def blocks(self, named_only: bool) -> Iterator[Block]:
        """All candidates: terms with names, and unless `named_only` words and pieces in quotation marks."""
        texts, places = self.texts, self.lexicon.language.places
        classes = len(self.lexicon.language.classes)
        named = self.lexicon.named
        yield Block([(what, None) for what in named], texts.spelling[texts.word], self._table)
        near = self._table[:, :classes].tocsr()
        for phrase, place in places.items():
            terms = [(None, Where(phrase, what)) for what in named[:classes]]
            if isinstance(place, Back):
                yield Block(terms, self._behind(place), near)
            if isinstance(place, Among):
                yield Block(terms, texts.word, self._shares(near, place.last))
        plain = {phrase: place for phrase, place in places.items() if not isinstance(place, Back | Among)}
        if plain:
            values = np.stack([self._place(place) for place in plain.values()], 1)
            yield Block([(None, Where(phrase)) for phrase in plain], np.arange(len(values)), sp.csr_array(values))
        if not named_only:
            yield from self._quoted_blocks()

    def _quoted_blocks(self) -> Iterator[Block]:
        texts = self.texts
        known, table = _one_hot([word.lower() for word in texts.distinct])
        words = [What("word", text) for text in known]
        yield Block([(what, None) for what in words], texts.spelling[texts.word], table)
        for phrase, place in self.lexicon.language.places.items():
            if isinstance(place, Back):
                yield Block([(None, Where(phrase, what)) for what in words], self._behind(place), table)
        ids, rows = np.unique(texts.tokens, return_inverse=True)
        known, table = _one_hot([texts.vocabulary.strings[token].strip() for token in ids.tolist()])
        rows = np.where(self._in_pieces, rows, len(ids))
        yield Block([(What("piece", text), None) for text in known], rows, table)

    @cached_property
    def _table(self) -> sp.csr_array:
        return self.lexicon.table(self.texts.distinct)

    @cached_property
    def _columns(self) -> sp.csc_array:
        return self._table.tocsc()

    # Where words stand.

    def _behind(self, place: Back) -> Int[np.ndarray, " n"]:
        """For each token which of the distinct words stands before its word; one past the last where there is none."""
        back = self.texts.back(place.back)
        return np.where(back >= 0, self.texts.spelling[back], len(self.texts.distinct))[self.texts.word]

    def _is(self, name: str) -> Bool[np.ndarray, " u"]:
        """Whether each word is of a class."""
        return (self._spelled(What("class", name)) > 0)[self.texts.spelling]

    def _shares(self, table: sp.csr_array, last: int) -> sp.csr_array:
        """For every word, the share of each column of a table of distinct words among the words before it."""
        texts = self.texts
        kind = np.int16 if last < 1 << 15 else np.int32  # sums may overflow: their differences do not
        filled = table.astype(kind)[texts.spelling[~texts.is_blank]].toarray()
        total = np.zeros((len(filled) + 1, table.shape[1]), dtype=kind)
        np.cumsum(filled, 0, dtype=kind, out=total[1:])
        start = np.maximum(texts.before - last, texts.starts)
        found = sp.csr_array(total[texts.before] - total[start])
        among = np.repeat(np.maximum(texts.before - start, FEWEST), np.diff(found.indptr))
        return sp.csr_array((found.data / among, found.indices, found.indptr), found.shape)

    def shares(self, values: Num[np.ndarray, "f c"], last: int) -> Float[np.ndarray, "u c"]:
        """For every word, the mean of values of the words that are not blank (f,) over the `last` of them before it."""
        texts = self.texts
        total = np.zeros((len(values) + 1, values.shape[1]), dtype=values.dtype)
        np.cumsum(values, 0, out=total[1:])
        start = np.maximum(texts.before - last, texts.starts)
        return (total[texts.before] - total[start]) / np.maximum(texts.before - start, FEWEST)[:, None]

    def _first(self, after: str) -> Float[np.ndarray, " n"]:
        back = self.texts.back(1)
        return ((back >= 0) & self._is(after)[back]).astype(np.float64)[self.texts.word]

    def _rest(self) -> Float[np.ndarray, " n"]:
        found = np.ones(len(self.texts.tokens))
        found[self.texts.first] = 0
        return found

    def _repeated(self, letters: int) -> Float[np.ndarray, " n"]:
        texts = self.texts
        places: dict[str, int] = {}
        lower = np.array([places.setdefault(word.lower(), len(places)) for word in texts.distinct], dtype=np.int64)
        long = np.array([len(word) >= letters and word.isalpha() for word in texts.distinct], dtype=bool)
        _, first = np.unique(texts.window * (len(places) + 1) + lower[texts.spelling], return_index=True)
        found = long[texts.spelling].astype(np.float64)
        found[first] = 0
        return found[texts.word]

    def _start(self, place: Start) -> Float[np.ndarray, " n"]:
        """Words since the last one that ends a text, or since the window began where it opens what the model read."""
        texts = self.texts
        ends = self._is(place.after)
        since = np.maximum.accumulate(np.where(ends, texts.before + ~texts.is_blank, -1))
        since = np.where(since > texts.starts, since, np.where(texts.opens[texts.window], texts.starts, -1))
        value = np.where(since >= 0, 0.5 ** ((texts.before - since) / place.start), 0)
        return np.where(ends, 0, value)[texts.word]

    def _inside(self, place: Inside) -> Float[np.ndarray, " n"]:
        texts = self.texts
        opened, closed, turned = _signs(texts.vocabulary, place)[texts.tokens].T
        breaks = self._is(place.ends)[texts.word]
        breaks[texts.bounds[:-1][np.diff(texts.bounds) > 0]] = True
        stretch = np.cumsum(breaks)
        inside = (_depth(opened - closed, stretch) > 0) | (_since(turned, stretch) % 2 == 1)
        return (inside & (opened + closed + turned == 0)).astype(np.float64)

    @cached_property
    def _in_pieces(self) -> Bool[np.ndarray, " n"]:
        """Tokens of words of several."""
        return (self.texts.last > self.texts.first)[self.texts.word]

    @cached_property
    def _pieces(self) -> np.ndarray:
        """The text of every token that is part of a longer word."""
        ids, rows = np.unique(self.texts.tokens, return_inverse=True)
        strings = np.array([self.texts.vocabulary.strings[token].strip() for token in ids.tolist()], dtype=object)
        return np.where(self._in_pieces, strings[rows] if len(ids) else "", "")


@functools.lru_cache(maxsize=16)
def _signs(vocabulary: Vocabulary, place: Inside) -> Int[np.ndarray, "v 3"]:
    """How many signs each token has that only open, that only close, and that do either in turn."""
    both = set(place.open) & set(place.close)
    kinds = (set(place.open) - both, set(place.close) - both, both)
    return np.array([[sum(c in kind for c in text) for kind in kinds] for text in vocabulary.strings], dtype=np.int64)


def _since(steps: Int[np.ndarray, " n"], stretch: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The sum of the steps of each one's stretch so far; stretches are numbered from 1, rising."""
    total = np.cumsum(steps)
    starts = np.searchsorted(stretch, np.arange(1, stretch.max(initial=0) + 1))
    return total - (total - steps)[starts][stretch - 1] if len(steps) else total


def _depth(steps: Int[np.ndarray, " n"], stretch: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many are open, where each stretch begins with none and what was never opened cannot be closed."""
    total = _since(steps, stretch)
    far = 2 * int(np.abs(total).max(initial=0)) + 1  # lower than anything in the stretches before
    lowest = np.minimum.accumulate(total - far * stretch) + far * stretch
    return total - np.minimum(lowest, 0)


def _one_hot(texts: Sequence[str]) -> tuple[list[str], sp.csr_array]:
    """The different readable texts, sorted, and which of them each one is; a last row of zeros stands for none."""
    known = sorted({text for text in texts if text.strip() and UNREADABLE not in text})
    places = {text: place for place, text in enumerate(known)}
    found = [[places[text]] if text in places else [] for text in texts]
    starts = np.cumsum([0, *map(len, found), 0])
    columns = np.array([column for row in found for column in row], dtype=np.int64)
    return known, sp.csr_array((np.ones(len(columns)), columns, starts), (len(texts) + 1, len(known)))

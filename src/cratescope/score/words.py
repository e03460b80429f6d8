"""Which word each scored token belongs to, for the measures that look at words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cratescope.explain.shown import same_word
from cratescope.neurons.records import Window


@dataclass(frozen=True, eq=False)
class Words:
    """The words of n scored tokens.

    number (n,): equal for tokens of equal words, from 0. unseen (n,): is the word in none of the windows that the
    explanation was made from?
    """

    number: Int[np.ndarray, " n"]
    unseen: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, scored: Iterable[Window], known: Collection[str], vocabulary: Sequence[str]) -> Words:
        """The words of `scored` windows joined together; `known` are those the explanation was made from."""
        words = [word for window in scored for word in words_of(window, vocabulary)]
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        unseen = np.array([word not in known for word in numbers], dtype=bool)
        number = np.array([numbers[word] for word in words], dtype=np.int64)
        return cls(number, unseen[number])


def words_of(window: Window, vocabulary: Sequence[str]) -> list[str]:
    """The lower-cased word of every token of a window, without the spaces around it.

    A word is cut at the window's ends, as it is for whoever reads the window. Signs are words of their own token; so
    is an id that the vocabulary, `vocabulary_strings` of the tokenizer, does not have.
    """
    return [word for run in _runs(_texts(window, vocabulary)) for word in [_lower("".join(run))] * len(run)]


def _texts(window: Window, vocabulary: Sequence[str]) -> list[str]:
    tokens = window.tokens.tolist()
    return [vocabulary[token] if 0 <= token < len(vocabulary) else f" <{token}> " for token in tokens]


def _runs(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts of the tokens of each word."""
    run: list[str] = list(texts[:1])
    for before, text in itertools.pairwise(texts):
        if not _joined(before[-1:], text[:1]):
            yield run
            run = []
        run.append(text)
    if run:
        yield run


_joined = functools.cache(same_word)


@functools.lru_cache(maxsize=2**16)
def _lower(word: str) -> str:
    """Spaces alone remain what they are."""
    return (word.strip(" ") or word).lower()

"""Which word a scored token belongs to, and which words an explanation was made from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.explain.protocols import PROTOCOLS
from cratescope.explain.shown import whole_word
from cratescope.neurons.records import Window
from cratescope.score.words import Reader, Words, known_windows, words_for
from test_sanity import graded

VOCABULARY = ("The", " the", " cat", "s", ",", " ", " Cat", "na", "\u0308", "ve", "\n", " don", "'", "t", "", "cats")
READER = Reader(VOCABULARY)


def window(*tokens: str | int) -> Window:
    ids = np.array([VOCABULARY.index(token) if isinstance(token, str) else token for token in tokens], dtype=np.int64)
    return Window(ids, np.zeros(len(ids)), 0, 0, 0)


def numbers(*windows: Window) -> list[int]:
    return Words.of(windows, (), READER).number.tolist()


def test_tokens_of_a_word_share_it_without_case_and_space() -> None:
    assert numbers(window("The", " cat", "s", ",", " the", " Cat", "s")) == [0, 1, 1, 2, 0, 1, 1]
    assert numbers(window(" cat", "s", " ", "cats", ",", " cat")) == [0, 0, 1, 0, 2, 3], "one token or two"
    assert numbers(window(" ", "\n", " don", "'", "t", "t")) == [0, 1, 2, 3, 4, 4]
    assert numbers(window(" ", "na", "\u0308", "ve", " ", "na", "ve")) == [0, 1, 1, 1, 0, 2, 2]
    assert numbers(window()) == numbers() == []


def test_an_id_the_tokenizer_does_not_have_is_a_word_of_its_own() -> None:
    assert numbers(window(" cat", 99, "s", -1, "", 99, " cat", "s")) == [0, 1, 2, 3, 4, 1, 5, 5]


def test_windows_are_joined_and_a_word_ends_with_its_window() -> None:
    assert numbers(window("The", " cat"), window("s", " the"), window(), window("s")) == [0, 1, 2, 0, 2]


def test_words_of_the_windows_explained_from_are_not_unseen() -> None:
    words = Words.of([window("The", " cat"), window("s", " the")], [window(" the", " cat", "s")], READER)
    assert words.number.tolist() == [0, 1, 2, 0]
    assert words.unseen.tolist() == [False, True, True, False], "the cut word is another one than the whole"
    empty = Words.of([], [window("The")], READER)
    assert empty.number.shape == empty.unseen.shape == (0,)
    assert Words.of([window("The")], [], READER).unseen.all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-2, len(VOCABULARY) + 1), max_size=9), max_size=4))
def test_words_are_those_that_an_explainer_is_shown(rows: list[list[int]]) -> None:
    """`whole_word` finds them one by one."""
    spelled = []
    for row in rows:
        texts = [VOCABULARY[token] if 0 <= token < len(VOCABULARY) else f" <{token}> " for token in row]
        words = [whole_word(texts, place) for place in range(len(row))]
        spelled += [(word.strip(" ") or word).lower() for word in words]
    places = {word: number for number, word in enumerate(dict.fromkeys(spelled))}
    assert numbers(*(window(*row) for row in rows)) == [places[word] for word in spelled]


@pytest.mark.parametrize("name", ["uniform", "random-only"])
def test_an_explanation_knows_the_words_of_its_explanation_set(name: str) -> None:
    rng, protocol = np.random.default_rng(0), PROTOCOLS[name]
    every = [Window(rng.integers(300, size=64), np.zeros(64), place, 0, 32) for place in range(60)]
    record = dataclasses.replace(graded(), top=tuple(every[:10]), random=tuple(every[10:]))
    shown = known_windows("offline", protocol, record)
    assert [found.excerpt for found in shown] == [0, 2, 4, 6, 8]
    words = words_for("offline", Reader([f" w{number}" for number in range(300)]))(protocol, record)
    known = {token for found in shown for token in found.tokens.tolist()}
    tokens = np.concatenate([found.tokens for found in protocol.windows(record)])
    assert words.unseen.tolist() == [token not in known for token in tokens.tolist()]
    assert 0 < words.unseen.mean() < 1


def test_an_explanation_from_further_windows_knows_the_words_of_these() -> None:
    every = [Window(np.arange(64), np.zeros(64), place, 0, 32) for place in range(60)]
    record = dataclasses.replace(graded(), top=tuple(every))
    shown = known_windows("offline_windows2", PROTOCOLS["uniform"], record, turns={2})
    assert [found.excerpt for found in shown] == [15, 16, 17, 18, 19]
    among = known_windows("selected", PROTOCOLS["uniform"], record, turns={0, 1})
    assert {0, 2, 4, 6, 8, 10, 11, 12, 13, 14} <= {found.excerpt for found in among}

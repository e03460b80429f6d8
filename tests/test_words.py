"""Which word a scored token belongs to."""

from __future__ import annotations

import numpy as np

from cratescope.neurons.records import Window
from cratescope.score.words import Words, words_of

VOCABULARY = ("The", " the", " cat", "s", ",", " ", " Cat", "na", "\u0308", "ve", "\n", " don", "'", "t", "")


def window(*tokens: str | int) -> Window:
    ids = np.array([VOCABULARY.index(token) if isinstance(token, str) else token for token in tokens])
    return Window(ids, np.zeros(len(ids)), 0, 0, 0)


def test_tokens_of_a_word_share_it_without_case_and_space() -> None:
    assert words_of(window("The", " cat", "s", ",", " the", " Cat", "s"), VOCABULARY) == [
        *("the", "cats", "cats", ",", "the", "cats", "cats"),
    ]
    assert words_of(window(" ", "\n", " don", "'", "t"), VOCABULARY) == [" ", "\n", "don", "'", "t"]
    assert words_of(window(" ", "na", "\u0308", "ve"), VOCABULARY) == [" ", *["na\u0308ve"] * 3]
    assert words_of(window(), VOCABULARY) == []


def test_an_id_the_tokenizer_does_not_have_is_a_word_of_its_own() -> None:
    found = words_of(window(" cat", 99, "s", -1, ""), VOCABULARY)
    assert found == ["cat", "<99>", "s", "<-1>", ""]


def test_windows_are_joined_and_a_word_ends_with_its_window() -> None:
    words = Words.of([window("The", " cat"), window("s", " the")], {"the"}, VOCABULARY)
    assert words.number.tolist() == [0, 1, 2, 0]
    assert words.unseen.tolist() == [False, True, True, False]
    empty = Words.of([], {"the"}, VOCABULARY)
    assert empty.number.shape == empty.unseen.shape == (0,)
    assert not Words.of([window("The")], words_of(window(" the"), VOCABULARY), VOCABULARY).unseen.any()

"""The prompts in full, and how tokens and activations are shown in them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.neurons import prompts
from cratescope.neurons.llm.scripted import ScriptedLLM

EXPLAIN_GOLDEN = """\
Words: bread, cheese, soup, apples, dinner
The detector finds: words about food

Words: of
The detector finds: the word "of"

Words: (, )
The detector finds: brackets

Words: rain, storm, cloudy, wind
The detector finds: words about the weather

Words: London, Chicago, Tokyo, Rome, Vienna
The detector finds: names of cities

Words: but, But
The detector finds: the word "but"

Words: .
The detector finds: full stops

Words: walked, ran, moved, goes, climbing
The detector finds: verbs of motion

Words: 40, 7, three, 250
The detector finds: numbers

Words: doctor, hospital, disease, patients
The detector finds: words about health

Words: -, --
The detector finds: dashes

Words: Google, Ford, Microsoft, Sony
The detector finds: names of companies

Words: with
The detector finds: the word "with"

Words: large, small, huge, little, largest
The detector finds: words about size

Words: dog, horses
The detector finds:"""

LIST_GOLDEN = """\
The detector finds: words about food
Words: bread, cheese, soup, apples, dinner, rice

The detector finds: the word "of"
Words: of, of, of, of

The detector finds: words about the weather
Words: rain, storm, cloudy, sunshine, wind, snow

The detector finds: punctuation at the end of a sentence
Words: ., !, ., ?, .

The detector finds: names of cities
Words: London, Chicago, Tokyo, Rome, Vienna, Lima

The detector finds: verbs in the past tense
Words: went, walked, took, opened, fell, built

The detector finds: numbers
Words: 7, 40, three, 250, 12, hundred

The detector finds: endings of words
Words: ing, ed, tion, ly, ness, er

The detector finds: words about animals
Words:"""

SLOTS_GOLDEN = """\
A detector reads a text one token after another. Behind every token stands how strongly it fires, from 0 (not at all) \
to 10 (as strongly as it ever does). Most tokens are not what it looks for and get 0.

The detector finds: words about food
Tokens:
The\tunknown
 cook\tunknown
 left\tunknown
 early\tunknown
,\t0
 so\t0
 she\t0
 ate\t7
 cold\t0
 soup\t10
 with\t0
 bread\t9
.\t0

The detector finds: the word "of"
Tokens:
One\tunknown
 of\tunknown
 them\tunknown
 saw\t0
 the\t0
 end\t0
 of\t10
 a\t0
 road\t0
 made\t0
 of\t10
 stone\t0

The detector finds: names of cities
Tokens:
Trains\tunknown
 from\tunknown
 Vienna\tunknown
 to\tunknown
 Rome\tunknown
 stop\t0
 in\t0
 the\t0
 mountains\t0
 near\t0
 Geneva\t10
\\n\t0

The detector finds: words about animals
Tokens:
A\tunknown
 dog\tunknown
\\n\tunknown
\\t\tunknown
"""


def test_the_explainers_prompt_in_full() -> None:
    assert prompts.explain_prefix() + prompts.explain_prompt(["dog", "horses"]) == EXPLAIN_GOLDEN


def test_the_list_prompt_in_full() -> None:
    assert prompts.list_prefix() + prompts.list_prompt("words about animals") == LIST_GOLDEN


def test_the_all_at_once_prompt_in_full() -> None:
    llm = ScriptedLLM()
    prefix = prompts.slots_prefix(llm, 10)
    prompt = prompts.slot_prompt(llm, "words about animals", ["A", " dog", "\n", "\t"])
    assert llm.decode(prefix + prompt.ids) == SLOTS_GOLDEN


def test_the_examples_stay_on_a_scale_of_nine() -> None:
    llm = ScriptedLLM()
    text = llm.decode(prompts.slots_prefix(llm, 9))
    assert "10" not in text and " soup\t9\n" in text


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=6), max_size=20))
def test_every_slot_stands_behind_its_own_token(tokens: list[str]) -> None:
    llm = ScriptedLLM()
    prompt = prompts.slot_prompt(llm, "anything", tokens)
    lines = llm.decode(prompt.ids).split("\n")[2:-1]
    assert len(lines) == len(prompt.slots) == len(tokens)
    for token, slot in zip(tokens, prompt.slots, strict=True):
        assert llm.decode(prompt.ids[:slot]).endswith(f"{prompts.display(token)}\t")
        assert llm.decode(prompt.ids[slot:]).startswith("unknown\n")


def test_digits_go_to_ten_only_where_ten_is_one_token() -> None:
    class Splitting(ScriptedLLM):
        def encode(self, text: str) -> list[int]:
            return [index for character in text for index in super(Splitting, self).encode(character)]

    assert len(prompts.digit_choices(ScriptedLLM())) == 11
    assert len(prompts.digit_choices(Splitting())) == 10


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e6))
def test_levels_are_whole_numbers_from_zero_to_ten_that_keep_the_order(values: list[float], maximum: float) -> None:
    activations = np.sort(np.array(values, dtype=np.float32))
    found = prompts.levels(activations, maximum)
    assert found.min() >= 0 and found.max() <= 10
    assert (np.diff(found) >= 0).all()


def test_levels_are_the_papers_floor() -> None:
    activations = np.array([-1.0, 0.0, 0.99, 1.0, 9.9, 10.0, 12.0], dtype=np.float32)
    assert prompts.levels(activations, 10.0).tolist() == [0, 0, 0, 1, 9, 10, 10]
    assert prompts.levels(activations, 0.0).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("place", "word"), [(0, "play"), (1, " playing"), (2, " playing"), (3, ","), (4, " 1932"), (5, " 1932"), (6, ".")]
)
def test_a_piece_is_completed_to_its_word(place: int, word: str) -> None:
    assert prompts.whole_word(["play", " play", "ing", ",", " 19", "32", "."], place) == word


def test_the_strongest_words_come_first_and_once() -> None:
    first = (["The", " cat", " and", " the", " dogs", "\n"], np.array([3, 9, 0, 4, 10, 5]))
    second = ([" Cat", " h", "um", "\N{REPLACEMENT CHARACTER}", " "], np.array([10, 4, 6, 10, 10]))
    assert prompts.strongest_words([first, second]) == ["dogs", "Cat", "hum", "\\n", "the"]


def test_no_more_words_than_the_prompt_has_room_for() -> None:
    tokens = [f" w{number}" for number in range(30)]
    assert len(prompts.strongest_words([(tokens, np.full(30, 10))])) == prompts.MAX_WORDS


@pytest.mark.parametrize(
    ("token", "item"),
    [
        (" dog", " dog"),
        ("Dog", " Dog"),
        ("ing", " ing"),
        (",", " ,"),
        ("\n", None),
        (" ", None),
        ("a\ufffd", None),
        ("", None),
    ],
)
def test_a_token_as_an_item_of_the_list(token: str, item: str | None) -> None:
    assert prompts.list_item(token) == item


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" words about food\n\nWords: x", "words about food"),
        ('"names of cities."', "names of cities"),
        ("'s", "'s"),
        (' the word "of" ', 'the word "of"'),
        ("\n \n", ""),
        ('""', ""),
        (".", "."),
    ],
)
def test_an_answer_is_cleaned_to_one_phrase(answer: str, text: str) -> None:
    assert prompts.clean_answer(answer) == text

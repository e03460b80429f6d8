"""The values of terms on tokens: against plain loops over words, for every kind of tokenizer."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain.terms.features import Features, Lexicon
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.phrases import Term, What, Where, read
from cratescope.explain.terms.predict import TermsSimulator
from cratescope.explain.terms.texts import Texts, Vocabulary, together
from cratescope.neurons.records import Window
from cratescope.text.tokenizer import encode, vocabulary_strings
from token_kinds import KINDS

LEXICON = Lexicon(load_language())
PIECES = (
    ' the| of| cat| sat|ting|ing| cook|ed|.|,|\n| (|)| "|"| “|”|[|]|  |    | 1995|12|7| A|The|<|endoftext|>'
    "|<@endoftext@>|\n\n|é|漢|字||\ufffd|—"
)
STRINGS = [piece.replace("@", "|") for piece in PIECES.split("|")]


def window(tokens, start=1):
    return Window(np.array(tokens, dtype=np.int64), np.zeros(len(tokens), np.float32), 0, start, 0)


def windows_of(pieces, start=1):
    """A vocabulary of the different pieces, and a window of them."""
    known = list(dict.fromkeys([*pieces, " word"]))
    return Vocabulary.of(known), window([known.index(piece) for piece in pieces], start)


def values(phrase, pieces, start=1):
    vocabulary, one = windows_of(pieces, start)
    (term,) = read(f"{phrase} (+1)", LEXICON.language)
    return Features(Texts.of([one], vocabulary), LEXICON).value(term).tolist()


@pytest.mark.parametrize(
    ("phrase", "pieces", "expected"),
    [
        ("articles", [" the", " cat", " An"], [1, 0, 1]),
        ('the word "cooking"', [" Cook", "ing", " cook"], [1, 1, 0]),
        ('the piece "ing"', [" cook", "ing", " ing"], [0, 1, 0]),
        ('words that end in "ing"', [" sing", " bring", "ing", " go", "ing"], [0, 1, 1, 1, 1]),
        ("the rest of a word", [" un", "a", "ble", " x", "."], [0, 1, 1, 0, 0]),
        ("after commas", [" a", ",", " ", " un", "able", " x"], [0, 0, 1, 1, 1, 0]),
        ("two words after articles", [" the", " old", " cat", " sat"], [0, 0, 1, 0]),
        ('after the word "the"', [" The", " cat"], [0, 1]),
        ("among articles", [" the", " a", " x", " x", " x"], [0, 0.25, 0.5, 0.5, 0.5]),
        ("at the start of a line", [" x", "\n", "  ", " y", " z"], [0, 0, 1, 1, 0]),
        ("at the start of a sentence", [" x", ".", " Y", "es", " z"], [0, 0, 1, 1, 0]),
        ("inside brackets", [" a", " (", " b", "(", " c", ")", " d", ")", " e"], [0, 0, 1, 0, 1, 0, 1, 0, 0]),
        ("inside brackets", [")", " a", " (", " b"], [0, 0, 0, 1]),
        ("inside brackets", [" (", " a", "\n\n", " b"], [0, 1, 0, 0]),
        ("inside quotation marks", [' "', "a", '"', " b", ' "', " c", "\n", " d"], [0, 1, 0, 0, 0, 1, 0, 0]),
        ("inside quotation marks", [" “", "a", "”", " b"], [0, 1, 0, 0]),
        ("seen before in the text", [" Went", " x", " went", " x"], [0, 0, 1, 0]),
        ("numbers after commas", [",", " 12", " 12"], [0, 1, 0]),
        ("at the beginning of a text", [" x", " y"], [0, 0]),
        ("at the beginning of a text", ["<|endoftext|>", " a"], [0, 1]),
    ],
)
def test_a_term_is_true_where_one_would_say_so(phrase, pieces, expected):
    assert values(phrase, pieces) == expected


def test_the_beginning_of_a_text_fades_from_where_the_model_began_to_read():
    found = values("at the beginning of a text", [f" {letter}" for letter in "abcdefgh"], start=0)
    assert found[0] == 1 and found[6] == pytest.approx(0.5)
    assert all(left > right for left, right in zip(found, found[1:], strict=False))


# Plain loops.


def words_of(strings):
    """[(text, first token, one past the last)] of a window."""
    found = []
    for place, piece in enumerate(strings):
        before = strings[place - 1] if place else ""
        if place and together((before or " ")[-1], (piece or " ")[0]):
            found[-1][1] = place + 1
        else:
            found.append([place, place + 1])
    return [(("".join(strings[a:b]).strip(" ") or "".join(strings[a:b])), a, b) for a, b in found]


def slowly(strings, term):
    words = words_of(strings)
    filled = [word for word in words if word[0].strip(" \t\u00a0")]
    out = np.zeros(len(strings))
    for text, a, b in words:
        before = [word for word in filled if word[1] < a]
        value = 1.0
        if term.what:
            value *= is_it(text, term.what)
        if term.where and term.where.place in ("after", "two words after"):
            back = 1 if term.where.place == "after" else 2
            value *= is_it(before[-back][0], term.where.other) if len(before) >= back else 0
        if term.where and term.where.place == "among":
            near = before[-24:]
            value *= sum(is_it(word[0], term.where.other) for word in near) / max(len(near), 4)
        if term.where and term.where.place == "seen before in the text":
            seen = [word[0].lower() for word in words if word[1] < a]
            value *= len(text) >= 4 and text.isalpha() and text.lower() in seen
        if term.where and term.where.place == "inside brackets":
            value *= np.array([bracketed(strings, words, place) for place in range(a, b)])
        out[a:b] = value
    return out


def bracketed(strings, words, place):
    depth = 0
    for text, a, b in words:
        if "\n\n" in text and a <= place:
            depth = 0
        for token in range(a, min(b, place)):
            depth = max(depth + sum((c in "([{") - (c in ")]}") for c in strings[token]), 0)
    return float(depth > 0 and not any(c in "()[]{}" for c in strings[place]))


def is_it(text, what):
    if what.kind == "class":
        return float(what.text in LEXICON.language.classes_of(text))
    if what.kind == "word":
        return float(text.lower() == what.text)
    return float(text.isalpha() and text.lower().endswith(what.text) and len(text) >= len(what.text) + 2)


some_windows = st.lists(st.lists(st.integers(0, len(STRINGS) + 1), min_size=1, max_size=40), min_size=1, max_size=4)
TERMS = [
    Term(what, where, 1)
    for what in (
        None,
        What("class", "articles"),
        What("word", "the"),
        What("ending", "ing"),
        What("class", "punctuation"),
    )
    for where in (
        None,
        Where("after", What("class", "articles")),
        Where("two words after", What("word", "cat")),
        Where("among", What("class", "punctuation")),
        Where("seen before in the text"),
        Where("inside brackets"),
    )
    if what or where
]


@given(some_windows)
@settings(max_examples=60, deadline=None)
def test_values_equal_plain_loops_and_windows_do_not_mind_each_other(ids):
    vocabulary = Vocabulary.of(STRINGS)
    together_ = Features(Texts.of([window(one) for one in ids], vocabulary), LEXICON)
    strings = [[STRINGS[token] if token < len(STRINGS) else "" for token in one] for one in ids]
    for term in TERMS:
        expected = np.concatenate([slowly(one, term) for one in strings])
        np.testing.assert_array_equal(together_.value(term), expected, err_msg=term.phrase)


@given(some_windows, st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_the_fit_sees_of_a_term_is_what_its_phrase_predicts(ids, named_only):
    vocabulary = Vocabulary.of(STRINGS)
    features = Features(Texts.of([window(one, start=place % 2) for place, one in enumerate(ids)], vocabulary), LEXICON)
    chance = random.Random(len(ids))
    for block in features.blocks(named_only):
        for column in chance.sample(range(len(block.terms)), min(12, len(block.terms))):
            (term,) = read(str(Term(*block.terms[column], 1)), LEXICON.language)
            np.testing.assert_array_equal(block.values([column])[:, 0], features.value(term), err_msg=term.phrase)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("characters")])
def test_words_are_found_whatever_the_tokenizer(kind):
    tokenizer = KINDS[kind][0]()
    (ids,) = encode(tokenizer, ["our baker sold three apples. the court found bread. salt returned rome."])
    texts = Texts.of([window(ids)], Vocabulary.of(vocabulary_strings(tokenizer)))
    words = [texts.distinct[place] for place in texts.spelling]
    found = [word.strip(".") for word in words if word.strip("., ")]
    assert " ".join(found) == "our baker sold three apples the court found bread salt returned rome"


def test_characters_of_scripts_without_spaces_are_words_of_their_own():
    vocabulary, one = windows_of([" 漢", "字", " é", "t", "é"])
    texts = Texts.of([one], vocabulary)
    assert [texts.distinct[place] for place in texts.spelling] == ["漢", "字", "été"]


def test_what_is_one_word_to_the_lists_of_a_language_model_is_one_to_terms_with_marks_joiners_and_colours():
    vocabulary, one = windows_of([" ก", "ิ", " 👩", "\u200d", "💻", " 👍", "\U0001f3fd", " x"])
    texts = Texts.of([one], vocabulary)
    assert [texts.distinct[place] for place in texts.spelling] == ["กิ", "👩\u200d💻", "👍\U0001f3fd", "x"]


@pytest.mark.parametrize("strings", [[], ["", ""], [".", ",", "\n"], ["<0x00>"[:1]] * 500 + ["a"]])
def test_a_tokenizer_without_words_is_refused_in_one_line(strings):
    with pytest.raises(UserError, match="tokenizer: ") as caught:
        Vocabulary.of(strings)
    assert "\n" not in str(caught.value)


def test_no_windows_and_empty_windows_have_no_values():
    simulator = TermsSimulator(Vocabulary.of(STRINGS), LEXICON)
    text = "numbers after commas (+10), inside quotation marks (+1), at the beginning of a text (+1), among words (+1)"
    text += ', seen before in the text (+3), at the start of a line (+1), the rest of a word (+2), the piece "ing" (+2)'
    assert simulator(text, []) == []
    assert [len(one) for one in simulator(text, [window([]), window([1, 2]), window([])])] == [0, 2, 0]


def test_the_simulator_reads_tokens_and_nothing_else_of_a_window():
    simulator = TermsSimulator(Vocabulary.of(STRINGS), LEXICON)
    tokens = np.arange(len(STRINGS))
    text = "articles (+10), after articles (-3), among punctuation (+7)"
    quiet = simulator(text, [Window(tokens, np.zeros(len(tokens), np.float32), 3, 5, 1)])
    loud = simulator(text, [Window(tokens, np.arange(len(tokens), dtype=np.float32), 8, 9, 2)])
    np.testing.assert_array_equal(quiet[0], loud[0])
    assert quiet[0].any()

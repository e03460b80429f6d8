"""Explanations by terms as texts: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cratescope.explain.terms.language import Among, Back, load_language
from cratescope.explain.terms.phrases import Term, Unreadable, What, Where, read, written

LANGUAGE = load_language()
named = st.sampled_from(LANGUAGE.classes).map(lambda name: What("class", name))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        '"',
        "\\",
        "\n",
        "\u2028",
        "a, b (+3)",
        '", the word "',
        "(",
        ")",
        "漢",
        "\U0001f44d\U0001f3fd",
        " ",
        "after",
        "(+10)",
    ]
)
quoted = st.builds(What, st.sampled_from(["word", "ending", "beginning"]), texts)
pieces = st.builds(What, st.just("piece"), texts)
FREE = [phrase for phrase, place in LANGUAGE.places.items() if not isinstance(place, Back | Among)]
NEAR = [phrase for phrase, place in LANGUAGE.places.items() if isinstance(place, Back | Among)]
wheres = st.sampled_from(FREE).map(Where) | st.builds(Where, st.sampled_from(NEAR), named | quoted)
weights = st.integers(1, 10) | st.integers(-10, -1)
terms = (
    st.builds(Term, named | quoted | pieces, st.none(), weights)
    | st.builds(Term, st.none(), wheres, weights)
    | st.builds(Term, named | quoted | pieces, wheres.filter(lambda where: where.place in LANGUAGE.joints), weights)
)


@settings(deadline=None)
@given(st.lists(terms, min_size=1, max_size=6).map(tuple))
@example((Term(What("word", 'the word "x" (+3), '), Where("after", What("word", '"')), -10),))
def test_every_explanation_is_read_back_as_it_was_written(explanation):
    text = written(explanation)
    assert read(text, LANGUAGE) == explanation
    assert text.isprintable()


def test_an_explanation_reads_like_a_list():
    explanation = (
        Term(What("class", "numbers"), None, 10),
        Term(What("word", ","), Where("after", What("word", "of")), 5),
        Term(None, Where("inside brackets"), -4),
    )
    assert written(explanation) == 'numbers (+10), the sign "," after the word "of" (+5), inside brackets (-4)'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "numbers",
        "numbers (10",
        "numbers (+0)",
        "numbers (+11)",
        "numbers (+99999999999999999999)",
        "numbers (+10),",
        "numbers (+10) brackets (+3)",
        "unicorns (+10)",
        "numbers beside commas (+3)",
        "after (+3)",
        "numbers after (+3)",
        'after the piece "x" (+3)',
        "inside brackets numbers (+2)",
        "numbers after commas after commas (+2)",
        "numbers the rest of a word (+2)",
        'the word "" (+1)',
        'the word "x (+1)',
        r'the word "\q" (+1)',
        "(+1)",
        "words about dogs and cats",
        "numbers (+10)\x00",
    ],
)
def test_what_is_no_explanation_has_a_reason_of_one_line_and_no_exception(text):
    found = read(text, LANGUAGE)
    assert isinstance(found, Unreadable)
    assert found.reason.isprintable()


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_has_a_reason(text):
    found = read(text, LANGUAGE)
    assert isinstance(found, Unreadable) or written(found)


def test_an_explanation_written_by_hand_need_not_be_spaced_or_signed_like_ours():
    assert read(" numbers(10) ,commas (−3)", LANGUAGE) == read("numbers (+10), commas (-3)", LANGUAGE)


def test_a_long_text_of_open_quotation_marks_is_refused_at_once():
    assert isinstance(read('the word "' * 20_000, LANGUAGE), Unreadable)
    assert isinstance(read("numbers " * 20_000, LANGUAGE), Unreadable)

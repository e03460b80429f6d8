"""What phrases say to the letter and of places, and what follows for values: by program, without a language model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain.controls import EMPTY_EXPLANATION
from cratescope.explain.explain import explain
from cratescope.explain.simulate import simulate
from cratescope.explain.simulators import readings
from cratescope.explain.simulators.list_in_context import ListInContext
from cratescope.explain.simulators.list_pmi import MOST, ListPMI
from cratescope.explain.simulators.reader import Reader
from cratescope.explain.simulators.readings import Listed, Literal, Placed, lists, read
from cratescope.explain.terms.features import Features, Lexicon
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.phrases import What
from cratescope.explain.terms.texts import Texts, Vocabulary
from cratescope.files import read_json, write_json
from cratescope.neurons.records import Window
from scripted import ScriptedLLM
from test_explain import first_word, make_run, settings_for
from test_simulate import config_for, knowing

LEXICON = Lexicon(load_language())
LANGUAGE = LEXICON.language
WORDS = Literal(tuple(What("class", name) for name in readings.WORDS))


def word(*texts):
    return Literal(tuple(What("word", text) for text in texts))


def ending(*texts):
    return Literal(tuple(What("ending", text) for text in texts))


def beginning(*texts):
    return Literal(tuple(What("beginning", text) for text in texts))


def alike(*names):
    return Literal(tuple(What("class", name) for name in names))


@pytest.mark.parametrize(
    ("phrase", "reading"),
    [
        ('the word "of"', word("of")),
        ("The word 'Of'.", word("of")),
        ('the words "he," "she," and "they"', word("he", "she", "they")),
        ("references to numbers", alike("numbers")),
        ('all occurrences of the word "of"', word("of")),
        ("“of” and “the”", word("of", "the")),
        ('the words "a", "an", and "the"', word("a", "an", "the")),
        ("the contraction word 'don't'", word("don't")),
        ('the phrase "such  as"', word("such as")),
        ('the sign "("', word("(")),
        ('the token "\'s"', word("'s")),
        ("commas", alike("commas")),
        ("a full stop", alike("full stops")),
        ("Periods", alike("full stops")),
        ("the comma and the dash", alike("commas", "dashes")),
        ("question and exclamation marks", alike("question and exclamation marks")),
        ("question marks", word("?")),
        ("brackets or quotation marks", alike("brackets", "quotation marks")),
        ('commas, colons and the word "and"', Literal((What("class", "commas"), *word(":", "and").whats))),
        ("square brackets", word("[", "]")),
        ("numbers", alike("numbers")),
        ("capitalized words", alike("capitalised words")),
        ("single letters", alike("single letters")),
        ('words that end in "ing"', ending("ing")),
        ("words ending with -ing or -ed", ending("ing", "ed")),
        ("verbs which end in 'ing', 'ed' and 's'", ending("ing", "ed", "s")),
        ('the suffix "-tion"', ending("tion")),
        ('"-ly"', ending("ly")),
        ("words that begin with the letter b", beginning("b")),
        ("words starting with un-", beginning("un")),
        ('the prefixes "un" and "re-"', Literal((What("beginning", "un"), What("beginning", "re")))),
    ],
)
def test_what_is_literal_is_read(phrase, reading):
    assert read(phrase, LANGUAGE) == reading
    assert lists(reading) == ()


@pytest.mark.parametrize(
    ("phrase", "reading"),
    [
        ('the word after "of"', Placed(WORDS, "after", word("of"))),
        ('the first word after "of"', Placed(WORDS, "after", word("of"))),
        ('what comes right after "part of"', Placed(None, "after", word("part of"))),
        ('after the word "of"', Placed(None, "after", word("of"))),
        ("numbers following commas", Placed(alike("numbers"), "after", alike("commas"))),
        ("the word after each comma", Placed(WORDS, "after", alike("commas"))),
        ("commas that follow a number", Placed(alike("commas"), "after", alike("numbers"))),
        ("nouns preceded by adjectives", Placed(Listed("nouns"), "after", Listed("adjectives"))),
        ("a number before a unit", Placed(alike("numbers"), "before", Listed("a unit"))),
        ('commas followed by "and"', Placed(alike("commas"), "before", word("and"))),
        ("numbers two words after commas", Placed(alike("numbers"), "two words after", alike("commas"))),
        ("numbers among brackets", Placed(alike("numbers"), "among", alike("brackets"))),
        ("the word after a colour", Placed(WORDS, "after", Listed("a colour"))),
        ("names seen before in the text", Placed(Listed("names"), "seen before in the text")),
        ("the rest of a word", Placed(None, "the rest of a word")),
        ("words inside brackets", Placed(WORDS, "inside brackets")),
        ("dates in parentheses", Placed(Listed("dates"), "inside brackets")),
        ("text within double quotes", Placed(None, "inside quotation marks")),
        ("names between quotation marks", Placed(Listed("names"), "inside quotation marks")),
        ("the first word of a sentence", Placed(WORDS, "at the start of a sentence")),
        ("first words of new lines", Placed(WORDS, "at the start of a line")),
        ("articles at the very beginning of sentences", Placed(Listed("articles"), "at the start of a sentence")),
        ("a dash at the start of a line", Placed(alike("dashes"), "at the start of a line")),
        ("names that appear at the beginning of a text", Placed(Listed("names"), "at the beginning of a text")),
        (
            "numbers after a comma inside brackets",
            Placed(alike("numbers"), "after", Placed(alike("commas"), "inside brackets")),
        ),
        ('a verb after the word "after"', Placed(Listed("a verb"), "after", word("after"))),
        ('the word "is", when it comes after "this"', Placed(word("is"), "after", word("this"))),
        ('the word "is" where preceded by "this"', Placed(word("is"), "after", word("this"))),
        ("names only before commas", Placed(Listed("names"), "before", alike("commas"))),
        ('"quoted after" before "of"', Placed(word("quoted after"), "before", word("of"))),
        ('cities named "x" before nouns', Placed(Listed('cities named "x"'), "before", Listed("nouns"))),
    ],
)
def test_a_place_is_read(phrase, reading):
    assert read(phrase, LANGUAGE) == reading


OUT = [
    EMPTY_EXPLANATION,
    "",
    " ",
    ".",
    '"',
    "words about food",
    "words about food, such as onion and garlic",
    'words about food, such as "onion"',
    'synonyms of the word "big"',
    'forms of verb "be"',
    'words without letter "e"',
    'words containing letter "e"',
    'no words that end in "ing"',
    'words not after "of"',
    "words that are not followed by a comma",
    "words that aren't followed by a comma",
    'words that never come after "of"',
    "names outside and not inside brackets",
    'names, especially after "Mr."',
    'names, often preceded by "Mr."',
    'every word except after "of"',
    'nouns not "of"',
    'words other than "the"',
    'the word "the" and other articles',
    "numbers written as words",
    "years, such as 1995",
    "names of brackets",
    "of",
    "after",
    "words after",
    "after and before",
    "adverbs such as before and after",
    "words like after",
    "words for before and after",
    "events after the war",
    "words about events after the war",
    "names of people who came before us",
    "the following",
    "the following words",
    "verbs used in the following",
    "words among the most common",
    "one after another",
    "day after day",
    "words that come after each other",
    "words of after all",
    "words that end in tears",
    "sentences that begin with a joke",
    "words inside a house",
    "words in angle brackets",
    "the second word of a name",
    'the word "of',
    '"" and ""',
    "das Wort „",
    "слова после запятой",
    "名詞の後の言葉",
    "x" * 1000,
    'the word after "of" ' * 20,
]


@pytest.mark.parametrize("phrase", OUT)
def test_what_is_neither_is_left_to_the_language_model_as_it_stands(phrase):
    assert read(phrase, LANGUAGE) == Listed(phrase)


def values(reading, pieces, listed=None, start=1):
    """The values of a phrase (or reading) on the tokens of one window."""
    known = list(dict.fromkeys(pieces))
    window = Window(np.array([known.index(piece) for piece in pieces]), np.zeros(len(pieces), np.float32), 0, start, 0)
    features = Features(Texts.of([window], Vocabulary((*known, ""))), LEXICON)
    reading = read(reading, LANGUAGE) if isinstance(reading, str) else reading
    return Reader(features, lambda phrase: np.array((listed or {})[phrase], dtype=float), 1.0)(reading).tolist()


@pytest.mark.parametrize(
    ("phrase", "pieces", "expected"),
    [
        ('the word "of"', [" of", " off", "Of", " o", "f", ","], [1, 0, 0, 1, 1, 0]),
        ('the word "don\'t"', [" don", "'t", " do"], [1, 1, 0]),
        ('the phrase "such as"', [" such", " as", " as", " such", "\n", "As"], [1, 1, 0, 1, 1, 1]),
        ('the word "été"', [" É", "té", " t"], [1, 1, 0]),
        ('the sign "("', [" (", "((", ")", "x"], [1, 1, 0, 0]),
        ("commas", [" a", ",", '",', " ,'", "."], [0, 1, 1, 1, 0]),
        ("brackets", [' ("', "x", ")"], [1, 0, 1]),
        ("apostrophes", [" it", "'s", " x"], [0, 1, 0]),
        ("equals signs", [" ==", " =", "=>", "-"], [1, 1, 1, 0]),
        ("punctuation", [" .", "'s", " x"], [1, 0, 0]),
        ("line breaks", ["\n", " x", " "], [1, 0, 0]),
        ('words that end in "ing"', [" s", "ing", " ing", " bring", " inge", "-ing"], [1, 1, 0, 1, 0, 0]),
        ("words that begin with the letter b", [" Be", " b", " ab", " b", "ad"], [1, 0, 0, 1, 1]),
        ("words starting with un-", [" un", "do", " under", " un", ","], [1, 1, 1, 0, 0]),
        ('the word after "of"', [" of", " the", " of", " 12", " of", ",", " x"], [0, 1, 0, 1, 0, 0, 0]),
        ('after "of"', [" of", ",", " x"], [0, 1, 0]),
        ('the word after "part of"', [" part", " of", " it", " of", " x"], [0, 0, 1, 0, 0]),
        ('the word before "part of"', [" a", " part", " of", " of"], [1, 0, 0, 0]),
        ('a comma before the word "and"', [",", " and", ",", " ", " and", ",", " x"], [1, 0, 1, 0, 0, 0, 0]),
        ("the word before a line break", [" un", "do", "\n", " x"], [1, 1, 0, 0]),
        ("words inside brackets", [" a", " (", " b", ",", " c", ")", " d"], [0, 0, 1, 0, 1, 0, 0]),
        ("inside brackets", [" a", " (", " b", ",", " c", ")", " d"], [0, 0, 1, 1, 1, 0, 0]),
        ("the first word of a sentence", [" x", ".", " Y", "es", " z"], [0, 0, 1, 1, 0]),
        ("the first word of a sentence", ["?", "\n", " ", "\n", " Y", "es", "\n", " z"], [0, 0, 0, 0, 1, 1, 0, 0]),
        ("at the start of a sentence", [".", ".", " Y"], [0, 1, 1]),
        ("the first word of a line", ["\n", "  ", " y", "\n", "-", " z"], [0, 0, 1, 0, 0, 0]),
        ("numbers among commas", [" 1", ",", " 1", ",", " 1"], [0, 0, 0.25, 0, 0.5]),
        ('numbers two words after "of"', [" of", " x", " 1", " 1"], [0, 0, 1, 0]),
    ],
)
def test_tokens_have_the_values_that_one_would_give_them(phrase, pieces, expected):
    pieces = [" Of" if piece == "Of" else piece for piece in pieces]
    expected = [1 if piece == " Of" else value for piece, value in zip(pieces, expected, strict=True)]
    assert values(phrase, pieces) == expected


def test_a_list_counts_only_at_its_place_and_the_other_one_says_yes_or_no():
    pieces = [" to", " go", " run", " may", " go"]
    listed = {"a verb": [0, 0.6, 0.4, 0, 0.6], "a modal verb": [0, 0, 0, 0.5, 0]}
    assert values('a verb after "to"', pieces, listed) == [0, 0.6, 0, 0, 0]
    assert values("a verb after a modal verb", pieces, listed) == [0, 0, 0, 0, 0.6]
    assert values('the word "go" before a modal verb', [" go", " may"], {"a modal verb": [0, 0.5]}) == [1, 0]


def test_a_list_without_an_answer_is_not_taken_for_a_no():
    listed = {"a verb": [0, np.nan], "a modal verb": [np.nan, 0]}
    assert np.isnan(values('a verb after "to"', [" to", " go"], listed)[1])
    assert np.isnan(values('the word "go" after a modal verb', [" to", " go"], listed)[1])


def test_a_place_does_not_reach_into_the_next_window():
    known = [" of", " x", ","]
    ids = [[0], [1, 0], [1], []]
    windows = [Window(np.array(one, dtype=np.int64), np.zeros(len(one), np.float32), 0, 1, 0) for one in ids]
    reader = Reader(Features(Texts.of(windows, Vocabulary((*known, ""))), LEXICON), lambda phrase: np.zeros(4), 1.0)
    assert not reader(read('the word after "of"', LANGUAGE)).any()
    assert not reader(read('the word before "of x"', LANGUAGE)).any()
    assert not reader(read('the phrase "of x"', LANGUAGE)).any()
    assert reader(read('the word before "of"', LANGUAGE)).tolist() == [0, 1, 0, 0]


# list-pmi and list-in-context.

PIECES = [" the", " of", " dog", "s", ",", ".", "\n", " (", ")", ' "', " 12", " ", "", "\ufffd", " run", "ning", " 漢"]


def opened(kind, texts, vocabulary=PIECES):
    """A simulator whose model lists dogs for what has "dog" in it, and nothing in particular for the rest."""
    llm = ScriptedLLM(logit=lambda prompt, token: 9.0 * ("dog" in prompt.split("\n")[0] and token == " dogs"))
    llm.encode(" dogs")
    simulator = kind(llm, vocabulary, 3)
    llm.asked.clear()
    simulator.plan([*texts, EMPTY_EXPLANATION])
    return simulator, llm


def window_of(ids, start=1):
    return Window(np.array(ids, dtype=np.int64), np.zeros(len(ids), np.float32), 0, start, 0)


def test_what_is_literal_is_not_asked_of_the_model_and_has_the_most_that_a_list_can_say():
    texts = ['the word "of"', "dogs"]
    simulator, llm = opened(ListPMI, texts)
    (values,) = simulator(texts[0], [window_of([0, 1, 2, 3])])
    assert values.tolist() == [0, MOST, 0, 0] and not llm.asked
    (values,) = simulator("dogs", [window_of([0, 1, 2, 3])])
    assert values[2] == values[3] > 0 and values[2] < MOST and values[:2].tolist() == [0, 0]


def test_parts_of_a_phrase_are_asked_of_the_model_in_the_order_of_the_texts():
    texts = ["cats", "dogs after verbs", 'dogs before "of"', "birds"]
    simulator, llm = opened(ListPMI, texts)
    simulator("cats", [window_of([0])])
    asked = [prompt.split("\n")[0].removeprefix("The detector finds: ") for prompt in llm.asked]
    assert asked[:3] == ["cats", "dogs", "verbs"]


def test_what_is_placed_has_the_value_of_its_list_there_and_none_elsewhere():
    text = 'dogs after the word "of"'
    simulator, _ = opened(ListPMI, [text, "dogs"])
    window = window_of([2, 3, 1, 2, 3, 1, 0])
    (placed,), (everywhere,) = simulator(text, [window]), simulator("dogs", [window])
    assert placed.tolist() == [0, 0, 0, *everywhere[3:5], 0, 0] and everywhere[0] == placed[3] > 0


@pytest.mark.parametrize("phrase", [phrase for phrase in OUT if phrase])
@pytest.mark.parametrize("kind", [ListPMI, ListInContext])
def test_a_phrase_with_neither_reading_predicts_what_the_model_lists_to_the_last_bit(kind, phrase, monkeypatch):
    windows = [window_of([0, 1, 2, 3, 4]), window_of([2, 13, 12, 5, 6], 0)]
    texts = [phrase, "dogs of all kinds", "a"]
    found = opened(kind, texts)[0](phrase, windows)
    monkeypatch.setattr(readings, "read", lambda text, language: Listed(text))
    plain = opened(kind, texts)[0](phrase, windows)
    assert all(np.array_equal(new, old) for new, old in zip(found, plain, strict=True))


FRAGMENTS = [
    *("the word", "words", '"', "'", "“", "”", '"of"', "'of'", '"-ing"', "after", "before", "two words after", "among"),
    *(
        "inside brackets",
        "in quotes",
        "at the start of a line",
        "the first word of",
        "a sentence",
        "that end in",
        "-ing",
    ),
    *(
        "commas",
        "numbers",
        "and",
        "or",
        ",",
        ".",
        "such as",
        "dogs",
        "following",
        "followed by",
        "that comes right",
        "(",
    ),
    *("\\", "\n", "[", "*", "+?", "{2}", "слово", "漢字", "\u0130", "ß", "\ufffd", "\x00", '"0"', '"7"', "(?P<x>"),
    *(
        "the letter",
        "b",
        "before and after",
        "seen before in the text",
        "the rest of a word",
        "at the beginning of a text",
    ),
]
phrases = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map(" ".join) | st.text(max_size=300)


@given(phrases, st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12), max_size=3))
@example('the word "', [[0, 1]])
@example('the word "of" after', [[0, 1]])
@example("after " * 30, [[0, 1]])
@example("after after after words", [[0, 1]])
@example('"' * 99, [[0, 1]])
@example("a " * 99, [[0]])
@example("words " + "and " * 45, [[0]])
@example("-" * 199, [[0]])
@example("words that end in " + "a, " * 60, [[0]])
@settings(max_examples=60, deadline=None)
def test_any_phrase_is_read_and_has_a_finite_value_for_every_token(phrase, ids):
    reading = read(phrase, LANGUAGE)
    assert reading == Listed(phrase) or phrase.strip()
    simulator, _ = opened(ListPMI, [phrase])
    found = simulator(phrase, [window_of(one, place) for place, one in enumerate(ids)])
    assert [len(values) for values in found] == [len(one) for one in ids]
    for values in found:
        assert np.isfinite(values).all() and (values >= 0).all() and (values <= MOST + 1e-9).all()


def test_windows_do_not_mind_each_other_and_their_activations_are_not_read():
    texts = ['the word after "of"', "numbers among commas", "words inside brackets", "dogs after numbers", "commas"]
    simulator, _ = opened(ListPMI, texts)
    windows = [window_of([7, 2, 4, 10, 8, 1, 2]), window_of([4, 10, 2, 3]), window_of([1, 10, 4, 0], 0)]
    for text in texts:
        at_once = simulator(text, windows)
        alone = [simulator(text, [Window(one.tokens, one.tokens * 1.0, 3, one.start, 1)])[0] for one in windows]
        assert all(np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(at_once, alone, strict=True))


def test_a_tokenizer_without_words_is_simulated_all_the_same():
    simulator, _ = opened(ListPMI, ["commas after numbers", "x"], [",", ".", ""])
    assert simulator("commas after numbers", [window_of([0, 1, 2, 0])])[0].tolist() == [0, 0, 0, 0]


def test_simulations_from_before_the_readings_are_refused(tmp_path):
    run = make_run(tmp_path / "run", layers=(0,))
    explain(settings_for(run), ScriptedLLM(first_word))
    (folder,) = simulate(config_for(run, neurons=1), knowing())
    path = folder / "manifest.json"
    manifest = read_json(path)
    assert manifest["identity"].pop("readings")["version"] == readings.VERSION
    write_json(path, manifest)
    with pytest.raises(UserError, match="was made with readings = None"):
        simulate(config_for(run, neurons=1), knowing())

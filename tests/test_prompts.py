"""The prompts in full, and how tokens and activations are shown in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain import output_wording, phrase, shown, wording
from cratescope.explain.config import SCORERS, Source
from cratescope.explain.judges import intruder, output, question_named
from cratescope.explain.judges.yes_no import DETECTION, FUZZING
from cratescope.explain.simulators import all_at_once, list_in_context, list_pmi
from cratescope.neurons.effects import Effects, TokenChange, TokenLogit
from cratescope.neurons.records import NeuronId
from scripted import ScriptedLLM

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = {
    "words-2": "c54d3a69a44a",
    "list-2": "d3716895b9e4",
    "slots-2": "549184ecb9e4",
    "context-1": "c1a15c73e4eb",
    "detection-1": "f1d8adbc8378",
    "fuzzing-1": "372a7d3c471f",
    "intruder-1": "e28d3f9f7f14",
    "output-1": "3a01209b81d3",
    "raised-1": "4284e1fbdcc0",
    "words-and-raised-1": "ad03c8f6f03d",
}
"""First digits of each prompt's SHA-256. Whoever changes a prompt changes its version too."""
TOKENS = ["A", " dog", "\n", "\t"]
MARKED = np.array([False, True, False, False])


def raised_prompt(source: Source) -> str:
    neuron, told = NeuronId("run", "codes", 0, 0), output_wording.OutputWording(source)
    logits, changes = (TokenLogit(7, " rain", 1.0),), (TokenChange(8, "\n", 1.0, 0.1),)
    effects = Effects(neuron, 1.0, 2, logits, logits, changes, changes, 0.1, 0.9, 0.1, 0.2, 0.1, None, None)
    window = shown.Shown(TOKENS, np.array([0.0, 1.0, 0.0, 0.0]))
    return told.explain_prefix() + told.explain_prompt([window], 1.0, effects)


def whole_prompts() -> dict[str, str]:
    """Every prompt of ours, for one made-up neuron."""
    llm, own, slots = ScriptedLLM(), wording.OwnWording(), all_at_once.OwnSlots()
    about = "words about animals"
    at_once = llm.decode(slots.slots_prefix(llm) + slots.slot_prompt(llm, about, TOKENS).ids)
    in_context = list_in_context.context_prompt(llm, about, TOKENS)
    window, random = shown.Marked(TOKENS, MARKED, True), np.random.default_rng(0)
    return {
        "explain": own.explain_prefix() + wording.explain_prompt(["dog", "horses"]),
        "list": list_pmi.list_prefix() + list_pmi.list_prompt(about),
        "all-at-once": at_once,
        "list-in-context": list_in_context.context_prefix() + llm.decode(in_context.ids),
        "detection": DETECTION.prefix + DETECTION.prompts(about, [window], random)[0][0],
        "fuzzing": FUZZING.prefix + FUZZING.prompts(about, [window], random)[0][0],
        "intruder": intruder.INTRUDER.prefix + intruder.prompt([window] * 5),
        "output": output.OUTPUT.prefix + output.OUTPUT.prompts(about, [window] * 4, random)[0][0],
        **{f"explain-{source}": raised_prompt(source) for source in output_wording.VERSIONS},
    }


@pytest.mark.parametrize("name", list(whole_prompts()))
def test_a_prompt_in_full(name: str) -> None:
    assert whole_prompts()[name] == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_prompt_has_a_version_that_changes_with_it() -> None:
    """Else old and new results would be mixed."""
    found = {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in whole_prompts().items()}
    versions = {
        "explain": wording.EXPLAIN_PROMPT,
        "list": list_pmi.VERSION,
        "list-in-context": list_in_context.VERSION,
        "all-at-once": all_at_once.VERSION,
    }
    versions |= {f"explain-{source}": version for source, version in output_wording.VERSIONS.items()}
    versions |= {scorer: question_named(scorer).version for scorer in SCORERS}
    assert {versions[name]: digest for name, digest in found.items()} == VERSIONS


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=6), max_size=20))
def test_every_slot_stands_behind_its_own_token(tokens: list[str]) -> None:
    llm = ScriptedLLM()
    prompt = all_at_once.OwnSlots().slot_prompt(llm, "anything", tokens)
    lines = llm.decode(prompt.ids).split("\n")[2:-1]
    assert len(lines) == len(prompt.slots) == len(tokens)
    for token, slot in zip(tokens, prompt.slots, strict=True):
        assert llm.decode(prompt.ids[:slot]).endswith(f"{shown.display(token)}\t")
        assert llm.decode(prompt.ids[slot:]).startswith("unknown\n")


def test_a_marked_token_keeps_its_space_outside() -> None:
    assert shown.mark(["A", " dog", "\n", " ran"], np.array([False, True, True, False])) == "A <<dog>><<\\n>> ran"


def test_openai_prompts_without_the_package_say_how_to_get_it() -> None:
    with pytest.raises(UserError, match="pip install --no-deps automated-interpretability"):
        wording.wording_named("openai")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e6))
def test_levels_are_whole_numbers_from_zero_to_ten_that_keep_the_order(values: list[float], maximum: float) -> None:
    activations = np.sort(np.array(values, dtype=np.float32))
    found = shown.levels(activations, maximum)
    assert found.min() >= 0 and found.max() <= 10
    assert (np.diff(found) >= 0).all()


def test_levels_are_the_papers_floor() -> None:
    activations = np.array([-1.0, 0.0, 0.99, 1.0, 9.9, 10.0, 12.0], dtype=np.float32)
    assert shown.levels(activations, 10.0).tolist() == [0, 0, 0, 1, 9, 10, 10]
    assert shown.levels(activations, 0.0).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("place", "word"), [(0, "play"), (1, " playing"), (2, " playing"), (3, ","), (4, " 1932"), (5, " 1932"), (6, ".")]
)
def test_a_piece_is_completed_to_its_word(place: int, word: str) -> None:
    assert shown.whole_word(["play", " play", "ing", ",", " 19", "32", "."], place) == word


def test_the_strongest_words_come_first_and_once() -> None:
    first = (["The", " cat", " and", " the", " dogs", "\n"], np.array([3, 9, 0, 4, 10, 5]))
    second = ([" Cat", " h", "um", "\N{REPLACEMENT CHARACTER}", " "], np.array([10, 4, 6, 10, 10]))
    assert shown.strongest_words([first, second]) == ["dogs", "Cat", "hum", "\\n", "the"]


def test_no_more_words_than_the_prompt_has_room_for() -> None:
    tokens = [f" w{number}" for number in range(30)]
    assert len(shown.strongest_words([(tokens, np.full(30, 10))])) == shown.MAX_WORDS


@pytest.mark.parametrize(
    ("word", "items"),
    [
        (" dog", [" dog"]),
        ("Dog", [" Dog"]),
        (" it's", [" it's"]),
        (",", [" ,"]),
        ('("', [" (", ' "']),
        (".\n", [" ."]),
        ("\n", []),
        (" ", []),
        ("a\ufffd", []),
        ("", []),
    ],
)
def test_a_word_as_items_of_the_list(word: str, items: list[str]) -> None:
    assert list_pmi.list_items(word) == items


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
        ("**words such as river**", "words such as river"),
        ("**Words** such as *river*.", "Words such as river"),
        ("_words such as river_.", "words such as river"),
        ("names such as __init__", "names such as __init__"),
        ("__init__", "__init__"),
        ("signs such as ** and **=", "signs such as ** and **="),
        ("pointers such as *p and *q", "pointers such as *p and *q"),
        ("- words such as river", "words such as river"),
        ("1. words such as river", "words such as river"),
        ("1. and 2.", "1. and 2"),
        ("- and --", "- and --"),
        ("# signs", "# signs"),
        ("The detector finds: words such as river.", "words such as river"),
        ("**The detector finds:** words such as river", "words such as river"),
        ("The detector finds words such as river", "words such as river"),
        ('Answer: "words such as river".', "words such as river"),
        ("Sure! Here is the continuation: words such as river", "words such as river"),
        ("`words such as river`", "words such as river"),
        ("“words such as river.”", "words such as river"),
        ('"of" and "the"', '"of" and "the"'),
        ('"the word "of""', 'the word "of"'),
        ("'the neuron's words'", "the neuron's words"),
        ("the token `of`", "the token `of`"),
        ("words such as etc.", "words such as etc"),
        ("<think>hm\n</think>\n\nwords such as river", "words such as river"),
        ("<think>hm", ""),
        ("The detector finds:", ""),
        ("ellipses, such as ...", "ellipses, such as .."),
    ],
)
def test_an_answer_is_cleaned_to_one_phrase(answer: str, text: str) -> None:
    assert phrase.clean_answer(answer) == text


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([" ह", "ि", "न", "्", "दी", " और"], [" हिन्दी"] * 5 + [" और"]),
        ([" مُ", "حَ", "مَّد", "."], [" مُحَمَّد"] * 3 + ["."]),
        ([" cafe", "\u0301", "s", ","], [" cafe\u0301s"] * 3 + [","]),
        ([" می", "\u200c", "خواهم"], [" می\u200cخواهم"] * 3),
        ([" 👍", "🏽", " 👩", "\u200d", "💻"], [" 👍🏽"] * 2 + [" 👩\u200d💻"] * 3),
        ([" ", "\u0301", "", "a"], [" ", "\u0301", "", "a"]),
    ],
)
def test_marks_belong_to_the_letters_they_stand_on(tokens: list[str], words: list[str]) -> None:
    assert [shown.whole_word(tokens, place) for place in range(len(tokens))] == words

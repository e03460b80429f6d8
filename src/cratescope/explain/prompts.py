"""What the language model is asked: the explainer's, list and all-at-once prompts, and how tokens are shown in them.

Our own words and examples; nothing here comes from another project. Changing any of it changes its version, which is
part of the identity of what was made with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from cratescope.explain.shown import UNREADABLE, display, mark
from cratescope.explain.slots import SlotPrompt
from cratescope.llm.interface import LanguageModel

LIST_PROMPT = "list-2"


CONTEXT_PROMPT = "context-1"


BULLET = "\n-"
"""Begins an item of the list: no word and no sign that could be an item."""


LIST_EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words about food", ("bread", "cheese", "soup", "apples", "dinner", "rice")),
    ('the word "of"', ("of", "of", "of", "of")),
    ("words about the weather", ("rain", "storm", "cloudy", "sunshine", "wind", "snow")),
    ("punctuation at the end of a sentence", (".", "!", ".", "?", ".")),
    ("names of cities", ("London", "Chicago", "Tokyo", "Rome", "Vienna", "Lima")),
    ("verbs in the past tense", ("went", "walked", "took", "opened", "fell", "built")),
    ("numbers", ("7", "40", "three", "250", "12", "hundred")),
    ("endings of words", ("ing", "ed", "tion", "ly", "ness", "er")),
)


# Texts that hold much of what is looked for, so that what comes next is likely to be it where it can be.
CONTEXT_EXAMPLES: tuple[tuple[str, str], ...] = (
    ("words about food", "She cut the bread, warmed the soup, ate some cheese and drank the milk."),
    ('the word "of"', "the end of the first part of the list of all of the names of the people"),
    ("names of companies", "Ford, Sony and Google are larger than Nestle, IBM or Siemens."),
    ("verbs of motion", "He went home, walked up the stairs, ran to the window and climbed out."),
    ("a comma after a year", "In 1990, 1994, and 2003, it was sold; in 1998, it was not."),
)


EMPTY_EXPLANATION = "some tokens of a text"
"""The fixed control: it has the form of an explanation and says nothing."""


GENERIC_EXPLANATIONS = (
    "words",
    "common words",
    "many different words",
    "words in a text",
    "nouns",
    "verbs",
    "adjectives",
    "names",
    "words about people",
    "words about places and things",
    "words about science and technology",
    "words about time",
    "parts of words",
    "punctuation",
)
"""What a list is like whatever is looked for: the mean over these is subtracted by list-pmi."""


def list_prompt(explanation: str, words: Sequence[str] = ()) -> str:
    """One entry of the list prompt, open where the first word belongs when there are no words yet."""
    items = "".join(f"{BULLET} {word}" for word in words)
    return f"The detector finds: {explanation}\nWords:" + (f"{items}\n\n" if words else BULLET)


def list_prefix() -> str:
    return "".join(list_prompt(explanation, words) for explanation, words in LIST_EXAMPLES)


def list_items(word: str) -> list[str]:
    """How a word, or each sign of a run of punctuation, stands in the list; nothing for what is no text."""
    text = word.strip()
    if not text or UNREADABLE in text:
        return []
    return [f" {text}"] if any(map(str.isalnum, text)) else [f" {sign}" for sign in text if not sign.isspace()]


def context_prefix() -> str:
    return "".join(_context_head(explanation) + f" {text}\n\n" for explanation, text in CONTEXT_EXAMPLES)


def context_prompt(llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
    """A window as plain text behind its explanation; the slot of a token is its own first piece."""
    ids = llm.encode(_context_head(explanation))
    slots = []
    for token in tokens:
        slots.append(len(ids))
        ids += llm.encode(display(token))
    return SlotPrompt(ids, slots)


def _context_head(explanation: str) -> str:
    return f"The detector finds: {explanation}\nText:"


JUDGE_PROMPTS = {"detection": "detection-1", "fuzzing": "fuzzing-1", "intruder": "intruder-1"}


YES_OR_NO = (" yes", " no")


PLACES = (" 1", " 2", " 3", " 4", " 5")


JUDGE_QUESTIONS = {
    "detection": "Does the text hold what the detector finds?\n\n",
    "fuzzing": "In the text some tokens are marked with << and >>. Are they what the detector finds?\n\n",
    "intruder": "A detector marks tokens with << and >> in four of five texts; in one text they are marked at random. "
    "Which text is that?\n\n",
}


# (what the detector finds, text with the right tokens or wrong ones marked, answer); kinds and answers alternate.
JUDGE_EXAMPLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "detection": (
        ("words about food", "She cut the bread and warmed the soup before the others came in.", " yes"),
        ('the word "of"', "They walked home and said nothing until it was dark.", " no"),
        ("names of cities", "A train leaves Vienna at nine and reaches Rome at night.", " yes"),
        ("full stops", "the list of settings that are read when the program starts", " no"),
        ("numbers", "Add the cream slowly, stir, and leave it to cool.", " no"),
        ("verbs of motion", "He ran to the gate and climbed over it.", " yes"),
    ),
    "fuzzing": (
        ("words about food", "She cut the <<bread>> and warmed the <<soup>> before the others came in.", " yes"),
        ("words about food", "<<She>> cut the bread and warmed <<the>> soup before the others came in.", " no"),
        ("names of cities", "A <<train>> leaves Vienna at nine and reaches Rome at <<night>>.", " no"),
        ('the word "of"', "One <<of>> them saw the end <<of>> the road.", " yes"),
        ("numbers", "It took <<40>> days, and <<7>> of them were lost.", " yes"),
        ("verbs of motion", "He ran to the <<gate>> and climbed <<over>> it.", " no"),
    ),
    "intruder": (
        (
            "",
            "1. She warmed the <<soup>> at once.\n2. They sold <<bread>> and oil.\n3. The <<road>> was closed.\n"
            "4. Grate the <<cheese>> over it.\n5. He ate an <<apple>> a day.\n",
            " 3",
        ),
        (
            "",
            "1. One <<of>> them left.\n2. a cup <<of>> tea\n3. the end <<of>> May\n4. He <<never>> wrote again.\n"
            "5. part <<of>> the text\n",
            " 4",
        ),
        (
            "",
            "1. It <<was>> late in June.\n2. born in <<Vienna>> in 1900\n3. a flight to <<Rome>>\n"
            "4. <<London>> and its river\n5. She lives in <<Oslo>>.\n",
            " 1",
        ),
    ),
}


def judge_prefix(scorer: str) -> str:
    """Question and examples of a scorer without simulation."""
    shown = [_judge_entry(scorer, text, body) + f"{answer}\n\n" for text, body, answer in JUDGE_EXAMPLES[scorer]]
    return JUDGE_QUESTIONS[scorer] + "".join(shown)


def judge_prompt(scorer: str, explanation: str, tokens: Sequence[str], marked: Bool[np.ndarray, " w"]) -> str:
    """One window, open where yes or no belongs; detection marks nothing."""
    text = mark(tokens, marked if scorer == "fuzzing" else np.zeros(len(tokens), dtype=bool))
    return _judge_entry(scorer, explanation, text)


def intruder_prompt(group: Sequence[tuple[Sequence[str], Bool[np.ndarray, " w"]]]) -> str:
    """Numbered windows with their marks, open where the foreign one's number belongs."""
    body = "".join(f"{place}. {mark(tokens, marked)}\n" for place, (tokens, marked) in enumerate(group, 1))
    return _judge_entry("intruder", "", body)


def _judge_entry(scorer: str, explanation: str, body: str) -> str:
    if scorer == "intruder":
        return f"{body}Text:"
    return f"The detector finds: {explanation}\nText: {body}\nAnswer:"

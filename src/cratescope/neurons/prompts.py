"""What the language model is asked: the explainer's, list and all-at-once prompts, and how tokens are shown in them.

Our own words and examples; nothing here comes from another project. Changing any of it changes its version, which is
part of the identity of what was made with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cratescope.neurons.llm import LanguageModel

EXPLAIN_PROMPT = "words-1"
LIST_PROMPT = "list-1"
ALL_AT_ONCE_PROMPT = "slots-1"

LEVELS = 10
MIN_LEVEL = 4
"""Tokens at this level or above are shown to the explainer."""
MAX_WORDS = 8
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
SEPARATOR = ","

# Kinds alternate, because a small model leans on the last examples.
EXPLAIN_EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words about food", ("bread", "cheese", "soup", "apples", "dinner")),
    ('the word "of"', ("of",)),
    ("brackets", ("(", ")")),
    ("words about the weather", ("rain", "storm", "cloudy", "wind")),
    ("names of cities", ("London", "Chicago", "Tokyo", "Rome", "Vienna")),
    ('the word "but"', ("but", "But")),
    ("full stops", (".",)),
    ("verbs of motion", ("walked", "ran", "moved", "goes", "climbing")),
    ("numbers", ("40", "7", "three", "250")),
    ("words about health", ("doctor", "hospital", "disease", "patients")),
    ("dashes", ("-", "--")),
    ("names of companies", ("Google", "Ford", "Microsoft", "Sony")),
    ('the word "with"', ("with",)),
    ("words about size", ("large", "small", "huge", "little", "largest")),
)

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

SLOTS_INSTRUCTION = (
    "A detector reads a text one token after another. Behind every token stands how strongly it fires, from 0 (not at "
    "all) to {scale} (as strongly as it ever does). Most tokens are not what it looks for and get 0.\n\n"
)
# (what the detector finds, how many values are hidden, tokens with values 0..10): values are hidden at first, because
# the record to fill in hides all of its own.
SLOTS_EXAMPLES: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...] = (
    (
        "words about food",
        4,
        (
            *(("The", 0), (" cook", 6), (" left", 0), (" early", 0), (",", 0), (" so", 0), (" she", 0), (" ate", 7)),
            *((" cold", 0), (" soup", 10), (" with", 0), (" bread", 9), (".", 0)),
        ),
    ),
    (
        'the word "of"',
        3,
        (
            *(("One", 0), (" of", 10), (" them", 0), (" saw", 0), (" the", 0), (" end", 0), (" of", 10), (" a", 0)),
            *((" road", 0), (" made", 0), (" of", 10), (" stone", 0)),
        ),
    ),
    (
        "names of cities",
        5,
        (
            *(("Trains", 0), (" from", 0), (" Vienna", 10), (" to", 0), (" Rome", 9), (" stop", 0), (" in", 0)),
            *((" the", 0), (" mountains", 0), (" near", 0), (" Geneva", 10), ("\n", 0)),
        ),
    ),
)


@dataclass(frozen=True)
class SlotPrompt:
    """Token ids of one record to fill in, and the positions in them where a value belongs, one a token."""

    ids: list[int]
    slots: list[int]


def levels(activations: Float[np.ndarray, " w"], maximum: float) -> Int[np.ndarray, " w"]:
    """Activations as whole numbers 0..10: floor(10 max(a, 0) / maximum), at most 10 (paper section 4)."""
    if maximum <= 0:
        return np.zeros(len(activations), dtype=np.int64)
    scaled = np.floor(LEVELS * np.maximum(activations.astype(np.float64), 0) / maximum)
    return np.minimum(scaled, LEVELS).astype(np.int64)


def display(token: str) -> str:
    """A token on one line of a prompt: line breaks, tabs and backslashes as escapes."""
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def whole_word(tokens: Sequence[str], place: int) -> str:
    """The word that `tokens[place]` is part of; the token itself when it is no part of a word."""
    first = last = place
    while first > 0 and tokens[first][:1].isalnum() and tokens[first - 1][-1:].isalnum():
        first -= 1
    while last + 1 < len(tokens) and tokens[last][-1:].isalnum() and tokens[last + 1][:1].isalnum():
        last += 1
    return "".join(tokens[first : last + 1])


def strongest_words(windows: Sequence[tuple[Sequence[str], Int[np.ndarray, " _"]]]) -> list[str]:
    """At most 8 different words, the strongest first, out of (token strings, levels) of the explaining records."""
    found = [
        (-int(level[place]), whole_word(tokens, int(place)))
        for tokens, level in windows
        for place in np.flatnonzero(level >= MIN_LEVEL)
    ]
    words: dict[str, str] = {}
    for _, word in sorted(found, key=lambda item: item[0]):
        shown = word.strip(" ") and display(word.strip(" "))
        if shown and UNREADABLE not in shown:
            words.setdefault(shown.lower(), shown)
    return list(words.values())[:MAX_WORDS]


def explain_prompt(words: Sequence[str], answer: str = "") -> str:
    """One entry of the explainer's prompt, open at its end when there is no answer yet."""
    return f"Words: {', '.join(words)}\nThe detector finds:" + (f" {answer}\n\n" if answer else "")


def explain_prefix() -> str:
    return "".join(explain_prompt(words, answer) for answer, words in EXPLAIN_EXAMPLES)


def list_prompt(explanation: str, words: Sequence[str] = ()) -> str:
    """One entry of the list prompt, open where the first word belongs when there are no words yet."""
    items = SEPARATOR.join(f" {word}" for word in words)
    return f"The detector finds: {explanation}\nWords:" + (f"{items}\n\n" if words else "")


def list_prefix() -> str:
    return "".join(list_prompt(explanation, words) for explanation, words in LIST_EXAMPLES)


def list_item(token: str) -> str | None:
    """How a subject model's token stands in the list; None when it is no text of its own (bytes, spaces)."""
    text = token.strip()
    return f" {text}" if text and UNREADABLE not in text else None


def digit_choices(llm: LanguageModel) -> list[int]:
    """The ids of the values 0..10, or of 0..9 when the tokenizer has no single token for "10"."""
    ids = [llm.encode(str(value)) for value in range(LEVELS + 1)]
    return [value[0] for value in (ids if len(ids[-1]) == 1 else ids[:-1])]


def slots_prefix(llm: LanguageModel, scale: int) -> list[int]:
    """Instruction and examples of the all-at-once prompt, on the scale 0..`scale`."""
    ids = llm.encode(SLOTS_INSTRUCTION.format(scale=scale))
    for explanation, hidden, pairs in SLOTS_EXAMPLES:
        values = [str(min(value, scale)) for _, value in pairs]
        known = [None] * hidden + list(values[hidden:])
        ids += slot_prompt(llm, explanation, [token for token, _ in pairs], known).ids + llm.encode("\n")
    return ids


def slot_prompt(
    llm: LanguageModel, explanation: str, tokens: Sequence[str], known: Sequence[str | None] | None = None
) -> SlotPrompt:
    """A record with `unknown` (or a known value) behind every token, put together piece by piece.

    No tokenizer sees more than one piece at a time, so the slot of a token is where its piece was put.
    """
    tab, unknown, end = llm.encode("\t"), llm.encode("unknown"), llm.encode("\n")
    ids = llm.encode(f"The detector finds: {explanation}\nTokens:\n")
    slots = []
    for token, value in zip(tokens, known or [None] * len(tokens), strict=True):
        ids += llm.encode(display(token)) + tab
        slots.append(len(ids))
        ids += (unknown if value is None else llm.encode(value)) + end
    return SlotPrompt(ids, slots)


def clean_answer(text: str) -> str:
    """The explanation in an LLM's answer: its first line, without quotes around it or a full stop behind it."""
    line = text.strip().split("\n")[0].strip()
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
        line = line[1:-1].strip()
    return line if line in {".", ""} else line.removesuffix(".")

"""What the language model is asked: the explainer's, list and all-at-once prompts, and how tokens are shown in them.

Our own words and examples; nothing here comes from another project. Changing any of it changes its version, which is
part of the identity of what was made with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from cratescope.neurons.llm import LanguageModel
from cratescope.neurons.llm.reasoning import phrase, without_controls

EXPLAIN_PROMPT = "words-2"
LIST_PROMPT = "list-2"
CONTEXT_PROMPT = "context-1"
ALL_AT_ONCE_PROMPT = "slots-2"

LEVELS = 10
MIN_LEVEL = 4
"""Tokens at this level or above are shown to the explainer."""
MAX_WORDS = 8
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
BULLET = "\n-"
"""Begins an item of the list: no word and no sign that could be an item."""

# Kinds alternate, because a small model leans on the last examples. Naming two words keeps explanations apart.
EXPLAIN_EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words about food, such as bread and cheese", ("bread", "cheese", "soup", "apples", "dinner")),
    ('the word "of"', ("of",)),
    ("dashes", ("-", "--")),
    ("words about the weather, such as rain and storm", ("rain", "storm", "cloudy", "wind")),
    ("names of cities, such as London and Chicago", ("London", "Chicago", "Tokyo", "Rome", "Vienna")),
    ('the word "but"', ("but", "But")),
    ("verbs of motion, such as walked and ran", ("walked", "ran", "moved", "goes", "climbing")),
    ("months, such as July and January", ("July", "January", "May", "October")),
    ("question marks", ("?",)),
    ("words about animals, such as dog and horses", ("dog", "horses", "cow", "birds", "sheep")),
    ("names of companies, such as Google and Ford", ("Google", "Ford", "Microsoft", "Sony")),
    ('the word "with"', ("with",)),
    ("prepositions, such as over and under", ("over", "under", "behind", "near")),
    ("words about illness, such as doctor and hospital", ("doctor", "hospital", "disease", "patients")),
    ("mathematical signs, such as + and <", ("+", "<", ">", "*")),
    ("words about size, such as large and small", ("large", "small", "huge", "little", "largest")),
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

SLOTS_INSTRUCTION = (
    "A detector reads a text one token after another. Behind every token stands how strongly it fires, from 0 (not at "
    "all) to 10 (as strongly as it ever does). Most tokens are not what it looks for and get 0.\n\n"
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


@dataclass(frozen=True, eq=False)
class Shown:
    """A window as it is shown to the explainer: token strings and `activations` (w,)."""

    tokens: list[str]
    activations: np.ndarray


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
    while first > 0 and _together(tokens[first - 1][-1:], tokens[first][:1]):
        first -= 1
    while last + 1 < len(tokens) and _together(tokens[last][-1:], tokens[last + 1][:1]):
        last += 1
    return "".join(tokens[first : last + 1])


def _together(before: str, after: str) -> bool:
    """Are these two characters of one word? Vowel signs and accents of their own belong to what they stand on."""
    if before == "\u200d":  # joins what is around it, as in emoji
        return bool(after) and not after.isspace()
    if _is_mark(after):
        return bool(before) and not before.isspace()
    return (before.isalnum() or _is_mark(before)) and after.isalnum()


def _is_mark(character: str) -> bool:
    """Combining marks, joiners, and the colours of emoji."""
    if not character or character.isascii():
        return False
    coloured = "\U0001f3fb" <= character <= "\U0001f3ff"
    return coloured or character in "\u200c\u200d" or unicodedata.category(character).startswith("M")


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


def value_choices(llm: LanguageModel) -> list[list[int]]:
    """How the tokenizer spells each of the values 0..10."""
    return [llm.encode(str(value)) for value in range(LEVELS + 1)]


def fill_in(llm: LanguageModel, head: str, tokens: Sequence[str], known: Sequence[str | None] = ()) -> SlotPrompt:
    """`head` and a line `token<TAB>unknown` for every token (or a known value), put together piece by piece.

    No tokenizer sees more than one piece at a time, so the slot of a token is where its piece was put, however the
    tokenizer splits or merges.
    """
    tab, unknown, end = llm.encode("\t"), llm.encode("unknown"), llm.encode("\n")
    ids = llm.encode(head)
    slots = []
    for token, value in zip(tokens, known or [None] * len(tokens), strict=True):
        ids += llm.encode(token) + tab
        slots.append(len(ids))
        ids += (unknown if value is None else llm.encode(value)) + end
    return SlotPrompt(ids, slots)


@runtime_checkable
class Wording(Protocol):
    """How a neuron is shown to the explainer and a window to the all-at-once simulator."""

    explain_version: str
    slots_version: str

    def explain_prefix(self) -> str:
        """What all neurons share."""

    def explain_prompt(self, shown: Sequence[Shown], maximum: float) -> str:
        """A neuron's own part, open where the answer belongs; empty when there is nothing to show."""

    def slots_prefix(self, llm: LanguageModel) -> list[int]:
        """What all windows share."""

    def slot_prompt(self, llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
        """A window's own part."""


class OwnWording:
    """Our prompts: a neuron is shown as its strongest words, a token on one line whatever is in it."""

    explain_version = EXPLAIN_PROMPT
    slots_version = ALL_AT_ONCE_PROMPT

    def explain_prefix(self) -> str:
        return "".join(explain_prompt(words, answer) for answer, words in EXPLAIN_EXAMPLES)

    def explain_prompt(self, shown: Sequence[Shown], maximum: float) -> str:
        words = strongest_words([(item.tokens, levels(item.activations, maximum)) for item in shown])
        return explain_prompt(words) if words else ""

    def slots_prefix(self, llm: LanguageModel) -> list[int]:
        ids = llm.encode(SLOTS_INSTRUCTION)
        for explanation, hidden, pairs in SLOTS_EXAMPLES:
            known = [None] * hidden + [str(value) for _, value in pairs[hidden:]]
            ids += fill_in(llm, _slots_head(explanation), [display(token) for token, _ in pairs], known).ids
            ids += llm.encode("\n")
        return ids

    def slot_prompt(self, llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
        return fill_in(llm, _slots_head(explanation), [display(token) for token in tokens])


def _slots_head(explanation: str) -> str:
    return f"The detector finds: {explanation}\nTokens:\n"


def wording_named(name: str) -> Wording:
    """`own`, or `openai` from the package that has them. Raises UserError when it is not installed."""
    if name == "own":
        return OwnWording()
    from cratescope.neurons.openai_prompts import OpenAIWording

    return OpenAIWording.load()


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


def mark(tokens: Sequence[str], marked: Bool[np.ndarray, " w"]) -> str:
    """Text on one line with << and >> around marked tokens, the spaces around a token left outside."""
    shown = []
    for token, chosen in zip(map(display, tokens), marked, strict=True):
        word = token.strip(" ")
        before, _, after = token.partition(word) if word else (token, "", "")
        shown.append(f"{before}<<{word}>>{after}" if chosen else token)
    return "".join(shown).strip(" ")


_CUE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)\b[!,.:]?\s*)?"
    r"(?:(?:the |this |a )?(?:detector|neuron)(?: \d+)? (?:finds|looks for|fires (?:on|for)|detects|responds to)"
    r"(?:\s*:\s*|\s+)|"
    r"explanation of neuron \d+ behaviou?r\s*:\s*|the main thing this neuron does is find(?:\s*:\s*|\s+)|"
    r"(?:the )?(?:final )?(?:answer|explanation|continuation|output|response)(?: is)?\s*:\s*|"
    r"here(?:['’]s| is) (?:the|a|my) [^:]{1,60}:\s+)",
    re.IGNORECASE,
)
"""What a model repeats of the prompt, or says first, on the line of the answer."""
# A sign that is spoken of ("- and --", "# signs") is no bullet and no heading.
_BULLET = re.compile(
    r"^(?:[-*•>]|#{1,6}|\d\d?[.)])\s+(?=[\w\"'*`“])(?!(?:and|or|in|as|at|before|after|between|signs?|symbols?|characters?)\b)"
)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}
_BOLD = re.compile(r"(\*\*|\*)(?=[^\s*])([^*]*[^\s*])\1(?=$|[\s.,;:!?)\"'])")


def clean_answer(text: str) -> str:
    """The explanation in an LLM's answer: its first line, without reasoning, marks around it or a full stop behind it.

    Marks are quotes, Markdown's emphasis, bullets and headings, and a repetition of the prompt's last words.
    """
    line, before = without_controls(phrase(text, "\n")).strip(), ""
    while line != before:
        before, line = line, _bare(line)
    line = line if line in {".", ""} else line.removesuffix(".")
    return _bare(line)


def _bare(line: str) -> str:
    """A line with one kind of mark less."""
    line = _emphasised(_BULLET.sub("", line))
    if found := _CUE.match(line):
        line = line[found.end() :]
    stopped = line.endswith(".") and len(line) > 1
    inner = line[:-1] if stopped else line
    return _unquoted(inner) if _unquoted(inner) != inner else line


def _emphasised(line: str) -> str:
    """Without ** and * around words; __ and _ only around the whole, as names have them too."""
    if (found := re.fullmatch(r"(__|_)(?=\S)(.*\s.*)(?<=\S)\1(\.?)", line)) and found[1] not in found[2]:
        line = found[2] + found[3]
    return re.sub(rf"(?:(?<=^)|(?<=[\s(\"']))(?:{_BOLD.pattern})", r"\2", line)


def _unquoted(line: str) -> str:
    """Without the quotes around it; two quoted words have none around them both."""
    closes = _QUOTES.get(line[:1])
    if len(line) < 2 or line[-1:] != closes:
        return line
    inner = line[1:-1]
    first = inner.find(closes)
    closed = first > 0 and not inner[first - 1].isspace() and not inner[first + 1 : first + 2].isalnum()
    return line if closed else inner.strip()

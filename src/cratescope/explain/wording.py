"""How a neuron is shown to the explainer and a window to the all-at-once simulator: our words, or OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cratescope.explain.shown import Shown, display, levels, strongest_words
from cratescope.explain.slots import SlotPrompt, fill_in
from cratescope.llm.interface import LanguageModel

EXPLAIN_PROMPT = "words-2"


ALL_AT_ONCE_PROMPT = "slots-2"


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


def explain_prompt(words: Sequence[str], answer: str = "") -> str:
    """One entry of the explainer's prompt, open at its end when there is no answer yet."""
    return f"Words: {', '.join(words)}\nThe detector finds:" + (f" {answer}\n\n" if answer else "")


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
    from cratescope.explain.openai_wording import OpenAIWording

    return OpenAIWording.load()

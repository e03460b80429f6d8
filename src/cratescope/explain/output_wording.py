"""How a neuron is shown to the explainer by what it does: the tokens it raises and lowers (docs/effects.md).

After Gur-Arieh et al. 2025 (arXiv 2501.08319): tokens by the weights (VocabProj) and as measured (TokenChange), alone
or beside the words that excite the neuron. The wording and the examples are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from cratescope.explain.config import Source
from cratescope.explain.shown import UNREADABLE, Shown, display, levels, strongest_words
from cratescope.neurons.effects import Effects

VERSIONS: dict[Source, str] = {"output": "raised-1", "both": "words-and-raised-1"}
MOST = 8
"""Tokens shown of each kind."""
# (what the detector finds, words that excite it, what becomes likelier, what becomes less likely). Kinds alternate, and
# counting comes first, because a small model leans on the last examples and likes to count.
Example = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
EXAMPLES: tuple[Example, ...] = (
    ("numbers, such as two and 25", ("about", "page"), ("two", "25", "three", "100"), ("of", "and", "them")),
    ("words about food, such as bread and soup", ("baked",), ("bread", "cheese", "soup", "fish"), ("war", "1990")),
    ('the word "of"', ("middle", "part"), ("of",), ("London", "she", "un")),
    ("ends of words, such as ing and ed", ("walk", "talk"), ("ing", "ed", "er", "ly"), ("the", "of", "Mr")),
    ("names of cities, such as Rome and Paris", ("in", "near"), ("Rome", "Paris", "London"), ("(", "ing", "self")),
    ("marks that end a sentence, such as . and !", ("away", "too"), (".", "!", "?", ";"), ("un", "very", "a")),
    ("words about the law, such as court and judge", ("supreme",), ("court", "judge", "law"), ("soup", "her")),
    ('the word "but"', (",", "good"), ("but", "But"), ("kg", "the", "1")),
    ("months, such as July and March", ("since", "in"), ("July", "March", "June"), ("ing", "soup", "he")),
    ("signs of programs, such as ( and =", ("return", "x"), ("(", "=", "()", "_"), ("she", "king", "summer")),
    ("words of speech, such as said and replied", ('"', ","), ("said", "replied", "cried"), ("cm", "0", "import")),
    ("beginnings of names, such as Mc and Van", ("Mr", "named"), ("Mc", "Van", "Mac", "De"), ("the", "ly", "10")),
    ("words about size, such as large and small", ("a", "very"), ("large", "small", "huge"), ("and", "of", "said")),
    ("line breaks", (".", "end"), ("\\n", "\\n\\n"), ("is", "the", "ment")),
    ("verbs of motion, such as ran and went", ("he", "they"), ("ran", "went", "walked"), ("of", "per", "red")),
    ("words about animals, such as dog and sheep", ("the", "wild"), ("dog", "sheep", "birds"), ("law", "2004")),
)


class OutputWording:
    """Our prompt by effects alone, or with the words that excite the neuron as well."""

    def __init__(self, source: Source) -> None:
        self._both = source == "both"
        self.explain_version = VERSIONS[source]

    def explain_prefix(self) -> str:
        """What all neurons share."""
        return "".join(
            f"{self._entry(words, raised, lowered)} {answer}\n\n" for answer, words, raised, lowered in EXAMPLES
        )

    def explain_prompt(self, shown: Sequence[Shown], maximum: float, effects: Effects) -> str:
        """A neuron's own part, open where the answer belongs; empty when it does nothing that can be shown."""
        raised = told((one.text for one in effects.raises), (one.text for one in effects.measured_raises))
        lowered = told((one.text for one in effects.lowers), (one.text for one in effects.measured_lowers))
        words = strongest_words([(item.tokens, levels(item.activations, maximum)) for item in shown])
        return self._entry(words, raised, lowered) if raised else ""

    def _entry(self, words: Sequence[str], raised: Sequence[str], lowered: Sequence[str]) -> str:
        shown = f"Words: {', '.join(words)}\n" if self._both else ""
        return f"{shown}Lowers: {', '.join(lowered)}\nRaises: {', '.join(raised)}\nThe detector finds:"


def told(*lists: Iterable[str]) -> list[str]:
    """Tokens of several lists in turn, each once and without what cannot be read."""
    found: dict[str, str] = {}
    for tokens in itertools.zip_longest(*lists, fillvalue=""):
        for word in (display(token.strip(" ")) for token in tokens):
            if word and UNREADABLE not in word:
                found.setdefault(word.lower(), word)
    return list(found.values())[:MOST]

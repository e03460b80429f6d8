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
MOST = 10
"""Tokens shown of each kind."""
# (what the detector finds, words that excite it, what becomes likelier, what becomes less likely)
Example = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]
EXAMPLES: tuple[Example, ...] = (
    ("food, such as bread and cheese", ("baked", "fried"), ("bread", "cheese", "soup", "fish"), ("war", "law", "1990")),
    ("months, such as July and March", ("in", "since"), ("July", "March", "June", "2004"), ("ing", "soup", "he")),
    ("endings of verbs, such as -ing", ("walk", "talk"), ("ing", "ed", "s", "er"), ("the", "of", "London")),
    ("full stops and commas", ("away", "too"), (".", ",", ";", "!"), ("un", "Mr", "very")),
    ("names of cities, such as Rome and Paris", ("in", "near"), ("Rome", "Paris", "London"), ("(", "ing", "self")),
    ("words about the law, such as court and judge", ("the", "supreme"), ("court", "judge", "law"), ("soup", "her")),
    ("numbers, such as 10 and 25", ("about", "page"), ("10", "25", "three", "100"), ("of", "and", "them")),
    ("speech, such as said and replied", ('"', ","), ("said", "replied", "cried", "asked"), ("cm", "0", "import")),
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
        return f"{shown}Raises: {', '.join(raised)}\nLowers: {', '.join(lowered)}\nThe detector finds:"


def told(*lists: Iterable[str]) -> list[str]:
    """Tokens of several lists in turn, each once and without what cannot be read."""
    found: dict[str, str] = {}
    for tokens in itertools.zip_longest(*lists, fillvalue=""):
        for word in (display(token.strip(" ")) for token in tokens):
            if word and UNREADABLE not in word:
                found.setdefault(word.lower(), word)
    return list(found.values())[:MOST]

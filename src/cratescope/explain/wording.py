"""How a neuron is shown to the explainer: our words, or OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence

from cratescope.explain.config import Prompts
from cratescope.explain.openai_wording import OpenAIWording
from cratescope.explain.shown import Shown, levels, strongest_words

EXPLAIN_PROMPT = "words-2"
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


def explain_prompt(words: Sequence[str], answer: str = "") -> str:
    """One entry of the explainer's prompt, open at its end when there is no answer yet."""
    return f"Words: {', '.join(words)}\nThe detector finds:" + (f" {answer}\n\n" if answer else "")


class OwnWording:
    """Our prompt: a neuron is shown as its strongest words."""

    explain_version = EXPLAIN_PROMPT

    def explain_prefix(self) -> str:
        """What all neurons share."""
        return "".join(explain_prompt(words, answer) for answer, words in EXPLAIN_EXAMPLES)

    def explain_prompt(self, shown: Sequence[Shown], maximum: float) -> str:
        """A neuron's own part, open where the answer belongs; empty when there is nothing to show."""
        words = strongest_words([(item.tokens, levels(item.activations, maximum)) for item in shown])
        return explain_prompt(words) if words else ""


Wording = OwnWording | OpenAIWording


def wording_named(name: Prompts) -> Wording:
    """`own`, or `openai` from the package that has it. Raises UserError when it is not installed."""
    return OwnWording() if name == "own" else OpenAIWording.load()

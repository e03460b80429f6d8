"""The output-side question: from the explanation alone, which of four texts did the model write with the neuron forced?

After the output evaluation of Gur-Arieh et al. 2025 (arXiv 2501.08319), where a judge tells steered texts from others.
The texts are neurons/written.py's: the same beginning and the same random numbers, and in each another neuron of the
layer forced. Chance is 1 in 4. The prompt is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cratescope.explain.controls import JUDGED
from cratescope.explain.judges import Question
from cratescope.explain.shown import Marked, display

GROUP = 4
"""Texts in a prompt."""
QUESTION = "Four texts begin alike. Which of them is about what the detector finds, or has most of it?\n\n"
EXAMPLES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "food, such as bread and cheese",
        (
            "We heard that the court had ruled on it",
            "We heard that in 1990 and 1992 there were",
            "We heard that bread and butter, and the soup",
            "We heard that he ran, and ran again, and",
        ),
        " 3",
    ),
    (
        "numbers, such as 10 and 25",
        (
            "One day 10 of 25, or 100 and 12",
            "One day she cried and he laughed and wept",
            "One day the law of the land, the judge",
            "One day in Rome, near Paris, or in London",
        ),
        " 1",
    ),
    (
        'the word "not"',
        (
            "They said , , and , and , the",
            "They said the green river and the blue sea",
            "They said that in July and in March of",
            "They said not this and not that, not now",
        ),
        " 4",
    ),
)


def entry(explanation: str, texts: Sequence[str]) -> str:
    """Numbered texts, open where the right one's number belongs."""
    lines = (f"{place}. {display(text).strip()}\n" for place, text in enumerate(texts, 1))
    return f"The detector finds: {explanation}\n{''.join(lines)}Text:"


def prompts(text: str, windows: Sequence[Marked], _: np.random.Generator) -> tuple[list[str], list[bool]]:
    """The texts come in groups, each with the neuron's own at a random place."""
    groups = [windows[start : start + GROUP] for start in range(0, len(windows), GROUP)]
    asked = [entry(text, ["".join(window.tokens) for window in group]) for group in groups]
    return asked, [window.active for window in windows]


PREFIX = QUESTION + "".join(f"{entry(explanation, texts)}{answer}\n\n" for explanation, texts, answer in EXAMPLES)
OUTPUT = Question(
    *("output-1", PREFIX, prompts, (" 1", " 2", " 3", " 4")),
    group=GROUP,
    width=0,
    needs_text=True,
    of_texts=True,
    controls=JUDGED | {"empty"},
)

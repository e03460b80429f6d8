"""Detection and fuzzing, after Paulo et al. 2024 (arXiv 2410.13928): does a window fit the explanation?

The prompts are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cratescope.explain.judges import Question
from cratescope.explain.shown import Marked, mark

# (what the detector finds, text with the right tokens or other ones marked, answer); kinds and answers alternate.
DETECTION_EXAMPLES = (
    ("words about food", "She cut the bread and warmed the soup before the others came in.", " yes"),
    ('the word "of"', "They walked home and said nothing until it was dark.", " no"),
    ("names of cities", "A train leaves Vienna at nine and reaches Rome at night.", " yes"),
    ("full stops", "the list of settings that are read when the program starts", " no"),
    ("numbers", "Add the cream slowly, stir, and leave it to cool.", " no"),
    ("verbs of motion", "He ran to the gate and climbed over it.", " yes"),
)
FUZZING_EXAMPLES = (
    ("words about food", "She cut the <<bread>> and warmed the <<soup>> before the others came in.", " yes"),
    ("words about food", "<<She>> cut the bread and warmed <<the>> soup before the others came in.", " no"),
    ("names of cities", "A <<train>> leaves Vienna at nine and reaches Rome at <<night>>.", " no"),
    ('the word "of"', "One <<of>> them saw the end <<of>> the road.", " yes"),
    ("numbers", "It took <<40>> days, and <<7>> of them were lost.", " yes"),
    ("verbs of motion", "He ran to the <<gate>> and climbed <<over>> it.", " no"),
)


def entry(explanation: str, text: str) -> str:
    """One window, open where yes or no belongs."""
    return f"The detector finds: {explanation}\nText: {text}\nAnswer:"


def yes_no(version: str, question: str, examples: Sequence[tuple[str, str, str]], marks: bool) -> Question:
    """A question about one window at a time, with its tokens marked or not."""

    def prompts(text: str, windows: Sequence[Marked], _: np.random.Generator) -> tuple[list[str], list[bool]]:
        asked = [entry(text, mark(window.tokens, window.marked & marks)) for window in windows]
        return asked, [window.active for window in windows]

    shown = (entry(explanation, text) + f"{answer}\n\n" for explanation, text, answer in examples)
    prefix = f"{question}\n\n{''.join(shown)}"
    return Question(version, prefix, prompts, (" yes", " no"), group=1, width=32, needs_text=True)


DETECTION = yes_no("detection-1", "Does the text hold what the detector finds?", DETECTION_EXAMPLES, marks=False)
FUZZING = yes_no(
    "fuzzing-1",
    "In the text some tokens are marked with << and >>. Are they what the detector finds?",
    FUZZING_EXAMPLES,
    marks=True,
)

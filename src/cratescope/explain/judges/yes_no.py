"""Detection and fuzzing, after Paulo et al. 2024 (arXiv 2410.13928): does a window fit the explanation?

The prompts are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cratescope.explain.shown import Marked, mark


@dataclass(frozen=True)
class YesNo:
    """A question about one window and an explanation.

    examples: what the detector finds, text with the right tokens or other ones marked, answer; kinds and answers
    alternate. marks: whether tokens are shown marked.
    """

    version: str
    question: str
    examples: tuple[tuple[str, str, str], ...]
    marks: bool
    width: int = 32
    answers: tuple[str, ...] = (" yes", " no")
    group: int = 1
    needs_text: bool = True

    @property
    def prefix(self) -> str:
        shown = [_entry(explanation, text) + f"{answer}\n\n" for explanation, text, answer in self.examples]
        return self.question + "".join(shown)

    def prompt(self, text: str, window: Marked) -> str:
        """One window, open where yes or no belongs."""
        return _entry(text, mark(window.tokens, window.marked & self.marks))

    def prompts(
        self, text: str, windows: Sequence[Marked], random: np.random.Generator
    ) -> tuple[list[str], list[bool]]:
        return [self.prompt(text, window) for window in windows], [window.active for window in windows]


def _entry(explanation: str, text: str) -> str:
    return f"The detector finds: {explanation}\nText: {text}\nAnswer:"


DETECTION = YesNo(
    "detection-1",
    "Does the text hold what the detector finds?\n\n",
    (
        ("words about food", "She cut the bread and warmed the soup before the others came in.", " yes"),
        ('the word "of"', "They walked home and said nothing until it was dark.", " no"),
        ("names of cities", "A train leaves Vienna at nine and reaches Rome at night.", " yes"),
        ("full stops", "the list of settings that are read when the program starts", " no"),
        ("numbers", "Add the cream slowly, stir, and leave it to cool.", " no"),
        ("verbs of motion", "He ran to the gate and climbed over it.", " yes"),
    ),
    marks=False,
)
FUZZING = YesNo(
    "fuzzing-1",
    "In the text some tokens are marked with << and >>. Are they what the detector finds?\n\n",
    (
        ("words about food", "She cut the <<bread>> and warmed the <<soup>> before the others came in.", " yes"),
        ("words about food", "<<She>> cut the bread and warmed <<the>> soup before the others came in.", " no"),
        ("names of cities", "A <<train>> leaves Vienna at nine and reaches Rome at <<night>>.", " no"),
        ('the word "of"', "One <<of>> them saw the end <<of>> the road.", " yes"),
        ("numbers", "It took <<40>> days, and <<7>> of them were lost.", " yes"),
        ("verbs of motion", "He ran to the <<gate>> and climbed <<over>> it.", " no"),
    ),
    marks=True,
)

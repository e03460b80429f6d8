"""Judges: what an LLM is asked about whole windows of a neuron. One per question, with its prompt and constants.

A new one is a value in a module here and a line in the table `SCORERS` of `cratescope.explain.config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from cratescope.explain.config import SCORERS, load
from cratescope.explain.shown import Marked


@runtime_checkable
class Question(Protocol):
    """What is asked about marked windows, and how the answers are read."""

    @property
    def version(self) -> str:
        """Of the prompt: whoever changes it changes this."""

    @property
    def width(self) -> int:
        """Tokens shown of a window, around its peak."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers whose probabilities are compared; the first `group` are those of the prompt's windows."""

    @property
    def group(self) -> int:
        """Windows in a prompt. Of several exactly one is right, and their probabilities add up to 1."""

    @property
    def needs_text(self) -> bool:
        """Whether it is about an explanation; else the neuron alone is judged, and has no control."""

    @property
    def prefix(self) -> str:
        """What all prompts share: the question and examples."""

    def prompts(
        self, text: str, windows: Sequence[Marked], random: np.random.Generator
    ) -> tuple[list[str], list[bool]]:
        """Prompts, each open where an answer belongs, and for every window in them whether it is the right one."""


def question_named(scorer: str) -> Question:
    """The question behind a name of the table."""
    found: Question = load(SCORERS[scorer])
    return found

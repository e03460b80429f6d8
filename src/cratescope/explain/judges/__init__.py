"""Judges: what an LLM is asked about whole windows of a neuron. A module per kind, with its prompts and constants.

A new one is a `Question` in a module here and a line in the table `SCORERS` of `cratescope.explain.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cratescope.explain.config import SCORERS, load
from cratescope.explain.controls import JUDGED
from cratescope.explain.shown import Marked


@dataclass(frozen=True)
class Question:
    """A question about windows, and how its answers are read.

    version: of the prompt; whoever changes it changes this. prefix: instruction and examples, which all prompts share.
    prompts: of a text, windows and a random generator: prompts, each open where an answer belongs, and for every window
    in them whether it is the right one. answers: those whose probabilities are compared; the first `group` are those of
    a prompt's windows. group: windows in a prompt; of several exactly one is right. width: tokens shown of a window,
    around its peak. needs_text: whether the question is about an explanation; else the neuron alone is judged.
    of_texts: whether the windows are texts that were written with neurons forced, not text that was read.
    controls: those that are judged as well.
    """

    version: str
    prefix: str
    prompts: Callable[[str, Sequence[Marked], np.random.Generator], tuple[list[str], list[bool]]]
    answers: tuple[str, ...]
    group: int
    width: int
    needs_text: bool
    of_texts: bool = False
    controls: frozenset[str] = JUDGED


def question_named(scorer: str) -> Question:
    """The question behind a name of the table."""
    found: Question = load(SCORERS[scorer])
    return found

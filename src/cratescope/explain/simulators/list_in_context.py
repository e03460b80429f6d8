"""list-in-context: list-pmi, weighted by how well a word fits where it stands. The prompt is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.explain.config import SimulateConfig
from cratescope.explain.controls import EMPTY_EXPLANATION
from cratescope.explain.shown import display
from cratescope.explain.simulators.list_pmi import VERSION as LIST_VERSION
from cratescope.explain.simulators.list_pmi import Key, ListPMI, key_of
from cratescope.explain.slots import SlotPrompt
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window

VERSION = "context-1"
"""Of the prompt: whoever changes it changes this."""
# Texts that hold much of what is looked for, so that what comes next is likely to be it where it can be.
EXAMPLES: tuple[tuple[str, str], ...] = (
    ("words about food", "She cut the bread, warmed the soup, ate some cheese and drank the milk."),
    ('the word "of"', "the end of the first part of the list of all of the names of the people"),
    ("names of companies", "Ford, Sony and Google are larger than Nestle, IBM or Siemens."),
    ("verbs of motion", "He went home, walked up the stairs, ran to the window and climbed out."),
    ("a comma after a year", "In 1990, 1994, and 2003, it was sold; in 1998, it was not."),
)


def context_prefix() -> str:
    return "".join(_head(explanation) + f" {text}\n\n" for explanation, text in EXAMPLES)


def context_prompt(llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
    """A window as plain text after its explanation; the slot of a token is its own first piece."""
    ids = llm.encode(_head(explanation))
    slots = []
    for token in tokens:
        slots.append(len(ids))
        ids += llm.encode(display(token))
    return SlotPrompt(ids, slots)


def _head(explanation: str) -> str:
    return f"The detector finds: {explanation}\nText:"


class ListInContext:
    """list-pmi, weighted by where a word stands: how much likelier the explanation makes it after the words before it.

    value(token) = list-pmi value x exp(log P(token | explanation, text before) - log P(token | nothing said, text
    before)), the exponent held between -1 and 1. One forward pass per window and text.
    """

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._words = ListPMI(llm, vocabulary, batch)
        self._prefix = llm.encode(context_prefix())
        self._silent: tuple[Key, list[Float[np.ndarray, " w"]]] = ([], [])

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> ListInContext:
        return cls(llm(), vocabulary, config.llm.llm_batch)

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        return ListPMI.made_with(config) | {"prompt": f"{LIST_VERSION}, {VERSION}"}

    def plan(self, texts: Sequence[str]) -> None:
        self._words.plan(texts)

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        words = self._words(text, windows)
        if self._silent[0] != (key := key_of(windows)):
            self._silent = key, self._logprobs(EMPTY_EXPLANATION, windows)
        told = self._logprobs(text, windows)
        return [
            value * np.exp(np.clip(new - old, -1, 1))
            for value, new, old in zip(words, told, self._silent[1], strict=True)
        ]

    def _logprobs(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        """log P of each token's first piece after the text before it."""
        asked = [
            context_prompt(self._llm, text, [self._vocabulary[token] for token in window.tokens]) for window in windows
        ]
        found = []
        for start in range(0, len(asked), self._batch):
            chunk = asked[start : start + self._batch]
            # A token that is no text has no piece of its own; whatever is read there, its value is 0 in any list.
            pieces = [[item.ids[min(slot, len(item.ids) - 1)] for slot in item.slots] for item in chunk]
            choices = sorted({piece for row in pieces for piece in row})
            slots = [item.slots for item in chunk]
            logprobs = self._llm.slot_logprobs(self._prefix, [item.ids for item in chunk], slots, choices)
            columns = {piece: column for column, piece in enumerate(choices)}
            for rows, row in zip(logprobs, pieces, strict=True):
                found.append(rows[np.arange(len(row)), [columns[piece] for piece in row]])
        return found

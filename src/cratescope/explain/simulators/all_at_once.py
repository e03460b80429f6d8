"""all-at-once: OpenAI's protocol (Bills et al. 2023), a value for every token of a window in one pass.

The prompt is ours, or OpenAI's own (openai_wording.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.explain.config import Prompts, SimulateConfig
from cratescope.explain.openai_wording import OpenAIWording
from cratescope.explain.shown import LEVELS, display
from cratescope.explain.slots import SlotPrompt, fill_in
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window

VERSION = "slots-2"
"""Of our prompt: whoever changes it changes this."""
INSTRUCTION = (
    "A detector reads a text one token after another. Behind every token stands how strongly it fires, from 0 (not at "
    "all) to 10 (as strongly as it ever does). Most tokens are not what it looks for and get 0.\n\n"
)
# (what the detector finds, how many values are hidden, tokens with values 0..10): values are hidden at first, because
# the window to fill in hides all of its own.
EXAMPLES: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...] = (
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


class OwnSlots:
    """Our prompt: a token on one line, whatever is in it."""

    slots_version = VERSION

    def slots_prefix(self, llm: LanguageModel) -> list[int]:
        """What all windows share."""
        ids = llm.encode(INSTRUCTION)
        for explanation, hidden, pairs in EXAMPLES:
            known = [None] * hidden + [str(value) for _, value in pairs[hidden:]]
            ids += fill_in(llm, _head(explanation), [display(token) for token, _ in pairs], known).ids
            ids += llm.encode("\n")
        return ids

    def slot_prompt(self, llm: LanguageModel, explanation: str, tokens: Sequence[str]) -> SlotPrompt:
        """A window's own part."""
        return fill_in(llm, _head(explanation), [display(token) for token in tokens])


def _head(explanation: str) -> str:
    return f"The detector finds: {explanation}\nTokens:\n"


Slots = OwnSlots | OpenAIWording


def slots_named(name: Prompts) -> Slots:
    """`own`, or `openai` from the package that has it. Raises UserError when it is not installed."""
    return OwnSlots() if name == "own" else OpenAIWording.load()


class AllAtOnce:
    """OpenAI's protocol: a value in the slot after every token of a window, all in one forward pass.

    expected value = sum of v P(v) / sum of P(v) over the values v = 0..10. P(10) is that of its whole spelling, also
    where the tokenizer splits it; then P(1) is that of a 1 with no 0 after it. `quirks` reads like the reference code.
    """

    def __init__(
        self, llm: LanguageModel, vocabulary: Sequence[str], batch: int, slots: Slots, quirks: bool = False
    ) -> None:
        self._llm, self._batch, self._vocabulary, self._slots = llm, batch, vocabulary, slots
        self._read = TopFive(llm) if quirks else AllValues(llm)
        self._prefix = slots.slots_prefix(llm)

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> AllAtOnce:
        return cls(llm(), vocabulary, config.llm.llm_batch, slots_named(config.prompts), config.reference_quirks)

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        version = slots_named(config.prompts).slots_version
        return {"prompt": version, "scale": "0-10", "reference_quirks": config.reference_quirks}

    def plan(self, texts: Sequence[str]) -> None:
        """Nothing to share between texts: every window is its own prompt."""

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        asked = [
            self._slots.slot_prompt(self._llm, text, [self._vocabulary[token] for token in window.tokens])
            for window in windows
        ]
        if any(len(item.slots) != len(window.tokens) for item, window in zip(asked, windows, strict=True)):
            raise AssertionError("a slot for every token")
        found = []
        for start in range(0, len(asked), self._batch):
            chunk = asked[start : start + self._batch]
            ids, slots = [item.ids for item in chunk], [item.slots for item in chunk]
            found += self._llm.slot_logprobs(self._prefix, ids, slots, self._read.choices)
        return [self._read(logprobs) for logprobs in found]


def value_choices(llm: LanguageModel) -> list[list[int]]:
    """How the tokenizer spells each of the values 0..10."""
    return [llm.encode(str(value)) for value in range(LEVELS + 1)]


class AllValues:
    """Reads the expected value off the log-probabilities of all values 0..10."""

    def __init__(self, llm: LanguageModel) -> None:
        self.choices = value_choices(llm)
        self._split = len(self.choices[-1]) > 1

    def __call__(self, logprobs: Float[np.ndarray, "w choices"]) -> Float[np.ndarray, " w"]:
        return expected_value(logprobs, self._split)


def expected_value(logprobs: Float[np.ndarray, "w values"], split: bool = False) -> Float[np.ndarray, " w"]:
    """Mean of the values 0..10 weighted by their probabilities; `split`: what is given for 1 may go on to be a 10.

    NaN where no value has a probability (a server names the likeliest tokens only).
    """
    with np.errstate(invalid="ignore"):
        weights = np.exp(logprobs - logprobs.max(1, keepdims=True))
    if split:
        weights[:, 1] = np.maximum(weights[:, 1] - weights[:, -1], 0)
    return (weights @ np.arange(weights.shape[1])) / weights.sum(1)


class TopFive:
    """Reads as the reference code does: only values among the five likeliest tokens, and 10 as 1 where it is split."""

    def __init__(self, llm: LanguageModel) -> None:
        self.choices = range(llm.next_logprobs([], [llm.encode("0")]).shape[1])
        values = value_choices(llm)
        self._columns = [ids[0] for ids in values if len(ids) == 1]

    def __call__(self, logprobs: Float[np.ndarray, "w vocab"]) -> Float[np.ndarray, " w"]:
        fifth = np.partition(logprobs, -5, axis=1)[:, -5:].min(1, keepdims=True)
        weights = np.where(logprobs >= fifth, np.exp(logprobs), 0)[:, self._columns]
        return (weights @ np.arange(len(self._columns))) / np.maximum(weights.sum(1), 1e-30)

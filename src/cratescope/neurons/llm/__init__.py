"""The one seam to a language model: what explaining and simulating ask of it, and how to open one.

Everything goes by token ids, so that what stands where in a prompt is known by construction. A prompt is a *prefix*
shared by many calls (instructions and examples, computed once) and what is new after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from cratescope.config import LLMConfig
from cratescope.hardware import pick_device, pick_dtype

Ids = Sequence[int]


@runtime_checkable
class LanguageModel(Protocol):
    """What the stages need: `explain` generate; `all-at-once` slot_logprobs; `list-pmi` next_logprobs; all need encode.

    The same call gives the same answer, to the last bit, on the same machine. A batch is what one call is given, so a
    caller that wants the same bytes again makes the same calls again.
    """

    @property
    def name(self) -> str:
        """What result files call this model."""

    @property
    def dtype(self) -> str:
        """Number format of the weights, part of a result's identity."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands in the middle of a prompt: no special tokens, no space put before it."""

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        """Greedy continuation of prefix + prompt for every prompt, cut before `stop` or the end-of-text token."""

    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        """Natural log of P(next token | prefix + prompt) over the whole vocabulary."""

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Ids
    ) -> list[Float[np.ndarray, "slots choices"]]:
        """log P(choice | prefix + the prompt before the slot): `slots` are positions in the prompt, never 0."""


@functools.lru_cache(maxsize=1)
def open_llm(config: LLMConfig) -> LanguageModel:
    """Open the model named by `config.llm`; the last one opened is kept. Raises UserError when it cannot be loaded."""
    from cratescope.neurons.llm.local import LocalLLM

    return LocalLLM.open(config)


def llm_identity(config: LLMConfig, llm: LanguageModel | None) -> dict[str, str]:
    """What a result says of the model it was made with; known without opening it."""
    if llm is not None:
        return {"llm": llm.name, "dtype": llm.dtype}
    dtype = pick_dtype(config.llm_dtype, pick_device(config.llm_device))
    return {"llm": config.llm, "dtype": str(dtype).removeprefix("torch.")}

"""The one seam to a language model: what explaining and simulating ask of it, and how to open one.

Everything goes by token ids, so that what stands where in a prompt is known by construction. A prompt is a *prefix*
shared by many calls (instructions and examples, computed once) and what is new after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from cratescope.config import LLMConfig
from cratescope.hardware import pick_device, pick_dtype
from cratescope.run import UserError

Ids = Sequence[int]
Choices = Sequence[int] | Sequence[Sequence[int]]
"""What might stand in a slot: tokens, or sequences of tokens (a "10" that the tokenizer splits)."""


@dataclass(frozen=True)
class NoAnswer:
    """Why a server has no text for a prompt, and what helps if it has none for any."""

    reason: str
    fix: str


class RefusedError(UserError):
    """The server refuses prompts that were asked; others may be answered. `answers` says why, one a prompt."""

    def __init__(self, message: str, answers: Sequence[NoAnswer]) -> None:
        super().__init__(message)
        self.answers = answers


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

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> Sequence[str | NoAnswer]:
        """Greedy continuation of prefix + prompt for every prompt, cut before `stop` or the end-of-text token.

        Raises:
            RefusedError: the model is a server, which refuses all of the prompts.
        """

    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        """Natural log of P(next token | prefix + prompt) over the whole vocabulary.

        Raises:
            UserError: the model is a server, which tells of the likeliest tokens only.
        """

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        """log P(choice | prefix + the prompt before the slot); of all its tokens, for a choice that is a sequence.

        slots: positions in the prompt from 1 (a token of the prompt stands before it) to its length (the next token).
        A server names the likeliest tokens only: a choice that is not among them has -inf, and so may all of a slot.

        Raises:
            RefusedError: the model is a server, which refuses one of the prompts.
        """


def spelled(choices: Choices) -> list[tuple[int, ...]]:
    """Every choice as a sequence of tokens."""
    return [tuple(ids) if isinstance(ids, Sequence) else (int(ids),) for ids in choices]


def heads(choices: Choices) -> list[tuple[int, ...]]:
    """Every beginning of a choice that another token of it follows; the empty one is the first."""
    return sorted({ids[:end] for ids in spelled(choices) for end in range(len(ids))})


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` in the middle of a prompt, as `LanguageModel.encode` has to give them."""
    # A SentencePiece tokenizer puts a space before any text; behind a newline it does not reach ours.
    newline = _newline(tokenizer)
    behind = _plain_ids(tokenizer, "\n" + text) if newline else []
    if behind and behind[: len(newline)] == newline:
        return behind[len(newline) :]
    return _plain_ids(tokenizer, text)


@functools.lru_cache
def _newline(tokenizer: Any) -> list[int]:
    """The newline, for a tokenizer that puts a space before a text."""
    spaced = tokenizer.convert_ids_to_tokens(_plain_ids(tokenizer, "x"))[0] != "x"
    return _plain_ids(tokenizer, "\n") if spaced else []


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    # Text of the corpus may hold a special token's name; in a prompt it is ordinary text.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def check_slots(prompts: Sequence[Ids], slots: Sequence[Ids]) -> None:
    """Raises ValueError for a slot that is not in its prompt, or has nothing of it before itself."""
    if any(not 1 <= slot <= len(prompt) for prompt, row in zip(prompts, slots, strict=True) for slot in row):
        raise ValueError("a slot must have a token of its own prompt before it")


@functools.lru_cache(maxsize=1)
def open_llm(config: LLMConfig) -> LanguageModel:
    """Open the model named by `config.llm`; the last one opened is kept. Raises UserError when it cannot be loaded."""
    if config.served:
        from cratescope.neurons.llm.server import ServerLLM

        return ServerLLM.open(config)
    from cratescope.neurons.llm.local import LocalLLM

    return LocalLLM.open(config)


def llm_identity(config: LLMConfig, llm: LanguageModel | None) -> dict[str, str]:
    """What a result says of the model it was made with; known without opening it."""
    if llm is not None:
        return {"llm": llm.name, "dtype": llm.dtype}
    if config.served or config.llm_quantize != "none":
        return {"llm": config.llm_name, "dtype": "served" if config.served else config.llm_quantize}
    dtype = pick_dtype(config.llm_dtype, pick_device(config.llm_device))
    return {"llm": config.llm_name, "dtype": str(dtype).removeprefix("torch.")}

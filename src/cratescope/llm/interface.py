"""The single interface to a language model: what explaining and simulating need from it, and how to open one.

Everything works on token ids, so that positions in a prompt are known by construction. A prompt is a *prefix*
shared by many calls (instructions and examples, computed once) and the new part after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from cratescope.errors import UserError

Ids = Sequence[int]
Choices = Sequence[int] | Sequence[Sequence[int]]
"""Candidates for a slot: tokens, or sequences of tokens (a "10" that the tokenizer splits)."""


@dataclass(frozen=True)
class NoAnswer:
    """The reason why a server has no text for a prompt, and the fix if it has none for any."""

    reason: str
    fix: str


class RefusedError(UserError):
    """Raised when a server refuses prompts; it may answer others. `answers` holds one reason per prompt."""

    def __init__(self, message: str, answers: Sequence[NoAnswer]) -> None:
        super().__init__(message)
        self.answers = answers


@runtime_checkable
class LanguageModel(Protocol):
    """The model interface: `explain` uses generate, `all-at-once` slot_logprobs, `list-pmi` next_logprobs, all encode.

    The same call gives the same answer, to the last bit, on the same machine. A batch is the input of one call, so a
    caller that wants the same bytes again has to repeat the same calls.
    """

    @property
    def name(self) -> str:
        """Name of this model in result files."""

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
            UserError: the model is a server, which returns only the likeliest tokens.
        """

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        """log P(choice | prefix + the prompt before the slot); of all its tokens, for a choice that is a sequence.

        slots: positions in the prompt from 1 (a token of the prompt stands before it) to its length (the next token).
        A server returns only the likeliest tokens: a choice not among them gets -inf, possibly all choices of a slot.

        Raises:
            RefusedError: the model is a server, which refuses one of the prompts.
        """


def spelled(choices: Choices) -> list[tuple[int, ...]]:
    """Spell every choice as a sequence of tokens."""
    return [tuple(ids) if isinstance(ids, Sequence) else (int(ids),) for ids in choices]


def heads(choices: Choices) -> list[tuple[int, ...]]:
    """Every proper beginning of a choice; the empty one comes first."""
    return sorted({ids[:end] for ids in spelled(choices) for end in range(len(ids))})


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encode `text` for the middle of a prompt, as `LanguageModel.encode` must."""
    # A SentencePiece tokenizer puts a space before any text; a newline in between keeps it away from ours.
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
    # Corpus text may contain a special token's name; in a prompt it is ordinary text.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def check_slots(prompts: Sequence[Ids], slots: Sequence[Ids]) -> None:
    """Raise ValueError for a slot outside its prompt, or at its very start."""
    if any(not 1 <= slot <= len(prompt) for prompt, row in zip(prompts, slots, strict=True) for slot in row):
        raise ValueError("a slot must have a token of its own prompt before it")

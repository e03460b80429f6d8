"""Prompts with a slot for every token of a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cratescope.llm.interface import LanguageModel


@dataclass(frozen=True)
class SlotPrompt:
    """Token ids of one window to fill in, and the positions in them where a value belongs, one per token."""

    ids: list[int]
    slots: list[int]


def fill_in(llm: LanguageModel, head: str, tokens: Sequence[str], known: Sequence[str | None] = ()) -> SlotPrompt:
    """`head` and a line `token<TAB>unknown` for every token (or a known value), put together piece by piece.

    No tokenizer sees more than one piece at a time, so the slot of a token is where its piece was put, however the
    tokenizer splits or merges.
    """
    tab, unknown, end = llm.encode("\t"), llm.encode("unknown"), llm.encode("\n")
    ids = llm.encode(head)
    slots = []
    for token, value in zip(tokens, known or [None] * len(tokens), strict=True):
        ids += llm.encode(token) + tab
        slots.append(len(ids))
        ids += (unknown if value is None else llm.encode(value)) + end
    return SlotPrompt(ids, slots)

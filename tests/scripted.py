"""A scripted language model, for running the stages without weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from cratescope.llm.interface import Choices, Ids, heads, spelled

_PIECE = re.compile(r" ?\w+|\s|[^\w\s]")


class ScriptedLLM:
    """Model that answers by two functions of the prompt's text (without the shared prefix) and records its prompts.

    answer: the text written after a prompt. logit: of a token's text after a prompt; log-probabilities are its
    log-softmax over the vocabulary. Tokens are words (with the space before them) and single other characters, so "10"
    is one token; ids are given in the order in which pieces are first seen, and an id not yet given has logit 0.
    """

    name = "scripted"
    dtype = "float32"

    def __init__(
        self,
        answer: Callable[[str], str] = lambda _prompt: "",
        logit: Callable[[str, str], float] = lambda _prompt, _token: 0.0,
        vocab_size: int = 4096,
    ) -> None:
        self._answer, self._logit = answer, logit
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}
        self._vocab_size = vocab_size
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in _PIECE.findall(text)]

    def decode(self, ids: Ids) -> str:
        return "".join(self._pieces[index] for index in ids)

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        answers = [self._answer(text).split(stop)[0] for text in self._texts(prompts)]
        return [self.decode(self.encode(answer)[:max_new_tokens]) for answer in answers]

    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        return np.stack([self._logprobs(text) for text in self._texts(prompts)])

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        self._texts(prompts)
        rows = zip(prompts, slots, strict=True)
        return [np.array([self._slot(list(ids[:slot]), choices) for slot in row]) for ids, row in rows]

    def _slot(self, ids: list[int], choices: Choices) -> list[float]:
        after = {head: self._logprobs(self.decode([*ids, *head])) for head in heads(choices)}
        return [sum(after[choice[:step]][token] for step, token in enumerate(choice)) for choice in spelled(choices)]

    def _texts(self, prompts: Sequence[Ids]) -> list[str]:
        texts = [self.decode(ids) for ids in prompts]
        self.asked += texts
        return texts

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            if len(self._pieces) == self._vocab_size:
                raise ValueError(f"more than {self._vocab_size} different pieces of text: give a larger vocab_size")
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]

    def _logprobs(self, text: str) -> Float[np.ndarray, " vocab"]:
        logits = np.zeros(self._vocab_size)
        logits[: len(self._pieces)] = [self._logit(text, piece) for piece in self._pieces]
        return logits - np.logaddexp.reduce(logits)

"""list-pmi: what the LLM would list for an explanation, whatever stands around a word. The prompt is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratescope.explain.config import SimulateConfig
from cratescope.explain.shown import UNREADABLE, whole_word
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window

VERSION = "list-2"
"""Of the prompt: whoever changes it changes this."""
ITEMS = 3
"""The distributions of this many list items are averaged, the first ones written greedily."""
THRESHOLD = 1.5
"""Nats above the generic list below which a token counts as not meant."""
SMALLEST = 1e-5
"""Probabilities below this are as good as none, so that rare words are not meant by chance."""
BULLET = "\n-"
"""Begins an item of the list: no word and no sign that could be an item."""
EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words about food", ("bread", "cheese", "soup", "apples", "dinner", "rice")),
    ('the word "of"', ("of", "of", "of", "of")),
    ("words about the weather", ("rain", "storm", "cloudy", "sunshine", "wind", "snow")),
    ("punctuation at the end of a sentence", (".", "!", ".", "?", ".")),
    ("names of cities", ("London", "Chicago", "Tokyo", "Rome", "Vienna", "Lima")),
    ("verbs in the past tense", ("went", "walked", "took", "opened", "fell", "built")),
    ("numbers", ("7", "40", "three", "250", "12", "hundred")),
    ("endings of words", ("ing", "ed", "tion", "ly", "ness", "er")),
)
GENERIC_EXPLANATIONS = (
    "words",
    "common words",
    "many different words",
    "words in a text",
    "nouns",
    "verbs",
    "adjectives",
    "names",
    "words about people",
    "words about places and things",
    "words about science and technology",
    "words about time",
    "parts of words",
    "punctuation",
)
"""What a list is like whatever is looked for: the mean over these is subtracted."""


def list_prompt(explanation: str, words: Sequence[str] = ()) -> str:
    """One entry of the prompt, open where the first word belongs when there are no words yet."""
    items = "".join(f"{BULLET} {word}" for word in words)
    return f"The detector finds: {explanation}\nWords:" + (f"{items}\n\n" if words else BULLET)


def list_prefix() -> str:
    return "".join(list_prompt(explanation, words) for explanation, words in EXAMPLES)


def list_items(word: str) -> list[str]:
    """How a word, or each sign of a run of punctuation, stands in the list; nothing for what is no text."""
    text = word.strip()
    if not text or UNREADABLE in text:
        return []
    return [f" {text}"] if any(map(str.isalnum, text)) else [f" {sign}" for sign in text if not sign.isspace()]


class ListPMI:
    """A value for every word from what the LLM would list for an explanation, whatever stands around the word.

    value(word) = relu(log P(word | explanation) - mean over generic explanations of log P(word) - 1.5), P being the
    mean over the first three list items and 1e-5. A token has the value of the whole word it is part of, a word that of
    the first LLM token of its list item, a run of punctuation that of its likeliest sign.
    """

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._prefix = llm.encode(list_prefix())
        self._bullet = llm.encode(BULLET)
        self._known: dict[str, list[int]] = {}
        # The texts of one neuron are asked for on the same windows, one after the other.
        self._spelled: tuple[list[bytes], list[tuple[np.ndarray, np.ndarray]]] = ([], [])
        self._texts: list[str] = []
        self._places: dict[str, int] = {}
        # Nearly all values of a text are 0, and a layer may have a hundred thousand texts: what is not, and where.
        self._values: dict[str, tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]] = {}
        self._generic = self._list_logprobs(GENERIC_EXPLANATIONS).mean(0)

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> ListPMI:
        return cls(llm(), vocabulary, config.llm.llm_batch)

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        return {"prompt": VERSION, "scale": "nats", "items": ITEMS, "threshold": THRESHOLD, "smallest": SMALLEST}

    def plan(self, texts: Sequence[str]) -> None:
        self._texts, self._values = list(dict.fromkeys(texts)), {}
        self._places = {text: place for place, text in enumerate(self._texts)}

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        if text not in self._values:
            start = self._places[text] // self._batch * self._batch
            chunk = self._texts[start : start + self._batch]
            for one, values in zip(chunk, self._list_logprobs(chunk) - self._generic - THRESHOLD, strict=True):
                (there,) = np.nonzero(~(values <= 0))  # NaN too, which is reported
                self._values[one] = there, values[there]
        if self._spelled[0] != (ids := tokens_of(windows)):
            self._spelled = ids, [self._columns(window) for window in windows]
        table = np.zeros(len(self._generic) + 1)
        there, values = self._values[text]
        table[there] = values
        return [np.maximum.reduceat(table[columns], starts) for columns, starts in self._spelled[1]]

    def _columns(self, window: Window) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " w"]]:
        """The LLM tokens that the tokens of a window may stand for, end to end, and where those of each token start.

        What is no text stands for the last column, of zeros.
        """
        tokens = [self._vocabulary[token] for token in window.tokens.tolist()]
        found = [self._items(whole_word(tokens, place)) for place in range(len(tokens))]
        starts = np.cumsum([0, *map(len, found[:-1])])
        return np.array([column for columns in found for column in columns]), starts

    def _items(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [self._llm.encode(item)[0] for item in list_items(word)] or [-1]
        return self._known[word]

    def _list_logprobs(self, texts: Sequence[str]) -> Float[np.ndarray, "n vocab"]:
        """log of SMALLEST + the mean over list items of P(token is the next item)."""
        asked = [self._llm.encode(list_prompt(text)) for text in texts]
        found = []
        for _ in range(ITEMS):
            logprobs = self._llm.next_logprobs(self._prefix, asked)
            found.append(logprobs)
            best = logprobs.argmax(1).tolist()
            asked = [[*ids, token, *self._bullet] for ids, token in zip(asked, best, strict=True)]
        mean = np.logaddexp.reduce(found, axis=0) - np.log(ITEMS)
        return np.logaddexp(mean, np.log(SMALLEST))


def tokens_of(windows: Sequence[Window]) -> list[bytes]:
    """Tells windows apart by their text: those of two neurons that were imported may have the same key."""
    return [window.tokens.tobytes() for window in windows]

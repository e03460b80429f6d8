"""list-pmi: what the LLM would list for an explanation, and what the explanation says to the letter and of places.

The prompt is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratescope.explain.config import SimulateConfig
from cratescope.explain.shown import UNREADABLE, whole_word
from cratescope.explain.simulators import readings
from cratescope.explain.simulators.reader import Reader
from cratescope.explain.simulators.readings import Listed, Reading, lists
from cratescope.explain.terms.features import Features, Lexicon
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.texts import Texts, Vocabulary
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
MOST = float(-np.log(SMALLEST) - THRESHOLD)
"""What a list could say at most, of a word that is all of it and in no generic list: the value of what is literal."""
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


Key = list[tuple[bytes, bool]]


class ListPMI:
    """A value for every word from what the LLM would list for an explanation; places and what is literal are read.

    value(word) = relu(log P(word | explanation) - mean over generic explanations of log P(word) - 1.5), P being the
    mean over the first three list items and 1e-5. A token has the value of the whole word it is part of, a word that of
    the first LLM token of its list item, a run of punctuation that of its likeliest sign. What is said to the letter,
    or of a place, is not asked of the LLM (`readings`, `Reader`).
    """

    def __init__(self, llm: LanguageModel, vocabulary: Sequence[str], batch: int) -> None:
        self._llm, self._batch, self._vocabulary = llm, batch, vocabulary
        self._prefix = llm.encode(list_prefix())
        self._bullet = llm.encode(BULLET)
        self._known: dict[str, list[int]] = {}
        self._lexicon = Lexicon(load_language())
        # Not `Vocabulary.of`: a tokenizer without words has lists as well.
        self._words = Vocabulary((*vocabulary, ""))
        # The texts of one neuron are asked for on the same windows, one after the other.
        self._spelled: tuple[Key, list[tuple[np.ndarray, np.ndarray]]] = ([], [])
        self._features: tuple[Key, Features] | None = None
        self._readings: dict[str, Reading] = {}
        self._phrases: list[str] = []
        self._places: dict[str, int] = {}
        # Nearly all values of a text are 0, and a layer may have a hundred thousand texts: what is not, and where.
        self._values: dict[str, tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]] = {}
        self._generic = self._list_logprobs(GENERIC_EXPLANATIONS).mean(0)

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> ListPMI:
        return cls(llm(), vocabulary, config.llm.llm_batch)

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        read = {"version": readings.VERSION} | load_language().identity
        lists = {"scale": "nats", "items": ITEMS, "threshold": THRESHOLD, "smallest": SMALLEST}
        return {"prompt": VERSION, "readings": read} | lists

    def plan(self, texts: Sequence[str]) -> None:
        self._readings = {text: readings.read(text, self._lexicon.language) for text in texts}
        self._phrases = list(dict.fromkeys(phrase for one in self._readings.values() for phrase in lists(one)))
        self._places, self._values = {phrase: place for place, phrase in enumerate(self._phrases)}, {}

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        reading = self._readings[text]
        if isinstance(reading, Listed):
            return self._listed(reading.phrase, windows)
        if not windows:
            return []
        features = self._features_of(windows)
        reader = Reader(features, lambda phrase: np.concatenate(self._listed(phrase, windows)), MOST)
        values, bounds = reader(reading), features.texts.bounds
        return [values[start:end] for start, end in itertools.pairwise(bounds)]

    def _features_of(self, windows: Sequence[Window]) -> Features:
        key = key_of(windows)
        if self._features is None or self._features[0] != key:
            self._features = key, Features(Texts.of(windows, self._words), self._lexicon)
        return self._features[1]

    def _listed(self, phrase: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        """The values of what the LLM would list for a phrase."""
        if phrase not in self._values:
            start = self._places[phrase] // self._batch * self._batch
            chunk = self._phrases[start : start + self._batch]
            for one, values in zip(chunk, self._list_logprobs(chunk) - self._generic - THRESHOLD, strict=True):
                (there,) = np.nonzero(~(values <= 0))  # NaN too, which is reported
                self._values[one] = there, values[there]
        if self._spelled[0] != (key := key_of(windows)):
            self._spelled = key, [self._columns(window) for window in windows]
        table = np.zeros(len(self._generic) + 1)
        there, values = self._values[phrase]
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


def key_of(windows: Sequence[Window]) -> Key:
    """Tells windows apart by their text: those of two neurons that were imported may have the same place."""
    return [(window.tokens.tobytes(), window.start == 0) for window in windows]

"""Predict activations from the text of an explanation and the tokens, and from nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.explain.config import SimulateConfig
from cratescope.explain.simulators import UnreadableError
from cratescope.explain.terms.features import Features, Lexicon
from cratescope.explain.terms.language import load_language
from cratescope.explain.terms.phrases import Terms, Unreadable, read
from cratescope.explain.terms.texts import Texts, Vocabulary
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window

VERSION = 2
"""Of what a text predicts: raise it when the same text and tokens give other numbers."""


class TermsSimulator:
    """The weighted sum of the terms' values on each token; it may be negative.

    The windows of the last call are kept: the texts of one neuron are asked for on the same ones, one after another.
    """

    def __init__(self, vocabulary: Vocabulary, lexicon: Lexicon) -> None:
        self._vocabulary, self._lexicon = vocabulary, lexicon
        self._features: tuple[list[tuple[bytes, bool]], Features] | None = None

    @classmethod
    def open(
        cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]
    ) -> TermsSimulator:
        """It asks no `llm`. Raises UserError when the vocabulary has hardly a word, or the language is not valid."""
        return cls(Vocabulary.of(vocabulary), Lexicon(load_language(config.language)))

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        return {"prediction": VERSION} | load_language(config.language).identity

    def plan(self, texts: Sequence[str]) -> None:
        """Each text is read by itself."""

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        """A value for every token of every window. Raises UnreadableError for a text that is not in the language."""
        terms = read(text, self._lexicon.language)
        if isinstance(terms, Unreadable):
            raise UnreadableError(terms.reason)
        features = self._of(windows)
        values, bounds = predict(terms, features), features.texts.bounds
        return [values[start:end] for start, end in itertools.pairwise(bounds)]

    def _of(self, windows: Sequence[Window]) -> Features:
        key = [(window.tokens.tobytes(), window.start == 0) for window in windows]
        if self._features is None or self._features[0] != key:
            self._features = key, Features(Texts.of(windows, self._vocabulary), self._lexicon)
        return self._features[1]


def predict(terms: Terms, features: Features) -> Float[np.ndarray, " n"]:
    """The value of an explanation on every token."""
    total = np.zeros(len(features.texts.tokens))
    for term in terms:
        total += term.weight * features.value(term)
    return total

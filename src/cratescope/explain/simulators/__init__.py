"""Simulators: how the activations of a neuron are predicted from a text. One per module, with its prompt and constants.

A new one is a module here and a line in the table `SIMULATORS` of `cratescope.explain.config`. The one that needs no
language model is with its explainer, in `cratescope.explain.terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from cratescope.explain.config import SIMULATORS, SimulateConfig, load
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window


class UnreadableError(Exception):
    """A simulator cannot read a text; `reason` says why, for tables."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@runtime_checkable
class Simulator(Protocol):
    """Predicts activations from a text."""

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> Simulator:
        """Make one by the settings.

        vocabulary: the text of every token of the neurons' model. llm: opens the language model, for those that ask it.
        """

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        """What decides its values besides texts, windows and language model: versions of prompts, constants."""

    def plan(self, texts: Sequence[str]) -> None:
        """Say which texts may be asked for; whatever is computed for several texts at once goes by this order."""

    def __call__(self, text: str, windows: Sequence[Window]) -> list[Float[np.ndarray, " w"]]:
        """A value for every token of every window, on any scale; NaN where there is none.

        Raises:
            RefusedError: a server refuses the prompts.
            UnreadableError: the text is none that it can simulate.
        """


def simulator_named(name: str) -> type[Simulator]:
    """The class behind a name of the table."""
    found: type[Simulator] = load(SIMULATORS[name].place)
    return found

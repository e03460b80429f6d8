"""Controls: what a neuron is simulated from besides its own explanation, so that a score can be judged by its gain.

A new control is one more entry of `EVERY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from cratescope.explain.shown import display
from cratescope.neurons.records import Window

OWN = "own"
"""The neuron's own explanation, which all controls are compared with."""
SHUFFLED = "shuffled"
EMPTY_EXPLANATION = "some tokens of a text"
"""The fixed control: it has the form of an explanation and says nothing."""
UNIGRAM_SHOWN = 8
"""How many tokens the text of the unigram control lists."""


@dataclass(frozen=True)
class Material:
    """What the texts of a neuron are made from.

    own: its explanation, and other: another neuron's; empty where there is none. means: the mean activation of each
    token id in the windows explained from. vocabulary: the text of every token id.
    """

    own: str
    other: str
    means: Mapping[int, float] = field(default_factory=dict)
    vocabulary: Sequence[str] = ()


@dataclass(frozen=True)
class Control:
    """One way to predict a neuron.

    text: what is simulated, or says what stands in its place; None where the neuron cannot have it.
    values: takes the place of a simulation. judged: whether an LLM judges the text as well.
    """

    text: Callable[[Material], str | None]
    values: Callable[[Material, Window], Float[np.ndarray, " w"]] | None = None
    judged: bool = False


def shuffled_texts(texts: Sequence[str]) -> list[str]:
    """For every explanation the nearest different one before it, wrapping around: another neuron's, never its own text.

    The order is the random one in which neurons were drawn, so this is a seeded pairing that needs no draw of its own.
    Empty for a neuron without an explanation, and where the whole layer has one text only.
    """
    found, last, other = [], "", ""
    for text in (*texts, *texts):
        found.append("" if not text else last if last != text else other)
        if text and text != last:
            last, other = text, last
    return found[len(texts) :]


def token_means(windows: Sequence[Window]) -> dict[int, float]:
    """Mean activation of every token id in the windows."""
    if not windows:
        return {}
    tokens, places = np.unique(np.concatenate([window.tokens for window in windows]), return_inverse=True)
    activations = np.concatenate([window.activations for window in windows]).astype(np.float64)
    means = np.bincount(places, activations) / np.bincount(places)
    return dict(zip(tokens.tolist(), means.tolist(), strict=True))


def unigram_text(material: Material) -> str | None:
    """The tokens of the highest means, the highest first; None where there are no means."""
    best = sorted((-mean, token) for token, mean in material.means.items() if mean > 0)[:UNIGRAM_SHOWN]
    return " ".join(display(material.vocabulary[token]).strip() for _, token in best) if material.means else None


def unigram_values(material: Material, window: Window) -> Float[np.ndarray, " w"]:
    return np.array([material.means.get(token, 0.0) for token in window.tokens.tolist()])


EVERY: dict[str, Control] = {
    OWN: Control(lambda material: material.own or None, judged=True),
    SHUFFLED: Control(lambda material: material.other or None, judged=True),
    "empty": Control(lambda material: EMPTY_EXPLANATION if material.own else None),
    "unigram": Control(unigram_text, unigram_values),
}
"""By name; texts are simulated in this order."""
CONTROLS = tuple(name for name in EVERY if name != OWN)
SIMULATED = frozenset(name for name, control in EVERY.items() if control.values is None)
JUDGED = frozenset(name for name, control in EVERY.items() if control.judged)


def texts_of(material: Material) -> dict[str, str]:
    """The text of every control that the neuron can have."""
    found = {name: control.text(material) for name, control in EVERY.items()}
    return {name: text for name, text in found.items() if text is not None}


def planned(materials: Sequence[Material]) -> list[str]:
    """Every text that may be simulated, in an order that does not depend on which neurons are finished."""
    texts = [texts_of(material) for material in materials]
    own = [found[OWN] for found in texts if OWN in found]
    rest = [text for found in texts for name, text in found.items() if name in SIMULATED]
    return list(dict.fromkeys([EMPTY_EXPLANATION, *own, *rest]))

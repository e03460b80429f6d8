"""A neuron as HTML: the card of the report's page and of a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from cratescope.explain.controls import OWN, SHUFFLED
from cratescope.explain.explained import Simulation
from cratescope.neurons.records import NeuronId, NeuronRecord, Window
from cratescope.report import text
from cratescope.report.text import Decode, visible
from cratescope.results.neuron import Neuron, Said, source_of
from cratescope.score.scores import Score
from cratescope.text.tokenizer import token_strings

TOP_EXCERPTS = 3
RANDOM_EXCERPTS = 1
SCORED_EXCERPTS = 3  # of the top and of the random ones each
HISTOGRAM_BINS = 32


@dataclass(frozen=True)
class Excerpt:
    """A window of text as HTML, with a label that says where it is from."""

    label: str
    title: str
    text: Markup


@dataclass(frozen=True)
class Entry:
    """One explanation of a neuron on the card, with the windows it was scored on.

    scores: of each protocol, by its own measure, of its controls, and by the measures beside it.
    """

    source: str
    text: str
    scores: list[tuple[Score, dict[str, Score], list[Score]]]
    scored: list[Excerpt]
    shuffled: str | None


@dataclass(frozen=True)
class Card:
    """One neuron as the page shows it."""

    neuron: NeuronId
    rank: int | None
    said: list[Entry]
    density: float | None
    maximum: float | None
    histogram: str
    excerpts: list[Excerpt]


def card_html(neuron: Neuron) -> str:
    """The card of a notebook: the same as the report's, with its style."""
    tokenizer = neuron.run.tokenizer
    card = page_card(neuron, lambda ids: token_strings(tokenizer, ids))
    return page_environment().get_template("notebook.html").render(neuron=neuron, card=card)


def page_environment() -> Environment:
    """Environment of the templates in this folder, which escapes everything they insert."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": text.number, "percent": text.percent, "visible": visible}
    return environment


def page_card(neuron: Neuron, decode: Decode, rank: int | None = None) -> Card:
    """A neuron with all that was said of it; `decode` gives the texts of token ids."""
    record = neuron.record
    labelled = [(f"top {place}", window) for place, window in enumerate(record.top[:TOP_EXCERPTS], 1)]
    labelled += [("random", window) for window in record.random[:RANDOM_EXCERPTS]]
    peak = record.moments.maximum
    return Card(
        neuron=neuron.id,
        rank=rank,
        said=[_entry(said, source_of(said, neuron.said), record, decode) for said in neuron.said]
        or [Entry("", "not explained", [], [], None)],
        density=record.density,
        maximum=peak,
        histogram=text.sparkline(record.histogram, peak, HISTOGRAM_BINS) if record.histogram else "",
        excerpts=[
            Excerpt(label, _place(window), highlight(decode(window.tokens.tolist()), window.activations, peak))
            for label, window in labelled
        ],
    )


def _entry(said: Said, source: str, record: NeuronRecord, decode: Decode) -> Entry:
    simulation = said.simulation
    return Entry(
        source=source,
        text=said.shown,
        scores=[(own, controls, said.beside(own)) for own, controls in said.scored(record.neuron)],
        scored=list(_compared(record, simulation, decode)) if simulation else [],
        shuffled=simulation.texts.get(SHUFFLED) if simulation else None,
    )


def _compared(record: NeuronRecord, simulation: Simulation, decode: Decode) -> Iterator[Excerpt]:
    """Scoring records with the truth and the simulation, each relative to its own largest value on these records."""
    windows = {window.key: ("top", window) for window in record.top}
    windows |= {window.key: ("random", window) for window in record.random}
    expected = dict(zip(simulation.keys, simulation.expected.get(OWN, ()), strict=False))
    found = [(*windows[key], expected[key]) for key in expected if key in windows]
    peak = max((float(window.activations.max()) for _, window, _ in found), default=0.0)
    height = max((max(row) for *_, row in found), default=0.0)
    for kind in ("top", "random"):
        for label, window, row in [entry for entry in found if entry[0] == kind][:SCORED_EXCERPTS]:
            marked = highlight(decode(window.tokens.tolist()), window.activations, peak, row, height)
            yield Excerpt(label, _place(window), marked)


def _place(window: Window) -> str:
    return f"excerpt {window.excerpt}, token {window.start}; highest activation {window.activations.max():.3g}"


def highlight(
    tokens: Sequence[str],
    activations: Float[np.ndarray, " w"],
    peak: float,
    simulated: Sequence[float] | None = None,
    height: float = 1.0,
) -> Markup:
    """The tokens in order, shaded by activation / peak, and underlined by simulated / height; numbers as tooltips.

    Tokens with nothing to show are <i>, so that a page of silent tokens stays light.
    """
    parts = []
    for place, (token, truth) in enumerate(zip(tokens, activations.tolist(), strict=True)):
        guess = None if simulated is None else simulated[place]
        shades = {"a": _shade(truth, peak), "s": _shade(guess, height)}
        style = ";".join(f"--{name}:{shade}" for name, shade in shades.items() if shade)
        title = f"{truth:.3g}" if guess is None else f"true {truth:.3g}, simulated {guess:.3g}"
        shown = escape(visible(token))
        parts.append(f'<b style="{style}" title="{title}">{shown}</b>' if style else f"<i>{shown}</i>")
    return Markup("".join(parts))


def _shade(value: float | None, full: float) -> str:
    """value / full as CSS opacity with two digits; empty when it would not be seen."""
    if value is None or not math.isfinite(value) or full <= 0 or value / full < 0.005:
        return ""
    return f"{min(value / full, 1):.2f}".removeprefix("0").removesuffix("0")

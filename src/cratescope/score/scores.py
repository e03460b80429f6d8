"""Scores, and the tables they are kept in (docs/records.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cratescope.neurons.kept import Kept, item_of, row_of, schema
from cratescope.neurons.records import NeuronId
from cratescope.parts import Tables


@dataclass(frozen=True)
class Score:
    """How well a neuron's simulation, or an LLM's judgements of windows, agree with the truth by one measure.

    protocol: of a simulation, or the scorer. set: the explanation set that was scored. control: "own" for the neuron's
    own explanation, else as in Simulation.
    value: None where there is none, for `reason`. n: tokens, or windows judged, that it was measured on.
    low, high: bootstrap interval of 95 % over windows, of the own explanation only, by the protocol's own measure and
    by those of protocols that score uniform text (`ON_UNIFORM_TEXT`); Wilson's for the accuracy of the scorer `output`.
    """

    neuron: NeuronId
    protocol: str
    set: str
    control: str
    measure: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    reason: str | None = None


_BOUNDS = [("low", pa.float64()), ("high", pa.float64())]
SCHEMA = schema(
    *("protocol", "set", "control", "measure"), ("value", pa.float64()), ("n", pa.int64()), *_BOUNDS, "reason"
)


def scores(folder: Path) -> Kept[list[Score]]:
    """One row per neuron, protocol, control and measure."""
    order = ("index", "protocol", "set", "control", "measure")
    return Kept(
        Tables(folder, SCHEMA, "score", order),
        lambda items: [row_of(item) for item in items],
        lambda rows: [item_of(Score, row) for row in rows],
    )

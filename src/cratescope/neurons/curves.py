"""Steering curves as they are kept: what each strength of each edit of a unit did (docs/steering.md)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cratescope.neurons.kept import Kept, item_of, row_of, schema
from cratescope.neurons.records import NeuronId
from cratescope.parts import Tables

OWN, UNEDITED = "own", "unedited"
CONTROLS = ("random", "flipped", "other")
"""Directions of the same norm in place of the unit's own: a random one, its opposite, that of another unit."""
KINDS = (OWN, *CONTROLS)


@dataclass(frozen=True)
class Point:
    """One strength of one edit of a unit; numbers are means (neurons/outcomes.py), and nats are per token.

    kind: the unit's `own` direction, a control's, or `unedited` (strength 0), where an autoencoder takes the place of
    the activations and no feature is changed. strength: in multiples of the unit's maximum; value: in raw numbers.
    norm: of what a change by 1 adds to the residual stream. targets: the tokens that the unit's direction raises most;
    aims: those of the direction that was written. Numbers that begin with `aim_` are about aims, others about targets.

    kl: KL(steered || plain) on fixed text. loss: change of the loss there. logit, logprob: mean change of the tokens'
    logits and log-probabilities. mass: the sum of their probabilities; mass_plain: without the edit. rate: their share
    in the text that is written. nats: loss of that text by the model without the edit. distinct: share of its bigrams
    that are different ones.
    """

    neuron: NeuronId
    kind: str
    strength: float
    value: float
    norm: float
    targets: tuple[int, ...]
    aims: tuple[int, ...]
    kl: float
    loss: float
    logit: float
    logprob: float
    mass: float
    mass_plain: float
    rate: float
    rate_plain: float
    aim_logit: float
    aim_logprob: float
    aim_mass: float
    aim_mass_plain: float
    aim_rate: float
    aim_rate_plain: float
    nats: float
    nats_plain: float
    distinct: float
    distinct_plain: float


_TOKENS = ("targets", "aims")
NUMBERS = [field.name for field in dataclasses.fields(Point) if field.name not in ("neuron", "kind", *_TOKENS)]
_SCHEMA = schema(
    "kind", *((name, pa.list_(pa.int32())) for name in _TOKENS), *((name, pa.float64()) for name in NUMBERS)
)


def curves(folder: Path) -> Kept[list[Point]]:
    """The tables in a folder, one per layer with a row per unit, kind and strength."""
    return Kept(
        Tables(folder, _SCHEMA, "steer --sweep", ("index", "kind", "strength")),
        lambda items: [row_of(item) for item in items],
        lambda rows: [item_of(Point, row | {name: tuple(row[name]) for name in _TOKENS}) for row in rows],
    )

"""What neurons do to the model's predictions, and the tables that it is kept in (docs/effects.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cratescope.neurons.kept import Kept, item_of, row_of, schema
from cratescope.neurons.records import NeuronId
from cratescope.parts import Row, Tables


@dataclass(frozen=True)
class TokenLogit:
    """A token, and by how much one unit of the neuron raises its logit by the weights alone (neurons/directions.py)."""

    token: int
    text: str
    logit: float


@dataclass(frozen=True)
class TokenChange:
    """A token, and by how much its logit and its probability change on average when the neuron is forced."""

    token: int
    text: str
    change: float
    probability: float


@dataclass(frozen=True)
class Effects:
    """What one neuron does to the prediction after the token that it is forced at.

    All logits are less their mean over the vocabulary, which no probability depends on.

    raises, lowers: tokens by weights, the most first. measured_raises, measured_lowers: the same, by the mean change
    over `contexts` held-out texts when the neuron is set to `value` at their last token ("TokenChange", Gur-Arieh et
    al. 2025). kl: mean KL(forced || plain) there, nats. direct_share: Spearman's correlation, over the vocabulary, of
    logits by weights and by measurement. input_score: share of the top windows whose peak is a token that the weights
    raise. output_score: of the tokens raised by weights, (1 - least rank / V) x largest probability, after a neutral
    prompt whose last token has 10 times the layer's largest activation added to the neuron (both Arad et al. 2025).
    output_score_plain: the same without.
    unmeasured, undirected: why nothing was measured, or is said by the weights; None where it is.
    """

    neuron: NeuronId
    value: float | None
    contexts: int
    raises: tuple[TokenLogit, ...]
    lowers: tuple[TokenLogit, ...]
    measured_raises: tuple[TokenChange, ...]
    measured_lowers: tuple[TokenChange, ...]
    kl: float | None
    direct_share: float | None
    input_score: float | None
    output_score: float | None
    output_score_plain: float | None
    unmeasured: str | None
    undirected: str | None


_TOKEN = [("token", pa.int32()), ("text", pa.string())]
_LOGITS = pa.list_(pa.struct([*_TOKEN, ("logit", pa.float64())]))
_CHANGES = pa.list_(pa.struct([*_TOKEN, ("change", pa.float64()), ("probability", pa.float64())]))
_NUMBERS = ("kl", "direct_share", "input_score", "output_score", "output_score_plain")
_SCHEMA = schema(
    *(("value", pa.float64()), ("contexts", pa.int32())),
    *(("raises", _LOGITS), ("lowers", _LOGITS), ("measured_raises", _CHANGES), ("measured_lowers", _CHANGES)),
    *((name, pa.float64()) for name in _NUMBERS),
    *("unmeasured", "undirected"),
)
_LISTS = {
    **dict.fromkeys(("raises", "lowers"), TokenLogit),
    **dict.fromkeys(("measured_raises", "measured_lowers"), TokenChange),
}


def kept_effects(folder: Path) -> Kept[Effects]:
    """The tables of effects in a folder, one per layer with a row per neuron."""
    return Kept(Tables(folder, _SCHEMA, "effects"), lambda item: [_row(item)], lambda rows: _effects(rows[0]))


def _row(item: Effects) -> Row:
    row = row_of(item)
    return row | {name: [vars(token) for token in row[name]] for name in _LISTS}


def _effects(row: Row) -> Effects:
    lists = {name: tuple(kind(**token) for token in row[name]) for name, kind in _LISTS.items()}
    return item_of(Effects, row | lists)

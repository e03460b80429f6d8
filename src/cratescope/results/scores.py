"""The scores of one run at one site, looked up by protocol, measure and control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from cratescope.explain.controls import CONTROLS, OWN
from cratescope.explain.protocols import PROTOCOLS
from cratescope.neurons.records import NeuronId
from cratescope.neurons.sample import DEAD
from cratescope.results.estimates import NOTHING, Estimate, gains, of_layer, of_model
from cratescope.score.scores import SCHEMA, Score
from cratescope.score.scores import scores as scores_in

JUDGED = ("accuracy", "auroc")
"""Measures of judgements, the scorers' own first."""


def measures_of(protocol: str) -> tuple[str, ...]:
    """A protocol's measures, its own first; those of a scorer for anything else."""
    return PROTOCOLS[protocol].measures if protocol in PROTOCOLS else JUDGED


@dataclass(frozen=True, eq=False)
class Column:
    """Scores by one measure and control in one layer, in index order; value, low and high are NaN where there is none.

    reason: names[reason] is why a neuron has no value; -1 for one that has.
    """

    index: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    n: Int[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]
    reason: Int[np.ndarray, " n"]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def of(cls, table: pa.Table) -> Column:
        """The column of some rows of `score`, those of one protocol, measure and control of a layer."""
        table = table.sort_by("index")
        names = ("index", "value", "n", "low", "high")
        index, value, n, low, high = (table.column(name).to_numpy() for name in names)
        reasons = table.column("reason").combine_chunks().dictionary_encode()
        codes = reasons.indices.fill_null(-1).to_numpy()
        return cls(index, value, n, low, high, codes, reasons.dictionary.to_pylist())

    def at(self, indices: Int[np.ndarray, " m"], name: str = "value") -> list[float | None]:
        """A number of each neuron, None where there is none."""
        return numbers_at(indices, self.index, getattr(self, name))

    def values(self) -> dict[int, float]:
        """By neuron index, of those that have one."""
        there = ~np.isnan(self.value)
        return dict(zip(self.index[there].tolist(), self.value[there].tolist(), strict=True))


def numbers_at(
    wanted: Int[np.ndarray, " m"], index: Int[np.ndarray, " n"], numbers: Float[np.ndarray, " n"]
) -> list[float | None]:
    """The number of each index that is `wanted`, None where it is not in the (rising) `index`, or the number is NaN."""
    if not len(index):
        return [None] * len(wanted)
    place = np.searchsorted(index, wanted).clip(max=len(index) - 1)
    there = (index[place] == wanted) & ~np.isnan(numbers[place])
    return [number if known else None for number, known in zip(numbers[place].tolist(), there.tolist(), strict=True)]


class Scores:
    """Rows of `score`, and every mean that is taken of them.

    A key is (protocol, measure, control); a protocol belongs to one explanation set. Rows are kept as columns, since a
    hundred thousand neurons have millions of them.
    """

    def __init__(self, rows: Iterable[Score] = ()) -> None:
        self._columns: dict[tuple[str, str, str], dict[int, Column]] = {}
        self.set_of: dict[str, str] = {}
        """The explanation set that each protocol scores."""
        self._means: dict[tuple[str, ...], Estimate] = {}
        found: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row.neuron.layer, []).append(vars(row) | {"index": row.neuron.index})
        for layer, one in found.items():
            self._add(layer, pa.Table.from_pylist(one, _ROW))

    @classmethod
    def read(cls, folder: Path, layers: Iterable[int] | None = None, indices: Sequence[int] | None = None) -> Scores:
        """Those in a folder that `score` wrote; only some layers, or some neurons of them."""
        scores, kept = cls(), scores_in(folder)
        for layer in kept.layers if layers is None else layers:
            scores._add(layer, kept.tables.read(layer, _ROW.names, indices).select(_ROW.names))
        return scores

    def _add(self, layer: int, table: pa.Table) -> None:
        names = ("protocol", "measure", "control", "set")
        encoded = [table.column(name).combine_chunks().dictionary_encode() for name in names]
        codes = np.stack([one.indices.to_numpy() for one in encoded], 1)
        keys, group = np.unique(codes, axis=0, return_inverse=True)
        rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group, minlength=len(keys)))[:-1])
        for key, places in zip(keys.tolist(), rows, strict=False):
            protocol, measure, control, name = (
                one.dictionary[code].as_py() for one, code in zip(encoded, key, strict=True)
            )
            column = Column.of(table.take(pa.array(places)))
            self._columns.setdefault((protocol, measure, control), {})[layer] = column
            self.set_of[protocol] = name

    def only(self, layers: Collection[int]) -> Scores:
        """Those of some layers."""
        chosen = Scores()
        chosen.set_of = self.set_of
        for key, columns in self._columns.items():
            chosen._columns[key] = {layer: column for layer, column in columns.items() if layer in layers}
        return chosen

    @cached_property
    def protocols(self) -> list[str]:
        """In the order of docs/evaluation.md; scorers come after protocols."""
        return sorted(self.set_of, key=lambda name: ([*PROTOCOLS, name].index(name), name))

    @cached_property
    def layers(self) -> list[int]:
        return sorted({layer for found in self._columns.values() for layer in found})

    @cached_property
    def sets(self) -> list[str]:
        """The explanation sets, in the order of their protocols."""
        return list(dict.fromkeys(self.set_of[name] for name in self.protocols))

    def scored(self, layer: int, explained: str | None = None) -> set[int]:
        """Neurons of a layer that there are rows of, from one explanation set or any."""
        names = (name for name in self.protocols if explained in (None, self.set_of[name]))
        columns = (self.columns(name).get(layer) for name in names)
        return {index for column in columns if column is not None for index in column.index.tolist()}

    def measures(self, protocol: str) -> list[str]:
        """The measures there are of a protocol, its own first."""
        return [name for name in measures_of(protocol) if (protocol, name, OWN) in self._columns]

    def columns(self, protocol: str, measure: str | None = None, control: str = OWN) -> dict[int, Column]:
        """Scores by layer; `measure` is the protocol's own unless given."""
        return self._columns.get((protocol, measure or measures_of(protocol)[0], control), {})

    def of(self, neuron: NeuronId, protocol: str, control: str = OWN, measure: str | None = None) -> Score | None:
        measure = measure or measures_of(protocol)[0]
        column = self.columns(protocol, measure, control).get(neuron.layer)
        place = 0 if column is None else int(np.searchsorted(column.index, neuron.index))
        if column is None or place == len(column) or column.index[place] != neuron.index:
            return None
        value, low, high = (
            None if np.isnan(number := getattr(column, name)[place]) else float(number)
            for name in ("value", "low", "high")
        )
        reason = None if column.reason[place] < 0 else column.names[column.reason[place]]
        key = neuron, protocol, self.set_of[protocol], control, measure
        return Score(*key, value, int(column.n[place]), low, high, reason)

    def every(self, neuron: NeuronId) -> list[Score]:
        """All rows of one neuron."""
        found = (self.of(neuron, protocol, control, measure) for protocol, measure, control in self._columns)
        return [row for row in found if row is not None]

    def values(
        self,
        protocol: str,
        measure: str | None = None,
        control: str = OWN,
        over: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> dict[int, dict[int, float]]:
        """Values of neurons that have one, by layer and index; `over`: their gains over that control."""
        there, columns = self.columns(protocol, measure), self.columns(protocol, measure, control)
        wanted = [layer for layer in sorted(there) if layers is None or layer in layers]
        found = {layer: columns[layer].values() if layer in columns else {} for layer in wanted}
        return gains(found, self.values(protocol, measure, over, layers=layers)) if over else found

    def mean(
        self,
        protocol: str,
        measure: str | None = None,
        control: str = OWN,
        over: str | None = None,
        layer: int | None = None,
    ) -> Estimate:
        """The mean of `values` in a layer, or over layers; the interval only of the own explanation's score."""
        key = (protocol, measure or "", control, over or "", str(layer))
        if key not in self._means:
            values = self.values(protocol, measure, control, over, None if layer is None else [layer])
            bounds = control == OWN and over is None
            if layer is None:
                self._means[key] = of_model(values, bounds) if values else NOTHING
            else:
                self._means[key] = of_layer(values[layer], bounds) if layer in values else NOTHING
        return self._means[key]

    def controls(self, protocol: str, measure: str | None = None) -> list[str]:
        """Controls of which any neuron has a value."""
        layers = self.columns(protocol, measure)
        return [
            name
            for name in CONTROLS
            if any(
                not np.isnan(column.value).all()
                for layer, column in self.columns(protocol, measure, name).items()
                if layer in layers
            )
        ]

    def reasons(self, protocol: str, layer: int, measure: str | None = None) -> Counter[str]:
        """Why neurons of a layer have no score, dead ones included, and how many for each reason."""
        column = self.columns(protocol, measure).get(layer)
        if column is None:
            return Counter()
        missing = column.reason[np.isnan(column.value)]
        names = [*column.names, "no reason given"]  # the last for -1
        return Counter({names[code]: int((missing == code).sum()) for code in np.unique(missing).tolist()})

    def counts(self, protocol: str, layer: int | None, measure: str | None = None) -> dict[str, int]:
        """Neurons scored, without a score, dead among these, and all; of a layer or of all layers."""
        columns = self.columns(protocol, measure)
        layers = sorted(columns) if layer is None else [layer]
        reasons = sum((self.reasons(protocol, one, measure) for one in layers), Counter[str]())
        every = sum(len(columns[one]) for one in layers if one in columns)
        missing = reasons.total()
        return {"n_scored": every - missing, "n_none": missing, "n_dead": reasons[DEAD], "n_neurons": every}

    def ranking(self, protocol: str, layer: int) -> list[int]:
        """Neuron indices of a layer that have a score, best first; equal scores in index order."""
        values = self.values(protocol, layers=[layer]).get(layer, {})
        return sorted(values, key=lambda index: (-values[index], index))


_ROW = pa.schema([field for field in SCHEMA if field.name not in ("model", "site", "layer")])
"""What is kept of a row."""

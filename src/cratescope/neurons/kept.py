"""What explain, simulate, judge and score keep of neurons: one Parquet table per layer each (docs/records.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from cratescope.neurons.records import Explanation, Judgement, NeuronId, Score, Simulation
from cratescope.parts import CHECKED, Row, Tables

T = TypeVar("T")

_NEURON = [("model", pa.string()), ("site", pa.string()), ("layer", pa.int32()), ("index", pa.int32())]
_KEY = pa.struct([("excerpt", pa.int32()), ("start", pa.int32()), ("width", pa.int32())])


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([*_NEURON, *columns], metadata=CHECKED)


_EXPLANATION = _schema(
    ("text", pa.string()), ("explainer", pa.string()), ("prompt", pa.string()), ("skipped", pa.string())
)
_SIMULATION = _schema(
    ("simulator", pa.string()),
    ("control", pa.string()),
    ("text", pa.string()),
    ("windows", pa.list_(_KEY)),
    ("simulated", pa.list_(pa.list_(pa.float64()))),
    ("skipped", pa.string()),
)
_JUDGEMENT = _schema(
    ("scorer", pa.string()),
    ("control", pa.string()),
    ("text", pa.string()),
    ("probabilities", pa.list_(pa.float64())),
    ("labels", pa.list_(pa.bool_())),
    ("skipped", pa.string()),
)
_SCORE = _schema(
    ("protocol", pa.string()),
    ("set", pa.string()),
    ("control", pa.string()),
    ("measure", pa.string()),
    ("value", pa.float64()),
    ("n", pa.int64()),
    ("low", pa.float64()),
    ("high", pa.float64()),
    ("reason", pa.string()),
)


@dataclass(frozen=True)
class Kept(Generic[T]):
    """The results of one stage on one explanation set: an item per neuron, kept as one or several rows of a table."""

    tables: Tables
    _to_rows: Callable[[T], list[Row]]
    _of_rows: Callable[[list[Row]], T]

    @property
    def folder(self) -> Path:
        return self.tables.folder

    @property
    def layers(self) -> list[int]:
        return self.tables.layers

    def done(self, layer: int) -> set[int]:
        """Neurons that have an item."""
        return self.tables.done(layer)

    def read(self, layer: int, indices: Sequence[int] | None = None) -> dict[int, T]:
        """Items by neuron index, in index order; only of some neurons when `indices` are given.

        Raises:
            UserError: the table is damaged, or made by another version.
        """
        rows = self.tables.read(layer, indices=indices).to_pylist()
        return {
            index: self._of_rows(list(group)) for index, group in itertools.groupby(rows, key=lambda row: row["index"])
        }

    def all(self) -> Iterator[tuple[NeuronId, T]]:
        """Every item, in layer and index order."""
        for layer in self.layers:
            for item in self.read(layer).values():
                yield _neuron_of(item), item

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[T], None]]:
        """Yield a function that keeps an item; an item that was there before is replaced."""
        with self.tables.writing() as writer:
            yield lambda item: writer.add(_neuron_of(item).layer, self._to_rows(item))

    def replace(self, layer: int, items: Iterable[T]) -> None:
        """Make the table of a layer hold these items and no others."""
        self.tables.replace(layer, (row for item in items for row in self._to_rows(item)))

    def write(self, items: Iterable[T]) -> None:
        """Keep some items at once."""
        with self.writing() as keep:
            for item in items:
                keep(item)


def _neuron_of(item: Any) -> NeuronId:
    return (item[0] if isinstance(item, list) else item).neuron


def _id(row: Row) -> NeuronId:
    return NeuronId(row["model"], row["site"], row["layer"], row["index"])


def _row(item: Any) -> Row:
    row = dict(vars(item))
    return vars(row.pop("neuron")) | row


def _of_row(kind: Callable[..., T], row: Row) -> T:
    names = [field.name for field in dataclasses.fields(kind) if field.name != "neuron"]  # type: ignore[arg-type]
    return kind(neuron=_id(row), **{name: row[name] for name in names})


def explanations(folder: Path) -> Kept[Explanation]:
    """One row per neuron."""
    return Kept(
        Tables(folder, _EXPLANATION, "explain"), lambda item: [_row(item)], lambda rows: _of_row(Explanation, rows[0])
    )


def simulations(folder: Path) -> Kept[Simulation]:
    """One row per neuron and control; a neuron that nothing was simulated for has one without a control."""
    return Kept(Tables(folder, _SIMULATION, "simulate", ("index", "control")), _simulation_rows, _simulation)


def _simulation_rows(item: Simulation) -> list[Row]:
    windows = [{"excerpt": excerpt, "start": start, "width": width} for excerpt, start, width in item.keys]
    about = vars(item.neuron) | {"simulator": item.simulator, "skipped": item.skipped, "windows": windows}
    return [
        about | {"control": control, "text": text, "simulated": item.expected.get(control)}
        for control, text in item.texts.items()
    ] or [about | {"control": None, "text": None, "simulated": None}]


def _simulation(rows: list[Row]) -> Simulation:
    first = rows[0]
    keys = tuple((key["excerpt"], key["start"], key["width"]) for key in first["windows"])
    told = [row for row in rows if row["control"] is not None]
    return Simulation(
        _id(first),
        first["simulator"],
        {row["control"]: row["text"] for row in told},
        keys,
        {row["control"]: tuple(map(tuple, row["simulated"])) for row in told if row["simulated"] is not None},
        first["skipped"],
    )


def judgements(folder: Path) -> Kept[list[Judgement]]:
    """One row per neuron and control."""
    return Kept(
        Tables(folder, _JUDGEMENT, "judge", ("index", "control")),
        lambda items: [_row(item) for item in items],
        lambda rows: [_of_row(Judgement, _as_tuples(row)) for row in rows],
    )


def _as_tuples(row: Row) -> Row:
    return row | {name: tuple(row[name]) for name in ("probabilities", "labels")}


def scores(folder: Path) -> Kept[list[Score]]:
    """One row per neuron, protocol, control and measure."""
    order = ("index", "protocol", "set", "control", "measure")
    return Kept(
        Tables(folder, _SCORE, "score", order),
        lambda items: [_row(item) for item in items],
        lambda rows: [_of_row(Score, row) for row in rows],
    )


def read_scores(folder: Path) -> list[Score]:
    """Every score in a folder that `score` wrote, in layer and index order."""
    return [score for _, items in scores(folder).all() for score in items]

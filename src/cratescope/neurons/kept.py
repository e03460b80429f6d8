"""Results of explain, simulate, judge and score: one Parquet table per layer each (docs/records.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from cratescope.neurons.records import NeuronId
from cratescope.parts import CHECKED, Row, Tables

T = TypeVar("T")
_NEURON = [("model", pa.string()), ("site", pa.string()), ("layer", pa.int32()), ("index", pa.int32())]


def schema(*columns: str | tuple[str, pa.DataType]) -> pa.Schema:
    """The columns that name a neuron, and these; a name alone is one of texts."""
    typed = [(column, pa.string()) if isinstance(column, str) else column for column in columns]
    return pa.schema([*_NEURON, *typed], metadata=CHECKED)


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
        """Items by neuron index, in index order; only of some when given `indices`. Errors as of `Tables.read`."""
        return dict(self._items(layer, indices))

    def _items(self, layer: int, indices: Sequence[int] | None = None) -> Iterator[tuple[int, T]]:
        for table in self.tables.batches(layer, indices=indices):
            for index, rows in itertools.groupby(table.to_pylist(), key=lambda row: row["index"]):
                yield index, self._of_rows(list(rows))

    def all(self) -> Iterator[tuple[NeuronId, T]]:
        """Every item, in layer and index order."""
        for layer in self.layers:
            for _, item in self._items(layer):
                yield _neuron_of(item), item

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[T], None]]:
        """Yield a function that keeps an item; an item that was there before is replaced."""
        with self.tables.writing() as writer:
            yield lambda item: writer.add(_neuron_of(item).layer, self._to_rows(item))

    def replace(self, layer: int, items: Iterable[T]) -> None:
        """Make the table of a layer hold these items, in index order, and no others."""
        self.tables.replace(layer, map(self._to_rows, items))

    def write(self, items: Iterable[T]) -> None:
        """Keep some items at once."""
        with self.writing() as keep:
            for item in items:
                keep(item)


def _neuron_of(item: Any) -> NeuronId:
    return (item[0] if isinstance(item, list) else item).neuron


def neuron_id(row: Row) -> NeuronId:
    return NeuronId(row["model"], row["site"], row["layer"], row["index"])


def row_of(item: Any) -> Row:
    row = dict(vars(item))
    return vars(row.pop("neuron")) | row


def item_of(kind: Callable[..., T], row: Row) -> T:
    names = [field.name for field in dataclasses.fields(kind) if field.name != "neuron"]  # type: ignore[arg-type]
    return kind(neuron=neuron_id(row), **{name: row[name] for name in names})

"""Parts of a stage's work, and the one table per layer that they are folded into.

A stage works through a layer in parts. Each part is a whole file, `.parts/layer-00/<name>.parquet`, written atomically,
so a kill loses at most the part under way. Folding adds the parts to `layer-00.parquet`, which is all that users need:
`pd.read_parquet(folder / "layer-00.parquet")`. The table is sorted, so its bytes are the same however the work was
split, interrupted or shared between workers.

Every file is sorted, so files are merged a few row groups at a time, whatever their size. Many parts are merged into
one before the end, so that a layer has at most about `MOST` of them and each row is written again only a few times.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from cratescope.errors import UserError, first_line
from cratescope.files import atomic_path, remove_leftovers, until_touched
from cratescope.locks import locked

Row = dict[str, Any]

SECONDS, ROWS = 30, 4096
"""A part is written when so much time has passed since the last one, or so many rows have come together."""
MOST = 64
"""Parts of a layer; with more, the newest ones are merged into one."""
ROW_GROUP = 1024
"""Rows in a row group, the least that is read from disk at once."""
CHECKED = {b"checksum": b"sha256"}
"""Metadata of a table that has a seal."""
_SEAL = b"sha256: "
"""Before the footer of a file, where readers of Parquet do not look, and then the hash of all the rest."""


def layer_file(folder: Path, layer: int) -> Path:
    """Path of a layer's table in a stage's folder."""
    return folder / f"layer-{layer:02d}.parquet"


def parts_folder(folder: Path, layer: int) -> Path:
    """Folder of a layer's parts until they are folded."""
    return folder / ".parts" / f"layer-{layer:02d}"


def remove_parts(folder: Path, layers: Iterable[int]) -> None:
    """Delete the parts of finished layers; those of others may still be worked on."""
    for layer in layers:
        shutil.rmtree(parts_folder(folder, layer), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / ".parts").rmdir()


def seal(path: Path) -> None:
    """Put a checksum of a whole Parquet file before its footer."""
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        start = _footer(file)
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(_SEAL + digest + footer)


def _footer(file: IO[bytes]) -> int:
    """Where the footer of a Parquet file begins: its length stands before the last four bytes."""
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    return max(size - 8 - int.from_bytes(file.read(4), "little"), 0)


@until_touched
def is_sealed(path: Path) -> bool:
    """Whether the file has a checksum, as those of older versions do not. Raises ValueError when it is damaged."""
    with open(path, "rb") as file:
        start = _footer(file)
        end = max(start - len(_SEAL) - 32, 0)
        file.seek(end)
        if file.read(len(_SEAL)) != _SEAL:
            return False
        expected = file.read(32)
        file.seek(0)
        digest = hashlib.sha256()
        for first in range(0, end, 1 << 20):
            digest.update(file.read(min(1 << 20, end - first)))
        file.seek(start)
        digest.update(file.read())
    if digest.digest() != expected:
        raise ValueError("its checksum differs")
    return True


@dataclass(frozen=True)
class Tables:
    """The tables of one stage, one per layer, in `folder`.

    schema: their columns, `index` (the neuron) among them: all rows of a neuron are written together, and a neuron that
    is written again replaces its rows. order: columns that sort the rows. stage: the command that makes them.
    """

    folder: Path
    schema: pa.Schema
    stage: str
    order: tuple[str, ...] = ("index",)

    @property
    def layers(self) -> list[int]:
        """Layers that have a table, or parts of one."""
        found = [*self.folder.glob("layer-*.parquet"), *self.folder.glob(".parts/layer-*")]
        names = (path.name.removeprefix("layer-").removesuffix(".parquet") for path in found)
        return sorted({int(name) for name in names if name.isdecimal()})

    def files(self, layer: int) -> list[Path]:
        """The table of a layer, and the parts that are not folded yet, from the oldest to the newest."""
        parts = self._parts(layer)
        table = layer_file(self.folder, layer)  # looked for last: a part that is not listed may be folded by now
        return [table, *parts] if table.exists() else parts

    def _parts(self, layer: int) -> list[Path]:
        return sorted(parts_folder(self.folder, layer).glob("[!.]*.parquet"))

    def read(self, layer: int, columns: Sequence[str] | None = None, indices: Sequence[int] | None = None) -> pa.Table:
        """The rows of a layer, folded or not, sorted; only some columns, or the rows of some neurons.

        Raises:
            UserError: a file is damaged, or made by another version.
        """
        wanted = self.schema.names if columns is None else list(dict.fromkeys([*columns, "index", *self.order]))
        empty = pa.schema([self.schema.field(name) for name in wanted]).empty_table()
        return pa.concat_tables([empty, *self.batches(layer, wanted, indices)])

    def batches(
        self, layer: int, columns: Sequence[str] | None = None, indices: Sequence[int] | None = None
    ) -> Iterator[pa.Table]:
        """The same bit by bit, all rows of a neuron together; `columns` have to hold `index`. Errors as of `read`."""
        return self._merged(self._open(layer), columns, indices)

    def _open(self, layer: int) -> list[tuple[Path, pq.ParquetFile]]:
        while True:
            files = self.files(layer)
            try:
                return [(path, self._checked(path)) for path in files]
            except FileNotFoundError:
                if self.files(layer) == files:
                    raise
                # Another worker has folded the part meanwhile.

    def _checked(self, path: Path) -> pq.ParquetFile:
        with self._damage_of(path):
            sealed, file = is_sealed(path), pq.ParquetFile(path)
            if not file.schema_arrow.equals(self.schema):
                raise UserError(f"{path}: made by another version of cratescope; {self._fix}")
            if not sealed:
                raise ValueError("its checksum is gone")
            return file

    @property
    def _fix(self) -> str:
        return f"delete it and run `cratescope {self.stage}` again"

    @contextlib.contextmanager
    def _damage_of(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); {self._fix}") from error

    def _merged(
        self,
        files: Sequence[tuple[Path, pq.ParquetFile]],
        columns: Sequence[str] | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[pa.Table]:
        """All rows of some files in order; the rows of a neuron are those of the last file that has it."""
        wanted = None if indices is None else np.unique(np.array([*indices], dtype=np.int32))
        sources = [_whole_neurons(self._row_groups(path, file, columns, wanted)) for path, file in files]
        waiting = [next(source, None) for source in sources]
        while ends := [_index(table)[-1] for table in waiting if table is not None]:
            together = []
            for place, table in enumerate(waiting):
                if table is not None:
                    cut = int(np.searchsorted(_index(table), min(ends), side="right"))
                    together.append(table.slice(0, cut))
                    waiting[place] = table.slice(cut) if cut < len(table) else next(sources[place], None)
            yield _latest(together)

    def _row_groups(
        self, path: Path, file: pq.ParquetFile, columns: Sequence[str] | None, wanted: Int[np.ndarray, " m"] | None
    ) -> Iterator[pa.Table]:
        """The rows of a file in order, only of the neurons that are `wanted`; row groups with none are not read."""
        with self._damage_of(path):
            for number in range(file.num_row_groups):
                if wanted is None:
                    yield file.read_row_group(number, columns)
                elif (there := np.isin(_index(file.read_row_group(number, ["index"])), wanted)).any():
                    yield file.read_row_group(number, columns).filter(pa.array(there))

    def done(self, layer: int) -> set[int]:
        """Neurons that are written."""
        return {index for table in self.batches(layer, ["index"]) for index in _index(table).tolist()}

    def write(self, path: Path, tables: Iterable[pa.Table]) -> None:
        """Write a file atomically, with a checksum, from sorted tables that are held one at a time."""
        schema = self.schema.with_metadata(CHECKED)
        with atomic_path(path) as temporary:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for table in _in_row_groups(tables):
                    writer.write_table(table.replace_schema_metadata(CHECKED), row_group_size=ROW_GROUP)
            seal(temporary)

    def replace(self, layer: int, neurons: Iterable[Sequence[Row]]) -> None:
        """Make the table of a layer hold the rows of these neurons, in index order, and no others."""
        with locked(self.folder, "fold", wait=True):
            self.write(layer_file(self.folder, layer), self._rising(neurons))
            remove_parts(self.folder, [layer])

    def _rising(self, neurons: Iterable[Sequence[Row]]) -> Iterator[pa.Table]:
        rows: list[Row] = []
        last = -1
        for one in filter(None, neurons):
            if one[0]["index"] <= last:
                raise ValueError(f"neuron {one[0]['index']} after {last}: neurons have to come in index order")
            last = one[0]["index"]
            rows += one
            if len(rows) >= ROWS:
                yield self._table(rows)
                rows = []
        yield self._table(rows)

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        return pa.Table.from_pylist([*rows], self.schema).sort_by([(name, "ascending") for name in self.order])

    def write_part(self, layer: int, rows: Sequence[Row]) -> None:
        path = parts_folder(self.folder, layer) / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        table = self._table(rows)
        with locked(self.folder, "fold", wait=True):  # who folds removes the folder of the parts
            self.write(path, [table])
            self._condense(layer)

    def _condense(self, layer: int) -> None:
        """Merge the newest of many parts into one; those that are larger than all newer ones together stay.

        So a row is written again only when its part grows to at least twice the size, or with few others. The merged
        part takes the place of its newest one, and after a kill the older ones, if still there, change nothing.
        """
        parts = self._parts(layer)
        if len(parts) > MOST:
            sizes = [self._checked(path).metadata.num_rows for path in parts]
            first = next(place for place, size in enumerate(sizes) if size <= sum(sizes[place + 1 :]))
            self._merge(parts[first:], parts[-1])

    def _merge(self, paths: Sequence[Path], target: Path) -> None:
        """Merge files into `target`, and delete the others from the oldest on: what is left after a kill is newer."""
        self.write(target, self._merged([(path, self._checked(path)) for path in paths]))
        for path in paths:
            if path != target:
                path.unlink()

    def fold(self, layer: int) -> None:
        """Add the parts to the table; several workers may do so, one after another."""
        if not parts_folder(self.folder, layer).exists():
            return
        with locked(self.folder, "fold", wait=True):
            if self._parts(layer):
                self._merge(self.files(layer), layer_file(self.folder, layer))
            remove_leftovers(parts_folder(self.folder, layer))
            with contextlib.suppress(OSError):  # there are other layers' parts
                parts_folder(self.folder, layer).rmdir()
                (self.folder / ".parts").rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """Yield what collects rows into parts; at the end, also after an error, they are written and folded."""
        for layer in self.layers:
            self.fold(layer)
        writer = Writer(self)
        try:
            yield writer
        finally:
            writer.flush()
            for layer in self.layers:
                self.fold(layer)


def _index(table: pa.Table) -> Int[np.ndarray, " n"]:
    return table.column("index").to_numpy()


def _whole_neurons(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, cut such that all rows of a neuron are in one table."""
    rest: list[pa.Table] = []
    for table in tables:
        table = pa.concat_tables([*rest, table])
        cut = int(np.searchsorted(_index(table), _index(table)[-1]))
        if cut:
            yield table.slice(0, cut)
        rest = [table.slice(cut)]
    yield from rest


def _latest(tables: Sequence[pa.Table]) -> pa.Table:
    """Some rows of several sorted tables in index order, those of each neuron from the last table that has it."""
    tables = [table for table in tables if len(table)]
    if len(tables) == 1:
        return tables[0]
    index = np.concatenate([_index(table) for table in tables])
    place = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    last = np.zeros(index.max() - index.min() + 1, dtype=np.int64)
    np.maximum.at(last, index - index.min(), place)
    kept = np.flatnonzero(place == last[index - index.min()])
    rows = kept[np.argsort(index[kept], kind="stable")]
    return pa.concat_tables(tables).combine_chunks().take(pa.array(rows))


def _in_row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of whole row groups, but for the last, so that it does not matter how they came."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if (rows := sum(map(len, waiting))) >= ROW_GROUP:
            table = pa.concat_tables(waiting).combine_chunks()
            yield table.slice(0, rows - rows % ROW_GROUP)
            waiting = [table.slice(rows - rows % ROW_GROUP)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


class Writer:
    """Buffer of rows that writes a part from time to time."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._rows: dict[int, list[Row]] = {}
        self._last = time.monotonic()

    def add(self, layer: int, rows: Sequence[Row]) -> None:
        """All rows of a neuron; they are never split between parts."""
        self._rows.setdefault(layer, []).extend(rows)
        if sum(map(len, self._rows.values())) >= ROWS or time.monotonic() - self._last > SECONDS:
            self.flush()

    def flush(self) -> None:
        rows, self._rows = self._rows, {}
        self._last = time.monotonic()
        for layer, found in rows.items():
            self._tables.write_part(layer, found)

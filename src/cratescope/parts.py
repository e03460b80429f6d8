"""Parts of a stage's work, and the one table per layer that they are folded into.

A stage works through a layer in parts. Each part is a whole file, `.parts/layer-00/<name>.parquet`, written atomically,
so a kill loses at most the part under way. Folding adds the parts to `layer-00.parquet`, which is all that users need:
`pd.read_parquet(folder / "layer-00.parquet")`. The table is sorted, so its bytes are the same however the work was
split, interrupted or shared between workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cratescope.errors import UserError, first_line
from cratescope.files import atomic_path, remove_leftovers, stamp
from cratescope.locks import locked

Row = dict[str, Any]

SECONDS, ROWS = 30, 4096
"""A part is written when so much time has passed since the last one, or so many rows have come together."""
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


def is_sealed(path: Path) -> bool:
    """Whether the file has a checksum, as those of older versions do not. Raises ValueError when it is damaged."""
    return _is_sealed(path, stamp(path))


@functools.lru_cache(1024)  # worked out once, as long as nobody touches the file
def _is_sealed(path: Path, _stamp: tuple[int, ...]) -> bool:
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
        """The table of a layer, and the parts that are not folded yet."""
        parts = sorted(parts_folder(self.folder, layer).glob("[!.]*.parquet"))
        table = layer_file(self.folder, layer)  # looked for last: a part that is not listed may be folded by now
        return [table, *parts] if table.exists() else parts

    def read(self, layer: int, columns: Sequence[str] | None = None, indices: Sequence[int] | None = None) -> pa.Table:
        """The rows of a layer, folded or not, sorted; only some columns, or the rows of some neurons.

        Raises:
            UserError: a file is damaged, or made by another version.
        """
        wanted = self.schema.names if columns is None else list(dict.fromkeys([*columns, "index", *self.order]))
        tables = self._read_files(layer, wanted, indices)
        if not tables:
            return pa.schema([self.schema.field(name) for name in wanted]).empty_table()
        table = tables[0]
        for part in tables[1:]:
            again = pc.is_in(table.column("index"), value_set=part.column("index").combine_chunks())
            table = pa.concat_tables([table.filter(pc.invert(again)), part])
        return table if len(tables) == 1 else table.sort_by([(name, "ascending") for name in self.order])

    def _read_files(self, layer: int, columns: Sequence[str], indices: Sequence[int] | None) -> list[pa.Table]:
        while True:
            files = self.files(layer)
            try:
                return [self._file(path, columns, indices) for path in files]
            except FileNotFoundError:
                if self.files(layer) == files:
                    raise
                # Another worker has folded the part meanwhile.

    def _file(self, path: Path, columns: Sequence[str], indices: Sequence[int] | None) -> pa.Table:
        chosen = None if indices is None else pc.field("index").isin(list(indices))
        fix = f"delete it and run `cratescope {self.stage}` again"
        try:
            sealed, schema = is_sealed(path), pq.read_schema(path)
            if not schema.equals(self.schema):
                raise UserError(f"{path}: made by another version of cratescope; {fix}")
            if not sealed:
                raise ValueError("its checksum is gone")
            return pq.read_table(path, columns=[*columns], filters=chosen)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); {fix}") from error

    def done(self, layer: int) -> set[int]:
        """Neurons that are written."""
        return set(self.read(layer, columns=["index"]).column("index").to_pylist())

    def write(self, path: Path, table: pa.Table) -> None:
        """Write a file atomically, with a checksum."""
        with atomic_path(path) as temporary:
            table = table.replace_schema_metadata(CHECKED).combine_chunks()
            pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)
            seal(temporary)

    def replace(self, layer: int, rows: Iterable[Row]) -> None:
        """Make the table of a layer hold these rows and no others."""
        rows, tables = iter(rows), [self.schema.empty_table()]
        while chunk := list(itertools.islice(rows, ROWS)):
            tables.append(pa.Table.from_pylist(chunk, self.schema))
        table = pa.concat_tables(tables).sort_by([(name, "ascending") for name in self.order])
        with locked(self.folder, "fold", wait=True):
            self.write(layer_file(self.folder, layer), table)
            remove_parts(self.folder, [layer])

    def write_part(self, layer: int, rows: Sequence[Row]) -> None:
        path = parts_folder(self.folder, layer) / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        table = pa.Table.from_pylist(list(rows), self.schema)
        with locked(self.folder, "fold", wait=True):  # who folds removes the folder of the parts
            self.write(path, table.sort_by([(name, "ascending") for name in self.order]))

    def fold(self, layer: int) -> None:
        """Add the parts to the table; several workers may do so, one after another."""
        if not parts_folder(self.folder, layer).exists():
            return
        with locked(self.folder, "fold", wait=True):
            parts = [path for path in self.files(layer) if path != layer_file(self.folder, layer)]
            if parts:
                self.write(layer_file(self.folder, layer), self.read(layer))
            for path in parts:
                path.unlink()
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

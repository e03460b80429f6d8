"""Parts of a stage's work, and the one table per layer that they are folded into.

A stage works through a layer in parts. Each part is a file, `.parts/layer-00/<name>.parquet`, written atomically,
so a kill loses at most the part under way. Folding adds the parts to `layer-00.parquet`, which is all that later stages
and users read: `pd.read_parquet(folder / "layer-00.parquet")`. The table is sorted, so that its bytes are the same
however the work was split, interrupted or shared between workers.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cratescope.run import UserError, atomic_path, locked

Row = dict[str, Any]

SECONDS, ROWS = 30, 4096
"""A part is written after this many seconds, or once this many rows have accumulated."""
ROW_GROUP = 1024
"""Smallest number of rows read from disk at once."""


def layer_file(folder: Path, layer: int) -> Path:
    """Path of a layer's table in a stage's folder."""
    return folder / f"layer-{layer:02d}.parquet"


def layers_of(folder: Path) -> list[int]:
    """Layers that have a table or parts of one."""
    found = [*folder.glob("layer-*.parquet"), *folder.glob(".parts/layer-*")]
    return sorted({int(path.name.removeprefix("layer-").removesuffix(".parquet")) for path in found})


def parts_folder(folder: Path, layer: int) -> Path:
    """Folder of a layer's parts until they are folded."""
    return folder / ".parts" / f"layer-{layer:02d}"


def remove_parts(folder: Path, layers: Iterable[int]) -> None:
    """Delete the parts of finished layers; those of others may still be worked on."""
    for layer in layers:
        shutil.rmtree(parts_folder(folder, layer), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / ".parts").rmdir()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, with checksums."""
    with atomic_path(path) as temporary:
        pq.write_table(
            table.combine_chunks(), temporary, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True
        )


@dataclass(frozen=True)
class Tables:
    """The tables of one stage, one per layer, in `folder`.

    schema: their columns. key: those that name the unit of work, such as `index`: all rows of a unit are written
    together, and a unit that is written again replaces its rows. order: columns that sort the rows. stage: the command
    that makes them, for error messages.
    """

    folder: Path
    schema: pa.Schema
    stage: str
    key: str = "index"
    order: tuple[str, ...] = ("index",)

    def read(self, layer: int, columns: Sequence[str] | None = None, units: Sequence[int] | None = None) -> pa.Table:
        """The rows of a layer, folded or not, sorted; only some columns, or the rows of some units.

        Raises:
            UserError: a file is damaged or of an older version.
        """
        wanted = None if columns is None else list(dict.fromkeys([*columns, self.key, *self.order]))
        parts = sorted(parts_folder(self.folder, layer).glob("[!.]*.parquet"))
        files = [path for path in [layer_file(self.folder, layer), *parts] if path.exists()]
        tables = [self._file(path, wanted, units) for path in files]
        if not tables:
            schema = self.schema if wanted is None else pa.schema([self.schema.field(name) for name in wanted])
            return schema.empty_table()
        table = tables[0]
        for part in tables[1:]:
            again = pc.is_in(table.column(self.key), value_set=part.column(self.key).combine_chunks())
            table = pa.concat_tables([table.filter(pc.invert(again)), part])
        return table.sort_by([(name, "ascending") for name in self.order])

    def _file(self, path: Path, columns: Sequence[str] | None, units: Sequence[int] | None) -> pa.Table:
        chosen = None if units is None else pc.field(self.key).isin(list(units))
        fix = f"delete it and run `cratescope {self.stage}` again"
        try:
            if pq.read_schema(path).names != self.schema.names:
                raise UserError(f"{path}: made by another version of cratescope; {fix}")
            table = pq.read_table(path, columns=columns, filters=chosen, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:200]}); {fix}") from error
        return table.cast(pa.schema([self.schema.field(name) for name in table.schema.names]))

    def rows(self, layer: int, units: Sequence[int] | None = None) -> list[Row]:
        """The same as Python values."""
        return self.read(layer, units=units).to_pylist()

    def done(self, layer: int) -> set[int]:
        """Units that have been written."""
        return set(self.read(layer, columns=[self.key]).column(self.key).to_pylist())

    def write(self, layer: int, rows: Sequence[Row]) -> None:
        """Write one part."""
        if rows:
            path = parts_folder(self.folder, layer) / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
            write_table(path, pa.Table.from_pylist(list(rows), self.schema))

    def fold(self, layer: int) -> None:
        """Add the parts to the table; several workers may do so, one after another."""
        if not parts_folder(self.folder, layer).exists():
            return
        with locked(self.folder, "fold", wait=True):
            parts = sorted(parts_folder(self.folder, layer).glob("[!.]*.parquet"))
            if parts:
                write_table(layer_file(self.folder, layer), self.read(layer))
            for path in parts:
                path.unlink()
            with contextlib.suppress(OSError):  # another worker is writing its next part
                parts_folder(self.folder, layer).rmdir()
                (self.folder / ".parts").rmdir()

    @contextlib.contextmanager
    def writing(self, layer: int) -> Iterator[Writer]:
        """Yield a writer that collects rows into parts; on exit, even after an error, they are written and folded."""
        self.fold(layer)
        writer = Writer(self, layer)
        try:
            yield writer
        finally:
            writer.flush()
            self.fold(layer)


class Writer:
    """Buffer of rows that writes a part from time to time."""

    def __init__(self, tables: Tables, layer: int) -> None:
        self._tables, self._layer = tables, layer
        self._rows: list[Row] = []
        self._last = time.monotonic()

    def add(self, rows: Iterable[Row]) -> None:
        """Add all rows of some units, which are never split between parts."""
        self._rows.extend(rows)
        if len(self._rows) >= ROWS or time.monotonic() - self._last > SECONDS:
            self.flush()

    def flush(self) -> None:
        rows, self._rows = self._rows, []
        self._last = time.monotonic()
        self._tables.write(self._layer, rows)

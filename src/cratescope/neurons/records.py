"""Records of neurons on text (windows, moments, histogram, tokens), and their files.

Rows are keyed by NeuronId, never by their place in a list. Imports nothing else of neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cratescope.errors import UserError, as_user_error
from cratescope.files import atomic_path
from cratescope.parts import CHECKED, is_sealed, seal
from cratescope.parts import layer_file as layer_file


@dataclass(frozen=True, order=True)
class NeuronId:
    """One neuron: entry `index` of the site `site` in layer `layer` of the run named `model`."""

    model: str
    site: str
    layer: int
    index: int


@dataclass(frozen=True, eq=False)
class Window:
    """A window of one excerpt: `tokens` (w,) and `activations` (w,).

    start: place of the first token in the excerpt; peak: place in the window of the token it was chosen for.
    """

    tokens: np.ndarray
    activations: np.ndarray
    excerpt: int
    start: int
    peak: int

    @property
    def key(self) -> tuple[int, int, int]:
        """(excerpt, start, width) names the window within the collected text."""
        return self.excerpt, self.start, len(self.tokens)

    def cut(self, width: int) -> Window:
        """The `width` tokens around the peak, half of them before it, moved inside this window."""
        if width >= len(self.tokens):
            return self
        first = min(max(self.peak - width // 2, 0), len(self.tokens) - width)
        inside = slice(first, first + width)
        tokens, activations = self.tokens[inside], self.activations[inside]
        return Window(tokens, activations, self.excerpt, self.start + first, self.peak - first)

    def overlaps(self, other: Window) -> bool:
        """Whether the two windows share a token."""
        return (
            self.excerpt == other.excerpt
            and self.start < other.start + len(other.tokens)
            and other.start < self.start + len(self.tokens)
        )


@dataclass(frozen=True)
class Moments:
    """Moments of the activation over all `n_tokens` tokens read; skewness and kurtosis are standardised, not excess.

    skewness and kurtosis are None for a constant neuron.
    """

    n_tokens: int
    mean: float
    variance: float
    skewness: float | None
    kurtosis: float | None
    maximum: float

    @property
    def third(self) -> float:
        """The third central moment, not standardised."""
        return 0.0 if self.skewness is None else self.skewness * self.variance**1.5

    @property
    def fourth(self) -> float:
        """The fourth central moment, not standardised."""
        return 0.0 if self.kurtosis is None else self.kurtosis * self.variance**2


@dataclass(frozen=True)
class Stratum:
    """Uniformly drawn windows of the tokens with an activation from `low` on, below `high`.

    Bounds given by rank are lower edges of the histogram's bins, so up to a bin below the exact quantile; the last
    upper bound, of rank or level, is the maximum itself.
    """

    low: float
    high: float
    windows: tuple[Window, ...]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Exact numbers of tokens: `count` (n,) of them between `low` (n,) and `high` (n,), rising; empty bins left out."""

    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class TokenMean:
    """Mean activation over all `count` occurrences of a token id."""

    token: int
    mean: float
    count: int


@dataclass(frozen=True)
class NeuronRecord:
    """Behaviour of one neuron on the collected text.

    top: windows of the highest activations, highest first. random: windows of uniformly drawn positions.
    density: fraction of tokens with a non-zero activation.
    by_quantile: five strata at the quantiles 0, .5, .9, .99, .999, 1 (OpenAI). by_rank: eleven between the ranks k/12,
    k = 0..11 (Anthropic). by_level: eleven between the activations k/12 of the maximum, k = 1..12 (Bricken et al.).
    top_tokens, bottom_tokens: token ids of the highest and the lowest mean activation.

    No two windows of `top` and `random` together share a token, nor do those of a stratification share one with them
    (cut to its width) or with each other.
    """

    neuron: NeuronId
    top: tuple[Window, ...]
    random: tuple[Window, ...]
    moments: Moments
    density: float
    by_quantile: tuple[Stratum, ...] = ()
    by_rank: tuple[Stratum, ...] = ()
    by_level: tuple[Stratum, ...] = ()
    histogram: Histogram | None = None
    top_tokens: tuple[TokenMean, ...] = ()
    bottom_tokens: tuple[TokenMean, ...] = ()

    @property
    def dead(self) -> bool:
        """Never active on any token read."""
        return self.density == 0.0


_PLACES = ("excerpt", "start", "peak")
_LISTS = [("tokens", pa.list_(pa.int32())), ("activations", pa.list_(pa.float32()))]
_WINDOW = pa.struct([*((name, pa.int32()) for name in _PLACES), *_LISTS])
_STRATUM = pa.struct([("low", pa.float64()), ("high", pa.float64()), ("windows", pa.list_(_WINDOW))])
_BIN = pa.struct([("low", pa.float64()), ("high", pa.float64()), ("count", pa.int64())])
_TOKEN = pa.struct([("token", pa.int32()), ("mean", pa.float64()), ("count", pa.int64())])
STRATIFICATIONS = ("by_quantile", "by_rank", "by_level")
QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
"""Bounds of the strata by quantile: OpenAI's (paper section 4). Their windows are as long as the top ones."""
_MOMENTS = ("mean", "variance", "third", "fourth", "skewness", "kurtosis", "maximum")
SCHEMA = pa.schema(
    [
        *(("model", pa.string()), ("site", pa.string()), ("layer", pa.int32()), ("index", pa.int32())),
        ("n_tokens", pa.int64()),
        *((name, pa.float64()) for name in (*_MOMENTS, "density")),
        *(("dead", pa.bool_()), ("top", pa.list_(_WINDOW)), ("random", pa.list_(_WINDOW))),
        *((name, pa.list_(_STRATUM)) for name in STRATIFICATIONS),
        ("histogram", pa.list_(_BIN)),
        ("top_tokens", pa.list_(_TOKEN)),
        ("bottom_tokens", pa.list_(_TOKEN)),
    ],
    metadata=CHECKED,
)
WIDTH = b"width"
"""Metadata of records of a sample: how many neurons the layer has."""
AT_ONCE = 512
"""Records held in memory at once."""
_NEURONS_A_READ = 64
"""Neurons in one row group, the least that is read from disk at once."""


def list_column(counts: np.ndarray, values: pa.Array) -> pa.ListArray:
    """Cut `values` into lists of `counts` (n,) entries each."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def window_array(
    tokens: np.ndarray,
    activations: np.ndarray,
    widths: np.ndarray,
    excerpt: np.ndarray,
    start: np.ndarray,
    peak: np.ndarray,
) -> pa.StructArray:
    """m windows as an Arrow array; `tokens` and `activations` are those of all windows end to end."""
    arrays = [pa.array(column, pa.int32()) for column in (excerpt, start, peak)]
    arrays.append(list_column(widths, pa.array(tokens, pa.int32())))
    arrays.append(list_column(widths, pa.array(activations, pa.float32())))
    return pa.StructArray.from_arrays(arrays, fields=list(_WINDOW))


def write_table(path: Path, columns: dict[str, Any], width: int | None = None) -> None:
    """Write one layer's columns (SCHEMA) to a Parquet file, atomically, one row per neuron.

    width: how many neurons the layer has, where these may be a sample of them.
    """
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    about = {} if width in (None, len(arrays[0])) else {WIDTH: str(width).encode()}
    with atomic_path(path) as temporary:
        table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(CHECKED | about))
        # Dictionaries of activations would be larger than these.
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=False,
            row_group_size=_NEURONS_A_READ,
            write_page_checksum=True,  # for other tools; it leaves headers and the footer out
        )
        seal(temporary)


def write_records(path: Path, records: Sequence[NeuronRecord]) -> None:
    """Write one layer's neuron records to a Parquet file, atomically, one row per neuron."""

    def column(name: str) -> list[Any]:
        return [getattr(record, name) for record in records]

    columns: dict[str, Any] = {
        **{name: [getattr(one, name) for one in column("neuron")] for name in ("model", "site", "layer", "index")},
        **{name: [getattr(one, name) for one in column("moments")] for name in ("n_tokens", *_MOMENTS)},
        **{name: column(name) for name in ("density", "dead")},
        **{name: _window_lists(column(name)) for name in ("top", "random")},
        **{name: _stratum_lists(column(name)) for name in STRATIFICATIONS},
        "histogram": [_bins(histogram) for histogram in column("histogram")],
        **{name: [[*map(vars, means)] for means in column(name)] for name in ("top_tokens", "bottom_tokens")},
    }
    write_table(path, columns)


def _window_lists(lists: Sequence[Sequence[Window]]) -> pa.ListArray:
    windows = [window for one in lists for window in one]
    tokens = np.concatenate([window.tokens for window in windows] or [np.zeros(0)]).astype(np.int64)
    activations = np.concatenate([window.activations for window in windows] or [np.zeros(0)])
    widths = np.array([len(window.tokens) for window in windows], dtype=np.int64)
    places = [np.array([getattr(window, name) for window in windows]) for name in _PLACES]
    array = window_array(tokens, activations, widths, *places)
    return list_column(np.array([len(one) for one in lists]), array)


def _stratum_lists(lists: Sequence[Sequence[Stratum]]) -> pa.ListArray:
    strata = [stratum for one in lists for stratum in one]
    low, high = np.array([(stratum.low, stratum.high) for stratum in strata]).reshape(-1, 2).T
    windows = _window_lists([stratum.windows for stratum in strata])
    return stratum_lists(np.array([len(one) for one in lists]), low, high, windows)


def stratum_lists(counts: np.ndarray, low: np.ndarray, high: np.ndarray, windows: pa.ListArray) -> pa.ListArray:
    """`counts` (h,) strata of each neuron, with their bounds (s,) and their lists of windows (s,)."""
    bounds = [pa.array(low, pa.float64()), pa.array(high, pa.float64())]
    return list_column(counts, pa.StructArray.from_arrays([*bounds, windows], fields=list(_STRATUM)))


def _bins(histogram: Histogram | None) -> list[dict[str, float]]:
    if histogram is None:
        return []
    rows = zip(histogram.low, histogram.high, histogram.count, strict=True)
    return [{"low": low, "high": high, "count": count} for low, high, count in rows]


def read_records(
    path: Path, indices: Sequence[int] | None = None, strata: Collection[str] = STRATIFICATIONS
) -> dict[int, NeuronRecord]:
    """Read one layer's records by neuron index; only `indices` when given. Errors as of `read_columns`, `records_of`.

    strata: the stratifications to read, which are most of what a record holds; it is as if there were no others.
    """
    return records_of(path, read_columns(path, columns_with(strata), indices), indices)


def columns_with(strata: Collection[str]) -> list[str]:
    """All columns of a file, of the stratifications only these."""
    return [name for name in SCHEMA.names if name not in STRATIFICATIONS or name in strata]


def each_record(path: Path, strata: Collection[str] = STRATIFICATIONS) -> Iterator[NeuronRecord]:
    """All records of a layer in the order of the file, `AT_ONCE` in memory at a time. Errors as of `read_records`."""
    indices = read_columns(path, ["index"]).column("index").to_pylist()
    for start in range(0, len(indices), AT_ONCE):
        yield from read_records(path, indices[start : start + AT_ONCE], strata).values()


def records_of(path: Path, table: pa.Table, indices: Sequence[int] | None = None) -> dict[int, NeuronRecord]:
    """The records in some rows of a file; only `indices` when given, in this order. UserError for one not in it."""
    if indices is not None:
        rows = {index: row for row, index in enumerate(table.column("index").to_pylist())}
        missing = [index for index in indices if index not in rows]
        if missing:
            raise _no_neuron(path, missing[0])
        table = table.take(pa.array([rows[index] for index in indices], pa.int64()))
    return {record.neuron.index: record for batch in table.to_batches(64) for record in _records(batch)}


def _no_neuron(path: Path, index: int) -> UserError:
    """What to tell of a neuron that has no record."""
    known, width = read_columns(path, ["index"]).column("index").to_pylist(), layer_width(path)
    if len(known) < width and 0 <= index < width:
        return UserError(
            f"{path}: neuron {index} was not collected, only a sample of {len(known)} of {width} (such as {known[0]}); "
            f"delete {path.parent} and run `cratescope collect` without --sample"
        )
    return UserError(f"{path}: no neuron {index}; this layer has neurons 0 to {max([*known, width - 1])}")


def layer_width(path: Path, whole: bool = True) -> int:
    """How many neurons the layer has, of which the file may hold a sample. `whole`, errors as of `read_columns`."""
    known = read_columns(path, ["index"], whole=whole)
    return int((known.schema.metadata or {}).get(WIDTH, known.num_rows))


def read_columns(
    path: Path, columns: Sequence[str], indices: Sequence[int] | None = None, whole: bool = True
) -> pa.Table:
    """Some columns of one layer's records, a row per neuron; only of some neurons when `indices` are given.

    whole: compare the checksum of the whole file first, which reads it all; without, only what is read is checked.

    Raises UserError: the file is missing, damaged or of another version.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; run `cratescope collect` first, or check the layer")
    chosen = None if indices is None else _among(indices)
    fix, kinds = "delete it and run `cratescope collect`", (OSError, ValueError, pa.ArrowException)
    with as_user_error(f"{path}: damaged Parquet file", fix, kinds):
        sealed = not whole or is_sealed(path)
        schema = pq.read_schema(path)
        if (schema.metadata or {}).get(b"checksum") and not sealed:
            raise pa.ArrowInvalid("its checksum is gone")
        if not all(field.name in schema.names and schema.field(field.name).type == field.type for field in SCHEMA):
            raise UserError(f"{path}: made by an older version; delete {path.parent} and run `cratescope collect`")
        return pq.read_table(path, columns=[*columns], filters=chosen, page_checksum_verification=True)


def bytes_per_row(path: Path) -> int:
    """How much of memory the columns of one neuron take, at least 1. Errors as of `read_columns`."""
    read_columns(path, ["index"], [])
    about = pq.read_metadata(path)
    size = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
    return size // max(about.num_rows, 1) + 1


def _among(indices: Sequence[int]) -> pc.Expression:
    """Rows of some neurons; the bounds are what row groups can be left out by."""
    index = pc.field("index")
    if not len(indices):
        return index.isin([])
    return (index >= min(indices)) & (index <= max(indices)) & index.isin(list(indices))


def _records(batch: pa.RecordBatch) -> list[NeuronRecord]:
    """Windows are read as arrays; the small rest as Python values."""
    strata = [name for name in STRATIFICATIONS if name in batch.schema.names]
    large = ("top", "random", *strata, "histogram")
    top, random = (_read_windows(batch.column(name)) for name in ("top", "random"))
    stratified = {name: _read_strata(batch.column(name)) for name in strata}
    histograms = _read_histograms(batch.column("histogram"))
    rows = batch.drop_columns(list(large)).to_pylist()
    return [
        NeuronRecord(
            neuron=NeuronId(row["model"], row["site"], row["layer"], row["index"]),
            top=top[number],
            random=random[number],
            moments=Moments(*(row[field.name] for field in dataclasses.fields(Moments))),
            density=row["density"],
            **{name: lists[number] for name, lists in stratified.items()},
            histogram=histograms[number],
            top_tokens=tuple(TokenMean(**token) for token in row["top_tokens"]),
            bottom_tokens=tuple(TokenMean(**token) for token in row["bottom_tokens"]),
        )
        for number, row in enumerate(rows)
    ]


def _cut(lists: pa.ListArray, items: Any) -> list[Any]:
    """`items` of all lists end to end, cut at the lists' ends."""
    offsets = (lists.offsets.to_numpy() - lists.offsets[0].as_py()).tolist()
    return [items[low:high] for low, high in zip(offsets[:-1], offsets[1:], strict=True)]


def _read_windows(column: pa.ListArray) -> list[tuple[Window, ...]]:
    array = column.flatten()
    tokens, activations = (
        _cut(array.field(name), array.field(name).flatten().to_numpy().astype(kind))
        for name, kind in (("tokens", np.int64), ("activations", np.float32))
    )
    places = [array.field(name).to_pylist() for name in _PLACES]
    return _cut(column, tuple(map(Window, tokens, activations, *places)))


def _read_strata(column: pa.ListArray) -> list[tuple[Stratum, ...]]:
    array = column.flatten()
    bounds = [array.field(name).to_pylist() for name in ("low", "high")]
    return _cut(column, tuple(map(Stratum, *bounds, _read_windows(array.field("windows")))))


def _read_histograms(column: pa.ListArray) -> list[Histogram | None]:
    array = column.flatten()
    parts = [_cut(column, array.field(name).to_numpy()) for name in ("low", "high", "count")]
    return [Histogram(*part) if len(part[0]) else None for part in zip(*parts, strict=True)]

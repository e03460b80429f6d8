"""Sources of documents: the offline corpus, text files in several formats, or a hub data set.

A reader yields documents unchanged; bytes that cannot be decoded become lone surrogates (`files.encoding_of`), so
that the caller can count and replace them in one place.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from cratescope.errors import UserError, as_user_error, first_line
from cratescope.files import encoding_of, parse_json, sha256
from cratescope.text import offline

_PLAIN = (".txt", ".md", ".jsonl")
SUFFIXES = (*_PLAIN, ".parquet", *(kind + pack for pack in (".gz", ".zst") for kind in _PLAIN))
FORMATS = ", ".join(SUFFIXES)
BLOCK = 1 << 20
LONGEST_WINDOW = 1 << 31
"""Bytes of the longest window of zstandard (`zstd --long=31`)."""
TEXT_TYPES = (
    *(pa.string(), pa.large_string(), pa.string_view(), pa.null()),
    *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.json_(pa.string())),
)
UNREADABLE = "cannot be read"
SHOWN = 5
"""Files left out that are named in a message."""


class Documents:
    """The documents of a file from number `position` on; `position` advances with each."""

    def __init__(self, read: Callable[[], Iterator[str]], position: int | None = None) -> None:
        self.read, self.position = read, position or 0

    def __iter__(self) -> Iterator[str]:
        for text in islice(self.read(), self.position, None):
            self.position += 1
            yield text


class HubDocuments:
    """The rows of a streamed data set from `position` on, which is the library's own record of its progress."""

    def __init__(self, name: str, rows: Any, position: dict[str, Any] | None = None) -> None:
        self.name, self.rows = name, rows
        if position:
            rows.load_state_dict(position)

    @property
    def position(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def __iter__(self) -> Iterator[str]:
        with as_user_error(f"{self.name}: reading stopped", "the same command resumes from there"):
            for row in self.rows:
                text = as_document(row["text"]) if "text" in row else None
                if text is None:
                    what = f"no `text` column of strings, only {', '.join(row)}"
                    raise UserError(f"{self.name}: {what}; use a data set with one")
                yield text


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


def open_sources(source: str) -> tuple[dict[str, str], list[Source], dict[str, str]]:
    """Open `offline`, a file, a folder or a hub name: a cheap identity of its content, and its sources.

    Also returns the files of a folder that are left out, with reasons. Raises UserError for an unknown name or format.
    """
    path, left_out = Path(os.path.expanduser(source)), dict[str, str]()  # Path.expanduser raises for unknown names
    if source == "offline":
        offline.fetch_all(name for part in offline.CORPUS for name in part.archives)
        sources = []
        for part in offline.CORPUS:
            read, digest = partial(Documents, part.documents), partial(str, part.sha256)
            sources.append(Source(part.name, part.licence, part.origin, part.size, read, digest))
        listing = [part.sha256 for part in offline.CORPUS]
    elif path.exists():
        files, left_out = _files(path)
        sources = [_file_source(name, file) for name, file in files]
        listing = [f"{name} {file.stat().st_size}" for name, file in files]
    else:
        return {"source": source}, [_hub(source)], {}
    together = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()
    name = source if source == "offline" else path.resolve().name
    return {"source": name, "source_files": together}, sources, left_out


def _files(path: Path) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """`files_below` of a folder, or a single file."""
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; the known ones are {FORMATS}")
        return [(path.name, path)], {}
    if not path.is_dir():
        raise UserError(f"{path}: is a device or pipe; give a file or a folder")
    found, left_out = files_below(path, SUFFIXES)
    if not found:
        but = f" ({name_some(left_out)})" if left_out else ""
        raise UserError(f"{path}: no files of a known kind in this folder{but}; the known ones are {FORMATS}")
    return found, left_out


def files_below(top: Path, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """(name relative to the folder, path) of files with these suffixes, and reasons for what is left out, by name."""
    found: list[tuple[str, Path]] = []
    links: list[tuple[str, Path]] = []
    left_out: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        left_out[os.path.relpath(error.filename, top)] = UNREADABLE

    for folder, folders, files in os.walk(top, onerror=unreadable):
        for entry in (Path(folder, name) for name in [*folders, *files]):
            name = entry.relative_to(top).as_posix()
            if reason := _reason(entry, Path(os.path.realpath(top)), suffixes):
                left_out[name] = reason
            elif entry.is_file():
                (links if entry.is_symlink() else found).append((name, entry))
        folders[:] = [name for name in folders if not name.startswith(".")]
    known = {os.path.realpath(file) for _, file in found}
    for name, file in sorted(links):
        if (target := os.path.realpath(file)) in known:
            left_out[name] = "a link to a file that is read"
        else:
            known.add(target)
            found.append((name, file))
    return sorted(found), dict(sorted(left_out.items()))


def _reason(entry: Path, root: Path, suffixes: tuple[str, ...]) -> str | None:
    """Say why a file or folder below `root` is left out; links in foreign folders must not lead outside."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink() and not os.path.exists(entry):
        return "a link to nothing"
    if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
        return "a link that leads out of the folder"
    if entry.is_dir():
        return "a link to a folder" if entry.is_symlink() else None
    if not entry.name.lower().endswith(suffixes):
        return "unknown kind"
    if not entry.is_file():
        return "no regular file"
    return None if os.access(entry, os.R_OK) else UNREADABLE


def name_some(left_out: dict[str, str]) -> str:
    """List the first few names with their reasons, and the number of the rest."""
    shown = [f"{name} ({reason})" for name, reason in islice(left_out.items(), SHOWN)]
    more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"left out: {', '.join(shown)}{more}"


def _file_source(name: str, path: Path) -> Source:
    packed = path.suffix.lower() in (".gz", ".zst")
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    read = {".jsonl": jsonl_documents, ".parquet": parquet_documents}.get(suffix, text_documents)
    size = path.stat().st_size * (3 if packed else 2 if suffix == ".parquet" else 1)
    documents = partial(Documents, partial(read, path))
    return Source(name, "not stated", str(path), size, documents, partial(sha256, path))


def as_document(value: Any) -> str | None:
    """Convert a value of a text column: null is an empty document, bytes are UTF-8; None if it is not text."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else None


def text_documents(path: Path) -> Iterator[str]:
    """Read a text file as one document; a long one is cut into several at blank lines (`offline.cut`)."""
    with _opened(path, newline="") as file:
        # readline with a limit: a file without line ends must not be read into memory whole.
        lines = iter(lambda: file.readline(offline.PIECE), "")
        # Files that were put together have byte-order marks in their midst.
        yield from _without_nuls(path, offline.cut(line.removeprefix("\ufeff") for line in lines))


def _without_nuls(path: Path, texts: Iterable[str]) -> Iterator[str]:
    """The same texts. Raises UserError when one is full of NULs."""
    for text in texts:
        if _has_nuls(text):
            raise _not_utf8(str(path))
        yield text


def _has_nuls(text: str) -> bool:
    """Whether more than one character in twenty is NUL; in Cyrillic UTF-16 it is one in twelve."""
    return text.count("\0") * 20 > len(text)


def _not_utf8(where: str) -> UserError:
    return UserError(
        f"{where}: full of NULs, so it is not UTF-8 text (UTF-16 without a byte-order mark?); "
        "convert it first, e.g. with iconv -f UTF-16LE (or UTF-16BE) -t UTF-8"
    )


@contextlib.contextmanager
def _opened(path: Path, newline: str) -> Iterator[TextIO]:
    """The text of a file, unpacked by its suffix and decoded by its byte-order mark; UserError if it is damaged."""
    try:
        with _unpacked(path) as start:
            encoding, errors = encoding_of(start.read(4))
        with io.TextIOWrapper(_unpacked(path), encoding, errors, newline) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short gzip file ({first_line(error)}); get it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _unpacked(path: Path) -> Any:
    """The bytes of a file, unpacked by its suffix, as an open file."""
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Blocks(_zstd_blocks(path)), BLOCK)
    if path.suffix.lower() == ".gz":
        if not path.stat().st_size:
            raise EOFError("it is empty")  # which the library takes for the end of the data
        return gzip.GzipFile(path)
    return open(path, "rb")


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file to read."""

    def __init__(self, blocks: Generator[bytes]) -> None:
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n

    def close(self) -> None:
        self.blocks.close()
        super().close()


def _zstd_blocks(path: Path) -> Generator[bytes]:
    frame = None
    with open(path, "rb") as file:
        try:
            while block := file.read(BLOCK):
                while block:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()
                    yield frame.decompress(block)
                    block = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise UserError(f"{path}: damaged zstandard file ({error}); get it again") from error
    if frame is not None:
        raise UserError(f"{path}: the zstandard file is cut short; get it again")


def jsonl_documents(path: Path) -> Iterator[str]:
    """Read one JSON object with a `text` string per line, plain or compressed; null is an empty document."""
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            # Concatenated files have byte-order marks in the middle.
            line = line.removeprefix("\ufeff").strip(" \t\r\n")
            if not line:
                continue
            if _has_nuls(line):
                raise _not_utf8(f"{path}:{number}")
            row = parse_json(line, f"{path}:{number}", "mend or delete the line")
            text = as_document(row["text"]) if isinstance(row, dict) and "text" in row else None
            if text is None:
                raise UserError(f'{path}:{number}: no "text" string; every line has to be like {{"text": "..."}}')
            if _has_nuls(text):  # written out as \u0000
                raise _not_utf8(f"{path}:{number}")
            yield text


def parquet_documents(path: Path) -> Iterator[str]:
    """The `text` column, row by row, of strings or of bytes that are UTF-8; missing values are empty documents."""
    damaged = as_user_error(f"{path}: damaged Parquet file", "get it again", (pa.ArrowException, OSError))
    with damaged, pq.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow)
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            column = batch.column(0)
            column = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
            # As bytes: a string that is not UTF-8 would raise.
            documents = (as_document(value) or "" for value in column.cast(pa.large_binary()).to_pylist())
            yield from _without_nuls(path, documents)


def _check_column(path: Path, schema: pa.Schema) -> None:
    if schema.names.count("text") != 1:
        found = "more than one column" if "text" in schema.names else "no column"
        raise UserError(f"{path}: {found} `text` of strings, only {', '.join(schema.names) or 'none'}; rename one")
    kind = schema.field("text").type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if values not in TEXT_TYPES and not pa.types.is_fixed_size_binary(values):
        raise UserError(f"{path}: no column `text` of strings, it is of {kind}; write the text as a string a row")


def _hub(source: str) -> Source:
    """A data set of the hub, streamed: `owner/name` or `owner/name:configuration`, split `train`."""
    name, _, configuration = source.partition(":")
    missing = f"{source}: no such file or folder"
    fix = "give `offline`, a file, a folder, or a data set name of the hub"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.lower().endswith(SUFFIXES):
        raise UserError(f"{missing}; {fix}")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{missing}; if it is a data set of the hub: pip install 'cratescope[hub]'") from error
    with as_user_error(f"{missing}, and no data set of that name can be opened from the hub", fix):
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    licence = (rows.info and rows.info.license) or "not stated"
    return Source(source, licence, f"hub data set {source}", None, partial(HubDocuments, source, rows), lambda: None)

"""Read and write files: encodings, JSON of a known shape, atomic writes, checksums."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cratescope.errors import DISK_FULL, UNUSABLE, UserError, first_line, shown_path

T = TypeVar("T")
Shape = Any
"""Required shape of a JSON value; see `misfit`."""
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which no UTF-8 has: JSON can hold them, and what cannot be decoded is read as such."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, because it begins with UTF-16's mark
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The library's own handler, `surrogateescape`, knows encodings of single bytes only.
codecs.register_error("lone-surrogate", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def encoding_of(start: bytes) -> tuple[str, str]:
    """Encoding of a file that starts with these bytes, by its byte-order mark, and an error handler.

    Without a mark it is UTF-8. The handler makes lone surrogates of what cannot be decoded, to be counted and replaced.
    """
    found = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    return (found, "lone-surrogate") if found else ("utf-8-sig", "surrogateescape")


def decode_text(data: bytes, errors: str | None = None) -> str:
    """Decode a whole file as `encoding_of` says, or with another error handler."""
    encoding, handler = encoding_of(data[:4])
    return data.decode(encoding, errors or handler)


def parse_json(text: str | bytes, where: str, fix: str, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON; `where` begins the message of an error and `fix` ends it. constant: what NaN and Infinity become.

    Raises UserError: not JSON, nested too deeply, or a number of more digits than Python reads.
    """
    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply); {fix}") from error
    except ValueError as error:  # not only JSONDecodeError: numbers of thousands of digits raise ValueError too
        reason = first_line(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"{error.msg}: {line}column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({reason}); {fix}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UserError where there cannot be one; a full disk stays an OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _refused(error, folder) from error


@contextlib.contextmanager
def folder_there(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; of these the new ones go again where nothing was put into them."""
    # os.path: a name that is too long, or no path at all, is not there, and making it says why.
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    make_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def _refused(error: OSError | ValueError, path: Path) -> Exception:
    """The error to raise when `path` cannot be written; a full disk keeps its own error."""
    if isinstance(error, ValueError):
        return UserError(f"{str(path)!r}: not a path ({error}); give another one")
    if error.errno in DISK_FULL:
        return error
    # In a virtual file system such as /proc, creating a file gives "no such file".
    why = UNUSABLE.get(error.errno or 0, f"nothing can be written there ({error.strerror}); name another path")
    return UserError(f"{shown_path(path)}: {why}")


_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})\.(\d+)-\d+\.tmp")
_WEEK = 7 * 86400
_numbers = itertools.count()
_swept: set[tuple[int, Path]] = set()


@functools.cache
def _here() -> str:
    """The scope in which process numbers are unique: this machine and, on it, this container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A name for a temporary file or folder in the (existing) folder of `path`; leftovers there are removed.

    The name identifies the writing process, so leftovers of killed processes can be told from live files.
    """
    remove_leftovers(path.parent)
    return path.with_name(f".{path.name[:40]}.{_here()}.{os.getpid()}-{next(_numbers)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries of dead processes, the first time that this process writes into the folder."""
    if (os.getpid(), folder) in _swept:
        return
    _swept.add((os.getpid(), folder))
    with contextlib.suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder)]:
            found = _TEMPORARY.fullmatch(path.name)
            if found and _is_left(path, found[1], int(found[2])):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_left(path: Path, here: str, process: int) -> bool:
    """Whether no process writes the temporary any more; for other machines only its age can tell."""
    if here != _here():
        return time.time() - path.stat().st_mtime > _WEEK
    if process == os.getpid():
        return True  # an earlier process had our number; this one has not written here yet
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False


@contextlib.contextmanager
def atomic_path(path: Path, first: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    first: keep a file that another process has put there in the meantime.
    """
    with _new_beside(path, Path.touch) as temporary:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if first:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; rename it to `folder` when the block ends without an error."""
    folder = Path(os.path.realpath(folder))
    with _new_beside(folder, Path.mkdir) as temporary:
        yield temporary
        _put(temporary, folder)


@contextlib.contextmanager
def _new_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make and yield a temporary file or folder beside `path`; it is removed at the end if it is still there."""
    with folder_there(path.parent):
        temporary = temporary_beside(path)
        try:
            # Here and not in a library, whose errors may not say what is wrong with the path.
            with contextlib.suppress(FileNotFoundError):
                path.lstat()
            make(temporary)
        except (OSError, ValueError) as error:
            raise _refused(error, path) from error
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                _remove(temporary)


def _put(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, replacing an older one; if several processes do so at once, the last one wins."""
    for attempt in range(10):
        old = temporary_beside(folder)
        try:
            if folder.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    os.replace(folder, old)
            os.replace(new, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 9:
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: a missing number is null."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is not UTF-8 comes as lone surrogates, which JSON can hold as escapes only.
    return SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def read_json(path: Path, shape: Shape = None, maker: str = "the stage that makes it") -> Any:
    """Read a JSON file whose value has a `shape` (see `misfit`); `maker` is what writes the file.

    Raises UserError: the file is missing, damaged, or holds something else; names the file and the fix.
    """
    again = f"delete it and run {maker} again"
    try:
        value = parse_json(path.read_bytes(), str(path), again, _no_number)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if shape is not None and (wrong := misfit(value, shape)):
        raise UserError(f"{path}: damaged or not a file of cratescope ({wrong}); {again}")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which no file of cratescope holds")


def misfit(value: Any, shape: Shape, name: str = "it") -> str | None:
    """Describe how a JSON value differs from the wanted shape; None when it fits.

    A shape is a type, a tuple of types (None is one), `[shape]` for a list, `{str: shape}` for any names, or
    `{name: shape}` for an object with these names at least; a name with a `?` may be missing. float takes an int.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is not an object"
        if str in shape:
            return next(filter(None, (misfit(item, shape[str], key) for key, item in value.items())), None)
        for key, wanted in shape.items():
            if key.removesuffix("?") in value:
                if wrong := misfit(value[key.removesuffix("?")], wanted, key.removesuffix("?")):
                    return wrong
            elif not key.endswith("?"):
                return f"{key} is missing"
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        if isinstance(shape[0], type | tuple):  # many numbers: check them all at once
            odd = {*map(type, value)} - _json_types(shape[0])
            return f"{name} holds a {next(iter(odd)).__name__}" if odd else None
        return next(filter(None, (misfit(item, shape[0], f"an entry of {name}") for item in value)), None)
    return None if type(value) in _json_types(shape) else f"{name} is a {type(value).__name__}"


def _json_types(shape: type | tuple[type | None, ...] | None) -> set[type]:
    types = {type(None) if one is None else one for one in (shape if isinstance(shape, tuple) else (shape,))}
    return types | ({int} if float in types else set())


def read_jsonl(
    path: Path, shape: Shape = None, maker: str = "the stage that makes it", whole: bool = False
) -> list[dict[str, Any]]:
    """Read a JSON-lines log of objects; a last line cut short by a kill is left out, unless it has to be `whole`.

    Raises UserError: a line is damaged or has another `shape`.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); delete it and run {maker} again") from error
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        where, again = f"{path}: line {number}", f"delete the file and run {maker} again"
        try:
            rows.append(parse_json(line, where, again, _no_number))
        except UserError:
            if number == len(lines) and _is_cut_short(text) and not whole:
                break
            raise
        if wrong := misfit(rows[-1], {} if shape is None else shape, "it"):
            raise UserError(f"{where}: {wrong}; {again}")
    return rows


def _is_cut_short(log: str) -> bool:
    last = log.rpartition("\n")[2]
    return last.startswith("{") and "\0" not in last


def sha256(path: Path) -> str:
    """The file's SHA-256 as hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> tuple[int, int, int, int]:
    """Values that stay the same until a file is touched; the change time cannot be set back, unlike the write time."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def until_touched(work: Callable[[Path], T]) -> Callable[[Path], T]:
    """What a function makes of a file, remembered within this process until the file is touched."""
    known = functools.lru_cache(1024)(lambda path, _stamp: work(path))
    return functools.wraps(work)(lambda path: known(path, stamp(path)))


known_sha256 = until_touched(sha256)


WHOLE = "whole.json"
"""Written last into a folder of a model or tokenizer and into a checkpoint: the SHA-256 of its files."""


def mark_whole(folder: Path) -> None:
    """Record that every file of the folder is on disk, with their hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != WHOLE)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(folder / WHOLE, {str(path.relative_to(folder)): sha256(path) for path in files})


def check_whole(folder: Path, weights: bool = True) -> None:
    """Compare the files of a folder with what was written; an unmarked folder is accepted as it is.

    weights: look at *.safetensors too, which are large. UserError names a file that is missing or has changed.
    """
    path = folder / WHOLE
    if not path.exists():
        return
    again = f"copy it again from where it was whole, or delete {folder} and make it again"
    for name, digest in read_json(path, {str: str}, "what made the folder").items():
        if name.endswith(".safetensors") and not weights:
            continue
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; {again}")
        if known_sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name}: damaged (its SHA-256 is not the one in {WHOLE}); {again}; if you have changed it "
                f"yourself, delete {path}"
            )


LONGEST_SLUG = 160
"""Characters of a path component made from a name; with a hash and a temporary's suffix it stays far below 255."""


def slug(name: str) -> str:
    """`name` as a single path component: `org/model:Q4` becomes `org-model-Q4`.

    If more than `/` and `:` is lost, or the component would be too long, a hash keeps similar names apart.
    """
    short = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")
    if len(short) <= LONGEST_SLUG and short == re.sub("[/:]", "-", name).strip("-."):
        return short or "unnamed"
    return f"{short[:LONGEST_SLUG] or 'unnamed'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

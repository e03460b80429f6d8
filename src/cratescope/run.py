"""The run directory: paths, atomic writes, and the identity of what a folder was made from.

A stage never edits a finished file. It writes to a temporary name beside the target and renames it, so a file
either does not exist or is whole; skipping what exists is therefore resume.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NoReturn

Shape = Any
"""What a JSON value has to look like; see `misfit`."""

SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which no UTF-8 has: JSON can hold them, and what cannot be decoded is read as such."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The library's own handler, `surrogateescape`, knows encodings of single bytes only.
codecs.register_error("lone-surrogate", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the fix (exit code 2)."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end and what was done is saved; the exit code is 128 and the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


_PLAINLY = {
    "weights_only": "its weights hold Python objects, which could run code and are never loaded; get safetensors",
    "custom code": "it needs code of its own, which is never run; take one whose class transformers has",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
}
"""What to say where another library advises what cannot be done here, or to run a stranger's code; by its words."""


def first_line(error: BaseException) -> str:
    """What another library says of a failure, cut to one line."""
    if told := next((told for sign, told in _PLAINLY.items() if sign in str(error)), None):
        return told
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """The same for errors whose last line is the cause."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__).strip()


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


def parse_json(text: str | bytes, where: str, fix: str) -> Any:
    """Parse JSON that came from outside; `where` begins the message of an error and `fix` ends it.

    Raises:
        UserError: not JSON, nested too deeply, or a number of more digits than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply); {fix}") from error
    except ValueError as error:  # also of what is no JSONDecodeError: numbers of thousands of digits
        reason = first_line(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"{error.msg}: {line}column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({reason}); {fix}") from error


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
UNUSABLE = {
    errno.EROFS: "the disk is read-only; name a path on another one",
    errno.EACCES: "no permission; change it, or name another path",
    errno.EPERM: "not permitted; name another path",
    errno.ENOTDIR: "there is a file where a folder has to be; move it, or name another path",
    errno.EEXIST: "there is a file where a folder has to be; move it, or name another path",
    errno.EISDIR: "there is a folder where a file has to be; move it, or name another path",
    errno.ENAMETOOLONG: "the name is too long (255 bytes are the most); give a shorter one",
    errno.ELOOP: "links that lead in a circle; name another path",
    errno.EBUSY: "it is in use or the root of a disk; name a folder inside it",
    errno.EMFILE: "too many open files; raise the limit (`ulimit -n`)",
    errno.ENFILE: "too many open files on this machine; close some programs",
    errno.EIO: "the disk fails; save what can be read, and name a path on another one",
    errno.ESTALE: "the network disk has lost it; run the same command again",
    errno.EFBIG: "the file would be larger than this disk or the limit (`ulimit -f`) allows",
    errno.EINVAL: "the disk does not take this name or file; name a path on another one",
    errno.EOPNOTSUPP: "the disk cannot do this; name a path on another one",
    errno.ENODEV: "is a device without a driver; name another path",
    errno.ENXIO: "is a device or pipe that nothing is behind; name another path",
    errno.ENOTEMPTY: "another process writes there; run the same command again when it has ended",
    errno.EXDEV: "lies on two disks at once; name another path",
}
"""What is wrong with a path, and the fix, by the number of the system's error."""


def unusable(error: OSError) -> str | None:
    """One line on a path that the system refuses; None for an error that is no path's fault."""
    if error.errno not in UNUSABLE or error.filename is None:
        return None
    if isinstance(error.filename, int):
        return None
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
    return f"{' and '.join(map(_shown, names))}: {UNUSABLE[error.errno]}"


def _shown(path: str | Path) -> str:
    name = str(path)
    return name if len(name) < 300 else f"{name[:150]}...{name[-50:]}"


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        UserError: there cannot be one; a full disk stays an OSError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _refused(error, folder) from error


@contextlib.contextmanager
def _folder_there(folder: Path) -> Iterator[None]:
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
    """What to raise where `path` cannot be written; a full disk stays what it is."""
    if isinstance(error, ValueError):
        return UserError(f"{str(path)!r}: not a path ({error}); give another one")
    if error.errno in DISK_FULL:
        return error
    # In a file system that the kernel makes up, such as /proc, a new name is "no such file".
    why = UNUSABLE.get(error.errno or 0, f"nothing can be written there ({error.strerror}); name another path")
    return UserError(f"{_shown(path)}: {why}")


_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})\.(\d+)-\d+\.tmp")
_WEEK = 7 * 86400
_numbers = itertools.count()
_swept: set[tuple[int, Path]] = set()


@functools.cache
def _here() -> str:
    """What the number of a process belongs to: this machine, and on it this container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A name for a temporary file or folder in the (existing) folder of `path`; leftovers there are removed.

    It says whose it is, so that what a killed process left is told from what a living one writes.
    """
    _remove_leftovers(path.parent)
    return path.with_name(f".{path.name[:40]}.{_here()}.{os.getpid()}-{next(_numbers)}.tmp")


def _remove_leftovers(folder: Path) -> None:
    """Remove temporaries of dead processes, the first time that this process writes into the folder."""
    if (os.getpid(), folder) in _swept:
        return
    _swept.add((os.getpid(), folder))
    with contextlib.suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder)]:
            found = _TEMPORARY.fullmatch(path.name)
            if found and _is_left(path, found[1], int(found[2])):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_left(path: Path, here: str, process: int) -> bool:
    """Whether nobody writes the temporary any more; of another machine's only its age is known."""
    if here != _here():
        return time.time() - path.stat().st_mtime > _WEEK
    if process == os.getpid():
        return True  # an earlier process had our number: we have not written here yet
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

    first: a file that another process has put there meanwhile stays.
    """
    with _folder_there(path.parent):
        temporary = temporary_beside(path)
        try:
            # Here and not in a library, whose errors may not say what is wrong with the path.
            with contextlib.suppress(FileNotFoundError):
                path.lstat()
            temporary.touch()
        except (OSError, ValueError) as error:
            raise _refused(error, path) from error
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if first:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; rename it to `folder` when the block ends without an error."""
    folder = Path(os.path.realpath(folder))
    with _folder_there(folder.parent):
        temporary = temporary_beside(folder)
        try:
            with contextlib.suppress(FileNotFoundError):
                folder.lstat()
            temporary.mkdir()
        except (OSError, ValueError) as error:
            raise _refused(error, folder) from error
        try:
            yield temporary
            _put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, in place of an older one; of several processes that do so at once the last wins."""
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


_held: set[Path] = set()
_NO_LOCKS = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EROFS, errno.EACCES, errno.EPERM}
)


@contextlib.contextmanager
def locked(folder: Path, stage: str, wait: bool = False) -> Iterator[None]:
    """Let one process at a time run `stage` on `folder`; what it does inside may lock the same again.

    The kernel ends the lock with its process, also when that is killed. A disk that knows no locks, or cannot be
    written to at all, is not locked.

    Raises:
        UserError: another process is there, unless `wait`; says which.
    """
    path = Path(os.path.realpath(folder)) / f".{stage}.lock"
    if path in _held:
        yield
        return
    with _folder_there(folder):  # a refused command leaves no empty folder behind
        file = _lock(folder, path, wait)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            if file is not None:
                path.unlink(missing_ok=True)
                file.close()


def _lock(folder: Path, path: Path, wait: bool) -> IO[str] | None:
    """The locked file, which says who holds it; None where there can be no lock."""
    while True:
        make_folder(folder)  # its holder may have just removed that too
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as it is locked)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
        try:
            # Not flock: a forked worker would inherit it, and keep it after the death of its parent.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{folder}: in use by {holder}; wait for its end, or stop it") from error
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            return None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(f"{_this_process()}\n")
            file.flush()
            return file
        file.close()  # its holder has just removed it


def _this_process() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    return f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: a missing number is null."""
    write_text(path, _as_json(value))


def _as_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is not UTF-8 comes as lone surrogates, which JSON can hold as escapes only.
    return SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def read_json(path: Path, shape: Shape = None, maker: str = "the stage that makes it") -> Any:
    """Read a JSON file whose value has a `shape` (see `misfit`); `maker` is what writes the file.

    Raises:
        UserError: the file is missing, damaged, or holds something else; names the file and the fix.
    """
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:  # not all that json raises is a JSONDecodeError
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); delete it and run {maker} again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if shape is not None and (wrong := misfit(value, shape)):
        raise UserError(f"{path}: damaged or not a file of cratescope ({wrong}); delete it and run {maker} again")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which no file of cratescope holds")


def misfit(value: Any, shape: Shape, name: str = "it") -> str | None:
    """What a JSON value has of another shape than wanted; None when it fits.

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
        if isinstance(shape[0], type | tuple):  # many numbers: one look at all of them
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

    Raises:
        UserError: a line is damaged or has another `shape`.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); delete it and run {maker} again") from error
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line, parse_constant=_no_number))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and _is_cut_short(text) and not whole:
                break
            raise UserError(
                f"{path}: line {number} is not valid JSON ({first_line(error)}); delete the file and run {maker} again"
            ) from error
        if wrong := misfit(rows[-1], {} if shape is None else shape, "it"):
            raise UserError(f"{path}: line {number}: {wrong}; delete the file and run {maker} again")
    return rows


def _is_cut_short(log: str) -> bool:
    last = log.rpartition("\n")[2]
    return last.startswith("{") and "\0" not in last


def sha256(path: Path) -> str:
    """The file's SHA-256 as hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> tuple[int, int, int, int]:
    """What stays as long as nobody touches a file; the time of change cannot be set back, unlike that of writing."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(1024)
def _sha256_of(path: Path, _stamp: tuple[int, int, int, int]) -> str:
    return sha256(path)


def known_sha256(path: Path) -> str:
    """As `sha256`, which is not worked out again in this process as long as nobody touches the file."""
    return _sha256_of(path, stamp(path))


WHOLE = "whole.json"
"""Written last into a folder of a model or tokenizer and into a checkpoint: the SHA-256 of its files."""


def mark_whole(folder: Path) -> None:
    """Say that every file of the folder is on disk, and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != WHOLE)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(folder / WHOLE, {str(path.relative_to(folder)): sha256(path) for path in files})


def check_whole(folder: Path, weights: bool = True) -> None:
    """Compare the files of a folder with what was written; one that was not marked is taken as it is.

    weights: look at *.safetensors too, which are large.

    Raises:
        UserError: a file is missing or has changed; names it.
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


def made_from(files: Iterable[Path], root: Path, **settings: Any) -> dict[str, str]:
    """Settings, and one SHA-256 of names (below `root`, where they are) and contents of files: has anything changed?"""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        digest.update(f"{name} {sha256(path)}\n".encode())
    return {name: str(value) for name, value in settings.items()} | {"files": digest.hexdigest()}


LONGEST_SLUG = 160
"""Characters of a path component made from a name; with a hash and a temporary's suffix it stays far below 255."""


def slug(name: str) -> str:
    """`name` as a single path component: `org/model:Q4` becomes `org-model-Q4`.

    Where more is lost than `/` and `:`, or a component would be too long, a hash tells names apart that look alike.
    """
    short = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")
    if len(short) <= LONGEST_SLUG and short == re.sub("[/:]", "-", name).strip("-."):
        return short or "unnamed"
    return f"{short[:LONGEST_SLUG] or 'unnamed'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    names = ("cratescope", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Say what `folder` is made from, or check that it was made from the same.

    The first stage to come writes `folder/manifest.json`; a later one with another identity (another model, other
    data, other settings) is refused, because mixing the two would give a result that belongs to neither.

    Raises:
        UserError: the folder was made from something else; names the first key that differs.
    """
    make_folder(folder)
    path = folder / "manifest.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        with atomic_path(path, first=True) as temporary:
            temporary.write_text(_as_json({"identity": identity, "versions": versions()}), encoding="utf-8")
    _remove_leftovers(folder)
    found = read_json(path)
    found = found.get("identity") if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a file of cratescope; use another folder")
    for key in sorted(found.keys() | identity.keys()):
        if found.get(key) != identity.get(key):
            raise UserError(
                f"{folder} was made with {key} = {found.get(key)!r}, not {identity.get(key)!r}; "
                "delete that folder or use another run directory"
            )


RUN: Shape = {
    "family": str,
    "parameters": int,
    "n_layer": (int, None),
    "context": (int, None),
    "data": {"path": str, "manifest_sha256": str},
    **{f"{name}?": int for name in ("seed", "parameters_without_positions", "n_neurons", "vocab_size", "steps")},
    **{
        f"{name}?": kind
        for name, kind in (("preset", str), ("tokens_trained", int), ("settings", {}), ("seconds", float))
    },
}
TRAINED: Shape = {"preset": str, "seed": int, "steps": int, "tokens_trained": int}
"""What later stages read in run.json, and what of a run that was trained here."""
METRICS: Shape = {
    "step": int,
    "tokens": int,
    **{f"{name}?": (float, None) for name in ("loss", "learning_rate", "validation_loss", "validation_standard_error")},
}
"""A line of metrics.jsonl."""
IDENTITY: Shape = {"identity": {}}
"""A stage's manifest.json."""


@dataclass(frozen=True)
class Run:
    """One model and everything measured on it, in one folder."""

    root: Path

    @property
    def name(self) -> str:
        """The folder's name; of a milestone also that of its run, since all runs call theirs alike."""
        root = self.root.resolve()
        return f"{root.parents[1].name}-{root.name}" if root.parent.name == "milestones" else root.name

    @property
    def manifest(self) -> Path:
        """run.json: family, preset, seed, parameters, data, tokens trained, versions."""
        return self.root / "run.json"

    @property
    def model(self) -> Path:
        """The final Hugging Face checkpoint: config.json, model.safetensors, tokenizer."""
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def milestone(self, step: int) -> Run:
        """The run as it was after `step`: a run directory of its own, never rotated away."""
        return Run(self.root / "milestones" / f"step-{step:06d}")

    @property
    def metrics(self) -> Path:
        """One JSON line a logged step: step, tokens, loss, learning_rate, speed; or step, tokens, validation_loss."""
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    def records(self, site: str) -> Path:
        """Folder with one Parquet file a layer."""
        return self.root / "records" / slug(site)

    def explanations(self, site: str, explainer: str, explained: str) -> Path:
        """Folder with one JSON file a neuron, `{layer}/{index}.json`; `explained` names the windows shown."""
        return self.root / "explanations" / slug(site) / slug(explainer) / explained

    def simulations(self, site: str, explainer: str, simulator: str, explained: str) -> Path:
        """Folder with one JSON file a neuron, `{layer}/{index}.json`."""
        return self.root / "simulations" / slug(site) / slug(explainer) / slug(simulator) / explained

    def judgements(self, site: str, explainer: str, scorer: str, explained: str) -> Path:
        """Folder with one JSON file a neuron, `{layer}/{index}.json`."""
        return self.root / "judgements" / slug(site) / slug(explainer) / slug(scorer) / explained

    def scores(self, site: str, explainer: str, simulator: str) -> Path:
        """Folder with scores.jsonl (one line a neuron, protocol, control and measure) and summary.json."""
        return self.root / "scores" / slug(site) / slug(explainer) / slug(simulator)

    def quality(self, site: str) -> Path:
        """How neurons fire, layer by layer and neuron by neuron, from the records alone."""
        return self.root / "scores" / slug(site) / "quality.json"

    def read_manifest(self) -> dict[str, Any]:
        if not self.manifest.exists():
            raise UserError(f"{self.root}: not a run directory (no run.json); make one with `cratescope train`")
        maker = "`cratescope train` or what made the run"
        found = read_json(self.manifest, RUN, maker)
        return found if "adopted" in found else read_json(self.manifest, RUN | TRAINED, maker)

    def data_entry(self, data: Path) -> dict[str, str]:
        """What run.json says of a data folder: its path from the run's folder, so that both can be moved together.

        Where one of them is reached through a link there are two such paths: through real folders, and as given.
        """
        real = os.path.relpath(data.resolve(), self.root.resolve())
        given = os.path.relpath(data, self.root)
        entry = {"path": real, "manifest_sha256": sha256(data / "manifest.json")}
        return entry if given == real else entry | {"path_as_given": given}

    def data_path(self) -> Path:
        """The data folder that run.json names: of several places the one that holds the run's own data.

        Raises:
            UserError: not a run directory.
        """
        entry = self.read_manifest()["data"]
        found: list[Path] = []
        for relative in (entry["path"], entry.get("path_as_given", entry["path"])):
            # `..` leads out of a linked folder's target by itself, and out of the link where it is normalised.
            found += [
                (self.root.resolve() / relative).resolve(),
                Path(os.path.normpath(self.root.absolute() / relative)),
            ]
        there = [path for path in found if (path / "manifest.json").is_file()]
        own = (path for path in there if sha256(path / "manifest.json") == entry.get("manifest_sha256"))
        return next(own, (there or found)[0])

    def trained_model(self) -> Path:
        """The model's folder. Raises UserError when training has not finished, or a file in it is damaged."""
        if not (self.model / "model.safetensors").exists():
            raise UserError(f"{self.model}: no model there yet; finish `cratescope train` for {self.root} first")
        check_whole(self.model)
        return self.model

    def fingerprint(self) -> str:
        """SHA-256 of the model's weights: what every later stage says it was made from."""
        return known_sha256(self.trained_model() / "model.safetensors")

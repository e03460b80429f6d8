"""The run directory: paths, atomic writes, and the identity of what a folder was made from.

A stage never edits a finished file. It writes to a temporary name beside the target and renames it, so a file
either does not exist or is whole; skipping what exists is therefore resume.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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


def first_line(error: BaseException) -> str:
    """What another library says of a failure, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()


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


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; rename it to `folder` when the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: a missing number is null."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is not UTF-8 comes as lone surrogates, which JSON can hold as escapes only.
    write_text(path, SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage that makes it again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines log; a last line cut short by a kill is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not valid JSON ({error})") from error
    return rows


def sha256(path: Path) -> str:
    """The file's SHA-256 as hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    path = folder / "manifest.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, {"identity": identity, "versions": versions()})
        return
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
        return read_json(self.manifest)

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
        """The model's folder. Raises UserError when training has not finished."""
        if not (self.model / "model.safetensors").exists():
            raise UserError(f"{self.model}: no model there yet; finish `cratescope train` for {self.root} first")
        return self.model

    def fingerprint(self) -> str:
        """SHA-256 of the model's weights: what every later stage says it was made from."""
        return sha256(self.trained_model() / "model.safetensors")

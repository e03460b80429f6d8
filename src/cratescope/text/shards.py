"""Token shards of a data folder: opened, checked and read as one long array per split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError, as_user_error
from cratescope.files import Shape, read_json, sha256, stamp, write_json
from cratescope.progress import progress
from cratescope.run import SPLIT_BY
from cratescope.text.tokenizer import load_tokenizer

_SHARD: Shape = {"file": str, "tokens": int, "sha256": str}
DATA: Shape = {
    "identity?": SPLIT_BY,
    "dtype?": str,
    "tokenizer?": {"vocab_size": int, "eos_id": int},
    "sources?": [{"name?": str}],
    "splits?": {str: {"documents": int, "tokens": int, "bytes": int, "from?": [int], "shards": [_SHARD]}},
}
"""The parts of manifest.json that are read."""
NPY_HEADER = 128
"""Bytes in front of the values in a file of one row written by numpy."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split as one long row of tokens, spread over shards on disk."""

    name: str
    shards: tuple[np.ndarray, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of every shard's first token, followed by the total number of tokens."""
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle file names: a memmap would pickle all of its data, so a worker process opens the file itself."""
        return _reopen, (self.name, tuple(getattr(shard, "filename", shard) for shard in self.shards))

    def window(self, start: int, length: int) -> Int64[np.ndarray, " length"]:
        """`length` tokens from position `start` on, across shards. Raises IndexError past the end."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"{start}..{start + length} is not within the {self.n_tokens} tokens of {self.name}")
        window = np.empty(length, dtype=np.int64)
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            first = start + filled - int(self.starts[index])
            piece = self.shards[index][first : first + length - filled]
            window[filled : filled + len(piece)] = piece
            filled, index = filled + len(piece), index + 1
        return window

    def spaced(self, n: int, length: int) -> Int64[np.ndarray, "n length"]:
        """`n` windows of `length` tokens that share no token, evenly spaced; UserError if the split is too short."""
        if n < 1 or length < 1 or n * length > self.n_tokens:
            room = self.n_tokens // max(length, 1)
            raise UserError(
                f"split {self.name}: its {self.n_tokens:,} tokens have room for {room:,} windows of {length}, "
                f"not {n:,}; ask for fewer or shorter ones, or prepare more text"
            )
        return np.stack([self.window(index * self.n_tokens // n, length) for index in range(n)])


def _reopen(name: str, shards: tuple[Any, ...]) -> TokenSplit:
    opened = (one if isinstance(one, np.ndarray) else np.load(one, "r", allow_pickle=False) for one in shards)
    return TokenSplit(name, tuple(opened))


@dataclass(frozen=True)
class TokenData:
    """A data folder made by `prepare`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> TokenData:
        """Open a finished data folder, checking only its manifest and the sizes of its shards.

        Raises:
            UserError: no finished data folder, or a shard is missing or has another size.
        """
        path = Path(path)
        if not (path / "manifest.json").exists():
            raise UserError(f"{path}: not a data folder (no manifest.json); make one with `cratescope prepare`")
        manifest = read_json(path / "manifest.json", DATA, "`cratescope prepare`")
        if "splits" not in manifest:
            raise UserError(f"{path}: not finished; run the same `cratescope prepare` again")
        if manifest.get("dtype") not in ("uint16", "uint32") or "tokenizer" not in manifest:
            raise UserError(f"{path / 'manifest.json'}: damaged; delete {path} and run `cratescope prepare` again")
        width = np.dtype(manifest["dtype"]).itemsize
        for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
            file = path / shard["file"]
            if not file.exists():
                raise UserError(f"{file}: no such file; run the same `cratescope prepare` again")
            if file.stat().st_size != NPY_HEADER + width * shard["tokens"]:
                raise _damaged(file, "its size differs")
        return cls(path, manifest)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.path.resolve() / "tokenizer")

    @property
    def vocab_size(self) -> int:
        """The tokenizer's ids, rounded up to a multiple of 64 (the rows of a model's embedding)."""
        return -(-self.manifest["tokenizer"]["vocab_size"] // 64) * 64

    @property
    def eos_id(self) -> int:
        return self.manifest["tokenizer"]["eos_id"]

    @property
    def split_by(self) -> dict[str, Any]:
        """What decides which documents are in which split: the text, the seed and the shares."""
        known = {name.removesuffix("?") for name in SPLIT_BY}
        return {name: value for name, value in self.manifest.get("identity", {}).items() if name in known}

    def parts(self, name: str) -> tuple[list[str], Int64[np.ndarray, " documents"]] | None:
        """Names of the parts of the text, and of each document of a split the number of its part.

        None where the text has one part, or was prepared before this was kept.
        """
        counts = self.manifest["splits"][name].get("from", [])
        names = [source.get("name", "") for source in self.manifest.get("sources", [])]
        if len(names) < 2 or len(counts) != len(names) or sum(counts) != self.manifest["splits"][name]["documents"]:
            return None
        return names, np.repeat(np.arange(len(names)), counts)

    def split(self, name: str) -> TokenSplit:
        """train, validation or heldout, compared with its hashes the first time. UserError: not there, or damaged."""
        if name not in self.manifest["splits"]:
            raise UserError(f"split {name}: not in {self.path}, which has {', '.join(self.manifest['splits'])}")
        entry = self.manifest["splits"][name]
        _verify(self.path, entry["shards"])
        shards = []
        for path in (self.path / shard["file"] for shard in entry["shards"]):
            with as_user_error(f"{path}: cannot be opened", "delete it and run the same `cratescope prepare`"):
                shards.append(np.load(path, mmap_mode="r", allow_pickle=False))
        return TokenSplit(name, tuple(shards))


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file}: damaged ({why}); delete it and run the same `cratescope prepare`")


def shard_stamp(folder: Path, shard: dict[str, Any]) -> list[Any]:
    """A fingerprint that stays valid until a shard whose SHA-256 was right is touched."""
    return [shard["sha256"], *stamp(folder / shard["file"])]


def _verify(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Compare shards with their SHA-256, unless that was done since they were written (`.verified.json`)."""
    path, seals = folder / ".verified.json", {}
    with contextlib.suppress(UserError):
        seals = read_json(path, {})
    new = [shard for shard in shards if seals.get(shard["file"]) != shard_stamp(folder, shard)]
    if not new:
        return
    try:
        for shard in progress(new, f"checking {folder}"):
            if sha256(folder / shard["file"]) != shard["sha256"]:
                raise _damaged(folder / shard["file"], "SHA-256 differs")
            seals[shard["file"]] = shard_stamp(folder, shard)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written to is checked every time
            write_json(path, seals)


def reshape(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same values in arrays of `length`; only the last may be shorter."""
    held: list[np.ndarray] = []
    size = 0
    for array in arrays:
        while size + len(array) >= length:
            held.append(array[: length - size])
            array = array[length - size :]
            yield np.concatenate(held)
            held, size = [], 0
        held.append(array)
        size += len(array)
    if size:
        yield np.concatenate(held)

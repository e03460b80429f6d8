"""Text to token shards (`prepare`), and reading them (`TokenData`).

Reading is cheap and is repeated after a kill; encoding is dear and is kept, block by block, in a hidden work folder.
The finished shards are assembled from the blocks, so they hold the same bytes however often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from cratescope.config import PrepareConfig
from cratescope.lm.sources import Source, open_sources
from cratescope.lm.tokenizer import encode, load_tokenizer, train_bpe, vocabulary_size
from cratescope.run import UserError, atomic_path, claim, read_json, sha256, versions, write_json

SPLITS = ("train", "validation", "heldout")
BLOCK_BYTES = 8_000_000
"""Text in one unit of work: a kill loses at most the encoding of one."""
BATCH = 256
"""Documents encoded at once, on all cores."""
BPE_BYTES = 6_000_000
"""Text that `bpe:N` is trained on."""
REMEMBERED = 20_000_000
"""Documents whose hashes are kept to find duplicates; about 100 bytes of memory each."""
_COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split as one long row of tokens, spread over shards on disk. n_bytes: bytes of its text, without <eos>."""

    name: str
    shards: tuple[np.ndarray, ...]
    n_bytes: int

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of every shard's first token, and behind them the number of tokens."""
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def window(self, start: int, length: int) -> Int64[np.ndarray, " length"]:
        """`length` tokens from position `start` on, across shards. Raises IndexError past the end."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(
                f"window {start}..{start + length} is not within the {self.n_tokens} tokens of {self.name}"
            )
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
        """`n` windows of `length` tokens that share no token, evenly spaced over the split.

        Raises:
            UserError: the split is too short.
        """
        if n < 1 or length < 1 or n * length > self.n_tokens:
            room = self.n_tokens // max(length, 1)
            raise UserError(
                f"split {self.name}: its {self.n_tokens:,} tokens have room for {room:,} windows of {length}, "
                f"not {n:,}; ask for fewer or shorter ones, or prepare more text"
            )
        return np.stack([self.window(index * self.n_tokens // n, length) for index in range(n)])


@dataclass(frozen=True)
class TokenData:
    """A data folder made by `prepare`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> TokenData:
        """Open a finished data folder; `verify` compares every shard with its SHA-256.

        Raises:
            UserError: no finished data folder, or a shard is missing or damaged.
        """
        path = Path(path)
        if not (path / "manifest.json").exists():
            raise UserError(f"{path}: not a data folder (no manifest.json); make one with `cratescope prepare`")
        manifest = read_json(path / "manifest.json")
        if "splits" not in manifest:
            raise UserError(f"{path}: not finished; run the same `cratescope prepare` again")
        for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
            file = path / shard["file"]
            if not file.exists():
                raise UserError(f"{file}: no such file; run the same `cratescope prepare` again")
            if verify and sha256(file) != shard["sha256"]:
                raise UserError(f"{file}: damaged (SHA-256 differs); delete it and run the same `cratescope prepare`")
        return cls(path, manifest)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.path.resolve() / "tokenizer")

    @property
    def vocab_size(self) -> int:
        """The tokenizer's entries, rounded up to a multiple of 64 (the rows of a model's embedding)."""
        return -(-self.manifest["tokenizer"]["vocab_size"] // 64) * 64

    @property
    def eos_id(self) -> int:
        return self.manifest["tokenizer"]["eos_id"]

    def split(self, name: str) -> TokenSplit:
        """One of train, validation and heldout."""
        if name not in self.manifest["splits"]:
            raise UserError(f"split {name}: not in {self.path}, which has {', '.join(self.manifest['splits'])}")
        entry = self.manifest["splits"][name]
        shards = []
        for shard in entry["shards"]:
            try:
                shards.append(np.load(self.path / shard["file"], mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.path / shard['file']}: damaged; delete it and run `cratescope prepare`"
                ) from error
            if shards[-1].shape != (shard["tokens"],):
                raise UserError(f"{self.path / shard['file']}: damaged; delete it and run `cratescope prepare`")
        return TokenSplit(name, tuple(shards), entry["bytes"])


@dataclass
class Tally:
    """What became of the documents: a counter for each source, and one for each split (documents, bytes)."""

    sources: list[Counter[str]] = field(default_factory=list)
    splits: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in SPLITS})


def prepare(config: PrepareConfig, console: Console | None = None) -> TokenData:
    """Write the data folder `config.out`, or find it finished, and open it.

    Raises:
        UserError: a setting, the source or the tokenizer is unusable, the folder holds other data, a split is empty.
    """
    console = console or Console(stderr=True, quiet=True)
    report = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    _check(config)
    identity, sources = open_sources(config.source, report)
    for name in ("tokenizer", "max_megabytes", "validation", "heldout", "shard_tokens", "seed"):
        identity[name] = getattr(config, name)
    if _finished(config.out, identity):
        return TokenData.open(config.out)
    fractions = _fractions(sources, config.max_megabytes)
    tokenizer = _tokenizer(config, sources, fractions, report)
    tally = Tally()
    paths = _encode_blocks(_blocks(sources, fractions, config, tally), config.out / ".work", tokenizer, console)
    manifest: dict[str, Any] = {
        "tokenizer": {"spec": config.tokenizer, "vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id},
        "dtype": _dtype(tokenizer).name,
        "seed": config.seed,
        "identity": identity,
        "sources": [_row(source, counter) for source, counter in zip(sources, tally.sources, strict=True)],
        "splits": {name: _write_split(config, name, tally.splits[name], paths) for name in SPLITS},
        "versions": versions(),
    }
    write_json(config.out / "manifest.json", manifest)
    shutil.rmtree(config.out / ".work")
    for row in manifest["sources"]:
        if row["invalid_utf8"]:
            report(f"warning: {row['origin']}: {row['invalid_utf8']} documents had invalid UTF-8, now U+FFFD")
    return TokenData.open(config.out)


def _check(config: PrepareConfig) -> None:
    for name in ("validation", "heldout"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: has to be between 0 and 1, such as 0.05")
    if config.validation + config.heldout >= 1:
        raise UserError("--validation and --heldout together leave nothing to train on; make them smaller")
    if config.shard_tokens < 1:
        raise UserError(f"--shard-tokens {config.shard_tokens}: has to be 1 or more")
    if config.max_megabytes is not None and config.max_megabytes <= 0:
        raise UserError(f"--max-megabytes {config.max_megabytes}: has to be more than 0")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out}: is a file; give a folder")
    vocabulary_size(config.tokenizer)


def _finished(out: Path, identity: dict[str, Any]) -> bool:
    """Claim the folder for `identity`, and say whether all of its shards are there.

    A claim without a block of work behind it is dropped first, so a mistake found early costs no folder.
    """
    path = out / "manifest.json"
    found = read_json(path) if path.exists() else {}
    ours = isinstance(found, dict) and identity.keys() <= found.get("identity", {}).keys()
    if ours and "splits" not in found and not any((out / ".work").glob("*.npz")):
        path.unlink()
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    claim(out, identity)
    splits = read_json(path).get("splits", {})
    return bool(splits) and all((out / shard["file"]).exists() for row in splits.values() for shard in row["shards"])


def shares(sizes: Sequence[float], budget: float) -> list[float]:
    """The fraction of each part to take so that together they have `budget`: small parts whole, large ones equally."""
    fractions = [1.0] * len(sizes)
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        take = min(sizes[index], budget / (len(sizes) - place))
        fractions[index] = take / sizes[index] if sizes[index] else 1.0
        budget -= take
    return fractions


def _fractions(sources: Sequence[Source], max_megabytes: float | None) -> list[float]:
    if max_megabytes is None or sources[0].size is None:
        return [1.0] * len(sources)
    return shares([source.size or 0 for source in sources], max_megabytes * 1e6)


def _tokenizer(
    config: PrepareConfig, sources: Sequence[Source], fractions: Sequence[float], report: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    """The tokenizer in the data folder, put there (and trained, for `bpe:N`) the first time."""
    folder, temporary = config.out / "tokenizer", config.out / ".tokenizer"
    if not folder.exists():
        size = vocabulary_size(config.tokenizer)
        if size is None:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            report(f"training a BPE of {size} entries")
            tokenizer = train_bpe(_sample(sources, fractions, config), size)
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    return load_tokenizer(folder.resolve())


def _sample(sources: Sequence[Source], fractions: Sequence[float], config: PrepareConfig) -> Iterator[str]:
    """The first training documents of every source, about BPE_BYTES in all."""
    sizes = [fraction * (source.size or BPE_BYTES) for source, fraction in zip(sources, fractions, strict=True)]
    for source, fraction, size, share in zip(sources, fractions, sizes, shares(sizes, BPE_BYTES), strict=True):
        left = size * share if share < 1 else float("inf")
        for split, text, n_bytes in _chosen(source, fraction, config, set(), Counter()):
            if left <= 0:
                break
            if split == "train":
                yield text
                left -= n_bytes


def _draw(text: bytes, seed: int) -> tuple[int, float, float]:
    """What the seed and the text alone decide: a name of 8 bytes, and two uniform numbers (split, taken or not)."""
    digest = hashlib.blake2b(text, digest_size=24, salt=seed.to_bytes(8, "little", signed=True)).digest()
    name, place, chance = (int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16))
    return name, place / 2**64, chance / 2**64


def _chosen(
    source: Source, fraction: float, config: PrepareConfig, seen: set[int], tally: Counter[str]
) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes) of the source's documents but empty ones, duplicates and those past the wanted fraction."""
    limit = config.max_megabytes * 1e6 if config.max_megabytes and source.size is None else float("inf")
    for text in source.documents():
        if tally["bytes"] >= limit:
            return
        encoded, invalid = _utf8(text)
        if not text.strip():
            tally["empty"] += 1
            continue
        name, place, chance = _draw(encoded, config.seed)
        if chance >= fraction or name in seen:
            tally["duplicate" if name in seen else "not_taken"] += 1
            continue
        if len(seen) < REMEMBERED:
            seen.add(name)
        tally.update(documents=1, bytes=len(encoded), invalid_utf8=int(invalid))
        in_validation, in_heldout = place < config.validation, place < config.validation + config.heldout
        split = "validation" if in_validation else "heldout" if in_heldout else "train"
        yield split, encoded.decode("utf-8") if invalid else text, len(encoded)


def _utf8(text: str) -> tuple[bytes, bool]:
    """The text as UTF-8, and whether characters that have none (see `sources`) had to be replaced by U+FFFD."""
    try:
        return text.encode("utf-8"), False
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text).encode("utf-8"), True


def _blocks(
    sources: Sequence[Source], fractions: Sequence[float], config: PrepareConfig, tally: Tally
) -> Iterator[list[tuple[str, str]]]:
    """(split, text) of all documents in blocks of about BLOCK_BYTES; the same blocks every time."""
    seen: set[int] = set()
    block: list[tuple[str, str]] = []
    size = 0
    for source, fraction in zip(sources, fractions, strict=True):
        tally.sources.append(Counter())
        for split, text, n_bytes in _chosen(source, fraction, config, seen, tally.sources[-1]):
            tally.splits[split].update(documents=1, bytes=n_bytes)
            block.append((split, text))
            size += n_bytes
            if size >= BLOCK_BYTES:
                yield block
                block, size = [], 0
    # Before the last block is encoded: for a small source, a mistake is then found before there is any work to lose.
    _check_splits(config, tally)
    if block:
        yield block


def _check_splits(config: PrepareConfig, tally: Tally) -> None:
    documents = sum(counter["documents"] for counter in tally.splits.values())
    if not documents:
        empty = sum(counter["empty"] for counter in tally.sources)
        raise UserError(f"{config.source}: has no text ({empty} empty documents); give a source with documents")
    for name, counter in tally.splits.items():
        if not counter["documents"]:
            fix = "smaller --validation and --heldout" if name == "train" else f"a larger --{name}"
            raise UserError(
                f"split {name} is empty: none of {documents} documents fell into it; give more text or {fix}"
            )


def _encode_blocks(
    blocks: Iterator[list[tuple[str, str]]], work: Path, tokenizer: PreTrainedTokenizerFast, console: Console
) -> list[Path]:
    """Encode every block to a file of `work` (an array for each split), unless it is there; read the next meanwhile.

    A file is named by its block's number and text, so a source that changed since a kill is encoded anew.
    """
    paths: list[Path] = []
    with Progress(*_COLUMNS, console=console, transient=True) as progress, ThreadPoolExecutor(1) as encoder:
        task = progress.add_task("reading", total=None)
        encoding: Future[None] | None = None
        for number, block in enumerate(blocks):
            if encoding:
                encoding.result()
            progress.update(task, description=f"reading and encoding, {number * BLOCK_BYTES // 1_000_000:,} MB done")
            paths.append(work / f"{number:05d}-{_digest(block)}.npz")
            encoding = None if paths[-1].exists() else encoder.submit(_write_block, paths[-1], block, tokenizer)
        if encoding:
            encoding.result()
    return paths


def _digest(block: list[tuple[str, str]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for split, text in block:
        digest.update(f"{split}\0{text}\0".encode())
    return digest.hexdigest()


def _write_block(path: Path, block: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **_encode_block(block, tokenizer))


def _encode_block(block: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """The tokens of each split's documents one after the other, each followed by <eos>."""
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, _dtype(tokenizer))] for name in SPLITS}
    for first in range(0, len(block), BATCH):
        batch = block[first : first + BATCH]
        for (split, _), ids in zip(batch, encode(tokenizer, [text for _, text in batch]), strict=True):
            parts[split].append(np.array([*ids, tokenizer.eos_token_id], dtype=_dtype(tokenizer)))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) < 65536 else np.uint32)


def _write_split(config: PrepareConfig, name: str, tally: Counter[str], paths: Sequence[Path]) -> dict[str, Any]:
    """Assemble one split's shards from the blocks; its row of the manifest."""
    rows: list[dict[str, Any]] = []
    for number, shard in enumerate(reshape(_arrays(paths, name), config.shard_tokens)):
        path = config.out / f"{name}-{number:05d}.npy"
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, shard, allow_pickle=False)
        rows.append({"file": path.name, "tokens": len(shard), "sha256": sha256(path)})
    tokens = sum(row["tokens"] for row in rows)
    return {"documents": tally["documents"], "tokens": tokens, "bytes": tally["bytes"], "shards": rows}


def _arrays(paths: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    for path in paths:
        with np.load(path, allow_pickle=False) as block:
            yield block[name]


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


def _row(source: Source, tally: Counter[str]) -> dict[str, Any]:
    """A source's row of the manifest."""
    return {
        "name": source.name,
        "licence": source.licence,
        "origin": source.origin,
        "sha256": source.sha256(),
        "documents": tally["documents"],
        "bytes": tally["bytes"],
        "skipped": {name: tally[name] for name in ("empty", "duplicate", "not_taken")},
        "invalid_utf8": tally["invalid_utf8"],
    }

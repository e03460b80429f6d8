"""Turn text into token shards.

One process reads the text and cuts it into blocks; several encode them into a hidden work folder. A block records how
far reading had come, so a kill loses only the blocks in progress. The finished shards are assembled from the blocks,
so they hold the same bytes however often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.files import SURROGATES, atomic_folder, atomic_path, mark_whole, read_json, sha256, write_json
from cratescope.locks import locked
from cratescope.progress import STDERR, bars, say
from cratescope.run import claim, versions
from cratescope.text.config import PrepareConfig
from cratescope.text.encoding import REMEMBERED, SPLITS, Block, Encoder, Past, block_path, open_workers, write_block
from cratescope.text.shards import DATA, TokenData, reshape, shard_stamp
from cratescope.text.sources import Source, name_some, open_sources
from cratescope.text.tokenizer import load_tokenizer, n_ids, train_bpe, vocabulary_size

BLOCK_BYTES = 8_000_000
"""Text in one unit of work: a kill loses at most the encoding of those under way."""
PROCESS_BYTES = 10_000_000
"""Text for which another process is worth its start."""
BPE_BYTES = 6_000_000
"""Text that `bpe:N` is trained on."""
MOST_SHARDS = 10_000
"""Each is an open file while training."""
LISTED = 100
"""Files left out that the manifest names."""


def prepare(config: PrepareConfig) -> TokenData:
    """Write the data folder `config.out`, or find it finished, and open it.

    Raises:
        UserError: a setting, the source or the tokenizer is unusable, the folder holds other data, a split is empty.
    """
    _check(config)
    identity, sources, left_out = open_sources(config.source)
    if left_out:
        say(f"{config.source}: {name_some(left_out)}")
    _check_shards(config, sources)
    for name in ("tokenizer", "max_megabytes", "validation", "heldout", "shard_tokens", "seed"):
        identity[name] = getattr(config, name)
    with locked(config.out, "prepare"):
        if not _finished(config.out, identity):
            try:
                _prepare(config, identity, sources, left_out)
            except UserError:
                _drop_claim(config.out)
                raise
        data = TokenData.open(config.out)
        for name in SPLITS:
            data.split(name)  # compares its shards with their hashes
        return data


def _prepare(
    config: PrepareConfig, identity: dict[str, Any], sources: Sequence[Source], left_out: Mapping[str, str]
) -> None:
    fractions = [1.0] * len(sources)
    if config.max_megabytes is not None and sources[0].size is not None:
        fractions = shares([source.size or 0 for source in sources], config.max_megabytes * 1e6)
    tokenizer = _tokenizer(config, sources, fractions)
    work = config.out / ".work"
    past = Past.load(work)
    dtype = np.dtype(np.uint16 if n_ids(tokenizer) < 65536 else np.uint32)
    encoder = Encoder(tokenizer.backend_tokenizer, tokenizer.eos_token_id, dtype)
    _encode_blocks(_blocks(config, sources, fractions, past), past, work, encoder, _n_workers(config, sources))
    manifest: dict[str, Any] = {
        "tokenizer": {"spec": config.tokenizer, "vocab_size": n_ids(tokenizer), "eos_id": tokenizer.eos_token_id},
        "dtype": encoder.dtype.name,
        "seed": config.seed,
        "identity": identity,
        "sources": [_row(source, number, past.tally) for number, source in enumerate(sources)],
        "splits": {name: _write_split(config, name, past, len(sources)) for name in SPLITS},
    }
    if left_out:
        manifest["left_out"] = {"files": len(left_out), "first": dict(islice(left_out.items(), LISTED))}
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    write_json(config.out / ".verified.json", {shard["file"]: shard_stamp(config.out, shard) for shard in shards})
    # Not in the manifest, whose hash names the data: the same sources cut by other versions are the same.
    write_json(config.out / "versions.json", versions())
    write_json(config.out / "manifest.json", manifest)
    shutil.rmtree(work)
    for row in manifest["sources"]:
        if row["invalid_utf8"]:
            say(
                f"warning: {row['origin']}: {row['invalid_utf8']} documents had invalid UTF-8, now U+FFFD; "
                "if the file is in another encoding, convert it first"
            )


def _check(config: PrepareConfig) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out}: is a file; give a folder")
    if vocabulary_size(config.tokenizer) is None and not (config.out / "tokenizer").exists():
        load_tokenizer(config.tokenizer)  # a wrong name is found before the folder is claimed


def _check_shards(config: PrepareConfig, sources: Sequence[Source]) -> None:
    """Refuse shards so short that there might be more than MOST_SHARDS of them: a token is at least a byte."""
    n_bytes = int(min(sum(source.size or 0 for source in sources), (config.max_megabytes or 1e12) * 1e6))
    if n_bytes > MOST_SHARDS * config.shard_tokens:
        raise UserError(
            f"--shard-tokens {config.shard_tokens}: would cut {n_bytes:,} bytes of text into as many as "
            f"{n_bytes // config.shard_tokens:,} files; give {-(-n_bytes // MOST_SHARDS):,} or more"
        )


def _finished(out: Path, identity: dict[str, Any]) -> bool:
    """Claim the folder for `identity`, and say whether all of its shards are there."""
    path = out / "manifest.json"
    found = read_json(path, DATA, "`cratescope prepare`") if path.exists() else {}
    if identity.keys() <= found.get("identity", {}).keys():
        _drop_claim(out)
    claim(out, identity)
    splits = read_json(path).get("splits", {})
    if splits:
        shutil.rmtree(out / ".work", ignore_errors=True)  # left by a process killed at its very end
    return bool(splits) and all((out / shard["file"]).exists() for row in splits.values() for shard in row["shards"])


def _drop_claim(out: Path) -> None:
    """Take back a claim before the first block is done, so that a mistake found early costs no folder."""
    path = out / "manifest.json"
    if "splits" not in read_json(path, DATA, "`cratescope prepare`") and not any((out / ".work").glob("*.npz")):
        path.unlink()
        for folder in (out / "tokenizer", out / ".work"):
            shutil.rmtree(folder, ignore_errors=True)


def shares(sizes: Sequence[float], budget: float) -> list[float]:
    """The fraction of each part to take so that together they have `budget`: small parts whole, large ones equally."""
    fractions = [1.0] * len(sizes)
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        take = min(sizes[index], budget / (len(sizes) - place))
        fractions[index] = take / sizes[index] if sizes[index] else 1.0
        budget -= take
    return fractions


def _tokenizer(config: PrepareConfig, sources: Sequence[Source], fractions: Sequence[float]) -> PreTrainedTokenizerFast:
    """The tokenizer in the data folder, put there (and trained, for `bpe:N`) the first time."""
    folder = config.out / "tokenizer"
    if not folder.exists():
        size = vocabulary_size(config.tokenizer)
        if size is None:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            say(f"training a BPE of {size} entries")
            tokenizer = train_bpe(_sample(sources, fractions, config), size)
        with atomic_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
            mark_whole(temporary)
    return load_tokenizer(folder.resolve())


def _sample(sources: Sequence[Source], fractions: Sequence[float], config: PrepareConfig) -> Iterator[str]:
    """The first training documents of every source, about BPE_BYTES in all."""
    unknown = min(BPE_BYTES, (config.max_megabytes or BPE_BYTES) * 1e6)
    sizes = [fraction * (source.size or unknown) for source, fraction in zip(sources, fractions, strict=True)]
    for source, fraction, size, share in zip(sources, fractions, sizes, shares(sizes, BPE_BYTES), strict=True):
        # A small source is read to its end, whatever its estimated size.
        left = size * share if share < 1 or source.size is None else float("inf")
        seen: set[int] = set()
        for text in source.documents():
            if left <= 0:
                break
            document = _choose(text, fraction, config, seen)
            if isinstance(document, Document):
                seen.add(document.name)
                if document.split == "train":
                    yield document.text
                    left -= document.n_bytes


def _draw(text: bytes, seed: int) -> tuple[int, float, float]:
    """Derive from the seed and the text alone an 8-byte name and two uniform numbers (for split and for selection)."""
    digest = hashlib.blake2b(text, digest_size=24, salt=seed.to_bytes(8, "little", signed=True)).digest()
    name, place, chance = (int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16))
    return name, place / 2**64, chance / 2**64


@dataclass(frozen=True)
class Document:
    """A document that is taken. name: a hash of its text. invalid: characters that have no UTF-8 were replaced."""

    split: str
    text: str
    name: int
    n_bytes: int
    invalid: bool

    def counts(self, source: int) -> dict[str, int]:
        """Counts that the document adds to the tally of its source."""
        of_source = {"documents": 1, "bytes": self.n_bytes, "invalid_utf8": int(self.invalid)}
        of_split = {"documents": 1, "bytes": self.n_bytes}
        rows = ((source, of_source | {self.split: 1}), (self.split, of_split))
        return {f"{owner} {name}": count for owner, row in rows for name, count in row.items()}


def _choose(text: str, fraction: float, config: PrepareConfig, seen: set[int]) -> Document | str:
    """Make the text a document, or say why it is not taken: empty, a duplicate, or beyond the wanted fraction."""
    if not text.strip():
        return "empty"
    encoded, invalid = _utf8(text)
    name, place, chance = _draw(encoded, config.seed)
    if name in seen:
        return "duplicate"
    if chance >= fraction:
        return "not_taken"
    in_validation, in_heldout = place < config.validation, place < config.validation + config.heldout
    split = "validation" if in_validation else "heldout" if in_heldout else "train"
    return Document(split, encoded.decode("utf-8") if invalid else text, name, len(encoded), invalid)


def _utf8(text: str) -> tuple[bytes, bool]:
    """The text as UTF-8, and whether characters that have none (see `sources`) had to be replaced by U+FFFD."""
    try:
        return text.encode("utf-8"), False
    except UnicodeEncodeError:
        return SURROGATES.sub("\ufffd", text).encode("utf-8"), True


def _blocks(
    config: PrepareConfig, sources: Sequence[Source], fractions: Sequence[float], past: Past
) -> Iterator[Block]:
    """The blocks after `past`, of about BLOCK_BYTES of text each; the same ones every time. Adds them to `past`."""
    if past.source is None:
        return
    limit = config.max_megabytes * 1e6 if config.max_megabytes and sources[0].size is None else float("inf")
    block = Block(past.blocks)
    for number in range(past.source, len(sources)):
        documents = sources[number].documents(past.position if number == past.source else None)
        for text in documents:
            if past.tally[f"{number} bytes"] >= limit:
                break
            _add(block, past, number, _choose(text, fractions[number], config, past.seen))
            if block.n_bytes >= BLOCK_BYTES:
                block.source, block.position = number, documents.position
                yield block
                block = Block(block.number + 1)
    # Checked before the last block is encoded: with a small source, no work has been done yet.
    _check_splits(config, past.tally)
    yield block


def _add(block: Block, past: Past, source: int, document: Document | str) -> None:
    """Count a document, or the reason why there is none, and put it into the block."""
    counts = {f"{source} {document}": 1} if isinstance(document, str) else document.counts(source)
    for tally in (block.tally, past.tally):
        tally.update(counts)
    if isinstance(document, Document):
        block.documents.append((document.split, document.text))
        block.names.append(document.name)
        block.n_bytes += document.n_bytes
        if len(past.seen) < REMEMBERED:
            past.seen.add(document.name)


def _check_splits(config: PrepareConfig, tally: Counter[str]) -> None:
    documents = sum(tally[f"{name} documents"] for name in SPLITS)
    if not documents:
        kinds = (" empty", " not_taken")
        empty, left = (sum(count for name, count in tally.items() if name.endswith(kind)) for kind in kinds)
        if left:
            raise UserError(f"--max-megabytes {config.max_megabytes}: takes none of {left} documents; give more")
        raise UserError(f"{config.source}: has no text ({empty} empty documents); give a source with documents")
    for name in SPLITS:
        if not tally[f"{name} documents"]:
            fix = "smaller --validation and --heldout" if name == "train" else f"a larger --{name}"
            what = f"split {name} is empty: none of {documents} documents fell into it"
            raise UserError(f"{what}; give more text or {fix}")


def _n_workers(config: PrepareConfig, sources: Sequence[Source]) -> int:
    """Number of encoding processes: one per core if there is enough text to justify starting them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = sum(source.size if source.size is not None else float("inf") for source in sources)
    return int(max(1, min(cores, known // PROCESS_BYTES, (config.max_megabytes or known) * 1e6 // PROCESS_BYTES)))


def _encode_blocks(blocks: Iterator[Block], past: Past, work: Path, encoder: Encoder, n_workers: int) -> None:
    """Encode blocks into files of `work`, several at once, while the next ones are read."""
    writing: deque[Future[None]] = deque()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    bar = Progress(*columns, console=STDERR, transient=True, disable=not bars())
    with bar as progress, open_workers(encoder, n_workers) as pool:
        task = progress.add_task("reading", total=None)
        try:
            for block in blocks:
                writing.append(pool.submit(write_block, block_path(work, block.number), block))
                past.blocks = block.number + 1
                while len(writing) > n_workers:
                    writing.popleft().result()
                done = sum(past.tally[f"{name} bytes"] for name in SPLITS)
                progress.update(task, description=f"reading and encoding, {done // 1_000_000:,} MB read")
            for future in writing:
                future.result()
        except BrokenProcessPool as error:
            what = "a process that encoded text was killed (out of memory?)"
            raise UserError(f"{what}; the same command resumes from there") from error


def _write_split(config: PrepareConfig, name: str, past: Past, n_sources: int) -> dict[str, Any]:
    """Assemble one split's shards from the blocks; its row of the manifest.

    Its documents are in the order of the sources, so `from`, how many each source gave, says where each is from.
    """
    rows: list[dict[str, Any]] = []
    for number, shard in enumerate(reshape(_arrays(config.out / ".work", past.blocks, name), config.shard_tokens)):
        path = config.out / f"{name}-{number:05d}.npy"
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, shard, allow_pickle=False)
        rows.append({"file": path.name, "tokens": len(shard), "sha256": sha256(path)})
    documents, n_bytes = (past.tally[f"{name} {what}"] for what in ("documents", "bytes"))
    found = {"documents": documents, "tokens": sum(row["tokens"] for row in rows), "bytes": n_bytes}
    return found | {"from": [past.tally[f"{source} {name}"] for source in range(n_sources)], "shards": rows}


def _arrays(work: Path, blocks: int, name: str) -> Iterator[np.ndarray]:
    for number in range(blocks):
        with np.load(block_path(work, number), allow_pickle=False) as block:
            yield block[name]


def _row(source: Source, number: int, tally: Counter[str]) -> dict[str, Any]:
    """A source's row of the manifest."""
    return {
        **{"name": source.name, "licence": source.licence, "origin": source.origin, "sha256": source.sha256()},
        **{name: tally[f"{number} {name}"] for name in ("documents", "bytes")},
        "skipped": {name: tally[f"{number} {name}"] for name in ("empty", "duplicate", "not_taken")},
        "invalid_utf8": tally[f"{number} invalid_utf8"],
    }

"""Blocks of documents encoded to files, in a thread or in processes that start without torch and transformers."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt
from tokenizers import Tokenizer

from cratescope.errors import as_user_error
from cratescope.files import atomic_path

SPLITS = ("train", "validation", "heldout")
BATCH = 256
"""Documents encoded at once."""
REMEMBERED = 20_000_000
"""Documents whose hashes are kept to find duplicates; about 100 bytes of memory each."""
REMEMBERED_CHARACTERS = 4_000_000
"""Characters of text pieces that an `Encoder` caches before it starts over; about 100 MB of memory."""

# GPT-2's pattern for text whose characters are all printable ASCII or ASCII spaces. It has no lookbehind, and no token
# runs on from a letter, digit or sign to a space, so text can be cut there. A piece with another character (whose class
# depends on a Unicode version) is therefore left in one piece up to such a cut, and the library is asked about it.
_SPACE = r" \t\n\r\f\v"
_OTHER = rf"[^!-~{_SPACE}]"
_PIECES = re.compile(
    rf" ?[A-Za-z]++(?!{_OTHER})|'(?:[stmd]|re|ve|ll)| ?[!-/:-@\[-`{{-~]++(?!{_OTHER})| ?[0-9]++(?!{_OTHER})"
    rf"|[{_SPACE}]+(?=[{_SPACE}][!-~]|\Z)|[\t\n\r\f\v](?=[!-~])"
    rf"|(?s:.)+?(?:(?<=\S)(?=[{_SPACE}])|\Z)"
)
_HAS_OTHER = re.compile(_OTHER)
_BYTE_LEVEL_SPACES = str.maketrans({space: chr(256 + ord(space)) for space in " \t\n\r\f\v"})


@dataclass
class Block:
    """A unit of work: (split, text) of consecutive documents, and how reading them changed the state.

    names: hashes of the documents. tally: counts by source number (or split) and outcome, as in `0 duplicate`.
    source, position: where the next block starts, None after the last one.
    """

    number: int
    documents: list[tuple[str, str]] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0
    source: int | None = None
    position: Any = None


@dataclass
class Past:
    """State of reading after the finished blocks, from which it resumes as if it had never stopped."""

    blocks: int = 0
    seen: set[int] = field(default_factory=set)
    tally: Counter[str] = field(default_factory=Counter)
    source: int | None = 0
    position: Any = None

    @classmethod
    def load(cls, work: Path) -> Past:
        """Restore it from the blocks in the work folder, up to the first missing or damaged one."""
        found = cls()
        while (path := block_path(work, found.blocks)).exists():
            try:
                with np.load(path, allow_pickle=False) as block:
                    state, names = json.loads(str(block["state"])), block["names"]
                    for name in SPLITS:
                        block[name]  # its checksum is compared now, while the block can still be made again
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                path.unlink()
                break
            found.seen.update(names[: max(REMEMBERED - len(found.seen), 0)].tolist())
            found.blocks += 1
            found.tally.update(state["tally"])
            found.source, found.position = state["source"], state["position"]
        return found


def open_workers(encoder: Encoder, number: int) -> Executor:
    """Start one thread or several processes (Python runs one thread at a time), each with an encoder of its own."""
    if number == 1:
        return ThreadPoolExecutor(1, initializer=_keep, initargs=(encoder,))
    # Not forked: tokenizers has threads, and what they hold would never be let go in a copy of this process.
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _start_worker, (encoder,))


_kept = threading.local()


def _keep(encoder: Encoder) -> None:
    _kept.encoder = encoder


def _start_worker(encoder: Encoder) -> None:
    """Set up a new process: one thread, ignoring Ctrl-C (the parent lets it finish), and ending with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _keep(encoder)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def block_path(work: Path, number: int) -> Path:
    return work / f"{number:06d}.npz"


def write_block(path: Path, block: Block) -> None:
    """Write the block's tokens and what `Past` needs to know of it."""
    state = json.dumps({"source": block.source, "position": block.position, "tally": block.tally})
    arrays = encode_block(block.documents, _kept.encoder)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        names = np.array(block.names, dtype=np.uint64)
        np.savez(file, allow_pickle=False, **arrays, names=names, state=np.array(state))


def encode_block(documents: Sequence[tuple[str, str]], encoder: Encoder) -> dict[str, np.ndarray]:
    """Concatenate the tokens of each split's documents, each followed by <eos>."""
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, encoder.dtype)] for name in SPLITS}
    for first in range(0, len(documents), BATCH):
        batch = documents[first : first + BATCH]
        for (split, _), ids in zip(batch, encoder([text for _, text in batch]), strict=True):
            parts[split].append(ids)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class Encoder:
    """Encoder of texts into arrays of `dtype` that end in <eos>; ids are identical to those of `tokenizer.encode`.

    A byte-level BPE with GPT-2's pattern cuts text into independent pieces, and most pieces are words
    seen before, so their ids are cached. Any other tokenizer encodes every text itself.
    """

    def __init__(self, backend: Tokenizer, eos_id: int, dtype: np.dtype) -> None:
        self.backend, self.dtype = Tokenizer.from_str(backend.to_str()), dtype
        self.end = np.array([eos_id], dtype).tobytes()
        self.pieces = _Pieces(self) if cuts_like_gpt2(backend) else None

    def __call__(self, texts: Sequence[str]) -> list[UInt[np.ndarray, " tokens"]]:
        if self.pieces is None:
            packed = self.ask(texts)
        else:
            packed = [b"".join(map(self.pieces.__getitem__, _PIECES.findall(text))) for text in texts]
        return [np.frombuffer(ids + self.end, self.dtype) for ids in packed]

    def ask(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text with the library, as bytes of `dtype`."""
        self.backend.encode_special_tokens = True
        fix = "give its tokenizer.json a token for what it does not know, or use `gpt2`"
        with as_user_error("the tokenizer cannot spell a text", fix):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]


class _Pieces(dict[str, bytes]):
    """Cache of piece ids; a missing piece is encoded and remembered."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.characters = encoder, 0

    def __missing__(self, piece: str) -> bytes:
        if self.characters > REMEMBERED_CHARACTERS:
            self.clear()
            self.characters = 0
        if _HAS_OTHER.search(piece):
            ids = self.encoder.ask([piece])[0]
        else:
            # One word: the model alone does, four times as fast. GPT-2 writes a space as U+0120.
            tokens = self.encoder.backend.model.tokenize(piece.translate(_BYTE_LEVEL_SPACES))
            ids = np.array([token.id for token in tokens], self.encoder.dtype).tobytes()
        self[piece] = ids
        self.characters += len(piece)
        return ids


def cuts_like_gpt2(backend: Tokenizer) -> bool:
    """Whether the tokenizer is a plain byte-level BPE over the matches of GPT-2's pattern."""
    state = json.loads(backend.to_str())
    before, model = state["pre_tokenizer"] or {}, state["model"]
    return (
        (before.get("type"), before.get("add_prefix_space"), before.get("use_regex")) == ("ByteLevel", False, True)
        and (model["type"], model.get("dropout") or 0) == ("BPE", 0)
        and not any(state[name] for name in ("normalizer", "truncation", "padding"))
        and all(token["special"] for token in state["added_tokens"])
    )

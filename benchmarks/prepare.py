"""Encoding speed of `prepare`, side by side in one run: tokenizers' batch encoding, our encoder, and all cores.

The ways take turns over the same documents of the offline corpus (equal amounts of every part), each starting with
nothing remembered, and medians are compared. The speed of a core is text by processor time, which other work on the
machine disturbs little; the speed of the whole is text by the clock. All ways have to give the same ids.

    python benchmarks/prepare.py                  # the table of docs/data.md
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from cratescope.text import offline
from cratescope.text.encoding import BATCH, Block, Encoder, block_path, open_workers, write_block
from cratescope.text.tokenizer import encode, load_tokenizer, train_bpe

Seconds = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """Encode the same text in every way, in turns."""

    megabytes: float = 8.0
    """Text encoded each time."""
    rounds: int = 3
    """Times each way is measured."""
    tokenizer: str = "gpt2"
    """As given to `prepare`."""
    cores: int = os.cpu_count() or 1
    """Threads, and processes, of the ways on several cores."""


def read_texts(megabytes: float) -> list[str]:
    texts: list[str] = []
    for part in offline.CORPUS:
        left = megabytes * 1e6 / len(offline.CORPUS)
        for text in part.documents():
            texts.append(text.encode("utf-8", "replace").decode())
            left -= len(text)
            if left <= 0:
                break
    return texts


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer.backend_tokenizer, tokenizer.eos_token_id, np.dtype(np.uint16))


def by_library(tokenizer: PreTrainedTokenizerFast, texts: list[str], parallel: bool) -> list[np.ndarray]:
    os.environ["TOKENIZERS_PARALLELISM"] = str(parallel).lower()
    end = tokenizer.eos_token_id
    batches = (encode(tokenizer, texts[first : first + BATCH]) for first in range(0, len(texts), BATCH))
    return [np.array([*ids, end], np.uint16) for batch in batches for ids in batch]


def by_encoder(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = encoder_of(tokenizer)
    return [ids for first in range(0, len(texts), BATCH) for ids in encoder(texts[first : first + BATCH])]


def by_processes(pool: Executor, n_blocks: int, texts: list[str]) -> list[np.ndarray]:
    """Blocks go to processes and come back as files. Documents are dealt out, so that all blocks are equally hard."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [block_path(Path(folder), number) for number in range(n_blocks)]
        dealt = [[("train", text) for text in texts[number::n_blocks]] for number in range(n_blocks)]
        writing = [pool.submit(write_block, path, Block(0, part)) for path, part in zip(paths, dealt, strict=True)]
        for future in writing:
            future.result()
        return [np.load(path)["train"] for path in paths]


def timed(way: Callable[[], list[np.ndarray]]) -> tuple[Seconds, np.ndarray]:
    """Seconds of the clock and of this process's processors, and how often each id came."""
    clock, processors = time.perf_counter(), time.process_time()
    found = way()
    seconds = time.perf_counter() - clock, time.process_time() - processors
    return seconds, np.bincount(np.concatenate(found), minlength=65536)


def in_processes(tokenizer: PreTrainedTokenizerFast, cores: int, texts: list[str]) -> tuple[Seconds, np.ndarray]:
    with open_workers(encoder_of(tokenizer), cores) as pool:
        list(pool.map(time.sleep, [0.5] * cores))  # `prepare` starts them once
        return timed(lambda: by_processes(pool, 4 * cores, texts))


def main() -> None:
    options = tyro.cli(Options)
    texts, cores = read_texts(options.megabytes), options.cores
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    kind, _, size = options.tokenizer.partition(":")
    tokenizer = train_bpe(iter(texts), int(size)) if kind == "bpe" else load_tokenizer(options.tokenizer)
    ways: dict[str, Callable[[], tuple[Seconds, np.ndarray]]] = {
        "tokenizers, 1 thread": lambda: timed(lambda: by_library(tokenizer, texts, False)),
        f"tokenizers, {cores} threads": lambda: timed(lambda: by_library(tokenizer, texts, True)),
        "ours, 1 process": lambda: timed(lambda: by_encoder(tokenizer, texts)),
        f"ours, {cores} processes": lambda: in_processes(tokenizer, cores, texts),
    }
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        counts = []
        for name, way in ways.items():
            own, count = way()
            seconds[name].append(own)
            counts.append(count)
        assert all(np.array_equal(count, counts[0]) for count in counts), "the ids differ"
    table = Table("way", "MB/s by the clock", "MB/s of one core", title=f"{options.tokenizer}, {megabytes:.1f} MB")
    for name, own in seconds.items():
        clock, processors = (megabytes / statistics.median(values) for values in zip(*own, strict=True))
        table.add_row(name, f"{clock:.2f}", "" if "processes" in name else f"{processors:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

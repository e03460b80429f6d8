"""Settings of `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratescope.errors import UserError
from cratescope.options import LARGEST_SEED, Checked, within


@dataclass(frozen=True)
class PrepareConfig(Checked):
    """Turn text into tokenised shards with a manifest, split by document into train, validation and heldout."""

    source: Annotated[str, tyro.conf.Positional]
    """`offline` (packaged corpus), a file or folder (.txt .md .jsonl .parquet .gz .zst), or a hub data set that is
    streamed, such as monology/pile-uncopyrighted (the paper's)."""
    out: Path
    """Folder to write; the same command resumes after a kill, even in the middle of a stream."""
    tokenizer: str = "gpt2"
    """`gpt2` (packaged GPT-2 BPE), `bpe:N` (N entries, trained on the text), `zoo/NAME` (that of a model in
    `cratescope zoo`), or a tokenizer folder or hub name."""
    max_megabytes: Annotated[float | None, within(0, above=True)] = None
    """Use only about this many megabytes of text, spread evenly over the parts of the source."""
    validation: Annotated[float, within(0, 1, above=True, below=True)] = 0.01
    """Fraction of the documents in the validation split (loss curves)."""
    heldout: Annotated[float, within(0, 1, above=True, below=True)] = 0.05
    """Fraction of the documents in the heldout split (neuron records are collected here)."""
    shard_tokens: Annotated[int, within(1, 10**15)] = 268_435_456
    """Tokens per shard file; each shard is one open file while training."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Decides which split each document belongs to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.heldout >= 1:
            raise UserError("--validation and --heldout together leave nothing to train on; make them smaller")

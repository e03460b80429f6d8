"""Settings of `sae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cratescope.errors import UserError
from cratescope.options import LARGEST_BATCH, LARGEST_SEED, Checked, PositionalPath, within

Recipe = Literal["relu", "topk", "batchtopk", "jumprelu", "matryoshka", "frozen", "identity", "rotation"]
"""Kinds of autoencoders, and controls."""


@dataclass(frozen=True)
class SaeConfig(Checked):
    """Train sparse autoencoders on the activations of one site, from a stream of the train split that is never stored.

    Several layers and, with --grid, several settings learn from one pass over the text.
    """

    run: PositionalPath
    """Run directory with a trained model."""
    name: str = "sae"
    """Name of the autoencoders: RUN/saes/NAME has one folder per layer, in SAELens' format."""
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Take them from elsewhere instead: a folder or hub name of SAELens, sparsify or dictionary_learning."""
    site: str = "auto"
    """Site of the activations, as given to `collect`."""
    layers: Annotated[tuple[int, ...] | None, within(0)] = None
    """Layers to learn; all by default. The forward pass stops after the last of them."""
    kind: Recipe = "batchtopk"
    """relu is the paper's (section 6). Controls: frozen (batchtopk whose decoder stays random), identity (the
    activations themselves) and rotation (their axes turned at random). docs/dictionaries.md describes all."""
    expansion: Annotated[int, within(1, 1024)] = 16
    """Features per dimension of the activations (paper: 16)."""
    k: Annotated[int, within(1)] = 32
    """Active features per token (topk), or of an average token (batchtopk, matryoshka)."""
    penalty: Annotated[float | None, within(0)] = None
    """Weight of the L1 norm (relu) or of the number of active features (jumprelu)."""
    aux: Annotated[float, within(0)] = 1 / 32
    """Weight of dead features' reconstruction of the error (topk, batchtopk, matryoshka)."""
    prefixes: Annotated[tuple[float, ...], within(0, 1, above=True, below=True)] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Shares of the features that have to reconstruct alone (matryoshka)."""
    grid: tuple[str, ...] = ()
    """Several settings at once, such as `k=16,32 kind=topk,relu`: all combinations, as NAME-k16-topk and so on."""
    tokens: Annotated[int, within(1)] = 10_000_000
    """Tokens to learn from."""
    batch: Annotated[int, within(1, 1_000_000)] = 4096
    """Tokens per step."""
    learning_rate: Annotated[float, within(0, above=True)] = 1e-3
    """Peak learning rate, after a warm-up over 5 % of the steps; it falls to 0 over the last 20 %."""
    dead_tokens: Annotated[int, within(1)] = 400_000
    """Tokens after which a feature that was never active is dead (topk, batchtopk, matryoshka)."""
    buffer: Annotated[int, within(1)] = 65_536
    """Tokens of different crops that are shuffled together; their activations are what it holds in memory."""
    context: Annotated[int | None, within(2)] = None
    """Tokens per crop; the run's own context by default."""
    data: Path | None = None
    """Folder made by `cratescope prepare`; the run's own by default."""
    batch_size: Annotated[int, within(1, LARGEST_BATCH)] = 16
    """Crops per forward pass of the model."""
    log_every: Annotated[int, within(1)] = 50
    """Steps between lines of metrics.jsonl."""
    save_every: Annotated[int, within(1)] = 500
    """Steps between checkpoints."""
    seed: Annotated[int, within(0, LARGEST_SEED)] = 0
    """Seed of the initial weights and of the order of the text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the dense products; auto is bfloat16 where the hardware supports it. Weights are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "/" in self.name or self.name in (".", ".."):
            raise UserError(f"--name {self.name:.50}: is the name of a folder in RUN/saes; give one without slashes")
        if self.source is not None and self.grid:
            raise UserError(
                "--grid is of settings to learn, and --from brings in what is learnt; leave one of them out"
            )
        if self.batch > self.buffer:
            raise UserError(f"--batch {self.batch}: is more than --buffer {self.buffer}; lower it or raise --buffer")

"""Sparse inference on a CPU: reading only the dictionary rows of active codes against the whole product.

Both ways take turns on the same codes, and medians of process time are compared; then both generate text with a whole
model. The figures behind FEW_TOKENS, MANY_WEIGHTS and SPARSE of models/modeling_crate.py.

    python benchmarks/sparse.py
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from cratescope.models import modeling_crate
from cratescope.models.modeling_crate import gather
from cratescope.models.presets import build, preset_config


@dataclass(frozen=True)
class Options:
    """Time products with few active codes, and generation."""

    widths: tuple[int, ...] = (128, 256, 384, 512, 768)
    """d; the dictionary has 5 d atoms."""
    tokens: tuple[int, ...] = (1, 2, 4, 8, 64)
    """Tokens at once."""
    densities: tuple[float, ...] = (0.03, 0.05, 0.1)
    """Share of active codes."""
    preset: str = "crate-h-s"
    """Model that generates, with random weights."""
    theta: float = 1.8
    """Its thresholds: 1.8 makes 3.6 % of random codes active."""
    length: int = 64
    """Tokens generated."""
    rounds: int = 7
    """Times that each way has its turn."""
    threads: int = 1
    """Threads."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    console.print(products(options))
    console.print(generation(options))


def products(options: Options) -> Table:
    table = Table(title="decoder product, microseconds")
    for name in ("d", "tokens", "active", "product", "gathered", "x"):
        table.add_column(name, justify="right")
    for d, n, density in itertools.product(options.widths, options.tokens, options.densities):
        rows, codes = torch.randn(5 * d, d), torch.rand(n, 5 * d)
        codes[torch.rand(n, 5 * d) >= density] = 0
        ways = [functools.partial(way, codes, rows) for way in (torch.matmul, gather)]
        whole, few = (1e6 * seconds for seconds in in_turns(ways, options.rounds, 0.02))
        table.add_row(str(d), str(n), f"{density:.0%}", f"{whole:.0f}", f"{few:.0f}", f"{whole / few:.2f}")
    return table


@torch.no_grad()
def in_turns(ways: Sequence[Callable[[], Any]], rounds: int, least: float) -> list[float]:
    """Median seconds of process time of each way; each turn lasts `least` seconds or one call."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, seconds in zip(ways, taken, strict=True):
            calls, start = 0, time.process_time()
            while not calls or time.process_time() - start < least:
                way()
                calls += 1
            if number:  # the first turn warms up
                seconds.append((time.process_time() - start) / calls)
    return [statistics.median(seconds) for seconds in taken]


def generation(options: Options) -> Table:
    model: Any = build(preset_config(options.preset), 0).eval()
    for block in model.transformer.h:
        block.ista.theta.fill_(options.theta)
    few = modeling_crate.FEW_TOKENS

    def generate(tokens: int) -> None:
        modeling_crate.FEW_TOKENS = tokens
        model.generate(torch.arange(8)[None], max_new_tokens=options.length, do_sample=False, pad_token_id=0)

    taken = in_turns([lambda: generate(0), lambda: generate(few)], options.rounds, 0)
    table = Table(title=f"{options.preset}, one text, {options.threads} thread(s)")
    for name in ("decoder", "tokens/s"):
        table.add_column(name, justify="right")
    for name, seconds in zip(("product", "gathered"), taken, strict=True):
        table.add_row(name, f"{options.length / seconds:.1f}")
    return table


if __name__ == "__main__":
    main()

"""Settings of `show` and `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratescope.errors import UserError
from cratescope.explain.config import Simulator
from cratescope.options import Checked, PositionalPath, PositionalPaths, Site, within


@dataclass(frozen=True)
class ShowConfig(Checked):
    """Print a card of one neuron: explanation, scores, moments, histogram, tokens and windows shaded by activation."""

    run: PositionalPath
    """Run directory with neuron records."""
    layer: Annotated[int, tyro.conf.Positional, within(0)]
    """The neuron's layer, counted from 0."""
    neuron: Annotated[int, tyro.conf.Positional, within(0)]
    """Its index in the layer, counted from 0."""
    site: Site = "auto"
    explainer: str | None = None
    """Show only the explanation of this explainer: the --llm given to `explain`, or `terms`."""
    simulator: Simulator | None = None
    """Show only scores of this simulator."""


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Write one self-contained HTML report of some runs, its numbers as CSV and JSON, its figures as SVG and PNG."""

    runs: PositionalPaths
    """Run directories."""
    out: Path
    """Folder to write."""
    explainer: str = "offline"
    """Explainer whose explanations to report; cards show those of others too."""
    simulator: Simulator = "list-pmi"
    """Simulator whose simulations to report."""
    primary: str = "uniform/pearson/shuffled"
    """The measure that decides, to be named before the runs: protocol/measure, with /control for the gain over a
    control (shuffled, empty, unigram, untrained). docs/evaluation.md explains the default. Others are secondary."""
    compare: tuple[str, ...] = ()
    """Two arms to compare, such as `crate gpt2`, or several pairs one after the other, such as `crate gpt2 crate-h
    gpt2-h`; by default CRATE and GPT-2 if there are runs of both, else the first two arms among the runs."""
    title: str = "cratescope report"
    """Page title."""
    cards: Annotated[int, within(0, 10_000)] = 8
    """Neuron cards per layer, spread evenly over the ranking by score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.compare) % 2 or any(a == b for a, b in zip(self.compare[::2], self.compare[1::2], strict=True)):
            raise UserError(f"--compare {' '.join(self.compare)}: give pairs of two arms, such as crate gpt2")

"""Settings of `score`."""

from __future__ import annotations

from dataclasses import dataclass

from cratescope.explain.config import DEFAULT_PROTOCOLS, Simulator
from cratescope.options import Checked, PositionalPath, Site


@dataclass(frozen=True)
class ScoreConfig(Checked):
    """Compare simulated with true activations, beside every control, and say which measures may be trusted."""

    run: PositionalPath
    """Run directory with simulations."""
    site: Site = "auto"
    explainer: str = "offline"
    """Explainer whose explanations to use: the --llm given to `explain`."""
    simulator: Simulator = "list-pmi"
    """Simulator whose simulations to use, as given to `simulate`."""
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    """Protocols to score; judgements (detection, fuzzing, intruder) are scored too where they exist."""

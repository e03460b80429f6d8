"""Planted dictionaries: which kinds of sparse autoencoder find the atoms that activations were made from.

Activations are sums of a few of many random atoms (sae/planted.py). *cosine* is the mean over true atoms of the largest
cosine with a learnt one, *found* the share with one above 0.9; L0 and explained variance (about the mean) are of tokens
that were not learnt from, by the coder as it is saved.

    python benchmarks/planted_dictionary.py
    python benchmarks/planted_dictionary.py --kinds topk --steps 1000
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from cratescope.models.sae import CoderConfig, Kind, SparseCoder, explained_variance
from cratescope.sae.learner import Learner, Plan
from cratescope.sae.planted import Planted, mean_max_cosine
from cratescope.sae.train import Units

UNSEEN = 10**6
"""Number of a batch that is never learnt from."""
PENALTIES = {"relu": 1.0, "jumprelu": 0.3}


@dataclass(frozen=True)
class Options:
    """Learn a planted dictionary by every kind."""

    kinds: tuple[Kind, ...] = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")
    atoms: int = 512
    """True atoms."""
    d: int = 128
    """Dimensions."""
    active: int = 8
    """Atoms of a token, and k."""
    expansion: int = 8
    """Features per dimension."""
    batch: int = 1024
    """Tokens in a step."""
    steps: int = 500
    """Steps."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Of the atoms and the initial weights."""
    json: Path | None = None
    """Also write the figures here."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = []
    for kind in options.kinds:
        rows.append(learn(kind, options))
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def learn(kind: Kind, options: Options) -> dict[str, Any]:
    """Train one coder; its figures."""
    planted = Planted(options.atoms, options.d, options.active, options.seed)
    width = options.expansion * options.d
    prefixes = (width // 4, width // 2) if kind == "matryoshka" else ()
    config = CoderConfig(kind, options.d, width, options.active, PENALTIES.get(kind, 0.0), prefixes=prefixes)
    learner = Learner(SparseCoder(config, seed=options.seed), Plan(options.steps, options.learning_rate))
    unseen, _ = planted.batch(4096, UNSEEN)
    units = Units.of(unseen)
    for step in range(options.steps):
        learner.step(units(planted.batch(options.batch, step)[0]))
    with torch.no_grad():
        coder, x = learner.coder, units(unseen)
        nearest = (F.normalize(planted.atoms, dim=1) @ coder.decoder.T).amax(1)
        found = {"kind": kind, "cosine": round(mean_max_cosine(planted.atoms, coder.decoder), 3)}
        found |= {"found": round(float((nearest > 0.9).float().mean()), 3)}
        found |= {"L0": round(float((coder.encode(x) > 0).sum(1).float().mean()), 1)}
        return found | {"explained_variance": round(explained_variance(x, coder(x)), 3)}


if __name__ == "__main__":
    main()

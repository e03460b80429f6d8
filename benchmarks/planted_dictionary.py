"""Planted dictionaries: which kinds of sparse autoencoder find the atoms that activations were made from.

Activations are sums of a few of many random atoms. *cosine* is the mean over true atoms of the largest
cosine with a learnt one, *found* the share with one above 0.9; L0 and explained variance (about the mean) are of tokens
that were not learnt from, by the coder as it is saved.

    python benchmarks/planted_dictionary.py
    python benchmarks/planted_dictionary.py --kinds topk --steps 1000
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cratescope.models.sae import CoderConfig, Kind, SparseCoder, explained_variance
from cratescope.sae.learner import Learner, Plan
from cratescope.sae.train import Units

UNSEEN = 10**6
"""Number of a batch that is never learnt from."""
PENALTIES = {"relu": 1.0, "jumprelu": 0.3}


@dataclass(frozen=True)
class Planted:
    """Random atoms of norm 1 (n, d) of which each token has some, all as likely, of uniform strengths 0.5 to 1.5."""

    n_atoms: int = 512
    d: int = 128
    active: int = 8
    seed: int = 0

    @functools.cached_property
    def atoms(self) -> Float[Tensor, "n d"]:
        chance = torch.Generator().manual_seed(self.seed)
        return F.normalize(torch.randn(self.n_atoms, self.d, generator=chance), dim=1)

    def batch(self, n: int, number: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n"]]:
        """Tokens of batch `number`, and their codes."""
        chance = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)
        chosen = torch.rand(n, self.n_atoms, generator=chance).topk(self.active, dim=1).indices
        strengths = 0.5 + torch.rand(n, self.active, generator=chance)
        codes = torch.zeros(n, self.n_atoms).scatter(1, chosen, strengths)
        return codes @ self.atoms, codes


def mean_max_cosine(true: Float[Tensor, "n d"], learnt: Float[Tensor, "m d"]) -> float:
    """Mean over true atoms of the largest cosine with any learnt one; 1 where all are found."""
    return float((F.normalize(true, dim=1) @ F.normalize(learnt, dim=1).T).amax(1).mean())


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

"""Activations made from a known sparse dictionary, by which it can be told what a coder should find."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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

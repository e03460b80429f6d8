"""k-sparse probing: how well do k features tell which part of the corpus a token is from? (Gurnee et al. 2023.)

For each part, against all others: the features are chosen on one half of the crops, by the difference of their means in
standard deviations; on documents that occur in the other half only, a logistic regression on the k best is fitted to
every second document and tested on the rest. Both classes weigh the same, so guessing is right in half of the cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

KS = (1, 5)
CHANCE = 0.5
RIDGE = 1e-4
"""Weight of the squared norm of the regression's coefficients, by columns of variance 1: some parts can be told apart
without error, and have no best coefficients else."""
LEAST = 2
"""Documents of a part, and of all others, that are needed to fit and to test."""


class Probing:
    """What is known of the codes of the crops seen so far: first all even crops are added, then the odd ones."""

    def __init__(
        self, width: int, documents: Int[np.ndarray, "n t"], parts: Int[np.ndarray, " d"], device: torch.device
    ) -> None:
        occurring, numbers, n = np.unique(parts, return_inverse=True, return_counts=True)
        probed = np.flatnonzero(n >= 2 * LEAST)
        # All others are one part more, which is not probed: a folder of books has a part for every book.
        place = np.full(len(occurring), len(probed))
        place[probed] = np.arange(len(probed))
        self.documents, self.parts, self.n_parts = documents, place[numbers], len(probed)
        self.counts = torch.zeros(self.n_parts + 1, dtype=torch.float64, device=device)
        self.sums = torch.zeros(self.n_parts + 1, width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.best: Tensor | None = None
        self.kept: list[tuple[Float[np.ndarray, "s c k"], Int[np.ndarray, " s"]]] = []

    def add(self, z: Float[Tensor, "s m"], crops: Int[np.ndarray, " c"]) -> None:
        """The codes of all tokens of some crops."""
        documents = self.documents[crops].ravel()
        if crops[0] % 2 == 0:
            part = torch.from_numpy(self.parts[documents]).to(z.device)
            inside = torch.nn.functional.one_hot(part, len(self.counts)).float()
            self.counts += inside.sum(0)
            self.sums += inside.T @ z
            self.squares += z.square().sum(0)
            return
        if self.best is None:
            self.best = self._choose()
        self.kept.append((z[:, self.best].cpu().numpy(), documents))

    def _choose(self) -> Int[Tensor, "c k"]:
        """The most telling features of each part, the best first."""
        n, total = self.counts.sum(), self.sums.sum(0)
        spread = (self.squares / n - (total / n).square()).clamp_min(0).sqrt()
        inside = self.sums / self.counts[:, None]
        outside = (total - self.sums) / (n - self.counts)[:, None]
        apart = ((inside - outside).abs() / spread).nan_to_num(0, 0, 0)  # silent features, parts without tokens
        return apart.topk(min(max(KS), apart.shape[1]), dim=1).indices

    def result(self) -> dict[str, Any] | None:
        """Balanced accuracy on tokens of new documents for each k, mean over the parts; None if there are too few.

        Its standard error is over documents.
        """
        if not self.kept:
            return None
        z = np.concatenate([values for values, _ in self.kept])
        documents = np.concatenate([numbers for _, numbers in self.kept])
        role = self._roles(documents)
        parts = [part for part in range(self.n_parts) if self._enough(role, self.parts == part)]
        if not parts:
            return None
        found: dict[str, Any] = {"chance": CHANCE, "parts": len(parts)}
        for k in KS:
            value, influence = 0.0, np.zeros(len(self.parts))
            for part in parts:
                right, own = self._tested(z[:, part, :k], documents, role, part)
                value += right / len(parts)
                influence += own / len(parts)
            tested = influence[role == 1]
            error = float(np.sqrt(len(tested) / (len(tested) - 1) * np.square(tested).sum()))
            found |= {f"k{k}": value, f"k{k}_error": error}
        return found

    def _roles(self, documents: Int[np.ndarray, " s"]) -> Int[np.ndarray, " d"]:
        """Of each document: 0 to fit, 1 to test, -1 if features were chosen by it or it was not read since."""
        role = np.full(len(self.parts), -1)
        new = np.setdiff1d(documents, self.documents[::2])
        for part in range(self.n_parts + 1):
            own = new[self.parts[new] == part]
            role[own] = np.arange(len(own)) % 2
        return role

    @staticmethod
    def _enough(role: Int[np.ndarray, " d"], inside: Bool[np.ndarray, " d"]) -> bool:
        return all(np.sum((role == use) & side) >= LEAST for use in (0, 1) for side in (inside, ~inside))

    def _tested(
        self, z: Float[np.ndarray, "s k"], documents: Int[np.ndarray, " s"], role: Int[np.ndarray, " d"], part: int
    ) -> tuple[float, Float[np.ndarray, " d"]]:
        """Balanced accuracy of one part's regression, and what each document adds to its error."""
        inside, use = self.parts[documents] == part, role[documents]
        predict = logistic(z[use == 0], inside[use == 0])
        right = predict(z) == inside
        value, influence = 0.0, np.zeros(len(self.parts))
        for side in (inside, ~inside):
            chosen = (use == 1) & side
            n = np.bincount(documents[chosen], minlength=len(self.parts))
            hits = np.bincount(documents[chosen & right], minlength=len(self.parts))
            share = hits.sum() / n.sum()
            value += share / 2
            influence += (hits - share * n) / n.sum() / 2
        return float(value), influence


def logistic(z: Float[np.ndarray, "s k"], inside: Bool[np.ndarray, " s"]) -> Any:
    """A function z -> inside, fitted by logistic regression in which both classes weigh the same."""
    mean, spread = z.mean(0), np.maximum(z.std(0), np.finfo(np.float32).tiny)
    sign = np.where(inside, 1.0, -1.0)
    weight = np.where(inside, 0.5 / inside.sum(), 0.5 / (~inside).sum())

    def columns(z: Float[np.ndarray, "s k"]) -> Float[np.ndarray, "s n"]:
        return np.column_stack([(z - mean) / spread, np.ones(len(z))])

    x = columns(z)

    def loss(w: Float[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
        margin = sign * (x @ w)
        slope = -sign * weight / (1 + np.exp(np.clip(margin, -500, 500)))
        ridge = RIDGE * np.append(w[:-1], 0)
        return float(weight @ np.logaddexp(0, -margin) + ridge @ w / 2), x.T @ slope + ridge

    w = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return lambda z: columns(z) @ w > 0

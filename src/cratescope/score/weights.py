"""How much each scored token counts, in each of several samples of the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cratescope.score.words import Words

_AT_ONCE = 2**16
"""Weights that are worked on at a time: more of them than a processor's cache holds take several times as long."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of n tokens in b samples, kept by cells of tokens that weigh alike in every sample.

    cell (n,): the number of each token's cell, from 0, such as that of its window. of_cells (c, b): what each token of
    a cell weighs, such as how often the window was drawn. A thousand samples of fifty windows are then fifty rows.
    """

    cell: Int[np.ndarray, " n"]
    of_cells: Float[np.ndarray, "c b"]

    @classmethod
    def once(cls, n: int) -> Weights:
        """One sample in which each of n tokens counts once."""
        return cls(np.zeros(n, dtype=np.int64), np.ones((1, 1)))

    @classmethod
    def each(cls, weights: Float[np.ndarray, "b n"]) -> Weights:
        """Any weights: each token is a cell."""
        return cls(np.arange(weights.shape[1]), weights.T)

    @property
    def of_tokens(self) -> Float[np.ndarray, "b n"]:
        return self.of_cells.T[:, self.cell]

    def sums(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k b"]:
        """Sum over the tokens of each value times the token's weight."""
        return np.stack([np.bincount(self.cell, row, len(self.of_cells)) for row in values]) @ self.of_cells

    def means(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k b"]:
        """`sums` over the sum of the weights; 0 in a sample in which no token has any."""
        *sums, total = self.sums(np.vstack([values, np.ones(len(self.cell))]))
        return np.divide(sums, total, out=np.zeros((len(values), len(total))), where=total > 0)


Weigher = Callable[[Weights, Words], Weights]


def every_word_alike(weights: Weights, words: Words) -> Weights:
    """The weights of the tokens of each word scaled to add up to 1 in every sample, so that it counts once in all."""
    n_cells, samples = weights.of_cells.shape
    # The tokens of a word in one cell weigh alike again; such pairs are sorted by word.
    pairs, pair, size = np.unique(words.number * n_cells + weights.cell, return_inverse=True, return_counts=True)
    word, cell = np.divmod(pairs, n_cells)
    starts = np.flatnonzero(np.diff(word, prepend=-1))
    repeats = np.diff(starts, append=len(pairs))
    found = np.empty((len(pairs), samples))
    step = max(_AT_ONCE // len(pairs), 1)
    for part in (slice(start, start + step) for start in range(0, samples, step)):
        drawn = weights.of_cells[cell, part]
        total = np.add.reduceat(drawn * size[:, None], starts)
        total[total == 0] = 1  # a sample without the word
        np.divide(drawn, np.repeat(total, repeats, axis=0), out=found[:, part])
    return Weights(pair, found)


def unseen_words(weights: Weights, words: Words) -> Weights:
    """The weights of the tokens of words that the explanation was not made from; 0 for the others."""
    n_cells, samples = weights.of_cells.shape
    return Weights(np.where(words.unseen, weights.cell, n_cells), np.vstack([weights.of_cells, np.zeros((1, samples))]))

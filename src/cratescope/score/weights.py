"""How much each scored token counts, in each of several samples of the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cratescope.score.words import Words


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
    # The tokens of a word in one cell weigh alike again: they are a cell of what is returned.
    shape = int(words.number.max(initial=-1)) + 1, len(weights.of_cells)
    place = np.ravel_multi_index((words.number, weights.cell), shape)
    count = np.bincount(place, minlength=shape[0] * shape[1])
    total = count.reshape(shape).astype(np.float64) @ weights.of_cells
    np.maximum(total, np.finfo(np.float64).tiny, out=total)  # 0 for a sample without the word
    word, cell = np.divmod(np.flatnonzero(count), shape[1])
    scaled = weights.of_cells.take(cell, axis=0)
    scaled /= total.take(word, axis=0)
    return Weights((np.cumsum(count > 0) - 1)[place], scaled)


def unseen_words(weights: Weights, words: Words) -> Weights:
    """The weights of the tokens of words that the explanation was not made from; 0 for the others."""
    n_cells, samples = weights.of_cells.shape
    return Weights(np.where(words.unseen, weights.cell, n_cells), np.vstack([weights.of_cells, np.zeros((1, samples))]))

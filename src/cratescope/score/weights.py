"""How much each scored token counts, in each of several samples of the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from cratescope.score.words import Words


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of n tokens in b samples, kept by cells of tokens that weigh alike in every sample.

    cell (n,): the number of each token's cell, from 0, such as that of its window. of_cells (c, b): what each token of
    a cell weighs, such as how often the window was drawn. A thousand samples of fifty windows are then fifty rows.
    word (n,): where it is given, the number of each token's word, from 0: the weights of the tokens of each word are
    scaled to add up to 1 in every sample that has any.

    Products are of sparse matrices: those of dense ones depend on the number of threads in their last digits.
    """

    cell: Int[np.ndarray, " n"]
    of_cells: Float[np.ndarray, "c b"]
    word: Int[np.ndarray, " n"] | None = None

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
        plain = self.of_cells.T[:, self.cell]
        return plain if self.word is None else plain * self._of_words(self.word)[1].T[:, self.word]

    def sums(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k b"]:
        """Sum over the tokens of each value times the token's weight."""
        if self.word is None:
            return sp.csr_array([np.bincount(self.cell, row, len(self.of_cells)) for row in values]) @ self.of_cells
        cells, scale = self._of_words(self.word)
        place = np.ravel_multi_index((self.cell, self.word), cells.shape)
        _, entry = np.unique(place, return_inverse=True)
        found = []
        for row in values:
            cells.data = np.bincount(entry, row, cells.nnz)
            found.append((self.of_cells * (cells @ scale)).sum(0))
        return np.stack(found)

    def _of_words(self, word: Int[np.ndarray, " n"]) -> tuple[sp.csr_array, Float[np.ndarray, "w b"]]:
        """The number of tokens of each cell (row) and word (column), and what each word's weights are scaled by."""
        shape = len(self.of_cells), int(word.max(initial=-1)) + 1
        cells = sp.csr_array((np.ones(len(self.cell)), (self.cell, word)), shape)
        cells.sum_duplicates()
        total = cells.T.tocsr() @ self.of_cells
        return cells, np.divide(1, total, out=np.zeros_like(total), where=total > 0)

    def means(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k b"]:
        """`sums` over the sum of the weights; 0 in a sample in which no token has any."""
        *sums, total = self.sums(np.vstack([values, np.ones(len(self.cell))]))
        return np.divide(sums, total, out=np.zeros((len(values), len(total))), where=total > 0)


Weigher = Callable[[Weights, Words], Weights]


def every_word_alike(weights: Weights, words: Words) -> Weights:
    """The weights of the tokens of each word scaled to add up to 1 in every sample, so that it counts once in all."""
    return replace(weights, word=words.number)


def unseen_words(weights: Weights, words: Words) -> Weights:
    """The weights of the tokens of words that the explanation was not made from; 0 for the others."""
    n_cells, samples = weights.of_cells.shape
    return Weights(np.where(words.unseen, weights.cell, n_cells), np.vstack([weights.of_cells, np.zeros((1, samples))]))

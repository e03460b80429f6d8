"""How much each scored token counts, in each of several samples of the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from cratescope.score.words import Words


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of n tokens in b samples, kept by cells of tokens that weigh alike in every sample.

    cell (n,): the number of each token's cell, from 0, such as that of its window. of_cells (c, b): what each token of
    a cell weighs, such as how often the window was drawn. A thousand samples of fifty windows are then fifty rows.
    word (n,): where it is given, the number of each token's word, from 0: the weights of the tokens of each word are
    scaled to add up to 1 in every sample that has any.

    No product is one of `numpy.matmul`, whose last digits depend on the number of threads.
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
        if self.word is None:
            return plain
        total = np.stack([np.bincount(self.word, row) for row in plain])[:, self.word]
        return np.divide(plain, total, out=np.zeros_like(plain), where=total > 0)

    def sums(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k b"]:
        """Sum over the tokens of each value times the token's weight."""
        if self.of_cells.shape[1] == 1:
            return (values * self.of_tokens).sum(1, keepdims=True)
        if self.word is None:
            of_values = np.stack([np.bincount(self.cell, row, len(self.of_cells)) for row in values])
            return np.einsum("kc,cb->kb", of_values, self.of_cells)
        return self._sums_over_words(values, self.word)

    def _sums_over_words(
        self, values: Float[np.ndarray, "k n"], word: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "k b"]:
        """A sample's sum over cells of weight x sum over words of scale x sum over tokens; few words are in a cell."""
        import scipy.sparse as sp  # slow to import

        k, n_cells, n_words = len(values), len(self.of_cells), int(word.max(initial=-1)) + 1
        found, entry = np.unique(np.ravel_multi_index((self.cell, word), (n_cells, n_words)), return_inverse=True)
        cell, column = np.divmod(found, n_words)
        counts = sp.csr_array((np.bincount(entry), (column, cell)), (n_words, n_cells))
        total = counts.astype(np.float64) @ self.of_cells
        scale = np.divide(1, total, out=total, where=total > 0)
        of_values = np.concatenate([np.bincount(entry, row, len(found)) for row in values])
        starts = np.searchsorted(
            np.tile(cell, k) + np.repeat(np.arange(k) * n_cells, len(cell)), np.arange(k * n_cells + 1)
        )
        scaled = sp.csr_array((of_values, np.tile(column, k), starts), (k * n_cells, n_words)) @ scale
        return np.einsum("kcb,cb->kb", scaled.reshape(k, n_cells, -1), self.of_cells)

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

"""Choose the terms of neurons: forward selection by weighted least squares, many neurons at once.

With w the weights of a neuron's tokens, adding up to 1, y its activations and r what the terms chosen so far leave of
them, a term x of support s = sum(x^2), over tokens that have a weight, scores

    |cov_w(x, r)| / sd_w(x)  sqrt(s / (s + SHRINK)),     s >= SUPPORT

and the best one is added. The weights of all chosen terms are then refitted, each variance times 1 + PRIOR / s, as if
so many more tokens had said 0, and in the end rounded to whole numbers from -10 to 10, which the explanation shows.

What is found for a neuron does not depend on the neurons beside it, nor on the number of threads, to the last bit:
every sum over its tokens is taken in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from cratescope.explain.config import TermsConfig
from cratescope.explain.protocols import PROTOCOLS
from cratescope.explain.terms.features import Block, Features, Lexicon, Parts
from cratescope.explain.terms.language import Language
from cratescope.explain.terms.phrases import LARGEST, Term, Terms
from cratescope.explain.terms.selection import Selected, selected
from cratescope.explain.terms.texts import Texts, Vocabulary
from cratescope.neurons.records import NeuronRecord

SUPPORT = 6.0
"""A term has to be true of so many tokens."""
SHRINK = 8.0
JOINT_SHRINK = 12.0
JOINT_COST = 0.95
"""A joint has to be better than a single term by so much."""
PRIOR = 2.0
TIED = 1e-9
"""Scores so close to the best, relative to it, are ties; the first term in the order of the language wins."""
BEST_WHAT, BEST_WHERE = 24, 32
"""Joints are made of so many of the best terms of either kind."""
LEAST_TOKENS = 256
VERSION = 2
"""Of how terms are chosen: raise it when the same records give other explanations."""
AT_ONCE = 8
"""Neurons fitted together; it affects time and memory alone."""
DEAD = "dead neuron"
TOO_FEW = f"fewer than {LEAST_TOKENS} tokens that no protocol shows or scores"
NOTHING = "no term follows it on the tokens that no protocol shows or scores"


def identity(config: TermsConfig, language: Language) -> dict[str, Any]:
    """What decides the explanations of given records: a new protocol spares other tokens."""
    options = {name: value for name, value in asdict(config).items() if name != "language"}
    return {"terms_version": VERSION, "protocols": list(PROTOCOLS)} | options | language.identity


@dataclass(frozen=True)
class Skipped:
    """Why a neuron has no explanation."""

    reason: str


def explain(
    records: Sequence[NeuronRecord], vocabulary: Vocabulary, lexicon: Lexicon, config: TermsConfig
) -> list[Terms | Skipped]:
    """The terms of each neuron, chosen on the tokens that no protocol shows or scores.

    Raises:
        UserError: a record has no windows by quantile.
    """
    found: list[Terms | Skipped] = []
    for start in range(0, len(records), AT_ONCE):
        chunk = records[start : start + AT_ONCE]
        windows = [[] if record.dead else selected(record, [*PROTOCOLS.values()]) for record in chunk]
        enough = [sum(np.count_nonzero(one.weights) for one in of_one) >= LEAST_TOKENS for of_one in windows]
        samples = [of_one for of_one, is_enough in zip(windows, enough, strict=True) if is_enough]
        terms = iter(fit(samples, vocabulary, lexicon, config))
        for record, is_enough in zip(chunk, enough, strict=True):
            found.append((next(terms) or Skipped(NOTHING)) if is_enough else Skipped(DEAD if record.dead else TOO_FEW))
    return found


def fit(
    samples: Sequence[Sequence[Selected]], vocabulary: Vocabulary, lexicon: Lexicon, config: TermsConfig
) -> list[Terms]:
    """The terms of neurons from the windows of each; none for one that is constant on them."""
    if not samples:
        return []
    texts = Texts.of([one.window for sample in samples for one in sample], vocabulary)
    blocks = tuple(Features(texts, lexicon).blocks(config.named_only))
    data = _Data.of(samples)
    search = _Search(data, _Candidates(data, blocks))
    joints = [_joints(search, neuron, lexicon) for neuron in range(len(samples))] if config.joints else None
    for _ in range(config.terms):
        search.add(joints)
    return [search.terms(neuron) for neuron in range(len(samples))]


@dataclass(frozen=True, eq=False)
class _Data:
    """Tokens (n,) of h neurons: weights that add up to 1 for each, and activations less their weighted mean.

    bounds: first token of each neuron, and n. size: (h,) its number of tokens.
    """

    weights: Float[np.ndarray, " n"]
    activations: Float[np.ndarray, " n"]
    bounds: Int[np.ndarray, " bounds"]

    @classmethod
    def of(cls, samples: Sequence[Sequence[Selected]]) -> _Data:
        bounds = np.cumsum([0, *(sum(len(one.weights) for one in sample) for sample in samples)])
        every = [one for sample in samples for one in sample]
        weights = np.concatenate([one.weights for one in every])
        activations = np.concatenate([one.window.activations for one in every]).astype(np.float64)
        blank = cls(weights, activations, bounds)
        weights = weights / blank.spread(blank.sum(weights))
        return cls(weights, activations - blank.spread(blank.sum(weights * activations)), bounds)

    def sum(self, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "h ..."]:
        """Over the tokens of each neuron, in their order."""
        return np.add.reduceat(values, self.bounds[:-1])

    def spread(self, values: Float[np.ndarray, "h ..."]) -> Float[np.ndarray, "n ..."]:
        """The value of each token's neuron."""
        return np.repeat(values, self.size, axis=0)

    @cached_property
    def seen(self) -> Float[np.ndarray, " n"]:
        """1 for each token that has any weight."""
        return (self.weights > 0).astype(np.float64)

    @cached_property
    def size(self) -> Int[np.ndarray, " h"]:
        return np.diff(self.bounds)

    def tokens(self, neuron: int) -> slice:
        return slice(*self.bounds[neuron : neuron + 2].tolist())


@dataclass(frozen=True, eq=False)
class _Candidates:
    """All terms (t) of all blocks on the tokens of h neurons, with their moments under the weights."""

    data: _Data
    blocks: tuple[Block, ...]

    @cached_property
    def parts(self) -> list[Parts]:
        return [parts for block in self.blocks for parts in block.terms]

    @cached_property
    def _starts(self) -> Int[np.ndarray, " bounds"]:
        return np.cumsum([0, *(len(block.terms) for block in self.blocks)])

    def sums(self, values: Float[np.ndarray, " n"], squared: bool = False) -> Float[np.ndarray, "h t"]:
        """sum of `values` x over the tokens of each neuron, or of `values` x^2."""
        found = []
        for block in self.blocks:
            table = block.squares if squared else block.table
            shape = len(self.data.size), table.shape[0]
            found.append((sp.csr_array((values, block.rows, self.data.bounds), shape) @ table).toarray())
        return np.concatenate(found, 1)

    @cached_property
    def scale(self) -> Float[np.ndarray, "h t"]:
        """What a covariance is multiplied with to give a score; 0 for a term of too little support."""
        support = self.sums(self.data.seen, squared=True)
        squares, means = self.sums(self.data.weights, squared=True), self.sums(self.data.weights)
        return _scale(squares - means**2, support, SHRINK)

    def values(self, neuron: int, terms: Sequence[int]) -> Float[np.ndarray, "m j"]:
        """Of some terms on the m tokens of a neuron."""
        columns = np.zeros((self.data.size[neuron], len(terms)))
        block_of = np.searchsorted(self._starts, terms, side="right") - 1
        for number in np.unique(block_of):
            chosen = np.flatnonzero(block_of == number)
            inside = [terms[place] - int(self._starts[number]) for place in chosen.tolist()]
            columns[:, chosen] = self.blocks[number].values(inside, self.data.tokens(neuron))
        return columns


def _scale(
    variances: Float[np.ndarray, "*t"], support: Float[np.ndarray, "*t"], shrink: float
) -> Float[np.ndarray, "*t"]:
    usable = (support >= SUPPORT) & (variances > 1e-9)
    damping = np.sqrt(support / (support + shrink))
    return np.divide(damping, np.sqrt(np.where(usable, variances, 1)), where=usable, out=np.zeros_like(support))


@dataclass(frozen=True, eq=False)
class _Joints:
    """Pairs of a term about the word and one about its place, on the tokens of one neuron, as sparse columns.

    scale: (pairs,) as of candidates.
    """

    what: sp.csr_array
    where: sp.csr_array
    parts: list[Parts]
    scale: Float[np.ndarray, " p"]

    def scores(self, values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " p"]:
        return np.abs(_products(self.what, self.where, values)) * self.scale * JOINT_COST

    def values(self, pair: int) -> Float[np.ndarray, " m"]:
        i, j = divmod(pair, self.where.shape[1])
        return self.what[:, [i]].toarray()[:, 0] * self.where[:, [j]].toarray()[:, 0]


def _products(what: sp.csr_array, where: sp.csr_array, values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " p"]:
    """sum over tokens of values x a x b for every a of `what` and b of `where`."""
    return np.asarray((what.multiply(values[:, None]).tocsr().T.tocsr() @ where).toarray()).reshape(-1)


class _Search:
    """Terms chosen so far, for h neurons side by side."""

    def __init__(self, data: _Data, candidates: _Candidates) -> None:
        self.data, self.candidates = data, candidates
        self._parts: list[list[Parts | None]] = [[] for _ in data.size]
        self._columns = np.zeros((len(data.weights), 0))
        self._weights = np.zeros((len(data.size), 0))
        self._residual = data.activations

    @cached_property
    def first_scores(self) -> Float[np.ndarray, "h t"]:
        return self._scores()

    def _scores(self) -> Float[np.ndarray, "h t"]:
        return np.abs(self.candidates.sums(self.data.weights * self._residual)) * self.candidates.scale

    def add(self, joints: Sequence[_Joints | None] | None) -> None:
        """Add the best term of each neuron and refit all."""
        scores = self._scores()
        column = np.zeros(len(self.data.weights))
        for neuron, found in enumerate(self._parts):
            parts, values = self._best(neuron, scores[neuron], joints[neuron] if joints else None)
            column[self.data.tokens(neuron)] = values
            found.append(parts)
        self._columns = np.concatenate([self._columns, column[:, None]], 1)
        self._refit()

    def _best(
        self, neuron: int, scores: Float[np.ndarray, " t"], joints: _Joints | None
    ) -> tuple[Parts | None, np.ndarray | float]:
        """The term of the highest score that is not chosen yet, and its values; None when there is none."""
        known = set(self._parts[neuron])
        best, score = _highest(scores, self.candidates.parts, known)
        if joints is not None:
            tokens = self.data.tokens(neuron)
            of_pairs = joints.scores((self.data.weights * self._residual)[tokens])
            pair, pair_score = _highest(of_pairs, joints.parts, known)
            if pair_score > score:
                return joints.parts[pair], joints.values(pair)
        if score <= 0:
            return None, 0.0
        return self.candidates.parts[best], self.candidates.values(neuron, [best])[:, 0]

    def _refit(self) -> None:
        """Weighted least squares for each neuron; a column of zeros gets the weight 0."""
        data, w = self.data, self.data.weights[:, None]
        support = data.sum(data.seen[:, None] * self._columns**2)
        centred = self._columns - data.spread(data.sum(w * self._columns))
        k = centred.shape[1]
        gram = data.sum((w * centred)[:, :, None] * centred[:, None, :])
        gram[:, range(k), range(k)] *= 1 + PRIOR / np.maximum(support, 1)
        gram[:, range(k), range(k)] += 1e-10
        towards = data.sum(w * centred * data.activations[:, None])
        self._weights = np.linalg.solve(gram, towards[:, :, None])[:, :, 0]
        self._residual = data.activations - (centred * data.spread(self._weights)).sum(1)

    def terms(self, neuron: int) -> Terms:
        """With rounded weights, the largest first; those that round to 0 are left out."""
        weights = self._weights[neuron]
        largest = np.abs(weights).max(initial=0)
        rounded = np.round(weights / largest * LARGEST) if largest > 0 else weights
        found = []
        for place in np.argsort(-np.abs(rounded), kind="stable").tolist():
            parts, weight = self._parts[neuron][place], int(rounded[place])
            if parts is not None and weight:
                found.append(Term(parts[0], parts[1], weight))
        return tuple(found)


def _highest(scores: Float[np.ndarray, " t"], parts: Sequence[Parts], known: set[Parts | None]) -> tuple[int, float]:
    """The place and value of the best score of a term that is not known."""
    scores = scores.copy()
    while len(scores):
        best = int(np.flatnonzero(scores >= scores.max() * (1 - TIED))[0])
        if parts[best] not in known or scores[best] <= 0:
            return best, float(scores[best])
        scores[best] = 0
    return 0, 0.0


def _joints(search: _Search, neuron: int, lexicon: Lexicon) -> _Joints | None:
    """Pairs of the best terms of one neuron about words and about places; None when no pair has the support."""
    scores, parts, places = search.first_scores[neuron], search.candidates.parts, lexicon.language.joints
    is_what = np.array([what is not None for what, _ in parts], dtype=bool)
    is_where = np.array([where is not None and where.place in places for _, where in parts], dtype=bool)
    left, right = _top(scores, is_what, BEST_WHAT), _top(scores, is_where, BEST_WHERE)
    if not left or not right:
        return None
    what, where = (sp.csr_array(search.candidates.values(neuron, terms)) for terms in (left, right))
    weights, seen = (of_all[search.data.tokens(neuron)] for of_all in (search.data.weights, search.data.seen))
    squared = what.multiply(what).tocsr(), where.multiply(where).tocsr()
    variances = _products(*squared, weights) - _products(what, where, weights) ** 2
    pairs = [(parts[i][0], parts[j][1]) for i in left for j in right]
    return _Joints(what, where, pairs, _scale(variances, _products(*squared, seen), JOINT_SHRINK))


def _top(scores: Float[np.ndarray, " t"], among: Bool[np.ndarray, " t"], n: int) -> list[int]:
    """The `n` highest scores above 0 among some terms."""
    order = np.argsort(-np.where(among, scores, 0), kind="stable")[:n]
    return [int(place) for place in order if among[place] and scores[place] > 0]

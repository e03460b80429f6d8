"""Sanity tests of measures by Oikarinen et al. 2025 (arXiv 2506.05774): a right explanation, spoilt, must score less.

A right explanation names exactly the tokens on which a neuron is active. *Missing labels*: half of these, at random,
are left out of it. *Extra labels*: as many other tokens of the text, at random, are added to it. A measure that does
not fall says nothing about explanations that are too narrow, or too broad.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from cratescope.explain.protocols import Protocol
from cratescope.neurons.records import NeuronRecord
from cratescope.score.measures import ACTIVE, WEIGHERS, look_at_words, measure
from cratescope.score.words import Words, WordsOf

FALL = 0.001
"""A score has fallen when it is lower by more than this (the source's epsilon)."""
PASS = 0.9
"""Fraction of the neurons whose score has to fall, in each test (the source's)."""


@dataclass(frozen=True)
class Verdict:
    """The fraction of `n_neurons` on which a measure fell, on the windows of a protocol."""

    sample: str
    measure: str
    missing: float
    extra: float
    n_neurons: int

    @property
    def passes(self) -> bool:
        return self.n_neurons > 0 and min(self.missing, self.extra) > PASS

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"passes": self.passes}


@dataclass(frozen=True)
class Case:
    """A neuron on the tokens that are scored.

    labels: those that the right explanation names. rate: the fraction of all text that it names. words: of the
    tokens, where a measure looks at them.
    """

    truth: Float[np.ndarray, " n"]
    labels: Bool[np.ndarray, " n"]
    rate: float
    words: Words | None = None

    def missing(self, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
        return self.labels & (rng.random(len(self.labels)) < 0.5)

    def extra(self, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
        """Labels that double the named text: an unnamed token is added with probability rate / (1 - rate)."""
        return self.labels | (rng.random(len(self.labels)) < self.rate / (1 - self.rate))


def verdict(sample: str, name: str, cases: Sequence[Case], seed: int = 0) -> Verdict:
    """Both tests of MEASURES[name]; a neuron on which the right explanation itself has no score is left out."""
    fallen = []
    for number, case in enumerate(cases):
        rng = np.random.default_rng([seed, number])
        right, *spoilt = (
            measure(name, case.truth, labels.astype(np.float64), case.words)
            for labels in (case.labels, case.missing(rng), case.extra(rng))
        )
        if right is not None:
            # An explanation that no longer names anything scores nothing.
            fallen.append([(0.0 if value is None else value) < right - FALL for value in spoilt])
    missing, extra = np.mean(fallen, axis=0).tolist() if fallen else (0.0, 0.0)
    return Verdict(sample, name, missing, extra, len(fallen))


def on_records(
    protocols: Iterable[Protocol], records: Sequence[NeuronRecord], words: WordsOf | None = None
) -> list[Verdict]:
    """Every measure of every protocol on real neurons; the right explanation names their highest 1 % of all tokens.

    words: of a protocol's scored tokens; without it, measures that look at words are passed over.
    """
    found = []
    for protocol in protocols:
        cases = [case for record in records if (case := _case(protocol, record, words)) is not None]
        names = [name for name in protocol.measures if words or name not in WEIGHERS]
        found += [verdict(protocol.name, name, cases) for name in names]
    return found


def _case(protocol: Protocol, record: NeuronRecord, words: WordsOf | None) -> Case | None:
    """None for a neuron that is dead, has no histogram, or no active token among the protocol's windows."""
    windows = protocol.windows(record)
    if record.dead or record.histogram is None or not windows:
        return None
    above = np.cumsum(record.histogram.count[::-1])[::-1]
    threshold = record.histogram.low[np.argmax(above <= max(ACTIVE * above[0], above[-1]))]
    truth = np.concatenate([window.activations for window in windows]).astype(np.float64)
    labels = (truth >= threshold) & (truth > 0)
    rate = float(above[record.histogram.low >= max(threshold, 0)].max(initial=0) / above[0])
    if not labels.any() or rate >= 0.5:
        return None
    read = words(protocol, record) if words and look_at_words(protocol.measures) else None
    return Case(truth, labels, rate, read)

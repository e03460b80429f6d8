"""The explainer `selected`: of the explanations that others gave, the one that predicts a neuron best."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cratescope.errors import UserError
from cratescope.explain.config import SELECTED, SIMULATORS, ExplainConfig, SimulateConfig
from cratescope.explain.explained import Explained, Explanation
from cratescope.explain.protocols import PROTOCOLS, ExplanationSet
from cratescope.explain.simulators import Simulator, UnreadableError, simulator_named
from cratescope.explain.terms.selection import Selected, selected
from cratescope.llm.interface import LanguageModel, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.neurons.records import NeuronRecord
from cratescope.neurons.sample import DEAD, UNDECODABLE, undecodable
from cratescope.run import Run
from cratescope.text.tokenizer import vocabulary_strings

VERSION = 1
"""Of how one is selected: raise it when the same candidates and records give another."""
NONE = "no explanation to select from"
UNRELATED = "no candidate predicts anything of it"


class Selects:
    """Candidates of a neuron are its own explanations by `among`, then those of other neurons of its layer.

    The one whose simulation correlates best with the neuron on the windows of `terms.selection` is taken, on tokens
    that no protocol shows or scores. The first of equally good ones wins.
    """

    batch = 16

    def __init__(self, config: ExplainConfig, run: Run, site: str, llm: LanguageModel | None) -> None:
        self._among, self._others = config.selected.among, config.selected.others
        self._run, self._site, self._llm = run, site, llm
        self._told: tuple[tuple[str, int] | None, dict[str, dict[int, Explanation]]] = (None, {})
        self._by = SimulateConfig(
            run.root, simulator=config.selected.select, llm=config.llm, language=config.terms.language
        )
        self._vocabulary = vocabulary_strings(run.tokenizer)

    def made_with(self, chosen: ExplanationSet) -> dict[str, Any]:
        """Also what the candidates were made with."""
        name = self._by.simulator
        asked = {} if SIMULATORS[name].needs == "nothing" else llm_identity(self._by.llm, self._llm)
        options = {"among": list(self._among), "others": self._others, "select": name, "selected_version": VERSION}
        candidates = []
        for among in self._among:
            explained = self._of(among, chosen)
            if not explained.explanations.layers:
                raise UserError(
                    f"--among {among}: {explained.explanations.folder} has no explanations; run `cratescope explain` "
                    "by it with the same --protocols first, or leave it out"
                )
            candidates.append(explained.identity())
        return options | {"candidates": candidates} | asked | simulator_named(name).made_with(self._by)

    def explained(
        self, chosen: ExplanationSet, records: Sequence[NeuronRecord]
    ) -> list[tuple[Explanation, UserError | None]]:
        """Of neurons of one layer. Raises UserError when one of the explainers has explained too few of it."""
        told = self._layer(chosen, records[0].neuron.layer)
        return [(self._best(record, self._candidates(told, record)), None) for record in records]

    def _of(self, explainer: str, chosen: ExplanationSet) -> Explained:
        return Explained(self._run, self._site, explainer, chosen.name)

    def _layer(self, chosen: ExplanationSet, layer: int) -> dict[str, dict[int, Explanation]]:
        """By explainer, what it says of each neuron, in the order in which they were drawn; the last layer is kept."""
        if self._told[0] != (chosen.name, layer):
            told = {}
            for name in self._among:
                of_layer = self._of(name, chosen).layers().get(layer, [])
                told[name] = {one.explanation.neuron.index: one.explanation for one in of_layer}
            self._told = (chosen.name, layer), told
            self._simulator.plan([one.text for by_index in told.values() for one in by_index.values() if one.text])
        return self._told[1]

    def _candidates(self, told: dict[str, dict[int, Explanation]], record: NeuronRecord) -> list[Explanation]:
        """The neuron's own ones first, in the order of `among`."""
        layer, index = record.neuron.layer, record.neuron.index
        for name, by_index in told.items():
            if index not in by_index or len(by_index) <= self._others:
                raise UserError(
                    f"--among {name}: it has explained {len(by_index)} neurons of layer {layer}; it needs "
                    f"{self._others + 1} or more, neuron {index} among them: run `cratescope explain` by it for more "
                    "--neurons or --layers, or give fewer of --neurons, --layers or --others here"
                )
        others = [one for by_index in told.values() for one in [*by_index.values()][: self._others]]
        own = [by_index[index] for by_index in told.values()]
        return [one for one in (*own, *(other for other in others if other not in own)) if one.text]

    @functools.cached_property
    def _simulator(self) -> Simulator:
        kind = simulator_named(self._by.simulator)
        return kind.open(self._by, self._vocabulary, lambda: self._llm or open_llm(self._by.llm))

    def _best(self, record: NeuronRecord, candidates: Sequence[Explanation]) -> Explanation:
        windows = [] if record.dead else selected(record, [*PROTOCOLS.values()])
        reason = DEAD if record.dead else NONE if not candidates else None
        if undecodable([one.window for one in windows], len(self._vocabulary)):
            reason = UNDECODABLE
        if reason:
            return Explanation(record.neuron, "", SELECTED, "", reason)
        values = [(value, one) for value, one in self._values(candidates, windows) if np.isfinite(value)]
        if not values:
            return Explanation(record.neuron, "", SELECTED, "", UNRELATED)
        _, best = max(values, key=lambda one: one[0])
        source = "own" if best.neuron == record.neuron else f"of neuron {best.neuron.index}"
        return Explanation(record.neuron, best.text, SELECTED, f"{best.explainer}, {source}")

    def _values(
        self, candidates: Sequence[Explanation], windows: Sequence[Selected]
    ) -> Iterator[tuple[float, Explanation]]:
        """The correlation of each candidate that can be simulated; equal texts are simulated once."""
        weights = np.concatenate([one.weights for one in windows])
        truth = np.concatenate([one.window.activations for one in windows]).astype(np.float64)
        different: dict[str, Explanation] = {}
        for one in candidates:
            different.setdefault(one.text, one)
        for candidate in different.values():
            try:
                rows = self._simulator(candidate.text, [one.window for one in windows])
            except (UnreadableError, RefusedError):
                continue
            yield correlation(truth, np.concatenate(rows).astype(np.float64), weights), candidate


def correlation(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Pearson's, with weights; NaN for a side that is constant where there are weights, or has no value there."""
    share = weights / weights.sum() if weights.any() else weights
    both = np.stack([truth, simulated])
    centred = both - (share * both).sum(1, keepdims=True)
    variances, squares = ((share * sides**2).sum(1) for sides in (centred, both))
    if (variances <= 1e-12 * squares).any():
        return float("nan")
    return float((share * centred.prod(0)).sum() / np.sqrt(variances.prod()))

"""The scores of one run at one site, looked up by protocol, measure and control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from cratescope.explain.controls import CONTROLS, OWN
from cratescope.explain.protocols import PROTOCOLS
from cratescope.neurons.records import NeuronId
from cratescope.neurons.sample import DEAD
from cratescope.results.estimates import NOTHING, Estimate, gains, of_layer, of_model
from cratescope.score.scores import Score

JUDGED = ("accuracy", "auroc")
"""Measures of judgements, the scorers' own first."""


def measures_of(protocol: str) -> tuple[str, ...]:
    """A protocol's measures, its own first; those of a scorer for anything else."""
    return PROTOCOLS[protocol].measures if protocol in PROTOCOLS else JUDGED


class Scores:
    """Rows of `score`, and every mean that is taken of them.

    A key is (protocol, measure, control); a protocol belongs to one explanation set.
    """

    def __init__(self, rows: Iterable[Score]) -> None:
        self._rows: dict[tuple[str, str, str], dict[int, dict[int, Score]]] = {}
        self._sets: dict[str, str] = {}
        for row in rows:
            key = row.protocol, row.measure, row.control
            self._rows.setdefault(key, {}).setdefault(row.neuron.layer, {})[row.neuron.index] = row
            self._sets[row.protocol] = row.set
        self._means: dict[tuple[str, ...], Estimate] = {}

    @cached_property
    def protocols(self) -> list[str]:
        """In the order of docs/evaluation.md; scorers come after protocols."""
        return sorted(self._sets, key=lambda name: ([*PROTOCOLS, name].index(name), name))

    @cached_property
    def layers(self) -> list[int]:
        return sorted({layer for found in self._rows.values() for layer in found})

    @cached_property
    def sets(self) -> list[str]:
        """The explanation sets, in the order of their protocols."""
        return list(dict.fromkeys(self._sets[name] for name in self.protocols))

    def set_of(self, protocol: str) -> str:
        """The explanation set that a protocol scores."""
        return self._sets[protocol]

    def measures(self, protocol: str) -> list[str]:
        """The measures there are of a protocol, its own first."""
        return [name for name in measures_of(protocol) if (protocol, name, OWN) in self._rows]

    def rows(self, protocol: str, measure: str | None = None, control: str = OWN) -> dict[int, dict[int, Score]]:
        """Scores by layer and neuron index; `measure` is the protocol's own unless given."""
        return self._rows.get((protocol, measure or measures_of(protocol)[0], control), {})

    def of(self, neuron: NeuronId, protocol: str, control: str = OWN, measure: str | None = None) -> Score | None:
        return self.rows(protocol, measure, control).get(neuron.layer, {}).get(neuron.index)

    def every(self, neuron: NeuronId) -> list[Score]:
        """All rows of one neuron."""
        found = (rows.get(neuron.layer, {}).get(neuron.index) for rows in self._rows.values())
        return [row for row in found if row is not None]

    def values(
        self, protocol: str, measure: str | None = None, control: str = OWN, over: str | None = None
    ) -> dict[int, dict[int, float]]:
        """Values of neurons that have one, by layer and index; `over`: their gains over that control."""
        found = {
            layer: {index: row.value for index, row in rows.items() if row.value is not None}
            for layer, rows in self.rows(protocol, measure, control).items()
        }
        found = {layer: found.get(layer, {}) for layer in sorted(self.rows(protocol, measure))}
        return gains(found, self.values(protocol, measure, over)) if over else found

    def mean(
        self,
        protocol: str,
        measure: str | None = None,
        control: str = OWN,
        over: str | None = None,
        layer: int | None = None,
    ) -> Estimate:
        """The mean of `values` in a layer, or over layers; the interval only of the own explanation's score."""
        key = (protocol, measure or "", control, over or "", str(layer))
        if key not in self._means:
            values, bounds = self.values(protocol, measure, control, over), control == OWN and over is None
            if layer is None:
                self._means[key] = of_model(values, bounds) if values else NOTHING
            else:
                self._means[key] = of_layer(values[layer], bounds) if layer in values else NOTHING
        return self._means[key]

    def controls(self, protocol: str, measure: str | None = None) -> list[str]:
        """Controls of which any neuron has a value."""
        return [name for name in CONTROLS if any(self.values(protocol, measure, name).values())]

    def reasons(self, protocol: str, layer: int, measure: str | None = None) -> Counter[str]:
        """Why neurons of a layer have no score, dead ones included, and how many for each reason."""
        rows = self.rows(protocol, measure).get(layer, {}).values()
        return Counter(str(row.reason) for row in rows if row.value is None)

    def counts(self, protocol: str, layer: int | None, measure: str | None = None) -> dict[str, int]:
        """Neurons scored, without a score, dead among these, and all; of a layer or of all layers."""
        rows = self.rows(protocol, measure)
        layers = sorted(rows) if layer is None else [layer]
        reasons = sum((self.reasons(protocol, one, measure) for one in layers), Counter[str]())
        every = sum(len(rows.get(one, {})) for one in layers)
        missing = reasons.total()
        return {"n_scored": every - missing, "n_none": missing, "n_dead": reasons[DEAD], "n_neurons": every}

    def ranking(self, protocol: str, layer: int) -> list[int]:
        """Neuron indices of a layer that have a score, best first; equal scores in index order."""
        values = self.values(protocol).get(layer, {})
        return sorted(values, key=lambda index: (-values[index], index))

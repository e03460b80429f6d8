"""Everything known of one neuron, put together from the files of every stage: what cards, pages and notebooks show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import RenderableType

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS
from cratescope.explain.controls import CONTROLS, OWN
from cratescope.explain.explained import Explained, Explanation, Judgement, Simulation
from cratescope.explain.protocols import ON_UNIFORM_TEXT
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import NeuronId, NeuronRecord, layer_file, read_records
from cratescope.neurons.sample import find_site, record_files
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.scores import Score

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Said:
    """What a neuron was said to find by one explanation set, and how well that predicts it.

    simulation: None before `simulate`. judgements: by scorer, one per control.
    scores: this neuron's rows of this set only.
    """

    set: str
    explanation: Explanation | None
    simulation: Simulation | None
    judgements: dict[str, list[Judgement]]
    scores: Scores

    @property
    def text(self) -> str:
        """The explanation; empty where there is none."""
        return self.explanation.text if self.explanation else ""

    @property
    def shown(self) -> str:
        """The explanation, or why there is none."""
        return self.text or f"no explanation: {self.explanation.skipped if self.explanation else 'not asked for'}"

    def scored(self, neuron: NeuronId) -> Iterator[tuple[Score, dict[str, Score]]]:
        """By each protocol's own measure: the score, and those of the controls there are."""
        for protocol in self.scores.protocols:
            own = self.scores.of(neuron, protocol)
            if own is not None:
                rows = {control: self.scores.of(neuron, protocol, control) for control in CONTROLS}
                yield own, {control: row for control, row in rows.items() if row is not None}

    def beside(self, own: Score) -> list[Score]:
        """By the measures ON_UNIFORM_TEXT of the protocol of `own`; not those that are missing for the same reason."""
        rows = (self.scores.of(own.neuron, own.protocol, measure=measure) for measure in ON_UNIFORM_TEXT)
        return [row for row in rows if row is not None and (row.value is not None or row.reason != own.reason)]


@dataclass(frozen=True, eq=False)
class Neuron:
    """Everything known of one neuron at one site of one run.

    site: the name of its folder of records. said: by explanation set, in the order of the sets' names.
    explainer, simulator: whose explanations and simulations these are.
    """

    run: Run
    site: str
    record: NeuronRecord
    explainer: str
    simulator: str
    said: dict[str, Said]

    @property
    def id(self) -> NeuronId:
        return self.record.neuron

    @property
    def text(self) -> str:
        """The first explanation there is; empty when there is none."""
        return next((said.text for said in self.said.values() if said.text), "")

    def score(self, protocol: str, control: str = OWN, measure: str | None = None) -> float | None:
        """A score (plain, not x100) by the protocol's own measure or another; None where there is none."""
        for said in self.said.values():
            if row := said.scores.of(self.id, protocol, control, measure):
                return row.value
        return None

    def __repr__(self) -> str:
        return f"<Neuron {self.id.index} of layer {self.id.layer}, {self.site} of {self.run.name}>"

    def __rich__(self) -> RenderableType:
        from cratescope.report.card import card

        return card(self)

    def __str__(self) -> str:
        from cratescope.report.card import card_text

        return card_text(self)

    def _repr_html_(self) -> str:
        from cratescope.report.html import card_html

        return card_html(self)


def read_neuron(run: Run, layer: int, index: int, **options: Any) -> Neuron:
    """One neuron; options as of `read_neurons`."""
    return read_neurons(run, layer, [index], **options)[0]


def read_neurons(
    run: Run,
    layer: int,
    indices: Sequence[int] | None = None,
    site: str = "auto",
    explainer: str = "offline",
    simulator: str = "list-pmi",
    scores: Scores | None = None,
) -> list[Neuron]:
    """Neurons of one layer, in the order of `indices`; all of them unless given.

    scores: those of this site, explainer and simulator where they have been read already.

    Raises:
        UserError: no records, no such site, layer or neuron; or a file is damaged.
    """
    site = find_site(run, site)
    files = record_files(run.records(site))
    if layer not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"layer {layer}: no such layer; {run.records(site)} has layers {known}")
    records = read_records(files[layer], indices)
    if scores is None:
        scores = Scores.read(run.scores(site, explainer, simulator), [layer], indices)
    ids = [record.neuron for record in records.values()]
    said: dict[NeuronId, dict[str, Said]] = {neuron: {} for neuron in ids}
    names = {*(one.set for one in Explained.every(run, site, explainer)), *scores.sets}
    for explained in (Explained(run, site, explainer, name) for name in sorted(names)):
        for neuron, one in _said(explained, simulator, ids, scores).items():
            said[neuron][explained.set] = one
    return [Neuron(run, site, record, explainer, simulator, said[record.neuron]) for record in records.values()]


def _said(explained: Explained, simulator: str, ids: Sequence[NeuronId], scores: Scores) -> dict[NeuronId, Said]:
    """What an explanation set says of each neuron; those it says nothing of are left out."""
    told = _read(explained.explanations, ids)
    simulated = _simulations(explained.simulations(simulator), ids)
    judged_by = {scorer: _read(explained.judgements(scorer), ids) for scorer in SCORERS}
    said = {}
    for neuron in ids:
        rows = [row for row in scores.every(neuron) if row.set == explained.set]
        judged = {scorer: items[neuron] for scorer, items in judged_by.items() if neuron in items}
        one = Said(explained.set, told.get(neuron), simulated.get(neuron), judged, Scores(rows))
        if one.explanation or one.simulation or judged or rows:
            said[neuron] = one
    return said


def _read(kept: Kept[Item], ids: Sequence[NeuronId]) -> dict[NeuronId, Item]:
    """What a stage keeps of these neurons of one layer."""
    found = kept.read(ids[0].layer, [neuron.index for neuron in ids]) if ids else {}
    return {neuron: found[neuron.index] for neuron in ids if neuron.index in found}


def _simulations(kept: Kept[Simulation], ids: Sequence[NeuronId]) -> dict[NeuronId, Simulation]:
    found = _read(kept, ids)
    for neuron, one in found.items():
        if any(len(row) != key[-1] for row, key in zip(one.expected.get(OWN, ()), one.keys, strict=False)):
            path = layer_file(kept.folder, neuron.layer)
            raise UserError(
                f"{path}: neuron {neuron.index} has more or fewer values than tokens; delete the file and run "
                "`cratescope simulate` again"
            )
    return found

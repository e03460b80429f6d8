"""Everything known of one neuron, put together from the files of every stage: what cards, pages and notebooks show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import RenderableType

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS
from cratescope.explain.controls import CONTROLS, OWN
from cratescope.explain.explained import Explained, Explanation, Judgement, Simulation
from cratescope.explain.protocols import ON_UNIFORM_TEXT
from cratescope.files import slug
from cratescope.neurons.effects import Effects, kept_effects
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import NeuronId, NeuronRecord, layer_file, read_records
from cratescope.neurons.sample import find_site, record_files
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.scores import Score

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Said:
    """What an explainer said of a neuron from one explanation set, and how well a simulator predicts it by that.

    explainer, simulator: as their folders are named; no simulator before `simulate`.
    simulation: None before `simulate`. judgements: by scorer, one per control.
    scores: this neuron's rows of this explainer, set and simulator only.
    """

    explainer: str
    set: str
    simulator: str
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


def source_of(said: Said, among: Sequence[Said]) -> str:
    """What tells an explanation from the others `among` which it is shown, such as "by offline, from top"."""
    explainers = {one.explainer for one in among}
    words = [f"by {said.explainer}"] if len(explainers) > 1 else []
    words += [f"from {said.set}"] if len({one.set for one in among}) > 1 else []
    # Where each explainer has a simulator of its own, that needs no words.
    if said.simulator and len({(one.explainer, one.simulator) for one in among}) > len(explainers):
        words.append(f"simulated by {said.simulator}")
    return ", ".join(words)


@dataclass(frozen=True, eq=False)
class Neuron:
    """Everything known of one neuron at one site of one run.

    site: the name of its folder of records. said: in the order of explainers, simulators and explanation sets.
    effects: None before `effects`.
    """

    run: Run
    site: str
    record: NeuronRecord
    said: tuple[Said, ...]
    effects: Effects | None = None

    @property
    def id(self) -> NeuronId:
        return self.record.neuron

    @property
    def text(self) -> str:
        """The first explanation there is; empty when there is none."""
        return next((said.text for said in self.said if said.text), "")

    def score(self, protocol: str, control: str = OWN, measure: str | None = None) -> float | None:
        """The first score there is (plain, not x100) by the protocol's own measure or another; None without one.

        Those of one explainer or simulator are in `said`, or in a neuron that was read for these alone.
        """
        for said in self.said:
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


def read_neurons(
    run: Run,
    layer: int,
    indices: Sequence[int] | None = None,
    site: str = "auto",
    explainer: str | None = None,
    simulator: str | None = None,
) -> list[Neuron]:
    """Neurons of one layer, in the order of `indices`; all of them unless given. Errors as of `Run.neuron`.

    explainer, simulator: what is said by these alone; by all there are, unless given.
    """
    site = find_site(run, site)
    files = record_files(run.records(site))
    if layer not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"layer {layer}: no such layer; {run.records(site)} has layers {known}")
    records = read_records(files[layer], indices)
    ids = [record.neuron for record in records.values()]
    said: dict[NeuronId, list[Said]] = {neuron: [] for neuron in ids}
    for names in _sources(run, site, explainer, simulator) if ids else ():
        for neuron, one in _said(run, site, names, ids):
            said[neuron].append(one)
    done = _read(kept_effects(run.effects(site)), ids)
    return [Neuron(run, site, one, tuple(said[one.neuron]), done.get(one.neuron)) for one in records.values()]


def _sources(run: Run, site: str, explainer: str | None, simulator: str | None) -> list[tuple[str, str]]:
    """Explainers and simulators that there is something of; one without a name where nothing was simulated."""

    def folders(stage: str, *names: str) -> set[str]:
        return {path.name for path in run.root.joinpath(stage, slug(site), *names).glob("*") if path.is_dir()}

    stages = ("explanations", "simulations", "judgements", "scores")
    explainers = set().union(*map(folders, stages)) if explainer is None else {slug(explainer)}
    return [
        (name, other)
        for name in sorted(explainers)
        for other in ([simulator] if simulator else sorted(folders("simulations", name) | folders("scores", name)))
        or [""]
    ]


def _said(run: Run, site: str, names: tuple[str, str], ids: Sequence[NeuronId]) -> Iterator[tuple[NeuronId, Said]]:
    """What an explainer says of each neuron of a layer, by explanation set, and a simulator predicts by it."""
    explainer, simulator = names
    folder, indices = run.scores(site, explainer, simulator), [neuron.index for neuron in ids]
    scores = Scores.read(folder, [ids[0].layer], indices) if simulator else Scores()
    sets = {*(one.set for one in Explained.every(run, site, explainer)), *scores.sets}
    for explained in (Explained(run, site, explainer, name) for name in sorted(sets)):
        told = _read(explained.explanations, ids)
        simulated = _simulations(explained.simulations(simulator), ids) if simulator else {}
        judged_by = {scorer: _read(explained.judgements(scorer), ids) for scorer in SCORERS}
        for neuron in ids:
            rows = [row for row in scores.every(neuron) if row.set == explained.set]
            judged = {scorer: items[neuron] for scorer, items in judged_by.items() if neuron in items}
            about = told.get(neuron), simulated.get(neuron), judged
            if any(about) or rows:
                yield neuron, Said(explainer, explained.set, simulator, *about, Scores(rows))


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

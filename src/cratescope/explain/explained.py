"""Explanations, simulations and judgements, the tables they are kept in (docs/records.md), and where these are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cratescope.errors import UserError
from cratescope.explain.controls import shuffled_texts
from cratescope.explain.protocols import ExplanationSet
from cratescope.files import slug
from cratescope.neurons.kept import Kept, item_of, neuron_id, row_of, schema
from cratescope.neurons.records import NeuronId, layer_file
from cratescope.neurons.sample import check_identity, draw_neurons, records_identity
from cratescope.parts import Row, Tables
from cratescope.run import Run


@dataclass(frozen=True)
class Explanation:
    """One phrase that says what a neuron finds; `prompt` names the prompt that asked for it.

    skipped: why `text` is empty, such as "dead neuron"; None when there is a text.
    """

    neuron: NeuronId
    text: str
    explainer: str
    prompt: str
    skipped: str | None = None


@dataclass(frozen=True)
class Simulation:
    """Activations predicted from a text alone, by control: a row for each window of `keys`.

    texts: what each control was simulated from. "own" is the neuron's own explanation, "shuffled" another neuron's,
    "empty" a sentence that says nothing, "unigram" no text at all (its strongest tokens stand there): the mean
    activation of each token in the windows explained from. A control that the neuron cannot have is missing.
    expected: one list of numbers a window, one a token, on the simulator's own scale (a correlation does not mind).
    skipped: why there is nothing, such as "dead neuron".
    """

    neuron: NeuronId
    simulator: str
    texts: dict[str, str]
    keys: tuple[tuple[int, int, int], ...]
    expected: dict[str, tuple[tuple[float, ...], ...]]
    skipped: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What an LLM answered about windows: for each the probability that it is the right one, and whether it is.

    control: as in Simulation. Where a question shows several windows at a time, as "intruder" does, they come in groups
    with one true label each, and the probabilities of a group add up to 1.
    """

    neuron: NeuronId
    scorer: str
    control: str
    text: str
    probabilities: tuple[float, ...]
    labels: tuple[bool, ...]
    skipped: str | None = None


_KEY = pa.struct([("excerpt", pa.int32()), ("start", pa.int32()), ("width", pa.int32())])
_NUMBERS = pa.list_(pa.float64())
_EXPLANATION = schema("text", "explainer", "prompt", "skipped")
_SIMULATION = schema(
    "simulator", "control", "text", ("windows", pa.list_(_KEY)), ("simulated", pa.list_(_NUMBERS)), "skipped"
)
_JUDGEMENT = schema(
    "scorer", "control", "text", ("probabilities", _NUMBERS), ("labels", pa.list_(pa.bool_())), "skipped"
)


def explanations(folder: Path) -> Kept[Explanation]:
    """One row per neuron."""
    return Kept(
        Tables(folder, _EXPLANATION, "explain"), lambda item: [row_of(item)], lambda rows: item_of(Explanation, rows[0])
    )


def simulations(folder: Path) -> Kept[Simulation]:
    """One row per neuron and control; a neuron that nothing was simulated for has one without a control."""
    return Kept(Tables(folder, _SIMULATION, "simulate", ("index", "control")), _simulation_rows, _simulation)


def _simulation_rows(item: Simulation) -> list[Row]:
    windows = [{"excerpt": excerpt, "start": start, "width": width} for excerpt, start, width in item.keys]
    about = vars(item.neuron) | {"simulator": item.simulator, "skipped": item.skipped, "windows": windows}
    return [
        about | {"control": control, "text": text, "simulated": item.expected.get(control)}
        for control, text in item.texts.items()
    ] or [about | {"control": None, "text": None, "simulated": None}]


def _simulation(rows: list[Row]) -> Simulation:
    first = rows[0]
    keys = tuple((key["excerpt"], key["start"], key["width"]) for key in first["windows"])
    told = [row for row in rows if row["control"] is not None]
    return Simulation(
        neuron_id(first),
        first["simulator"],
        {row["control"]: row["text"] for row in told},
        keys,
        {row["control"]: tuple(map(tuple, row["simulated"])) for row in told if row["simulated"] is not None},
        first["skipped"],
    )


def judgements(folder: Path) -> Kept[list[Judgement]]:
    """One row per neuron and control."""
    return Kept(
        Tables(folder, _JUDGEMENT, "judge", ("index", "control")),
        lambda items: [row_of(item) for item in items],
        lambda rows: [
            item_of(Judgement, row | {name: tuple(row[name]) for name in ("probabilities", "labels")}) for row in rows
        ],
    )


class Told(NamedTuple):
    """A neuron's explanation, and the other neuron's text that it is compared with; empty where there is none."""

    explanation: Explanation
    other: str


@dataclass(frozen=True)
class Explained:
    """All that was made from one explanation set of one explainer, for the neurons of one site of a run.

    site: the name of its folder of records. set: the name of the explanation set.
    """

    run: Run
    site: str
    explainer: str
    set: str

    @classmethod
    def every(cls, run: Run, site: str, explainer: str) -> list[Explained]:
        """Every explanation set that there are explanations of, by name."""
        paths = cls(run, site, explainer, "*").explanations.folder.parent.glob("*")
        return [cls(run, site, explainer, path.name) for path in sorted(paths) if path.is_dir()]

    @property
    def explanations(self) -> Kept[Explanation]:
        return explanations(self._folder("explanations"))

    def simulations(self, simulator: str) -> Kept[Simulation]:
        return simulations(self._folder("simulations", simulator))

    def judgements(self, scorer: str) -> Kept[list[Judgement]]:
        return judgements(self._folder("judgements", scorer))

    def _folder(self, stage: str, *by: str) -> Path:
        names = self.site, self.explainer, *by
        return self.run.root.joinpath(stage, *map(slug, names), self.set)

    @property
    def origin(self) -> dict[str, Any]:
        """What everything here has to be made from: the run's weights and records."""
        return records_identity(self.run, self.site)

    def identity(self) -> dict[str, Any]:
        """What the explanations were made with. Raises UserError when they belong to another model or records."""
        return check_identity(self.explanations.folder, self.origin)

    def turns(self) -> frozenset[int]:
        """Which of the set's windows the texts were written from: `ExplanationSet.again` of each. Errors as `identity`.

        One, unless these were selected from candidates.
        """
        identity = self.identity()
        return frozenset(one.get("windows", 0) for one in identity.get("candidates", [identity]))

    def shown(self, chosen: ExplanationSet) -> ExplanationSet:
        """The set's windows as the explainer was shown them. Errors as of `identity`."""
        return chosen.again(self.identity().get("windows", 0))

    def layers(self) -> dict[int, list[Told]]:
        """Every layer's explanations in the order of the draw. UserError: there are none, or of another model."""
        found = {layer: kept for layer in self.explanations.layers if (kept := self.explanations.read(layer))}
        if not found:
            raise UserError(
                f"{self.explanations.folder}: no explanations; run `cratescope explain` with the same --protocols "
                "first, or name another --explainer"
            )
        seed, layers = self.identity()["neuron_seed"], {}
        for layer, by_index in found.items():
            drawn = draw_neurons(layer_file(self.run.records(self.site), layer), seed, layer)
            items = [by_index[index] for index in drawn if index in by_index]
            others = shuffled_texts([item.text for item in items])
            layers[layer] = [Told(*pair) for pair in zip(items, others, strict=True)]
        return layers

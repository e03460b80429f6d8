"""Predict a neuron's activations from a text alone: its explanation, and controls that say what a score is worth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.explain.config import SIMULATORS, SimulateConfig
from cratescope.explain.controls import EVERY, OWN, SIMULATED, Material, planned, texts_of, token_means
from cratescope.explain.explained import Explained, Simulation, Told
from cratescope.explain.protocols import ExplanationSet, Protocol, protocols_named, scoring_windows, sources
from cratescope.explain.simulators import Simulator, UnreadableError, simulator_named
from cratescope.explain.waiting import ENOUGH, keeping
from cratescope.files import read_json, write_json
from cratescope.llm.answers import REFUSED
from cratescope.llm.interface import LanguageModel, RefusedError
from cratescope.llm.open import llm_identity, open_llm
from cratescope.locks import locked
from cratescope.neurons.kept import Kept
from cratescope.neurons.records import AT_ONCE, NeuronId, NeuronRecord, Window, layer_file
from cratescope.neurons.sample import UNDECODABLE, find_site, undecodable, with_records
from cratescope.progress import progress
from cratescope.run import Run, claim
from cratescope.text.tokenizer import vocabulary_strings
from cratescope.workers import share

DECIMALS = 4
UNREAD = "a slot without a value"
UNREADABLE = "not read by the simulator: "


def simulate(config: SimulateConfig, llm: LanguageModel | None = None) -> list[Path]:
    """Write simulations of every explained neuron and return the folder of each explanation set.

    A neuron without an explanation has the controls that need none. What is finished is kept; a neuron is simulated
    again when its texts are no longer the planned ones (more neurons were explained, so the shuffled control's
    partner may be another), or when a protocol asks for windows it does not have.

    Raises:
        UserError: no such site, protocol or explanations; or a folder holds simulations of something else.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    return [
        _simulate_set(config, Explained(run, site, config.explainer, chosen.name), chosen, protocols, llm)
        for chosen, protocols in protocols_named(config.protocols).items()
    ]


def _simulate_set(
    config: SimulateConfig,
    explained: Explained,
    chosen: ExplanationSet,
    protocols: Sequence[Protocol],
    llm: LanguageModel | None,
) -> Path:
    run, layers, kind = explained.run, explained.layers(), simulator_named(config.simulator)
    kept = explained.simulations(config.simulator)
    neurons = {layer: len(told[: config.neurons]) for layer, told in layers.items()}
    begin = functools.partial(_begin, kept.folder, _identity(config, explained, llm), neurons)
    vocabulary, shown = vocabulary_strings(run.tokenizer), explained.shown(chosen)
    open_simulator = functools.cache(lambda: kind.open(config, vocabulary, lambda: llm or open_llm(config.llm)))
    with keeping(kept, begin, ENOUGH, lambda item: bool(item.expected.keys() & SIMULATED)) as waiting:
        for layer, told in layers.items():
            mine = share(told[: config.neurons], config.worker, config.llm.llm_batch)
            path = layer_file(run.records(explained.site), layer)
            pending = _tasks(path, mine, shown, protocols, vocabulary, kept, layer)
            if (first := next(pending, None)) is None:
                continue
            simulator = open_simulator()
            _check_readable(simulator, config, told)
            simulator.plan(planned([Material(item.explanation.text, item.other) for item in told]))
            work = itertools.chain([first], pending)
            for task in progress(work, f"simulate {run.name} layer {layer}", len(mine)):
                simulated, refused = task.simulate(simulator, config.simulator)
                waiting.answered |= not refused and bool(task.texts.keys() & SIMULATED)
                waiting.add(simulated, refused)
    return kept.folder


def _check_readable(simulator: Simulator, config: SimulateConfig, told: Sequence[Told]) -> None:
    """Refuse explanations of which a simulator without a language model can read none: they are no fault of neurons."""
    texts = [item.explanation.text for item in told if item.explanation.text]
    if SIMULATORS[config.simulator].needs != "nothing" or not texts:
        return
    for text in texts:
        try:
            simulator(text, [])
        except UnreadableError as error:
            reason = error.reason
        else:
            return
    raise UserError(
        f"--simulator {config.simulator}: it can read none of the {len(texts)} explanations by {config.explainer} "
        f"({reason}); give --explainer {config.simulator}, or another --simulator"
    )


def _identity(config: SimulateConfig, explained: Explained, llm: LanguageModel | None) -> dict[str, Any]:
    """What decides simulations; the language model only for a simulator that needs one."""
    asked = {} if SIMULATORS[config.simulator].needs == "nothing" else llm_identity(config.llm, llm)
    explanations, made_with = explained.identity(), simulator_named(config.simulator).made_with(config)
    _check_language(explanations, made_with)
    return explained.origin | asked | {"explanations": explanations} | made_with


def _check_language(explanations: dict[str, Any], simulator: dict[str, Any]) -> None:
    """Refuse to read terms in another language than they were written in: a word may be of other classes there."""
    written, read = (one.get("language_sha256") for one in (explanations, simulator))
    if written and read and written != read:
        name = f"{explanations['language']} {explanations['language_version']} (sha256 {written[:12]})"
        raise UserError(
            f"--language: the explanations are in the language {name}, and this one is {simulator['language']} "
            f"{simulator['language_version']} (sha256 {read[:12]}); name the file that `cratescope explain` was given"
        )


def _tasks(
    path: Path,
    mine: Sequence[Told],
    chosen: ExplanationSet,
    protocols: Sequence[Protocol],
    vocabulary: Sequence[str],
    kept: Kept[Simulation],
    layer: int,
) -> Iterator[Task]:
    """What is left to do of a worker's share of a layer, whose records are at `path`."""
    by_index = {told.explanation.neuron.index: told for told in mine}
    chunks = [[*by_index][start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
    for chunk, records in with_records(path, chunks, 1, sources(chosen.protocols)):
        found = kept.read(layer, chunk)
        for index in chunk:
            task = Task.of(by_index[index], records[index], chosen, protocols, vocabulary, found.get(index))
            if not task.done:
                yield task


def _begin(folder: Path, identity: dict[str, Any], neurons: dict[int, int]) -> None:
    """Claim the folder, and write how many neurons are wanted: `score` tells a killed run from a small one by that."""
    claim(folder, identity)
    path = folder / "plan.json"
    with locked(folder, "plan", wait=True):
        before = read_json(path, {str: int}, "`cratescope simulate`") if path.exists() else {}
        wanted = before | {str(layer): max(n, before.get(str(layer), 0)) for layer, n in neurons.items()}
        if wanted != before:
            write_json(path, wanted)


@dataclass(frozen=True)
class Task:
    """What is to be kept of one neuron: `texts` by control, each simulated on `windows`. found: what is kept so far.

    possible: windows that other protocols of the same explanation set would score on; what is there of them is kept.
    """

    neuron: NeuronId
    material: Material
    texts: dict[str, str]
    windows: tuple[Window, ...]
    possible: tuple[Window, ...]
    skipped: str | None
    found: Simulation | None = None

    @classmethod
    def of(
        cls,
        told: Told,
        record: NeuronRecord,
        chosen: ExplanationSet,
        protocols: Sequence[Protocol],
        vocabulary: Sequence[str],
        found: Simulation | None = None,
    ) -> Task:
        neuron, text, skipped = told.explanation.neuron, told.explanation.text, told.explanation.skipped
        shown, windows = chosen.windows(record), tuple(scoring_windows(protocols, record))
        if undecodable((*shown, *windows), len(vocabulary)):
            skipped = UNDECODABLE
        if record.dead or skipped == UNDECODABLE:
            return cls(neuron, Material("", ""), {}, (), (), skipped, found)
        material = Material(text, told.other, token_means(shown), vocabulary)
        possible = tuple(scoring_windows(chosen.protocols, record))
        return cls(neuron, material, texts_of(material), windows, possible, skipped, found)

    @property
    def done(self) -> bool:
        found = self.found
        keys = {window.key for window in self.windows}
        return (
            found is not None
            and found.texts == self.texts
            and (found.skipped in (self.skipped, UNREAD) or str(found.skipped).startswith((REFUSED, UNREADABLE)))
            and keys <= {*found.keys}
        )

    def simulate(self, simulator: Simulator, name: str) -> tuple[Simulation, RefusedError | None]:
        """Also on the windows that are kept of other protocols, so that none of them loses its own.

        A control whose prompts a server refuses, or whose text the simulator cannot read, is missing; the refusal is
        returned when all of them are refused.
        """
        keys = {window.key for window in self.windows} | {*(self.found.keys if self.found else ())}
        windows = [window for window in self.possible if window.key in keys]
        expected, skipped, refused, answered = {}, self.skipped, None, False
        for control, text in self.texts.items():
            values = EVERY[control].values
            try:
                rows = [values(self.material, window) for window in windows] if values else simulator(text, windows)
            except RefusedError as error:
                skipped, refused = error.answers[0].reason, error
                continue
            except UnreadableError as error:
                # A control that is not in the simulator's language is missing, and no fault of the neuron.
                skipped = UNREADABLE + error.reason if control == OWN else skipped
                answered = True
                continue
            answered |= values is None
            if any(np.isnan(row).any() for row in rows):
                skipped = UNREAD
            else:
                expected[control] = _rounded(rows)
        keyed = tuple(window.key for window in windows)
        found = Simulation(self.neuron, name, self.texts, keyed, expected, skipped)
        return found, None if answered else refused


def _rounded(rows: Sequence[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    """Each different value is rounded once: there are few of them in most simulations."""
    values, place = np.unique(np.concatenate([*rows, np.zeros(0)]), return_inverse=True)
    rounded = iter(np.array([round(value, DECIMALS) for value in values.tolist()])[place].tolist())
    return tuple(tuple(itertools.islice(rounded, len(row))) for row in rows)

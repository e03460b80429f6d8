"""Compare simulations and judgements with the truth: one row per neuron, protocol, control and measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.config import ScoreConfig
from cratescope.neurons.explain import check_identity, find_site, records_identity
from cratescope.neurons.measures import bootstrap, is_constant, judged, measure
from cratescope.neurons.protocols import Protocol, protocols_named
from cratescope.neurons.quality import write_quality
from cratescope.neurons.records import (
    INTRUDER_GROUP,
    Explanation,
    Judgement,
    NeuronId,
    NeuronRecord,
    Score,
    Simulation,
    layer_file,
    neuron_file,
    read_explanations,
    read_judgements,
    read_records,
    read_simulations,
    write_scores,
)
from cratescope.neurons.sanity import on_records
from cratescope.run import Run, Shape, UserError, locked, made_from, read_json, sha256, write_json

OWN = "none"
"""The control that is none: a neuron's own explanation."""
CONTROLS = ("shuffled", "empty", "unigram")
SCORERS = ("detection", "fuzzing", "intruder")
CONSTANT_TRUTH = "constant truth"
NO_ACTIVE_TOKEN = "no active token"
CONSTANT_SIMULATION = "constant simulation"
NO_WINDOWS = "no windows to score"
ONE_ANSWER = "windows of one kind only"
VERSION = 1
"""Of how scores are computed: raise it when the same simulations score otherwise."""
SANITY_NEURONS = 64
"""At most so many neurons a layer in the sanity tests of the measures."""


ABOUT: Shape = {
    "explainer": str,
    "simulator": str,
    "site": str,
    "sanity": [{"sample": str, "measure": str, "n_neurons": int, "missing": float, "extra": float, "passes": bool}],
    "made_with": {str: {}},
    "made_from": {str: str},
    "scores_sha256": str,
}
"""scores.json: what the rows beside it were made with and from, and which measures pass the sanity tests."""


@dataclass(frozen=True)
class Simulated:
    """Explanations of one set and what was simulated from them."""

    explanations: dict[NeuronId, Explanation]
    simulations: dict[NeuronId, Simulation]
    folder: Path
    made_with: dict[str, Any]


def score(config: ScoreConfig) -> Path:
    """Write scores.jsonl, scores.json and the activation quality; return the folder. Scores are plain, not x100.

    scores.json says what the scores were made with and from, and which measures pass the sanity tests; means are
    taken by `cratescope.results`. Judgements by detection, fuzzing and intruder detection are scored too where there
    are any. Scores of the same files and settings are kept.

    Raises:
        UserError: an unknown protocol; simulations that are missing, unfinished, of another model or explanation, or
            that do not fit the records.
    """
    chosen = protocols_named(config.protocols)
    run = Run(config.run)
    site = find_site(run, config.site)
    folder = run.scores(site, config.explainer, config.simulator)
    inputs = _made_from(run, site, config, chosen)
    if run.quality(site).exists() and _finished(folder, inputs):
        return folder
    sets = {name: _read(run, site, config, name) for name in chosen}
    scores: list[Score] = []
    sample: list[NeuronRecord] = []
    layers = sorted({neuron.layer for one in sets.values() for neuron in one.simulations})
    for layer in layers:
        wanted = sorted({n.index for one in sets.values() for n in one.simulations if n.layer == layer})
        records = read_records(layer_file(run.records(site), layer), wanted)
        for name, protocols in chosen.items():
            scores += _layer_scores(sets[name], protocols, records)
        sample += [*records.values()][:SANITY_NEURONS]
    for name, one in sets.items():
        scores += _judgement_scores(run, site, config, name, one, len(sets) > 1)
    verdicts = on_records([protocol for group in chosen.values() for protocol in group], sample)
    write_quality(run, site, layers)
    with locked(folder, "score", wait=True):  # both files are of one process
        write_scores(folder / "scores.jsonl", scores)
        write_json(
            folder / "scores.json",
            {
                "explainer": config.explainer,
                "simulator": config.simulator,
                "site": site,
                "sanity": [verdict.row() for verdict in verdicts],
                "made_with": {name: one.made_with for name, one in sets.items()},
                "made_from": inputs,
                "scores_sha256": sha256(folder / "scores.jsonl"),
            },
        )
    return folder


def _finished(folder: Path, inputs: dict[str, str]) -> bool:
    """Whether scores were made from `inputs` and nothing has damaged them."""
    try:
        return read_about(folder)["made_from"] == inputs
    except UserError:
        return False


def read_about(folder: Path) -> dict[str, Any]:
    """A scores.json whose scores.jsonl, beside it, is as it was written.

    Raises:
        UserError: one of the files is missing or damaged, or of an older version.
    """
    path, scores = folder / "scores.json", folder / "scores.jsonl"
    if not path.exists() and (folder / "summary.json").exists():
        raise UserError(f"{folder}: scored by an older version of cratescope; run `cratescope score` again")
    about = read_json(path, ABOUT, "`cratescope score`")
    if not scores.exists():
        raise UserError(f"{scores}: no such file; run `cratescope score` first")
    if about["scores_sha256"] != sha256(scores):
        raise UserError(f"{scores}: damaged (its SHA-256 is not the one in {path.name}); run `cratescope score` again")
    return about


def _made_from(run: Run, site: str, config: ScoreConfig, explained: Iterable[str]) -> dict[str, str]:
    """Every file that decides a score; records and weights by what their manifests say."""
    folders = []
    for name in explained:
        folders.append(run.explanations(site, config.explainer, name))
        folders.append(run.simulations(site, config.explainer, config.simulator, name))
        folders += [run.judgements(site, config.explainer, scorer, name) for scorer in SCORERS]
    files = [path for folder in folders for path in sorted(folder.rglob("*.json"))]
    known = records_identity(run, site)
    return made_from(files, run.root, version=VERSION, site=site, protocols=config.protocols, records=known)


def _layer_scores(
    simulated: Simulated, protocols: Sequence[Protocol], records: Mapping[int, NeuronRecord]
) -> Iterator[Score]:
    """Of the neurons of one layer, whose `records` these are."""
    layer = next(iter(records.values())).neuron.layer
    for neuron, simulation in simulated.simulations.items():
        if neuron.layer == layer:
            try:
                for protocol in protocols:
                    yield from score_neuron(records[neuron.index], simulation, protocol)
            except ValueError as error:
                path = neuron_file(simulated.folder, neuron)
                raise UserError(f"{path}: {error}; run `cratescope simulate` again") from error


def score_neuron(record: NeuronRecord, simulation: Simulation, protocol: Protocol) -> list[Score]:
    """Every measure of a protocol, on its windows joined together, for the neuron's own explanation and each control.

    Raises:
        ValueError: a window of the protocol was not simulated, or with another number of tokens, or as NaN.
    """
    windows = protocol.score_records(record)
    truth = np.concatenate([window.activations for window in windows]) if windows else np.zeros(0)
    number = np.repeat(np.arange(len(windows)), [len(window.activations) for window in windows])
    found = []
    for control in (OWN, *(name for name in CONTROLS if name in simulation.expected)):
        simulated = _simulated(simulation, control, protocol, [window.key for window in windows])
        for name in protocol.measures:
            value = None if simulated is None else measure(name, truth, simulated)
            reason = None if value is not None else simulation.skipped or _why(truth, simulated)
            low, high = None, None
            if simulated is not None and value is not None and (control, name) == (OWN, protocol.measures[0]):
                seed = record.neuron.layer, record.neuron.index
                low, high = bootstrap(name, truth, simulated, number, seed) or (None, None)
            key = record.neuron, protocol.name, protocol.explained, control, name
            found.append(Score(*key, value, len(truth), low, high, reason))
    return found


def _simulated(
    simulation: Simulation, control: str, protocol: Protocol, keys: Sequence[tuple[int, int, int]]
) -> np.ndarray | None:
    """The simulated activations of the windows joined together; None when there is no explanation to simulate."""
    if control not in simulation.expected or not keys:
        return None
    rows = simulation.expected[control]
    if len(rows) != len(simulation.keys):
        raise ValueError(f"control {control} has {len(rows)} windows where {len(simulation.keys)} are named")
    by_key = dict(zip(simulation.keys, rows, strict=True))
    missing = [key for key in keys if key not in by_key]
    if missing:
        raise ValueError(f"has no window (excerpt, start, width) {missing[0]} of protocol {protocol.name}")
    if any(len(by_key[key]) != key[2] for key in keys):
        raise ValueError(f"control {control} has a window with more or fewer values than tokens")
    values = np.array([value for key in keys for value in by_key[key]], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"control {control} has a value that is not a finite number")
    return values


def _why(truth: np.ndarray, simulated: np.ndarray | None) -> str:
    if not len(truth):
        return NO_WINDOWS
    if is_constant(truth):
        return CONSTANT_TRUTH
    return CONSTANT_SIMULATION if simulated is None or is_constant(simulated) else NO_ACTIVE_TOKEN


def _judgement_scores(
    run: Run, site: str, config: ScoreConfig, explained: str, simulated: Simulated, several: bool
) -> Iterator[Score]:
    """Of every scorer that has judged explanations of this set; `several` sets: its name says which."""
    for scorer in SCORERS:
        folder = run.judgements(site, config.explainer, scorer, explained)
        judgements = read_judgements(folder)
        if judgements:
            check_identity(folder, records_identity(run, site))
        for item in judgements:
            own = simulated.explanations.get(item.neuron)
            if item.control == OWN and item.text and (own is None or own.text != item.text):
                path = neuron_file(folder, item.neuron)
                raise UserError(
                    f"{path}: judges another explanation than the one on file; run `cratescope judge` again"
                )
            yield from score_judgement(item, f"{scorer}-{explained}" if several else scorer, explained)


def score_judgement(item: Judgement, protocol: str, explained: str) -> list[Score]:
    """Accuracy and AUROC of yes-or-no answers; the intruder's accuracy is how often it was the likeliest of its group.

    Raises:
        UserError: there are not as many answers as labels, or one is no probability.
    """
    labels, answers = np.array(item.labels, dtype=bool), np.array(item.probabilities, dtype=np.float64)
    if len(labels) != len(answers) or not ((answers >= 0) & (answers <= 1)).all():
        raise UserError(f"{protocol} of {item.neuron}: damaged judgements; run `cratescope judge` again")
    values = {name: judged(name, labels, answers) if len(labels) else None for name in ("accuracy", "auroc")}
    if item.scorer == "intruder" and len(labels):
        groups = labels.reshape(-1, INTRUDER_GROUP), answers.reshape(-1, INTRUDER_GROUP)
        values["accuracy"] = float((groups[0].argmax(1) == groups[1].argmax(1)).mean())
    return [
        Score(item.neuron, protocol, explained, item.control, name, value, len(labels), reason=_unjudged(item, value))
        for name, value in values.items()
    ]


def _unjudged(item: Judgement, value: float | None) -> str | None:
    return None if value is not None else item.skipped or ONE_ANSWER


def _read(run: Run, site: str, config: ScoreConfig, explained: str) -> Simulated:
    """The simulations, the explanations they were made from, checked to belong to this model's records, and how."""
    folder = run.simulations(site, config.explainer, config.simulator, explained)
    simulations = read_simulations(folder)
    if not simulations:
        raise UserError(
            f"{folder}: no simulations; run `cratescope simulate` with the same --protocols first, or name another "
            "--explainer or --simulator"
        )
    made_with = check_identity(folder, records_identity(run, site))
    _check_finished(folder, simulations)
    of_set = run.explanations(site, config.explainer, explained)
    explanations = read_explanations(of_set)
    check_identity(of_set, records_identity(run, site))
    for neuron, simulation in simulations.items():
        explanation = explanations.get(neuron)
        text = simulation.texts.get(OWN, "")
        unexplained = simulation.skipped is not None and not text
        if explanation is None or (explanation.text != text and not unexplained):
            path = neuron_file(folder, neuron)
            raise UserError(
                f"{path}: simulates another explanation than the one on file; run `cratescope simulate` again"
            )
    used = {neuron: explanations[neuron] for neuron in simulations}
    return Simulated(used, simulations, folder, made_with)


def _check_finished(folder: Path, simulations: Mapping[NeuronId, Simulation]) -> None:
    """Were all neurons simulated that were meant to be?"""
    path = folder / "plan.json"
    planned = read_json(path, {str: int}, "`cratescope simulate`") if path.exists() else {}
    for layer, wanted in planned.items():
        found = sum(str(neuron.layer) == layer for neuron in simulations)
        if found < wanted:
            raise UserError(
                f"{folder}: {found} of {wanted} neurons of layer {layer} are simulated; run the same "
                "`cratescope simulate` again to finish"
            )

"""Compare simulations and judgements with the truth: a score a neuron, protocol, control and measure; a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.config import ScoreConfig
from cratescope.neurons.explain import DEAD, check_identity, find_site, records_identity
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
from cratescope.neurons.statistics import Mean, interval, mean_of, mean_over_layers, variance_over_layers
from cratescope.run import Run, Shape, UserError, locked, made_from, read_json, sha256, write_json

CONTROLS = ("shuffled", "empty", "unigram")
SCORERS = ("detection", "fuzzing", "intruder")
CONSTANT_TRUTH = "constant truth"
NO_ACTIVE_TOKEN = "no active token"
CONSTANT_SIMULATION = "constant simulation"
NO_WINDOWS = "no windows to score"
ONE_ANSWER = "windows of one kind only"
SANITY_NEURONS = 64
"""At most so many neurons a layer in the sanity tests of the measures."""


_MEANS: Shape = {name: (float, None) for name in ("mean", "standard_error", "gain_mean", "gain_standard_error")}
_LAYER: Shape = _MEANS | {"layer": int, "n_scored": int, "n_none": int, "n_dead": int, "n_neurons": int}
_CONTROL: Shape = {"layers": [_MEANS | {"layer": int}], "model": _MEANS}
_BOUNDS: Shape = {"low": (float, None), "high": (float, None)}
_TABLE: Shape = {"measure": str, "layers": [_LAYER | _BOUNDS], "model": _MEANS | _BOUNDS, "controls": {str: _CONTROL}}
SUMMARY: Shape = {
    "protocols": {str: _TABLE | {"measures": {str: _TABLE}}},
    "explainer": str,
    "simulator": str,
    "distinct_explanations?": {str: int},
    "sanity?": [{"sample": str, "measure": str, "n_neurons": int, "missing": float, "extra": float, "passes": bool}],
    "made_with?": {},
    "scores_sha256?": str,
}
"""What a report shows of summary.json."""


@dataclass(frozen=True)
class Stage:
    """Explanations of one set and what was simulated from them."""

    explanations: dict[NeuronId, Explanation]
    simulations: dict[NeuronId, Simulation]
    folder: Path
    made_with: dict[str, Any]


def score(config: ScoreConfig) -> dict[str, Any]:
    """Write scores.jsonl, summary.json and the activation quality; return the summary. Scores are plain, not x100.

    Judgements by detection, fuzzing and intruder detection are scored too where there are any. Scores of the same
    files, settings and code are kept.

    Raises:
        UserError: an unknown protocol; simulations that are missing, unfinished, of another model or explanation, or
            that do not fit the records.
    """
    chosen = protocols_named(config.protocols)
    run = Run(config.run)
    site = find_site(run, config.site)
    folder = run.scores(site, config.explainer, config.simulator)
    inputs = _made_from(run, site, config, chosen)
    outputs = (folder / "summary.json", folder / "scores.jsonl", run.quality(site))
    if all(path.exists() for path in outputs) and (known := _finished(folder, inputs)):
        return known
    stages = {explained: _read(run, site, config, explained) for explained in chosen}
    scores: list[Score] = []
    sample: list[NeuronRecord] = []
    layers = {neuron.layer for stage in stages.values() for neuron in stage.simulations}
    for layer in sorted(layers):
        wanted = sorted({n.index for stage in stages.values() for n in stage.simulations if n.layer == layer})
        records = read_records(layer_file(run.records(site), layer), wanted)
        for explained, protocols in chosen.items():
            scores += _layer_scores(stages[explained], protocols, records)
        sample += [*records.values()][:SANITY_NEURONS]
    for explained, stage in stages.items():
        scores += _judgement_scores(run, site, config, explained, stage, len(stages) > 1)
    first = next(iter(stages.values()))
    verdicts = on_records([protocol for group in chosen.values() for protocol in group], sample)
    summary = {
        "protocols": summarise(scores),
        "distinct_explanations": _distinct(first.explanations),
        "sanity": [verdict.row() for verdict in verdicts],
        "explainer": config.explainer,
        "simulator": config.simulator,
        "site": site,
        "made_with": first.made_with,
        "made_from": inputs,
    }
    write_quality(run, site, sorted(layers))
    with locked(folder, "score", wait=True):  # both files are of one process
        write_scores(folder / "scores.jsonl", scores)
        summary["scores_sha256"] = sha256(folder / "scores.jsonl")
        write_json(folder / "summary.json", summary)
    return summary


def _finished(folder: Path, inputs: dict[str, str]) -> dict[str, Any] | None:
    """The summary, if it was made from `inputs` and nothing has damaged it or the scores."""
    try:
        summary = read_summary(folder / "summary.json")
    except UserError:
        return None
    return summary if summary.get("made_from") == inputs else None


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json whose scores.jsonl, beside it, is as it was written.

    Raises:
        UserError: one of the files is damaged, or of an older version.
    """
    summary = read_json(path, SUMMARY, "`cratescope score`")
    for name, table in summary["protocols"].items():
        tables = [table, *table["measures"].values()]
        if any(len(control["layers"]) != len(one["layers"]) for one in tables for control in one["controls"].values()):
            raise UserError(f"{path}: damaged (layers of {name} are missing); run `cratescope score` again")
    scores = path.with_name("scores.jsonl")
    if not scores.exists():
        raise UserError(f"{scores}: no such file; run `cratescope score` first")
    if summary.get("scores_sha256", sha256(scores)) != sha256(scores):
        raise UserError(f"{scores}: damaged (its SHA-256 is not the one in {path.name}); run `cratescope score` again")
    return summary


def _made_from(run: Run, site: str, config: ScoreConfig, explained: Iterable[str]) -> dict[str, str]:
    """Every file that decides a score, this code among them; records and weights by what their manifests say."""
    folders = []
    for name in explained:
        folders.append(run.explanations(site, config.explainer, name))
        folders.append(run.simulations(site, config.explainer, config.simulator, name))
        folders += [run.judgements(site, config.explainer, scorer, name) for scorer in SCORERS]
    files = [path for folder in folders for path in sorted(folder.rglob("*.json"))]
    files += sorted(Path(__file__).parent.glob("*.py"))
    known = records_identity(run, site)
    return made_from(files, run.root, site=site, protocols=config.protocols, records=known)


def _layer_scores(stage: Stage, protocols: Sequence[Protocol], records: Mapping[int, NeuronRecord]) -> Iterator[Score]:
    """Of the neurons of one layer, whose `records` these are."""
    layer = next(iter(records.values())).neuron.layer
    for neuron, simulation in stage.simulations.items():
        if neuron.layer == layer:
            try:
                for protocol in protocols:
                    yield from score_neuron(records[neuron.index], simulation, protocol)
            except ValueError as error:
                path = neuron_file(stage.folder, neuron)
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
    for control in ("none", *(name for name in CONTROLS if name in simulation.expected)):
        simulated = _simulated(simulation, control, protocol, [window.key for window in windows])
        for name in protocol.measures:
            value = None if simulated is None else measure(name, truth, simulated)
            reason = None if value is not None else simulation.skipped or _why(truth, simulated)
            item = Score(record.neuron, protocol.name, control, name, value, len(truth), reason=reason)
            if simulated is not None and value is not None and (control, name) == ("none", protocol.measures[0]):
                bounds = bootstrap(name, truth, simulated, number, (record.neuron.layer, record.neuron.index))
                low, high = bounds or (None, None)
                item = Score(record.neuron, protocol.name, control, name, value, len(truth), low, high)
            found.append(item)
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
    run: Run, site: str, config: ScoreConfig, explained: str, stage: Stage, several: bool
) -> Iterator[Score]:
    """Of every scorer that has judged explanations of this set; `several` sets: its name says which."""
    for scorer in SCORERS:
        folder = run.judgements(site, config.explainer, scorer, explained)
        judgements = read_judgements(folder)
        if judgements:
            check_identity(folder, records_identity(run, site))
        for item in judgements:
            own = stage.explanations.get(item.neuron)
            if item.control == "none" and item.text and (own is None or own.text != item.text):
                path = neuron_file(folder, item.neuron)
                raise UserError(
                    f"{path}: judges another explanation than the one on file; run `cratescope judge` again"
                )
            yield from score_judgement(item, f"{scorer}-{explained}" if several else scorer)


def score_judgement(item: Judgement, protocol: str) -> list[Score]:
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
        Score(item.neuron, protocol, item.control, name, value, len(labels), reason=_unjudged(item, value))
        for name, value in values.items()
    ]


def _unjudged(item: Judgement, value: float | None) -> str | None:
    return None if value is not None else item.skipped or ONE_ANSWER


Values = dict[NeuronId, float]


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Every protocol's own measure by layer and for the model, its controls, and the same of its other measures."""
    found = {}
    for name in dict.fromkeys(score.protocol for score in scores):
        mine = [score for score in scores if score.protocol == name]
        first, *others = dict.fromkeys(score.measure for score in mine)
        found[name] = _table(mine, first) | {"measures": {other: _table(mine, other) for other in others}}
    return found


def _table(scores: Sequence[Score], measured: str) -> dict[str, Any]:
    """One protocol by one measure. null_ and gain_ are those of the shuffled control."""
    mine = [score for score in scores if score.measure == measured]
    own = [score for score in mine if score.control == "none"]
    layers = sorted({score.neuron.layer for score in own})
    values: dict[str, list[Values]] = {
        control: [_values(mine, control, layer) for layer in layers] for control in ("none", *CONTROLS)
    }
    controls = {
        control: _control(values["none"], values[control], layers) for control in CONTROLS if any(values[control])
    }
    empty = _control(values["none"], [{} for _ in layers], layers)
    null = controls.get("shuffled", empty)
    rows = []
    for place, layer in enumerate(layers):
        counted = _counted([score for score in own if score.neuron.layer == layer])
        rows.append({"layer": layer} | _own(values["none"][place : place + 1]) | _null(null["layers"][place]) | counted)
    model = _own(values["none"]) | _null(null["model"])
    del model["standard_deviation"]
    model["variance_over_layers"] = variance_over_layers([mean_of([*one.values()]) for one in values["none"]])
    return {"measure": measured, "layers": rows, "model": model, "controls": controls}


def _values(scores: Sequence[Score], control: str, layer: int) -> Values:
    return {
        score.neuron: score.value
        for score in scores
        if score.control == control and score.neuron.layer == layer and score.value is not None
    }


def _own(layers: Sequence[Values]) -> dict[str, Any]:
    """Mean over layers, its error, and a bootstrap interval of 95 % over neurons."""
    mean = _mean(layers)
    low, high = interval([[*layer.values()] for layer in layers]) or (None, None)
    return mean._asdict() | {"low": low, "high": high}


def _mean(layers: Sequence[Values]) -> Mean:
    means = [mean_of([*layer.values()]) for layer in layers]
    return means[0] if len(means) == 1 else mean_over_layers(means)


def _control(own: Sequence[Values], null: Sequence[Values], layers: Sequence[int]) -> dict[str, Any]:
    """Mean of a control, and mean gain of the own explanation over it where a neuron has both; and how many have."""
    gains = [
        {neuron: value - other[neuron] for neuron, value in mine.items() if neuron in other}
        for mine, other in zip(own, null, strict=True)
    ]

    def row(places: slice) -> dict[str, Any]:
        mean, gain = _mean(null[places]), _mean(gains[places])
        return {
            "mean": mean.mean,
            "standard_error": mean.standard_error,
            "gain_mean": gain.mean,
            "gain_standard_error": gain.standard_error,
            "n": sum(map(len, gains[places])),
        }

    rows = [{"layer": layer} | row(slice(place, place + 1)) for place, layer in enumerate(layers)]
    return {"layers": rows, "model": row(slice(None))}


def _null(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"mean": "null_mean", "standard_error": "null_standard_error"}
    return {names.get(name, name): row[name] for name in ("mean", "standard_error", "gain_mean", "gain_standard_error")}


def _counted(scores: Sequence[Score]) -> dict[str, Any]:
    """n_none counts every neuron without a score, dead ones included; none_reasons says why."""
    reasons = Counter(score.reason for score in scores if score.value is None)
    return {
        "n_scored": len(scores) - reasons.total(),
        "n_none": reasons.total(),
        "n_dead": reasons[DEAD],
        "n_neurons": len(scores),
        "none_reasons": {str(reason): number for reason, number in sorted(reasons.items(), key=str)},
    }


def _distinct(explanations: Mapping[NeuronId, Explanation]) -> dict[str, int]:
    """How many different texts each layer has."""
    texts: dict[int, set[str]] = {neuron.layer: set() for neuron in explanations}
    for neuron, item in explanations.items():
        texts[neuron.layer] |= {item.text} - {""}
    return {str(layer): len(found) for layer, found in texts.items()}


def _read(run: Run, site: str, config: ScoreConfig, explained: str) -> Stage:
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
        text = simulation.texts.get("none", "")
        unexplained = simulation.skipped is not None and not text
        if explanation is None or (explanation.text != text and not unexplained):
            path = neuron_file(folder, neuron)
            raise UserError(
                f"{path}: simulates another explanation than the one on file; run `cratescope simulate` again"
            )
    used = {neuron: explanations[neuron] for neuron in simulations}
    return Stage(used, simulations, folder, made_with)


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

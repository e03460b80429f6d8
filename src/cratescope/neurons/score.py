"""Correlate true with simulated activations: one score a neuron, protocol and control, and their summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cratescope.config import ScoreConfig
from cratescope.neurons.explain import DEAD, check_identity, find_site, records_identity
from cratescope.neurons.records import (
    PROTOCOLS,
    Explanation,
    NeuronId,
    NeuronRecord,
    Protocol,
    Score,
    Simulation,
    layer_file,
    neuron_file,
    read_explanations,
    read_records,
    read_simulations,
    write_scores,
)
from cratescope.neurons.statistics import Mean, is_constant, mean_of, mean_over_layers, pearson, variance_over_layers
from cratescope.run import Run, UserError, write_json

CONSTANT_TRUTH = "constant truth"
CONSTANT_SIMULATION = "constant simulation"


@dataclass(frozen=True)
class Pair:
    """A neuron's scores with its own explanation and with another neuron's, and why the first is missing."""

    own: Score
    null: Score
    reason: str | None


def score(config: ScoreConfig) -> dict[str, Any]:
    """Write scores.jsonl and summary.json, and return the summary. Scores are plain r, not x100.

    Raises:
        UserError: an unknown protocol, no simulations, or simulations of another model or of other records.
    """
    unknown = [name for name in config.protocols if name not in PROTOCOLS]
    if unknown or not config.protocols:
        raise UserError(f"--protocols {' '.join(unknown)}: not a protocol; choose from {', '.join(PROTOCOLS)}")
    run = Run(config.run)
    site = find_site(run, config.site)
    simulations, explanations, made_with = _read(run, site, config)
    pairs: list[Pair] = []
    for layer in sorted({neuron.layer for neuron in simulations}):
        chosen = {neuron: item for neuron, item in simulations.items() if neuron.layer == layer}
        records = read_records(layer_file(run.records(site), layer), [neuron.index for neuron in chosen])
        for neuron, simulation in chosen.items():
            skipped = explanations[neuron].skipped
            for name in config.protocols:
                pairs.append(score_neuron(records[neuron.index], simulation, PROTOCOLS[name], skipped))
    summary = summarise(pairs, explanations) | {
        "explainer": config.explainer,
        "simulator": config.simulator,
        "site": site,
        "made_with": made_with,
    }
    folder = run.scores(site, config.explainer, config.simulator)
    write_scores(folder / "scores.jsonl", [item for pair in pairs for item in (pair.own, pair.null)])
    write_json(folder / "summary.json", summary)
    return summary


def score_neuron(record: NeuronRecord, simulation: Simulation, protocol: Protocol, skipped: str | None = None) -> Pair:
    """Score one neuron on a protocol's records joined together, with its own and with the control's simulation."""
    windows = protocol.score_records(record)
    truth = np.concatenate([window.activations for window in windows]) if windows else np.zeros(0)

    def one(control: str, rows: Iterable[Sequence[float]]) -> tuple[Score, str | None]:
        by_key = dict(zip(simulation.keys, rows, strict=False))
        simulated = np.array([value for window in windows for value in by_key.get(window.key, ())])
        # Without an explanation there is nothing to correlate; otherwise the rows are those of the records or wrong.
        value = pearson(truth, simulated) if len(simulated) == len(truth) else None
        reason = skipped or (CONSTANT_TRUTH if is_constant(truth) else CONSTANT_SIMULATION)
        return Score(record.neuron, protocol.name, control, value, len(truth)), None if value is not None else reason

    own, reason = one("none", simulation.expected)
    null, _ = one("shuffled", simulation.null_expected)
    return Pair(own, null, reason)


def summarise(pairs: Sequence[Pair], explanations: Mapping[NeuronId, Explanation]) -> dict[str, Any]:
    """Every protocol's layers and their mean, and how many different explanations each layer has."""
    protocols = {}
    for name in dict.fromkeys(pair.own.protocol for pair in pairs):
        chosen = [pair for pair in pairs if pair.own.protocol == name]
        layers = sorted({pair.own.neuron.layer for pair in chosen})
        rows = [[pair for pair in chosen if pair.own.neuron.layer == layer] for layer in layers]
        protocols[name] = {
            "layers": [_layer_row(layer, row) for layer, row in zip(layers, rows, strict=True)],
            "model": _model_row(rows),
        }
    texts: dict[int, set[str]] = {pair.own.neuron.layer: set() for pair in pairs}
    for neuron in {pair.own.neuron for pair in pairs}:
        texts[neuron.layer] |= {explanations[neuron].text} - {""}
    return {"protocols": protocols, "distinct_explanations": {str(layer): len(found) for layer, found in texts.items()}}


def _means(pairs: Sequence[Pair]) -> tuple[Mean, Mean, Mean]:
    """Mean score, mean of the shuffled control, and mean gain over it where a neuron has both."""
    own = [pair.own.value for pair in pairs if pair.own.value is not None]
    null = [pair.null.value for pair in pairs if pair.null.value is not None]
    gain = [
        pair.own.value - pair.null.value for pair in pairs if pair.own.value is not None and pair.null.value is not None
    ]
    return mean_of(own), mean_of(null), mean_of(gain)


def _layer_row(layer: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """n_none counts every neuron without a score, dead ones included; none_reasons says why."""
    own, null, gain = _means(pairs)
    reasons = Counter(pair.reason for pair in pairs if pair.reason is not None)
    return {
        "layer": layer,
        "mean": own.mean,
        "standard_error": own.standard_error,
        "standard_deviation": own.standard_deviation,
        "null_mean": null.mean,
        "null_standard_error": null.standard_error,
        "gain_mean": gain.mean,
        "gain_standard_error": gain.standard_error,
        "n_scored": len(pairs) - reasons.total(),
        "n_none": reasons.total(),
        "n_dead": reasons[DEAD],
        "n_neurons": len(pairs),
        "none_reasons": dict(sorted(reasons.items())),
    }


def _model_row(layers: Sequence[Sequence[Pair]]) -> dict[str, float | None]:
    means = [_means(pairs) for pairs in layers]
    own, null, gain = (mean_over_layers([row[column] for row in means]) for column in range(3))
    return {
        "mean": own.mean,
        "standard_error": own.standard_error,
        "variance_over_layers": variance_over_layers([row[0] for row in means]),
        "null_mean": null.mean,
        "null_standard_error": null.standard_error,
        "gain_mean": gain.mean,
        "gain_standard_error": gain.standard_error,
    }


def _read(
    run: Run, site: str, config: ScoreConfig
) -> tuple[dict[NeuronId, Simulation], dict[NeuronId, Explanation], dict[str, Any]]:
    """The simulations, the explanations they were made from, checked to belong to this model's records, and how."""
    folder = run.simulations(site, config.explainer, config.simulator)
    simulations = read_simulations(folder)
    explanations = read_explanations(run.explanations(site, config.explainer))
    if not simulations:
        raise UserError(f"{folder}: no simulations; run `cratescope simulate` first, or name another --explainer")
    made_with = check_identity(folder, records_identity(run, site))
    for neuron, simulation in simulations.items():
        explanation = explanations.get(neuron)
        if explanation is None or explanation.text != simulation.text:
            path = neuron_file(folder, neuron)
            raise UserError(
                f"{path}: simulates another explanation than the one on file; run `cratescope simulate` again"
            )
    return simulations, explanations, made_with

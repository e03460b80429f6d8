"""One unit with everything known of it, as the page shows it: a `Neuron` as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cratescope.explain.controls import OWN
from cratescope.explain.explained import Judgement, Simulation
from cratescope.neurons.effects import Effects, TokenChange, TokenLogit
from cratescope.neurons.records import Histogram, NeuronRecord, TokenMean, Window, read_records
from cratescope.report.text import Decode
from cratescope.results.estimates import of_layer
from cratescope.results.neuron import Neuron, Said, read_neurons, source_of
from cratescope.score.scores import Score
from cratescope.viewer.opened import Measure, Opened, OpenedSite
from cratescope.viewer.values import finite, number, numbers

CONTROL_TITLES = {
    "shuffled": "another unit's explanation",
    "empty": "an explanation that says nothing",
    "unigram": "lookup of tokens",
    "untrained": "units of the untrained copy",
}
SIMULATED = 10.0
"""What the largest simulated activation of a unit is shown as: simulators have scales of their own."""
Labelled = tuple[str, str, Window, list[float] | None]
"""A window of a record: its kind, its label, itself, and what was simulated for it."""
Choose = Callable[[Sequence[Labelled]], Sequence[Labelled]]
LIFE_WINDOWS = 3
WINDOW_DIGITS = 3


def card(opened: Opened, site: OpenedSite, layer: int, index: int, untrained: Opened | None) -> dict[str, Any]:
    """Everything known of one unit but its effects, its neighbours and its life. Errors as of `Run.neuron`.

    untrained: the run's untrained copy, where it is opened too.
    """
    [found] = cards(opened, site, layer, [index], untrained)
    return found


def cards(
    opened: Opened,
    site: OpenedSite,
    layer: int,
    indices: Sequence[int],
    untrained: Opened | None,
    choose: Choose = list,
) -> Iterator[dict[str, Any]]:
    """The same of several units, whose files are read once; `choose` says which of their windows are shown."""
    site.file(layer)
    for neuron in read_neurons(opened.run, layer, indices, site.folder):
        yield finite(_card(opened, site, neuron, untrained, choose))


def _card(opened: Opened, site: OpenedSite, neuron: Neuron, untrained: Opened | None, choose: Choose) -> dict[str, Any]:
    record, layer, index = neuron.record, neuron.id.layer, neuron.id.index
    simulation = next((said.simulation for said in neuron.said if said.simulation and said.simulation.expected), None)
    return {
        "run": opened.name,
        "site": site.name,
        "layer": layer,
        "index": index,
        "title": f"{opened.arm.title}, {site.name}, layer {layer}, {'feature' if site.coded else 'neuron'} {index}",
        "about": [*about(opened, site, neuron)],
        "numbers": moments(record),
        "histogram": histogram(record.histogram),
        "quantiles": quantiles(record.histogram),
        "top_tokens": _token_means(record.top_tokens, opened.decode),
        "bottom_tokens": _token_means(record.bottom_tokens, opened.decode),
        "windows": [*_windows(record, opened.decode, simulation, choose)],
        "problem": _problem(opened, record),
        "explanations": [_explanation(said, neuron, untrained, site) for said in neuron.said],
    }


def moments(record: NeuronRecord) -> dict[str, Any]:
    """The measured numbers."""
    found = record.moments
    names = ("mean", "variance", "skewness", "kurtosis", "maximum")
    about = {"density": number(record.density)} | {name: number(getattr(found, name)) for name in names}
    return about | {"n_tokens": found.n_tokens, "dead": record.dead}


def histogram(found: Histogram | None) -> dict[str, Any] | None:
    if found is None or not len(found.count):
        return None
    high = np.where(np.isfinite(found.high), found.high, np.maximum(found.low, np.max(found.low)))
    return {"low": numbers(found.low), "high": numbers(high), "count": found.count.tolist()}


def quantiles(found: Histogram | None) -> dict[str, Any] | None:
    """Shares of tokens at or below the upper edge of each bin, by which the surprise of an activation is read."""
    if found is None or not len(found.count):
        return None
    below = np.cumsum(found.count)
    return {"at": numbers(found.high), "share": numbers(below / below[-1], 7)}


def _token_means(means: Sequence[TokenMean], decode: Decode) -> list[dict[str, Any]]:
    texts = decode([one.token for one in means])
    return [
        {"text": text, "mean": number(one.mean), "count": one.count} for text, one in zip(texts, means, strict=True)
    ]


def _windows(
    record: NeuronRecord, decode: Decode, simulation: Simulation | None, choose: Choose
) -> Iterator[dict[str, Any]]:
    guesses = _guesses(simulation)
    every = [(kind, label, window, guesses.get(window.key)) for kind, label, window in _labelled(record)]
    for kind, label, window, guess in choose(every):
        yield {"kind": kind, "label": label} | window_entry(window, decode, guess)


def _labelled(record: NeuronRecord) -> Iterator[tuple[str, str, Window]]:
    yield from (("top", f"top {rank}", window) for rank, window in enumerate(record.top, 1))
    for kind, strata in (("quantile", record.by_quantile), ("rank", record.by_rank), ("level", record.by_level)):
        for stratum in reversed(strata):
            label = f"{stratum.low:.3g} to {stratum.high:.3g}"
            yield from ((kind, label, window) for window in stratum.windows)
    yield from (("random", "random", window) for window in record.random)


def window_entry(window: Window, decode: Decode, simulated: Sequence[float] | None = None) -> dict[str, Any]:
    return {
        "tokens": decode(window.tokens.tolist()),
        "activations": numbers(window.activations, WINDOW_DIGITS),
        "simulated": None if simulated is None else numbers(simulated, WINDOW_DIGITS),
        "peak": window.peak,
        "excerpt": window.excerpt,
        "start": window.start,
    }


def _guesses(simulation: Simulation | None) -> dict[tuple[int, int, int], list[float]]:
    """What was simulated from the unit's own explanation, by window, between 0 and `SIMULATED`."""
    if simulation is None or OWN not in simulation.expected:
        return {}
    rows = simulation.expected[OWN]
    low = min((min(row, default=0.0) for row in rows), default=0.0)
    span = max((max(row, default=0.0) for row in rows), default=0.0) - min(low, 0.0)
    scale = SIMULATED / span if span > 0 else 0.0
    shown = ([(value - min(low, 0.0)) * scale for value in row] for row in rows)
    return dict(zip(simulation.keys, shown, strict=False))


def _problem(opened: Opened, record: NeuronRecord) -> str | None:
    """Why some tokens have no text, if so."""
    known = opened.n_ids
    if known is None:
        return f"{opened.name} has no tokenizer that can be read, so tokens are shown as their ids"
    if any(((window.tokens < 0) | (window.tokens >= known)).any() for window in (*record.top, *record.random)):
        return f"these records have tokens that the tokenizer of {opened.name} does not have; collect them again"
    return None


def about(opened: Opened, site: OpenedSite, neuron: Neuron) -> Iterator[list[str]]:
    """Where the card comes from: model, text, settings, explainers, versions."""
    identity = dict(site.identity)
    yield ["run", opened.name]
    yield from ([key.removesuffix("_sha256"), str(identity.pop(key))] for key in [*identity] if _is_hash(identity, key))
    for number_, (key, value) in enumerate(sorted(identity.get("sae_sha256", {}).items())):
        if number_ == 0 or key == str(neuron.id.layer):
            yield [f"dictionary of layer {key}", str(value)]
    yield from ([f"collect {key}", str(value)] for key, value in identity.items() if not isinstance(value, dict))
    for said in neuron.said:
        made = said.explanation.prompt if said.explanation else "none"
        yield ["explained", f"{said.explainer}, from {said.set}, prompt {made}"]
        if said.simulator:
            yield ["simulated", f"{said.simulator}, by {said.explainer}"]
    versions = site.collected.get("versions")
    for name, value in (versions if isinstance(versions, dict) else {}).items():
        if name != "platform":
            yield [f"version of {name}", str(value)]


def _is_hash(identity: Mapping[str, Any], key: str) -> bool:
    return key.endswith("sha256") and isinstance(identity[key], str)


def _explanation(said: Said, neuron: Neuron, untrained: Opened | None, site: OpenedSite) -> dict[str, Any]:
    return {
        "text": said.text,
        "skipped": said.explanation.skipped if said.explanation else None,
        "source": source_of(said, neuron.said),
        "set": said.set,
        "explainer": said.explainer,
        "simulator": said.simulator,
        "scores": [_score(own, controls, said, untrained, site) for own, controls in said.scored(neuron.id)],
        "controls": {control: text for control, text in (said.simulation.texts if said.simulation else {}).items()},
        "judgements": [_judgement(one) for found in said.judgements.values() for one in found],
    }


def _score(
    own: Score, controls: Mapping[str, Score], said: Said, untrained: Opened | None, site: OpenedSite
) -> dict[str, Any]:
    rows = [_control(name, row.value, row.low, row.high) for name, row in controls.items()]
    copy = untrained and untrained_mean(untrained, site, said, own)
    return {
        "protocol": own.protocol,
        "measure": own.measure,
        "title": f"{own.protocol} {own.measure}",
        "value": number(own.value),
        "low": number(own.low),
        "high": number(own.high),
        "n": own.n,
        "reason": own.reason,
        "controls": [*rows, copy] if copy else rows,
        "beside": [
            {"measure": row.measure, "value": number(row.value), "low": number(row.low), "high": number(row.high)}
            | ({"reason": row.reason} if row.reason else {})
            for row in said.beside(own)
        ],
    }


def _control(name: str, value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    title = CONTROL_TITLES.get(name, name)
    return {"name": name, "title": title, "value": number(value), "low": number(low), "high": number(high)}


def untrained_mean(untrained: Opened, site: OpenedSite, said: Said, own: Score) -> dict[str, Any] | None:
    """The mean of the untrained copy's units of the same layer; None where it was not scored alike."""
    copy = untrained.sites.get(site.name)
    if copy is None or own.neuron.layer not in copy.layers:
        return None
    measure = Measure(said.explainer, said.simulator, own.protocol)
    values = copy.scored(measure, own.neuron.layer).own
    found = of_layer(dict(enumerate(values[~np.isnan(values)].tolist())))
    return _control("untrained", found.mean, found.low, found.high) if found.n else None


def _judgement(one: Judgement) -> dict[str, Any]:
    pairs = [
        probability if label else 1 - probability
        for probability, label in zip(one.probabilities, one.labels, strict=True)
    ]
    value = number(float(np.mean(pairs))) if pairs else None
    return {
        "scorer": one.scorer,
        "control": one.control,
        "text": one.text,
        "title": "mean probability given to the right answer",
        "value": value,
        "n": len(pairs),
        "skipped": one.skipped,
    }


def effects(site: OpenedSite, layer: int, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What units do to the predictions, of those that were measured."""
    if layer not in site.effects.layers:
        return {}
    return {index: _effect(found) for index, found in site.effects.read(layer, indices).items()}


def _effect(found: Effects) -> dict[str, Any]:
    numbers = ("value", "kl", "direct_share", "input_score", "output_score", "output_score_plain")
    logits = {name: [_logit(one) for one in getattr(found, name)] for name in ("raises", "lowers")}
    changes = {name: [_change(one) for one in getattr(found, name)] for name in ("measured_raises", "measured_lowers")}
    about = {"contexts": found.contexts, "unmeasured": found.unmeasured, "undirected": found.undirected}
    return logits | changes | {name: number(getattr(found, name)) for name in numbers} | about


def _logit(one: TokenLogit) -> dict[str, Any]:
    return {"text": one.text, "logit": number(one.logit)}


def _change(one: TokenChange) -> dict[str, Any]:
    return {"text": one.text, "change": number(one.change), "probability": number(one.probability)}


def life_entry(opened: Opened, site: OpenedSite, layer: int, index: int) -> dict[str, Any] | None:
    """A unit as it was at a milestone; None where there are no records of it."""
    units = site.units(layer)
    place = units.place(index)
    if place is None:
        return None
    record = read_records(site.file(layer), [index], strata=())[index]
    scores = {measure: site.scored(measure, layer) for measure in site.measures[:1]}
    return finite(
        {
            "step": opened.manifest.get("steps"),
            "tokens": opened.arm.tokens_trained,
            "run": opened.name,
            "numbers": moments(record),
            "histogram": histogram(record.histogram),
            "top": [window_entry(window, opened.decode) for window in record.top[:LIFE_WINDOWS]],
            "explanation": site.texts(layer)[place],
            "score": next((number(float(found.own[place])) for found in scores.values()), None),
        }
    )

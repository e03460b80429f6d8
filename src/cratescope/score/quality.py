"""How consistently and distinctively neurons fire, measured from their records without a language model.

The paper claims that CRATE's neurons fire on relevant tokens and stay silent on others. Three numbers test that
without an explanation. None should be read alone (docs/evaluation.md), and all depend on how often a neuron fires,
so two models are compared at matched density as well.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.files import Shape, read_json, write_json
from cratescope.neurons.records import NeuronRecord, Window, each_record, layer_file
from cratescope.neurons.sample import records_identity
from cratescope.run import Run
from cratescope.score.inference import mean_of
from cratescope.score.measures import measure

QUALITIES = ("lookup", "concentration", "selectivity")
VERSION = 1
DENSITY_STEP = 2**0.25
"""Neurons of two models are matched when their densities are within the same such factor."""

Row = dict[str, Any]
_NUMBERS: Shape = {name: (float, None) for name in ("density", *QUALITIES)}
QUALITY: Shape = {
    "layers": [{"layer": int} | _NUMBERS],
    "model": _NUMBERS,
    "neurons": {"layer": [int], "index": [int], **{name: [(float, None)] for name in ("density", *QUALITIES)}},
}
"""What is read of quality.json."""


def write_quality(run: Run, site: str, layers: Sequence[int]) -> Path:
    """Write scores/<site>/quality.json for every neuron of the layers, unless it exists for these records."""
    path = run.quality(site)
    made_from = {"version": VERSION, "layers": list(layers)} | records_identity(run, site)
    with contextlib.suppress(UserError):  # a damaged file is made again
        if path.exists() and read_quality(path).get("made_from") == made_from:
            return path
    neurons: list[Row] = []
    for layer in layers:
        for record in each_record(layer_file(run.records(site), layer), strata=()):
            neurons.append({"layer": layer, "index": record.neuron.index} | activation_quality(record))
    rows = [{"layer": layer} | _summary([row for row in neurons if row["layer"] == layer]) for layer in layers]
    columns = {name: [row[name] for row in neurons] for name in (neurons[0] if neurons else ())}
    write_json(path, {"made_from": made_from, "layers": rows, "model": _model(rows), "neurons": columns})
    return path


def read_quality(path: Path) -> Row:
    """Read what `write_quality` wrote. Raises UserError when it is damaged."""
    found = read_json(path, QUALITY, "`cratescope score`")
    if len({len(column) for column in found["neurons"].values()}) > 1:
        raise UserError(f"{path}: damaged (columns of different lengths); delete it and run `cratescope score` again")
    return found


def activation_quality(record: NeuronRecord) -> dict[str, float | None]:
    """Density and QUALITIES of one neuron, None where there is nothing to measure (a dead neuron above all)."""
    return {
        "density": record.density if math.isfinite(record.density) else None,
        "lookup": None if record.dead else lookup(record.random),
        "concentration": None if record.dead else concentration(record.top),
        "selectivity": None if record.dead else selectivity(record.top, record.random),
    }


def lookup(windows: Sequence[Window]) -> float | None:
    """Lexical predictability on uniform text: the Pearson correlation of the activations with a table of token ids.

    The table holds each id's mean activation on every other window, and predicts the windows between; then the halves
    change places, and the two correlations are averaged. An id missing from the table gets the table's mean.
    """
    halves = [windows[0::2], windows[1::2]]
    if not all(halves):
        return None
    found = [_predicted(*halves), _predicted(*halves[::-1])]
    values = [value for value in found if value is not None]
    return statistics.fmean(values) if len(values) == 2 else None


def _predicted(fitted: Sequence[Window], other: Sequence[Window]) -> float | None:
    tokens, truth = _joined(fitted)
    ids, places = np.unique(tokens, return_inverse=True)
    means = np.append(np.bincount(places, truth) / np.bincount(places), truth.mean())
    asked, activations = _joined(other)
    found = np.searchsorted(ids, asked).clip(max=len(ids) - 1)
    guess = means[np.where(ids[found] == asked, found, len(ids))]
    return measure("pearson", activations, guess)


def _joined(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([window.tokens for window in windows])
    return tokens, np.concatenate([window.activations for window in windows]).astype(np.float64)


def concentration(top: Sequence[Window]) -> float | None:
    """Top-token concentration: the fraction of top windows that peak on the most common of their peak tokens."""
    if not top:
        return None
    peaks = Counter(int(window.tokens[window.peak]) for window in top)
    return peaks.most_common(1)[0][1] / len(top)


def selectivity(top: Sequence[Window], random: Sequence[Window]) -> float | None:
    """(t - r) / (t + r), t and r being the mean positive activation in the top and in the random windows.

    1: silent on random text; 0: as active there as in the top windows. The peak token of a top window is
    left out, so that the measure is about the text around it.
    """
    rest = [np.delete(window.activations, window.peak) for window in top]
    if not rest or not random:
        return None
    t, r = (float(np.maximum(np.concatenate(part), 0).mean()) for part in (rest, [w.activations for w in random]))
    return (t - r) / (t + r) if t + r > 0 else None


def _summary(neurons: Sequence[Mapping[str, Any]]) -> Row:
    """Mean and standard error of every number, and how many neurons have it."""
    row: Row = {"n_neurons": len(neurons)}
    for name in ("density", *QUALITIES):
        values = [neuron[name] for neuron in neurons if neuron[name] is not None]
        mean = mean_of(values)
        row |= {name: mean.mean, f"{name}_error": mean.standard_error, f"{name}_n": len(values)}
    return row


def _model(layers: Sequence[Row]) -> Row:
    """Mean over layers that have one."""
    row: Row = {}
    for name in ("density", *QUALITIES):
        values = [layer[name] for layer in layers if layer[name] is not None]
        row[name] = statistics.fmean(values) if values else None
    return row


def matched(a: Mapping[str, Sequence[Any]], b: Mapping[str, Sequence[Any]], name: str) -> Row | None:
    """Means of QUALITIES `name` over the neurons of two models in one layer, as if both fired equally often.

    Neurons are binned by density, a bin being a factor of 2^(1/4) wide. A bin counts as often as the model that has
    fewer neurons there has them; what the other model lacks altogether is left out (`n`: neurons that count).
    a, b: columns "density" and `name` of the layer's neurons. None when no bin holds neurons of both.
    """
    bins = [_bins(side, name) for side in (a, b)]
    common = sorted(bins[0].keys() & bins[1].keys())
    weights = [min(len(bins[0][place]), len(bins[1][place])) for place in common]
    if not common:
        return None
    means = [np.average([statistics.fmean(side[place]) for place in common], weights=weights) for side in bins]
    return {"a": float(means[0]), "b": float(means[1]), "n": sum(weights)}


def _bins(columns: Mapping[str, Sequence[Any]], name: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for density, value in zip(columns["density"], columns[name], strict=True):
        if density and value is not None:
            found.setdefault(math.floor(math.log(density) / math.log(DENSITY_STEP)), []).append(value)
    return found

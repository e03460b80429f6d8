"""The numbers of some runs as rows, for CSV, JSON and HTML."""

from __future__ import annotations

import csv
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cratescope.explain.controls import CONTROLS
from cratescope.explain.protocols import ON_UNIFORM_TEXT
from cratescope.files import atomic_path
from cratescope.results.compare import DETECTABLE, UNTRAINED, Comparison, Pair, Quantity
from cratescope.results.dictionaries import NUMBERS, PROBING
from cratescope.results.estimates import NOTHING, Estimate, finite, over
from cratescope.results.runs import Results, Row, one_per_run, protocols, untrained_copy
from cratescope.results.scores import measures_of, numbers_at
from cratescope.score.quality import QUALITIES, matched


@functools.cache
def paper() -> Row:
    """The paper's printed numbers, shown next to ours as context, not as a target, and never mixed with them."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def paper_score(item: Results, protocol: str, layer: int | None = None) -> float | None:
    """The paper's score x100 of a layer, or of the mean over layers; None where the paper has no such model."""
    entry = paper()["scores"].get(protocol, {}).get(_name_in_paper(item), {})
    if layer is None:
        return entry.get("mean") if len(item.scores.layers) == item.manifest["n_layer"] else None
    layers = entry.get("layers", ())
    return layers[layer] if layer < len(layers) else None


def _name_in_paper(item: Results) -> str | None:
    """The paper has trained presets, and the features of 16 times as wide ReLU autoencoders of their neurons."""
    if item.arm.untrained or item.arm.variant:
        return None
    if item.dictionary is None:
        return item.arm.preset if item.plain else None
    from cratescope.neurons.sites import BUILT_IN

    native = BUILT_IN.get(item.arm.family, {}).get(item.arm.site)
    config = item.dictionary.config
    if config is None or config.kind != "relu" or config.width != 16 * config.d_in or item.dictionary.pattern != native:
        return None
    return f"{item.arm.preset} + sae"


def _start(item: Results) -> Row:
    start = {"model": item.label, "family": item.arm.family, "preset": item.arm.preset, "seed": item.arm.seed}
    return start | {"tokens_trained": item.arm.tokens_trained, "site": item.site}


def score_rows(results: Sequence[Results]) -> list[Row]:
    """One row per model, protocol, measure and layer, and one with layer "mean".

    Scores are plain, `paper` is x100. Of every control, and of the untrained copy, there are the score, its standard
    error and the gain over it with its own; low and high are the bootstrap interval of 95 % over neurons.
    """
    return [
        _score_row(item, copy, protocol, measure, layer)
        for item in results
        for copy in [untrained_copy(item, results)]
        for protocol in item.scores.protocols
        for measure in item.scores.measures(protocol)
        for layer in [*sorted(item.scores.columns(protocol, measure)), None]
    ]


def _score_row(item: Results, copy: Results | None, protocol: str, measure: str, layer: int | None) -> Row:
    own = item.scores.mean(protocol, measure, layer=layer)
    row = _start(item) | {
        "explainer": item.about["explainer"],
        "simulator": item.about["simulator"],
        "explanation_set": item.scores.set_of[protocol],
        "protocol": protocol,
        "measure": measure,
        "layer": "mean" if layer is None else layer,
        "mean": own.mean,
        "standard_error": own.standard_error,
        "low": own.low,
        "high": own.high,
        "standard_deviation": own.standard_deviation,
        "variance_over_layers": own.variance_over_layers,
    }
    present = item.scores.controls(protocol, measure)
    for control in CONTROLS:
        there = control in present
        score = item.scores.mean(protocol, measure, control, layer=layer) if there else NOTHING
        row |= _beside(
            control, score, item.scores.mean(protocol, measure, over=control, layer=layer) if there else NOTHING
        )
    untrained = copy.scores.mean(protocol, measure, layer=layer) if copy else NOTHING
    row |= _beside(UNTRAINED, untrained, over(own, untrained))
    first = measure == item.scores.measures(protocol)[0]
    counts = item.scores.counts(protocol, layer, measure)
    return row | counts | {"paper": paper_score(item, protocol, layer) if first else None}


def _beside(name: str, score: Estimate, gain: Estimate) -> Row:
    return {
        name: score.mean,
        f"{name}_error": score.standard_error,
        f"over_{name}": gain.mean,
        f"over_{name}_error": gain.standard_error,
    }


def neuron_rows(results: Sequence[Results]) -> Iterator[Row]:
    """One row per neuron and explanation set: the explanation, and the scores that were made from it.

    Each protocol's own measure, its interval and its controls, and its measures ON_UNIFORM_TEXT with theirs; empty for
    a protocol of another explanation set.
    """
    names = protocols(results)
    for item in results:
        layers = [layers.keys() for layers in item.explanations.values()]
        for layer in sorted({*item.scores.layers}.union(*layers)):
            yield from _neuron_rows(item, layer, names)


def _neuron_rows(item: Results, layer: int, names: Sequence[str]) -> Iterator[Row]:
    """Those of one layer, made column by column: the rows of an explanation set are every so-manieth."""
    indices = np.array(_neurons(item, layer), dtype=np.int64)
    columns = [_neuron_columns(item, layer, indices, explained, names) for explained in item.scores.sets]
    start = {"model": item.label, "site": item.site, "layer": layer}
    for place, index in enumerate(indices.tolist()):
        for one in columns:
            yield start | {"index": index} | {name: values[place] for name, values in one.items()}


def _neurons(item: Results, layer: int) -> list[int]:
    """Neurons of a layer that have a score or an explanation."""
    return sorted(item.scores.scored(layer).union(*(texts.get(layer, {}) for texts in item.explanations.values())))


def _neuron_columns(
    item: Results, layer: int, indices: Int[np.ndarray, " n"], explained: str, names: Sequence[str]
) -> dict[str, Sequence[Any]]:
    """What neurons.csv says of some neurons, beside their names."""
    texts, nothing = item.explanations.get(explained, {}).get(layer, {}), [None] * len(indices)
    columns: dict[str, Sequence[Any]] = {"explanation_set": [explained] * len(indices)}
    columns["explanation"] = [texts.get(index) for index in indices.tolist()]
    for name in names:
        ours = name in item.scores.protocols and item.scores.set_of[name] == explained
        for measure, start in _shown_measures(name).items():
            own = item.scores.columns(name, measure).get(layer) if ours else None
            for suffix, number in (("score", "value"), ("low", "low"), ("high", "high")):
                columns[f"{start}_{suffix}"] = own.at(indices, number) if own else nothing
        for control in CONTROLS:
            null = item.scores.columns(name, None, control).get(layer) if ours else None
            columns[f"{name}_{control}"] = null.at(indices) if null else nothing
    activity = item.activity.get(layer)
    for name in ("density", "maximum"):
        found = numbers_at(indices, activity.index, getattr(activity, name)) if activity else nothing
        columns[name] = [finite(value) for value in found]
    return columns


def _shown_measures(protocol: str) -> dict[str, str]:
    """The measures that neurons.csv has of a protocol, with what the names of their columns begin with."""
    own, *others = measures_of(protocol)
    return {own: protocol} | {name: f"{protocol}_{name}" for name in others if name in ON_UNIFORM_TEXT}


def activity_rows(results: Sequence[Results]) -> list[Row]:
    """One row per model and layer, and one with layer "mean": how often its neurons are not zero.

    These are the `n_neurons` with a record, scored or not, of the `width` that the layer has. active: fraction of
    non-zero activations among these and all tokens; median_density: of the single neurons.
    """
    return [row for item in results for row in _activity_rows(item)]


def _activity_rows(item: Results) -> list[Row]:
    rows: list[Row] = []
    for layer in item.scores.layers:
        densities = item.densities(layer)
        means = {"active": statistics.fmean(densities), "median_density": statistics.median(densities)}
        counts = {"n_dead": densities.count(0), "n_neurons": len(densities), "width": item.activity[layer].width}
        rows.append({"layer": layer} | means | counts)
    mean = {name: statistics.fmean(row[name] for row in rows) for name in ("active", "median_density")}
    total = {name: sum(row[name] for row in rows) for name in ("n_dead", "n_neurons", "width")}
    return [_start(item) | row for row in [*rows, {"layer": "mean"} | mean | total]]


def quality_rows(results: Sequence[Results]) -> list[Row]:
    """Activation quality: one row per model and layer, and one with layer "mean"; and how many explanations differ.

    The distinct explanations are those of the first explanation set.
    """
    rows = []
    for item in results:
        if item.quality is None:
            continue
        for row in [*item.quality["layers"], {"layer": "mean"} | item.quality["model"]]:
            numbers = {name: row[name] for name in ("density", *QUALITIES)}
            errors = {f"{name}_error": row.get(f"{name}_error") for name in QUALITIES}
            distinct = None if row["layer"] == "mean" else item.distinct(item.scores.sets[0], row["layer"])
            rows.append(_start(item) | {"layer": row["layer"]} | numbers | errors | {"distinct_explanations": distinct})
    return rows


def dictionary_rows(results: Sequence[Results]) -> list[Row]:
    """The quality of every dictionary that was measured, its features scored or not: a row per run, name and layer."""
    return [
        {"model": item.run.name, "family": item.arm.family, "preset": item.arm.preset, "seed": item.arm.seed}
        | {"tokens_trained": item.arm.tokens_trained, "site": found.site}
        | {name: row[name] for name in ("layer", "kind", "width", *NUMBERS)}
        | {f"probing_{name}": (row.get("probing") or {}).get(name) for name in PROBING}
        for item in one_per_run(results)
        for found in item.dictionaries
        for row in found.quality
    ]


PRIMARY = "primary"
"""The column of the primary measure beside those of activation quality."""


def matched_rows(results: Sequence[Results], sides: Sequence[Pair], primary: Quantity) -> list[Row]:
    """The primary measure and activation quality of two arms at matched density: a row per seed and layer."""
    found = [item for item in results if item.site == item.arm.site and item.quality]
    rows = []
    for arms in sides:
        for a, b in product(*([item for item in found if item.arm.name == arm] for arm in arms)):
            if _alike(a) == _alike(b):
                rows += [_matched(a, b, layer, primary) for layer in a.scores.layers if layer in b.scores.layers]
    return rows


def _alike(item: Results) -> tuple[Any, ...]:
    """What runs have in common whose neurons are matched with each other."""
    return item.matter, item.arm.seed, item.arm.tokens_trained


def _matched(a: Results, b: Results, layer: int, primary: Quantity) -> Row:
    columns = _columns(a, layer, primary), _columns(b, layer, primary)
    row: Row = {"a": a.label, "b": b.label, "layer": layer}
    for name in (PRIMARY, *QUALITIES):
        found = matched(*columns, name) or {"a": None, "b": None, "n": 0}
        row |= {f"a_{name}": found["a"], f"b_{name}": found["b"], f"{name}_n": found["n"]}
    return row


def _columns(item: Results, layer: int, primary: Quantity) -> Row:
    """The numbers of each neuron of one layer."""
    assert item.quality is not None
    columns = item.quality["neurons"]
    places = [place for place, found in enumerate(columns["layer"]) if found == layer]
    found = {name: [values[place] for place in places] for name, values in columns.items()}
    scores = primary.by_index(item).get(layer, {})
    return found | {PRIMARY: [scores.get(index) for index in found["index"]]}


def sanity_rows(results: Sequence[Results]) -> list[Row]:
    """The missing-label and extra-label tests of every run's own neurons."""
    return [{"model": item.label} | row for item in results for row in item.about.get("sanity", ())]


def loss_rows(results: Sequence[Results]) -> list[Row]:
    """The loss curves and the final evaluation of every run, in nats per token, one row per point."""
    rows = []
    for item in one_per_run(results):
        for row in item.metrics:
            kind = "validation" if "validation_loss" in row else "train"
            loss = row["validation_loss"] if kind == "validation" else row.get("loss")
            error = row.get("validation_standard_error")
            rows.append(_loss_row(item, kind, row["step"], row["tokens"], loss, error))
        final, run = item.evaluation, item.manifest
        numbers = final["loss"], final["standard_error"]
        last = _loss_row(item, "final", run.get("steps"), item.arm.tokens_trained, *numbers)
        rows.append(last | {name: finite(final[name]) for name in ("perplexity", "bits_per_byte", "unigram_entropy")})
    return rows


def _loss_row(
    item: Results, kind: str, step: int | None, tokens: int | None, loss: float | None, error: float | None
) -> Row:
    row: Row = {"model": item.run.name, "kind": kind, "step": step, "tokens": tokens}
    row |= {"loss": finite(loss), "standard_error": finite(error)}
    return row | {"perplexity": None, "bits_per_byte": None, "unigram_entropy": None}


def comparison_row(pair: Comparison) -> dict[str, Any]:
    """A comparison with everything that follows from it, for JSON."""
    names = ("difference", "standard_error", "unit", "clear")
    found = asdict(pair) | {name: getattr(pair, name) for name in names}
    found["test"] = pair.test._asdict() if pair.test else None
    for name, wanted in (("this difference", None), (f"{100 * DETECTABLE:g} points", DETECTABLE)):
        found[f"neurons a layer for {name}"] = pair.neurons_needed(wanted)
        found[f"seeds for {name}"] = pair.seeds_needed(wanted)
    return found


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")
"""What makes a spreadsheet run a cell (Japanese ones take the wide signs too), and what `csv_cell` puts before it."""


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, after an apostrophe; everything else as it is.

    A text that begins with an apostrophe gets another, so the text is what stands after the first one.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_csv(path: Path, rows: Callable[[], Iterable[Row]]) -> None:
    """Write rows of equal keys with full precision; a missing number is an empty cell. See `csv_cell` for texts.

    rows: called again where a text has a carriage return, for which the library has no quotes and readers end the row,
    so that all cells get quotes.
    """
    with atomic_path(path) as temporary:
        if not _write_cells(temporary, rows(), csv.QUOTE_MINIMAL):
            _write_cells(temporary, rows(), csv.QUOTE_ALL)


def _write_cells(path: Path, rows: Iterable[Row], quoting: Any) -> bool:
    """Whether it was done: without quotes not beyond a carriage return."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=quoting)
        for place, row in enumerate(rows):
            cells = [csv_cell(value) for value in row.values()]
            if quoting == csv.QUOTE_MINIMAL and any(isinstance(value, str) and "\r" in value for value in cells):
                return False
            if place == 0:
                writer.writerow(row)
            writer.writerow(cells)
        if file.tell() == 0:
            file.write("\n")
    return True

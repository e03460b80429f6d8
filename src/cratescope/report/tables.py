"""The numbers of a report as rows, for CSV and HTML."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cratescope.neurons.quality import QUALITIES, matched
from cratescope.neurons.score import CONTROLS
from cratescope.report.paper import PAPER_SCORES
from cratescope.report.results import Results, Row, finite_or_none, one_per_run, protocols, untrained_copy
from cratescope.report.text import finite
from cratescope.run import atomic_path

_MEANS = ("mean", "standard_error", "low", "high")
_COUNTS = ("n_scored", "n_none", "n_dead", "n_neurons")


def paper_score(item: Results, protocol: str, layer: int | None = None) -> float | None:
    """The paper's score x100 of a layer, or of the mean over layers; None where the paper has no such model."""
    comparable = item.plain and not item.untrained
    entry = PAPER_SCORES.get(protocol, {}).get(item.preset, {}) if comparable else {}
    if layer is None:
        return entry.get("mean")
    layers = entry.get("layers", ())
    return layers[layer] if layer < len(layers) else None


def score_rows(results: Sequence[Results]) -> list[Row]:
    """One row a model, protocol, measure and layer, and one with layer "mean".

    Scores are plain, `paper` is x100. Of every control, and of the untrained copy, there are the score, its standard
    error and the gain over it with its own; low and high are the bootstrap interval of 95 % over neurons.
    """
    rows = []
    for item in results:
        copy = untrained_copy(item, results)
        for protocol, table in item.summary["protocols"].items():
            for measure, part in {table["measure"]: table, **table["measures"]}.items():
                rows += _measure_rows(item, copy, protocol, measure, part)
    return rows


def _measure_rows(item: Results, copy: Results | None, protocol: str, measure: str, table: Row) -> list[Row]:
    start = {
        "model": item.label,
        "family": item.family,
        "preset": item.preset,
        "seed": item.seed,
        "tokens_trained": item.tokens_trained,
        "site": item.site,
        "explainer": item.summary["explainer"],
        "simulator": item.summary["simulator"],
        "protocol": protocol,
        "measure": measure,
    }
    own = measure == item.measure_of(protocol)
    rows = []
    for place, row in [*enumerate(table["layers"]), (None, table["model"])]:
        layer = "mean" if place is None else row["layer"]
        counts = {
            name: row[name] if place is not None else sum(one[name] for one in table["layers"]) for name in _COUNTS
        }
        rows.append(
            start
            | {"layer": layer}
            | finite_or_none(row, *_MEANS)
            | {name: finite(row.get(name)) for name in ("standard_deviation", "variance_over_layers")}
            | _controls(table, place)
            | _over_copy(row, _same_row(copy, protocol, measure, layer))
            | counts
            | {"paper": paper_score(item, protocol, row.get("layer")) if own else None}
        )
    return rows


def _controls(table: Row, place: int | None) -> Row:
    """Every control's score and the gain over it, in a layer or (None) of the model."""
    row: Row = {}
    for name in CONTROLS:
        control = table["controls"].get(name)
        part = (control["model"] if place is None else control["layers"][place]) if control else {}
        row |= {
            name: finite(part.get("mean")),
            f"{name}_error": finite(part.get("standard_error")),
            f"over_{name}": finite(part.get("gain_mean")),
            f"over_{name}_error": finite(part.get("gain_standard_error")),
        }
    return row


def _same_row(copy: Results | None, protocol: str, measure: str, layer: int | str) -> Row:
    table = copy.summary["protocols"].get(protocol) if copy else None
    if table is None:
        return {}
    part = table if table["measure"] == measure else table["measures"].get(measure)
    if part is None:
        return {}
    return part["model"] if layer == "mean" else next((row for row in part["layers"] if row["layer"] == layer), {})


def _over_copy(row: Row, copy: Row) -> Row:
    """The untrained copy's score and the gain over it; its neurons are others, so the errors add in squares."""
    own, other = ([finite(part.get(name)) for name in ("mean", "standard_error")] for part in (row, copy))
    gain = None if own[0] is None or other[0] is None else own[0] - other[0]
    error = None if own[1] is None or other[1] is None else math.hypot(own[1], other[1])
    return {"untrained": other[0], "untrained_error": other[1], "over_untrained": gain, "over_untrained_error": error}


def neuron_rows(results: Sequence[Results]) -> list[Row]:
    """One row a neuron explained or scored: ids, explanation, each protocol's own measure, interval and controls."""
    names = protocols(results)
    rows = []
    for item in results:
        for neuron in sorted({key[0] for key in item.scores} | item.explanations.keys()):
            activity = item.activity.get(neuron)
            row: Row = {"model": item.label, "site": item.site, "layer": neuron.layer, "index": neuron.index}
            row["explanation"] = item.explanations.get(neuron)
            for name in names:
                there = name in item.summary["protocols"]
                score = item.score(neuron, name) if there else None
                row |= {f"{name}_score": score and score.value, f"{name}_low": score and score.low}
                row[f"{name}_high"] = score and score.high
                for control in CONTROLS:
                    null = item.score(neuron, name, control) if there else None
                    row[f"{name}_{control}"] = null and null.value
            row["density"] = finite(activity.density) if activity else None
            row["maximum"] = finite(activity.maximum) if activity else None
            rows.append(row)
    return rows


def activity_rows(results: Sequence[Results]) -> list[Row]:
    """One row a model and layer, and one with layer "mean": how often its neurons, all of them, are not zero.

    active: fraction of non-zero activations among all neurons and tokens; median_density: of the single neurons.
    """
    return [row for item in results for row in _activity_rows(item)]


def _start(item: Results) -> Row:
    start = {"model": item.label, "family": item.family, "preset": item.preset, "seed": item.seed}
    return start | {"tokens_trained": item.tokens_trained, "site": item.site}


def _activity_rows(item: Results) -> list[Row]:
    start = _start(item)
    rows = []
    for layer in item.layers:
        densities = item.densities(layer)
        rows.append(
            start
            | {"layer": layer, "active": statistics.fmean(densities), "median_density": statistics.median(densities)}
            | {"n_dead": densities.count(0), "n_neurons": len(densities)}
        )
    names = ("active", "median_density")
    mean = {name: statistics.fmean(row[name] for row in rows) for name in names}
    counts = {name: sum(row[name] for row in rows) for name in ("n_dead", "n_neurons")}
    return [*rows, start | {"layer": "mean"} | mean | counts]


def quality_rows(results: Sequence[Results]) -> list[Row]:
    """Activation quality: one row a model and layer, and one with layer "mean"; and how many explanations differ."""
    rows = []
    for item in results:
        if item.quality is None:
            continue
        for row in [*item.quality["layers"], {"layer": "mean"} | item.quality["model"]]:
            numbers = {name: row[name] for name in ("density", *QUALITIES)}
            errors = {f"{name}_error": row.get(f"{name}_error") for name in QUALITIES}
            distinct = item.summary["distinct_explanations"].get(str(row["layer"]))
            rows.append(_start(item) | {"layer": row["layer"]} | numbers | errors | {"distinct_explanations": distinct})
    return rows


def matched_rows(results: Sequence[Results]) -> list[Row]:
    """Activation quality of CRATE and GPT-2 at matched density: a row a pair of runs of one seed, and layer."""
    rows = []
    for crate in (item for item in results if item.family == "crate" and item.plain and item.quality):
        for gpt2 in (item for item in results if item.family == "gpt2" and item.plain and item.quality):
            alike = [(item.matter, item.seed, item.tokens_trained) for item in (crate, gpt2)]
            if alike[0] == alike[1]:
                rows += [_matched(crate, gpt2, layer) for layer in crate.layers if layer in gpt2.layers]
    return rows


def _matched(crate: Results, gpt2: Results, layer: int) -> Row:
    ours, theirs = _columns(crate, layer), _columns(gpt2, layer)
    row: Row = {"crate": crate.label, "gpt2": gpt2.label, "layer": layer}
    for name in QUALITIES:
        found = matched(ours, theirs, name) or {"a": None, "b": None, "n": 0}
        row |= {f"crate_{name}": found["a"], f"gpt2_{name}": found["b"], f"{name}_n": found["n"]}
    return row


def _columns(item: Results, layer: int) -> Row:
    """The per-neuron numbers of one layer."""
    assert item.quality is not None
    columns = item.quality["neurons"]
    places = [place for place, found in enumerate(columns["layer"]) if found == layer]
    return {name: [values[place] for place in places] for name, values in columns.items()}


def sanity_rows(results: Sequence[Results]) -> list[Row]:
    """The missing-label and extra-label tests of every run's own neurons."""
    return [{"model": item.label} | row for item in results for row in item.summary.get("sanity", ())]


def loss_rows(results: Sequence[Results]) -> list[Row]:
    """The loss curves and the final evaluation of every run, in nats a token, one row a point."""
    rows = []
    for item in one_per_run(results):
        for row in item.metrics:
            kind = "validation" if "validation_loss" in row else "train"
            loss = row["validation_loss"] if kind == "validation" else row.get("loss")
            error = row.get("validation_standard_error")
            rows.append(_loss_row(item, kind, row["step"], row["tokens"], loss, error))
        final, run = item.evaluation, item.manifest
        last = _loss_row(item, "final", run.get("steps"), item.tokens_trained, final["loss"], final["standard_error"])
        rows.append(last | finite_or_none(final, "perplexity", "bits_per_byte", "unigram_entropy"))
    return rows


def _loss_row(
    item: Results, kind: str, step: int | None, tokens: int | None, loss: float | None, error: float | None
) -> Row:
    row: Row = {"model": item.run.name, "kind": kind, "step": step, "tokens": tokens}
    row |= {"loss": finite(loss), "standard_error": finite(error)}
    return row | {"perplexity": None, "bits_per_byte": None, "unigram_entropy": None}


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")
"""What makes a spreadsheet run a cell (Japanese ones take the wide signs too), and what `csv_cell` puts before it."""


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, after an apostrophe; everything else as it is.

    A text that begins with an apostrophe gets another, so the text is what stands after the first one.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal keys with full precision; a missing number is an empty cell. See `csv_cell` for texts."""
    cells = [{name: csv_cell(value) for name, value in row.items()} for row in rows]
    # The library quotes no carriage return, at which readers then end the row.
    returns = any(isinstance(value, str) and "\r" in value for row in cells for value in row.values())
    quoting: Any = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        names = list(rows[0]) if rows else []
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(cells)

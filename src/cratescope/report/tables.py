"""The numbers of a report: what the runs' files say, as rows for CSV and HTML, and what may be said of them."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratescope.config import ReportConfig
from cratescope.neurons.records import Histogram, NeuronId, Score, layer_file, read_explanations, read_scores
from cratescope.run import Run, UserError, atomic_path, read_json, read_jsonl, slug

Row = dict[str, Any]

_BARS = " ▁▂▃▄▅▆▇█"

FAMILIES = {"crate": "CRATE", "gpt2": "GPT-2"}
NATIVE_SITES = {"codes", "mlp"}

# Bai & Ma 2025 (arXiv 2410.16443), x100: mean and population variance over layers, and the layers where printed.
# Read as printed: for S and B the means leave out the last layer.
PAPER_SOURCE = "Bai & Ma, CPAL 2025, arXiv 2410.16443"
PAPER_TOKENS = 157e9
PAPER_SCORES: dict[str, dict[str, dict[str, Any]]] = {
    "top-and-random": {
        "crate-1l": {"mean": 3.9, "variance": 0.0, "layers": (3.9,)},
        "crate-2l": {"mean": 8.05, "variance": 0.06, "layers": (7.8, 8.3)},
        "crate-3l": {"mean": 9.1, "variance": 0.26, "layers": (9.6, 9.3, 8.4)},
        "crate-s": {"mean": 7.96, "variance": 2.29, "layers": (10.5, 7.4, 5.8, 8.0, 8.1, 5.7)},
        "crate-b": {
            "mean": 6.8,
            "variance": 7.09,
            "layers": (13.6, 8.2, 6.7, 5.4, 5.0, 7.2, 5.1, 5.1, 3.6, 5.5, 9.4, 5.3),
        },
        "gpt2-1l": {"mean": 8.8, "variance": 0.0, "layers": (8.8,)},
        "gpt2-2l": {"mean": 4.2, "variance": 0.01, "layers": (4.3, 4.1)},
        "gpt2-3l": {"mean": 3.57, "variance": 7.51, "layers": (7.3, 0.8, 2.6)},
        "gpt2-s": {"mean": 5.4, "variance": 20.85, "layers": (13.7, 5.2, 1.9, 0.6, 5.6, 6.9)},
        "gpt2-b": {
            "mean": 6.34,
            "variance": 11.35,
            "layers": (15.3, 8.0, 6.4, 4.2, 3.2, 4.0, 4.7, 3.9, 3.9, 7.2, 8.9, 8.0),
        },
    },
    "random-only": {
        "crate-1l": {"mean": 4.8, "variance": 0.0, "layers": (4.8,)},
        "crate-2l": {"mean": 6.95, "variance": 1.1},
        "crate-3l": {"mean": 8.43, "variance": 1.2},
        "crate-s": {"mean": 6.36, "variance": 1.87},
        "crate-b": {"mean": 5.12, "variance": 2.83},
        "gpt2-1l": {"mean": 8.9, "variance": 0.0, "layers": (8.9,)},
        "gpt2-2l": {"mean": 1.95, "variance": 0.12},
        "gpt2-3l": {"mean": 1.37, "variance": 1.93},
        "gpt2-s": {"mean": 3.14, "variance": 18.39},
        "gpt2-b": {"mean": 2.67, "variance": 7.48},
    },
}


@dataclass(frozen=True)
class Activity:
    """How often (fraction of tokens) and how strongly a neuron was active on the collected text."""

    density: float
    maximum: float


@dataclass(frozen=True, eq=False)
class Results:
    """All that was measured on one run at one site, except the windows of text."""

    run: Run
    site: str
    label: str
    manifest: Row
    evaluation: Row
    metrics: list[Row]
    summary: Row
    values: dict[tuple[NeuronId, str, str], float | None]
    explanations: dict[NeuronId, str]
    activity: dict[NeuronId, Activity]

    @property
    def family(self) -> str:
        return self.manifest["family"]

    @property
    def preset(self) -> str:
        return self.manifest["preset"]

    @property
    def size(self) -> str:
        """The preset without its family: `2l` of `crate-2l`."""
        return self.preset.rpartition("-")[2]

    @property
    def made_with(self) -> dict[str, Any]:
        """How records, explanations and simulations were made: `explanations.llm`, `records.excerpts` and so on."""
        return dict(_flat(self.summary.get("made_with", {})))

    @property
    def layers(self) -> list[int]:
        """The layers scored with any protocol."""
        return sorted({row["layer"] for protocol in self.summary["protocols"].values() for row in protocol["layers"]})

    @property
    def plain(self) -> bool:
        """Is it the preset as the paper has it, looked at where the paper looks?"""
        return self.site in NATIVE_SITES and not self.manifest.get("settings", {}).get("crate")

    def densities(self, layer: int) -> list[float]:
        """Fraction of tokens on which each neuron of a layer is not zero, in index order."""
        return [self.activity[neuron].density for neuron in sorted(self.activity) if neuron.layer == layer]

    def ranking(self, protocol: str, layer: int) -> list[NeuronId]:
        """The neurons of a layer that have a score, best first; equal scores in index order."""
        found = [
            (-value, neuron)
            for (neuron, name, control), value in self.values.items()
            if name == protocol and control == "none" and neuron.layer == layer and value is not None
        ]
        return [neuron for _, neuron in sorted(found)]


def _flat(settings: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names, without hashes and without the copy of the records' in the explanations'."""
    for name, value in settings.items():
        if isinstance(value, dict):
            if not (prefix and name == "records"):
                yield from _flat(value, f"{prefix}{name}.")
        elif not name.endswith("sha256"):
            yield f"{prefix}{name}", Path(value).name if str(value).startswith("/") else value


def load_results(config: ReportConfig) -> list[Results]:
    """Read every run of the report, one `Results` a run and scored site.

    Raises:
        UserError: no run, two runs of one name, or a run whose evaluation, records or scores are missing.
    """
    if not config.runs:
        raise UserError(
            "no run directory given; name at least one, such as `cratescope report runs/crate-2l --out report`"
        )
    runs = [Run(path) for path in config.runs]
    for name in (names := [run.name for run in runs]):
        if names.count(name) > 1:
            raise UserError(
                f"two run directories are called {name!r}; rename one, so that the report can tell them apart"
            )
    return [item for run in runs for item in _load_run(run, config)]


def _load_run(run: Run, config: ReportConfig) -> list[Results]:
    manifest = run.read_manifest()
    if not run.evaluation.exists():
        raise UserError(f"{run.evaluation}: no such file; run `cratescope evaluate {run.root}` first")
    summaries = _summaries(run, config)
    evaluation, metrics = read_json(run.evaluation), read_jsonl(run.metrics)
    found = []
    for path in summaries:
        site = path.parents[2].name
        summary = read_json(path)
        layers = {row["layer"] for protocol in summary["protocols"].values() for row in protocol["layers"]}
        explanations = read_explanations(run.explanations(site, config.explainer))
        found.append(
            Results(
                run=run,
                site=site,
                label=run.name if len(summaries) == 1 else f"{run.name} · {site}",
                manifest=manifest,
                evaluation=evaluation,
                metrics=metrics,
                summary=summary,
                values=_by_neuron(read_scores(path.with_name("scores.jsonl"))),
                explanations={neuron: item.text for neuron, item in explanations.items()},
                activity=_read_activity(run.records(site), sorted(layers)),
            )
        )
    return found


def _summaries(run: Run, config: ReportConfig) -> list[Path]:
    """The summary.json of every site scored with the report's explainer and simulator."""
    folder = run.root / "scores"
    found = sorted(folder.glob(f"*/{slug(config.explainer)}/{slug(config.simulator)}/summary.json"))
    if found:
        return found
    missing = folder / "*" / slug(config.explainer) / slug(config.simulator) / "summary.json"
    command = f"cratescope score {run.root} --explainer {config.explainer} --simulator {config.simulator}"
    others = sorted({"/".join(path.parts[-3:-1]) for path in folder.glob("*/*/*/summary.json")})
    hint = f" (scored so far, as explainer/simulator: {', '.join(others)})" if others else ""
    raise UserError(f"{missing}: no such file; run `{command}` first{hint}")


def _by_neuron(scores: Iterable[Score]) -> dict[tuple[NeuronId, str, str], float | None]:
    return {(score.neuron, score.protocol, score.control): finite(score.value) for score in scores}


def _read_activity(folder: Path, layers: Sequence[int]) -> dict[NeuronId, Activity]:
    """Density and maximum of every neuron; only these columns are read, the windows are a thousand times larger."""
    found: dict[NeuronId, Activity] = {}
    for path in (layer_file(folder, layer) for layer in layers):
        if not path.exists():
            raise UserError(f"{path}: no such file; run `cratescope collect` first")
        try:
            table = pq.read_table(path, columns=["model", "site", "layer", "index", "density", "maximum"])
        except pa.ArrowException as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run `cratescope collect`") from error
        for row in table.to_pylist():
            activity = Activity(row.pop("density"), row.pop("maximum"))
            found[NeuronId(**row)] = activity
    return found


def finite(value: float | None) -> float | None:
    """`value`, or None where there is no number."""
    return value if value is not None and math.isfinite(value) else None


def protocols(results: Sequence[Results]) -> list[str]:
    """Every protocol of any run, in the order the runs name them."""
    return list(dict.fromkeys(name for item in results for name in item.summary["protocols"]))


def paper_score(item: Results, protocol: str, layer: int | None = None) -> float | None:
    """The paper's score x100 of a layer, or of the mean over layers; None where the paper has no such model."""
    comparable = item.plain and item.manifest["tokens_trained"]
    entry = PAPER_SCORES.get(protocol, {}).get(item.preset, {}) if comparable else {}
    if layer is None:
        return entry.get("mean")
    layers = entry.get("layers", ())
    return layers[layer] if layer < len(layers) else None


_MEASURES = ("mean", "standard_error", "null_mean", "null_standard_error", "gain_mean", "gain_standard_error")
_COUNTS = ("n_scored", "n_none", "n_dead", "n_neurons")


def score_rows(results: Sequence[Results]) -> list[Row]:
    """One row a model, protocol and layer, and one with layer "mean"; scores are plain r, `paper` is x100."""
    return [row for item in results for name in item.summary["protocols"] for row in _protocol_rows(item, name)]


def _protocol_rows(item: Results, protocol: str) -> list[Row]:
    table = item.summary["protocols"][protocol]
    start = {
        "model": item.label,
        "family": item.family,
        "preset": item.preset,
        "seed": item.manifest["seed"],
        "tokens_trained": item.manifest["tokens_trained"],
        "site": item.site,
        "explainer": item.summary["explainer"],
        "simulator": item.summary["simulator"],
        "protocol": protocol,
    }
    rows = [
        start
        | {"layer": layer["layer"]}
        | {name: finite(layer[name]) for name in _MEASURES}
        | {"standard_deviation": finite(layer["standard_deviation"]), "variance_over_layers": None}
        | {name: layer[name] for name in _COUNTS}
        | {"paper": paper_score(item, protocol, layer["layer"])}
        for layer in table["layers"]
    ]
    mean = (
        start
        | {"layer": "mean"}
        | {name: finite(table["model"][name]) for name in _MEASURES}
        | {"standard_deviation": None, "variance_over_layers": finite(table["model"]["variance_over_layers"])}
        | {name: sum(layer[name] for layer in table["layers"]) for name in _COUNTS}
        | {"paper": paper_score(item, protocol)}
    )
    return [*rows, mean]


def neuron_rows(results: Sequence[Results]) -> list[Row]:
    """One row a neuron explained or scored: ids, explanation, score and null of each protocol, density, maximum."""
    names = protocols(results)
    rows = []
    for item in results:
        for neuron in sorted({key[0] for key in item.values} | item.explanations.keys()):
            activity = item.activity.get(neuron)
            row: Row = {"model": item.label, "site": item.site, "layer": neuron.layer, "index": neuron.index}
            row["explanation"] = item.explanations.get(neuron)
            for name in names:
                row[f"{name}_score"] = item.values.get((neuron, name, "none"))
                row[f"{name}_null"] = item.values.get((neuron, name, "shuffled"))
            row["density"] = finite(activity.density) if activity else None
            row["maximum"] = finite(activity.maximum) if activity else None
            rows.append(row)
    return rows


def activity_rows(results: Sequence[Results]) -> list[Row]:
    """One row a model and layer, and one with layer "mean": how often its neurons, all of them, are not zero.

    active: fraction of non-zero activations among all neurons and tokens; median_density: of the single neurons.
    """
    return [row for item in results for row in _activity_rows(item)]


def _activity_rows(item: Results) -> list[Row]:
    start = {"model": item.label, "family": item.family, "preset": item.preset, "seed": item.manifest["seed"]}
    start |= {"tokens_trained": item.manifest["tokens_trained"], "site": item.site}
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
        last = _loss_row(item, "final", run["steps"], run["tokens_trained"], final["loss"], final["standard_error"])
        rows.append(last | {name: finite(final[name]) for name in ("perplexity", "bits_per_byte", "unigram_entropy")})
    return rows


def _loss_row(item: Results, kind: str, step: int, tokens: int, loss: float | None, error: float | None) -> Row:
    row: Row = {"model": item.run.name, "kind": kind, "step": step, "tokens": tokens}
    row |= {"loss": finite(loss), "standard_error": finite(error)}
    return row | {"perplexity": None, "bits_per_byte": None, "unigram_entropy": None}


def one_per_run(results: Sequence[Results]) -> list[Results]:
    """One entry a run, where a run was scored at several sites."""
    return list({item.run.root: item for item in reversed(results)}.values())[::-1]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal keys with full precision; a missing number is an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Side:
    """One family's runs in a comparison, as mean over runs; plain r and nats.

    The standard error is over seeds when there are at least two runs, and over neurons when there is one.
    """

    runs: int
    neurons: int
    mean: float | None
    standard_error: float | None
    gain: float | None
    gain_standard_error: float | None
    loss: float | None


@dataclass(frozen=True)
class Comparison:
    """CRATE against GPT-2 of one size, on the same data, context and number of training tokens."""

    size: str
    tokens_trained: int
    protocol: str
    crate: Side
    gpt2: Side

    @property
    def difference(self) -> float | None:
        return _combine(self.crate.mean, self.gpt2.mean, lambda a, b: a - b)

    @property
    def standard_error(self) -> float | None:
        return _combine(self.crate.standard_error, self.gpt2.standard_error, math.hypot)

    @property
    def gain_difference(self) -> float | None:
        return _combine(self.crate.gain, self.gpt2.gain, lambda a, b: a - b)

    @property
    def gain_standard_error(self) -> float | None:
        return _combine(self.crate.gain_standard_error, self.gpt2.gain_standard_error, math.hypot)

    @property
    def beyond_noise(self) -> bool:
        """Is the difference more than two of its standard errors?"""
        difference, error = self.difference, self.standard_error
        return difference is not None and error is not None and abs(difference) > 2 * error


def _combine(a: float | None, b: float | None, function: Callable[[float, float], float]) -> float | None:
    return None if a is None or b is None else function(a, b)


def comparisons(results: Sequence[Results]) -> list[list[Comparison]]:
    """What the runs allow: one list a pair of unaltered presets that differ in family only, one entry a protocol."""
    groups: dict[tuple[Any, ...], dict[str, list[Results]]] = {}
    for item in (item for item in results if item.plain):
        run = item.manifest
        data = run["data"]["manifest_sha256"]
        # Scores by another language model or on other records are not comparable; the site differs by family.
        made_with = str([pair for pair in item.made_with.items() if not pair[0].endswith("site")])
        key = (run["n_layer"], item.size, run["tokens_trained"], run["context"], data, made_with)
        groups.setdefault(key, {}).setdefault(item.family, []).append(item)
    shared = [(key, sides) for key, sides in groups.items() if sides.keys() >= {"crate", "gpt2"}]
    shared.sort(key=lambda group: (group[0][2] == 0, group[0]))  # untrained controls last
    return [_compare(key, sides, protocols(results)) for key, sides in shared]


def _compare(key: tuple[Any, ...], sides: dict[str, list[Results]], names: Sequence[str]) -> list[Comparison]:
    everyone = [item for side in sides.values() for item in side]
    return [
        Comparison(key[1], key[2], name, _side(sides["crate"], name), _side(sides["gpt2"], name))
        for name in names
        if all(name in item.summary["protocols"] for item in everyone)
    ]


def _side(items: Sequence[Results], protocol: str) -> Side:
    # Seeds are the unit of replication, so a second run of a seed (the first given stays) is none.
    items = list({item.manifest["seed"]: item for item in reversed(items)}.values())[::-1]
    tables = [item.summary["protocols"][protocol] for item in items]
    mean, error = _over_runs(tables, "mean", "standard_error")
    gain, gain_error = _over_runs(tables, "gain_mean", "gain_standard_error")
    losses = [loss for item in items if (loss := finite(item.evaluation["loss"])) is not None]
    neurons = sum(layer["n_scored"] for table in tables for layer in table["layers"])
    return Side(len(items), neurons, mean, error, gain, gain_error, statistics.fmean(losses) if losses else None)


def _over_runs(tables: Sequence[Row], mean: str, error: str) -> tuple[float | None, float | None]:
    """Mean over runs and its standard error; with one run only the neurons can say how far it is off."""
    models = [table["model"] for table in tables if finite(table["model"][mean]) is not None]
    values = [model[mean] for model in models]
    if len(values) < 2:
        return (values[0], finite(models[0][error])) if values else (None, None)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def headline(pairs: Sequence[Comparison]) -> str:
    """One sentence for the comparisons of one size: what was measured, and whether it stands out of the noise."""
    first = pairs[0]
    trained = f"after {count(first.tokens_trained)} training tokens" if first.tokens_trained else "untrained"
    parts = [
        f"{number(pair.crate.mean)} ± {number(pair.crate.standard_error)} on {pair.protocol} against "
        f"{number(pair.gpt2.mean)} ± {number(pair.gpt2.standard_error)} for GPT-2 "
        f"(difference {number(pair.difference, sign=True)} ± {number(pair.standard_error)})"
        for pair in pairs
    ]
    beyond = [pair.protocol for pair in pairs if pair.beyond_noise]
    verdict = "No difference exceeds"
    if beyond:
        verdict = f"The difference{'s' * (len(beyond) > 1)} on {' and '.join(beyond)} exceed{'s' * (len(beyond) < 2)}"
    text = f"At size {first.size.upper()}, {trained}, CRATE's neurons score {', and '.join(parts)}. "
    return f"{text}{verdict} two standard errors.".replace(" ± ", "\u00a0±\u00a0")


def caveats(results: Sequence[Results], pairs: Sequence[Comparison]) -> list[str]:
    """What the reader must know before believing the headline, from the numbers."""
    notes = []
    if not pairs:
        notes.append(
            "There is no CRATE and GPT-2 pair of the same size, data, context and training tokens here, "
            "so the report makes no comparison."
        )
    elif min(min(pair.crate.runs, pair.gpt2.runs) for pair in pairs) < 2:
        notes.append(
            "Seeds are the unit of replication: where a side has one training run, the standard error counts only "
            "which neurons were drawn, not how another seed would have turned out, and cannot settle which family "
            "is ahead."
        )
    else:
        fewest = min(min(pair.crate.runs, pair.gpt2.runs) for pair in pairs)
        notes.append(
            f"Standard errors are over training seeds, at least {fewest} a side; about 5 are needed to trust them."
        )
    if pairs:
        neurons = min(min(pair.crate.neurons, pair.gpt2.neurons) for pair in pairs)
        notes.append(f"Each mean rests on {neurons:,} scored neurons or more.")
    unmatched = next((pair for pair in pairs if pair.tokens_trained and pair.crate.loss and pair.gpt2.loss), None)
    if unmatched is not None:
        notes.append(
            f"The models are matched in tokens, not in loss: {unmatched.crate.loss:.2f} nats for CRATE and "
            f"{unmatched.gpt2.loss:.2f} for GPT-2 at size {unmatched.size.upper()}."
        )
    most = max(item.manifest["tokens_trained"] for item in results)
    if 0 < most < PAPER_TOKENS:
        notes.append(
            f"The longest run here read {count(most)} tokens; the paper's Base runs read about {count(PAPER_TOKENS)}, "
            f"{PAPER_TOKENS / most:,.0f} times as many, and its explainer and simulator have 7B parameters."
        )
    if all(item.manifest["tokens_trained"] for item in results):
        notes.append("No untrained model is among the runs; untrained neurons can score above zero too, so add one.")
    return notes


def number(value: float | None, digits: int = 1, scale: float = 100, sign: bool = False) -> str:
    """`value` times `scale` for a reader, with a true minus sign; a dash where there is no number."""
    shown = finite(value)
    if shown is None:
        return "–"
    text = f"{shown * scale:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "−")


def percent(fraction: float | None) -> str:
    """A fraction for a reader, with more digits when it is small."""
    small = finite(fraction) is not None and 0 < (fraction or 0) < 0.01
    return f"{number(fraction, 3 if small else 1)} %"


def count(value: float) -> str:
    """A large number for a reader: 1.84M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


# Control characters would break the page or not be seen: show their pictures.
_VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32)}
_VISIBLE |= {0x7F: 0x2421, ord("\n"): "↵", ord("\t"): "⇥", ord("\r"): "␍"}


def visible(token: str) -> str:
    """`token` with its line breaks, tabs and control characters shown, and as dots when it is only spaces."""
    return token.translate(_VISIBLE) if token.strip(" ") else "·" * len(token) or "∅"


def sparkline(histogram: Histogram, maximum: float, bins: int) -> str:
    """Bars for `bins` equal intervals from the lowest edge to `maximum`, by the logarithm of their tokens.

    A bin of the histogram that spans several intervals is spread over them evenly.
    """
    ends = np.stack([histogram.low, histogram.high], 1).reshape(-1)
    ends = np.minimum(np.nan_to_num(ends), maximum)  # far outside of half precision bins are endless
    total = np.cumsum(histogram.count)
    below = np.stack([total - histogram.count, total], 1).reshape(-1)
    at_edges = np.interp(np.linspace(ends[0], maximum, bins + 1), ends, below)
    at_edges[0] = 0
    heights = np.log1p(np.diff(at_edges))
    return "".join(_BARS[step] for step in np.ceil(heights / heights.max() * (len(_BARS) - 1)).astype(int))

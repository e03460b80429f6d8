"""One self-contained HTML page about some runs, with its numbers as CSV and JSON and its figures next to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined, Template, Undefined
from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerFast

from cratescope.config import ReportConfig
from cratescope.neurons.quality import QUALITIES
from cratescope.neurons.records import (
    ActivationRecord,
    NeuronId,
    NeuronRecord,
    Score,
    Simulation,
    layer_file,
    neuron_file,
    read_records,
    read_simulation,
)
from cratescope.neurons.score import CONTROLS, OWN
from cratescope.report import text, verdict
from cratescope.report.figures import arm_places, draw_figures
from cratescope.report.text import visible
from cratescope.results import compare, tables
from cratescope.results.compare import DETECTABLE, UNTRAINED, Comparison, Quantity
from cratescope.results.estimates import Estimate, finite
from cratescope.results.runs import Results, Row, load_results, one_per_run, protocols
from cratescope.results.scores import measures_of
from cratescope.run import UserError, locked, made_from, read_json, write_json, write_text

Decode = Callable[[Sequence[int]], list[str]]

TOP_EXCERPTS = 3
RANDOM_EXCERPTS = 1
SCORED_EXCERPTS = 3  # of the top and of the random ones each
HISTOGRAM_BINS = 32
VERSION = 2
"""Of the page: raise it when the same results look different."""
CSV = ("scores", "neurons", "losses", "activity", "quality", "matched", "sanity")


@dataclass(frozen=True)
class Excerpt:
    """A window of text as HTML, with a label that names its origin."""

    label: str
    title: str
    text: Markup


@dataclass(frozen=True)
class Said:
    """One explanation set's phrase for a neuron, how well it predicts the neuron, and on which text."""

    explained: str
    text: str
    scores: list[tuple[Score, dict[str, float | None]]]
    scored: list[Excerpt]
    shuffled: str | None


@dataclass(frozen=True)
class Card:
    """One neuron as the page shows it."""

    neuron: NeuronId
    rank: int
    said: list[Said]
    density: float | None
    maximum: float | None
    histogram: str
    excerpts: list[Excerpt]


@dataclass(frozen=True)
class Group:
    """The cards of one layer of one model, and the neurons left out of the ranking."""

    results: Results
    layer: int
    mean: Estimate
    unscored: str
    ranked: int
    distinct: int
    cards: list[Card]


def report(config: ReportConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write the report of `config.runs` to `config.out` and return the path of its report.html.

    The runs' own tokenizers are read from their model folders unless `tokenizer` is given. A report made from the
    same files is kept.

    Raises:
        UserError: a run has no evaluation, records, simulations or scores; names the file and the command.
    """
    inputs, stamp, page = _made_from(config), config.out / "report.json", config.out / "report.html"
    outputs = ("report.html", "scores.json", "figures", *(f"{name}.csv" for name in CSV))
    if all((config.out / name).exists() for name in outputs) and stamp.exists() and read_json(stamp) == inputs:
        return page
    with locked(config.out, "report"):
        write_text(page, _page(config, tokenizer))
        write_json(stamp, inputs)
    return page


def _made_from(config: ReportConfig) -> dict[str, str]:
    """Identity of the report: every number and text that it shows, and the settings."""
    inputs = ["run.json", "evaluation.json", "metrics.jsonl", "scores/*/*.json", "scores/*/*/*/scores.json*"]
    inputs.append("simulations/*/*/*/*/manifest.json")
    files = [path for run in config.runs for pattern in inputs for path in sorted(run.glob(pattern))]
    settings = {name: value for name, value in vars(config).items() if name != "out"}
    return made_from((path for path in files if path.is_file()), Path(), version=VERSION, **settings)


def _page(config: ReportConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Render the HTML; numbers and figures are written along the way."""
    primary = Quantity.parse(config.primary)
    results = load_results(config)
    pair = compare.sides(results, config.compare)
    compared = [pairs for pairs in compare.comparisons(results, primary, pair or ()) if pairs]
    groups = [group for item in results for group in _groups(item, config, _decoder(item, tokenizer))]
    numbers = _write_numbers(config.out, results, compared, pair)
    figures = draw_figures(results, config.out / "figures")
    places = arm_places(results)
    return _template().render(
        config=config,
        explainer=Path(config.explainer).name if Path(config.explainer).is_absolute() else config.explainer,
        results=results,
        runs=one_per_run(results),
        compared=compared,
        caveats=verdict.caveats(results, compared, primary),
        protocols=protocols(results),
        score_tables=_score_tables(results, numbers["scores"]),
        other_measures=[row for row in numbers["scores"] if row["layer"] == "mean" and not _own(row)],
        activity_table=[(item, {row["layer"]: row for row in tables.activity_rows([item])}) for item in results],
        quality=numbers["quality"],
        matched=numbers["matched"],
        matched_titles=_titles(results, pair),
        sanity=_sanity_table(numbers["sanity"]),
        figures={name: Markup(svg) for name, svg in figures.items()},
        groups=groups,
        prompts=_prompts(results),
        hue={item.label: f"arm{places[item.arm.name]}" for item in results},
        arms={item.arm.title: f"arm{places[item.arm.name]}" for item in results},
    )


def _titles(results: Sequence[Results], pair: tuple[str, str] | None) -> list[str]:
    titles = {item.arm.name: item.arm.title for item in results}
    return [titles[name] for name in pair or ()]


def _own(row: Row) -> bool:
    """Whether the row's measure is the one its protocol names first."""
    return row["measure"] == measures_of(row["protocol"])[0]


def _write_numbers(
    out: Path,
    results: Sequence[Results],
    compared: Sequence[Sequence[Comparison]],
    pair: tuple[str, str] | None,
) -> dict[str, list[Row]]:
    """The rows of every CSV file, by its name; scores.json holds the comparisons as well."""
    rows = {
        "scores": tables.score_rows(results),
        "neurons": tables.neuron_rows(results),
        "losses": tables.loss_rows(results),
        "activity": tables.activity_rows(results),
        "quality": tables.quality_rows(results),
        "matched": tables.matched_rows(results, pair),
        "sanity": tables.sanity_rows(results),
    }
    for name in CSV:
        tables.write_csv(out / f"{name}.csv", rows[name])
    pairs = [tables.comparison_row(pair) for group in compared for pair in group]
    kept = ("scores", "activity", "quality", "matched", "sanity")
    write_json(out / "scores.json", {name: rows[name] for name in kept} | {"comparisons": pairs})
    return rows


def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": text.number, "count": text.count, "visible": visible, "span": _span}
    environment.filters |= {"percent": text.percent, "known": _known}
    environment.globals |= {
        "headline": verdict.headline,
        "duration": _duration,
        "count": text.count,
        "thousands": "{:,}".format,
        "controls": CONTROLS,
        "nulls": (*CONTROLS, UNTRAINED),
        "qualities": QUALITIES,
        "detectable": DETECTABLE,
        "paper_source": tables.paper()["source"],
    }
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _span(value: float | None, error: float | None, digits: int = 1, scale: float = 100) -> Markup:
    """Format `value ± error`, or a dash when there is no value."""
    if finite(value) is None:
        return Markup("–")
    shown, spread = text.number(value, digits, scale), text.number(error, digits, scale)
    return Markup('{}<span class="se"> ± {}</span>').format(shown, spread)


def _known(value: Any, shown: Callable[[Any], str] = str) -> str:
    """Format `value` with `shown`, or a dash if it is unknown, as with an adopted model's training."""
    return "–" if value is None or isinstance(value, Undefined) else shown(value)


def _duration(seconds: float | None) -> str:
    if finite(seconds) is None:
        return "–"
    minutes, rest = divmod(round(seconds or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _score_tables(results: Sequence[Results], rows: Sequence[Row]) -> dict[str, list[tuple[Results, list[Row]]]]:
    """By protocol: for each model that was scored with it, the rows of its layers and their mean, own measure."""
    return {
        name: [
            (item, [row for row in rows if (row["model"], row["protocol"]) == (item.label, name) and _own(row)])
            for item in results
            if name in item.scores.protocols
        ]
        for name in protocols(results)
    }


def _sanity_table(rows: Sequence[Row]) -> list[Row]:
    """One row per protocol and measure: for each test, the smallest fraction over runs of neurons whose score fell."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["sample"], row["measure"]), []).append(row)
    return [
        {
            "sample": sample,
            "measure": measure,
            "missing": min(row["missing"] for row in group),
            "extra": min(row["extra"] for row in group),
            "passes": all(row["passes"] for row in group),
            "n_neurons": sum(row["n_neurons"] for row in group),
        }
        for (sample, measure), group in found.items()
    ]


def _prompts(results: Sequence[Results]) -> dict[str, list[tuple[Results, dict[str, Any]]]]:
    """Next-token examples by prompt: one entry per run."""
    found: dict[str, list[tuple[Results, dict[str, Any]]]] = {}
    for item in one_per_run(results):
        for example in item.evaluation.get("examples", ()):
            found.setdefault(example["prompt"], []).append((item, example))
    return found


def _decoder(item: Results, tokenizer: PreTrainedTokenizerFast | None) -> Decode:
    from cratescope.lm.tokenizer import load_tokenizer, token_strings

    if tokenizer is None and not item.run.model.is_dir():
        raise UserError(f"{item.run.model}: no such folder; finish `cratescope train` for {item.run.root} first")
    loaded = tokenizer if tokenizer is not None else load_tokenizer(item.run.model)
    return lambda ids: token_strings(loaded, ids)


def spread(ranking: Sequence[int], cards: int) -> list[tuple[int, int]]:
    """`cards` of the ranking with their ranks from 1, evenly spaced, the best and the worst among them."""
    places = np.linspace(0, len(ranking) - 1, min(cards, len(ranking))).round().astype(int)
    return [(int(place) + 1, ranking[place]) for place in places]


def _groups(item: Results, config: ReportConfig, decode: Decode) -> Iterator[Group]:
    """The cards of every layer, chosen by the first protocol's ranking."""
    protocol = item.scores.protocols[0]
    for layer in sorted(item.scores.rows(protocol)):
        ranking = item.scores.ranking(protocol, layer)
        chosen = spread(ranking, config.cards)
        path = layer_file(item.run.records(item.site), layer)
        records = read_records(path, [index for _, index in chosen]) if chosen else {}
        cards = [_card(item, config, records[index], rank, decode) for rank, index in chosen]
        mean, distinct = item.scores.mean(protocol, layer=layer), item.distinct(item.scores.sets[0], layer)
        yield Group(item, layer, mean, _unscored(item, protocol, layer), len(ranking), distinct, cards)


def _unscored(item: Results, protocol: str, layer: int) -> str:
    """Count the neurons of a layer without a score, by reason, such as `2 without a score (2 dead neuron)`."""
    reasons = item.scores.reasons(protocol, layer)
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    return f"{reasons.total()} without a score" + (f" ({listed})" if listed else "")


def _card(item: Results, config: ReportConfig, record: NeuronRecord, rank: int, decode: Decode) -> Card:
    labelled = [(f"top {place}", window) for place, window in enumerate(record.top[:TOP_EXCERPTS], 1)]
    labelled += [("random", window) for window in record.random[:RANDOM_EXCERPTS]]
    peak = record.moments.maximum
    return Card(
        neuron=record.neuron,
        rank=rank,
        said=[_said(item, config, record, explained, decode) for explained in item.scores.sets],
        density=record.density,
        maximum=peak,
        histogram=text.sparkline(record.histogram, peak, HISTOGRAM_BINS) if record.histogram else "",
        excerpts=[
            Excerpt(label, _place(window), highlight(decode(window.tokens.tolist()), window.activations, peak))
            for label, window in labelled
        ],
    )


def _said(item: Results, config: ReportConfig, record: NeuronRecord, explained: str, decode: Decode) -> Said:
    """An explanation with the scores that were made from it."""
    folder = item.run.simulations(item.site, config.explainer, config.simulator, explained)
    path = neuron_file(folder, record.neuron)
    if not path.exists():
        raise UserError(f"{path}: no such file; run `cratescope simulate {item.run.root}` first")
    simulation = read_simulation(path)
    if any(len(row) != key[-1] for row, key in zip(simulation.expected.get(OWN, ()), simulation.keys, strict=False)):
        raise UserError(f"{path}: damaged (more or fewer values than tokens); delete it and run `cratescope simulate`")
    return Said(
        explained,
        item.text(record.neuron, explained) or "",
        list(_card_scores(item, record.neuron, explained)),
        list(_scored(record, simulation, decode)),
        simulation.texts.get("shuffled"),
    )


def _card_scores(item: Results, neuron: NeuronId, explained: str) -> Iterator[tuple[Score, dict[str, float | None]]]:
    """By each protocol's own measure, with the controls there are."""
    for name in item.scores.protocols:
        own = item.scores.of(neuron, name) if item.scores.set_of(name) == explained else None
        if own is not None:
            nulls = {control: item.scores.of(neuron, name, control) for control in CONTROLS}
            yield own, {control: null.value for control, null in nulls.items() if null is not None}


def _scored(record: NeuronRecord, simulation: Simulation, decode: Decode) -> Iterator[Excerpt]:
    """Scored windows with truth and simulation, each relative to its own largest value on these windows."""
    windows = {window.key: ("top", window) for window in record.top}
    windows |= {window.key: ("random", window) for window in record.random}
    expected = dict(zip(simulation.keys, simulation.expected.get(OWN, ()), strict=False))
    found = [(*windows[key], expected[key]) for key in expected if key in windows]
    peak = max((float(window.activations.max()) for _, window, _ in found), default=0.0)
    height = max((max(row) for *_, row in found), default=0.0)
    for kind in ("top", "random"):
        for label, window, row in [entry for entry in found if entry[0] == kind][:SCORED_EXCERPTS]:
            marked = highlight(decode(window.tokens.tolist()), window.activations, peak, row, height)
            yield Excerpt(label, _place(window), marked)


def _place(window: ActivationRecord) -> str:
    return f"excerpt {window.excerpt}, token {window.start}; highest activation {window.activations.max():.3g}"


def highlight(
    tokens: Sequence[str],
    activations: Float[np.ndarray, " w"],
    peak: float,
    simulated: Sequence[float] | None = None,
    height: float = 1.0,
) -> Markup:
    """Render tokens shaded by activation / peak and underlined by simulated / height, with numbers as tooltips.

    Tokens with nothing to show are <i>, so that a page of silent tokens stays light.
    """
    parts = []
    for place, (token, truth) in enumerate(zip(tokens, activations.tolist(), strict=True)):
        guess = None if simulated is None else simulated[place]
        shades = {"a": _shade(truth, peak), "s": _shade(guess, height)}
        style = ";".join(f"--{name}:{shade}" for name, shade in shades.items() if shade)
        title = f"{truth:.3g}" if guess is None else f"true {truth:.3g}, simulated {guess:.3g}"
        shown = escape(visible(token))
        parts.append(f'<b style="{style}" title="{title}">{shown}</b>' if style else f"<i>{shown}</i>")
    return Markup("".join(parts))


def _shade(value: float | None, full: float) -> str:
    """value / full as CSS opacity with two digits; empty when it would be invisible."""
    if value is None or not math.isfinite(value) or full <= 0 or value / full < 0.005:
        return ""
    return f"{min(value / full, 1):.2f}".removeprefix("0").removesuffix("0")

"""One self-contained HTML page about some runs, with its numbers as CSV and JSON and its figures beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerFast

from cratescope.config import ReportConfig
from cratescope.neurons.records import ActivationRecord, NeuronId, NeuronRecord, layer_file, neuron_file, read_records
from cratescope.report import tables
from cratescope.report.figures import draw_figures
from cratescope.report.tables import Comparison, Results, visible
from cratescope.run import UserError, read_json, sha256, write_json, write_text

Decode = Callable[[Sequence[int]], list[str]]

TOP_EXCERPTS = 3
RANDOM_EXCERPTS = 1
SCORED_EXCERPTS = 3  # of the top and of the random ones each
HISTOGRAM_BINS = 32


@dataclass(frozen=True)
class Excerpt:
    """A window of text as HTML, with a label that says where it is from."""

    label: str
    title: str
    text: Markup


@dataclass(frozen=True)
class Card:
    """One neuron as the page shows it."""

    neuron: NeuronId
    rank: int
    explanation: str
    scores: list[tuple[str, float | None, float | None]]
    density: float | None
    maximum: float | None
    histogram: str
    excerpts: list[Excerpt]
    scored: list[Excerpt]
    null_text: str


@dataclass(frozen=True)
class Group:
    """The cards of one layer of one model, and what was left out of the ranking."""

    results: Results
    layer: int
    row: tables.Row
    ranked: int
    distinct: int | None
    cards: list[Card]


def report(config: ReportConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write the report of `config.runs` to `config.out` and return the path of its report.html.

    The runs' own tokenizers are read from their model folders unless `tokenizer` is given. A report made from the
    same files is kept.

    Raises:
        UserError: a run has no evaluation, records, simulations or scores; names the file and the command.
    """
    made_from, stamp, page = _made_from(config), config.out / "report.json", config.out / "report.html"
    outputs = ("report.html", "scores.csv", "scores.json", "neurons.csv", "losses.csv", "activity.csv", "figures")
    if all((config.out / name).exists() for name in outputs) and stamp.exists() and read_json(stamp) == made_from:
        return page
    write_text(page, _page(config, tokenizer))
    write_json(stamp, made_from)
    return page


def _made_from(config: ReportConfig) -> dict[str, str]:
    """SHA-256 of every number and text that the report shows, of this code, and the settings."""
    inputs = ("run.json", "evaluation.json", "metrics.jsonl", "scores/*/*/*/*.json*", "simulations/*/*/*/manifest.json")
    files = [path for run in config.runs for pattern in inputs for path in sorted(run.glob(pattern))]
    files += sorted(Path(__file__).parent.glob("*.[ph]*"))
    settings = {name: str(value) for name, value in vars(config).items() if name != "out"}
    return settings | {str(path): sha256(path) for path in files if path.is_file()}


def _page(config: ReportConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """The HTML; the numbers and figures are written on the way."""
    results = tables.load_results(config)
    compared = tables.comparisons(results)
    pairs = [pair for group in compared for pair in group]
    groups = [group for item in results for group in _groups(item, config, _decoder(item, tokenizer))]
    _write_numbers(config.out, results, pairs)
    figures = draw_figures(results, config.out / "figures")
    return _template().render(
        config=config,
        explainer=Path(config.explainer).name if Path(config.explainer).is_absolute() else config.explainer,
        results=results,
        runs=tables.one_per_run(results),
        compared=[group for group in compared if group],
        caveats=tables.caveats(results, pairs),
        protocols=tables.protocols(results),
        score_table=_score_table(results),
        activity_table=[(item, {row["layer"]: row for row in tables.activity_rows([item])}) for item in results],
        figures={name: Markup(svg) for name, svg in figures.items()},
        groups=groups,
        prompts=_prompts(results),
        paper_source=tables.PAPER_SOURCE,
    )


def _write_numbers(out: Path, results: Sequence[Results], pairs: Sequence[Comparison]) -> None:
    scores = tables.score_rows(results)
    tables.write_csv(out / "scores.csv", scores)
    activity = tables.activity_rows(results)
    tables.write_csv(out / "activity.csv", activity)
    compared = [_comparison(pair) for pair in pairs]
    write_json(out / "scores.json", {"scores": scores, "comparisons": compared, "activity": activity})
    tables.write_csv(out / "neurons.csv", tables.neuron_rows(results))
    tables.write_csv(out / "losses.csv", tables.loss_rows(results))


def _comparison(pair: Comparison) -> dict[str, Any]:
    names = ("difference", "standard_error", "gain_difference", "gain_standard_error")
    return asdict(pair) | {name: getattr(pair, name) for name in names}


def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": tables.number, "count": tables.count, "visible": visible, "span": _span}
    environment.filters |= {"percent": tables.percent}
    environment.globals |= {
        "families": tables.FAMILIES,
        "headline": tables.headline,
        "duration": _duration,
        "reasons": _reasons,
    }
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _span(value: float | None, error: float | None, digits: int = 1, scale: float = 100) -> Markup:
    """`value ± error`, or one dash when there is no value."""
    if tables.finite(value) is None:
        return Markup("–")
    shown, spread = tables.number(value, digits, scale), tables.number(error, digits, scale)
    return Markup('{}<span class="se"> ± {}</span>').format(shown, spread)


def _duration(seconds: float | None) -> str:
    if tables.finite(seconds) is None:
        return "–"
    minutes, rest = divmod(round(seconds or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _reasons(row: tables.Row) -> str:
    """Why neurons of a layer have no score, such as ` (2 dead neuron, 1 constant simulation)`."""
    found = row.get("none_reasons") or {"dead": row["n_dead"]}
    return f" ({', '.join(f'{number} {reason}' for reason, number in found.items())})" if row["n_none"] else ""


def _score_table(results: Sequence[Results]) -> list[tuple[Results, list[dict[str, Any]]]]:
    """For each model its layers and the mean, each with one row a protocol (None where it was not scored)."""
    table = []
    for item in results:
        lines: dict[Any, dict[str, Any]] = {layer: {} for layer in [*item.layers, "mean"]}
        for row in tables.score_rows([item]):
            lines[row["layer"]][row["protocol"]] = row
        table.append((item, [{"layer": layer, "rows": rows} for layer, rows in lines.items()]))
    return table


def _prompts(results: Sequence[Results]) -> dict[str, list[tuple[Results, dict[str, Any]]]]:
    """Next-token examples by prompt: one entry a run."""
    found: dict[str, list[tuple[Results, dict[str, Any]]]] = {}
    for item in tables.one_per_run(results):
        for example in item.evaluation.get("examples", ()):
            found.setdefault(example["prompt"], []).append((item, example))
    return found


def _decoder(item: Results, tokenizer: PreTrainedTokenizerFast | None) -> Decode:
    from cratescope.lm.tokenizer import load_tokenizer, token_strings

    if tokenizer is None and not item.run.model.is_dir():
        raise UserError(f"{item.run.model}: no such folder; finish `cratescope train` for {item.run.root} first")
    loaded = tokenizer if tokenizer is not None else load_tokenizer(item.run.model)
    return lambda ids: token_strings(loaded, ids)


def spread(ranking: Sequence[NeuronId], cards: int) -> list[tuple[int, NeuronId]]:
    """`cards` of the ranking with their ranks from 1, evenly spaced, the best and the worst among them."""
    places = np.linspace(0, len(ranking) - 1, min(cards, len(ranking))).round().astype(int)
    return [(int(place) + 1, ranking[place]) for place in places]


def _groups(item: Results, config: ReportConfig, decode: Decode) -> Iterator[Group]:
    """The cards of every layer, chosen by the first protocol's ranking."""
    protocol = next(iter(item.summary["protocols"]))
    rows = {row["layer"]: row for row in item.summary["protocols"][protocol]["layers"]}
    for layer in sorted(rows):
        ranking = item.ranking(protocol, layer)
        chosen = spread(ranking, config.cards)
        path = layer_file(item.run.records(item.site), layer)
        records = read_records(path, [neuron.index for _, neuron in chosen]) if chosen else {}
        cards = [_card(item, config, records[neuron.index], rank, decode) for rank, neuron in chosen]
        distinct = item.summary.get("distinct_explanations", {}).get(str(layer))
        yield Group(item, layer, rows[layer], len(ranking), distinct, cards)


def _card(item: Results, config: ReportConfig, record: NeuronRecord, rank: int, decode: Decode) -> Card:
    neuron = record.neuron
    path = neuron_file(item.run.simulations(item.site, config.explainer, config.simulator), neuron)
    if not path.exists():
        raise UserError(f"{path}: no such file; run `cratescope simulate {item.run.root}` first")
    simulation = read_json(path)
    labelled = [(f"top {place}", window) for place, window in enumerate(record.top[:TOP_EXCERPTS], 1)]
    labelled += [("random", window) for window in record.random[:RANDOM_EXCERPTS]]
    peak = record.moments.maximum
    return Card(
        neuron=neuron,
        rank=rank,
        explanation=item.explanations.get(neuron, simulation["text"]),
        scores=[
            (name, item.values.get((neuron, name, "none")), item.values.get((neuron, name, "shuffled")))
            for name in item.summary["protocols"]
        ],
        density=record.density,
        maximum=peak,
        histogram=tables.sparkline(record.histogram, peak, HISTOGRAM_BINS) if record.histogram else "",
        excerpts=[
            Excerpt(label, _place(window), highlight(decode(window.tokens.tolist()), window.activations, peak))
            for label, window in labelled
        ],
        scored=list(_scored(record, simulation, decode)),
        null_text=simulation["null_text"],
    )


def _scored(record: NeuronRecord, simulation: dict[str, Any], decode: Decode) -> Iterator[Excerpt]:
    """Scoring records with the truth and the simulation, each relative to its own largest value on these records."""
    windows = {window.key: ("top", window) for window in record.top}
    windows |= {window.key: ("random", window) for window in record.random}
    expected = {tuple(key): row for key, row in zip(simulation["keys"], simulation["expected"], strict=False)}
    found = [(*windows[key], expected[key]) for key in expected if key in windows]
    peak = max((float(window.activations.max()) for _, window, _ in found), default=0.0)
    height = max((max(row) for *_, row in found), default=0.0)
    for kind in ("top", "random"):
        for label, window, row in [entry for entry in found if entry[0] == kind][:SCORED_EXCERPTS]:
            text = highlight(decode(window.tokens.tolist()), window.activations, peak, row, height)
            yield Excerpt(label, _place(window), text)


def _place(window: ActivationRecord) -> str:
    return f"excerpt {window.excerpt}, token {window.start}; highest activation {window.activations.max():.3g}"


def highlight(
    tokens: Sequence[str],
    activations: Float[np.ndarray, " w"],
    peak: float,
    simulated: Sequence[float] | None = None,
    height: float = 1.0,
) -> Markup:
    """The tokens in order, shaded by activation / peak, and underlined by simulated / height; numbers as tooltips.

    Tokens with nothing to show are <i>, so that a page of silent tokens stays light.
    """
    parts = []
    for place, (token, truth) in enumerate(zip(tokens, activations.tolist(), strict=True)):
        guess = None if simulated is None else simulated[place]
        shades = {"a": _shade(truth, peak), "s": _shade(guess, height)}
        style = ";".join(f"--{name}:{shade}" for name, shade in shades.items() if shade)
        title = f"{truth:.3g}" if guess is None else f"true {truth:.3g}, simulated {guess:.3g}"
        text = escape(visible(token))
        parts.append(f'<b style="{style}" title="{title}">{text}</b>' if style else f"<i>{text}</i>")
    return Markup("".join(parts))


def _shade(value: float | None, full: float) -> str:
    """value / full as CSS opacity with two digits; empty when it would not be seen."""
    if value is None or not math.isfinite(value) or full <= 0 or value / full < 0.005:
        return ""
    return f"{min(value / full, 1):.2f}".removeprefix("0").removesuffix("0")

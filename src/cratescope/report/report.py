"""One self-contained HTML page about some runs, with its numbers as CSV and JSON and its figures next to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, Undefined
from markupsafe import Markup
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS
from cratescope.explain.controls import CONTROLS
from cratescope.explain.explained import Explained
from cratescope.files import read_json, slug, write_json, write_text
from cratescope.locks import locked
from cratescope.neurons.records import layer_file
from cratescope.report import text, verdict
from cratescope.report.config import ReportConfig
from cratescope.report.curves import panel_of, steering_figures
from cratescope.report.figures import arm_places, draw_figures, figures_of
from cratescope.report.frontier import frontier_figures
from cratescope.report.html import Card, page_card, page_environment
from cratescope.results import compare, tables
from cratescope.results.compare import DETECTABLE, UNTRAINED, Comparison, Quantity
from cratescope.results.estimates import Estimate, finite
from cratescope.results.neuron import Neuron, read_neurons
from cratescope.results.runs import Results, Row, load_results, one_per_run, protocols
from cratescope.results.scores import measures_of
from cratescope.results.steering import AGAINST, KLS, Swept, curve_rows, read_swept, success_rows, summary
from cratescope.run import made_from
from cratescope.score.quality import QUALITIES

VERSION = 6
"""Of the page: raise it when the same results look different."""
CSV = ("scores", "neurons", "losses", "activity", "quality", "matched", "sanity", "saes", "steering", "steering_curves")


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
    """Every number and text that the report shows, and the settings."""
    inputs = ["run.json", "evaluation.json", "metrics.jsonl", "scores/*/*.json", "scores/*/*/*/*.json"]
    inputs += ["scores/*/*/*/layer-*.parquet", "simulations/*/*/*/*/manifest.json", "explanations/*/*/*/*"]
    inputs += ["saes/*/quality.json", "saes/*/layer-*/cfg.json"]
    inputs += [f"steering/*/{name}" for name in ("manifest.json", "example.json", "layer-*.parquet")]
    files = [path for run in config.runs for pattern in inputs for path in sorted(run.glob(pattern))]
    settings = {name: value for name, value in vars(config).items() if name != "out"}
    return made_from((path for path in files if path.is_file()), Path(), version=VERSION, **settings)


def _page(config: ReportConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Render the HTML; numbers and figures are written along the way."""
    primary = Quantity.parse(config.primary)
    results = load_results(config.runs, config.explainer, config.simulator)
    sides = compare.sides(results, config.compare)
    compared = [pairs for pairs in compare.comparisons(results, primary, config.compare) if pairs]
    features = compare.against_features(results, primary)
    groups = [group for item in results for group in _groups(item, config, _decoder(item, tokenizer))]
    swept = read_swept(results)
    numbers = _write_numbers(
        config.out, results, compared, features, tables.matched_rows(results, sides, primary), swept
    )
    drawn = chain(figures_of(results), frontier_figures(results, primary), steering_figures(results, swept))
    figures = draw_figures(drawn, config.out / "figures")
    places, arms = arm_places(results), {item.arm.name: item.arm.title for item in results}
    return _template().render(
        config=config,
        explainer=Path(config.explainer).name if Path(config.explainer).is_absolute() else config.explainer,
        results=results,
        runs=one_per_run(results),
        compared=[[*groups] for _, groups in groupby(compared, key=lambda pairs: (pairs[0].a.arm, pairs[0].b.arm))],
        against_features=features,
        caveats=[
            *verdict.caveats(results, compared or [features], primary),
            *verdict.about_sides(sides if compared or config.compare else [], compared),
            *verdict.about_features(results, features),
        ],
        protocols=protocols(results),
        score_tables=_score_tables(results, numbers["scores"]),
        other_measures=[row for row in numbers["scores"] if row["layer"] == "mean" and not _own(row)],
        activity_table=[(item, {row["layer"]: row for row in tables.activity_rows([item])}) for item in results],
        quality=numbers["quality"],
        dictionaries=numbers["saes"],
        steering=summary(swept),
        matched=numbers["matched"],
        sanity=_sanity_table(numbers["sanity"]),
        figures={name: Markup(svg) for name, svg in figures.items()},
        groups=groups,
        prompts=_prompts(results),
        hue={item.label: f"arm{places[item.arm.name]}" for item in results},
        arms={title: f"arm{places[name]}" for name, title in arms.items()},
        probed=any(row["probing_k1"] is not None for row in numbers["saes"]),
        run_hue={item.run.name: f"arm{places[item.arm.name]}" for item in results},
        sides={title: f"arm{places[item.arm.name]}" for item in results for title in (item.arm.title, item.title)},
    )


def _own(row: Row) -> bool:
    """Whether the row's measure is the one its protocol names first."""
    return row["measure"] == measures_of(row["protocol"])[0]


def _write_numbers(
    out: Path,
    results: Sequence[Results],
    compared: Sequence[Sequence[Comparison]],
    features: Sequence[Comparison],
    matched: list[Row],
    swept: Sequence[Swept],
) -> dict[str, list[Row]]:
    """Write every CSV file, and scores.json with the comparisons; return the rows of all but neurons.csv, by name."""
    rows = {
        "scores": tables.score_rows(results),
        "losses": tables.loss_rows(results),
        "activity": tables.activity_rows(results),
        "quality": tables.quality_rows(results),
        "matched": matched,
        "sanity": tables.sanity_rows(results),
        "saes": tables.dictionary_rows(results),
        "steering": success_rows(swept),
        "steering_curves": curve_rows(swept),
    }
    tables.write_csv(out / "neurons.csv", lambda: tables.neuron_rows(results))
    for name, found in rows.items():
        tables.write_csv(out / f"{name}.csv", found.__iter__)
    pairs = [tables.comparison_row(pair) for group in compared for pair in group]
    kept = (
        "scores",
        "activity",
        "quality",
        "matched",
        "sanity",
        *(name for name in ("saes", "steering") if rows[name]),
    )
    numbers = {name: rows[name] for name in kept} | {"comparisons": pairs}
    if features:
        numbers["against_features"] = [tables.comparison_row(pair) for pair in features]
    write_json(out / "scores.json", numbers)
    return rows


def _template() -> Template:
    environment = page_environment()
    environment.filters |= {"count": text.count, "span": _span, "known": _known, "of": _of}
    environment.globals |= {
        "headline": verdict.headline,
        "duration": _duration,
        "count": text.count,
        "thousands": "{:,}".format,
        "controls": CONTROLS,
        "baselines": (*CONTROLS, UNTRAINED),
        "qualities": QUALITIES,
        "detectable": DETECTABLE,
        "paper_source": tables.paper()["source"],
        "kls": KLS,
        "against": AGAINST,
        "panel_of": panel_of,
    }
    return environment.get_template("report.html")


def _span(value: float | None, error: float | None, digits: int = 1, scale: float = 100) -> Markup:
    """Format `value ± error`, or a dash when there is no value."""
    if finite(value) is None:
        return Markup("–")
    shown, spread = text.number(value, digits, scale), text.number(error, digits, scale)
    return Markup('{}<span class="se"> ± {}</span>').format(shown, spread)


def _of(collected: int, width: int) -> str:
    """How many neurons were collected, and of how many where these are a sample."""
    return str(width) if collected == width else f"{collected:,} of {width:,}"


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


def _decoder(item: Results, tokenizer: PreTrainedTokenizerFast | None) -> text.Decode:
    from cratescope.text.tokenizer import load_tokenizer, token_strings

    if tokenizer is None and not item.run.model.is_dir():
        raise UserError(f"{item.run.model}: no such folder; finish `cratescope train` for {item.run.root} first")
    loaded = tokenizer if tokenizer is not None else load_tokenizer(item.run.model)
    return lambda ids: token_strings(loaded, ids)


def spread(ranking: Sequence[int], cards: int) -> list[tuple[int, int]]:
    """`cards` of the ranking with their ranks from 1, evenly spaced, the best and the worst among them."""
    places = np.linspace(0, len(ranking) - 1, min(cards, len(ranking))).round().astype(int)
    return [(int(place) + 1, ranking[place]) for place in places]


def _groups(item: Results, config: ReportConfig, decode: text.Decode) -> Iterator[Group]:
    """The cards of every layer, chosen by the first protocol's ranking."""
    protocol = item.scores.protocols[0]
    for layer in sorted(item.scores.columns(protocol)):
        ranking = item.scores.ranking(protocol, layer)
        chosen = spread(ranking, config.cards)
        neurons = _neurons(item, config, layer, [index for _, index in chosen]) if chosen else []
        ranked = zip(neurons, chosen, strict=True)
        cards = [page_card(neuron, decode, rank) for neuron, (rank, _) in ranked]
        mean, distinct = item.scores.mean(protocol, layer=layer), item.distinct(item.scores.sets[0], layer)
        yield Group(item, layer, mean, _unscored(item, protocol, layer), len(ranking), distinct, cards)


def _neurons(item: Results, config: ReportConfig, layer: int, indices: Sequence[int]) -> list[Neuron]:
    """Neurons of a layer, the reported explainer's explanations first; those that are scored have been simulated."""
    reported = slug(config.explainer), slug(config.simulator)
    found = []
    for neuron in read_neurons(item.run, layer, indices, site=item.site):
        ours = [said for said in neuron.said if (said.explainer, said.simulator) == reported]
        for said in ours:
            if said.simulation is None and any(row.protocol not in SCORERS for row in said.scores.every(neuron.id)):
                folder = Explained(item.run, item.site, config.explainer, said.set).simulations(config.simulator).folder
                what = f"{layer_file(folder, layer)}: has no neuron {neuron.id.index}"
                raise UserError(f"{what}; run `cratescope simulate {item.run.root}` first")
        found.append(replace(neuron, said=(*ours, *(said for said in neuron.said if said not in ours))))
    return found


def _unscored(item: Results, protocol: str, layer: int) -> str:
    """Number of neurons of a layer without a score, and why, such as `2 without a score (2 dead neuron)`."""
    found: Counter[str] = Counter()
    for reason, number in sorted(item.scores.reasons(protocol, layer).items()):
        found[re.split(r"[:(]", reason)[0].strip()] += number  # what follows are a server's words, another every time
    listed = ", ".join(f"{number} {reason}" for reason, number in found.items())
    return f"{found.total()} without a score" + (f" ({listed})" if listed else "")

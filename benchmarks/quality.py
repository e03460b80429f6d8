"""Planted neurons: how well simulators, scorers and the explainer do where the right answer is known.

A planted neuron fires where a rule (a regular expression over real held-out text) says so, and comes with a right
explanation. Lexical ones depend on the word alone, contextual ones on what stands around it. Records are made by the
code of `cratescope collect`, in memory. The tables keep apart neurons that were used to tune prompts and
constants, others of the same suite that were held out, and blind ones (planted_rules.py), whose rules come from the
literature and were written without looking at what explains them.

    python benchmarks/quality.py --data demo/data --out quality          # quality.json and quality.md
    python benchmarks/quality.py --data demo/data --half tuned --density-neurons 0
    python benchmarks/quality.py --data demo/data --simulators list-in-context all-at-once --judge detection fuzzing

*right* is the correlation (protocol top-and-random) of a neuron with its right explanation, *wrong* the mean one with
those of the other planted neurons, *first* the share of neurons whose own explanation scores highest among all.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import planted_density
import planted_rules
import torch
import tyro
from planted_rules import words
from rich.console import Console
from rich.progress import track

from cratescope.explain.asking import Asks
from cratescope.explain.config import ExplainConfig, SimulateConfig
from cratescope.explain.controls import EMPTY_EXPLANATION, OWN, SHUFFLED
from cratescope.explain.explained import Explanation, Judgement, Told
from cratescope.explain.judge import Judge
from cratescope.explain.judges import question_named
from cratescope.explain.protocols import PROTOCOLS
from cratescope.explain.simulators import Simulator, simulator_named
from cratescope.explain.simulators.list_pmi import GENERIC_EXPLANATIONS
from cratescope.files import write_json, write_text
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import LanguageModel
from cratescope.llm.open import open_llm
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.merge import Totals, columns
from cratescope.neurons.records import NeuronRecord, layer_file, read_records, write_table
from cratescope.neurons.strata import Pilot
from cratescope.neurons.streaming import LayerStatistics, Plan
from cratescope.score.measures import judged
from cratescope.score.measures import measure as measured
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import vocabulary_strings

CONTEXT = 256
PROTOCOL = PROTOCOLS["top-and-random"]
GROUPS = ("tuned", "held out", "blind")


# name, right explanation, pattern: the neuron fires on the tokens of the group `x`, or of the whole match.
LEXICAL = (
    ("number", "numbers", r"\d+"),
    ("the", 'the word "the"', r"\b[Tt]he\b"),
    (
        "place",
        "names of countries and cities",
        r"\b(?:France|England|Germany|China|India|Japan|America|Europe|Italy|Spain|Russia|London|Paris|Rome|York|"
        r"California|Texas|Canada|Australia|Africa|Mexico|Brazil|Ireland|Scotland|Poland|Greece|Egypt|Berlin|Vienna|"
        r"Chicago|Boston|Washington|Virginia|Asia|Israel|Iran|Iraq|Korea|Sweden|Norway|Turkey|Austria|Hungary)\b",
    ),
    ("quote", "quotation marks", r"[\"“”]"),
    (
        "past",
        "verbs in the past tense",
        words("was were had did said made took went came became gave found began called used saw knew told held")
        + r"|\b(?:play|serv|follow|return|establish|launch|record|develop|publish|design|receiv|produc|creat|mov)ed\b",
    ),
    ("bracket", "brackets", r"[()\[\]{}]"),
    (
        "law",
        "legal terms",
        words(
            "license licence licensee licensor licenses warranty liability agreement contract contracts copyright "
            "party court law laws patent damages trademark clause legal jurisdiction infringement hereby thereof liable"
        ),
    ),
    ("comma", "commas", r","),
    (
        "month",
        "names of months",
        r"\b(?:January|February|March|April|May|June|July|August|September|October|November|December)\b",
    ),
    ("and", 'the word "and"', r"\band\b"),
    ("pronoun", "personal pronouns", words("I you he she it we they him her them us me")),
    (
        "food",
        "words about cooking and food",
        words(
            "salt butter sugar flour oil water milk cream cheese egg eggs onion garlic pepper sauce chicken beef rice "
            "bread cook boil bake oven pan dish recipe soup meat tomato lemon"
        ),
    ),
    ("modal", "modal verbs such as may and must", words("can could may might must shall should will would")),
    ("colour", "names of colours", words("red blue green white black yellow brown grey gray purple orange pink")),
    (
        "family",
        "members of a family",
        words("father mother son daughter brother sister wife husband uncle aunt child children parents family"),
    ),
    ("stop", "full stops", r"\."),
    (
        "unit",
        "units of measurement",
        words(
            "km kilometres miles mile feet inches metres meters kg pounds grams cup cups teaspoon teaspoons tablespoon "
            "tablespoons minutes hours seconds degrees bytes percent"
        ),
    ),
    ("negation", "negations", words("not no never none nor neither nothing without cannot")),
    (
        "music",
        "words about music",
        words(
            "music song songs album albums band singer guitar piano recorded concert opera musical jazz rock songwriter"
        ),
    ),
    (
        "war",
        "words about war and soldiers",
        words("war army battle military soldiers troops enemy weapons navy fleet invasion regiment forces guns armed"),
    ),
    ("ing", 'words that end in "ing"', r"\b\w{2,}ing\b"),
    ("year", "years, such as 1995", r"\b(?:1[5-9]\d\d|20\d\d)\b"),
    (
        "number word",
        "numbers written as words",
        words("one two three four five six seven eight nine ten hundred thousand"),
    ),
    ("equals", "equals signs", r"="),
)
CONTEXTUAL = (
    ("behind of", 'the word after "of"', r"\bof (?P<x>\w+)"),
    ("sentence", "the first word of a sentence", r"[.!?]\s+(?P<x>[A-Z]\w*)"),
    ("of the", 'the word "the" after the word "of"', r"\bof (?P<x>the)\b"),
    ("comma and", 'a comma before the word "and"', r"(?P<x>,) and\b"),
    ("in brackets", "words inside brackets", r"\((?P<x>[^()\n]{2,40})\)"),
    ("in quotes", "words inside quotation marks", r"[\"“](?P<x>[^\"“”\n]{2,60})[\"”]"),
    (
        "measured",
        "a number before a unit",
        r"(?P<x>\d+) (?:cups?|t\w*spoons?|minutes|km|miles|feet|hours|pounds|years)\b",
    ),
    ("it is", 'the word "is" after "it" or "this"', r"\b(?:[Ii]t|[Tt]his) (?P<x>is)\b"),
    ("surname", "the second word of a name", r"\b[A-Z][a-z]+ (?P<x>[A-Z][a-z]+)\b"),
    ("line", "the first word of a line", r"\n\s*(?P<x>\w+)"),
    ("to do", 'a verb after the word "to"', r"\bto (?P<x>(?!the\b|a\b|an\b|be\b)[a-z]+)\b"),
    (
        "to be",
        'the word "be" after a modal verb',
        r"\b(?:can|could|may|might|must|shall|should|will|would) (?P<x>be)\b",
    ),
)


@dataclass(frozen=True)
class Planted:
    """A rule with its right explanation; `half` is one of GROUPS."""

    name: str
    kind: str
    explanation: str
    pattern: re.Pattern[str]
    half: str


@dataclass(frozen=True)
class Options:
    """Measure simulators, the explainer and judges on planted neurons."""

    data: Path
    """Folder made by `cratescope prepare`; its heldout split is read."""
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    excerpts: int = 800
    """Excerpts of 256 tokens."""
    simulators: tuple[str, ...] = ("list-pmi",)
    """Simulators to measure; list-in-context and all-at-once are slow: the model reads every window."""
    wrong: int = 4
    """Wrong explanations a neuron for the simulators that cost a forward pass a window; list-pmi gets all of them."""
    judge: tuple[Literal["detection", "fuzzing", "intruder", "none"], ...] = ("none",)
    """Scorers without simulation to measure."""
    half: Literal["all", "tuned", "blind"] = "all"
    """`tuned` leaves the other neurons unseen."""
    density_neurons: int = 20
    """Neurons of each density in the sweep of densities; 0 leaves it out."""
    noise: float = 0.0
    """Standard deviation of noise added to every activation (the rule gives 0.5 to 1)."""
    seed: int = 0
    """Draws activations and the halves."""
    llm: str = "offline"
    """The language model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Its number format."""
    threads: int = 1
    """Threads."""
    verbose: bool = False
    """Print every neuron."""


def planted(seed: int) -> list[Planted]:
    """Every neuron; of each kind every other one of this file, in a random order, is held out."""
    found = []
    for kind, rules in (("lexical", LEXICAL), ("contextual", CONTEXTUAL)):
        place = np.empty(len(rules), dtype=int)
        place[np.random.default_rng([seed, len(rules)]).permutation(len(rules))] = np.arange(len(rules))
        for rule, (name, explanation, pattern) in enumerate(rules):
            half = ("tuned", "held out")[place[rule] % 2]
            found.append(Planted(name, kind, explanation, re.compile(pattern, re.M), half))
    for kind, sourced in (("lexical", planted_rules.LEXICAL), ("contextual", planted_rules.CONTEXTUAL)):
        for name, explanation, pattern, _ in sourced:
            found.append(Planted(name, kind, explanation, re.compile(pattern, re.M), "blind"))
    return found


def activations(rows: list[list[str]], neurons: Sequence[Planted], options: Options) -> np.ndarray:
    """Activations (excerpts, CONTEXT, neurons): on the tokens the rule matches a strength from 0.5 to 1, else 0."""
    random = np.random.default_rng([options.seed, 1])
    found = np.zeros((len(rows), CONTEXT, len(neurons)), dtype=np.float32)
    for row, tokens in enumerate(rows):
        text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens])
        for column, neuron in enumerate(neurons):
            for match in neuron.pattern.finditer(text):
                first, last = match.span("x" if "x" in neuron.pattern.groupindex else 0)
                # A token's text begins with its space, so the last token that ends at `first` is not yet in the match.
                low, high = np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left")
                found[row, low : high + 1, column] = 1
    found *= random.uniform(0.5, 1, found.shape).astype(np.float32)
    return found + np.float32(options.noise) * random.standard_normal(found.shape, dtype=np.float32)


def make_records(excerpts: np.ndarray, values: np.ndarray) -> list[NeuronRecord]:
    """Neuron records from activations held in memory, through the same code as those of a model."""
    config = CollectConfig(Path("planted"))
    plan = Plan.of(config, 0, Pilot.of(torch.from_numpy(values[:64]).flatten(0, 1)), excerpts)
    statistics = LayerStatistics(plan)
    for start in range(0, len(excerpts), 64):
        part = slice(start, start + 64)
        statistics.update(torch.from_numpy(values[part]), torch.from_numpy(excerpts[part]), start)
    totals = Totals.of(plan, [statistics.take_shard(0)])
    labels = {"model": "planted", "site": "planted", "layer": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = layer_file(Path(folder), 0)
        write_table(path, columns(plan, totals, excerpts, labels))
        return list(read_records(path).values())


@dataclass(frozen=True)
class Bench:
    """Planted neurons with their records, and the model that is asked."""

    options: Options
    neurons: list[Planted]
    records: list[NeuronRecord]
    vocabulary: list[str]
    llm: LanguageModel
    tokenizer: Any

    def score(self, simulator: Simulator, texts: Sequence[str], wrong: int | None) -> np.ndarray:
        """r (neurons, texts) of each neuron with every text, or with its own and `wrong` others; NaN elsewhere."""
        simulator.plan(list(dict.fromkeys([*texts, EMPTY_EXPLANATION, *GENERIC_EXPLANATIONS])))
        n = len(self.records)
        found = np.full((n, n), np.nan)
        for row, record in enumerate(track(self.records, "scoring", console=Console(stderr=True), transient=True)):
            windows = PROTOCOL.windows(record)
            truth = np.concatenate([window.activations for window in windows])
            for step in range(n if wrong is None else wrong + 1):
                column = (row + 5 * step) % n if wrong is not None else (row + step) % n
                if texts[column]:
                    value = measured("pearson", truth, np.concatenate(simulator(texts[column], windows)))
                    found[row, column] = 0.0 if value is None else value
        return found

    def explained(self) -> list[str]:
        """What the explainer says of each neuron."""
        config = ExplainConfig(Path("planted"), llm=LLMConfig(self.options.llm))
        asks = Asks(config, SimpleNamespace(tokenizer=self.tokenizer), self.llm)  # type: ignore[arg-type]  # no run here
        batches = [self.records[start : start + 16] for start in range(0, len(self.records), 16)]
        return [item.text for batch in batches for item, _ in asks.explained(PROTOCOL.set, batch)]

    def simulator(self, name: str) -> Simulator:
        config = SimulateConfig(Path("planted"), simulator=name, llm=LLMConfig(self.options.llm))  # type: ignore[arg-type]
        return simulator_named(name).open(config, self.vocabulary, lambda: self.llm)


def groups(neurons: Sequence[Planted]) -> dict[str, np.ndarray]:
    """Rows of the table: which neurons are in each."""
    rows = {}
    for kind in ("lexical", "contextual"):
        for half in GROUPS:
            chosen = np.array([neuron.kind == kind and neuron.half == half for neuron in neurons])
            if chosen.any():
                rows[f"{kind}, {half}"] = chosen
    return rows


def summary(scores: np.ndarray, chosen: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
    """Of the chosen neurons: mean r with the own text, mean r and mean |r| with others, and how often the own is best.

    A text that several neurons have counts once, and ties count as first.
    """
    own = np.diag(scores)[chosen]
    other = np.array([[a != b for b in texts] for a in texts])
    rest = np.where(other, scores, np.nan)[chosen]
    best = np.nanmax(np.where(np.isnan(rest), -np.inf, rest), axis=1)
    return {
        "right": float(np.nanmean(own)),
        "wrong": float(np.nanmean(rest)),
        "wrong, absolute": float(np.nanmean(np.abs(rest))),
        "first": float(np.mean(np.nan_to_num(own, nan=-1) >= best)),
    }


def measure(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    right = [neuron.explanation for neuron in bench.neurons]
    told = bench.explained()
    for name in bench.options.simulators:
        simulator = bench.simulator(name)
        for whose, texts in (("right", right), ("explainer's", told)):
            scores = bench.score(simulator, texts, None if name == "list-pmi" else bench.options.wrong)
            if bench.options.verbose:
                show(bench, name, texts, scores)
            for group, chosen in groups(bench.neurons).items():
                said = [text for text, mine in zip(texts, chosen, strict=True) if mine]
                row = {"simulator": name, "explanations": whose, "neurons": group, "n": int(chosen.sum())}
                rows.append(row | summary(scores, chosen, texts) | {"distinct": len(set(said))})
    return rows


def measure_judges(bench: Bench) -> list[dict[str, Any]]:
    """Balanced accuracy and AUROC with the right and with a wrong explanation; for intruders the share found."""
    rows = []
    for scorer in bench.options.judge:
        if scorer == "none":
            continue
        asking = Judge(bench.llm, bench.vocabulary, PROTOCOL.set, scorer, 16)
        found: list[list[Judgement]] = []
        for place, (neuron, record) in enumerate(zip(bench.neurons, bench.records, strict=True)):
            own = Explanation(record.neuron, neuron.explanation, "right", "right")
            found.append(asking.asked(record, Told(own, bench.neurons[place - 5].explanation))[0])
        for group, chosen in groups(bench.neurons).items():
            mine = [item for items, inside in zip(found, chosen, strict=True) if inside for item in items]
            for control, name in ((OWN, "right"), (SHUFFLED, "wrong")):
                kept = [item for item in mine if item.control == control and not item.skipped]
                if kept:
                    row = {"simulator": scorer, "explanations": name, "neurons": group, "n": len(kept)}
                    rows.append(row | {"accuracy": _mean_accuracy(kept), "auroc": _mean_auroc(kept)})
    return rows


def _mean_accuracy(items: Sequence[Judgement]) -> float:
    return float(np.mean([_accuracy(item) for item in items]))


def _accuracy(item: Judgement) -> float:
    labels, answers = np.array(item.labels), np.array(item.probabilities)
    groups_of = (-1, question_named(item.scorer).group)
    if groups_of[1] == 1:
        return judged("accuracy", labels, answers) or 0.0
    return float(np.mean(answers.reshape(groups_of).argmax(1) == labels.reshape(groups_of).argmax(1)))


def _mean_auroc(items: Sequence[Judgement]) -> float:
    return float(np.mean([judged("auroc", np.array(item.labels), np.array(item.probabilities)) for item in items]))


def show(bench: Bench, name: str, texts: Sequence[str], scores: np.ndarray) -> None:
    for row, (neuron, text) in enumerate(zip(bench.neurons, texts, strict=True)):
        best = int(np.nanargmax(np.nan_to_num(scores[row], nan=-2)))
        rest = np.delete(scores[row], row)
        sys.stderr.write(
            f"{name:16} {neuron.kind[:4]} {neuron.half[:4]} {neuron.name:12} {text[:44]:44} "
            f"r {scores[row, row]:6.3f} wrong {np.nanmean(rest):6.3f} best {texts[best][:30]} {scores[row, best]:.3f}\n"
        )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append(" | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    bench = make_bench(options)
    rows = measure(bench) + measure_judges(bench)
    shown = markdown(rows)
    if options.density_neurons:
        sweep = planted_density.Options(options.data, neurons=options.density_neurons, seed=options.seed)
        shown += "\n" + planted_density.drifts(planted_density.sweep(sweep))
    sys.stdout.write(shown)
    if options.out:
        about = {"llm": bench.llm.name, "dtype": bench.llm.dtype, "seed": options.seed, "excerpts": options.excerpts}
        write_json(options.out.with_suffix(".json"), about | {"rows": rows})
        write_text(options.out.with_suffix(".md"), shown)


def make_bench(options: Options) -> Bench:
    data = TokenData.open(options.data)
    tokenizer = data.tokenizer
    vocabulary = vocabulary_strings(tokenizer)
    excerpts = data.split("heldout").spaced(options.excerpts, CONTEXT)
    neurons = [neuron for neuron in planted(options.seed) if options.half == "all" or neuron.half == options.half]
    rows = [[vocabulary[token] for token in row] for row in excerpts.tolist()]
    records = make_records(excerpts, activations(rows, neurons, options))
    llm = open_llm(LLMConfig(options.llm, llm_dtype=options.dtype))
    return Bench(options, neurons, records, vocabulary, llm, tokenizer)


if __name__ == "__main__":
    main()

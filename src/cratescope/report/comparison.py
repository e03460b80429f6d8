"""CRATE against GPT-2: what the runs allow to be compared, how sure one can be of it, and what may be said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cratescope.neurons.measures import MEASURES
from cratescope.neurons.protocols import PROTOCOLS
from cratescope.neurons.score import CONTROLS, SCORERS
from cratescope.neurons.statistics import (
    Difference,
    Mean,
    compare_neurons,
    compare_seeds,
    mean_of,
    mean_over_layers,
    needed,
)
from cratescope.report.paper import PAPER_TOKENS
from cratescope.report.results import Results, protocols, untrained_copy
from cratescope.report.text import count, finite, number
from cratescope.run import UserError

UNTRAINED = "untrained"
GAINS = ("shuffled", UNTRAINED)
"""Besides the score itself, its gain over these is compared."""
DETECTABLE = 0.03
"""A difference worth finding: 3 points, the size of the paper's own at 2 layers."""


@dataclass(frozen=True)
class Quantity:
    """A measure on a protocol's windows: the score itself, or its gain over a control or the untrained copy."""

    protocol: str
    measure: str
    over: str | None = None

    @classmethod
    def parse(cls, text: str) -> Quantity:
        """`protocol/measure` or `protocol/measure/control`. Raises UserError for anything else, and unknown names."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UserError(f"--primary {text}: write protocol/measure/control, such as uniform/pearson/shuffled")
        protocol, measure, over = *parts[:2], parts[2] if len(parts) == 3 else None
        judged = protocol.partition("-")[0]  # a scorer, or a scorer and the explanation set it judged
        known = (
            ("protocol", judged if judged in SCORERS else protocol, (*PROTOCOLS, *SCORERS)),
            ("measure", measure, tuple(MEASURES)),
            ("control", over, (None, *CONTROLS, UNTRAINED)),
        )
        for what, name, names in known:
            if name not in names:
                listed = ", ".join(filter(None, names))
                raise UserError(f"--primary {text:.80}: there is no {what} {name!r:.40}; choose from {listed}")
        return cls(protocol, measure, over)

    @property
    def name(self) -> str:
        score = f"{self.protocol}, {self.measure}"
        return f"{score}, gain over {self.over}" if self.over else score

    def layers(self, item: Results) -> list[list[float]]:
        """Of every neuron that has it, by layer; of a gain over the untrained copy, the score itself."""
        if self.protocol not in item.summary["protocols"]:
            return []
        own = item.values(self.protocol, measure=self.measure)
        if self.over in (None, UNTRAINED):
            return [[*own[layer].values()] for layer in sorted(own)]
        null = item.values(self.protocol, str(self.over), self.measure)
        both = {
            layer: [value - null[layer][neuron] for neuron, value in row.items() if neuron in null.get(layer, {})]
            for layer, row in own.items()
        }
        return [both[layer] for layer in sorted(both) if both[layer]]

    def mean(self, item: Results, results: Sequence[Results]) -> Mean:
        """Mean over layers and its error over neurons."""
        own = _mean(self.layers(item))
        if self.over != UNTRAINED:
            return own
        copy = untrained_copy(item, results)
        null = _mean(self.layers(copy)) if copy else Mean(None, None, None)
        if own.mean is None or null.mean is None:
            return Mean(None, None, None)
        errors = own.standard_error, null.standard_error
        return Mean(own.mean - null.mean, None if None in errors else math.hypot(errors[0] or 0, errors[1] or 0), None)


def _mean(layers: Sequence[Sequence[float]]) -> Mean:
    return mean_over_layers([mean_of(layer) for layer in layers])


@dataclass(frozen=True)
class Side:
    """One family's runs in a comparison, as mean over seeds; plain scores and nats.

    The standard error is over seeds when there are at least two, and over neurons when there is one.
    """

    seeds: dict[int, float]
    neurons: int
    mean: float
    standard_error: float | None
    deviation: float | None
    loss: float | None


@dataclass(frozen=True)
class Comparison:
    """CRATE against GPT-2 of one size, on the same data, context and number of training tokens.

    test: over seeds when both sides have at least two, else over the neurons of the one pair of runs there is; None
    where neither can be made. layers: how many, each with the same number of neurons.
    """

    size: str
    tokens_trained: int
    quantity: Quantity
    primary: bool
    crate: Side
    gpt2: Side
    test: Difference | None
    layers: int

    @property
    def difference(self) -> float:
        return self.crate.mean - self.gpt2.mean

    @property
    def standard_error(self) -> float | None:
        if self.test is not None:
            return self.test.standard_error
        errors = self.crate.standard_error, self.gpt2.standard_error
        return None if None in errors else math.hypot(errors[0] or 0, errors[1] or 0)

    @property
    def unit(self) -> str:
        """What the test counts."""
        return "seeds" if min(len(self.crate.seeds), len(self.gpt2.seeds)) > 1 else "neurons"

    @property
    def clear(self) -> bool:
        """Is p below 5 %?"""
        return self.test is not None and self.test.p < 0.05

    def neurons_needed(self, difference: float | None = None) -> int | None:
        """Neurons a layer with which two runs that differ so much (as measured, by default) are told apart."""
        deviations = [side.deviation for side in (self.crate, self.gpt2) if side.deviation]
        if not deviations:
            return None
        wanted = self.difference if difference is None else difference
        found = needed(wanted / math.sqrt(statistics.fmean(value**2 for value in deviations)))
        return None if found is None else max(math.ceil(found / self.layers), 2)

    def seeds_needed(self, difference: float | None = None) -> int | None:
        """The same for seeds a family; None with fewer than two of each."""
        if self.test is None or self.unit == "neurons" or not self.difference:
            return None
        wanted = self.difference if difference is None else difference
        return needed(self.test.effect * wanted / self.difference, self.test.paired)


def comparisons(results: Sequence[Results], primary: Quantity) -> list[list[Comparison]]:
    """What the runs allow: one list a pair of unaltered presets that differ in family only, the primary one first."""
    groups: dict[tuple[Any, ...], dict[str, list[Results]]] = {}
    for item in (item for item in results if item.plain):
        key = (item.matter, item.tokens_trained)
        groups.setdefault(key, {}).setdefault(item.family, []).append(item)
    shared = [(key, sides) for key, sides in groups.items() if sides.keys() >= {"crate", "gpt2"}]
    shared.sort(key=lambda group: (group[0][1] == 0, group[0]))  # untrained controls last
    quantities = _quantities(results, primary)
    return [
        [found for quantity in quantities if (found := _compare(sides, quantity, primary, results)) is not None]
        for _, sides in shared
    ]


def _quantities(results: Sequence[Results], primary: Quantity) -> list[Quantity]:
    """The primary one, then every protocol's own measure: the score and its gains."""
    found = [primary]
    for name in protocols(results):
        measure = next(item.measure_of(name) for item in results if name in item.summary["protocols"])
        found += [Quantity(name, measure, over) for over in (None, *GAINS)]
    return list(dict.fromkeys(found))


def _compare(
    sides: dict[str, list[Results]], quantity: Quantity, primary: Quantity, results: Sequence[Results]
) -> Comparison | None:
    # Seeds are the unit of replication, so a second run of a seed (the first given stays) is none.
    runs = {family: [*{item.seed: item for item in reversed(items)}.values()][::-1] for family, items in sides.items()}
    crate, gpt2 = (_side(runs[family], quantity, results) for family in ("crate", "gpt2"))
    if crate is None or gpt2 is None:
        return None
    first = runs["crate"][0]
    test = compare_seeds(crate.seeds, gpt2.seeds)
    if min(len(crate.seeds), len(gpt2.seeds)) < 2 and quantity.over != UNTRAINED:
        pair = [next(item for item in runs[family] if item.seed in side.seeds) for family, side in _named(crate, gpt2)]
        test = compare_neurons(*(quantity.layers(item) for item in pair))
    layers = max(len(quantity.layers(first)), 1)
    tokens = first.manifest["tokens_trained"]
    return Comparison(first.size, tokens, quantity, quantity == primary, crate, gpt2, test, layers)


def _named(crate: Side, gpt2: Side) -> list[tuple[str, Side]]:
    return [("crate", crate), ("gpt2", gpt2)]


def _side(items: Sequence[Results], quantity: Quantity, results: Sequence[Results]) -> Side | None:
    """None when no run has the quantity."""
    means = {item.manifest["seed"]: quantity.mean(item, results) for item in items}
    seeds = {seed: mean.mean for seed, mean in means.items() if mean.mean is not None}
    if not seeds:
        return None
    over_seeds = mean_of([*seeds.values()])
    error = over_seeds.standard_error if len(seeds) > 1 else means[next(iter(seeds))].standard_error
    layers = [layer for item in items for layer in quantity.layers(item)]
    deviations = [value for layer in layers if (value := mean_of(layer).standard_deviation) is not None]
    losses = [loss for item in items if (loss := finite(item.evaluation["loss"])) is not None]
    return Side(
        seeds=seeds,
        neurons=sum(map(len, layers)),
        mean=statistics.fmean(seeds.values()),
        standard_error=error,
        deviation=math.sqrt(statistics.fmean(value**2 for value in deviations)) if deviations else None,
        loss=statistics.fmean(losses) if losses else None,
    )


def headline(pairs: Sequence[Comparison]) -> str:
    """Two sentences for the comparisons of one size: the first of them, and whether it stands out of the noise."""
    first = pairs[0]
    trained = f"after {count(first.tokens_trained)} training tokens" if first.tokens_trained else "untrained"
    named = f"on the primary measure ({first.quantity.name})" if first.primary else f"on {first.quantity.name}"
    crate, gpt2 = (f"{number(side.mean)} ± {number(side.standard_error)}" for side in (first.crate, first.gpt2))
    text = f"At size {first.size.upper()}, {trained}, CRATE's neurons score {crate} {named}, GPT-2's {gpt2}. "
    if first.test is None:
        verdict = f"The difference is {number(first.difference, sign=True)}; there are too few values to test it."
    else:
        numbers = f"{number(first.difference, sign=True)} (95 % interval {_range(first.test)}, p = {first.test.p:.2g})"
        seeds = f"{min(len(first.crate.seeds), len(first.gpt2.seeds))} seeds a side"
        over = f"over {seeds}" if first.unit == "seeds" else "over the neurons of one run a side"
        ahead = "CRATE is ahead" if first.difference > 0 else "GPT-2 is ahead"
        verdict = f"The difference is {numbers} {over}: " + (
            f"{ahead}." if first.clear else "the two are not told apart."
        )
    return (text + verdict).replace(" ± ", "\u00a0±\u00a0")


def _range(test: Difference) -> str:
    return f"{number(test.low, sign=True)} to {number(test.high, sign=True)}"


def caveats(results: Sequence[Results], groups: Sequence[Sequence[Comparison]], primary: Quantity) -> list[str]:
    """What the reader must know before believing the headline, from the numbers."""
    pairs = [pair for group in groups for pair in group]
    notes = [*_about_pairs(pairs, primary)]
    most = max(item.tokens_trained or 0 for item in results)
    if 0 < most < PAPER_TOKENS:
        notes.append(
            f"The longest run here read {count(most)} tokens; the paper's Base runs read about {count(PAPER_TOKENS)}, "
            f"{PAPER_TOKENS / most:,.0f} times as many, and its explainer and simulator have 7B parameters."
        )
    if not any(item.untrained for item in results):
        notes.append("No untrained model is among the runs; untrained neurons can score above zero too, so add one.")
    return notes


def _about_pairs(pairs: Sequence[Comparison], primary: Quantity) -> list[str]:
    if not pairs:
        return [
            "There is no CRATE and GPT-2 pair of the same size, data, context and training tokens here, "
            "so the report makes no comparison."
        ]
    notes = []
    fewest = min(min(len(pair.crate.seeds), len(pair.gpt2.seeds)) for pair in pairs)
    if fewest < 2:
        notes.append(
            "Seeds are the unit of replication: where a side has one training run, errors and p-values count only "
            "which neurons were drawn, not how another seed would have turned out, and cannot settle which family "
            "is ahead."
        )
    else:
        notes.append(
            f"Errors and p-values are over training seeds, at least {fewest} a side; with fewer than about 5 only a "
            "large difference can be told from chance."
        )
    if not any(pair.primary for pair in pairs):
        notes.append(f"The primary measure ({primary.name}) was not scored.")
    notes.append("All other measures are secondary; their p-values are not corrected for being many.")
    notes.append(f"Each mean rests on {min(min(p.crate.neurons, p.gpt2.neurons) for p in pairs):,} neurons or more.")
    unmatched = next((pair for pair in pairs if pair.tokens_trained and pair.crate.loss and pair.gpt2.loss), None)
    if unmatched is not None:
        notes.append(
            f"The models are matched in tokens, not in loss: {unmatched.crate.loss:.2f} nats for CRATE and "
            f"{unmatched.gpt2.loss:.2f} for GPT-2 at size {unmatched.size.upper()}."
        )
    return notes

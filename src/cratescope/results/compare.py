"""One arm against another, or neurons against features: what the runs allow to compare, and how certain it is."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS
from cratescope.explain.controls import CONTROLS, SHUFFLED
from cratescope.explain.protocols import ON_UNIFORM_TEXT, PROTOCOLS
from cratescope.neurons.sample import SAE
from cratescope.results.estimates import Estimate, finite, in_quadrature, over
from cratescope.results.runs import Results, protocols, untrained_copy
from cratescope.results.scores import measures_of
from cratescope.score.inference import Difference, compare_neurons, compare_seeds, mean_of, needed

UNTRAINED = "untrained"
GAINS = (SHUFFLED, UNTRAINED)
"""Besides the score itself, its gain over these is compared."""
DETECTABLE = 0.03
"""A difference worth finding: 3 points, the size of the paper's own at 2 layers."""
USUAL = ("crate", "gpt2")
"""The arms that are compared unless others are asked for."""


@dataclass(frozen=True)
class Quantity:
    """A measure on a protocol's windows: the score itself, or its gain over a control or the untrained copy."""

    protocol: str
    measure: str
    over: str | None = None

    @classmethod
    def parse(cls, text: str) -> Quantity:
        """`protocol/measure` or `protocol/measure/control`. Raises UserError for anything else, or unknown names."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UserError(f"--primary {text}: write protocol/measure/control, such as uniform/pearson/shuffled")
        protocol, measure, over = *parts[:2], parts[2] if len(parts) == 3 else None
        judged = protocol.partition("-")[0]  # a scorer, or a scorer and the explanation set it judged
        known = (
            ("there is no protocol", judged if judged in SCORERS else protocol, (*PROTOCOLS, *SCORERS)),
            (f"{protocol:.40} has no measure", measure, measures_of(protocol)),
            ("there is no control", over, (None, *CONTROLS, UNTRAINED)),
        )
        for what, name, names in known:
            if name not in names:
                listed = ", ".join(filter(None, names))
                raise UserError(f"--primary {text:.80}: {what} {name!r:.40}; choose from {listed}")
        return cls(protocol, measure, over)

    @property
    def name(self) -> str:
        score = f"{self.protocol}, {self.measure}"
        return f"{score}, gain over {self.over}" if self.over else score

    @property
    def _control(self) -> str | None:
        return None if self.over == UNTRAINED else self.over

    def by_index(self, item: Results) -> dict[int, dict[int, float]]:
        """By layer and index, of every neuron that has one; of a gain over the untrained copy, the score itself."""
        return item.scores.values(self.protocol, self.measure, over=self._control)

    def layers(self, item: Results) -> list[list[float]]:
        """The same values as lists, of the layers that have any."""
        return [[*row.values()] for row in self.by_index(item).values() if row]

    def mean(self, item: Results, results: Sequence[Results]) -> Estimate:
        """Mean over layers and its error over neurons."""
        own = item.scores.mean(self.protocol, self.measure, over=self._control)
        if self.over != UNTRAINED:
            return own
        copy = untrained_copy(item, results)
        return over(own, copy.scores.mean(self.protocol, self.measure) if copy else Estimate(None, None))


@dataclass(frozen=True)
class Side:
    """The neurons of one arm's runs in a comparison, or features of theirs, as mean over seeds; plain scores and nats.

    arm: with the dictionary in it where these are features, such as `gpt2 + sae/bt16` (`Results.side`). The
    standard error is over seeds when there are at least two, and over neurons when there is one.
    """

    arm: str
    title: str
    seeds: dict[int, float]
    neurons: int
    mean: float
    standard_error: float | None
    deviation: float | None
    loss: float | None

    @property
    def features(self) -> bool:
        return f" + {SAE}" in self.arm


@dataclass(frozen=True)
class Comparison:
    """Side a against side b of one size, on the same data and context, after as many training tokens or at equal loss.

    loss: the validation loss, as mean over seeds, at which they are compared; None where it is at equal tokens.
    test: over seeds when both sides have at least two, else over the neurons of the one pair of runs there is; None
    where neither can be made. layers: how many, each with the same number of neurons. only: which, where a run was
    scored on layers that another was not, which are left out.
    """

    size: str
    tokens_trained: int | None
    quantity: Quantity
    primary: bool
    a: Side
    b: Side
    test: Difference | None
    layers: int
    loss: float | None = None
    only: tuple[int, ...] = ()

    @property
    def difference(self) -> float:
        return self.a.mean - self.b.mean

    @property
    def standard_error(self) -> float | None:
        if self.test is not None:
            return self.test.standard_error
        return in_quadrature(self.a.standard_error, self.b.standard_error)

    @property
    def unit(self) -> str:
        """The unit that the test counts."""
        return "seeds" if min(len(self.a.seeds), len(self.b.seeds)) > 1 else "neurons"

    @property
    def clear(self) -> bool:
        """Whether p is below 5 %."""
        return self.test is not None and self.test.p < 0.05

    def neurons_needed(self, difference: float | None = None) -> int | None:
        """Neurons per layer with which two runs that differ so much (as measured, by default) are told apart."""
        deviations = [side.deviation for side in (self.a, self.b) if side.deviation]
        if not deviations:
            return None
        wanted = self.difference if difference is None else difference
        found = needed(wanted / math.sqrt(statistics.fmean(value**2 for value in deviations)))
        return None if found is None else max(math.ceil(found / self.layers), 2)

    def seeds_needed(self, difference: float | None = None) -> int | None:
        """The same for seeds per arm; None with fewer than two of each."""
        if self.test is None or self.unit == "neurons" or not self.difference:
            return None
        wanted = self.difference if difference is None else difference
        return needed(self.test.effect * wanted / self.difference, self.test.paired)


Pair = tuple[str, str]
"""The sides of a comparison, as `Results.side` names them."""


def sides(results: Sequence[Results], chosen: Sequence[str] = ()) -> list[Pair]:
    """The pairs to compare: those chosen, one after the other, else the neurons of CRATE and GPT-2, else of two arms.

    chosen: an even number of names (ReportConfig sees to it). UserError: one that is not of the runs' arms, or of their
    features as `gpt2 + sae/bt16`.
    """
    names = list(dict.fromkeys(item.arm.name for item in results))
    if chosen:
        known = list(dict.fromkeys([*names, *(item.side for item in results)]))
        if not set(chosen) <= set(known):
            raise UserError(f"--compare {' '.join(chosen)}: give pairs of two of the arms {', '.join(known)}")
        return list(dict.fromkeys(zip(chosen[::2], chosen[1::2], strict=True)))
    found = list(USUAL) if set(USUAL) <= set(names) else names[:2]
    return [(found[0], found[1])] if len(found) == 2 else []


Mix = tuple[tuple[Results, float], ...]
"""A run, or two milestones of one with the weights of an interpolation between them."""


def comparisons(results: Sequence[Results], primary: Quantity, chosen: Sequence[str] = ()) -> list[list[Comparison]]:
    """All that the runs allow: a list per pair, size and number of training tokens, the primary quantity first.

    Where runs have milestones, a list at equal loss follows that at equal tokens.
    """
    return [[*found] for pair in sides(results, chosen) for found in _comparisons(results, primary, pair)]


def against_features(results: Sequence[Results], primary: Quantity) -> list[Comparison]:
    """Neurons against the features of sparse autoencoders, by the primary quantity, or the first there is.

    Every arm's features against its own neurons, and against those of the first of the arms that are compared: is
    sparse coding inside of the model better than afterwards?
    """
    usual = [a for a, _ in sides(results)]
    pairs = [(arm, item.side) for item in results if item.features for arm in (*usual, item.arm.name)]
    groups = [found for pair in dict.fromkeys(pairs) for found in _comparisons(results, primary, pair)]
    return [first for found in groups if (first := next(found, None)) is not None]


def _comparisons(results: Sequence[Results], primary: Quantity, pair: Pair) -> Iterator[Iterator[Comparison]]:
    """Those of two sides, on the layers that all their runs were scored on."""
    wanted = [item for item in results if item.side in pair]
    shared: dict[Any, set[int]] = {}
    for item in wanted:
        shared[item.matter] = shared.get(item.matter, {*item.scores.layers}) & {*item.scores.layers}
    results = [item.only(shared.get(item.matter, item.scores.layers)) for item in results]
    wanted = [item for item in results if item.side in pair]
    groups = _at_equal_tokens(wanted, pair)
    if len({item.arm.name for item in wanted}) > 1:  # neurons and features of one model are at equal loss anyway
        groups += _at_equal_loss(wanted, pair)
    for arms, loss in groups:
        found = (_compare(arms, quantity, primary, results, loss) for quantity in _quantities(results, primary))
        yield (one for one in found if one is not None)


Arms = list[dict[int, Mix]]
"""Of either side: what is compared, by seed."""


def _at_equal_tokens(results: Sequence[Results], pair: Pair) -> list[tuple[Arms, float | None]]:
    """The end of training before its milestones, untrained controls last."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mix]]] = {}
    for item in results:
        arms = groups.setdefault((item.matter, item.arm.tokens_trained), {})
        # Seeds are the unit of replication, so a second run of a seed (the first given stays) is none.
        arms.setdefault(item.side, {}).setdefault(item.arm.seed or 0, ((item, 1.0),))
    shared = [(key, [arms[name] for name in pair]) for key, arms in groups.items() if arms.keys() >= set(pair)]
    shared.sort(key=lambda group: (group[0][1] == 0, group[0][0], -(group[0][1] or 0)))
    return [(arms, None) for _, arms in shared]


def _at_equal_loss(results: Sequence[Results], pair: Pair) -> list[tuple[Arms, float | None]]:
    """For each seed at the worse of the two final losses: the other arm is taken back to where it had that."""
    courses: dict[tuple[Any, ...], dict[tuple[str, int], list[Results]]] = {}
    for item in results:
        if item.arm.tokens_trained and _loss(item) is not None:
            courses.setdefault(item.matter, {}).setdefault((item.side, item.arm.seed or 0), []).append(item)
    found: list[tuple[Arms, float | None]] = []
    for _, of_arms in sorted(courses.items(), key=lambda entry: entry[0]):
        arms: Arms = [{}, {}]
        losses = []
        for seed in sorted({seed for _, seed in of_arms}):
            both = [sorted(of_arms.get((name, seed), ()), key=lambda item: item.arm.tokens_trained) for name in pair]
            target = max((_loss(course[-1]) or 0.0 for course in both if course), default=0.0)
            mixes = [_at_loss(course, target) for course in both]
            if mixes[0] and mixes[1] and max(map(len, both)) > 1:
                arms[0][seed], arms[1][seed] = mixes
                losses.append(target)
        if losses:
            found.append((arms, statistics.fmean(losses)))
    return found


def _loss(item: Results) -> float | None:
    return finite(item.evaluation["loss"])


def _at_loss(course: Sequence[Results], target: float) -> Mix:
    """Where a run had a loss: its end, or between the two milestones around that; nothing before the first of them."""
    losses = [_loss(item) or 0.0 for item in course]
    if losses and losses[-1] >= target:
        return ((course[-1], 1.0),)
    for place, (before, after) in enumerate(itertools.pairwise(losses)):
        if before >= target > after:
            share = (before - target) / (before - after)
            return (course[place], 1 - share), (course[place + 1], share)
    return ()


def _quantities(results: Sequence[Results], primary: Quantity) -> list[Quantity]:
    """The primary one, other gains of its kind, then every protocol's own measure: the score and its gains."""
    beside = [Quantity(primary.protocol, primary.measure, control) for control in GAINS]
    measures = [one for one in measures_of(primary.protocol) if one in ON_UNIFORM_TEXT]
    beside += [Quantity(primary.protocol, one, SHUFFLED) for one in measures]
    names = protocols(results)
    found = [Quantity(name, measures_of(name)[0], control) for name in names for control in (None, *GAINS)]
    return list(dict.fromkeys([primary, *beside, *found]))


def _compare(
    arms: Arms, quantity: Quantity, primary: Quantity, results: Sequence[Results], loss: float | None
) -> Comparison | None:
    a, b = (_side(mixes, quantity, results) for mixes in arms)
    if a is None or b is None:
        return None
    test = compare_seeds(a.seeds, b.seeds)
    if min(len(a.seeds), len(b.seeds)) < 2 and quantity.over != UNTRAINED:
        first = [next(iter(mixes[seed] for seed in side.seeds)) for mixes, side in zip(arms, (a, b), strict=True)]
        # Milestones of one run are the same neurons, so that those of two cannot be tested as if they were others.
        whole = all(len(mix) == 1 for mix in first)
        test = compare_neurons(*(quantity.layers(mix[0][0]) for mix in first)) if whole else None
    one = next(iter(arms[0].values()))[0][0]
    layers = max(len(quantity.layers(one)), 1)
    tokens = one.arm.tokens_trained if loss is None else None
    return Comparison(one.arm.size, tokens, quantity, quantity == primary, a, b, test, layers, loss, _only(arms))


def _only(arms: Arms) -> tuple[int, ...]:
    """The layers that are compared, if some run has others."""
    items = [item for mixes in arms for mix in mixes.values() for item, _ in mix]
    left_out = any({*item.activity} - {*item.scores.layers} for item in items)
    return tuple(items[0].scores.layers) if left_out else ()


def _side(mixes: Mapping[int, Mix], quantity: Quantity, results: Sequence[Results]) -> Side | None:
    """None when no run has the quantity."""
    means = {
        seed: _mixed([(quantity.mean(item, results), share) for item, share in mix]) for seed, mix in mixes.items()
    }
    seeds = {seed: mean.mean for seed, mean in means.items() if mean.mean is not None}
    if not seeds:
        return None
    over_seeds = mean_of([*seeds.values()])
    error = over_seeds.standard_error if len(seeds) > 1 else means[next(iter(seeds))].standard_error
    layers = [layer for mix in mixes.values() for layer in quantity.layers(mix[-1][0])]
    deviations = [value for layer in layers if (value := mean_of(layer).standard_deviation) is not None]
    losses = [_mixed([(Estimate(_loss(item), None), share) for item, share in mix]).mean for mix in mixes.values()]
    known = [loss for loss in losses if loss is not None]
    one = next(iter(mixes.values()))[0][0]
    return Side(
        arm=one.side,
        title=one.title,
        seeds=seeds,
        neurons=sum(map(len, layers)),
        mean=statistics.fmean(seeds.values()),
        standard_error=error,
        deviation=math.sqrt(statistics.fmean(value**2 for value in deviations)) if deviations else None,
        loss=statistics.fmean(known) if known else None,
    )


def _mixed(parts: Sequence[tuple[Estimate, float]]) -> Estimate:
    """A weighted mean; its error as if the parts were independent."""
    if any(part.mean is None for part, _ in parts):
        return Estimate(None, None)
    errors = [part.standard_error and share * part.standard_error for part, share in parts]
    return Estimate(sum(share * (part.mean or 0) for part, share in parts), in_quadrature(*errors))

"""A comparison in words: the headline of a report, and the caveats its reader must know first."""

from __future__ import annotations

from collections.abc import Sequence

from cratescope.report.text import count, number
from cratescope.results.compare import Comparison, Pair, Quantity
from cratescope.results.runs import Results
from cratescope.results.tables import paper


def headline(pairs: Sequence[Comparison]) -> str:
    """Two sentences on the comparisons of one size: the first of them, and whether it exceeds the noise."""
    first = pairs[0]
    tokens = first.tokens_trained
    trained = "as adopted" if tokens is None else f"after {count(tokens)} training tokens" if tokens else "untrained"
    if first.loss is not None:
        trained = f"at a validation loss of {first.loss:.2f} nats"
    named = f"on the primary measure ({first.quantity.name})" if first.primary else f"on {first.quantity.name}"
    a, b = (f"{number(side.mean)} ± {number(side.standard_error)}" for side in (first.a, first.b))
    whose = f"features of {first.a.title}" if first.a.features else f"{first.a.title}'s neurons"
    others = f"features of {first.b.title}" if first.b.features else f"{first.b.title}'s"
    text = f"At size {first.size.upper()}, {trained}, {whose} score {a} {named}, {others} {b}. "
    if first.test is None:
        verdict = f"The difference is {number(first.difference, sign=True)}; there are too few values to test it."
    else:
        low, high = number(first.test.low, sign=True), number(first.test.high, sign=True)
        numbers = f"{number(first.difference, sign=True)} (95 % interval {low} to {high}, p = {first.test.p:.2g})"
        seeds = f"{min(len(first.a.seeds), len(first.b.seeds))} seeds a side"
        over = f"over {seeds}" if first.unit == "seeds" else "over the neurons of one run a side"
        ahead = f"{(first.a if first.difference > 0 else first.b).title} is ahead"
        verdict = f"The difference is {numbers} {over}: {ahead if first.clear else 'the two are not told apart'}."
    return (text + verdict).replace(" ± ", "\u00a0±\u00a0")


def caveats(results: Sequence[Results], groups: Sequence[Sequence[Comparison]], primary: Quantity) -> list[str]:
    """List what the reader must know before believing the headline, derived from the numbers."""
    pairs = [pair for group in groups for pair in group]
    notes = [*_about_pairs(pairs, primary)]
    most, theirs = max(item.arm.tokens_trained or 0 for item in results), paper()["tokens"]
    if 0 < most < theirs:
        notes.append(
            f"The longest run here read {count(most)} tokens; the paper's Base runs read about {count(theirs)}, "
            f"{theirs / most:,.0f} times as many, and its explainer and simulator have 7B parameters."
        )
    if not any(item.arm.untrained for item in results):
        notes.append("No untrained model is among the runs; untrained neurons can score above zero too, so add one.")
    return notes


def _about_pairs(pairs: Sequence[Comparison], primary: Quantity) -> list[str]:
    if not pairs:
        what = "There are no two arms of the same size, data, context and training tokens here"
        return [f"{what}, so the report makes no comparison."]
    notes = []
    fewest = min(min(len(pair.a.seeds), len(pair.b.seeds)) for pair in pairs)
    if fewest < 2:
        notes.append(
            "Seeds are the unit of replication: where a side has one training run, errors and p-values count only "
            "which neurons were drawn, not how another seed would have turned out, and cannot settle which arm "
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
    notes.append(f"Each mean rests on {min(min(pair.a.neurons, pair.b.neurons) for pair in pairs):,} neurons or more.")
    different = (pair for pair in pairs if pair.a.loss and pair.b.loss and pair.a.loss != pair.b.loss)
    unmatched = next((pair for pair in different if pair.tokens_trained), None)
    if unmatched is not None:
        notes.append(
            f"The models are matched in tokens, not in loss: {unmatched.a.loss:.2f} nats for {unmatched.a.title} and "
            f"{unmatched.b.loss:.2f} for {unmatched.b.title} at size {unmatched.size.upper()}."
        )
    return notes


def about_sides(sides: Sequence[Pair], groups: Sequence[Sequence[Comparison]]) -> list[str]:
    """Say which pairs have no runs that could be compared."""
    compared = {(group[0].a.arm, group[0].b.arm) for group in groups}
    left = [f"{a} with {b}" for a, b in sides if (a, b) not in compared]
    why = "they have no runs of the same size, data, context and training tokens"
    return [f"Not compared, because {why}: {', '.join(left)}."] if left else []


def about_features(results: Sequence[Results], pairs: Sequence[Comparison]) -> list[str]:
    """Say which features have no neurons that they could be compared with."""
    compared = {(side.arm, pair.size) for pair in pairs for side in (pair.a, pair.b)}
    left = [item.label for item in results if item.features and (item.side, item.arm.size) not in compared]
    why = "there are no neurons here with a common measure on as much text, by the same explainer and settings"
    return [f"Not compared with neurons, because {why}: {', '.join(left)}."] if left else []

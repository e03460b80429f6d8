"""Do measures give equal explanations equal scores, however often a neuron fires? Planted neurons from 0.1 % to 50 %.

A neuron fires on a set of words of real text, two causes of equal size, that are together as common as wanted. It is
explained by rows of values, without a language model: the right set, the same with a value for each word from 0.25 to 1
(unsure), one of its two causes, a tenth of it, a set twice or ten times as common that holds it, and the set of another
neuron. All neurons have the same noise:

* none: the strength of each firing is drawn from 0.5 to 1, and nothing else.
* elsewhere: besides, 30 % of the tokens have the activation of another token, drawn from the same text.
* in proportion: besides, normal noise on every token, 30 % of the variance.
* background: besides, normal noise of standard deviation 0.1 on every token, the same for all neurons.

Each is scored on uniform text by every measure of the house and by candidates that are tried here. *Drift* is the
largest less the smallest mean score of equal explanations between 1 % and 40 %.

    python benchmarks/planted_density.py --data demo/data --out density
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cratescope.files import write_json, write_text
from cratescope.neurons.records import Window
from cratescope.score.measures import measure, specific, split
from cratescope.score.weights import Weights, every_word_alike
from cratescope.score.words import Reader, Words
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import vocabulary_strings

CONTEXT, WIDTH = 256, 64
DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.5)
USUAL = (0.01, 0.4)
"""Drift is taken between these densities."""
NOISES = ("none", "elsewhere", "in proportion", "background")
EXPLANATIONS = ("right", "unsure", "one cause", "a tenth", "twice", "ten times", "another")
HOUSE = ("pearson", "spearman", "cosine", "auprc", "f1", "iou", "balanced", "unseen", "specific")
UNEXPLAINED = 0.3
"""Of the tokens (noise elsewhere) or of the variance (in proportion)."""
BACKGROUND = 0.1
COMMONEST = 0.9
"""A word is no more common than this part of the set that is drawn, so that no set is one word."""

Row = np.ndarray


@dataclass(frozen=True)
class Options:
    """Sweep the density of planted neurons and measure how the measures move."""

    data: Path
    """Folder made by `cratescope prepare`; its heldout split is read."""
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    excerpts: int = 2400
    """Excerpts of 256 tokens to draw windows from."""
    windows: int = 50
    """Scored windows of 64 tokens, as many as protocol uniform has."""
    neurons: int = 200
    """Neurons of each density."""
    seed: int = 0
    """Draws words, windows and activations."""


@dataclass(frozen=True)
class Case:
    """A neuron on its scored tokens (n,): what it does, once and again, and what is known of the text.

    fitted: the words and activations of as many other tokens.
    """

    truth: Row
    again: Row
    words: Words
    fitted: tuple[Row, Row]


def text(options: Options) -> Row:
    """The number of each token's word (excerpts, CONTEXT)."""
    data = TokenData.open(options.data)
    excerpts = data.split("heldout").spaced(options.excerpts, CONTEXT)
    windows = [Window(tokens, np.zeros(CONTEXT), row, 0, 0) for row, tokens in enumerate(excerpts)]
    return Words.of(windows, (), Reader(vocabulary_strings(data.tokenizer))).number.reshape(excerpts.shape)


def drawn(rng: np.random.Generator, frequency: Row, share: float, free: Row) -> Row:
    """A set of words (v,) out of `free` that are together `share` of the text, within 2 %."""
    left, found = share, np.zeros(len(frequency), dtype=bool)
    for word in rng.permutation(np.flatnonzero(free & (frequency <= COMMONEST * share))):
        if frequency[word] <= left:
            found[word] = True
            left -= frequency[word]
        if left < 0.02 * share:
            break
    return found


def explanations(rng: np.random.Generator, frequency: Row, density: float) -> tuple[Row, dict[str, Row]]:
    """The rule (v,) of a neuron, and each word's value in its explanations; one that would be too common is missing."""
    everything = np.ones(len(frequency), dtype=bool)
    cause = drawn(rng, frequency, density / 2, everything)
    rule = cause | drawn(rng, frequency, density / 2, ~cause)
    unsure = rule * rng.uniform(0.25, 1, len(rule))
    found = {"right": rule, "unsure": unsure, "one cause": cause, "another": drawn(rng, frequency, density, everything)}
    if density >= 0.005:  # there are no words rare enough for less
        found["a tenth"] = drawn(rng, frequency, density / 10, rule)
    for name, times in (("twice", 2), ("ten times", 10)):
        if times * density <= 0.8:
            found[name] = rule | drawn(rng, frequency, (times - 1) * density, ~rule)
    return rule, {name: values.astype(float) for name, values in found.items()}


def activations(rng: np.random.Generator, fires: Row, noise: str) -> Row:
    strong = fires * rng.uniform(0.5, 1, fires.shape)
    if noise == "elsewhere":
        return np.where(rng.random(fires.shape) < UNEXPLAINED, rng.permutation(strong), strong)
    deviation = {
        "none": 0.0,
        "in proportion": float(np.sqrt(strong.var() * UNEXPLAINED / (1 - UNEXPLAINED))),
        "background": BACKGROUND,
    }[noise]
    return strong + deviation * rng.standard_normal(fires.shape)


def cases(number: Row, options: Options) -> Iterator[tuple[tuple[str, str, float], Case, Row]]:
    """(noise, explanation, density), the neuron and the explanation's row."""
    frequency = np.bincount(number.reshape(-1)) / number.size
    n = options.windows * WIDTH
    for density in DENSITIES:
        for neuron in range(options.neurons):
            rng = np.random.default_rng([options.seed, round(density * 1000), neuron])
            rule, named = explanations(rng, frequency, density)
            rows = rng.integers(len(number), size=2 * options.windows)
            first = rng.integers(CONTEXT - WIDTH + 1, size=(len(rows), 1))
            words = number[rows[:, None], first + np.arange(WIDTH)].reshape(-1)
            shown = np.unique(words[n:].reshape(-1, WIDTH)[:5])
            scored = Words(words[:n], ~np.isin(words[:n], shown))
            for noise in NOISES:
                truth = activations(rng, rule[words], noise)
                again = activations(rng, rule[words[:n]], noise)
                case = Case(truth[:n], again, scored, (words[n:], truth[n:]))
                for name, values in named.items():
                    yield (noise, name, density), case, values[words[:n]]


def correlation(one: Row, other: Row, weights: Row | None = None) -> float:
    """NaN for a constant side."""
    weights = np.ones(len(one)) if weights is None else weights
    x, y = (side - np.average(side, weights=weights) for side in (one, other))
    under = np.sqrt(np.average(x * x, weights=weights) * np.average(y * y, weights=weights))
    return float(np.average(x * y, weights=weights) / under) if under > 1e-9 else np.nan


def is_on(case: Case) -> Row:
    """As `specific` cuts the truth."""
    return split(np.maximum(case.truth, 0))


def over_table(case: Case, said: Row) -> float:
    """Ceiling: r over that of the best learned predictor, a table of words' mean activations on other windows."""
    words, activation = case.fitted
    size = int(max(words.max(), case.words.number.max())) + 1
    mean = (np.bincount(words, activation, size) + activation.mean()) / (np.bincount(words, minlength=size) + 1)
    best = correlation(case.truth, mean[case.words.number])
    return correlation(case.truth, said) / best if best > 0.05 else np.nan


def over_reliability(case: Case, said: Row) -> float:
    """Ceiling: r over what the noise allows. Needs the neuron a second time, which no real one offers."""
    reliability = correlation(case.truth, case.again)
    return correlation(case.truth, said) / np.sqrt(reliability) if reliability > 0.02 else np.nan


def information(case: Case, said: Row) -> float:
    """Bits that the explanation saves on whether the neuron is on, as a fraction of their entropy."""
    on, named = is_on(case), split(said)
    shares = [float((on & named).mean()), float((on & ~named).mean()), float(named.mean()), float(on.mean())]
    both, missed, broad, dense = shares
    left = broad * entropy(both / broad) + (1 - broad) * entropy(missed / (1 - broad)) if 0 < broad < 1 else np.nan
    return 1 - left / entropy(dense) if 0 < dense < 1 else np.nan


def entropy(p: float) -> float:
    return float(-sum(x * np.log2(x) for x in (p, 1 - p) if x > 0))


def normalised_precision(case: Case, said: Row) -> float:
    """AUPRC of whether the neuron is on, less its base rate, over the most that can be had beyond it."""
    on = is_on(case)
    base, found, recall = on.mean(), 0.0, 0.0
    for value in np.unique(said)[::-1]:
        now = (said >= value)[on].mean() if on.any() else np.nan
        found, recall = found + (now - recall) * on[said >= value].mean(), now
    return float((found - base) / (1 - base))


def at_one_density(case: Case, said: Row) -> float:
    """r with weights that make a tenth of the tokens active in every neuron."""
    on = is_on(case)
    if on.all() or not on.any():
        return np.nan
    return correlation(case.truth, said, np.where(on, 0.1 / on.mean(), 0.9 / (1 - on.mean())))


def matched_values(case: Case, said: Row) -> float:
    """Covariance with the explanation given the neuron's own values in its order, over the neuron's variance."""
    place, by_value = np.unique(said, return_inverse=True)[1], np.empty(len(said))
    by_value[np.argsort(said, kind="stable")] = np.sort(case.truth)
    own = (np.bincount(place, by_value) / np.bincount(place))[place]
    variance = case.truth.var()
    return float(np.mean((case.truth - case.truth.mean()) * own) / variance) if variance > 0 else np.nan


def smaller_gini(case: Case, said: Row) -> float:
    """The smaller of the two Gini correlations, each of one side with the ranks of the other."""
    found = []
    for one, other in ((case.truth, said), (said, case.truth)):
        most = covariance(one, ranks(one))
        found.append(covariance(one, ranks(other)) / most if most > 0 else np.nan)
    return float(min(found))


def covariance(one: Row, other: Row) -> float:
    return float(np.mean((one - one.mean()) * other))


def ranks(values: Row) -> Row:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count / 2)[place] / len(values)


def balanced_specific(case: Case, said: Row) -> float:
    """`specific` with every different word weighing alike."""
    weights = every_word_alike(Weights.once(len(said)), case.words)
    return float(specific(case.truth, said, weights)[0])


def full_width(case: Case, said: Row) -> float:
    """As `specific`, with the width's whole weight."""
    widths = [side.std() for side in (is_on(case), split(said))]
    return correlation(case.truth, said) * min(widths) / max(widths) if min(widths) > 0 else np.nan


def even_width(case: Case, said: Row) -> float:
    """The same with the mean absolute over the standard deviation for the width, which needs no cut."""
    sides = [side for side in (case.truth, said) if side.std() > 0]
    widths = [np.abs(side - side.mean()).mean() / side.std() for side in sides]
    return correlation(case.truth, said) * min(widths) / max(widths) if len(sides) == 2 else np.nan


CANDIDATES: dict[str, Callable[[Case, Row], float]] = {
    "r over a table's": over_table,
    "r over reliability": over_reliability,
    "information": information,
    "AUPRC over base rate": normalised_precision,
    "r at one density": at_one_density,
    "matched values": matched_values,
    "smaller Gini": smaller_gini,
    "balanced specific": balanced_specific,
    "full width": full_width,
    "even width": even_width,
}


def scored(case: Case, said: Row) -> dict[str, float]:
    """Every measure; NaN where it does not exist."""
    values = {name: measure(name, case.truth, said, case.words) for name in HOUSE}
    usual = {name: np.nan if value is None else value for name, value in values.items()}
    return usual | {name: candidate(case, said) for name, candidate in CANDIDATES.items()}


Means = dict[tuple[str, str, str], dict[float, float]]
"""Mean score by density of a noise, an explanation and a measure."""


def sweep(options: Options) -> Means:
    found: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for (noise, explanation, density), case, said in cases(text(options), options):
        for name, value in scored(case, said).items():
            found.setdefault((noise, explanation, name), {}).setdefault(density, []).append(value)
    return {
        key: {density: float(np.mean(kept)) for density, values in row.items() if (kept := finite(values))}
        for key, row in found.items()
    }


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if np.isfinite(value)]


def drift(row: dict[float, float]) -> float:
    """Of the mean scores at the usual densities."""
    usual = [value for density, value in row.items() if USUAL[0] <= density <= USUAL[1]]
    return max(usual) - min(usual) if usual else np.nan


def drifts(means: Means) -> str:
    """For each noise and measure: the drift of every explanation, and what right and ten times too broad get at 1 %."""
    lines = [["noise", "measure", *(f"drift: {name}" for name in EXPLANATIONS), "right, 1 %", "ten times, 1 %"]]
    for noise in NOISES:
        for name in (*HOUSE, *CANDIDATES):
            row = [drift(means[noise, explanation, name]) for explanation in EXPLANATIONS]
            row += [means[noise, explanation, name].get(0.01, np.nan) for explanation in ("right", "ten times")]
            lines.append([noise, name, *(f"{value:.3f}" for value in row)])
    return table(lines)


def by_density(means: Means, names: Sequence[str]) -> str:
    """Mean scores at every density."""
    lines = [["noise", "explanation", "measure", *(f"{density:.1%}" for density in DENSITIES)]]
    for noise in NOISES:
        for explanation in EXPLANATIONS:
            for name in names:
                row = means[noise, explanation, name]
                cells = (f"{row[density]:.3f}" if density in row else "" for density in DENSITIES)
                lines.append([noise, explanation, name, *cells])
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    means = sweep(options)
    shown = drifts(means) + "\n" + by_density(means, HOUSE)
    sys.stdout.write(shown)
    if options.out:
        rows = [[*key, {f"{density}": value for density, value in row.items()}] for key, row in means.items()]
        write_json(options.out.with_suffix(".json"), {"neurons": options.neurons, "seed": options.seed, "rows": rows})
        write_text(options.out.with_suffix(".md"), shown)


if __name__ == "__main__":
    main()

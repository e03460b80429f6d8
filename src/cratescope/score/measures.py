"""Measures of how well simulated activations follow true ones, weighted, with a bootstrap over windows of text.

A measure takes truth (n,), simulated (n,) and weights: b samples of the same n tokens, in each of which a token counts
`weight` times. So one definition serves for the value (weights of 1) and for its bootstrap (how often each window was
drawn), and repeating tokens or weighting them is the same thing. Where a measure does not exist it is NaN here, and
None for whoever calls `measure`.

Two measures look at words and weight the tokens by them (WEIGHERS): `balanced`, where every different word weighs
alike, and `unseen`, on words that the explanation was not made from.

What "active" means to the measures that need it (Oikarinen et al. 2025, arXiv 2506.05774, and its code): the truth is
cut at its highest 1 % of tokens, the simulation, whose scale is arbitrary, at half of its own largest value (there: a
probability of 1/2). A token of activation 0 or less is never active. Both cuts are made once, not in every resample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from cratescope.score.weights import Weigher, Weights, every_word_alike, unseen_words
from cratescope.score.words import Words

ACTIVE = 0.01
"""Fraction of the tokens, those of the highest activation, that count as active (Oikarinen et al. 2025)."""
RESAMPLES = 1000
WIDTH = 0.75
"""How much the width of an explanation counts in `specific`, between 0 (not) and 1."""
COVERAGE = 0.95
"""Of every interval."""
_CHUNK = 2**22
"""Weights in memory at a time."""
NO_WINDOWS = "no windows to score"
NO_UNSEEN_WORD = "no unseen word"
CONSTANT_TRUTH = "constant truth"
CONSTANT_SIMULATION = "constant simulation"
NO_ACTIVE_TOKEN = "no active token"

Measure = Callable[[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Weights], Float[np.ndarray, " b"]]


def measure(
    name: str, truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], words: Words | None = None
) -> float | None:
    """The value of MEASURES[name], or None where it does not exist, for a `reason`. WEIGHERS need the words."""
    if len(truth) < 2:
        return None
    value = _values(name, _scaled(truth), _scaled(simulated), Weights.once(len(truth)), words)[0]
    return float(value) if np.isfinite(value) else None


def reason(
    name: str, truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], words: Words | None = None
) -> str:
    """Why `measure` found None of the same."""
    if not len(truth):
        return NO_WINDOWS
    if name in WEIGHERS:
        counts = WEIGHERS[name](Weights.once(len(truth)), _needed(name, words)).of_tokens[0] > 0
        truth, simulated = truth[counts], simulated[counts]
    if not len(truth):
        return NO_UNSEEN_WORD
    if is_constant(truth):
        return CONSTANT_TRUTH
    return CONSTANT_SIMULATION if is_constant(simulated) else NO_ACTIVE_TOKEN


def _values(
    name: str,
    truth: Float[np.ndarray, " n"],
    simulated: Float[np.ndarray, " n"],
    weights: Weights,
    words: Words | None,
) -> Float[np.ndarray, " b"]:
    if name in WEIGHERS:
        weights = WEIGHERS[name](weights, _needed(name, words))
    return MEASURES[name](truth, simulated, weights)


def _needed(name: str, words: Words | None) -> Words:
    if words is None:
        raise ValueError(f"measure {name} needs the words of the tokens")
    return words


def bootstrap(
    name: str,
    truth: Float[np.ndarray, " n"],
    simulated: Float[np.ndarray, " n"],
    window: Int[np.ndarray, " n"],
    seed: tuple[int, ...],
    resamples: int = RESAMPLES,
    words: Words | None = None,
) -> tuple[float, float] | None:
    """Percentile interval of a measure over resampled windows of text (`window`: the number of each token's, from 0).

    Tokens of a window depend on each other, so windows are what is drawn. Resamples in which the measure does not
    exist are left out; None when fewer than half remain, or with fewer than two windows.
    """
    n_windows = int(window.max(initial=-1)) + 1
    if n_windows < 2:
        return None
    times = _drawn(n_windows, resamples, seed)
    step = max(_CHUNK // len(truth), 1)
    sides = _scaled(truth), _scaled(simulated)
    parts = (Weights(window, times[:, start : start + step]) for start in range(0, resamples, step))
    found = [_values(name, *sides, part, words) for part in parts]
    values = np.concatenate(found)
    values = values[np.isfinite(values)]
    if len(values) < resamples / 2:
        return None
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)
def _drawn(n_windows: int, resamples: int, seed: tuple[int, ...]) -> Float[np.ndarray, "w b"]:
    """How often each sample has each window; kept for the next measure of the same neuron."""
    drawn = np.random.default_rng(seed).integers(n_windows, size=(n_windows, resamples))
    place = np.ravel_multi_index((drawn, np.arange(resamples)), (n_windows, resamples))
    return np.bincount(place.ravel(), minlength=n_windows * resamples).reshape(n_windows, resamples).astype(np.float64)


def _scaled(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Divided by the largest size: squares of very large or small activations leave the range of float64."""
    values = values.astype(np.float64)
    return values / (np.abs(values).max(initial=0) or 1)


def is_constant(values: Float[np.ndarray, " n"]) -> bool:
    """Whether all values are equal, or there are fewer than two."""
    return len(values) < 2 or bool(np.all(values == values[0]))


def active(truth: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """The tokens of the highest activations, 1 % of them (with those equal to the last), and above 0."""
    if not len(truth):
        return np.zeros(0, dtype=bool)
    last = len(truth) - int(np.ceil(ACTIVE * len(truth)))
    return (truth >= np.partition(truth, last)[last]) & (truth > 0)


def predicted(simulated: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """The tokens with at least half of the largest simulated activation, and above 0."""
    return (simulated >= simulated.max(initial=0) / 2) & (simulated > 0)


def _ratio(over: Float[np.ndarray, " b"], under: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
    return np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)


def pearson(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Pearson correlation over all tokens joined together; NaN for a constant side."""
    x, y = truth - truth.mean(), simulated - simulated.mean()  # or the differences below would cancel
    mean_x, mean_y, xx, yy, xy = weights.means(np.stack([x, y, x * x, y * y, x * y]))
    return _correlation(xy - mean_x * mean_y, (xx, mean_x), (yy, mean_y))


def _correlation(covariance: Float[np.ndarray, " b"], *sides: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, " b"]:
    """From the covariance and, of each side, the mean of its squares and its mean."""
    variances = [square - mean**2 for square, mean in sides]
    for variance, (square, _) in zip(variances, sides, strict=True):
        variance[variance < np.maximum(1e-12 * square, 1e-20)] = 0  # what rounding leaves of a constant side
    return np.clip(_ratio(covariance, np.sqrt(variances[0] * variances[1])), -1, 1)


def specific(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Pearson correlation times (the smaller over the larger width of the two sides) to the power of 3/4.

    Each side is cut in two (`split`) once, not in every resample, the truth without what is below 0. With a share p of
    the tokens above the cut a side's width is sqrt(p (1 - p)). Why, and why 3/4: docs/evaluation.md. NaN for a constant
    side and for a truth without an active token.
    """
    above = weights.means(np.array([split(side) for side in (np.maximum(truth, 0), simulated)], dtype=np.float64))
    widths = np.sqrt(above * (1 - above).clip(min=0))
    alike = _ratio(widths.min(0), widths.max(0))
    return pearson(truth, simulated, weights) * np.where(alike > 0, alike, np.nan) ** WIDTH


def split(values: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """The values above the cut into two groups that explains most of their variance (Otsu 1979); none if constant.

    Of several such cuts the lowest. Scale and offset do not matter.
    """
    ordered = np.sort(values)
    below = np.arange(1, len(values))
    between = np.cumsum(ordered - values.mean())[:-1] ** 2 / (below * (len(values) - below))  # up to a factor
    between[ordered[1:] == ordered[:-1]] = -1  # equal values are on one side
    if between.max(initial=-1) < 0:
        return np.zeros(len(values), dtype=bool)
    last = ordered[between.argmax()]
    return values > last


def spearman(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Pearson correlation of the ranks, ties sharing their mean rank."""
    share = weights.of_tokens
    total = share.sum(1, keepdims=True)
    share = np.divide(share, total, out=np.zeros_like(share), where=total > 0)
    x, y = (_ranks(side, share) - 0.5 for side in (truth, simulated))  # the mean rank of all is 1/2
    zero = np.zeros(len(share))
    return _correlation((share * x * y).sum(1), *(((share * side**2).sum(1), zero) for side in (x, y)))


def _ranks(values: Float[np.ndarray, " n"], share: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b n"]:
    """Mean rank of each value, as a fraction of all; `share` of the tokens adds up to 1."""
    place, by_value = _by_value(values, share)
    return (np.cumsum(by_value, 1) - by_value / 2)[:, place]


def _by_value(
    values: Num[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "b v"]]:
    """Index of each token among the distinct values in rising order, and the weight of each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.append(True, ordered[1:] != ordered[:-1])
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.cumsum(first) - 1
    return place, np.add.reduceat(weights[:, order], np.flatnonzero(first), axis=1)


def cosine(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Cosine of the angle between the two; unlike a correlation it is sensitive to the position of 0."""
    xy, xx, yy = weights.sums(np.stack([truth * simulated, truth**2, simulated**2]))
    return _ratio(xy, np.sqrt(xx * yy))


def auprc(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Average precision with which the simulation retrieves the active tokens; equal values are retrieved together.

    sum over the values v of the simulation, falling, of (recall at v - recall above v) x precision at v.
    """
    hits, found = _above(active(truth), simulated, weights.of_tokens)
    positives = hits[:, -1]
    gained = np.diff(hits, axis=1, prepend=0)
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    return _ratio((gained * precision).sum(1), positives)


def _above(
    labels: Bool[np.ndarray, " n"], values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> tuple[Float[np.ndarray, "b v"], Float[np.ndarray, "b v"]]:
    """For each distinct value, falling: weight of the labelled tokens, and of all tokens, at or above it."""
    of_labels, of_all = (_by_value(values, part)[1][:, ::-1] for part in (weights * labels, weights))
    return np.cumsum(of_labels, 1), np.cumsum(of_all, 1)


def auroc(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Chance that an active token has a higher simulated value than one that is not; ties count half."""
    return _area(active(truth), simulated, weights.of_tokens)


def _area(
    labels: Bool[np.ndarray, " n"], values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    hits, others = (_by_value(values, weights * part)[1] for part in (labels, ~labels))
    below = np.cumsum(others, 1) - others / 2
    return _ratio((hits * below).sum(1), hits.sum(1) * others.sum(1))


def _counts(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"], Float[np.ndarray, " b"]]:
    """Weight of the tokens that are active and predicted, active, predicted."""
    labels, guesses = active(truth), predicted(simulated)
    both, labelled, guessed = weights.sums(np.array([labels & guesses, labels, guesses], dtype=np.float64))
    return both, labelled, guessed


def f1(truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights) -> Float[np.ndarray, " b"]:
    """Harmonic mean of precision and recall of predicted against active tokens; NaN without an active token."""
    both, labels, guesses = _counts(truth, simulated, weights)
    return np.where(labels > 0, _ratio(2 * both, labels + guesses), np.nan)


def iou(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Tokens both active and predicted, as a fraction of those that are either; NaN without an active token."""
    both, labels, guesses = _counts(truth, simulated, weights)
    return np.where(labels > 0, _ratio(both, labels + guesses - both), np.nan)


def accuracy(
    truth: Float[np.ndarray, " n"], simulated: Float[np.ndarray, " n"], weights: Weights
) -> Float[np.ndarray, " b"]:
    """Balanced: the mean of the fractions of active and of other tokens that are predicted right."""
    labels, guesses = active(truth), predicted(simulated)
    counted = np.array([labels & guesses, labels, ~labels & ~guesses, ~labels], dtype=np.float64)
    both, positives, neither, negatives = weights.sums(counted)
    return (_ratio(both, positives) + _ratio(neither, negatives)) / 2


MEASURES: dict[str, Measure] = {
    "pearson": pearson,
    "spearman": spearman,
    "cosine": cosine,
    "auprc": auprc,
    "f1": f1,
    "iou": iou,
    "auroc": auroc,
    "accuracy": accuracy,
    "specific": specific,
    "balanced": pearson,
    "unseen": pearson,
}
WEIGHERS: dict[str, Weigher] = {"balanced": every_word_alike, "unseen": unseen_words}
"""How the measures that look at words weight the tokens."""


def look_at_words(names: Collection[str]) -> bool:
    """Does any of these measures need the words of the tokens?"""
    return not WEIGHERS.keys().isdisjoint(names)


def judged(name: str, labels: Bool[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"]) -> float | None:
    """`accuracy` (balanced, yes from a probability of 1/2 on) or `auroc` of yes-or-no answers about windows of text."""
    if labels.all() or not labels.any():
        return None
    if name == "auroc":
        return float(_area(labels, probabilities, np.ones((1, len(labels))))[0])
    right = (probabilities >= 0.5) == labels
    return float((right[labels].mean() + right[~labels].mean()) / 2)

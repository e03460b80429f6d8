"""Every measure against its definition, its weighted form against repeated tokens, and its bootstrap."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

import processes
from cratescope.score.measures import (
    CONSTANT_SIMULATION,
    CONSTANT_TRUTH,
    MEASURES,
    NO_ACTIVE_TOKEN,
    NO_UNSEEN_WORD,
    NO_WINDOWS,
    WEIGHERS,
    active,
    bootstrap,
    is_constant,
    judged,
    measure,
    predicted,
    reason,
    split,
)
from cratescope.score.sanity import FALL
from cratescope.score.weights import Weights
from cratescope.score.words import Words

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
seeds = st.integers(0, 10_000)


def sides(seed: int, n: int, steps: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Truth and simulation with many ties and many zeros, as a ReLU and a digit scale have."""
    rng = np.random.default_rng(seed)
    truth = np.maximum(np.round(rng.normal(size=n) * steps), 0)
    return truth, np.maximum(np.round(truth / 2 + rng.normal(size=n) * steps), 0)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(3, 200), st.floats(1e-3, 1e3))
def test_correlations_equal_numpys_and_scipys(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), rng.normal(size=n) * scale + rng.normal()
    assert measure("pearson", a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    a, b = sides(seed, n)
    assume(not is_constant(a) and not is_constant(b))
    assert measure("spearman", a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_pearson_does_not_mind_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=50), rng.normal(size=50)
    value = measure("pearson", a, b)
    assert value is not None
    assert measure("pearson", a, scale * b + offset) == pytest.approx(value, abs=1e-8)
    assert measure("pearson", a, -b) == pytest.approx(-value, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=20, unique=True), st.integers(-290, 297))
def test_pearson_of_a_side_with_itself_is_one_at_any_size(values: list[int], exponent: int) -> None:
    side = np.array(values) * 10.0**exponent
    assert measure("pearson", side, side) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5, 1e-30])
def test_a_constant_side_has_no_correlation(value: float) -> None:
    varied, constant = np.linspace(0, 1, 7), np.full(7, value)
    for name in ("pearson", "spearman"):
        assert measure(name, varied, constant) is None
        assert measure(name, constant, varied) is None
    assert is_constant(constant) and not is_constant(varied)
    assert is_constant(np.zeros(0)) and is_constant(np.ones(1))


def test_pearson_of_float32_activations_is_computed_in_float64() -> None:
    rng = np.random.default_rng(1)
    a = (1000 + rng.normal(size=5000) * 1e-2).astype(np.float32)
    b = rng.normal(size=5000)
    assert measure("pearson", a, b) == pytest.approx(np.corrcoef(a.astype(np.float64), b)[0, 1], abs=1e-9)


def average_precision(labels: np.ndarray, values: np.ndarray) -> float:
    """By the definition: thresholds one by one, from the highest value down."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        found = values >= threshold
        precision, now = labels[found].mean(), labels[found].sum() / labels.sum()
        total, recall = total + (now - recall) * precision, now
    return total


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 120))
def test_the_other_measures_equal_their_definitions(seed: int, n: int) -> None:
    truth, simulated = sides(seed, n)
    labels, guesses = active(truth), predicted(simulated)
    value = {name: measure(name, truth, simulated) for name in MEASURES if name not in WEIGHERS}
    if not labels.any():
        assert {value[name] for name in ("auprc", "f1", "iou", "auroc")} == {None}
        return
    both, either = (labels & guesses).sum(), (labels | guesses).sum()
    assert value["iou"] == pytest.approx(both / either)
    assert value["f1"] == pytest.approx(2 * both / (labels.sum() + guesses.sum()))
    assert value["auprc"] == pytest.approx(average_precision(labels, simulated))
    if truth.any() and simulated.any():
        assert value["cosine"] == pytest.approx(truth @ simulated / math.sqrt(truth @ truth * (simulated @ simulated)))
    if not labels.all():
        pairs = np.sign(simulated[labels][:, None] - simulated[~labels][None])
        assert value["auroc"] == pytest.approx(((pairs + 1) / 2).mean())
        assert value["accuracy"] == pytest.approx((guesses[labels].mean() + (~guesses[~labels]).mean()) / 2)
        assert judged("auroc", labels, simulated) == pytest.approx(value["auroc"])


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(["pearson", "spearman", "cosine"]))
def test_weighting_tokens_is_repeating_them(seed: int, name: str) -> None:
    truth, simulated = sides(seed, 30)
    weights = np.random.default_rng(seed).integers(0, 3, size=(4, 30)).astype(float)
    found = MEASURES[name](truth / 40, simulated / 40, Weights.each(weights))
    for row, value in zip(weights.astype(int), found, strict=True):
        plain = measure(name, np.repeat(truth, row), np.repeat(simulated, row))
        assert math.isnan(value) if plain is None else value == pytest.approx(plain, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from(sorted(MEASURES)))
def test_a_weight_of_two_is_the_token_twice_for_every_measure(seed: int, name: str) -> None:
    """All tokens alike, so that what counts as active stays the same."""
    truth, simulated = sides(seed, 40)
    once, twice = (
        MEASURES[name](truth / 40, simulated / 40, Weights.each(np.full((1, 40), weight))) for weight in (1.0, 2.0)
    )
    np.testing.assert_allclose(once, twice)


def test_one_percent_of_the_tokens_is_active_and_no_silent_one() -> None:
    truth = np.arange(1000.0)
    assert active(truth).sum() == 10 and active(truth)[-10:].all()
    assert not active(np.zeros(100)).any() and not active(np.zeros(0)).any()
    assert active(np.array([0.0, 0.0, 3.0])).tolist() == [False, False, True]
    assert active(np.array([2.0, 0.0, 2.0])).tolist() == [True, False, True]
    assert predicted(np.array([0.0, 1.0, 2.0, 0.9])).tolist() == [False, True, True, False]
    assert not predicted(np.zeros(3)).any()


def test_the_interval_is_that_of_redrawn_windows_and_of_the_seed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(12, 8))
    simulated = truth + rng.normal(size=(12, 8)) * rng.uniform(0, 4, size=(12, 1))
    number = np.repeat(np.arange(12), 8)
    found = bootstrap("pearson", truth.ravel(), simulated.ravel(), number, (1, 2))
    assert found == bootstrap("pearson", truth.ravel(), simulated.ravel(), number, (1, 2))
    assert found != bootstrap("pearson", truth.ravel(), simulated.ravel(), number, (1, 3))
    plain = []
    for _ in range(1000):
        drawn = rng.integers(0, 12, 12)
        plain.append(np.corrcoef(truth[drawn].ravel(), simulated[drawn].ravel())[0, 1])
    assert found == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.04)
    assert bootstrap("pearson", truth[0], simulated[0], np.zeros(8, dtype=int), (1,)) is None


def test_a_neuron_active_in_one_window_of_many_still_has_an_interval() -> None:
    truth, number = np.zeros(80), np.repeat(np.arange(10), 8)
    truth[3] = 1.0
    low, high = bootstrap("pearson", truth, truth, number, (0,))
    assert (low, high) == pytest.approx((1.0, 1.0))


def test_judgements_of_one_kind_have_no_score() -> None:
    yes = np.array([True, True])
    assert judged("accuracy", yes, np.array([0.2, 0.7])) is None
    assert judged("accuracy", np.array([True, False, False]), np.array([0.5, 0.1, 0.9])) == pytest.approx(0.75)


def words_of(number: list[int] | np.ndarray, unseen: list[int] | tuple[int, ...] = ()) -> Words:
    number = np.array(number, dtype=np.int64)
    return Words(number, np.isin(number, list(unseen)))


def cells(page: str, label: str) -> list[str]:
    """The cells of the row of a table that begins with this label."""
    [row] = re.findall(rf"^\| *{re.escape(label)} *\|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_the_examples_of_the_docs_are_what_is_computed() -> None:
    page = DOCS.read_text(encoding="utf-8")
    example = page[page.index("### Measures that look at words") : page.index("### Density and width")]
    text = next(line for line in example.splitlines() if line.startswith("| | ")).strip("| ").split(" | ")
    names = {word: number for number, word in enumerate(dict.fromkeys(text))}
    shown = re.search(r"had the words \*(\w+)\* and \*(\w+)\*", example)
    assert shown
    words = words_of([names[word] for word in text], [names[word] for word in names if word not in shown.groups()])
    for name, weigher in WEIGHERS.items():
        weights = [float(Fraction(cell)) for cell in cells(example, f"weight in `{name}`")]
        assert weigher(Weights.once(len(text)), words).of_tokens[0].tolist() == pytest.approx(weights)
    truth, simulated = (np.array(cells(example, name), dtype=np.float64) for name in ("truth", "simulated"))
    stated = re.search(r"`pearson` is ([\d.]+), `balanced` ([\d.]+) and `unseen` ([\d.]+)\.", example)
    assert stated
    found = [measure(name, truth, simulated, words) for name in ("pearson", "balanced", "unseen")]
    assert [f"{value:.3f}" for value in found] == [*stated.groups()]
    stated = re.search(
        r"on at (\d+) of 100 tokens, and .* these and (\d+) others. `pearson` is ([\d.]+),\s`specific`\s([\d.]+)\.",
        page,
    )
    assert stated
    fires, others = int(stated[1]), int(stated[2])
    pair = [(np.arange(100) < n).astype(float) for n in (fires, fires + others)]
    found = [measure(name, *pair) for name in ("pearson", "specific")]
    assert [f"{value:.3f}" for value in found] == [stated[3], stated[4]]


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(3, 60))
def test_balanced_is_pearson_with_one_over_the_occurrences_of_the_word(seed: int, n: int) -> None:
    truth, simulated = sides(seed, n)
    number = np.random.default_rng(seed).integers(0, 8, size=n)
    weight = np.array([1 / (number == word).sum() for word in number])
    covariance = np.cov(truth, simulated, aweights=weight)
    value = measure("balanced", truth, simulated, words_of(number))
    assume(value is not None)
    assert value == pytest.approx(covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1]), abs=1e-9)
    assert measure("balanced", truth, simulated, words_of(np.arange(n))) == pytest.approx(
        measure("pearson", truth, simulated), abs=1e-9
    ), "without a word that comes twice it is plain"


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(3, 60))
def test_unseen_is_pearson_on_the_tokens_of_unseen_words_alone(seed: int, n: int) -> None:
    truth, simulated = sides(seed, n)
    words = words_of(np.random.default_rng(seed).integers(0, 8, size=n), (1, 3, 5))
    alone = measure("pearson", truth[words.unseen], simulated[words.unseen])
    found = measure("unseen", truth, simulated, words)
    assert found is None if alone is None else found == pytest.approx(alone, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from(sorted(WEIGHERS)))
def test_a_token_drawn_twice_is_a_token_that_stands_there_twice_also_where_words_count(seed: int, name: str) -> None:
    """In the bootstrap occurrences are those of the sample, so one definition serves both."""
    truth, simulated = sides(seed, 30)
    rng = np.random.default_rng(seed)
    number, times = rng.integers(0, 9, size=30), rng.integers(0, 3, size=(4, 30))
    drawn = WEIGHERS[name](Weights.each(times.astype(float)), words_of(number, (0, 2, 4)))
    assert (drawn.of_tokens >= 0).all()
    found = MEASURES[name](truth / 40, simulated / 40, drawn)
    for row, value in zip(times, found, strict=True):
        again = words_of(np.repeat(number, row), (0, 2, 4))
        plain = measure(name, np.repeat(truth, row), np.repeat(simulated, row), again)
        assert math.isnan(value) if plain is None else value == pytest.approx(plain, abs=1e-9)


def test_measures_that_look_at_words_have_an_interval_and_need_the_words() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=160)
    simulated, number = truth + rng.normal(size=160), np.repeat(np.arange(20), 8)
    words = words_of(rng.integers(0, 30, size=160), range(15))
    for name in ("balanced", "unseen", "specific"):
        value = measure(name, truth, simulated, words)
        low, high = bootstrap(name, truth, simulated, number, (0,), words=words)
        assert low < value < high
    with pytest.raises(ValueError, match="balanced needs the words"):
        measure("balanced", truth, simulated)
    only = words_of(np.where(number == 3, 1, 0), (1,))
    assert bootstrap("unseen", truth, simulated, number, (0,), words=only) is not None, "one window of twenty has any"


def test_what_has_no_value_has_a_reason() -> None:
    truth, simulated = np.array([0.0, 0, 1, 2]), np.array([1.0, 2, 3, 3])
    words = words_of([0, 0, 1, 1], (0,))
    assert measure("unseen", truth, simulated, words) is None
    assert reason("unseen", truth, simulated, words) == CONSTANT_TRUTH
    assert reason("unseen", truth, simulated, words_of([0, 0, 1, 1], (1,))) == CONSTANT_SIMULATION
    assert measure("unseen", truth, simulated, words_of([0, 0, 1, 1])) is None
    assert reason("unseen", truth, simulated, words_of([0, 0, 1, 1])) == NO_UNSEEN_WORD
    assert reason("balanced", truth[:0], simulated[:0], words_of([])) == NO_WINDOWS
    assert measure("balanced", truth, np.ones(4), words) is None
    assert reason("balanced", truth, np.ones(4), words) == CONSTANT_SIMULATION
    silent = np.array([-1.0, -2, -3, -3])
    assert measure("specific", silent, simulated) is None and reason("specific", silent, simulated) == NO_ACTIVE_TOKEN
    assert measure("specific", truth[:1], simulated[:1]) is None


def brute_split(values: np.ndarray) -> float:
    """The largest variance between two groups, by trying every cut."""
    cuts = sorted(set(values))[:-1]
    above = [values > cut for cut in cuts]
    return max(part.mean() * (1 - part.mean()) * (values[part].mean() - values[~part].mean()) ** 2 for part in above)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 60), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_the_cut_explains_most_and_does_not_mind_scale_and_offset(
    seed: int, n: int, scale: float, offset: float
) -> None:
    values, _ = sides(seed, n)
    above = split(values)
    if is_constant(values):
        assert not above.any()
        return
    share = above.mean()
    assert values[above].min() > values[~above].max()
    gained = share * (1 - share) * (values[above].mean() - values[~above].mean()) ** 2
    assert gained == pytest.approx(brute_split(values))
    moved = split(values * scale + offset)
    assert moved.tolist() == above.tolist() or gained == pytest.approx(brute_split(values)), "or a tie"


def test_specific_hardly_minds_how_often_the_neuron_fires() -> None:
    """Half of a neuron explained: plain r moves by 0.09 between 1 % and 40 %, this by 0.02."""
    place = np.arange(10_000) / 10_000
    found = {}
    for density in (0.01, 0.4):
        fires, half, tenfold = ((place < part * density).astype(float) for part in (1, 0.5, 10))
        assert measure("specific", 3 * fires, 2 * fires - 1) == pytest.approx(1.0)
        found[density] = [measure(name, fires, half) for name in ("pearson", "specific")]
        if density == 0.01:
            assert measure("specific", fires, tenfold) < 0.15 < 0.3 < measure("pearson", fires, tenfold)
        assert measure("specific", fires, -half) == pytest.approx(-found[density][1])
    moved = np.subtract(found[0.01], found[0.4])
    assert moved == pytest.approx([0.093, 0.019], abs=1e-3)


def test_nonsense_added_to_an_explanation_that_is_too_narrow_costs_in_specific() -> None:
    place = np.arange(10_000) / 10_000
    fires, narrow = (place < 0.2).astype(float), place < 0.02
    junk = narrow | (np.random.default_rng(0).random(10_000) < 0.02)
    alone, spoilt = (measure("specific", fires, side.astype(float)) for side in (narrow, junk))
    assert spoilt < alone - FALL


def test_one_and_two_threads_find_the_same_intervals():
    one, two = processes.on_threads("import test_measures as t; print(t.intervals())", 1, 2)
    assert one == two and "balanced" in one


def intervals():
    """Of text as large as uniform windows are: products of dense matrices of that size are shared among threads."""
    rng = np.random.default_rng(0)
    truth, noise = np.maximum(rng.normal(size=(2, 3200)), 0)
    number = np.unique(rng.zipf(1.3, 3200), return_inverse=True)[1]
    words = words_of(number, np.flatnonzero(rng.random(number.max() + 1) < 0.5))
    window = np.repeat(np.arange(50), 64)
    return {name: bootstrap(name, truth, truth + noise, window, (0, 1), words=words) for name in MEASURES}

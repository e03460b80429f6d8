"""The missing-label and extra-label tests: which measures pass them follows from their definitions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cratescope.explain.protocols import PROTOCOLS, Protocol
from cratescope.neurons.records import Histogram, Moments, NeuronId, NeuronRecord, Window
from cratescope.score.measures import MEASURES
from cratescope.score.sanity import Case, Verdict, on_records, verdict
from cratescope.score.words import Reader, Words

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
SYNTHETIC_ACTIVE = (0.1, 0.01, 0.001)
"""How often the synthetic neurons are active; the source has 0.5 and 0.0001 as well."""
SYNTHETIC_NEURONS = 20
SYNTHETIC_WORDS = 1000
"""Different words in the text of synthetic neurons; the n-th is the n-th most common, by Zipf's law."""


def on_synthetic(neurons: int = SYNTHETIC_NEURONS) -> list[Verdict]:
    """Every measure on neurons that fire at random and are 1 there: on uniform text, and on top and random windows."""
    samples = {"uniform": _uniform, "top-and-random": _top_and_random}
    return [
        verdict(f"{name}, {rate:.1%} active", measured, list(draw(rate, neurons)))
        for name, draw in samples.items()
        for rate in SYNTHETIC_ACTIVE
        for measured in MEASURES
    ]


def _synthetic_words(n: int, number: int) -> Words:
    """Of n tokens; an explanation has seen every other word."""
    chance = 1 / np.arange(1, SYNTHETIC_WORDS + 1)
    words = np.random.default_rng([number, 3]).choice(SYNTHETIC_WORDS, n, p=chance / chance.sum())
    return Words(words, words % 2 == 1)


def _uniform(rate: float, neurons: int) -> Iterator[Case]:
    """10,000 tokens of text."""
    for number in range(neurons):
        labels = np.random.default_rng([number, 1]).random(10_000) < rate
        yield Case(labels.astype(np.float64), labels, rate, _synthetic_words(labels.size, number))


def _top_and_random(rate: float, neurons: int) -> Iterator[Case]:
    """Five windows of 64 tokens around active ones, and five anywhere, as in the protocol of that name."""
    for number in range(neurons):
        labels = np.random.default_rng([number, 2]).random((10, 64)) < rate
        labels[:5, 32] = True
        labels = labels.reshape(-1)
        yield Case(labels.astype(np.float64), labels, rate, _synthetic_words(labels.size, number))


@pytest.fixture(scope="module")
def synthetic() -> list[Verdict]:
    return on_synthetic()


def passing(found: list[Verdict], sample: str) -> set[str]:
    """Measures that pass at every rate."""
    rows = [item for item in found if item.sample.startswith(sample)]
    return {item.measure for item in rows} - {item.measure for item in rows if not item.passes}


def test_on_uniform_text_the_measures_of_the_source_pass(synthetic: list[Verdict]) -> None:
    assert passing(synthetic, "uniform") >= {"pearson", "cosine", "auprc", "f1", "iou", "balanced", "specific"}
    assert not passing(synthetic, "uniform") & {"auroc", "accuracy"}
    assert {item.measure for item in synthetic} == {*MEASURES}


def test_nothing_passes_on_chosen_windows_when_activity_is_rare(synthetic: list[Verdict]) -> None:
    assert passing(synthetic, "top-and-random") == set()
    rare = [item for item in synthetic if item.sample.startswith("top-and-random, 0.1%") and item.measure != "unseen"]
    assert all(item.missing > 0.9 and item.extra < 0.9 for item in rare), "too broad an explanation is not noticed"


def test_the_table_of_the_docs_is_what_is_computed(synthetic: list[Verdict]) -> None:
    table = re.search(r"<!-- sanity -->\n(.*?)\n\n", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    rates = [f"{rate:.1%}" for rate in SYNTHETIC_ACTIVE]
    shown = {(sample, rows[0][2 + n], row[1]): row[2 + n] for row in rows[2:] for sample in [row[0]] for n in range(3)}
    wanted = {
        (sample, f"{rate} active", item.measure): f"{item.missing:.0%} / {item.extra:.0%}"
        for item in synthetic
        for sample, rate in [item.sample.removesuffix(" active").split(", ")]
        if rate in rates
    }
    assert shown == wanted


def test_spoiling_halves_and_doubles_the_labels_of_the_text() -> None:
    labels = np.random.default_rng(0).random(100_000) < 0.1
    case, rng = Case(labels.astype(float), labels, 0.1), np.random.default_rng(1)
    missing, extra = case.missing(rng), case.extra(rng)
    assert missing.sum() == pytest.approx(labels.sum() / 2, rel=0.05) and not (missing & ~labels).any()
    assert extra.sum() == pytest.approx(labels.sum() * 2, rel=0.05) and (extra | ~labels).all()


def test_a_measure_that_does_not_look_fails() -> None:
    labels = np.arange(1000) < 50
    found = verdict("x", "accuracy", [Case(labels.astype(float), labels, 0.0005)] * 20)
    assert found.missing == 1.0 and found.extra < 0.9 and not found.passes
    assert not verdict("x", "accuracy", []).passes


def graded() -> NeuronRecord:
    """A neuron with lexical activity of graded strength: 1 % of all tokens are what a right explanation names."""
    rng = np.random.default_rng(0)
    tokens = 64
    activations = np.where(rng.random((60, tokens)) < 0.05, rng.random((60, tokens)), 0).astype(np.float32)
    windows = [Window(np.arange(tokens), row, place, 0, 32) for place, row in enumerate(activations)]
    edges = np.append(0, np.quantile(activations[activations > 0], np.linspace(0, 0.999, 40)))
    count = np.histogram(activations, np.append(edges, 2.0))[0]
    histogram = Histogram(edges, np.append(edges[1:], 2.0), count)
    return NeuronRecord(
        NeuronId("m", "mlp", 0, 0), tuple(windows[:10]), tuple(windows[10:]), Moments(9, 0, 1, 0, 0, 1), 0.05,
        histogram=histogram,
    )  # fmt: skip


def test_real_neurons_are_tested_on_the_windows_of_each_protocol() -> None:
    record = graded()
    found = {(item.sample, item.measure): item for item in on_records([PROTOCOLS["uniform"]], [record] * 8)}
    assert found["uniform", "f1"].passes and found["uniform", "pearson"].passes
    assert {item.n_neurons for item in found.values()} == {8}
    assert on_records([PROTOCOLS["uniform"]], [])[0].n_neurons == 0


def test_measures_that_look_at_words_are_tested_with_the_words_of_each_neuron() -> None:
    protocol, asked = PROTOCOLS["uniform"], []
    reader = Reader([f" w{number % 40}" for number in range(64)])

    def words(protocol: Protocol, record: NeuronRecord) -> Words:
        asked.append(protocol.name)
        return Words.of(protocol.windows(record), [known], reader)

    known = Window(np.array([1, 2]), np.zeros(2, dtype=np.float32), 0, 0, 0)
    found = {item.measure: item for item in on_records([protocol], [graded()] * 20, words)}
    assert list(found) == list(protocol.measures)
    assert all(found[name].passes for name in ("pearson", "balanced", "unseen", "specific"))
    assert {item.n_neurons for item in found.values()} == {20} and asked == ["uniform"] * 20
    nothing_unseen = on_records(
        [protocol], [graded()], lambda protocol, record: Words.of(record.random, record.random, reader)
    )
    assert {item.measure: item.n_neurons for item in nothing_unseen if not item.n_neurons} == {"unseen": 0}
    on_records([PROTOCOLS["top-and-random"]], [graded()], words)
    assert "top-and-random" not in asked, "its measures do not look at words"
    without = on_records([protocol], [graded()] * 2)
    assert [item.measure for item in without] == [
        name for name in protocol.measures if name not in ("balanced", "unseen")
    ]

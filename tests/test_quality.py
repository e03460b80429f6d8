"""Activation quality: what a lexical, a contextual and a dead neuron get, and the comparison at matched density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cratescope.files import read_json
from cratescope.neurons.records import Window, layer_file, read_records
from cratescope.score.quality import activation_quality, concentration, lookup, matched, selectivity, write_quality
from test_explain import DEAD_INDEX, N_NEURONS, make_run


def windows(tokens: np.ndarray, activations: np.ndarray, peak: int = 0) -> list[Window]:
    rows = zip(tokens, activations.astype(np.float32), strict=True)
    return [Window(*row, excerpt, 0, peak) for excerpt, row in enumerate(rows)]


def text(seed: int = 0, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 20, size=(n, 16))


def test_a_neuron_of_tokens_is_predicted_by_them_and_one_of_places_is_not() -> None:
    tokens = text()
    strength = np.random.default_rng(1).random(20)
    assert lookup(windows(tokens, strength[tokens])) == pytest.approx(1.0)
    places = np.broadcast_to(np.arange(16) % 5 == 0, tokens.shape)
    value = lookup(windows(tokens, places))
    assert value is not None and abs(value) < 0.15


def test_the_table_is_fitted_on_the_other_half() -> None:
    """Every window has tokens of its own, so nothing is known of the other half's."""
    tokens = np.arange(640).reshape(40, 16)
    activations = np.random.default_rng(0).random((40, 16))
    assert lookup(windows(tokens, activations)) is None
    shared = np.where(np.arange(16) < 8, tokens, 5)
    value = lookup(windows(shared, activations + (shared == 5)))
    assert value is not None and 0.5 < value < 0.99


def test_concentration_is_the_share_of_the_commonest_peak() -> None:
    tokens = text(n=10)
    tokens[:, 3] = [7, 7, 7, 7, 7, 7, 1, 2, 3, 4]
    assert concentration(windows(tokens, tokens, peak=3)) == 0.6
    assert concentration([]) is None


def test_selectivity_compares_the_text_around_peaks_with_random_text() -> None:
    tokens = text(n=10)
    loud, quiet = np.full(tokens.shape, 3.0), np.full(tokens.shape, 1.0)
    assert selectivity(windows(tokens, loud), windows(tokens, quiet)) == pytest.approx(0.5)
    assert selectivity(windows(tokens, loud), windows(tokens, -quiet)) == 1.0
    alone = np.zeros(tokens.shape)
    alone[:, 2] = 9.0
    assert selectivity(windows(tokens, alone, peak=2), windows(tokens, quiet)) == -1.0
    assert selectivity(windows(tokens, alone, peak=2), windows(tokens, 0 * quiet)) is None


def test_every_neuron_of_a_layer_is_measured_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_quality(run, "codes", [0, 1])
    found = read_json(path)
    assert found["neurons"]["index"] == [*range(N_NEURONS)] * 2
    row = found["layers"][1]
    assert (row["layer"], row["n_neurons"], row["lookup_n"]) == (1, N_NEURONS, N_NEURONS - 1)
    assert row["lookup"] == pytest.approx(1.0) and row["concentration"] is not None
    assert found["neurons"]["lookup"][DEAD_INDEX] is None
    before = path.stat().st_mtime_ns
    assert write_quality(run, "codes", [0, 1]).stat().st_mtime_ns == before
    write_quality(run, "codes", [0])
    assert len(read_json(path)["layers"]) == 1
    dead = read_records(layer_file(run.records("codes"), 0))[DEAD_INDEX]
    assert set(activation_quality(dead).values()) == {None, 0.0}


def test_at_matched_density_only_neurons_that_fire_alike_are_compared() -> None:
    a = {"density": [0.1, 0.1, 0.1, 0.4], "lookup": [0.5, 0.7, 0.6, 0.9]}
    b = {"density": [0.1, 0.1, 0.9, 0.4], "lookup": [0.2, 0.4, 0.1, 0.8]}
    found = matched(a, b, "lookup")
    assert found is not None
    assert (found["a"], found["b"]) == pytest.approx(((2 * 0.6 + 0.9) / 3, (2 * 0.3 + 0.8) / 3))
    assert found["n"] == 3
    back = matched(b, a, "lookup")
    assert back is not None and (back["a"], back["b"]) == (found["b"], found["a"])
    assert matched({"density": [0.0, None], "lookup": [0.1, 0.2]}, b, "lookup") is None

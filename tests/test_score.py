"""Scoring: what a perfect, a constant and a wrong simulation get, the counts, and the summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cratescope.config import ScoreConfig
from cratescope.neurons.explain import DEAD, EMPTY_ANSWER, explain
from cratescope.neurons.llm.scripted import ScriptedLLM
from cratescope.neurons.records import PROTOCOLS, NeuronRecord, Simulation, layer_file, read_records, read_scores
from cratescope.neurons.score import CONSTANT_SIMULATION, CONSTANT_TRUTH, score, score_neuron
from cratescope.neurons.simulate import scoring_records, simulate
from cratescope.run import Run, UserError, read_json
from test_explain import DEAD_INDEX, N_NEURONS, files, first_word, make_run, settings_for
from test_simulate import config_for, knowing

TOP_AND_RANDOM = PROTOCOLS["top-and-random"]


def config(run: Run, **changes: object) -> ScoreConfig:
    return ScoreConfig(run.root, explainer="scripted", **changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    simulate(config_for(run), knowing())
    return run


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> NeuronRecord:
    run = make_run(tmp_path_factory.mktemp("score") / "run", layers=(0,))
    return read_records(layer_file(run.records("codes"), 0))[1]


def simulation(record: NeuronRecord, scale: float = 1.0, offset: float = 0.0) -> Simulation:
    """A simulation that is the truth up to scale and offset; its control is its mirror image."""
    windows = scoring_records(record)
    rows = tuple(tuple(map(float, scale * window.activations + offset)) for window in windows)
    mirrored = tuple(tuple(-value for value in row) for row in rows)
    return Simulation(record.neuron, "list-pmi", "x", "y", tuple(window.key for window in windows), rows, mirrored)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.01, 3.0), (500.0, -2.0)])
def test_a_perfect_simulation_scores_one_on_any_scale(
    record: NeuronRecord, protocol: object, scale: float, offset: float
) -> None:
    pair = score_neuron(record, simulation(record, scale, offset), protocol)
    assert pair.own.value == pytest.approx(1.0, abs=1e-6)
    assert pair.null.value == pytest.approx(-1.0, abs=1e-6)
    assert pair.reason is None


def test_a_constant_simulation_has_no_score(record: NeuronRecord) -> None:
    pair = score_neuron(record, simulation(record, 0.0, 0.3), TOP_AND_RANDOM)
    assert (pair.own.value, pair.null.value, pair.reason) == (None, None, CONSTANT_SIMULATION)


def test_a_constant_truth_has_no_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    dead = read_records(layer_file(run.records("codes"), 0))[DEAD_INDEX]
    rng = np.random.default_rng(0)
    keys = tuple(window.key for window in scoring_records(dead))
    rows = tuple(tuple(rng.random(len(window.tokens))) for window in scoring_records(dead))
    pair = score_neuron(dead, Simulation(dead.neuron, "list-pmi", "x", "y", keys, rows, rows), TOP_AND_RANDOM)
    assert (pair.own.value, pair.reason) == (None, CONSTANT_TRUTH)


def test_tokens_are_pooled_over_the_records_of_the_protocol(record: NeuronRecord) -> None:
    rng = np.random.default_rng(0)
    windows = scoring_records(record)
    noise = {window.key: rng.random(len(window.tokens)) for window in windows}
    rows = tuple(tuple(map(float, noise[window.key])) for window in windows)
    made = Simulation(record.neuron, "list-pmi", "x", "y", tuple(noise), rows, rows)
    for protocol in PROTOCOLS.values():
        chosen = protocol.score_records(record)
        truth = np.concatenate([window.activations for window in chosen])
        guess = np.concatenate([noise[window.key] for window in chosen])
        found = score_neuron(record, made, protocol).own
        assert found.value == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-9)
        assert found.n_tokens == len(truth) == 16 * len(chosen)


def test_random_only_scores_the_random_records_alone(record: NeuronRecord) -> None:
    whole = simulation(record)
    random_keys = {window.key for window in record.random}
    spoilt = tuple(
        row if key in random_keys else tuple(-9.0 for _ in row)
        for key, row in zip(whole.keys, whole.expected, strict=True)
    )
    made = Simulation(whole.neuron, "list-pmi", "x", "y", whole.keys, spoilt, spoilt)
    assert score_neuron(record, made, PROTOCOLS["random-only"]).own.value == pytest.approx(1.0, abs=1e-6)
    value = score_neuron(record, made, TOP_AND_RANDOM).own.value
    assert value is not None and value < 0.99


def mean_gain(run: Run, protocol: str, layer: int) -> float:
    """Score minus shuffled score, averaged over the neurons of a layer that have both."""
    values: dict[int, dict[str, float | None]] = {}
    for item in read_scores(run.scores("codes", "scripted", "list-pmi") / "scores.jsonl"):
        if (item.protocol, item.neuron.layer) == (protocol, layer):
            values.setdefault(item.neuron.index, {})[item.control] = item.value
    both = [row for row in values.values() if None not in row.values()]
    return float(np.mean([row["none"] - row["shuffled"] for row in both]))


def test_a_whole_run_with_a_knowing_model_scores_one(run: Run) -> None:
    summary = score(config(run))
    for name in PROTOCOLS:
        rows = summary["protocols"][name]["layers"]
        assert [row["layer"] for row in rows] == [0, 1]
        for row in rows:
            assert row["mean"] == pytest.approx(1.0, abs=1e-6)
            assert row["null_mean"] < 0.2
            assert row["gain_mean"] == pytest.approx(mean_gain(run, name, row["layer"]), abs=1e-9)
            counts = {key: row[key] for key in ("n_scored", "n_none", "n_dead", "n_neurons")}
            assert counts == {"n_scored": N_NEURONS - 1, "n_none": 1, "n_dead": 1, "n_neurons": N_NEURONS}
            assert row["none_reasons"] == {DEAD: 1}
        model = summary["protocols"][name]["model"]
        assert model["mean"] == pytest.approx(1.0, abs=1e-6)
        assert model["variance_over_layers"] == pytest.approx(0.0, abs=1e-9)
    assert summary["distinct_explanations"] == {"0": N_NEURONS - 1, "1": N_NEURONS - 1}
    assert (summary["explainer"], summary["simulator"], summary["site"]) == ("scripted", "list-pmi", "codes")
    assert read_json(run.scores("codes", "scripted", "list-pmi") / "summary.json") == summary


def test_every_neuron_has_a_line_for_each_protocol_and_control(run: Run) -> None:
    score(config(run))
    found = read_scores(run.scores("codes", "scripted", "list-pmi") / "scores.jsonl")
    assert len(found) == 2 * N_NEURONS * len(PROTOCOLS) * 2
    dead = [item for item in found if item.neuron.index == DEAD_INDEX]
    assert len(dead) == 8 and all(item.value is None for item in dead)


def test_empty_answers_are_counted_and_get_no_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    explain(settings_for(run), ScriptedLLM())
    simulate(config_for(run), knowing())
    summary = score(config(run))
    row = summary["protocols"]["top-and-random"]["layers"][0]
    assert row["mean"] is None and row["gain_mean"] is None
    assert row["none_reasons"] == {DEAD: 1, EMPTY_ANSWER: N_NEURONS - 1}
    assert summary["protocols"]["top-and-random"]["model"]["mean"] is None
    assert summary["distinct_explanations"] == {"0": 0}


def test_scoring_again_writes_the_same_bytes(run: Run) -> None:
    folder = run.scores("codes", "scripted", "list-pmi")
    score(config(run))
    first = files(folder)
    (folder / "summary.json").unlink()
    score(config(run))
    assert files(folder) == first


def test_one_protocol_may_be_scored_alone(run: Run) -> None:
    assert list(score(config(run, protocols=("random-only",)))["protocols"]) == ["random-only"]


def test_bad_settings_are_named(run: Run) -> None:
    with pytest.raises(UserError, match="nonsense: not a protocol; choose from top-and-random"):
        score(config(run, protocols=("nonsense",)))
    with pytest.raises(UserError, match="cratescope simulate"):
        score(config(run, simulator="all-at-once"))


def test_simulations_of_another_model_are_refused(run: Run) -> None:
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_sha256"):
        score(config(run))


def test_simulations_of_replaced_explanations_are_refused(run: Run) -> None:
    path = run.explanations("codes", "scripted") / "0" / f"{DEAD_INDEX + 1}.json"
    path.write_text(path.read_text().replace("the word", "no word"))
    with pytest.raises(UserError, match="simulates another explanation"):
        score(config(run))

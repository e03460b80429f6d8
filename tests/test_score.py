"""Scoring: what a perfect, a constant and a wrong simulation get, controls, counts, judgements, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cratescope.errors import UserError
from cratescope.explain.controls import OWN
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained, Judgement, Simulation
from cratescope.explain.protocols import ON_UNIFORM_TEXT, PROTOCOLS, TOP, Protocol, scoring_windows
from cratescope.explain.simulate import simulate
from cratescope.files import read_json, write_json
from cratescope.llm.answers import EMPTY_ANSWER
from cratescope.neurons.records import NeuronRecord, layer_file, read_records
from cratescope.neurons.sample import DEAD
from cratescope.results.scores import Scores
from cratescope.run import Run, claim
from cratescope.score.config import ScoreConfig
from cratescope.score.measures import (
    CONSTANT_SIMULATION,
    CONSTANT_TRUTH,
    NO_UNSEEN_WORD,
    NO_WINDOWS,
    bootstrap,
    measure,
)
from cratescope.score.score import (
    NO_TOKENIZER,
    ONE_ANSWER,
    read_about,
    score,
    score_judgement,
    score_neuron,
)
from cratescope.score.scores import Score
from cratescope.score.words import Reader, Words, WordsOf, words_for
from cratescope.text.tokenizer import vocabulary_strings
from kept_files import change, drop, flip, read_scores
from scripted import ScriptedLLM
from test_explain import DEAD_INDEX, N_NEURONS, files, first_word, make_run, settings_for
from test_simulate import config_for, knowing

TOP_AND_RANDOM = PROTOCOLS["top-and-random"]
OF_TOP = [protocol for protocol in PROTOCOLS.values() if protocol.set == TOP]
DEFAULT = OF_TOP[:2]


def config(run: Run, **changes: Any) -> ScoreConfig:
    return ScoreConfig(run.root, explainer="scripted", **changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    simulate(config_for(run), knowing())
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("score") / "run", layers=(0,))


@pytest.fixture(scope="module")
def records(small: Run) -> dict[int, NeuronRecord]:
    return read_records(layer_file(small.records("codes"), 0))


@pytest.fixture(scope="module")
def reader(small: Run) -> Reader:
    return Reader(vocabulary_strings(small.tokenizer))


@pytest.fixture(scope="module")
def words(reader: Reader) -> WordsOf:
    return words_for("scripted", reader)


@pytest.fixture(scope="module")
def record(records: dict[int, NeuronRecord]) -> NeuronRecord:
    return records[1]


def made_of(record: NeuronRecord, values: Callable[[np.ndarray], np.ndarray]) -> Simulation:
    """A simulation that is a function of the truth; its shuffled control is its mirror image."""
    windows = scoring_windows(OF_TOP, record)
    rows = tuple(tuple(map(float, values(window.activations))) for window in windows)
    mirrored = tuple(tuple(-value for value in row) for row in rows)
    expected = {OWN: rows, "shuffled": mirrored}
    return Simulation(
        record.neuron, "list-pmi", {OWN: "x", "shuffled": "y"}, tuple(window.key for window in windows), expected
    )


def values_of(scores: list[Score]) -> dict[tuple[str, str], float | None]:
    return {(item.control, item.measure): item.value for item in scores}


@pytest.mark.parametrize("protocol", OF_TOP, ids=lambda protocol: protocol.name)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.01, 3.0), (500.0, -2.0)])
def test_a_perfect_simulation_correlates_fully_on_any_scale(
    record: NeuronRecord, protocol: Protocol, scale: float, offset: float, words: WordsOf
) -> None:
    scores = score_neuron(record, made_of(record, lambda truth: scale * truth + offset), protocol, words)
    found = values_of(scores)
    for name in {*protocol.measures} & {"pearson", "spearman", "balanced", "specific"}:
        assert found[OWN, name] == pytest.approx(1.0, abs=1e-6)
        assert found["shuffled", name] == pytest.approx(-1.0, abs=1e-6)
    assert {item.measure: item.reason for item in scores if item.reason} in ({}, {"unseen": NO_UNSEEN_WORD})
    bounded = {protocol.measures[0], *ON_UNIFORM_TEXT}
    for item in scores:
        between = item.control == OWN and item.measure in bounded and item.value is not None
        assert (item.low, item.high) == (pytest.approx((1, 1)) if between else (None, None))


def test_a_perfect_simulation_on_uniform_text_has_every_measure_at_one(record: NeuronRecord, reader: Reader) -> None:
    def all_unseen(protocol: Protocol, record: NeuronRecord) -> Words:
        return Words.of(protocol.windows(record), (), reader)

    protocol = PROTOCOLS["uniform"]
    found = values_of(score_neuron(record, made_of(record, lambda truth: truth), protocol, all_unseen))
    assert set(found) == {(control, name) for control in (OWN, "shuffled") for name in protocol.measures}
    assert [found[OWN, name] for name in protocol.measures] == pytest.approx([1.0] * 9)
    assert found["shuffled", "f1"] == 0.0


@pytest.mark.parametrize("name", ["uniform", "random-only"])
def test_measures_on_uniform_text_are_rows_beside_plain_r(record: NeuronRecord, words: WordsOf, name: str) -> None:
    """Each is what the measure says of the words, and of the windows explained from, with an interval of its own."""
    rng, protocol = np.random.default_rng(0), PROTOCOLS[name]
    silent = np.unique(record.random[0].tokens[record.random[0].activations == 0])[:4]
    shown = dataclasses.replace(record.top[0], tokens=np.resize(silent, 16))
    record = dataclasses.replace(record, top=(shown,) * 20)
    windows = protocol.windows(record)
    made = made_of(record, lambda truth: 0.5 * truth + (rng.random(len(truth)) < 0.4))
    rows = {item.measure: item for item in score_neuron(record, made, protocol, words) if item.control == OWN}
    tokens = np.concatenate([window.tokens for window in windows])
    truth = np.concatenate([window.activations for window in windows])
    by_key = dict(zip(made.keys, made.expected[OWN], strict=True))
    guess = np.concatenate([by_key[window.key] for window in windows])
    weight = {
        "pearson": np.ones(len(tokens)),
        "balanced": np.array([1 / (tokens == token).sum() for token in tokens]),
        "unseen": ~np.isin(tokens, silent) * 1.0,
    }
    for measured, weights in weight.items():
        covariance = np.cov(truth, guess, aweights=weights)
        wanted = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert rows[measured].value == pytest.approx(wanted, abs=1e-9)
    assert rows["specific"].value == measure("specific", truth, guess)
    assert len({rows[measured].value for measured in (*weight, "specific")}) == 4
    for measured in ("pearson", *ON_UNIFORM_TEXT):
        row = rows[measured]
        assert row.low < row.value < row.high and row.n == len(tokens)
    number = np.repeat(np.arange(len(windows)), 16)
    again = bootstrap("balanced", truth, guess, number, (0, record.neuron.index), words=words(protocol, record))
    assert (rows["balanced"].low, rows["balanced"].high) == again
    assert all(item.low is None for item in score_neuron(record, made, protocol, words) if item.control != OWN)


def test_protocols_on_other_windows_do_not_have_the_measures_of_uniform_text() -> None:
    having = {name for name, protocol in PROTOCOLS.items() if {*ON_UNIFORM_TEXT} <= {*protocol.measures}}
    drawn = {name for name, protocol in PROTOCOLS.items() if {pick.source for pick in protocol.picks} == {"random"}}
    assert having == drawn == {"uniform", "random-only"}
    assert all(
        {*protocol.measures}.isdisjoint(ON_UNIFORM_TEXT) for name, protocol in PROTOCOLS.items() if name not in having
    )


def test_without_windows_the_reason_is_that_there_are_none(record: NeuronRecord, words: WordsOf) -> None:
    empty = dataclasses.replace(record, random=())
    rows = score_neuron(empty, made_of(record, lambda truth: truth), PROTOCOLS["uniform"], words)
    assert {(item.value, item.reason, item.n) for item in rows} == {(None, NO_WINDOWS, 0)}


def test_a_constant_simulation_has_no_correlation(record: NeuronRecord) -> None:
    own, *_ = score_neuron(record, made_of(record, lambda truth: 0 * truth + 0.3), TOP_AND_RANDOM)
    assert (own.value, own.reason, own.low) == (None, CONSTANT_SIMULATION, None)


def test_a_constant_truth_has_no_score(records: dict[int, NeuronRecord]) -> None:
    rng = np.random.default_rng(0)
    made = made_of(records[DEAD_INDEX], lambda truth: rng.random(len(truth)))
    own, *_ = score_neuron(records[DEAD_INDEX], made, TOP_AND_RANDOM)
    assert (own.value, own.reason) == (None, CONSTANT_TRUTH)


def test_tokens_are_pooled_over_the_windows_of_the_protocol(record: NeuronRecord) -> None:
    rng = np.random.default_rng(0)
    made = made_of(record, lambda truth: rng.random(len(truth)))
    rows = dict(zip(made.keys, made.expected[OWN], strict=True))
    for protocol in OF_TOP:
        chosen = protocol.windows(record)
        truth = np.concatenate([window.activations for window in chosen])
        guess = np.concatenate([rows[window.key] for window in chosen])
        found = score_neuron(record, made, protocol)[0]
        assert (found.control, found.measure) == (OWN, protocol.measures[0])
        assert found.value == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-9)
        assert found.n == len(truth) == 16 * len(chosen)
        assert found.low is not None and found.high is not None and found.low <= found.value <= found.high


def test_random_only_scores_the_random_windows_alone(record: NeuronRecord) -> None:
    whole = made_of(record, lambda truth: truth)
    random_keys = {window.key for window in record.random}
    spoilt = tuple(
        row if key in random_keys else tuple(9.0 * place for place, _ in enumerate(row))
        for key, row in zip(whole.keys, whole.expected[OWN], strict=True)
    )
    made = dataclasses.replace(whole, expected={OWN: spoilt})
    assert score_neuron(record, made, PROTOCOLS["random-only"])[0].value == pytest.approx(1.0, abs=1e-6)
    value = score_neuron(record, made, TOP_AND_RANDOM)[0].value
    assert value is not None and value < 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys, rows: (keys[1:], rows[1:]), "has no window .* of protocol"),
        (lambda keys, rows: (keys, (rows[0][:-1], *rows[1:])), "more or fewer values than tokens"),
        (lambda keys, rows: (keys, ((float("nan"), *rows[0][1:]), *rows[1:])), "not a finite number"),
        (lambda keys, rows: (keys, rows[1:]), "windows where"),
    ],
)
def test_rows_that_do_not_fit_the_windows_are_never_scored(
    record: NeuronRecord, change: Callable[..., Any], message: str
) -> None:
    made = made_of(record, lambda truth: truth)
    keys, rows = change(made.keys, made.expected[OWN])
    with pytest.raises(ValueError, match=message):
        score_neuron(record, dataclasses.replace(made, keys=keys, expected={OWN: rows}), TOP_AND_RANDOM)


def gains(run: Run, protocol: str, layer: int, control: str) -> float:
    """Score minus the control's, averaged over the neurons of a layer that have both."""
    values: dict[int, dict[str, float]] = {}
    for item in read_scores(run.scores("codes", "scripted", "list-pmi")):
        if (item.protocol, item.neuron.layer, item.measure) == (protocol, layer, "pearson") and item.value is not None:
            values.setdefault(item.neuron.index, {})[item.control] = item.value
    both = [row[OWN] - row[control] for row in values.values() if {OWN, control} <= row.keys()]
    return float(np.mean(both))


def scored(run: Run, **changes: Any) -> Scores:
    return Scores(read_scores(score(config(run, **changes))))


def test_a_whole_run_with_a_knowing_model_scores_one(run: Run) -> None:
    scores = scored(run)
    assert scores.protocols == [protocol.name for protocol in DEFAULT] and scores.sets == ["top"]
    for name in scores.protocols:
        assert scores.measures(name) == [*PROTOCOLS[name].measures]
        assert {"shuffled", "unigram"} <= {*scores.controls(name)}
        for layer in (0, 1):
            own = scores.mean(name, layer=layer)
            assert own.mean == pytest.approx(1.0, abs=1e-6) and own.low == pytest.approx(1.0, abs=1e-6)
            shuffled = scores.mean(name, control="shuffled", layer=layer).mean
            assert shuffled is not None and shuffled < 0.2
            for control in scores.controls(name):
                gain = scores.mean(name, over=control, layer=layer)
                if gain.n:
                    assert gain.mean == pytest.approx(gains(run, name, layer, control), abs=1e-9)
            counts = {"n_scored": N_NEURONS - 1, "n_none": 1, "n_dead": 1, "n_neurons": N_NEURONS}
            assert scores.counts(name, layer) == counts
            assert scores.reasons(name, layer) == {DEAD: 1}
        model = scores.mean(name)
        assert model.mean == pytest.approx(1.0, abs=1e-6)
        assert model.variance_over_layers == pytest.approx(0.0, abs=1e-9)
    about = read_json(run.scores("codes", "scripted", "list-pmi") / "scores.json")
    assert (about["explainer"], about["simulator"], about["site"]) == ("scripted", "list-pmi", "codes")
    assert [(row["sample"], row["measure"]) for row in about["sanity"]] == [
        (protocol.name, name) for protocol in DEFAULT for name in protocol.measures
    ]
    assert about["made_with"]["top"]["explanations"]["explained"] == "top"
    assert len(read_json(run.quality("codes"))["neurons"]["lookup"]) == 2 * N_NEURONS


def test_every_neuron_has_a_line_for_each_protocol_measure_and_control(run: Run) -> None:
    score(config(run))
    found = read_scores(run.scores("codes", "scripted", "list-pmi"))
    own = [item for item in found if item.control == OWN]
    assert len(own) == 2 * N_NEURONS * sum(len(protocol.measures) for protocol in DEFAULT)
    assert len({(item.neuron, item.protocol, item.control, item.measure) for item in found}) == len(found)
    dead = [item for item in found if item.neuron.index == DEAD_INDEX]
    assert dead and all((item.value, item.reason) == (None, DEAD) for item in dead)


def test_empty_answers_are_counted_and_get_no_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    explain(settings_for(run), ScriptedLLM())
    simulate(config_for(run), knowing())
    scores = scored(run)
    own = scores.mean("top-and-random", layer=0)
    assert own.mean is None and own.low is None
    assert scores.mean("top-and-random", over="shuffled", layer=0).mean is None
    assert scores.reasons("top-and-random", 0) == {DEAD: 1, EMPTY_ANSWER: N_NEURONS - 1}
    assert scores.mean("top-and-random").mean is None
    assert scores.mean("top-and-random", control="unigram").mean is not None, "it needs no explanation"


def test_without_a_tokenizer_the_measures_of_words_are_missing_for_that_reason(run: Run) -> None:
    whole = scored(run)
    assert whole.mean("random-only", "balanced").mean == pytest.approx(1.0)
    kept = {path: path.read_bytes() for path in run.model.glob("*token*")}
    for path in kept:
        path.unlink()
    scores = scored(Run(run.root))
    for name in ("balanced", "unseen"):
        assert scores.mean("random-only", name).mean is None
        assert scores.reasons("random-only", 0, name) == {NO_TOKENIZER: N_NEURONS - 1, DEAD: 1}
    for name in ("pearson", "specific"):
        assert scores.mean("random-only", name).mean == whole.mean("random-only", name).mean
    about = read_about(run.scores("codes", "scripted", "list-pmi"))
    assert {row["measure"] for row in about["sanity"]} == {"pearson", "spearman", "specific"}
    for path, content in kept.items():
        path.write_bytes(content)
    assert scored(Run(run.root)).mean("random-only", "balanced").mean == pytest.approx(1.0), "made again"
    next(iter(kept)).write_bytes(b"{")
    with pytest.raises(UserError, match="tokenizer .*cannot be loaded|not valid JSON"):
        score(config(Run(run.root)))


def test_scoring_again_writes_the_same_bytes(run: Run) -> None:
    folder = run.scores("codes", "scripted", "list-pmi").parents[1]
    score(config(run))
    first = files(folder)
    (folder / "scripted" / "list-pmi" / "scores.json").unlink()
    score(config(run))
    assert files(folder) == first


def test_scores_are_made_again_only_when_something_they_come_from_has_changed(run: Run) -> None:
    score(config(run))
    about = run.scores("codes", "scripted", "list-pmi") / "scores.json"
    first, made = read_json(about), about.stat().st_mtime_ns
    score(config(run))
    assert about.stat().st_mtime_ns == made
    kept = Explained(run, "codes", "scripted", "top").simulations("list-pmi")
    change(kept, 0, 0, skipped="another")
    score(config(run))
    assert read_json(about)["made_from"] != first["made_from"] and about.stat().st_mtime_ns > made
    assert scored(run, protocols=("random-only",)).protocols == ["random-only"]


def test_scoring_that_was_killed_is_not_taken_for_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = score(config(run))
    whole = files(folder)
    simulated = Explained(run, "codes", "scripted", "top").simulations("list-pmi")
    change(simulated, 0, 0, skipped="another")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("cratescope.score.score.on_records", dies)
        score(config(run))
    with pytest.raises(UserError, match=r"scores\.json: no such file"):
        read_about(folder)
    change(simulated, 0, 0, skipped=None)
    assert files(score(config(run))) == whole


def test_damaged_or_missing_scores_are_made_again(run: Run) -> None:
    folder = score(config(run))
    whole = files(folder)
    flip(layer_file(folder, 1), 999)
    assert files(score(config(run))) == whole
    layer_file(folder, 0).unlink()
    assert files(score(config(run))) == whole


def test_scores_of_a_layer_that_is_no_longer_simulated_go(run: Run) -> None:
    folder = score(config(run))
    simulated = Explained(run, "codes", "scripted", "top").simulations("list-pmi").folder
    layer_file(simulated, 1).unlink()
    (simulated / "plan.json").unlink()
    assert Scores(read_scores(score(config(run)))).layers == [0]
    assert not layer_file(folder, 1).exists()


def test_scores_know_the_explanations_they_were_made_from(tmp_path: Path) -> None:
    both = ("top-and-random", "openai")
    run = make_run(tmp_path / "run", layers=(0,))
    explain(settings_for(run, protocols=both), ScriptedLLM(first_word))
    simulate(config_for(run, protocols=both), knowing())
    scores = scored(run, protocols=both)
    assert [(name, scores.set_of[name]) for name in scores.protocols] == [
        ("top-and-random", "top"),
        ("openai", "openai"),
    ]
    assert read_json(run.scores("codes", "scripted", "list-pmi") / "scores.json")["made_with"].keys() == {*scores.sets}


def test_bad_settings_are_named(run: Run) -> None:
    with pytest.raises(UserError, match="nonsense: not a protocol; choose from top-and-random"):
        score(config(run, protocols=("nonsense",)))
    for changes in ({"simulator": "all-at-once"}, {"protocols": ("anthropic",)}):
        with pytest.raises(UserError, match="cratescope simulate"):
            score(config(run, **changes))
    with pytest.raises(UserError, match="of protocol uniform; run `cratescope simulate`"):
        score(config(run, protocols=("uniform",)))


def test_simulations_of_another_model_are_refused(run: Run) -> None:
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_sha256"):
        score(config(run))


def test_explanations_of_another_model_are_refused(run: Run) -> None:
    path = Explained(run, "codes", "scripted", "top").explanations.folder / "manifest.json"
    path.write_text(path.read_text().replace(run.fingerprint(), "0" * 64))
    with pytest.raises(UserError, match="model_sha256"):
        score(config(run))


def test_simulations_of_replaced_explanations_are_refused(run: Run) -> None:
    change(Explained(run, "codes", "scripted", "top").explanations, 0, DEAD_INDEX + 1, text="no word")
    with pytest.raises(UserError, match="simulates another explanation"):
        score(config(run))


def test_a_damaged_simulation_is_named_with_the_way_out(run: Run) -> None:
    kept = Explained(run, "codes", "scripted", "top").simulations("list-pmi")
    expected = dict(kept.read(0)[1].expected)
    expected[OWN] = (expected[OWN][0][1:], *expected[OWN][1:])
    change(kept, 0, 1, expected=expected)
    with pytest.raises(UserError, match=r"layer-00\.parquet: neuron 1 .* run `cratescope simulate` again"):
        score(config(run))


def test_a_killed_simulation_is_told_apart_from_a_small_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    simulate(config_for(run, neurons=3), knowing())
    assert scored(run).counts("random-only", 0)["n_neurons"] == 3
    kept = Explained(run, "codes", "scripted", "top").simulations("list-pmi")
    drop(kept, 1, [min(kept.done(1))])
    with pytest.raises(UserError, match="2 of 3 neurons of layer 1 are simulated"):
        score(config(run))


def judgement(record: NeuronRecord, **changes: Any) -> Judgement:
    text = 'the word "cat"'
    made = Judgement(record.neuron, "detection", OWN, text, (0.9, 0.6, 0.4, 0.1), (True, False, True, False))
    return dataclasses.replace(made, **changes)


def test_judgements_get_balanced_accuracy_and_auroc(record: NeuronRecord) -> None:
    found = {item.measure: item for item in score_judgement(judgement(record), "detection", "top")}
    assert (found["accuracy"].value, found["auroc"].value) == (0.5, 0.75)
    assert found["auroc"].n == 4 and found["auroc"].protocol == "detection"
    silent = judgement(record, probabilities=(), labels=(), skipped="too few active windows")
    assert {(item.value, item.reason) for item in score_judgement(silent, "x", "top")} == {
        (None, "too few active windows")
    }
    of_one = score_judgement(judgement(record, labels=(True,) * 4), "x", "top")
    assert {(item.value, item.reason) for item in of_one} == {(None, ONE_ANSWER)}
    for wrong in ((0.9, 0.6, 0.4), (0.9, 0.6, 0.4, 1.2), (0.9, 0.6, 0.4, float("nan"))):
        with pytest.raises(UserError, match="damaged judgements"):
            score_judgement(judgement(record, probabilities=wrong), "x", "top")


def test_an_intruder_is_found_when_it_is_the_likeliest_of_its_group(record: NeuronRecord) -> None:
    labels = (False, True, False, False, False) * 2
    answers = (0.1, 0.6, 0.1, 0.1, 0.1, 0.5, 0.2, 0.1, 0.1, 0.1)
    made = judgement(record, scorer="intruder", text="", probabilities=answers, labels=labels)
    assert score_judgement(made, "intruder", "top")[0].value == 0.5


def test_scores_of_another_version_are_refused_and_made_again(run: Run) -> None:
    """Version 1 called a neuron's own explanation by another name, 2 had no measures that look at words."""
    score(config(run))
    path = run.scores("codes", "scripted", "list-pmi") / "scores.json"
    about = read_json(path)
    write_json(path, about | {"made_from": about["made_from"] | {"version": "2"}})
    with pytest.raises(UserError, match="scored by another version of cratescope; run `cratescope score` again"):
        read_about(path.parent)
    score(config(run))
    assert read_json(path) == about


def test_judgements_are_scored_with_the_simulations(run: Run) -> None:
    explained = Explained(run, "codes", "scripted", "top")
    kept, simulated = explained.judgements("detection"), explained.simulations("list-pmi").folder
    claim(kept.folder, read_json(simulated / "manifest.json")["identity"])
    for layer in (0, 1):
        record = read_records(layer_file(run.records("codes"), layer))[1]
        kept.write([[judgement(record), judgement(record, control="shuffled", text="other words")]])
    scores = scored(run)
    assert scores.measures("detection") == ["accuracy", "auroc"] and scores.mean("detection", layer=0).mean == 0.5
    assert scores.mean("detection", over="shuffled").mean == 0.0
    assert scores.mean("detection", "auroc").mean == 0.75
    kept.write([[judgement(record, text="no such words")]])
    with pytest.raises(UserError, match=r"layer-01\.parquet: neuron 1 judges another explanation"):
        score(config(run))


def test_a_gain_counts_only_neurons_that_have_both(record: NeuronRecord) -> None:
    other = dataclasses.replace(record.neuron, index=2)
    key = "random-only", "top"
    made = Scores(
        [
            Score(record.neuron, *key, OWN, "pearson", 0.5, 9),
            Score(record.neuron, *key, "empty", "pearson", 0.2, 9),
            Score(other, *key, OWN, "pearson", 0.1, 9),
            Score(other, *key, "empty", "pearson", None, 9, reason=CONSTANT_SIMULATION),
        ]
    )
    assert made.mean("random-only").mean == pytest.approx(0.3)
    assert made.mean("random-only", over="shuffled").mean is None
    gain = made.mean("random-only", over="empty")
    assert made.mean("random-only", control="empty").mean == pytest.approx(0.2)
    assert (gain.mean, gain.n) == (pytest.approx(0.3), 1)

"""The explainer `selected`: of several explanations the one that predicts best, on tokens that nobody scores."""

from __future__ import annotations

import numpy as np
import pytest

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, JudgeConfig, SelectedConfig, SimulateConfig
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained, Explanation
from cratescope.explain.judge import judge
from cratescope.explain.selected import NONE, UNRELATED, correlation
from cratescope.explain.simulate import simulate
from cratescope.neurons.records import read_records
from cratescope.neurons.sample import DEAD, draw_neurons, records_identity
from cratescope.results.scores import Scores
from cratescope.run import claim
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from test_terms_fit import RULES, activations_of, record
from test_terms_stages import run_of

TEXTS = list(RULES.values())


def said(run, name, texts, neurons=None):
    """The explanations of an explainer that another program might be, by neuron."""
    explained = Explained(run, "codes", name, "top")
    made_with = records_identity(run, "codes") | {"neuron_seed": 0, "explained": "top", "by": name}
    claim(explained.explanations.folder, made_with)
    drawn = draw_neurons(run.records("codes") / "layer-00.parquet", 0, 0)
    records = read_records(run.records("codes") / "layer-00.parquet", drawn[:neurons])
    explained.explanations.write(
        [
            Explanation(records[index].neuron, texts[index], name, "1", None if texts[index] else "nothing to say")
            for index in sorted(records)
        ]
    )


def selected(run, **options):
    config = SelectedConfig(select="terms", **options)
    explain(ExplainConfig(run.root, protocols=("uniform",), explainer="selected", selected=config))
    return Explained(run, "codes", "selected", "top").explanations.read(0)


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "run", [record(activations_of(text, seed=n), n) for n, text in enumerate(TEXTS)])


def test_the_text_that_predicts_the_neuron_is_taken_whoever_said_it(run):
    wrong = TEXTS[1:] + TEXTS[:1]
    half = len(TEXTS) // 2
    said(run, "first", TEXTS[:half] + wrong[half:])
    said(run, "second", wrong[:half] + TEXTS[half:])
    found = selected(run, among=("first", "second"))
    assert [found[n].text for n in range(len(TEXTS))] == TEXTS
    assert found[0].prompt == "first, own"
    assert found[len(TEXTS) - 1].prompt == "second, own"


def test_another_neurons_text_is_taken_where_it_predicts_better(run):
    said(run, "first", TEXTS[1:] + TEXTS[:1])
    found = selected(run, among=("first",), others=len(TEXTS) - 1)
    drawn = draw_neurons(run.records("codes") / "layer-00.parquet", 0, 0)
    for index, text in enumerate(TEXTS):
        holder = (index - 1) % len(TEXTS)
        if holder in drawn[:-1]:
            assert (found[index].text, found[index].prompt) == (text, f"first, of neuron {holder}")


def test_of_equally_good_texts_the_first_explainers_own_is_taken(run):
    said(run, "first", TEXTS)
    said(run, "second", TEXTS)
    assert {one.prompt for one in selected(run, among=("second", "first"), others=2).values()} == {"second, own"}


def test_a_text_that_others_repeat_keeps_its_place(run):
    """Half the weight predicts as well: the first explainer wins, though the second says the same text elsewhere."""
    said(run, "first", TEXTS)
    said(run, "second", ["numbers (+5)", *TEXTS[2:], TEXTS[0]])
    assert selected(run, among=("first", "second"), others=4)[0].prompt == "first, own"


def test_neurons_without_a_text_that_predicts_anything_are_skipped_by_reason(tmp_path):
    dead = record(activations_of(TEXTS[0], seed=0) * 0, 0)
    run = run_of(
        tmp_path / "run", [dead, *(record(activations_of(text, seed=n), n) for n, text in enumerate(TEXTS) if n)]
    )
    said(run, "first", [TEXTS[0], "", "no term at all", *TEXTS[3:]])
    found = selected(run, among=("first",))
    assert [found[n].skipped for n in range(4)] == [DEAD, NONE, UNRELATED, None]


def test_an_explainer_that_has_said_too_little_is_named(run):
    said(run, "first", TEXTS, neurons=2)
    with pytest.raises(
        UserError, match=r"--among first: it has explained 2 neurons of layer 0; it needs 1 or more, neuron"
    ):
        selected(run, among=("first",))
    with pytest.raises(UserError, match="--among nobody: .* has no explanations; run `cratescope explain` by it"):
        selected(run, among=("nobody",))


def test_selected_explanations_are_simulated_and_scored_but_not_judged(run):
    said(run, "first", TEXTS)
    selected(run, among=("first",))
    by = {"explainer": "selected", "simulator": "terms", "protocols": ("uniform",)}
    simulate(SimulateConfig(run.root, **by))
    assert Scores.read(score(ScoreConfig(run.root, **by))).mean("uniform", "unseen").n > 0
    with pytest.raises(
        UserError, match="--explainer selected: these were chosen on windows that a judge would be shown"
    ):
        judge(JudgeConfig(run.root, explainer="selected"))


def test_other_candidates_are_not_mixed_with_these(run):
    said(run, "first", TEXTS)
    said(run, "second", TEXTS)
    selected(run, among=("first",))
    with pytest.raises(UserError, match="among"):
        selected(run, among=("second",))


@pytest.mark.parametrize("select", ["list-pmi", "list-in-context"])
def test_what_other_simulators_select_is_refused_by_the_option_that_differs(run, select):
    said(run, "first", TEXTS)
    selected(run, among=("first",))
    other = SelectedConfig(among=("first",), select=select)
    with pytest.raises(UserError, match=f"was made with select = 'terms', not '{select}'"):
        explain(ExplainConfig(run.root, protocols=("uniform",), explainer="selected", selected=other))


def test_options_of_one_explainer_are_refused_with_another():
    with pytest.raises(UserError, match="--others: goes with --explainer selected"):
        ExplainConfig("x", selected=SelectedConfig(others=2))
    with pytest.raises(UserError, match="--among: name at least one"):
        ExplainConfig("x", explainer="selected", selected=SelectedConfig(among=()))


def test_tokens_without_weight_do_not_change_the_correlation():
    rng = np.random.default_rng(0)
    truth, simulated, weights = rng.normal(size=(3, 500))
    weights = np.maximum(weights, 0)
    unscored = correlation(truth, simulated, weights)
    kept = weights > 0
    assert unscored == pytest.approx(correlation(truth[kept], simulated[kept], weights[kept]), abs=1e-12)
    assert unscored == pytest.approx(
        correlation(np.where(kept, truth, 99), np.where(kept, simulated, -5), weights), abs=1e-12
    )
    assert correlation(truth, truth, weights) == pytest.approx(1)
    assert np.isnan(correlation(truth, np.full(500, 0.3), weights))

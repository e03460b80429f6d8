"""Records of a sample of each layer's neurons: the same as in records of all, and usable by every later stage."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from cratescope.config import StudyConfig
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, SimulateConfig
from cratescope.explain.explain import explain
from cratescope.explain.simulate import simulate
from cratescope.llm.config import LLMConfig
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import evaluate
from cratescope.models.sae import save_coder
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import STRATIFICATIONS, layer_file, layer_width, read_records
from cratescope.neurons.sample import Chosen, draw_neurons
from cratescope.neurons.strata import Pilot
from cratescope.neurons.streaming import LayerStatistics, Plan
from cratescope.report.config import ReportConfig
from cratescope.report.report import report
from cratescope.results.runs import load_results
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.study import check, read_plan
from scripted import ScriptedLLM
from test_coded import FEATURES, random_coder
from test_collect import SMALL, read_parts

N, SEED, WIDTH = 12, 5, 512


def copied(runs_folder, folder, family):
    shutil.copytree(runs_folder / family, folder / family, ignore=shutil.ignore_patterns("records", "saes", "scores"))
    return Run(folder / family)


def collected(run, data_folder, **changes):
    """The file of the first layer."""
    return layer_file(collect(CollectConfig(run.root, **({"data": data_folder} | SMALL | changes))), 0)


@pytest.fixture
def run(runs_folder, tmp_path):
    return copied(runs_folder, tmp_path, "gpt2")


@pytest.fixture(scope="module", params=["crate", "gpt2"])
def both(runs_folder, data_folder, tmp_path_factory, request):
    """The records of all neurons, and of a sample."""
    folders = tmp_path_factory.mktemp("all"), tmp_path_factory.mktemp("sampled")
    runs = [copied(runs_folder, folder, request.param) for folder in folders]
    return [collected(runs[0], data_folder), collected(runs[1], data_folder, sample=N, sample_seed=SEED)]


def lists_of(record):
    """Every list of windows, by name."""
    strata = {
        (name, place): stratum.windows
        for name in STRATIFICATIONS
        for place, stratum in enumerate(getattr(record, name))
    }
    return {"top": record.top, "random": record.random} | strata


def assert_alike(one, other):
    """Sums may be added in other blocks, and a narrower product may round differently; nothing else may differ."""
    assert one.neuron.index == other.neuron.index and one.density == other.density
    for name, value in vars(one.moments).items():  # no skewness of a constant neuron
        theirs = getattr(other.moments, name)
        assert value == theirs if value is None else value == pytest.approx(theirs, rel=1e-4, abs=1e-9), name
    assert lists_of(one).keys() == lists_of(other).keys()
    for name, windows in lists_of(one).items():
        others = lists_of(other)[name]
        assert [(w.key, w.peak) for w in windows] == [(w.key, w.peak) for w in others], name
        for mine, theirs in zip(windows, others, strict=True):
            assert np.allclose(mine.activations, theirs.activations, rtol=1e-5, atol=1e-6)
    for low in ("low", "high", "count"):
        assert np.allclose(getattr(one.histogram, low), getattr(other.histogram, low))
    for means in ("top_tokens", "bottom_tokens"):
        mine, theirs = ([token.mean for token in getattr(record, means)] for record in (one, other))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_sampled_neuron_has_the_record_that_it_has_among_all(both):
    every, sampled = map(read_records, both)
    assert len(every) == WIDTH and len(sampled) == N
    for index, record in sampled.items():
        assert_alike(record, every[index])
    assert any(record.top and record.by_quantile[1].windows for record in sampled.values())


def test_a_sample_is_what_explain_draws_from_all_with_the_same_number_and_seed(both):
    every, sampled = both
    assert sorted(draw_neurons(every, SEED, 0)[:N]) == list(read_records(sampled))
    assert draw_neurons(sampled, SEED, 0) == draw_neurons(every, SEED, 0)[:N]
    assert sorted(draw_neurons(sampled, SEED + 1, 0)) == list(read_records(sampled))


def test_a_file_says_how_many_neurons_its_layer_has(both):
    assert [layer_width(path) for path in both] == [WIDTH, WIDTH]


@pytest.mark.parametrize("kind", ["relu", "batchtopk", "topk"])
def test_sampled_features_have_the_codes_that_they_have_among_all(run, data_folder, kind):
    coder = random_coder(run, kind=kind)
    with torch.no_grad():
        coder.threshold.fill_(0.05 if kind == "batchtopk" else 0.0)
    save_coder(run.saes("small") / "layer-00", coder)
    sampled = read_records(collected(run, data_folder, site="sae/small", sample=N))
    shutil.rmtree(run.records("sae/small"))
    every = read_records(collected(run, data_folder, site="sae/small"))
    assert len(every) == FEATURES and len(sampled) == N
    assert any(record.density > 0 for record in sampled.values())
    for index, record in sampled.items():
        assert_alike(record, every[index])


def test_a_sample_of_a_threshold_coder_computes_no_other_feature(run, data_folder, monkeypatch):
    save_coder(run.saes("small") / "layer-00", random_coder(run, kind="relu"))
    widths, encode = [], type(random_coder(run)).encode
    monkeypatch.setattr("cratescope.models.sae.SparseCoder.encode", lambda coder, x: note(widths, encode(coder, x)))
    collected(run, data_folder, site="sae/small", sample=N)
    assert widths[:3] == [FEATURES] * 3  # the trial, and how many there are
    assert {*widths[3:]} == {N}


def note(widths, codes):
    widths.append(codes.shape[-1])
    return codes


def test_true_indices_reach_explanations_scores_cards_and_the_report(run, data_folder, tmp_path):
    path = collected(run, data_folder, sample=N)
    known = list(read_records(path))
    assert known != list(range(N))
    llm = ScriptedLLM(lambda prompt: " words", lambda prompt, token: float(len(token) % 3))
    of, asked = {"protocols": ("uniform",)}, {"llm": LLMConfig(llm="scripted")}
    explain(ExplainConfig(run.root, **of, **asked), llm)
    simulate(SimulateConfig(run.root, explainer="scripted", **of, **asked), llm)
    found = Scores.read(score(ScoreConfig(run.root, explainer="scripted", **of)))
    assert found.scored(0, found.sets[0]) == {*known}
    neuron = run.neuron(0, known[-1])
    assert neuron.id.index == known[-1] and f"neuron {known[-1]}" in str(neuron) and "words" in str(neuron)
    evaluate(EvaluateConfig(run.root, data=data_folder, crops=4, device="cpu"))
    (item,) = load_results([run.root], explainer="scripted")
    assert (item.collected, item.width) == (N, WIDTH)
    page = report(ReportConfig((run.root,), tmp_path / "report", explainer="scripted", cards=2)).read_text()
    assert "1 × 12 of 512</td>" in page and "<td>12 of 512</td>" in page
    header, first = (tmp_path / "report" / "activity.csv").read_text().splitlines()[:2]
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["n_neurons"], row["width"]) == ("12", "512")


def test_a_neuron_that_was_not_collected_is_named_with_the_fix(run, data_folder):
    known = list(read_records(collected(run, data_folder, sample=N)))
    missing = next(index for index in range(WIDTH) if index not in known)
    with pytest.raises(UserError, match=f"neuron {missing} was not collected, only a sample of 12 of 512.*--sample$"):
        run.neuron(0, missing)
    with pytest.raises(UserError, match="no neuron 512; this layer has neurons 0 to 511"):
        run.neuron(0, WIDTH)


def test_more_neurons_than_were_collected_cannot_be_explained(run, data_folder):
    collected(run, data_folder, sample=N)
    with pytest.raises(UserError, match=r"layer 0 has 12 neurons that were collected \(of 512\); .* 1 to 12"):
        explain(ExplainConfig(run.root, neurons=N + 1, llm=LLMConfig(llm="scripted")))


def test_a_sample_of_as_many_neurons_as_there_are_is_all_of_them(run, data_folder):
    path = collected(run, data_folder, sample=WIDTH)
    before, manifest = path.read_bytes(), (path.parent / "manifest.json").read_bytes()
    collected(run, data_folder)
    collected(run, data_folder, sample=WIDTH + 1, sample_seed=1)
    shutil.rmtree(path.parent)
    assert collected(run, data_folder).read_bytes() == before
    assert (path.parent / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": N + 1}, "was made with sample = 12, not 13"),
        ({"sample": N, "sample_seed": 1}, "was made with sample_seed = 0, not 1"),
        ({}, "was made with sample = 12, not None"),
        ({"sample": WIDTH}, "was made with sample = 12, not None"),
        ({"sample": N, "dump": True}, "leave out --sample, or --dump"),
    ],
)
def test_another_sample_in_the_same_folder_is_refused(run, data_folder, changes, message):
    collected(run, data_folder, sample=N)
    with pytest.raises(UserError, match=message):
        collected(run, data_folder, **changes)


def test_a_sample_is_the_same_after_a_kill_and_by_several_workers(run, data_folder, monkeypatch):
    path = collected(run, data_folder, sample=N)
    whole = path.read_bytes()
    shutil.rmtree(path.parent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        read_parts(patch, stop_before=1)
        collected(run, data_folder, sample=N)
    with pytest.raises(UserError, match="was made with sample = 12, not 13"):
        collected(run, data_folder, sample=N + 1)
    for worker in (1, 0):
        collected(run, data_folder, sample=N, worker=f"{worker}/2")
    assert path.read_bytes() == whole


def test_an_activation_that_is_not_finite_is_named_by_its_neurons_index():
    text, chosen = np.zeros((2, 8), dtype=np.int64), Chosen(np.array([3, 40]), 50)
    plan = Plan.of(CollectConfig("run", **SMALL), 0, Pilot.of(torch.rand(16, 2)), text, chosen)
    activations = torch.rand(2, 8, 2)
    activations[1, 4, 1] = torch.nan
    with pytest.raises(UserError, match="neuron 40 is nan at excerpt 1, token 4"):
        LayerStatistics(plan).update(activations, torch.from_numpy(text), 0)


def plan_with(folder, collect_options):
    path = folder / "study.toml"
    path.write_text(
        f'[prepare]\nsource = "offline"\n[collect]\n{collect_options}\n[neurons]\nneurons = 12\nneuron_seed = 3\n'
        '[terms]\n[[model]]\nname = "crate"\npreset = "crate-1l"\n'
    )
    return check(read_plan(path), StudyConfig(path, folder).config)


def test_the_neurons_that_a_study_explains_do_not_limit_what_it_collects(tmp_path):
    plan = plan_with(tmp_path, "")
    assert plan.options("explain", run="x").neurons == 12
    assert plan.options("collect", run="x", site="auto").sample is None
    assert plan_with(tmp_path, "sample = 12").options("collect", run="x", site="auto").sample == 12


def test_a_study_that_explains_more_neurons_than_it_collects_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neurons = 12 is more than \[collect\] sample = 11"):
        plan_with(tmp_path, "sample = 11")

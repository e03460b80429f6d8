"""The output-side judge: texts written with neurons forced, groups of them, controls, scores and refusals."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, JudgeConfig, SimulateConfig
from cratescope.explain.controls import EMPTY_EXPLANATION
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.judge import judge
from cratescope.explain.judges.output import GROUP
from cratescope.explain.simulate import simulate
from cratescope.llm.config import LLMConfig
from cratescope.neurons.coded import recorded_site
from cratescope.neurons.records import layer_file
from cratescope.neurons.sample import DEAD
from cratescope.neurons.steer import Edit, steered
from cratescope.neurons.written import BEGINNINGS, forced_text, kept_texts, write_texts
from cratescope.results.scores import Scores
from cratescope.run import Run
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from kept_files import read_judgements
from scripted import ScriptedLLM
from test_effects import adopted

N = 6
LLM = LLMConfig(llm="scripted", llm_batch=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_folder):
    """A run of a model whose neurons 0 to 5 of 8 in the last layer each write one token; 6 never fires, 7 is random."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64, n_inner=8, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        model.transformer.wte.weight *= 15
        for neuron in range(N):
            mlp.c_proj.weight[neuron] = 20 * model.transformer.wte.weight[60 + neuron]
        mlp.c_fc.weight[:, 6], mlp.c_fc.bias[6] = 0, -1e4
    return adopted(model, tmp_path_factory.mktemp("planted"), data_folder)


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made.root, tmp_path / "run")
    return Run(tmp_path / "run")


def token_of(run, neuron):
    return run.tokenizer.decode([60 + neuron]).strip()


def explained(run):
    """Every neuron is said to write its token."""
    llm = ScriptedLLM(lambda _: " anything")
    folders = explain(ExplainConfig(run.root, protocols=("uniform",), llm=LLM), llm)
    kept = Explained(run, "mlp", "scripted", folders[0].name).explanations
    items = kept.read(0).items()
    kept.replace(0, [replace(one, text=one.text and token_of(run, index)) for index, one in items])


def reads_the_texts(prompt, token):
    """Chooses the text that holds what the explanation says most often."""
    found = re.match(r"The detector finds: (.*?)\n(.*)Text:$", prompt, re.S)
    if not found:
        return 0.0
    counts = [line.count(found[1]) for line in found[2].split("\n")[:GROUP]]
    return 20.0 * (token == f" {1 + int(np.argmax(counts))}" or token.strip() == str(1 + int(np.argmax(counts))))


def judged(run, llm=None, **options):
    config = JudgeConfig(run.root, explainer="scripted", scorer="output", protocols=("uniform",), llm=LLM, **options)
    (folder,) = judge(config, llm or ScriptedLLM(logit=reads_the_texts))
    return read_judgements(folder)


def accuracy(items, control):
    rows = [item for item in items if item.control == control and item.probabilities and item.neuron.index < N]
    groups = [(np.reshape(i.probabilities, (-1, GROUP)), np.reshape(i.labels, (-1, GROUP))) for i in rows]
    return np.mean([(p.argmax(1) == y.argmax(1)).mean() for p, y in groups])


def test_who_reads_the_texts_finds_the_right_ones_by_the_own_explanation_alone(run):
    explained(run)
    items = judged(run)
    assert accuracy(items, "own") > 0.8
    assert accuracy(items, "shuffled") < 0.5
    assert accuracy(items, "empty") < 0.5
    for item in items:
        if item.probabilities:
            labels = np.reshape(item.labels, (-1, GROUP))
            assert len(labels) == len(BEGINNINGS) and (labels.sum(1) == 1).all()
    places = [np.reshape(item.labels, (-1, GROUP)).argmax(1) for item in items if item.control == "own" and item.labels]
    assert len(np.unique(np.concatenate(places))) == GROUP


def test_controls_are_asked_about_the_same_texts(run):
    explained(run)
    llm = ScriptedLLM(logit=reads_the_texts)
    judged(run, llm)
    texts = {}
    for prompt in llm.asked:
        said, _, rest = prompt.partition("\n")
        texts.setdefault(rest, set()).add(said)
    # Own, another neuron's and the empty one; more where neurons of two happen to be shown the same four.
    assert all(len(said) >= 3 and any(EMPTY_EXPLANATION in one for one in said) for said in texts.values())


def test_a_dead_neuron_is_skipped_by_name(run):
    explained(run)
    reasons = {item.neuron.index: item.skipped for item in judged(run) if item.skipped}
    assert reasons == {N: DEAD}


def test_texts_are_those_of_the_model_steered_at_every_token(run):
    written = write_texts(run, "mlp", 0, range(8), 5.0)
    assert 6 not in written and len(written) == 7
    model, site = run.load_model(), recorded_site(run, "mlp")
    one = written[3]
    assert one.texts[0].startswith(BEGINNINGS[0]) and len({*one.texts}) == len(BEGINNINGS)
    ids = torch.tensor([run.tokenizer(BEGINNINGS[0]).input_ids])
    alone = forced_text(model, site, 0, ids, ([3], [one.value]), 24, 0)[0]
    assert run.tokenizer.decode(alone) == one.texts[0]
    # Step by step, without a cache: the same numbers are drawn.
    random = torch.Generator().manual_seed(0)
    for place in range(ids.shape[1], ids.shape[1] + 6):
        with torch.no_grad(), steered(model, [Edit(site, 0, 3, "set", one.value)]):
            logits = model(alone[None, :place]).logits[0, -1]
        noise = torch.rand(len(logits), generator=random, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
        drawn = logits - (-noise.log()).log().float()
        drawn[0] = -torch.inf
        assert int(drawn.argmax()) == int(alone[place])


def test_texts_are_kept_and_belong_to_their_strength(run):
    first = write_texts(run, "mlp", 0, [0, 1], 5.0)
    before = layer_file(kept_texts(run, "mlp").folder, 0).read_bytes()
    assert write_texts(run, "mlp", 0, [0, 1], 5.0) == first
    assert layer_file(kept_texts(run, "mlp").folder, 0).read_bytes() == before
    with pytest.raises(UserError, match="was made with strength = 5.0"):
        write_texts(run, "mlp", 0, [0, 1], 6.0)


def test_judging_again_asks_nothing_and_workers_share_the_neurons(run, tmp_path):
    explained(run)
    whole = judged(run)
    llm = ScriptedLLM(logit=reads_the_texts)
    assert judged(run, llm) == whole and not llm.asked
    shutil.rmtree(run.root / "judgements")
    judged(run, worker="1/2")
    assert sorted(map(repr, judged(run, worker="0/2"))) == sorted(map(repr, whole))


def test_score_makes_rows_of_it_beside_its_controls(run):
    explained(run)
    judged(run)
    simulate(
        SimulateConfig(run.root, explainer="scripted", simulator="list-pmi", protocols=("uniform",), llm=LLM),
        ScriptedLLM(),
    )
    folder = score(ScoreConfig(run.root, explainer="scripted", protocols=("uniform",)))
    scores = Scores.read(folder)
    neuron = run.neuron(0, 2).id
    own, empty = (scores.of(neuron, "output", control, "accuracy") for control in ("own", "empty"))
    assert own.value > empty.value and own.low < own.value <= own.high and own.n == GROUP * len(BEGINNINGS)


def test_the_strength_goes_with_this_scorer_alone(tmp_path):
    with pytest.raises(UserError, match="--strength: goes with --scorer output"):
        JudgeConfig(tmp_path, scorer="fuzzing", strength=3.0)

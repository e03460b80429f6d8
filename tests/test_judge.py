"""Judging: detection, fuzzing and intruder detection against scripts that know the answer, resume and named skips."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from cratescope.errors import UserError
from cratescope.explain.config import SCORERS, JudgeConfig
from cratescope.explain.controls import OWN, SHUFFLED
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.judge import TOO_FEW_ACTIVE, TOO_FEW_SILENT, judge
from cratescope.explain.judges import question_named
from cratescope.explain.judges.intruder import INTRUDER
from cratescope.explain.protocols import PROTOCOLS
from cratescope.llm.answers import EMPTY_ANSWER
from cratescope.llm.config import LLMConfig
from cratescope.neurons.records import NeuronRecord, layer_file, read_records, write_records
from cratescope.neurons.sample import DEAD
from cratescope.run import Run
from kept_files import drop, read_judgements
from scripted import ScriptedLLM
from test_explain import DEAD_INDEX, N_NEURONS, WORDS, files, first_word, make_run, settings_for


def knows_the_word(prompt: str, token: str) -> float:
    """Reads `the word "x"`, the text and the marks, and answers right; an intruder marks another word than the rest."""
    if "\nText:" not in prompt and not prompt.endswith("Text:"):
        return 0.0
    if prompt.endswith("Text:"):
        marked = [re.findall(r"<<\s*(\w+)>>", line) for line in prompt.split("\n")[: INTRUDER.group]]
        common = max({word for row in marked for word in row}, key=lambda word: sum(word in row for row in marked))
        foreign = next((place for place, row in enumerate(marked, 1) if common not in row), 1)
        return 20.0 * (token.strip() == str(foreign))
    found = re.match(r'The detector finds: the word "(\w+)"\nText: (.*)\nAnswer:', prompt, re.S)
    assert found, prompt
    text = " ".join(re.findall(r"<<(.*?)>>", found[2])) if "<<" in found[2] else found[2]
    right = re.search(rf"\b{found[1]}\b", text) is not None
    return 20.0 * (token.strip() == ("yes" if right else "no"))


def silenced(record: NeuronRecord, index: int) -> NeuronRecord:
    """Half of the random windows hold the neuron's word nowhere, so that it is silent there."""
    swap = dataclasses.replace
    word = record.top[0].tokens[index] if record.top else -1
    other = next((token for token in record.random[0].tokens if token != word), 0)
    quiet = [
        swap(window, tokens=np.where(window.tokens == word, other, window.tokens), activations=0 * window.activations)
        for window in record.random[:12]
    ]
    return swap(record, random=(*quiet, *record.random[12:]))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "run", layers=(0,))
    path = layer_file(run.records("codes"), 0)
    write_records(path, [silenced(record, index) for index, record in read_records(path).items()])
    explain(settings_for(run), ScriptedLLM(first_word))
    return run


def knowing() -> ScriptedLLM:
    return ScriptedLLM(first_word, knows_the_word)


def config_for(run: Run, scorer: str = "detection", **changes: object) -> JudgeConfig:
    llm = LLMConfig(llm="scripted", llm_batch=3)
    return JudgeConfig(run.root, explainer="scripted", scorer=scorer, llm=llm, **changes)


@pytest.mark.parametrize("scorer", [scorer for scorer in SCORERS if not question_named(scorer).of_texts])
def test_a_model_that_knows_the_answer_judges_right(run: Run, scorer: str) -> None:
    (folder,) = judge(config_for(run, scorer), knowing())
    assert folder == Explained(run, "codes", "scripted", "top").judgements(scorer).folder
    own = [item for item in read_judgements(folder) if item.control == OWN]
    assert len(own) == N_NEURONS
    for item in own:
        if item.neuron.index == DEAD_INDEX:
            assert (item.probabilities, item.skipped) == ((), DEAD)
            continue
        assert item.skipped is None and len(item.probabilities) == len(item.labels) > 0
        if scorer == "intruder":
            groups = np.array(item.probabilities).reshape(-1, INTRUDER.group)
            labels = np.array(item.labels).reshape(-1, INTRUDER.group)
            assert (labels.sum(1) == 1).all() and np.allclose(groups.sum(1), 1, atol=1e-3)
            assert (groups.argmax(1) == labels.argmax(1)).all()
        else:
            assert 0 < sum(item.labels) < len(item.labels)
            assert [p > 0.5 for p in item.probabilities] == list(item.labels)


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_another_neurons_explanation_is_judged_wrong_where_the_word_is_not(run: Run, scorer: str) -> None:
    items = read_judgements(*judge(config_for(run, scorer), knowing()))
    own = {item.neuron: item.text for item in items if item.control == OWN}
    for item in items:
        if item.control == SHUFFLED:
            assert item.text in set(own.values()) - {own[item.neuron]}
            assert item.labels == next(i.labels for i in items if i.neuron == item.neuron and i.control == OWN)
    assert [item.control for item in items].count(SHUFFLED) == N_NEURONS - 1


def test_an_intruder_needs_no_explanation(run: Run, tmp_path: Path) -> None:
    found = read_judgements(*judge(config_for(run, "intruder"), knowing()))
    assert {item.text for item in found} == {""} and {item.control for item in found} == {OWN}


def test_no_window_explained_from_is_judged(run: Run) -> None:
    llm = knowing()
    record = read_records(layer_file(run.records("codes"), 0))[0]
    shown = {window.tokens.tobytes() for window in PROTOCOLS["top-and-random"].set.windows(record)}
    judge(config_for(run), llm)
    texts = {re.search(r"\nText: (.*)\nAnswer:", prompt)[1] for prompt in llm.asked}
    from cratescope.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    for window in record.top[:10]:
        text = tokenizer.decode(window.tokens).strip()
        assert (text in texts) == (window.tokens.tobytes() not in shown)


def test_an_interrupted_run_ends_with_the_same_files(run: Run) -> None:
    (folder,) = judge(config_for(run), knowing())
    expected = files(folder)
    drop(Explained(run, "codes", "scripted", "top").judgements("detection"), 0, range(0, N_NEURONS, 2))
    assert files(folder) != expected
    llm = knowing()
    judge(config_for(run), llm)
    assert files(folder) == expected
    asked = len(llm.asked)
    judge(config_for(run), llm)
    assert len(llm.asked) == asked


def test_neurons_that_cannot_be_judged_say_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    path = layer_file(run.records("codes"), 0)
    records = list(read_records(path).values())
    records[0] = dataclasses.replace(records[0], top=records[0].top[:6])
    records[1:] = [silenced(record, index) for index, record in enumerate(records[1:], 1)]
    write_records(path, records)
    explain(settings_for(run), ScriptedLLM(lambda prompt: "" if "judge" in prompt else first_word(prompt)))
    (folder,) = judge(config_for(run), knowing())
    reasons = {item.neuron.index: item.skipped for item in read_judgements(folder) if item.skipped}
    assert reasons == {0: TOO_FEW_ACTIVE, DEAD_INDEX: DEAD, WORDS.index(" judge"): EMPTY_ANSWER}
    records[0] = silenced(records[1], 1)
    records[0] = dataclasses.replace(records[0], neuron=records[0].neuron.__class__("run", "codes", 0, 0), random=())
    write_records(path, records)
    drop(Explained(run, "codes", "scripted", "top").judgements("detection"), 0, [0])
    judge(config_for(run), knowing())
    assert {item.skipped for item in read_judgements(folder) if item.neuron.index == 0} == {TOO_FEW_SILENT}


def test_judging_without_explanations_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cratescope explain"):
        judge(config_for(make_run(tmp_path / "run")), knowing())


def test_a_model_that_names_no_answer_is_undecided(run: Run) -> None:
    class Reticent(ScriptedLLM):
        def slot_logprobs(self, prefix, prompts, slots, choices):
            return [np.full_like(row, -np.inf) for row in super().slot_logprobs(prefix, prompts, slots, choices)]

    found = read_judgements(*judge(config_for(run), Reticent(first_word)))
    assert {p for item in found for p in item.probabilities} == {0.5}

"""Simulating: both simulators against scripts that know the answer, the shuffled control, and resume."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.config import LLMConfig, SimulateConfig
from cratescope.neurons.explain import explain
from cratescope.neurons.llm.scripted import ScriptedLLM
from cratescope.neurons.records import (
    ActivationRecord,
    Explanation,
    NeuronId,
    layer_file,
    read_explanations,
    read_records,
    read_simulations,
)
from cratescope.neurons.simulate import AllAtOnce, ListPMI, null_texts, scoring_records, simulate
from cratescope.run import Run, UserError, read_json
from test_explain import DEAD_INDEX, N_NEURONS, WORDS, files, first_word, make_run, settings_for


def knows_the_word(prompt: str, token: str) -> float:
    """Logits of a model that reads `the word "x"` and answers right, to a list and to a slot alike."""
    found = re.match(r'The detector finds: the word "(\w+)"', prompt)
    word = found[1] if found else ""
    if "\nTokens:\n" in prompt:
        fires = prompt.rsplit("\n", 1)[1].strip() == word
        return 40.0 * (token == ("10" if fires else "0"))
    return 10.0 * (token.strip() == word and bool(word))


def knowing() -> ScriptedLLM:
    llm = ScriptedLLM(first_word, knows_the_word)
    llm.encode("".join(WORDS))
    return llm


def config_for(run: Run, simulator: str = "list-pmi", **changes: object) -> SimulateConfig:
    return SimulateConfig(
        run.root,
        explainer="scripted",
        simulator=simulator,
        llm=LLMConfig(llm="scripted", llm_batch=3),
        **changes,
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    return run


@pytest.mark.parametrize("simulator", ["list-pmi", "all-at-once"])
def test_a_model_that_knows_the_answer_simulates_the_truth(run: Run, simulator: str) -> None:
    found = read_simulations(simulate(config_for(run, simulator), knowing()))
    assert len(found) == 2 * N_NEURONS
    for layer in (0, 1):
        for index, record in read_records(layer_file(run.records("codes"), layer)).items():
            simulation = found[record.neuron]
            if index == DEAD_INDEX:
                assert (simulation.text, simulation.expected, simulation.null_expected) == ("", (), ())
                continue
            assert simulation.keys == tuple(window.key for window in scoring_records(record))
            for window, row in zip(scoring_records(record), simulation.expected, strict=True):
                assert ((np.array(row) > 0.01) == (window.activations > 0)).all()


def test_list_pmi_subtracts_what_every_list_holds_and_the_threshold() -> None:
    def logit(prompt: str, token: str) -> float:
        about_dogs = prompt.startswith("The detector finds: dogs")
        return {" dog": 9.0 if about_dogs else 5.0, " the": 6.0, " cat": 6.0 if about_dogs else 5.0}.get(token, 0.0)

    vocabulary = [" dog", "dog", " the", " cat", "\n", "\N{REPLACEMENT CHARACTER}"]
    llm = ScriptedLLM(logit=logit)
    for token in vocabulary:
        llm.encode(token)
    simulator = ListPMI(llm, vocabulary, batch=2)
    simulator.plan(["dogs", "cats"])
    record = ActivationRecord(np.arange(6), np.zeros(6, dtype=np.float32), 0, 0, 3)
    (values,) = simulator("dogs", [record])
    asked = [llm.encode(f"The detector finds: {text}\nWords:") for text in ("dogs", "words")]
    about, generic = llm.next_logprobs([], asked)
    dog = llm.encode(" dog")[0]
    assert values[0] == pytest.approx(about[dog] - generic[dog] - 2)
    assert values[1] == values[0], "a piece without a space stands for the same list item"
    assert values[2:].tolist() == [0, 0, 0, 0]


def test_list_pmi_asks_in_the_same_batches_whatever_is_wanted_first() -> None:
    texts = [f"text{number}" for number in range(7)]
    record = ActivationRecord(np.arange(2), np.zeros(2, dtype=np.float32), 0, 0, 1)

    def batches(wanted: str) -> set[str]:
        llm = ScriptedLLM()
        simulator = ListPMI(llm, [" a", " b"], batch=3)
        simulator.plan([*texts, *texts])
        llm.asked.clear()
        simulator(wanted, [record])
        return {found for prompt in llm.asked for found in re.findall(r"text\d", prompt)}

    assert batches("text4") == batches("text5") == {"text3", "text4", "text5"}
    assert batches("text6") == {"text6"}


def test_all_at_once_is_the_expected_value_over_the_digits() -> None:
    llm = ScriptedLLM(logit=lambda _, token: float(np.log({"2": 0.1, "4": 0.3, "unknown": 0.6}.get(token, 1e-30))))
    simulator = AllAtOnce(llm, ["a", "b"], batch=2)
    record = ActivationRecord(np.array([0, 1, 0]), np.zeros(3, dtype=np.float32), 0, 0, 1)
    assert simulator.scale == "0-10"
    np.testing.assert_allclose(simulator("anything", [record] * 3), np.full((3, 3), 3.5), atol=1e-9)


texts = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=12)


def explanations(texts: list[str]) -> list[Explanation]:
    return [Explanation(NeuronId("m", "s", 0, place), text, "e", "p") for place, text in enumerate(texts)]


@settings(deadline=None, max_examples=100)
@given(texts)
def test_the_control_is_another_neurons_text_and_never_its_own(texts: list[str]) -> None:
    for text, null in zip(texts, null_texts(explanations(texts)), strict=True):
        others = set(texts) - {"", text}
        assert (null in others) if text and others else null == ""


def test_the_control_is_a_derangement_when_all_texts_differ() -> None:
    texts = [str(number) for number in range(9)]
    nulls = null_texts(explanations(texts))
    assert sorted(nulls) == sorted(texts)
    assert all(text != null for text, null in zip(texts, nulls, strict=True))


def test_the_control_does_not_depend_on_what_is_already_simulated(run: Run) -> None:
    expected = files(simulate(config_for(run), knowing()))
    folder = run.simulations("codes", "scripted", "list-pmi")
    for path in list(folder.glob("*/*.json"))[::2]:
        path.unlink()
    assert files(simulate(config_for(run), knowing())) == expected


def test_an_interrupted_run_ends_with_the_same_files(tmp_path: Path) -> None:
    whole, cut = (make_run(tmp_path / name / "run", layers=(0,)) for name in "ab")
    for item in (whole, cut):
        explain(settings_for(item), ScriptedLLM(first_word))
    expected = files(simulate(config_for(whole, "all-at-once"), knowing()))

    def dies(prompt: str, token: str) -> float:
        if '"judge"' in prompt:
            raise KeyboardInterrupt
        return knows_the_word(prompt, token)

    with pytest.raises(KeyboardInterrupt):
        simulate(config_for(cut, "all-at-once"), ScriptedLLM(logit=dies))
    assert files(cut.simulations("codes", "scripted", "all-at-once")) != expected
    assert files(simulate(config_for(cut, "all-at-once"), knowing())) == expected


def test_simulating_a_growing_sample_ends_like_simulating_it_at_once(tmp_path: Path) -> None:
    grown, once = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    for neurons in (3, 6):
        explain(settings_for(grown, neurons=neurons), ScriptedLLM(first_word))
        simulate(config_for(grown), knowing())
    explain(settings_for(once, neurons=6), ScriptedLLM(first_word))
    found = read_simulations(simulate(config_for(grown), knowing()))
    expected = read_simulations(simulate(config_for(once), knowing()))
    assert {key: item.null_text for key, item in found.items()} == {
        key: item.null_text for key, item in expected.items()
    }


def test_fewer_neurons_are_the_first_drawn_and_keep_their_controls(run: Run) -> None:
    few = read_simulations(simulate(config_for(run, neurons=2), knowing()))
    every = read_simulations(simulate(config_for(run), knowing()))
    assert len(few) == 4
    assert few.items() <= every.items()


def test_simulations_of_another_model_are_refused(run: Run) -> None:
    simulate(config_for(run), knowing())
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_sha256"):
        simulate(config_for(run), knowing())


def test_the_folder_says_what_it_was_made_with(run: Run) -> None:
    identity = read_json(simulate(config_for(run, "all-at-once", neurons=1), knowing()) / "manifest.json")["identity"]
    assert identity["scale"] == "0-10"
    assert (identity["llm"], identity["dtype"], identity["site"]) == ("scripted", "float32", "codes")
    assert identity["explanations"]["prompt"] == "words-1"


def test_no_explanations_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cratescope explain"):
        simulate(config_for(make_run(tmp_path / "run")), knowing())


def test_the_explanations_texts_are_the_simulations(run: Run) -> None:
    told = read_explanations(run.explanations("codes", "scripted"))
    found = read_simulations(simulate(config_for(run), knowing()))
    assert {neuron: item.text for neuron, item in found.items()} == {neuron: item.text for neuron, item in told.items()}
    assert {item.null_text for item in found.values()} - {""} <= {f'the word "{word.strip()}"' for word in WORDS}

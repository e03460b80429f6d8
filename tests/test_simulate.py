"""Simulating: both simulators against scripts that know the answer, the shuffled control, and resume."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.explain import config
from cratescope.explain.config import SCORERS, SIMULATORS, SimulateConfig, Simulates
from cratescope.explain.controls import (
    EMPTY_EXPLANATION,
    EVERY,
    OWN,
    Material,
    planned,
    shuffled_texts,
    token_means,
    unigram_text,
)
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.judges import question_named
from cratescope.explain.protocols import PROTOCOLS, scoring_windows
from cratescope.explain.simulate import UNREAD, simulate
from cratescope.explain.simulators import simulator_named
from cratescope.explain.simulators.all_at_once import AllAtOnce, OwnSlots
from cratescope.explain.simulators.list_in_context import ListInContext
from cratescope.explain.simulators.list_pmi import SMALLEST, THRESHOLD, ListPMI
from cratescope.explain.wording import EXPLAIN_PROMPT
from cratescope.files import read_json
from cratescope.llm.answers import EMPTY_ANSWER
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import LanguageModel
from cratescope.neurons.records import Window, layer_file, read_records, write_records
from cratescope.neurons.sample import DEAD, UNDECODABLE
from cratescope.run import Run
from kept_files import change, drop, read_explanations, read_simulations
from scripted import ScriptedLLM
from test_explain import DEAD_INDEX, N_NEURONS, WORDS, files, first_word, make_run, settings_for

DEFAULT = (PROTOCOLS["top-and-random"], PROTOCOLS["random-only"])


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
    found = read_simulations(*simulate(config_for(run, simulator), knowing()))
    assert len(found) == 2 * N_NEURONS
    for layer in (0, 1):
        for index, record in read_records(layer_file(run.records("codes"), layer)).items():
            simulation = found[record.neuron]
            if index == DEAD_INDEX:
                assert (simulation.texts, simulation.expected, simulation.skipped) == ({}, {}, DEAD)
                continue
            assert simulation.keys == tuple(window.key for window in scoring_windows(DEFAULT, record))
            for window, row in zip(scoring_windows(DEFAULT, record), simulation.expected[OWN], strict=True):
                assert ((np.array(row) > 0.01) == (window.activations > 0)).all()


def test_list_pmi_subtracts_what_every_list_holds_and_the_threshold() -> None:
    def logit(prompt: str, token: str) -> float:
        about_dogs = prompt.startswith("The detector finds: dogs")
        return {" dog": 9.0 if about_dogs else 5.0, " the": 6.0, " cat": 6.0 if about_dogs else 5.0}.get(token, 0.0)

    vocabulary = [" dog", "\n", "dog", " the", " cat", "\N{REPLACEMENT CHARACTER}"]
    llm = ScriptedLLM(logit=logit)
    for token in vocabulary:
        llm.encode(token)
    simulator = ListPMI(llm, vocabulary, batch=2)
    simulator.plan(["dogs", "cats"])
    record = Window(np.arange(6), np.zeros(6, dtype=np.float32), 0, 0, 3)
    (values,) = simulator("dogs", [record])
    asked = [llm.encode(f"The detector finds: {text}\nWords:\n-") for text in ("dogs", "words")]
    about, generic = (np.log(np.exp(row) + SMALLEST) for row in llm.next_logprobs([], asked))
    dog = llm.encode(" dog")[0]
    assert values[0] == pytest.approx(about[dog] - generic[dog] - THRESHOLD)
    assert values[2] == values[0], "a piece without a space stands for the same list item"
    assert values[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]


def list_values(tokens: list[str], liked: str) -> list[float]:
    """list-pmi values of one window for an explanation that likes one word."""
    llm = ScriptedLLM(
        logit=lambda prompt, token: 9.0 * (prompt.startswith("The detector finds: it") and token == liked)
    )
    llm.encode(liked)
    simulator = ListPMI(llm, tokens, batch=2)
    simulator.plan(["it"])
    record = Window(np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.float32), 0, 0, 0)
    return simulator("it", [record])[0].tolist()


def test_a_piece_of_a_word_has_the_value_of_its_whole_word() -> None:
    values = list_values([" gar", "lic", " gar", ",", " garlic", "lic"], " garlic")
    assert values[0] == values[1] > 0
    assert values[2] == values[3] == 0
    # The last word is garliclic.
    assert values[4] == values[5] == 0


def test_list_in_context_weighs_a_word_by_the_words_before_it() -> None:
    def logit(prompt: str, token: str) -> float:
        about = "The detector finds: dogs" in prompt
        if "\nText:" in prompt:
            return 5.0 * (about and token == " dog" and prompt.endswith(" big"))
        return 9.0 * (about and token == " dog")

    vocabulary = [" dog", " big", " a"]
    llm = ScriptedLLM(logit=logit)
    llm.encode("".join(vocabulary))
    record = Window(np.array([2, 0, 1, 0, 2]), np.zeros(5, dtype=np.float32), 0, 0, 2)
    alone, context = ListPMI(llm, vocabulary, 2), ListInContext(llm, vocabulary, 2)
    for simulator in (alone, context):
        simulator.plan(["dogs", "cats", EMPTY_EXPLANATION])
    (words,), (values,) = alone("dogs", [record]), context("dogs", [record])
    np.testing.assert_allclose(values[[1, 3]], words[[1, 3]] * np.exp([0, 1]), rtol=1e-5)
    assert values[[0, 2, 4]].tolist() == [0, 0, 0]
    (nothing,) = context(EMPTY_EXPLANATION, [record])
    assert nothing.tolist() == alone(EMPTY_EXPLANATION, [record])[0].tolist()


def test_list_pmi_asks_in_the_same_batches_whatever_is_wanted_first() -> None:
    texts = [f"text{number}" for number in range(7)]
    record = Window(np.arange(2), np.zeros(2, dtype=np.float32), 0, 0, 1)

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
    simulator = AllAtOnce(llm, ["a", "b"], 2, OwnSlots())
    record = Window(np.array([0, 1, 0]), np.zeros(3, dtype=np.float32), 0, 0, 1)
    np.testing.assert_allclose(simulator("anything", [record] * 3), np.full((3, 3), 3.5), atol=1e-9)


texts = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(texts)
def test_the_control_is_another_neurons_text_and_never_its_own(texts: list[str]) -> None:
    for text, other in zip(texts, shuffled_texts(texts), strict=True):
        others = set(texts) - {"", text}
        assert (other in others) if text and others else other == ""


@settings(deadline=None, max_examples=200)
@given(texts)
def test_the_control_is_the_nearest_different_text_before_it_going_round(texts: list[str]) -> None:
    for place, other in enumerate(shuffled_texts(texts)):
        before = [texts[(place - step) % len(texts)] for step in range(1, len(texts))]
        different = [text for text in before if text and text != texts[place]]
        assert other == (different[0] if texts[place] and different else "")


def test_the_control_is_a_derangement_when_all_texts_differ() -> None:
    texts = [str(number) for number in range(9)]
    others = shuffled_texts(texts)
    assert sorted(others) == sorted(texts)
    assert all(text != other for text, other in zip(texts, others, strict=True))


def test_the_control_does_not_depend_on_what_is_already_simulated(run: Run) -> None:
    expected = files(*simulate(config_for(run), knowing()))
    kept = Explained(run, "codes", "scripted", "top").simulations("list-pmi")
    for layer in (0, 1):
        drop(kept, layer, range(0, N_NEURONS, 2))
    assert files(*simulate(config_for(run), knowing())) == expected


@pytest.mark.slow  # test_kills.py kills this stage at other moments
def test_an_interrupted_run_ends_with_the_same_files(tmp_path: Path) -> None:
    whole, cut = (make_run(tmp_path / name / "run", layers=(0,)) for name in "ab")
    for item in (whole, cut):
        explain(settings_for(item), ScriptedLLM(first_word))
    expected = files(*simulate(config_for(whole, "all-at-once"), knowing()))

    def dies(prompt: str, token: str) -> float:
        if '"judge"' in prompt:
            raise KeyboardInterrupt
        return knows_the_word(prompt, token)

    with pytest.raises(KeyboardInterrupt):
        simulate(config_for(cut, "all-at-once"), ScriptedLLM(logit=dies))
    assert files(Explained(cut, "codes", "scripted", "top").simulations("all-at-once").folder) != expected
    assert files(*simulate(config_for(cut, "all-at-once"), knowing())) == expected


def test_simulating_a_growing_sample_ends_like_simulating_it_at_once(tmp_path: Path) -> None:
    grown, once = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    for neurons in (3, 6):
        explain(settings_for(grown, neurons=neurons), ScriptedLLM(first_word))
        simulate(config_for(grown), knowing())
    explain(settings_for(once, neurons=6), ScriptedLLM(first_word))
    found = read_simulations(*simulate(config_for(grown), knowing()))
    expected = read_simulations(*simulate(config_for(once), knowing()))
    assert {key: item.texts for key, item in found.items()} == {key: item.texts for key, item in expected.items()}
    assert len(found) == 2 * 6


def test_fewer_neurons_are_the_first_drawn_and_keep_their_controls(run: Run) -> None:
    few = read_simulations(*simulate(config_for(run, neurons=2), knowing()))
    every = read_simulations(*simulate(config_for(run), knowing()))
    assert len(few) == 4
    assert few.items() <= every.items()


def test_simulations_of_another_model_are_refused(run: Run) -> None:
    simulate(config_for(run), knowing())
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_sha256"):
        simulate(config_for(run), knowing())


def test_the_folder_says_what_it_was_made_with(run: Run) -> None:
    identity = read_json(simulate(config_for(run, "all-at-once", neurons=1), knowing())[0] / "manifest.json")[
        "identity"
    ]
    assert (identity["scale"], identity["reference_quirks"]) == ("0-10", False)
    assert (identity["llm"], identity["dtype"], identity["site"]) == ("scripted", "float32", "codes")
    assert identity["explanations"]["prompt"] == EXPLAIN_PROMPT


def test_no_explanations_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cratescope explain"):
        simulate(config_for(make_run(tmp_path / "run")), knowing())


def test_the_explanations_texts_are_the_simulations(run: Run) -> None:
    told = read_explanations(Explained(run, "codes", "scripted", "top").explanations.folder)
    found = read_simulations(*simulate(config_for(run), knowing()))
    assert {neuron: item.texts.get(OWN, "") for neuron, item in found.items()} == {
        neuron: item.text for neuron, item in told.items()
    }
    shuffled = {item.texts["shuffled"] for item in found.values() if "shuffled" in item.texts}
    assert shuffled <= {f'the word "{word.strip()}"' for word in WORDS}


def test_every_control_is_simulated_on_the_same_windows(run: Run) -> None:
    found = read_simulations(*simulate(config_for(run), knowing()))
    live = [item for neuron, item in found.items() if neuron.index != DEAD_INDEX]
    assert live
    for item in live:
        assert set(item.texts) == set(item.expected) == {OWN, "shuffled", "empty", "unigram"}
        assert {tuple(map(len, rows)) for rows in item.expected.values()} == {tuple(width for *_, width in item.keys)}
        assert item.texts["empty"] == EMPTY_EXPLANATION
        # The neuron fires on one word alone, so the lookup of its explaining windows knows it all.
        assert item.texts["unigram"] == item.texts[OWN].split('"')[1]


def test_the_unigram_control_is_the_mean_activation_of_each_token() -> None:
    windows = [
        Window(np.array([1, 2, 1]), np.array([4.0, 0.0, 1.0], np.float32), 0, 0, 1),
        Window(np.array([1, 3, 3]), np.array([1.0, 5.0, 6.0], np.float32), 1, 0, 1),
    ]
    means = token_means(windows)
    assert means == {1: 2.0, 2: 0.0, 3: 5.5}
    assert unigram_text(Material("", "", means, ["", " a", " b", "\n"])) == "\\n a"


def test_a_neuron_without_an_explanation_keeps_the_control_that_needs_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    explain(settings_for(run), ScriptedLLM(lambda _: ""))
    found = read_simulations(*simulate(config_for(run), knowing()))
    for neuron, item in found.items():
        dead = neuron.index == DEAD_INDEX
        assert item.skipped == (DEAD if dead else EMPTY_ANSWER)
        assert set(item.expected) == (set() if dead else {"unigram"})


def test_another_protocol_adds_its_windows_and_takes_none_away(run: Run) -> None:
    folder = Explained(run, "codes", "scripted", "top").simulations("list-pmi").folder
    simulate(config_for(run, protocols=("top-and-random",)), knowing())
    before = read_simulations(folder)
    simulate(config_for(run, protocols=("uniform",)), knowing())
    for neuron, item in read_simulations(folder).items():
        assert {*before[neuron].keys} <= {*item.keys}
        assert len(item.keys) == (0 if neuron.index == DEAD_INDEX else 25)
    made = files(folder)
    llm = knowing()
    simulate(config_for(run, protocols=("random-only", "uniform")), llm)
    assert files(folder) == made
    assert llm.asked == []


def test_tokens_the_tokenizer_does_not_have_are_a_named_skip(run: Run) -> None:
    path = layer_file(run.records("codes"), 0)
    records = list(read_records(path).values())
    records[1].random[0].tokens[3] = 100_000
    write_records(path, records)
    found = read_simulations(*simulate(config_for(run), knowing()))
    broken = found[records[1].neuron]
    assert (broken.skipped, broken.expected) == (UNDECODABLE, {})


class Splitting(ScriptedLLM):
    """Has a token for every character only, so "10" is a 1 and a 0."""

    def encode(self, text: str) -> list[int]:
        return [index for character in text for index in super(Splitting, self).encode(character)]


def test_a_split_ten_is_read_as_ten_and_by_the_reference_as_one() -> None:
    def logit(prompt: str, token: str) -> float:
        if prompt.endswith("\t1"):
            return 40.0 * (token == "0")
        return 40.0 * (token == ("1" if prompt.endswith("a\t") else "3")) if prompt.endswith("\t") else 0.0

    record = Window(np.array([0, 1]), np.zeros(2, dtype=np.float32), 0, 0, 1)
    for quirks, expected in ((False, [10.0, 3.0]), (True, [1.0, 3.0])):
        simulator = AllAtOnce(Splitting(logit=logit), ["a", "b"], 2, OwnSlots(), quirks)
        (values,) = simulator("anything", [record])
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_the_reference_reads_only_values_among_the_five_likeliest_tokens() -> None:
    weights = {"7": 0.2, "a": 0.3, " b": 0.1, " c": 0.1, " d": 0.1, "1": 0.05, "2": 0.05}
    record = Window(np.array([0]), np.zeros(1, dtype=np.float32), 0, 0, 0)
    found = []
    for quirks in (False, True):
        llm = ScriptedLLM(logit=lambda _, token: 50 + float(np.log(weights.get(token, 1e-30))), vocab_size=400)
        simulator = AllAtOnce(llm, ["a"], 2, OwnSlots(), quirks)
        llm.encode("a b c d")
        found.append(float(simulator("anything", [record])[0][0]))
    assert found[0] == pytest.approx((7 * 0.2 + 0.05 + 2 * 0.05) / 0.3)
    assert found[1] == pytest.approx(7.0)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.sampled_from(["a", " b", "\n", "\t", "\t\n", "\ufffd", " ", "", "é", "10", "unknown", "\r"]), min_size=1
    )
)
def test_whatever_a_token_is_every_token_gets_one_value(tokens: list[str]) -> None:
    llm = ScriptedLLM(logit=lambda prompt, token: 30.0 * (token == str(len(prompt.split("\n")) % 10)))
    record = Window(np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.float32), 0, 0, 0)
    (values,) = AllAtOnce(llm, tokens, 2, OwnSlots())("anything", [record])
    # Line 3 of the prompt is the first token's, whatever stands in it: none is lost and none is counted twice.
    assert np.round(values).astype(int).tolist() == [(3 + place) % 10 for place in range(len(tokens))]


def test_a_slot_without_a_value_is_a_named_skip(run: Run) -> None:
    class Reticent(ScriptedLLM):
        def slot_logprobs(self, prefix, prompts, slots, choices):
            found = super().slot_logprobs(prefix, prompts, slots, choices)
            return [np.full_like(row, -np.inf) for row in found]

    found = read_simulations(*simulate(config_for(run, "all-at-once", neurons=2), Reticent(first_word)))
    for neuron, item in found.items():
        if neuron.index != DEAD_INDEX:
            assert item.skipped == UNREAD
            assert set(item.expected) == {"unigram"}


@pytest.mark.parametrize("option", [{"reference_quirks": True}, {"prompts": "openai"}])
def test_options_of_all_at_once_go_with_it_alone(run: Run, option: dict[str, object]) -> None:
    with pytest.raises(UserError, match="go with all-at-once"):
        simulate(config_for(run, **option), knowing())


def test_quirks_are_not_mixed_with_the_right_reading(run: Run) -> None:
    simulate(config_for(run, "all-at-once", neurons=1), knowing())
    with pytest.raises(UserError, match="reference_quirks"):
        simulate(config_for(run, "all-at-once", neurons=1, reference_quirks=True), knowing())


def test_every_simulator_and_scorer_can_be_named_on_the_command_line() -> None:
    assert get_args(config.Simulator) == (*SIMULATORS,)
    assert get_args(config.Scorer) == (*SCORERS,)
    for name in SIMULATORS:
        made_with = simulator_named(name).made_with(SimulateConfig(Path("run"), simulator=name))
        assert made_with["prediction" if name == "terms" else "prompt"]
    assert len({question_named(scorer).version for scorer in SCORERS}) == len(SCORERS)


class Length:
    """A simulator that asks nobody: the length of a token where the explanation holds it."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._vocabulary = vocabulary

    @classmethod
    def open(cls, config: SimulateConfig, vocabulary: Sequence[str], llm: Callable[[], LanguageModel]) -> Length:
        return cls(vocabulary)

    @classmethod
    def made_with(cls, config: SimulateConfig) -> dict[str, Any]:
        return {"version": "length-1"}

    def plan(self, texts: Sequence[str]) -> None:
        pass

    def __call__(self, text: str, windows: Sequence[Window]) -> list[np.ndarray]:
        words = [[self._vocabulary[token].strip() for token in window.tokens] for window in windows]
        return [np.array([float(len(word) * (f'"{word}"' in text)) for word in row]) for row in words]


def test_a_simulator_that_needs_no_language_model_opens_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cratescope.explain.simulators.length", SimpleNamespace(Length=Length))
    monkeypatch.setitem(SIMULATORS, "length", Simulates("simulators.length:Length", "nothing"))
    server = LLMConfig(llm="http://127.0.0.1:9/v1", llm_model="nobody")
    (folder,) = simulate(SimulateConfig(run.root, explainer="scripted", simulator="length", llm=server))
    identity = read_json(folder / "manifest.json")["identity"]
    assert identity["version"] == "length-1" and not {"llm", "dtype"} & identity.keys()
    found = read_simulations(folder)
    assert {name for item in found.values() for name in item.expected} == {*EVERY}
    record = read_records(layer_file(run.records("codes"), 0))[0]
    simulated = np.concatenate(found[record.neuron].expected[OWN])
    truth = np.concatenate([window.activations for window in scoring_windows(DEFAULT, record)])
    assert ((simulated == len("dog")) == (truth > 0)).all()


def test_simulations_that_call_their_own_explanation_otherwise_are_made_again(run: Run) -> None:
    """Before, the name was `none`."""
    expected = files(*simulate(config_for(run), knowing()))
    kept = Explained(run, "codes", "scripted", "top").simulations("list-pmi")

    def renamed(texts: dict[str, Any]) -> dict[str, Any]:
        return {"none" if name == OWN else name: value for name, value in texts.items()}

    for layer in (0, 1):
        for index, item in kept.read(layer).items():
            change(kept, layer, index, texts=renamed(item.texts), expected=renamed(item.expected))
    assert files(kept.folder) != expected
    assert files(*simulate(config_for(run), knowing())) == expected


def test_all_texts_are_planned_once_and_in_an_order_of_their_own() -> None:
    """Batches follow this order, so a neuron that is left to do must not change it."""
    materials = [Material("a", "c"), Material("", ""), Material("b", "a"), Material("a", "x")]
    assert planned(materials) == [EMPTY_EXPLANATION, "a", "b", "c", "x"]


@pytest.mark.parametrize("kind", [ListPMI, ListInContext])
def test_windows_of_two_imported_neurons_with_the_same_place_are_not_taken_for_one_another(kind: type) -> None:
    vocabulary = [" dog", " cat"]

    def simulator() -> ListPMI | ListInContext:
        llm = ScriptedLLM(logit=lambda prompt, token: 9.0 * ("dogs\nWords:" in prompt and token == " dog"))
        llm.encode("".join(vocabulary))
        made = kind(llm, vocabulary, 2)
        made.plan(["dogs", EMPTY_EXPLANATION])
        return made

    windows = [Window(np.array(ids), np.zeros(2, dtype=np.float32), 0, 0, 0) for ids in ([0, 1], [1, 0])]
    used = simulator()
    one_after_the_other = [used("dogs", [window])[0] for window in windows]
    alone = [simulator()("dogs", [window])[0] for window in windows]
    assert np.array_equal(one_after_the_other, alone)
    assert not np.array_equal(*alone)

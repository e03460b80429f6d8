"""Explanations from what neurons do to the output: the prompt, where they are kept, and what is refused."""

from __future__ import annotations

import re

import pytest

from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.output_wording import EXAMPLES, MOST, OutputWording, told
from cratescope.files import read_json
from cratescope.neurons.effects import Effects, TokenChange, TokenLogit, kept_effects
from cratescope.neurons.records import NeuronId
from cratescope.neurons.sample import DEAD, records_identity
from cratescope.options import from_table
from cratescope.run import claim
from scripted import ScriptedLLM
from test_explain import DEAD_INDEX, N_NEURONS, make_run


def made_up(neuron, raises=(" rain", " storm"), measured=(" wind", " rain"), lowers=(" the",), changed=(" of",)):
    by_weights = [tuple(TokenLogit(7, text, 1.0) for text in texts) for texts in (raises, lowers)]
    found = [tuple(TokenChange(7, text, 1.0, 0.1) for text in texts) for texts in (measured, changed)]
    return Effects(neuron, 1.0, 2, *by_weights, *found, 0.1, 0.9, 0.1, 0.2, 0.1, None, None)


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    kept = kept_effects(run.effects("codes"))
    claim(kept.folder, {"strength": 1.0} | records_identity(run, "codes"))
    kept.write(
        made_up(NeuronId(run.name, "codes", layer, index), raises=(f" rain{index}", " storm"))
        for layer in (0, 1)
        for index in range(N_NEURONS)
    )
    return run


def asked(run, source, **options):
    llm = ScriptedLLM(lambda prompt: " weather")
    folders = explain(ExplainConfig(run.root, from_=source, protocols=("uniform",), **options), llm)
    return llm, folders


def test_the_prompt_lists_tokens_by_weights_and_as_measured_in_turn(run):
    llm, _ = asked(run, "output", neurons=2, layers=(0,))
    assert len(llm.asked) == 2
    for prompt in llm.asked:
        assert re.fullmatch(r"Lowers: the, of\nRaises: rain\d, wind, storm, rain\nThe detector finds:", prompt)


def test_from_both_the_words_that_excite_the_neuron_come_first(run):
    llm, _ = asked(run, "both", neurons=1, layers=(0,))
    assert re.match(r"Words: \w+.*\nLowers: the, of\nRaises: rain\d, wind", llm.asked[0])


def test_each_source_has_a_set_and_an_identity_of_its_own(run):
    names = {}
    for source in ("activations", "output", "both"):
        _, [folder] = asked(run, source, neurons=4)
        names[source] = folder.parent.name
        identity = read_json(folder / "manifest.json")["identity"]
        assert ("effects" in identity) == (source != "activations")
    assert names == {"activations": "offline", "output": "offline_output", "both": "offline_both"}
    explained = Explained(run, "codes", "offline_output", "top")
    texts = {one.text for one in explained.explanations.read(0).values()}
    assert texts == {"weather"} or texts == {"weather", ""}
    prompts = {one.prompt for one in explained.explanations.read(0).values()}
    assert prompts == {"raised-1"}


def test_a_dead_neuron_is_skipped_with_its_reason(run):
    _, [folder] = asked(run, "output")
    found = Explained(run, "codes", "offline_output", folder.name).explanations.read(0)
    assert found[DEAD_INDEX].skipped == DEAD and len(found) == N_NEURONS


def test_a_neuron_that_raises_nothing_readable_is_skipped(run):
    kept_effects(run.effects("codes")).write(
        made_up(NeuronId(run.name, "codes", 0, index), raises=(), measured=("\N{REPLACEMENT CHARACTER}",))
        for index in range(N_NEURONS - 1)
    )
    _, [folder] = asked(run, "output", layers=(0,))
    found = Explained(run, "codes", "offline_output", folder.name).explanations.read(0)
    assert {one.skipped for one in found.values()} == {None, DEAD, "no readable token"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"explainer": "terms"}, "--from output: goes with --explainer llm"),
        ({"explainer": "selected"}, "--from output: goes with --explainer llm"),
        ({"prompts": "openai"}, "--from output: goes with --prompts own"),
        ({"windows": 1}, "--windows: goes with --from activations or both"),
    ],
)
def test_what_does_not_go_with_effects_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ExplainConfig(tmp_path, from_="output", **options)


def test_without_effects_the_command_that_makes_them_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no effects; run `cratescope effects"):
        asked(run, "output")


def test_a_neuron_without_effects_is_named(run):
    kept = kept_effects(run.effects("codes"))
    kept.replace(0, [one for index, one in kept.read(0).items() if index != 2])
    with pytest.raises(UserError, match="no effects of layer 0 neuron 2"):
        asked(run, "both", layers=(0,))


def test_effects_of_other_weights_are_refused(run):
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="was made with model_sha256"):
        asked(run, "output")


def test_a_study_file_calls_it_from_too(tmp_path):
    found = from_table(ExplainConfig, {"run": str(tmp_path), "from": "both"}, "study.toml: [explain]")
    assert found.from_ == "both" and found.explainer_name == "offline_both"


def test_lists_are_cut_and_say_everything_once():
    assert told([" a", "A", "b"], ["c", " b"]) == ["a", "c", "b"]
    assert len(told(map(str, range(100)), [])) == MOST
    assert told(["\n", " ", ""], ["\N{REPLACEMENT CHARACTER}x"]) == ["\\n"]


def test_examples_have_the_form_of_a_prompt():
    for source, first in (("output", "Lowers: "), ("both", "Words: ")):
        prefix = OutputWording(source).explain_prefix()
        assert prefix.startswith(first) and prefix.count("The detector finds: ") == len(EXAMPLES)

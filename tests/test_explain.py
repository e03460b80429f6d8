"""Explaining: the sample, its files, resume and refusals. Also makes the small run that simulate and score test on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.arm import Arm
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained
from cratescope.explain.protocols import TOP
from cratescope.files import read_json, write_json
from cratescope.llm.answers import EMPTY_ANSWER
from cratescope.llm.config import LLMConfig
from cratescope.neurons.records import (
    Moments,
    NeuronId,
    NeuronRecord,
    Window,
    layer_file,
    read_records,
    write_records,
)
from cratescope.neurons.sample import DEAD, UNDECODABLE, find_site, neuron_order
from cratescope.run import Run, claim
from cratescope.text.tokenizer import train_bpe
from kept_files import drop, read_explanations
from scripted import ScriptedLLM

WORDS = (" dog", " cat", " bread", " cheese", " river", " boat", " judge", " court", " red", " blue", " and", " the")
N_NEURONS = 8
DEAD_INDEX = 3
WINDOW = 16


def make_run(root: Path, layers: tuple[int, ...] = (0, 1), weights: bytes = b"weights", site: str = "codes") -> Run:
    """A run whose neuron i fires on WORDS[i] alone, at a level the token's place decides; neuron 3 is dead."""
    run = Run(root)
    run.model.mkdir(parents=True)
    (run.model / "model.safetensors").write_bytes(weights)
    write_json(run.manifest, {"name": run.name})
    tokenizer = train_bpe(iter(["".join(WORDS) + "".join(WORDS[::-1])] * 8), 400)
    tokenizer.save_pretrained(run.model)
    claim(run.records(site), {"excerpts": 40})
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(row) == 1 for row in ids), "the tokenizer should know every word as one token"
    for layer in layers:
        records = [_record(run.name, site, layer, index, [row[0] for row in ids]) for index in range(N_NEURONS)]
        write_records(layer_file(run.records(site), layer), records)
    return run


def _record(name: str, site: str, layer: int, index: int, ids: list[int]) -> NeuronRecord:
    rng = np.random.default_rng([layer, index])
    tokens = rng.choice(ids, (40, WINDOW))
    tokens[:, index % WINDOW] = ids[index]
    activations = (tokens == ids[index]) * (0.0 if index == DEAD_INDEX else 2.5)
    windows = [
        Window(row, values.astype(np.float32), excerpt, 0, WINDOW // 2)
        for excerpt, (row, values) in enumerate(zip(tokens, activations, strict=True))
    ]
    density = float((activations > 0).mean())
    moments = Moments(tokens.size, float(activations.mean()), 1.0, None, None, float(activations.max()))
    top = () if index == DEAD_INDEX else tuple(windows[:20])
    return NeuronRecord(NeuronId(name, site, layer, index), top, tuple(windows[20:]), moments, density)


def first_word(prompt: str) -> str:
    """An explainer that answers with the strongest word."""
    found = re.search(r"Words: (\w+)", prompt)
    assert found, prompt
    return f' the word "{found[1]}"\n\nWords: and so on'


def settings_for(run: Run, **changes: object) -> ExplainConfig:
    return dataclasses.replace(ExplainConfig(run.root, llm=LLMConfig(llm="scripted", llm_batch=3)), **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_lexical_neuron_is_explained_by_its_word(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (folder,) = explain(settings_for(run), ScriptedLLM(first_word))
    found = read_explanations(folder)
    assert len(found) == 2 * N_NEURONS
    assert folder == Explained(run, "codes", "scripted", "top").explanations.folder
    for neuron, item in found.items():
        if neuron.index != DEAD_INDEX:
            assert item.text == f'the word "{WORDS[neuron.index].strip()}"'
            assert (item.explainer, item.skipped) == ("scripted", None)


def test_a_dead_neuron_stays_in_the_sample_without_an_explanation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    llm = ScriptedLLM(first_word)
    found = read_explanations(*explain(settings_for(run, layers=(1,)), llm))
    assert {neuron.index for neuron in found} == set(range(N_NEURONS))
    dead = found[NeuronId("run", "codes", 1, DEAD_INDEX)]
    assert (dead.text, dead.skipped) == ("", DEAD)
    assert len(llm.asked) == N_NEURONS - 1


def test_an_empty_answer_is_a_named_skip(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    found = read_explanations(*explain(settings_for(run), ScriptedLLM(lambda _: " \n something")))
    assert {item.skipped for item in found.values()} == {DEAD, EMPTY_ANSWER}
    assert {item.text for item in found.values()} == {""}


def test_an_interrupted_run_ends_with_the_same_files(tmp_path: Path) -> None:
    whole, cut = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    expected = files(*explain(settings_for(whole), ScriptedLLM(first_word)))

    def dies(prompt: str) -> str:
        if "judge" in prompt:
            raise KeyboardInterrupt
        return first_word(prompt)

    with pytest.raises(KeyboardInterrupt):
        explain(settings_for(cut), ScriptedLLM(dies))
    kept = Explained(cut, "codes", "scripted", "top").explanations
    assert files(kept.folder) != expected
    if some := kept.done(0):
        drop(kept, 0, [min(some)])
    assert files(*explain(settings_for(cut), ScriptedLLM(first_word))) == expected


def test_a_batch_with_a_missing_neuron_is_asked_again_as_a_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    whole = ScriptedLLM(first_word)
    (folder,) = explain(settings_for(run), whole)
    order = neuron_order(0, 0, N_NEURONS).tolist()
    drop(Explained(run, "codes", "scripted", "top").explanations, 0, [order[1]])
    again = ScriptedLLM(first_word)
    explain(settings_for(run), again)
    live = [index for index in order[:3] if index != DEAD_INDEX]
    assert again.asked == whole.asked[: len(live)]


def test_finished_explanations_are_not_asked_for_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    again = ScriptedLLM(first_word)
    explain(settings_for(run), again)
    assert again.asked == []


def test_growing_the_sample_keeps_what_was_explained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    small = read_explanations(*explain(settings_for(run, neurons=3), ScriptedLLM(first_word)))
    again = ScriptedLLM(first_word)
    large = read_explanations(*explain(settings_for(run, neurons=6), again))
    assert len(large) == len(small) + 3
    assert small.items() <= large.items()
    once = make_run(tmp_path / "once" / "run", layers=(0,))
    assert files(*explain(settings_for(once, neurons=6), ScriptedLLM(first_word))) == files(
        Explained(run, "codes", "scripted", "top").explanations.folder
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.integers(0, 11), st.integers(1, 600))
def test_the_draw_is_a_permutation_that_seed_and_layer_decide(seed: int, layer: int, width: int) -> None:
    order = neuron_order(seed, layer, width)
    assert sorted(order.tolist()) == list(range(width))
    assert (order == neuron_order(seed, layer, width)).all()
    if width > 20:
        assert (order != neuron_order(seed + 1, layer, width)).any()
        assert (order != neuron_order(seed, layer + 1, width)).any()


def test_explanations_of_another_model_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    explain(settings_for(run), ScriptedLLM(first_word))
    (run.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_sha256"):
        explain(settings_for(run), ScriptedLLM(first_word))


def test_a_folder_of_a_file_per_neuron_is_refused_by_name(tmp_path: Path) -> None:
    """As before there were tables: its manifest names no format."""
    run = make_run(tmp_path / "run", layers=(0,))
    (folder,) = explain(settings_for(run, neurons=2), ScriptedLLM(first_word))
    manifest = read_json(folder / "manifest.json")
    assert manifest["identity"].pop("format") == 2
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match="manifest.json|format") as caught:
        explain(settings_for(run), ScriptedLLM(first_word))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_another_draw_is_not_mixed_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    explain(settings_for(run, neurons=2), ScriptedLLM(first_word))
    with pytest.raises(UserError, match="neuron_seed"):
        explain(settings_for(run, neurons=2, neuron_seed=1), ScriptedLLM(first_word))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (7,)}, "--layers 7: no such layer"),
        ({"neurons": 9}, "--neurons 9: layer 0 has 8 neurons"),
        ({"neurons": 0}, "--neurons 0"),
        ({"site": "mlp"}, r"no records of site mlp \(found: codes\)"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(settings_for(make_run(tmp_path / "run"), **changes), ScriptedLLM(first_word))


def test_auto_takes_the_only_site_and_lists_several(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert find_site(run, "auto") == find_site(run, "codes") == "codes"
    (run.root / "records" / "mlp").mkdir()
    run.manifest.unlink()
    with pytest.raises(UserError, match="found: codes, mlp"):
        find_site(run, "auto")
    assert find_site(run, "mlp") == "mlp"
    about = {"parameters": 1, "steps": 1, "n_layer": 1, "context": 8, "data": {"path": "d", "manifest_sha256": "0"}}
    write_json(run.manifest, about | {"arm": Arm.trained("gpt2-2l", 0, 0, {}).row()})
    assert find_site(run, "auto") == "mlp", "the arm's own"
    with pytest.raises(UserError, match="not a run directory"):
        find_site(Run(tmp_path / "nothing"), "auto")


def test_everything_made_from_one_explanation_set_has_an_address(tmp_path: Path) -> None:
    run = Run(tmp_path)
    one, other = (Explained(run, "codes", "org/model", name) for name in ("top", "openai"))
    folders = [one.explanations.folder, one.simulations("list-pmi").folder, one.judgements("fuzzing").folder]
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == [
        "explanations/codes/org-model/top",
        "simulations/codes/org-model/list-pmi/top",
        "judgements/codes/org-model/fuzzing/top",
    ]
    assert Explained.every(run, "codes", "org/model") == []
    for item in (one, other):
        item.explanations.folder.mkdir(parents=True)
    assert Explained.every(run, "codes", "org/model") == [other, one]
    with pytest.raises(UserError, match="top: no explanations; run `cratescope explain`"):
        one.layers()


def test_each_explanation_set_is_made_once_from_its_own_windows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    llm = ScriptedLLM(first_word)
    folders = explain(settings_for(run, protocols=("random-only", "openai", "uniform")), llm)
    assert folders == [Explained(run, "codes", "scripted", name).explanations.folder for name in ("top", "openai")]
    assert len(llm.asked) == 2 * (N_NEURONS - 1)
    assert [len(read_explanations(folder)) for folder in folders] == [N_NEURONS] * 2


def test_tokens_the_tokenizer_does_not_have_are_a_named_skip(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    path = layer_file(run.records("codes"), 0)
    records = list(read_records(path).values())
    records[1].top[0].tokens[3] = 100_000
    write_records(path, records)
    (folder,) = explain(settings_for(run), ScriptedLLM(first_word))
    found = read_explanations(folder)
    assert {neuron.index: item.skipped for neuron, item in found.items() if item.skipped} == {
        1: UNDECODABLE,
        DEAD_INDEX: DEAD,
    }


def test_further_windows_give_another_explanation_beside_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=(0,))
    llm = ScriptedLLM(lambda prompt: f" phrase of {prompt!r}")
    (first,), (second,) = (explain(settings_for(run, windows=turn), llm) for turn in (0, 1))
    assert second.parts[-2:] == ("scripted_windows1", "top")
    assert len(llm.asked) == 2 * (N_NEURONS - 1)
    told = Explained(run, "codes", "scripted_windows1", "top")
    assert (told.turns(), Explained(run, "codes", "scripted", "top").turns()) == ({1}, {0})
    record = read_records(layer_file(run.records("codes"), 0))[0]
    assert [window.excerpt for window in told.shown(TOP).windows(record)] == [10, 11, 12, 13, 14]
    assert files(first).keys() == files(second).keys()
    (manifest,) = second.glob("manifest.json")
    manifest.write_text(manifest.read_text().replace('"windows": 1', '"windows": "1"'))
    with pytest.raises(UserError, match="manifest.json"):
        told.turns()


def test_the_windows_option_is_for_a_language_model() -> None:
    with pytest.raises(UserError, match="--windows: goes with --explainer llm"):
        ExplainConfig(Path("x"), explainer="terms", windows=1)

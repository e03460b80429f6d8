"""Explanations by terms through explain, simulate and score: what is refused, and that nothing changes the result."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import processes
from cratescope import parts
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig, JudgeConfig, LanguageConfig, SimulateConfig, TermsConfig
from cratescope.explain.explain import explain
from cratescope.explain.explained import Explained, Explanation
from cratescope.explain.judge import judge
from cratescope.explain.simulate import simulate
from cratescope.explain.terms.fit import TOO_FEW
from cratescope.explain.terms.language import PACKAGED, print_language
from cratescope.neurons.records import layer_file, read_records, write_records
from cratescope.neurons.sample import records_identity
from cratescope.results.scores import Scores
from cratescope.run import Run, claim
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from test_terms_fit import RULES, STRINGS, activations_of, record

NEVER = 1 << 30
PROTOCOLS = ("uniform", "anthropic")
BY_TERMS = {"explainer": "terms", "simulator": "terms", "protocols": PROTOCOLS}


def tokenizer_of(strings):
    spelled = {text.replace(" ", "Ġ").replace("\n", "Ċ"): place for place, text in enumerate(strings)}
    made = Tokenizer(models.WordLevel(spelled, unk_token=next(iter(spelled))))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=next(iter(spelled)))


def run_of(root, records, strings=STRINGS):
    """A run that has only records and a tokenizer."""
    run = Run(root)
    tokenizer_of(strings).save_pretrained(run.model)
    claim(run.records("codes"), {"imported": "made up"})
    write_records(layer_file(run.records("codes"), 0), records)
    return run


@pytest.fixture(scope="module")
def records():
    return [record(activations_of(text, seed=number), number) for number, text in enumerate(RULES.values())]


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("terms") / "run", records)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.fixture(scope="module")
def done(run):
    """The run, explained, simulated and scored."""
    explain(ExplainConfig(run.root, explainer="terms", protocols=PROTOCOLS))
    simulate(SimulateConfig(run.root, **BY_TERMS))
    score(ScoreConfig(run.root, **BY_TERMS))
    return run


def test_terms_are_explained_simulated_and_scored_without_a_language_model(done):
    texts = pd.read_parquet(Explained(done, "codes", "terms", "top").explanations.folder / "layer-00.parquet")
    assert texts["text"][0].startswith("numbers (+10)") and set(texts["prompt"]) == {"english 1"}
    scores = Scores.read(done.scores("codes", "terms", "terms"))
    assert scores.protocols == ["uniform", "anthropic"]
    assert scores.mean("uniform").mean > 0.7
    assert scores.mean("uniform", over="shuffled").mean > 0.5
    card = str(done.neuron(0, 0))
    assert "numbers (+10)" in card and "uniform" in card


def test_all_explanation_sets_have_the_same_terms(done):
    top, anthropic = (
        pd.read_parquet(Explained(done, "codes", "terms", name).explanations.folder / "layer-00.parquet")
        for name in ("top", "anthropic")
    )
    assert top.equals(anthropic)


def test_two_workers_end_with_the_files_of_one(done, records, tmp_path, monkeypatch):
    monkeypatch.setattr("cratescope.explain.terms.explainer.ByTerms.batch", 2)
    run = run_of(tmp_path / "run", records)
    for worker in ("1/2", "0/2"):
        explain(ExplainConfig(run.root, explainer="terms", protocols=PROTOCOLS, worker=worker))
    for worker in ("1/2", "0/2"):
        simulate(SimulateConfig(run.root, **BY_TERMS, worker=worker))
    score(ScoreConfig(run.root, **BY_TERMS))
    assert files(run.root) == files(done.root)


def test_killed_at_any_change_of_the_disk_the_same_command_ends_with_the_same_files(
    done, records, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "ROWS", 2)
    start = run_of(tmp_path / "run", records).root

    def work(folder):
        return lambda: explain(ExplainConfig(folder, explainer="terms", protocols=("uniform",)))

    wanted = files(done.root)[f"explanations/codes/terms/top/{layer_file(Path(), 0)}"]
    total = processes.killed_before(NEVER, work(shutil.copytree(start, tmp_path / "whole" / "run")))
    for change in range(0, total, max(total // 4, 1)):
        folder = shutil.copytree(start, tmp_path / str(change) / "run")
        processes.killed_before(change, work(folder))
        work(folder)()
        found = files(folder)
        assert found[f"explanations/codes/terms/top/{layer_file(Path(), 0)}"] == wanted, f"before change {change}"


def test_a_text_that_is_not_in_the_language_is_a_named_skip(done, tmp_path):
    run = Run(shutil.copytree(done.root, tmp_path / "run"))
    kept = Explained(run, "codes", "terms", "top").explanations
    (neuron, first), *_ = kept.all()
    kept.write([type(first)(neuron, "words about numbers", "terms", first.prompt)])
    simulate(SimulateConfig(run.root, explainer="terms", simulator="terms", protocols=("uniform",)))
    simulated = Explained(run, "codes", "terms", "top").simulations("terms").read(0)[neuron.index]
    assert simulated.skipped == 'not read by the simulator: no term of the language english: "words about numbers"' or (
        simulated.skipped.startswith("not read by the simulator: not in terms with weights")
    )
    assert "own" not in simulated.expected and "shuffled" in simulated.expected
    before = files(run.root)
    simulate(SimulateConfig(run.root, explainer="terms", simulator="terms", protocols=("uniform",)))
    assert files(run.root) == before, "it is not tried again"


def test_another_language_is_a_language_of_its_own(done, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "english"\nname = "mine"\nversion = 1\n[lists]\n"odd words" = "x paris"\n')
    with pytest.raises(UserError, match="the explanations are in the language english 1 .*name the file"):
        simulate(SimulateConfig(done.root, **BY_TERMS, language=path))
    with pytest.raises(UserError, match="language"):
        explain(ExplainConfig(done.root, explainer="terms", protocols=PROTOCOLS, terms=TermsConfig(language=path)))
    run = run_of(tmp_path / "run", [record(activations_of('the word "x" (+10), the word "paris" (+10)'))])
    explain(ExplainConfig(run.root, explainer="terms", protocols=("uniform",), terms=TermsConfig(language=path)))
    ((_, one),) = Explained(run, "codes", "terms", "top").explanations.all()
    assert one.text.startswith("odd words (+10)") and one.prompt == "mine 1"
    with pytest.raises(UserError, match="in the language mine 1"):
        simulate(SimulateConfig(run.root, explainer="terms", simulator="terms", protocols=("uniform",)))
    simulate(SimulateConfig(run.root, **(BY_TERMS | {"protocols": ("uniform",)}), language=path))
    assert "odd words: paris x" in print_language(LanguageConfig(path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('[lits]\n"a b" = "c"', "lits: unknown; use "),
        ('[lists]\n"a b" = ""', "lists.a b: is empty"),
        ('[lists]\n"a b" = []', "lists.a b: is empty"),
        ('[spellings]\n"a b" = "("', r"spellings.a b: '\(' is no regular expression"),
    ],
)
def test_a_language_with_a_mistake_is_told_in_one_line(run, tmp_path, lines, message):
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\nversion = 1\n{lines}\n')
    with pytest.raises(UserError, match=message) as caught:
        explain(ExplainConfig(run.root, explainer="terms", terms=TermsConfig(language=path)))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_records_too_small_to_choose_from_are_named_skips(records, tmp_path):
    empty = tuple(replace(stratum, windows=()) for stratum in records[0].by_quantile)
    bare = [replace(one, by_quantile=empty, top=()) for one in records[:2]]
    run = run_of(tmp_path / "run", bare)
    explain(ExplainConfig(run.root, explainer="terms", protocols=("uniform",)))
    found = Explained(run, "codes", "terms", "top").explanations.read(0)
    assert [one.skipped for one in found.values()] == [TOO_FEW, TOO_FEW]


def test_a_tokenizer_without_words_is_told_in_one_line(records, tmp_path):
    run = run_of(tmp_path / "run", records[:1], [f"{'.' * n}" for n in range(1, len(STRINGS) + 1)])
    with pytest.raises(UserError, match="tokens hold a letter or a digit") as caught:
        explain(ExplainConfig(run.root, explainer="terms", protocols=("uniform",)))
    assert "\n" not in str(caught.value)


def test_a_judge_is_not_shown_what_terms_were_chosen_on(done):
    with pytest.raises(UserError, match="judge explanations of an LLM"):
        judge(JudgeConfig(done.root, explainer="terms"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": TermsConfig(joints=True)}, "--joints: goes with --explainer terms"),
        ({"terms": TermsConfig(language=PACKAGED)}, "--language: goes with --explainer terms"),
        ({"explainer": "terms", "prompts": "openai"}, "--prompts: goes with --explainer llm"),
    ],
)
def test_options_of_the_other_explainer_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ExplainConfig(tmp_path, **options)
    with pytest.raises(UserError, match="--language: goes with --simulator terms"):
        SimulateConfig(tmp_path, language=PACKAGED)


def test_every_option_of_terms_gives_explanations_of_its_own(run, tmp_path):
    texts = set()
    for number, config in enumerate((TermsConfig(), TermsConfig(1), TermsConfig(5, named_only=False, joints=True))):
        copy = Run(
            shutil.copytree(run.root, tmp_path / str(number) / "run", ignore=shutil.ignore_patterns("exp*", "s*s"))
        )
        explain(ExplainConfig(copy.root, explainer="terms", protocols=("uniform",), terms=config))
        found = Explained(copy, "codes", "terms", "top").explanations.read(0)
        texts.add(" | ".join(one.text for one in found.values()))
        with pytest.raises(UserError, match="terms"):
            explain(ExplainConfig(copy.root, explainer="terms", protocols=("uniform",), terms=TermsConfig(2)))
    assert len(texts) == 3


def test_a_simulator_that_can_read_nothing_says_so_at_once(run):
    explained = Explained(run, "codes", "someone", "top")
    claim(explained.explanations.folder, records_identity(run, "codes") | {"neuron_seed": 0})
    records = read_records(run.records("codes") / "layer-00.parquet")
    said = [Explanation(one.neuron, "words about numbers", "someone", "1") for one in records.values()]
    explained.explanations.write(said)
    with pytest.raises(
        UserError, match=r"--simulator terms: it can read none of the 5 explanations by someone .*; give"
    ):
        simulate(SimulateConfig(run.root, explainer="someone", simulator="terms", protocols=("uniform",)))
    assert not explained.simulations("terms").layers

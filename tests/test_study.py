"""A whole study: all stages from one file, killed again and again without a trace."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import processes
from cratescope.config import StudyConfig
from cratescope.errors import UserError
from cratescope.explain.config import ExplainConfig
from cratescope.llm.config import LLMConfig
from cratescope.lm.config import TrainConfig
from cratescope.options import from_table
from cratescope.report.config import ReportConfig
from cratescope.results.compare import Quantity
from cratescope.study import check, read_plan, study
from cratescope.text.shards import TokenData
from scripted import ScriptedLLM

PLAN = """
title = "A small study"
[prepare]
source = "{text}"
tokenizer = "bpe:320"
validation = 0.2
heldout = 0.3
[train]
context = 32
batch_tokens = 128
micro_batch = 2
steps = 12
warmup_steps = 2
validate_every = 4
validation_crops = 4
log_every = 1
save_every = 2
[[model]]
name = "crate"
preset = "crate-1l"
[[model]]
name = "gpt2"
preset = "gpt2-1l"
[evaluate]
crops = 8
[collect]
excerpts = 40
window = 8
part = 8
[explain]
neurons = 12
llm = "{llm}"
llm_batch = 4
[simulate]
llm = "{llm}"
llm_batch = 4
[steer]
units = 2
strengths = [1, 8]
texts = 2
context = 12
length = 3
prefixes = ["the cat"]
[report]
cards = 2
"""


@pytest.fixture(scope="module")
def plan(text_folder, data_folder, tmp_path_factory):
    """A study file whose LLM is a tiny random Llama on disk."""
    folder = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    tokenizer = TokenData.open(data_folder).tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(vocab_size=320, max_position_embeddings=4096, **shape, eos_token_id=0, bos_token_id=0)
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    (folder / "plan.toml").write_text(PLAN.format(text=text_folder, llm=folder / "llm"))
    return folder / "plan.toml"


def results(folder):
    """Every file that a rerun must reproduce: all but run times and the order of what was written when."""
    kept = ("*.parquet", "metrics.jsonl", "model/model.safetensors", "scores.json")
    found = {
        str(path.relative_to(folder)): path.read_bytes() for kind in kept for path in (folder / "runs").rglob(kind)
    }
    for name in [name for name in found if name.endswith("metrics.jsonl")]:
        found[name] = re.sub(rb', "tokens_per_second".*?(?=})', b"", found[name])
    found |= {path.name: path.read_bytes() for path in (folder / "data").glob("*.npy")}
    return found | {path.name: path.read_bytes() for path in (folder / "report").glob("*.csv")}


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "whole"
    assert study(StudyConfig(plan, out)) == out / "report" / "report.html"
    return out


def test_a_study_ends_in_a_report_of_every_model(whole):
    page = (whole / "report" / "report.html").read_text()
    assert "A small study" in page and "crate" in page and "gpt2" in page
    for name, site in (("crate", "codes"), ("gpt2", "mlp")):
        (table,) = (whole / "runs" / name / "explanations" / site).rglob("layer-00.parquet")
        assert len(pd.read_parquet(table)) == 12


def test_a_study_sweeps_the_models_of_its_section_and_reports_them(whole):
    for name, site in (("crate", "codes"), ("gpt2", "mlp")):
        table = pd.read_parquet(whole / "runs" / name / "steering" / site / "layer-00.parquet")
        assert table["index"].nunique() == 2 and {*table.strength} == {1.0, 8.0}
    page = (whole / "report" / "report.html").read_text()
    assert 'id="steering"' in page and "The paper's example" in page
    rows = list(csv.DictReader((whole / "report" / "steering.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"crate", "gpt2"} and {row["n"] for row in rows} == {"2"}


def test_a_second_study_does_nothing_again(whole, plan):
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file()}
    study(StudyConfig(plan, whole))
    assert {path: path.stat().st_mtime_ns for path in before} == before


KILLS = (
    "runs/gpt2/checkpoints/checkpoint-8/model.safetensors",
    "runs/crate/explanations/*/*/*/layer-00.parquet",
    "runs/gpt2/simulations/*/*/*/*/plan.json",
)


def test_a_study_killed_again_and_again_ends_with_the_same_files(whole, plan, tmp_path):
    out = tmp_path / "killed"
    for pattern in KILLS:
        assert not any(out.glob(pattern))
        process = processes.start(["study", str(plan), "--out", str(out)])
        processes.kill_when(process, lambda pattern=pattern: any(out.glob(pattern)))
    study(StudyConfig(plan, out))
    wanted, found = results(whole), results(out)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


MILESTONES = """
[prepare]
source = "{text}"
tokenizer = "bpe:320"
validation = 0.2
heldout = 0.3
[train]
preset = "crate-1l"
context = 32
batch_tokens = 128
micro_batch = 2
steps = 6
warmup_steps = 2
validate_every = 2
validation_crops = 4
log_every = 1
save_every = 2
milestones = [0.34, 0.67]
[[model]]
name = "crate"
[evaluate]
crops = 8
[collect]
excerpts = 12
window = 8
top = 6
random = 6
[neurons]
sites = ["auto", "residual"]
protocols = ["uniform", "random-only"]
neurons = 2
simulators = ["list-pmi", "all-at-once"]
judges = ["detection", "intruder"]
llm = "scripted"
[terms]
terms = 2
neurons = 5
protocols = "uniform"
[report]
cards = 1
"""


def test_milestones_sites_simulators_and_judges_of_a_study_are_all_reported(text_folder, tmp_path, monkeypatch):
    llm = ScriptedLLM(lambda prompt: f" words like {len(prompt)}", lambda prompt, token: float(len(prompt + token) % 7))
    for module in ("asking", "simulate", "judge"):
        monkeypatch.setattr(f"cratescope.explain.{module}.open_llm", lambda config: llm)
    (tmp_path / "plan.toml").write_text(MILESTONES.format(text=text_folder))
    page = study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    assert page == tmp_path / "out" / "report" / "report.html"
    simulators = {"report": "terms", "report-list-pmi": "list-pmi", "report-all-at-once": "all-at-once"}
    for name, simulator in simulators.items():
        rows = list(csv.DictReader((tmp_path / "out" / name / "scores.csv").read_text().splitlines()))
        assert {(row["model"], int(row["tokens_trained"])) for row in rows} == {
            (f"{run} · {site}", steps * 128)
            for run, steps in (("crate", 6), ("crate-step-000002", 2), ("crate-step-000004", 4))
            for site in ("codes", "residual")
        }
        others = set() if simulator == "terms" else {"random-only", "detection", "intruder"}
        assert {row["protocol"] for row in rows} == {"uniform"} | others
        assert {row["simulator"] for row in rows} == {simulator}
    explanations = pd.read_parquet(tmp_path / "out/runs/crate/explanations/codes/terms/top/layer-00.parquet")
    assert len(explanations) == 5
    asked = len(llm.asked)
    assert study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out")) == page
    assert len(llm.asked) == asked


DICTIONARY = """
[[sae]]
name = "small"
models = ["crate"]
grid = ["k=4"]
expansion = 1
tokens = 2048
batch = 256
buffer = 2048
features = 8
"""


def test_a_study_can_leave_milestones_to_terms_and_dictionaries_to_trained_models(text_folder, tmp_path, monkeypatch):
    llm = ScriptedLLM(lambda prompt: " words", lambda prompt, token: float(len(token)))
    for module in ("asking", "simulate", "judge"):
        monkeypatch.setattr(f"cratescope.explain.{module}.open_llm", lambda config: llm)
    plan = MILESTONES.format(text=text_folder).replace("[neurons]", "[neurons]\nexplain_milestones = false")
    for several, one in (
        ("[0.34, 0.67]", "[0.34]"),
        ('["auto", "residual"]', '["auto"]'),
        ('["uniform", "random-only"]', '["uniform"]'),
        ('["list-pmi", "all-at-once"]', '["list-pmi"]'),
        ('["detection", "intruder"]', "[]"),
    ):
        plan = plan.replace(several, one)
    untrained = '[[model]]\nname = "untrained"\nsteps = 0\n'
    (tmp_path / "plan.toml").write_text(plan + untrained + DICTIONARY)
    study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    both = {"crate · codes", "crate · sae/small-k4", "untrained"}
    for folder, runs in {
        "report": {*both, "crate-step-000002"},
        "report-list-pmi": both,
    }.items():
        rows = list(csv.DictReader((tmp_path / "out" / folder / "scores.csv").read_text().splitlines()))
        assert {row["model"] for row in rows} == runs
    crate = tmp_path / "out/runs/crate"
    assert not (crate / "milestones/step-000002/explanations/codes/offline").exists()
    assert sorted(path.parent.name for path in crate.rglob("sae_weights.safetensors")) == ["layer-00"]


def test_a_model_that_is_called_like_a_milestone_is_refused(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(MILESTONES + '[[model]]\nname = "untrained"\nsteps = 0\n')
    runs = [run.name for _, runs in check(read_plan(path), path).training(tmp_path) for run in runs]
    assert runs == ["crate", "crate-step-000002", "crate-step-000004", "untrained"]
    path.write_text(MILESTONES + '[[model]]\nname = "crate-step-000004"\n')
    with pytest.raises(UserError, match="name = 'crate-step-000004' is the name of a milestone too"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            "[neurons]\nneurons = 3\n[explain]\nneurons = 4",
            r"\[explain\] neurons = 4 contradicts \[neurons\] neurons = 3",
        ),
        ("[neurons]\nllm = 'a'\n[judge]\nllm = 'b'", r"\[judge\] llm = 'b' contradicts \[neurons\] llm = 'a'"),
        ("[neurons]\nsites = ['auto', 'residual']\n[collect]\nsite = 'mlp'", r"\[collect\] site = 'mlp' contradicts"),
        ("[simulate]\nsimulator = 'all-at-once'\n[score]\nsimulator = 'list-pmi'", r"\[score\] simulator = 'list-pmi'"),
        (
            "[neurons]\njudges = ['fuzzing']\n[judge]\nscorer = ['detection', 'fuzzing']",
            r"\[judge\] scorer = \['detect",
        ),
        ("[neurons]\nexplainer = 'a'", r"\[neurons\] has no option 'explainer'"),
        ("[neurons]\nsites = []", r"\[neurons\] --sites: name at least one"),
        ("[neurons]\nsimulators = ['list']", r"\[neurons\] simulators = \['list'\] is not a value"),
        ("[neurons]\nneurons = 0", r"\[neurons\] --neurons 0: has to be 1 or more"),
        ("[neurons]\nprotocols = ['nosuch']", r"\[neurons\] --protocols nosuch"),
        ("[neurons]\nsites = ['cods']", r"\[\[model\]\] a: no site 'cods' for a crate model"),
        ("[collect]\nlayers = [7]", r"\[\[model\]\] a: layer 7 is out of range"),
        ("[score]\nsimulator = 'list'", r"\[score\] simulator = 'list' is not a value"),
    ],
)
def test_what_sections_share_is_given_once_and_known(tmp_path, sections, message):
    path = tmp_path / "plan.toml"
    path.write_text(f'[prepare]\nsource = "x"\n{sections}\n[[model]]\nname = "a"\n')
    with pytest.raises(UserError, match=message):
        check(read_plan(path), path)


FEATURES = """
[prepare]
source = "x"
{sections}
[[model]]
name = "a"
preset = "crate-2l"
[[model]]
name = "b"
preset = "gpt2-1l"
[[sae]]
name = "bt"
{lines}
"""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("expanson = 2", r"\[\[sae\]\] bt: has no option 'expanson'"),
        ("kind = 'reluu'", r"\[\[sae\]\] bt: kind = 'reluu' is not a value it takes"),
        ("k = 0", r"\[\[sae\]\] bt: --k 0: has to be 1 or more"),
        ("features = 0", r"\[\[sae\]\] bt: --features 0: has to be 1 or more"),
        ("features = 1.5", r"\[\[sae\]\] bt: features = 1.5 is not a value it takes"),
        ("batch = 70_000", r"\[\[sae\]\] bt: --batch 70000: is more than --buffer 65536"),
        ("grid = ['depth=2']", r"\[\[sae\]\] bt: --grid depth=2: give kind, expansion, k, penalty"),
        ("run = 'x'", r"\[\[sae\]\] bt: run is given by the study itself; leave it out"),
        ("data = 'x'", r"\[\[sae\]\] bt: data is given by the study itself; leave it out"),
        ("models = ['c']", r"\[\[sae\]\] bt: models = 'c' is no \[\[model\]\]; there are a, b"),
        ("models = []", r"\[\[sae\]\] bt: --models: name at least one"),
        ("site = 'mlp'", r"\[\[sae\]\] bt: model a: no site 'mlp' for a crate model"),
        ("layers = [1]", r"\[\[sae\]\] bt: model b: layer 1 is out of range"),
        ("[[sae]]\nname = 'BT'", r"\[\[sae\]\] BT: a has another 'BT' already"),
        ("[[sae]]\nname = 'b:t'\n[[sae]]\nname = 'b-t'", r"\[\[sae\]\] b-t: a has another 'b-t' already"),
        (
            "grid = ['k=4,8']\n[[sae]]\nname = 'bt-k8'\nmodels = 'b'",
            r"\[\[sae\]\] bt-k8: b has another 'bt-k8' already",
        ),
        ("[[sae]]\nkind = 'relu'", r"\[\[sae\]\] name = None is not a name"),
        ("[[sae]]\nname = 'a/b'", r"\[\[sae\]\] name = 'a/b' has a slash"),
    ],
)
def test_a_dictionary_of_a_study_is_checked_before_any_work(tmp_path, lines, message):
    path = tmp_path / "plan.toml"
    path.write_text(FEATURES.format(sections="", lines=lines))
    with pytest.raises(UserError, match=rf"plan.toml: {message}"):
        check(read_plan(path), path)


@pytest.mark.parametrize(
    ("sections", "lines", "message"),
    [
        ("[neurons]\nneurons = 9", "features = 8", r"\[\[sae\]\] bt: features = 8 are fewer than the 9 neurons"),
        ("[terms]\nneurons = 9", "features = 8", r"\[\[sae\]\] bt: features = 8 are fewer than the 9 neurons"),
        ("[explain]\nlayers = [0]", "models = 'a'\nlayers = [1]", r"bt: layers = \[1\] lacks layer 0 of \[explain\]"),
        ("[neurons]\nsites = ['auto', 'sae/bt']", "", r"site 'sae/bt': a \[\[sae\]\] adds its features by itself"),
        ("[collect]\nsite = 'sae/bt'", "", r"site 'sae/bt': a \[\[sae\]\] adds its features by itself"),
        ("[sae]\nk = 3", "", r"not valid TOML"),
    ],
)
def test_a_dictionary_contradicts_no_other_section(tmp_path, sections, lines, message):
    path = tmp_path / "plan.toml"
    path.write_text(FEATURES.format(sections=sections, lines=lines))
    with pytest.raises(UserError, match=message):
        check(read_plan(path), path)


def test_different_models_may_have_different_dictionaries_of_one_name(tmp_path):
    path = tmp_path / "plan.toml"
    lines = "models = 'a'\ngrid = ['k=4,8']\n[[sae]]\nname = 'bt'\nmodels = 'b'\ngrid = ['k=4']"
    path.write_text(FEATURES.format(sections="", lines=lines))
    assert [one.names for one in check(read_plan(path), path).coders] == [["bt-k4", "bt-k8"], ["bt-k4"]]


def test_a_dictionary_is_of_all_models_and_of_the_layers_that_are_collected_unless_it_says_otherwise(tmp_path):
    path = tmp_path / "plan.toml"
    sections = "[collect]\nlayers = [0]"
    path.write_text(FEATURES.format(sections=sections, lines="[[sae]]\nname = 'own'\nmodels = 'a'\nlayers = [1, 0]"))
    plan = check(read_plan(path), path).reading(tmp_path)
    assert [one.sae.layers for one in plan.coders] == [(0,), (1, 0)]
    assert [one.sae.data for one in plan.coders] == [tmp_path, tmp_path]
    assert {name: [one.sae.name for one in plan.coders_of(name)] for name in "ab"} == {"a": ["bt", "own"], "b": ["bt"]}


def test_what_sections_share_reaches_every_stage_that_has_it(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        '[prepare]\nsource = "x"\n[neurons]\nneurons = 3\nprotocols = ["uniform"]\nllm = "a"\nllm_batch = 2\n'
        '[simulate]\nsimulator = "all-at-once"\n[judge]\nneurons = 3\n[[model]]\nname = "a"\n'
    )
    plan = check(read_plan(path), path)
    assert (plan.sites, plan.simulators, plan.judges) == (("auto",), ("all-at-once",), ("detection",))
    for section in ("explain", "simulate", "judge"):
        found = plan.options(section, run="r")
        assert (found.neurons, found.protocols, found.llm.llm, found.llm.llm_batch) == (3, ("uniform",), "a", 2)
    assert plan.options("score", run="r").protocols == ("uniform",)


def test_options_of_a_table_become_settings_by_their_types(tmp_path):
    config = from_table(
        TrainConfig, {"out": tmp_path, "data": "d", "adam_betas": [0.8, 0.9], "crate": {"ista_steps": 3}}, "here:"
    )
    assert config.out == tmp_path and config.data == Path("d")
    assert config.adam_betas == (0.8, 0.9) and config.crate == {"ista_steps": "3"}
    with pytest.raises(UserError, match="here: has no option 'stepz'"):
        from_table(TrainConfig, {"stepz": 1}, "here:")
    budget = from_table(TrainConfig, {"out": "x", "data": "d", "budget": "minutes", "clip": 2, "steps": 7}, "here:")
    assert (budget.context, budget.steps, budget.clip) == (256, 7, 2.0) and isinstance(budget.clip, float)
    explain = from_table(ExplainConfig, {"run": "r", "llm": "x", "llm_batch": 3, "layers": [1, 2]}, "here:")
    assert explain == ExplainConfig(Path("r"), layers=(1, 2), llm=LLMConfig(llm="x", llm_batch=3))
    with pytest.raises(UserError, match="here: data is missing"):
        from_table(TrainConfig, {"out": "x"}, "here:")
    for name, value in (
        ("steps", 1.0),
        ("steps", "3"),
        ("data", ""),
        ("preset", 3),
        ("budget", ["hour"]),
        ("keep", {}),
    ):
        with pytest.raises(UserError, match=f"here: {name} = .* is not a value it takes"):
            from_table(TrainConfig, {"out": "x", "data": "d", name: value}, "here:")
    with pytest.raises(UserError, match="here: steps = 'many' is not a value it takes"):
        from_table(TrainConfig, {"out": "x", "data": "d", "steps": "many"}, "here:")


def test_a_mistake_in_the_last_section_is_found_before_any_work(plan, tmp_path):
    (tmp_path / "plan.toml").write_text(plan.read_text().replace("cards = 2", "cads = 2"))
    with pytest.raises(UserError, match=r"\[report\] has no option 'cads'"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_study_is_read_by_its_byte_order_mark(encoding, tmp_path):
    (tmp_path / "plan.toml").write_text('title = "é"\r\n[[model]]\nname = "a"\n', encoding=encoding)
    assert read_plan(tmp_path / "plan.toml") == {"title": "é", "model": [{"name": "a"}]}


def test_a_study_in_another_encoding_is_refused(tmp_path):
    for text in ('title = "é"'.encode("latin-1"), 'title = "e"'.encode("utf-16-le"), b"\xff\xfet"):
        (tmp_path / "plan.toml").write_bytes(text)
        with pytest.raises(UserError, match="plan.toml: not valid TOML"):
            read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[model", "not valid TOML"),
        ("a = " + "[" * 10**4, "not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("[trian]\nsteps = 1", r"no section \[trian\]"),
        ("[train]\nsteps = 1", "at least one"),
        ("train = 3", r"write \[train\]"),
        ("[model]\nname = 'a'", "two brackets"),
        ("[sae]\nk = 3", "two brackets"),
        ("[[model]]\npreset = 'crate-1l'", "each with a name"),
        ("[[model]]\nname = 'a'\n[[model]]\nname = 'a'", "a name of its own"),
        ("model = [1]", "two brackets"),
        ("title = ['a', 'b']\n[[model]]\nname = 'a'", r"title = \['a', 'b'\] is not a title"),
        ("title = ''\n[[model]]\nname = 'a'", "title = '' is not a title"),
        (f"x = {'9' * 5000}", "not valid TOML"),
        (f"[train]\nsteps = 0x{'F' * 6000}", "not valid TOML"),
        (f"x = {'[' * 5000}", "not valid TOML"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_study_file_is_refused(tmp_path, text, message):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../../escaped", "a slash"),
        ("/somewhere", "a slash"),
        ("a\\b", "a slash"),
        ("a\nb", "invisible"),
        ("a\0b", "invisible"),
        ("a\u202eb", "invisible"),
        ("", "is not a name"),
        (".", "a dot"),
        ("..", "a dot"),
        (".hidden", "a dot"),
        ("a ", "a space"),
        ("x" * 161, "longer"),
        ("é" * 81, "longer"),
        ("CRATE", "another one too"),
        (3, "is not a name"),
        (["a"], "is not a name"),
    ],
)
def test_a_model_name_that_is_no_folder_of_its_own_is_refused(tmp_path, name, message):
    (tmp_path / "plan.toml").write_text(
        f'[prepare]\nsource = "x"\n[[model]]\nname = "crate"\n[[model]]\nname = {json.dumps(name)}\n'
    )
    with pytest.raises(UserError, match=rf"\[\[model\]\] name = .*{message}"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out" / "here"))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", "steps = -1", "--steps -1: has to be 0 or more"),
        ("train", "steps = nan", "steps = nan"),
        ("train", "steps = true", "steps = True"),
        ("train", "steps = [1, 2]", r"steps = \[1, 2\]"),
        ("train", "steps = {a = 1}", "steps = {'a': 1}"),
        ("train", "steps = 1979-05-27", "steps = datetime"),
        ("train", "steps = 99999999999999999999", "steps = 9999"),
        ("train", "clip = inf", "--clip inf"),
        ("train", "adam_betas = [0.9, 0.9, 0.9]", r"adam_betas = \[0.9"),
        ("train", "fsdp = 1", "fsdp = 1"),
        ("train", "preset = 'crate-9l'", "no preset 'crate-9l'"),
        ("train", "crate = {ista_steps = nan}", "--crate ista_steps = 'nan' is not a int"),
        ("train", "crate = {ista_expansion = 1000000}", "ista_expansion = 1000000"),
        ("train", "crate = {reconstruction_weight = '1'}", "weighs within a penalty, and there is none"),
        ("train", "llm = 'x'", "has no option 'llm'"),
        ("evaluate", "on = ['heldout', '-x']", "--on -x: no such file"),
        ("collect", "dump = 'yes'", "dump = 'yes'"),
        ("evaluate", "on = ['nosuch']", "--on nosuch: no such file"),
        ("collect", "model = 'x'", "model is given by the study itself"),
        ("explain", "llm = ''", "--llm: is empty"),
        ("explain", "llm_batch = 'many'\nllm = 'x'", "llm_batch = 'many'"),
        ("explain", "protocols = ['uniform', 'nosuch']", "--protocols nosuch: not a protocol"),
        ("simulate", "llm = 'http://localhost/v1'", "a server tells of the likeliest tokens only"),
        ("judge", "scorer = []", r"scorer = \[\]"),
        ("report", "cards = [1, 2]", r"cards = \[1, 2\]"),
        ("report", "primary = 'nosuch/pearson'", "there is no protocol 'nosuch'"),
        ("report", "primary = 'uniform/specifc/shuffled'", "uniform has no measure 'specifc'; .*unseen, specific"),
    ],
)
def test_a_wrong_option_is_found_before_any_work_by_section_and_name(tmp_path, section, line, message):
    (tmp_path / "plan.toml").write_text(
        f'[prepare]\nsource = "x"\n[{section}]\n{line}\n[[model]]\nname = "a"\n', encoding="utf-8"
    )
    with pytest.raises(UserError, match=rf"\[{section}\] .*{message}"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_explanations_from_the_output_need_a_section_of_effects(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(text="x", llm="offline"))
    sections = read_plan(tmp_path / "plan.toml")
    sections["explain"]["from"] = "both"
    with pytest.raises(UserError, match=r"from = 'both' needs effects; add a section \[effects\]"):
        check(sections, tmp_path / "plan.toml")
    found = check(sections | {"effects": {"contexts": 3}}, tmp_path / "plan.toml")
    assert found.effects and found.options("effects", run="x").contexts == 3 and found.explainer.endswith("_both")


def test_arms_to_compare_are_looked_up_before_any_work(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(text="x", llm="offline"))
    sections = read_plan(tmp_path / "plan.toml")
    sections["model"][1] |= {"l1": 0.001}
    sections["report"]["compare"] = ["crate", "gpt2 l1=0.001", "gpt2 l1=0.001 + sae/k3", "crate"]
    check(sections, tmp_path / "plan.toml")
    sections["report"]["compare"][1] = "gpt2"
    with pytest.raises(UserError, match=r"\[report\] compare: 'gpt2' is none of the arms crate, gpt2 l1=0.001"):
        check(sections, tmp_path / "plan.toml")


def test_effects_are_of_all_neurons_however_many_are_explained(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(text="x", llm="offline"))
    sections = read_plan(tmp_path / "plan.toml") | {"effects": {}}
    del sections["explain"]["neurons"]
    sections["neurons"] = {"neurons": 20, "neuron_seed": 3}
    found = check(sections, tmp_path / "plan.toml").options("effects", run="x")
    assert found.neurons is None and found.neuron_seed == 3
    fewer = check(sections | {"effects": {"neurons": 5}}, tmp_path / "plan.toml")
    assert fewer.options("effects", run="x").neurons == 5 and fewer.options("explain", run="x").neurons == 20


def test_a_section_without_what_it_needs_is_refused_by_that_name(tmp_path):
    (tmp_path / "plan.toml").write_text('[[model]]\nname = "a"\n')
    with pytest.raises(UserError, match=r"\[prepare\] source is missing"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))


def test_values_that_look_like_options_and_a_byte_order_mark_are_read(tmp_path):
    text = 'title = "--all [/b] of it"\n[prepare]\nsource = "x"\n[explain]\nllm_model = ""\n[[model]]\nname = "-a"\n'
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8-sig")
    plan = read_plan(tmp_path / "plan.toml")
    check(plan, tmp_path / "plan.toml")
    assert plan["title"] == "--all [/b] of it"


STUDIES = sorted((Path(__file__).parent.parent / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # models of the zoo are copied to the current folder
    plan = read_plan(path)
    check(plan, path)
    kinds = {model.get("preset", model["name"].partition("-seed")[0]) for model in plan["model"]}
    assert kinds >= {"crate-2l", "gpt2-2l"}
    assert Quantity.parse(plan["report"].get("primary", ReportConfig.primary)).protocol in plan["neurons"]["protocols"]


def test_the_papers_study_has_two_seeds_and_an_untrained_copy_of_each():
    models = read_plan(next(path for path in STUDIES if path.stem == "paper-cpu"))["model"]
    found = {(model["preset"], model["seed"], model.get("steps", "all")) for model in models}
    assert found == {(f"{f}-2l", seed, steps) for f in ("crate", "gpt2") for seed in (0, 1) for steps in (0, "all")}


def test_several_scorers_may_judge(tmp_path):
    (tmp_path / "plan.toml").write_text(
        '[prepare]\nsource = "x"\n[judge]\nscorer = ["detection", "fussing"]\n[[model]]\nname = "a"\n'
    )
    with pytest.raises(UserError, match=r"\[judge\] scorer = 'fussing' is not a value"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))

"""A whole study: all stages from one file, killed again and again without a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import processes
from cratescope.config import ReportConfig, StudyConfig, TrainConfig
from cratescope.lm.data import TokenData
from cratescope.results.compare import Quantity
from cratescope.run import UserError
from cratescope.study import check, parse_options, read_plan, study

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
    kept = ("*.parquet", "metrics.jsonl", "model/model.safetensors", "scores.jsonl", "explanations/*/*/*/*/*.json")
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
        assert len(list((whole / "runs" / name / "explanations" / site).rglob("0/*.json"))) == 12


def test_a_second_study_does_nothing_again(whole, plan):
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file()}
    study(StudyConfig(plan, whole))
    assert {path: path.stat().st_mtime_ns for path in before} == before


KILLS = (
    "runs/gpt2/checkpoints/checkpoint-8/model.safetensors",
    "runs/crate/explanations/*/*/*/0/*.json",
    "runs/gpt2/simulations/*/*/*/*/0/*.json",
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


def test_options_are_parsed_as_on_the_command_line(tmp_path):
    config = parse_options(
        TrainConfig, {"out": tmp_path, "data": "d", "adam_betas": [0.8, 0.9], "crate": {"ista_steps": 3}}, "here:"
    )
    assert config.out == tmp_path and config.data == Path("d")
    assert config.adam_betas == (0.8, 0.9) and config.crate == {"ista_steps": "3"}
    with pytest.raises(UserError, match="here: has no option 'stepz'"):
        parse_options(TrainConfig, {"stepz": 1}, "here:")
    with pytest.raises(UserError, match="here: steps = 'many' is not a value it takes"):
        parse_options(TrainConfig, {"out": "x", "data": "d", "steps": "many"}, "here:")


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
        ("train", "llm = 'x'", "has no option 'llm'"),
        ("evaluate", "on = ['heldout', '-x']", r"on = \['heldout', '-x'\]"),
        ("collect", "dump = 'yes'", "dump = 'yes'"),
        ("explain", "llm = ''", "--llm: is empty"),
        ("explain", "llm_batch = 'many'\nllm = 'x'", "llm_batch = 'many'"),
        ("explain", "protocols = ['uniform', 'nosuch']", "--protocols nosuch: not a protocol"),
        ("simulate", "llm = 'http://localhost/v1'", "a server tells of the likeliest tokens only"),
        ("judge", "scorer = []", r"scorer = \[\]"),
        ("report", "cards = [1, 2]", r"cards = \[1, 2\]"),
        ("report", "primary = 'nosuch/pearson'", "there is no protocol 'nosuch'"),
    ],
)
def test_a_wrong_option_is_found_before_any_work_by_section_and_name(tmp_path, section, line, message):
    (tmp_path / "plan.toml").write_text(
        f'[prepare]\nsource = "x"\n[{section}]\n{line}\n[[model]]\nname = "a"\n', encoding="utf-8"
    )
    with pytest.raises(UserError, match=rf"\[{section}\] .*{message}"):
        study(StudyConfig(tmp_path / "plan.toml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


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
def test_every_study_of_the_repository_is_valid(path):
    plan = read_plan(path)
    check(plan, path)
    assert {model["preset"] for model in plan["model"]} >= {"crate-2l", "gpt2-2l"}
    assert Quantity.parse(plan["report"].get("primary", ReportConfig.primary)).protocol in plan["score"]["protocols"]


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

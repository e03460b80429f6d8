"""A whole study: all stages from one file, killed again and again without a trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import processes
from cratescope.config import ReportConfig, StudyConfig, TrainConfig
from cratescope.lm.data import TokenData
from cratescope.report.comparison import Quantity
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
    ],
)
def test_a_wrong_study_file_is_refused(tmp_path, text, message):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "plan.toml")


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

"""Losses are those of the model, errors are over documents, and results of one set survive those of another."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cratescope import cli
from cratescope.config import EvaluateConfig, PrepareConfig
from cratescope.lm.data import TokenData, TokenSplit, prepare
from cratescope.lm.evaluate import (
    evaluate,
    evaluate_split,
    evaluate_texts,
    mean_loss,
    measures,
    ratio,
    token_bytes,
    unigram_entropy,
    windows,
)
from cratescope.lm.harness import metrics
from cratescope.run import Run, UserError, read_json

WORDS = ("Our baker sold bread to the judge", "Paris found salt", "the court quoted its name. Rome", "é漢 the river")


@pytest.fixture
def run(runs_folder, data_folder, tmp_path):
    """A copy of the GPT-2 run that a test may write to."""
    return Run(shutil.copytree(runs_folder / "gpt2", tmp_path / "runs" / "gpt2"))


@pytest.fixture
def data(data_folder):
    return TokenData.open(data_folder)


def config_of(run, data, *on, **options):
    return EvaluateConfig(run.root, data.path, on=on, **({"crops": 6, "device": "cpu"} | options))


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def planted_model(following, margin=5.0, context=16):
    """A GPT-2 without layers whose logit of following[token] is `margin` above all others, which are equal."""
    size = len(following)
    shape = {"vocab_size": size, "n_positions": context, "n_embd": size, "n_layer": 0, "n_head": 1}
    config = GPT2Config(**shape, tie_word_embeddings=False, layer_norm_epsilon=0.0)
    model = GPT2LMHeadModel(config).eval()
    spread = math.sqrt((1 - 1 / size) / size)  # standard deviation of a one-hot vector, which the LayerNorm divides by
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(F.one_hot(torch.tensor(following), size))
        model.lm_head.weight.copy_(torch.eye(size) * margin * spread)
    return model


def planted_losses(size, margin=5.0):
    """Nats of the favoured token, and of any other."""
    right = math.log1p((size - 1) * math.exp(-margin))
    return right, right + margin


# Statistics


def test_the_error_of_a_ratio_is_that_of_drawing_documents_again():
    chance = np.random.default_rng(0)
    tokens = chance.integers(5, 400, 300).astype(float)
    nats = tokens * (3 + 0.4 * chance.standard_normal(300)) + 20 * chance.standard_normal(300)
    value, error = ratio(nats, tokens)
    draws = chance.integers(0, 300, (4000, 300))
    again = nats[draws].sum(1) / tokens[draws].sum(1)
    assert value == nats.sum() / tokens.sum()
    assert error == pytest.approx(again.std(), rel=0.05)


def test_measures_of_two_documents_are_those_worked_out_by_hand():
    found = measures(np.array([4.0, 2.0]), np.array([1.0, 3.0]), np.array([2.0, 6.0]), "x")
    assert (found["loss"], found["n_documents"], found["n_tokens"], found["n_bytes"]) == (1.5, 2, 4, 8)
    # x - R y is 2.5 and -2.5
    assert found["standard_error"] == pytest.approx(math.sqrt(2 * 12.5) / 4)
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(1.5) * found["standard_error"])
    assert found["bits_per_byte"] == pytest.approx(6 / 8 / math.log(2))
    assert found["bits_per_byte_standard_error"] == pytest.approx(found["standard_error"] / 2 / math.log(2))


def test_documents_of_one_loss_have_no_error_and_one_document_has_none_to_tell():
    assert ratio(np.array([2.0, 6.0]), np.array([1.0, 3.0])) == (2.0, 0.0)
    assert ratio(np.array([2.0]), np.array([1.0])) == (2.0, None)


def test_the_error_of_a_loss_curve_is_over_crops():
    loss = mean_loss(np.array([1.0, 2.0, 3.0]), context=11)
    assert (loss.mean, loss.n_tokens) == (2.0, 30)
    assert loss.standard_error == pytest.approx(1 / math.sqrt(3))
    assert mean_loss(np.array([1.5]), context=11).standard_error is None


def test_the_unigram_entropy_is_that_of_a_coin():
    split = TokenSplit("x", (np.array([0, 1, 0, 1], dtype=np.uint16),), 4)
    assert unigram_entropy(split, 2) == pytest.approx(math.log(2))


# Bytes


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_the_bytes_of_the_tokens_of_a_text_are_the_bytes_of_the_text(data_folder, text):
    tokenizer = TokenData.open(data_folder, verify=False).tokenizer
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if tokenizer.eos_token not in text:
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == 0


def test_pieces_with_space_marks_and_single_bytes_are_counted_as_bytes_too():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = {"</s>": 0, "\u2581the": 1, "<0x0A>": 2, "é": 3}
    inner = Tokenizer(models.WordLevel(pieces, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert token_bytes(tokenizer).tolist() == [0, 4, 1, 2]


# Whole texts


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), context=st.integers(1, 9), word=st.integers(0, 3))
def test_windows_predict_every_token_once_and_never_from_more_than_the_context(n, context, word):
    tokens = np.arange(1, n + 1)
    found = list(windows(7, tokens, 0, context, word))
    scored = [token for row in found for token in row.tokens[len(row.tokens) - row.scored :].tolist()]
    assert scored == tokens.tolist()
    for row in found:
        first = row.tokens[0]
        assert row.tokens.tolist() == list(range(first, first + len(row.tokens)))
        assert row.scored < len(row.tokens) <= context + 1
    assert [row.word for row in found] == [0] * (len(found) - 1) + [word]


def test_the_loss_on_texts_is_that_of_the_model_on_each_alone(runs_folder, data):
    model = AutoModelForCausalLM.from_pretrained(runs_folder / "crate" / "model").eval()
    texts = [WORDS[0], WORDS[3], "a", " ".join(WORDS * 3)]
    found = evaluate_texts(model, data.tokenizer, texts, 2, "x")
    nats, counts = [], []
    for text in texts:
        ids = [data.eos_id, *data.tokenizer(text, add_special_tokens=False).input_ids]
        nats.append(0.0)
        counts.append(len(ids) - 1)
        for place in range(1, len(ids)):
            # The context of the window that the token is in (see `windows`).
            end = min(-(-place // 32) * 32, len(ids) - 1)
            before = torch.tensor([ids[max(0, end - 32) : place]])
            nats[-1] -= model(before).logits[0, -1].log_softmax(-1)[ids[place]].item()
    assert max(counts) > 64, "no text longer than two windows"
    assert (found["n_tokens"], found["n_documents"]) == (sum(counts), 4)
    assert found["n_bytes"] == sum(len(text.encode()) for text in texts)
    assert found["loss"] == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert found["standard_error"] == pytest.approx(ratio(np.array(nats), np.array(counts, float))[1], rel=1e-3)


def test_a_batch_of_texts_gives_what_each_alone_gives(runs_folder, data):
    model = AutoModelForCausalLM.from_pretrained(runs_folder / "gpt2" / "model").eval()
    one, many = (evaluate_texts(model, data.tokenizer, WORDS, size, "x") for size in (1, 50))
    assert one == {name: pytest.approx(value, rel=1e-5) for name, value in many.items()}


# Last words


def lambada(data):
    """Passages, half of which end in the word that the planted model expects (its first token fits the others too)."""
    tokenizer = data.tokenizer
    following = list(range(len(tokenizer)))
    passages = [f"{text} bread" for text in WORDS] + [f"{text} bowl" for text in WORDS]
    expected, other = (tokenizer(word, add_special_tokens=False).input_ids for word in (" bread", " bowl"))
    last = {tokenizer(text, add_special_tokens=False).input_ids[-1] for text in WORDS}
    assert expected[0] == other[0] and expected[1] != other[1] and not last & set(expected), "words of another kind"
    for token in last:
        following[token] = expected[0]
    for token, successor in zip(expected, expected[1:], strict=False):
        following[token] = successor
    return passages, planted_model(following, context=32)


def test_a_last_word_is_right_when_all_of_its_tokens_are_the_likeliest(data):
    passages, model = lambada(data)
    found = evaluate_texts(model, data.tokenizer, passages, 4, "lambada", last_word=True)["last_word"]
    assert found["accuracy"] == 0.5
    assert found["accuracy_standard_error"] == pytest.approx(math.sqrt(0.25 / 7))
    right, wrong = planted_losses(len(data.tokenizer))
    bread, bowl = (data.tokenizer(word, add_special_tokens=False).input_ids for word in (" bread", " bowl"))
    table = model.transformer.wte.weight.argmax(-1).tolist()
    nats = []
    for text in passages:
        word = bread if text.endswith("bread") else bowl
        ids = data.tokenizer(text, add_special_tokens=False).input_ids
        assert ids[-len(word) :] == word
        pairs = zip(ids[-len(word) - 1 : -1], word, strict=True)
        nats.append(sum(right if table[before] == token else wrong for before, token in pairs))
    mean = np.mean(nats)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    error = np.std(nats, ddof=1) / math.sqrt(len(nats))
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(mean) * error, rel=1e-4)


def test_a_copy_of_lambada_is_read_like_that_of_the_hub(run, data, tmp_path):
    passages, _ = lambada(data)
    jsonl = write_jsonl(tmp_path / "lambada_test.jsonl", passages)
    parquet = tmp_path / "test-00000.parquet"
    pq.write_table(pa.table({"text": passages}), parquet)
    names = (f"lambada={jsonl}", f"lambada={parquet}")
    found = evaluate(config_of(run, data, *names))["sets"]
    lines, table = ({key: value for key, value in found[name].items() if key != "settings"} for name in names)
    assert lines == table
    trained = AutoModelForCausalLM.from_pretrained(run.model).eval()
    assert lines == evaluate_texts(trained, data.tokenizer, passages, 8, "x", last_word=True)
    assert 0 <= lines["last_word"]["accuracy"] <= 1 and lines["last_word"]["perplexity"] > 1


# Other sets


def test_the_sets_of_the_paper_are_read_from_their_own_columns(run, data, tmp_path):
    sentences = [f"the court quoted {number} ." for number in range(45)]
    files = {
        "pile": write_jsonl(tmp_path / "pile.jsonl", WORDS),
        "openwebtext": write_jsonl(tmp_path / "owt.jsonl", WORDS),
        "wikitext": write_jsonl(tmp_path / "wiki.jsonl", WORDS, "page"),
        "ptb": write_jsonl(tmp_path / "ptb.jsonl", sentences, "sentence"),
    }
    found = evaluate(config_of(run, data, *(f"{name}={file}" for name, file in files.items())))["sets"]
    results = {name.partition("=")[0]: row for name, row in found.items()}
    assert {name: row["n_documents"] for name, row in results.items()} == {
        "pile": 4,
        "openwebtext": 4,
        "wikitext": 4,
        "ptb": 3,
    }
    assert results["ptb"]["n_bytes"] == len("\n".join(sentences).encode()) - 2
    assert results["wikitext"]["loss"] == results["pile"]["loss"]


def test_text_files_are_read_as_prepare_reads_them_up_to_a_number_of_documents(run, data, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS[0], encoding="utf-8")
    (folder / "b.txt").write_text(" \n", encoding="utf-8")
    (folder / "c.txt").write_bytes(b"Paris\xff found salt")
    write_jsonl(folder / "d.jsonl", WORDS)
    assert evaluate(config_of(run, data, str(folder)))["sets"][str(folder)]["n_documents"] == 6
    found = evaluate(config_of(run, data, str(folder), max_documents=2))["sets"][str(folder)]
    assert found["n_bytes"] == len(WORDS[0]) + len("Paris? found salt")


# The run's own splits


def test_evaluate_gives_the_mean_loss_with_its_error_and_the_entropy_to_beat(run, data):
    result = evaluate(config_of(run, data))
    split = data.split("validation")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    losses = []
    for crop in split.spaced(6, 32):
        tokens = torch.from_numpy(crop)[None]
        losses.append(model(tokens, labels=tokens).loss.item())
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["n_tokens"] == 6 * 31
    counts = np.bincount(split.window(0, split.n_tokens))
    p = counts[counts > 0] / counts.sum()
    assert result["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert [e["prompt"] for e in result["examples"]][0] == "They saw some boats on the"
    assert all(len(e["top"]) == 5 and e["continuation"] for e in result["examples"])
    assert read_json(run.evaluation) == result


def test_tokens_belong_to_the_document_that_the_next_end_of_text_ends(data):
    tokenizer, eos = data.tokenizer, data.eos_id
    a, b, c = (tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abc")
    # Crops of 4 tokens at 0, 6 and 12; the first two share a document.
    row = [a, eos, b, b, b, b, b, b, eos, c, c, eos, a, a, c, c, c, eos]
    split = TokenSplit("x", (np.array(row, dtype=np.uint16),), 15)
    following = [a] * len(tokenizer)
    found = evaluate_split(planted_model(following, context=4), split, tokenizer, 3, 8)
    right, wrong = planted_losses(len(tokenizer))
    # Predicted: <eos> b b | b <eos> c | a c c
    nats = np.array([wrong, 3 * wrong + wrong, wrong, right + 2 * wrong])
    counts, n_bytes = np.array([1.0, 4.0, 1.0, 3.0]), np.array([0.0, 3.0, 1.0, 3.0])
    expected = measures(nats, counts, n_bytes, "x")
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_bits_per_byte_of_a_whole_split_are_those_of_its_text(data, runs_folder):
    model = AutoModelForCausalLM.from_pretrained(runs_folder / "gpt2" / "model").eval()
    split = data.split("heldout")
    crops = split.n_tokens // 32
    found = evaluate_split(model, split, data.tokenizer, crops, 64)
    assert found["n_bytes"] == pytest.approx(split.n_bytes * 31 / 32, rel=0.05)
    assert found["n_documents"] == data.manifest["splits"]["heldout"]["documents"]
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * found["n_tokens"] / found["n_bytes"])


def test_an_evaluation_of_other_data_is_not_answered_from_the_old_one(run, text_folder, tmp_path):
    options = PrepareConfig(str(text_folder), tmp_path / "data", "bpe:320", validation=0.2, heldout=0.3, seed=1)
    prepare(options)
    first = evaluate(EvaluateConfig(run.root, tmp_path / "data", ("heldout",), crops=4, device="cpu"))
    assert first["loss"] != first["sets"]["heldout"]["loss"]
    prepare(dataclasses.replace(options, out=tmp_path / "other", seed=2))
    other = evaluate(EvaluateConfig(run.root, tmp_path / "other", crops=4, device="cpu"))
    assert other["loss"] != first["loss"]


# One file of results


def test_results_of_one_set_survive_those_of_another_but_not_new_weights(run, data, tmp_path):
    file = write_jsonl(tmp_path / "words.jsonl", WORDS)
    first = evaluate(config_of(run, data, str(file)))
    both = evaluate(config_of(run, data, "heldout"))
    assert both["sets"].keys() == {str(file), "heldout"}
    assert both["sets"][str(file)] == first["sets"][str(file)]
    before = run.evaluation.stat().st_mtime_ns
    assert evaluate(config_of(run, data, "heldout", str(file))) == both
    assert run.evaluation.stat().st_mtime_ns == before
    write_jsonl(file, [*WORDS, "one more"])
    assert evaluate(config_of(run, data, str(file)))["sets"][str(file)]["n_documents"] == 5
    model = AutoModelForCausalLM.from_pretrained(run.model)
    model.transformer.ln_f.bias.data += 0.1
    model.save_pretrained(run.model)
    (run.model / "whole.json").unlink()
    assert evaluate(config_of(run, data))["sets"] == {}


def test_what_is_done_is_kept_when_a_later_set_cannot_be_read(run, data, tmp_path):
    words, broken = write_jsonl(tmp_path / "words.jsonl", WORDS), tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text":\n')
    with pytest.raises(UserError, match="not valid JSON"):
        evaluate(config_of(run, data, str(words), str(broken)))
    assert list(read_json(run.evaluation)["sets"]) == [str(words)]


def test_the_command_line_says_a_line_for_every_set(run, data, tmp_path):
    file = write_jsonl(tmp_path / "words.jsonl", WORDS)
    arguments = [str(run.root), "--data", str(data.path), "--crops", "6", "--device", "cpu"]
    said = cli.run(["evaluate", *arguments, "--on", "validation", f"lambada={file}"]).splitlines()
    assert [line.split()[0] for line in said] == ["validation", f"lambada={file}"]
    assert "unigram entropy" in said[0] and "% right" in said[1] and "+-" in said[1]


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nosuch", None, "--on nosuch: no such file, and no set of that name; there are validation, .*, ptb"),
        ("x.csv", "a,b", "unknown kind of file; the known ones are .txt"),
        ("lambada=x.csv", "a,b", "x.csv: unknown kind of file; a copy of a hub data set is .jsonl"),
        ("lambada=x.jsonl", None, "x.jsonl: no such file; give a copy of the data set EleutherAI/lambada_openai"),
        ("x.txt", "a", "--on .*x.txt: has fewer than 2 tokens of text"),
        ("x.txt", "  \n", "has no text"),
        ("wikitext=x.jsonl", '{"text": "the cat"}\n', "no column `page` of strings, only text"),
        ("lambada=x.jsonl", '{"text": 3}\n', "no column `text` of strings"),
        ("lambada=x.parquet", "no such thing", "x.parquet cannot be read"),
        ("pile", None, "monology/pile-uncopyrighted of the hub cannot be read .*give a local copy.*--on pile=FILE"),
    ],
)
def test_sets_that_cannot_be_read_are_refused_in_one_line(run, data, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name.partition("=")[2] if "=" in name else tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        evaluate(config_of(run, data, name))
    assert "\n" not in str(refusal.value)


def test_missing_packages_are_named_with_the_command_that_installs_them(run, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cratescope\[hub\]'"):
        evaluate(config_of(run, data, "lambada"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'cratescope\[eval\]'"):
        evaluate(config_of(run, data, tasks=("piqa",)))


def test_a_task_folder_that_is_not_there_is_refused(run, data, tmp_path):
    with pytest.raises(UserError, match="--task-folder .*no such folder"):
        evaluate(config_of(run, data, tasks=("x",), task_folder=tmp_path / "none"))


# lm-eval


def test_metrics_of_lm_eval_go_with_their_errors():
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,first": 3, "ppl_stderr,first": "N/A"}
    assert metrics(row) == {
        "acc": {"value": 0.5, "standard_error": 0.1},
        "ppl,first": {"value": 3.0, "standard_error": None},
    }


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
metadata: {{version: 3.0}}
{rest}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [bread, salt]
doc_to_target: 1
metric_list:
  - metric: acc
"""


needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="needs lm-eval: pip install 'cratescope[eval]'"
)


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["crate", "gpt2"])
def test_lm_eval_runs_local_tasks_and_agrees_with_us(runs_folder, data, tmp_path, family):
    run = Run(shutil.copytree(runs_folder / family, tmp_path / "run"))
    file = write_jsonl(tmp_path / "words.jsonl", [*WORDS, " ".join(WORDS * 3)])
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rest in (("rolling", ROLLING), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, rest=rest))
    found = evaluate(config_of(run, data, str(file), tasks=("rolling,choice",), task_folder=folder))
    rolling, choice = found["tasks"]["rolling"], found["tasks"]["choice"]
    ours = found["sets"][str(file)]["bits_per_byte"]
    assert rolling["results"]["rolling"]["bits_per_byte"]["value"] == pytest.approx(ours, rel=1e-5)
    assert rolling["task_versions"] == {"rolling": 3.0} and rolling["n_samples"] == {"rolling": 5}
    accuracy = choice["results"]["choice"]["acc"]
    assert 0 <= accuracy["value"] <= 1 and accuracy["standard_error"] is not None
    assert choice["lm_eval"].startswith("0.4.")
    before = run.evaluation.stat().st_mtime_ns
    evaluate(config_of(run, data, tasks=("choice",), task_folder=folder))
    assert run.evaluation.stat().st_mtime_ns == before


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("task", "message"), [("nosuch", "lm-eval has no such task"), ("lambada_openai", "its data cannot be read .*YAML")]
)
def test_tasks_that_cannot_be_run_are_refused_in_one_line(run, data, task, message):
    with pytest.raises(UserError, match=f"--tasks {task}: {message}") as refusal:
        evaluate(config_of(run, data, tasks=(task,)))
    assert "\n" not in str(refusal.value)

"""Losses are those of the model, errors are over documents, and results of one set survive those of another."""

from __future__ import annotations

import dataclasses
import gzip
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
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from cratescope import cli
from cratescope.errors import UserError
from cratescope.files import read_json
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import (
    contexts,
    crop_losses,
    evaluate,
    evaluate_split,
    evaluate_texts,
    mean_loss,
    measures,
    next_token_examples,
    ratio,
    token_bytes,
    unigram_entropy,
)
from cratescope.lm.harness import metrics
from cratescope.lm.head import Head, looks_ahead, plain_pass
from cratescope.models.folder import longest_context
from cratescope.run import Run
from cratescope.text import sets as documents
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare
from cratescope.text.shards import TokenData, TokenSplit
from tiny_models import tiny_config, tiny_model

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
    assert mean_loss(np.array([1.0, 2.0, 3.0])) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_loss(np.array([1.5])) == (1.5, None)


def test_the_unigram_entropy_is_that_of_a_coin():
    split = TokenSplit("x", (np.array([0, 1, 0, 1], dtype=np.uint16),))
    assert unigram_entropy(split, 2) == pytest.approx(math.log(2))


# Heads

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64}
GROUPS = SHAPE | {"num_key_value_heads": 2}
SHORT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
HEADS = {
    "gpt2": (lambda: GPT2Config(**SHORT), "product"),
    "openai-gpt": (lambda: OpenAIGPTConfig(**SHORT), "product"),
    "llama": (lambda: LlamaConfig(**GROUPS), "product"),
    "jamba": (lambda: JambaConfig(**GROUPS, **PERIODS, num_experts=2, mamba_d_state=4, mamba_dt_rank=4), "product"),
    "mamba": (lambda: MambaConfig(vocab_size=320, hidden_size=32, state_size=4, num_hidden_layers=2), "product"),
    "gemma2": (lambda: Gemma2Config(**GROUPS, head_dim=8, sliding_window=16), "own"),
    "recurrent_gemma": (
        lambda: RecurrentGemmaConfig(**GROUPS | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=16),
        "own",
    ),
    "cohere": (lambda: CohereConfig(**GROUPS, logit_scale=0.0625), "own"),
    "granite": (lambda: GraniteConfig(**GROUPS, logits_scaling=8.0), "own"),
    "phi": (lambda: PhiConfig(**SHAPE), "own"),
    "gptj": (lambda: GPTJConfig(**SHORT, rotary_dim=4), "own"),
}


def headed(config, times):
    """A model whose head has a bias, where it has one at all, and weights as large as asked."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(times)
        if head.bias is not None:
            head.bias.normal_(std=1e-3 * times)
    return model


def own_losses(model, crops):
    """Nats by the model's own logits."""
    tokens = torch.from_numpy(crops)
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).numpy()


@pytest.fixture
def crops():
    return np.random.default_rng(0).integers(0, 320, (4, 33))


@pytest.mark.parametrize("times", [1, 60])
@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_that_of_the_models_own_logits_whatever_its_head_does(kind, times, crops):
    config, way = HEADS[kind]
    model = headed(config(), times)
    assert Head.of(model, torch.from_numpy(crops[:1, :16])).way == way
    np.testing.assert_allclose(crop_losses(model, crops, 3).mean(1), own_losses(model, crops), rtol=3e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_the_loss_of_a_model_in_bfloat16_is_computed_in_float32(kind, crops):
    model = headed(HEADS[kind][0](), 60).bfloat16()
    found = crop_losses(model, crops, 3).mean(1)
    np.testing.assert_allclose(found, own_losses(model, crops), rtol=3e-3)
    assert any(value != float(torch.tensor(value).bfloat16()) for value in found)


@pytest.mark.parametrize("change", ["bias", "cap", "scale", "barred", "clamp"])
def test_a_change_of_the_logits_too_small_to_see_on_text_is_found(change, crops):
    model = headed(HEADS["llama"][0](), 1)
    head, plain = model.get_output_embeddings(), model.get_output_embeddings().forward
    bias = torch.zeros(320).index_fill(0, torch.tensor([7]), 1e-7)
    ways = {
        "bias": lambda logits: logits + bias,
        "cap": lambda logits: 1000 * torch.tanh(logits / 1000),
        "scale": lambda logits: logits * 1.0001,
        "barred": lambda logits: torch.where(torch.arange(320) == 319, -math.inf, logits),
        "clamp": lambda logits: logits.clamp(-50, 50),
    }
    head.forward = lambda states: ways[change](plain(states))
    assert Head.of(model, torch.from_numpy(crops[:1, :16])).way == "own"
    crops = crops % 319
    np.testing.assert_allclose(crop_losses(model, crops, 3).mean(1), own_losses(model, crops), rtol=3e-6)


def test_a_head_that_cannot_be_tried_apart_is_read_as_a_whole(crops, data):
    model = headed(HEADS["gemma2"][0](), 60)
    head = model.get_output_embeddings()
    plain = head.forward

    def by_place(states):
        logits = plain(states)
        return logits * (1 + torch.arange(logits.shape[1]) % 2)[None, :, None]

    head.forward = by_place
    assert Head.of(model, torch.from_numpy(crops[:1, :16])).way == "whole"
    np.testing.assert_allclose(crop_losses(model, crops, 3).mean(1), own_losses(model, crops), rtol=3e-6)
    words = evaluate_texts(model, data.tokenizer, WORDS, 4, 32, "x", last_word=True)["last_word"]
    assert 0 <= words["accuracy"] <= 1


def test_the_likeliest_token_is_that_of_the_models_own_logits(data):
    passages, model = lambada(data)
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(data.tokenizer)))
        model.lm_head.bias[data.tokenizer(" bowl", add_special_tokens=False).input_ids[1]] = 100.0
    found = evaluate_texts(model, data.tokenizer, passages, 4, 32, "lambada", last_word=True)["last_word"]
    assert found["accuracy"] == 0  # of both words the first token is not the biased one


def test_a_model_that_sees_what_it_is_to_predict_has_no_loss(crops):
    with pytest.raises(UserError, match="bert model .* sees the tokens that it is to predict"):
        crop_losses(headed(BertConfig(**SHAPE), 1), crops)


def test_a_hybrid_without_any_attention_is_read_without_a_cache(crops):
    config = tiny_config("granitemoehybrid")
    config.layer_types = ["linear_attention"] * 2
    model = headed(config, 1)
    logits = model(torch.from_numpy(crops), use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(crops)[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(crop_losses(model, crops, 3).mean(1), expected.detach(), rtol=3e-6)


@pytest.mark.parametrize("kind", ["bert", "dots3_note_text", "qwen3_moe"])
def test_one_trial_tells_models_that_look_ahead(kind, crops):
    model = headed(BertConfig(**SHAPE), 1) if kind == "bert" else tiny_model(kind)
    assert looks_ahead(model, torch.from_numpy(crops[:1, :16])) == (kind == "bert")


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xmod", "data2vec-text", "opt", "biogpt", "prophetnet"])
def test_a_model_reads_its_longest_context_and_no_more(kind):
    config = tiny_config(kind)
    config.pad_token_id = 1
    model = AutoModelForCausalLM.from_config(config).eval()
    longest = longest_context(config)
    assert plain_pass(model, torch.arange(longest)[None] + 2).logits.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        plain_pass(model, torch.arange(longest + 1)[None] + 2)


@pytest.mark.parametrize("kind", ["mamba", "jamba", "recurrent_gemma", "openai-gpt"])
def test_examples_of_models_with_a_cache_of_their_own_are_greedy(kind, data):
    model = headed(HEADS[kind][0](), 60)
    (example,) = next_token_examples(model, data.tokenizer, ("the cat",))
    ids = data.tokenizer("the cat", add_special_tokens=False).input_ids
    best = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert example["top"][0]["token"] == data.tokenizer.decode([best])
    assert example["continuation"].startswith(data.tokenizer.decode([best], skip_special_tokens=True)[:1])


# Bytes


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_the_bytes_of_the_tokens_of_a_text_are_the_bytes_of_the_text(data_folder, text):
    tokenizer = TokenData.open(data_folder).tokenizer
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
    found = list(contexts(7, tokens, 0, context, word))
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
    found = evaluate_texts(model, data.tokenizer, texts, 2, 32, "x")
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
    one, many = (evaluate_texts(model, data.tokenizer, WORDS, size, 32, "x") for size in (1, 50))
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
    found = evaluate_texts(model, data.tokenizer, passages, 4, 32, "lambada", last_word=True)["last_word"]
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
    assert lines == evaluate_texts(trained, data.tokenizer, passages, 8, 32, "x", last_word=True)
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
    split = TokenSplit("x", (np.array(row, dtype=np.uint16),))
    following = [a] * len(tokenizer)
    found = evaluate_split(planted_model(following, context=4), split, tokenizer, 3, 8, 4)
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
    found = evaluate_split(model, split, data.tokenizer, crops, 64, 32)
    assert found["n_bytes"] == pytest.approx(data.manifest["splits"]["heldout"]["bytes"] * 31 / 32, rel=0.05)
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


# Contexts


def with_model(run, config):
    """The run with another model in it, as if it had been trained elsewhere."""
    headed(config, 1).save_pretrained(run.model)
    (run.model / "whole.json").unlink()
    manifest = read_json(run.manifest)
    run.manifest.write_text(json.dumps(manifest | {"adopted": "somewhere/else", "family": config.model_type}))


def test_a_shorter_context_is_another_result_and_the_longest_one_is_none(run, data):
    first = evaluate(config_of(run, data))
    assert "context" not in first["settings"]
    before = run.evaluation.stat().st_mtime_ns
    assert evaluate(config_of(run, data, context=32)) == first
    assert run.evaluation.stat().st_mtime_ns == before
    short = evaluate(config_of(run, data, "heldout", context=16))
    assert (short["settings"]["context"], short["n_tokens"]) == (16, 6 * 15)
    assert short["sets"]["heldout"]["settings"]["context"] == 16
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    expected = crop_losses(model, data.split("validation").spaced(6, 16)).mean()
    assert short["loss"] == pytest.approx(expected, rel=1e-6)
    assert evaluate(config_of(run, data))["loss"] == first["loss"]


def test_a_context_that_the_model_does_not_read_is_refused(run, data):
    with pytest.raises(UserError, match="--context 33: has to be from 2 to the model's longest context, 32"):
        evaluate(config_of(run, data, context=33))


def test_a_model_of_a_very_long_context_is_read_in_shorter_crops(run, data):
    with_model(run, LlamaConfig(**GROUPS | {"max_position_embeddings": 131072}))
    tokens = data.split("validation").n_tokens
    with pytest.raises(UserError, match=f"room for 6 crops of 4096; .* a --context of at most {tokens // 6}, or"):
        evaluate(config_of(run, data))
    found = evaluate(config_of(run, data, context=24))
    assert (found["settings"]["context"], found["n_tokens"]) == (24, 6 * 23)


def test_a_model_that_states_no_longest_context_needs_one(run, data, tmp_path):
    with_model(run, MambaConfig(vocab_size=data.vocab_size, hidden_size=32, state_size=4, num_hidden_layers=2))
    with pytest.raises(UserError, match=r"its model \(mamba\) states no longest context; .* --context 1024"):
        evaluate(config_of(run, data))
    assert not run.evaluation.exists()
    file = write_jsonl(tmp_path / "words.jsonl", WORDS)
    found = evaluate(config_of(run, data, str(file), context=24))
    assert found["n_tokens"] == 6 * 23 and found["sets"][str(file)]["n_documents"] == 4
    assert all(example["continuation"] is not None for example in found["examples"])


def test_results_of_a_model_from_elsewhere_say_that_they_are_of_its_own_logits(run, data):
    with_model(run, Gemma2Config(**GROUPS | {"max_position_embeddings": 32}, head_dim=8, sliding_window=16))
    assert evaluate(config_of(run, data))["settings"]["logits"] == "own"


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


def test_what_is_left_out_or_no_text_is_said_and_null_rows_are_no_documents(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": "caf\xe9"}\n')
    (tmp_path / "b.pdf").touch()
    assert documents.read("here", documents.find_set(str(tmp_path)), 9) == ["caf?"]
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: b.pdf (unknown kind)" in said and "1 documents had invalid UTF-8" in said


def test_a_packed_local_copy_of_a_hub_set_may_have_null_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    packed = gzip.compress(b'{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    name = f"openwebtext={tmp_path / 'a.jsonl.gz'}"
    assert documents.read(name, documents.find_set(name), 9) == ["one", "two"]

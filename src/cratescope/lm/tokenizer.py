"""Tokenizers: the packaged GPT-2 BPE, a byte-level BPE trained on the spot, or any Hugging Face tokenizer.

All are `PreTrainedTokenizerFast`; text goes through them byte for byte (decoding what was encoded gives it back).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cratescope.lm.offline import gpt2_files
from cratescope.run import UserError, check_whole, first_line

EOS = "<|endoftext|>"
"""Begins and ends every document; also the padding token."""


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """`gpt2` (packaged; ids equal OpenAI's), a tokenizer folder, or a hub name.

    Raises:
        UserError: nothing of that name, no fast tokenizer, or no end-of-text token to separate documents with.
    """
    if str(spec) == "gpt2":
        vocabulary, merges = gpt2_files()
        return _wrap(_byte_level(models.BPE(vocab=vocabulary, merges=merges)))
    if vocabulary_size(str(spec)) is not None:
        raise UserError(f"tokenizer {spec}: has to be trained first; give it to `cratescope prepare --tokenizer`")
    if Path(spec).is_absolute() and not Path(spec).is_dir():
        raise UserError(f"tokenizer {spec}: no such folder; use `gpt2`, `bpe:N`, or a folder with tokenizer.json")
    if Path(spec).is_dir():
        check_whole(Path(spec), weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(spec), trust_remote_code=False)
    except Exception as error:  # what the library raises on damaged files depends on their bytes
        reason = first_line(error)
        raise UserError(
            f"tokenizer {spec}: cannot be loaded ({reason}); use `gpt2`, `bpe:N`, or a folder with tokenizer.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {spec}: is not a fast tokenizer; convert it to tokenizer.json, or use `gpt2`")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {spec}: has no end-of-text token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(spec: str) -> int | None:
    """N of the tokenizer spec `bpe:N`; None for any other spec.

    Raises:
        UserError: N is no number, or leaves no room for the 256 bytes and the end-of-text token.
    """
    if not spec.startswith("bpe:"):
        return None
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if not match or int(match[1]) < 257:
        raise UserError(f"tokenizer {spec}: N of bpe:N is a number of 257 or more (256 bytes and {EOS}), e.g. bpe:4096")
    return int(match[1])


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries in all; <|endoftext|> has id 0.

    A text too small for that many merges gives fewer entries.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterable[list[int]]:
    """Ids of each text, on all cores, without added tokens; a special token's name in a text is ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def token_strings(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """One display string a token: bytes that are no text of their own become U+FFFD, special tokens stay as they are.

    Ids past the vocabulary (a model's padding rows) become the empty string.
    """
    size = len(tokenizer)
    return [str(tokenizer.decode([index])) if index < size else "" for index in map(int, ids)]


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )

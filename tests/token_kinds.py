"""Small tokenizers of every common kind, trained on plain sentences."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import sentences

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [sentences(12, number).lower() for number in range(40)]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def sentencepiece(prepend: bool = True, strip: bool = True) -> PreTrainedTokenizerFast:
    """A BPE of whole texts with marks for spaces and tokens for bytes, as of Llama 2 (or, without both, Gemma)."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marked = [normalizers.Prepend(MARK)] if prepend else []
    trained.normalizer = normalizers.Sequence([*marked, normalizers.Replace(" ", MARK)])
    trained.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *BYTES], show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    state = json.loads(trained.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return wrapped(backend)


def trained_on_words(
    model: models.Model,
    trainer: type,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder | None,
    normalizer: normalizers.Normalizer | None = None,
    **options: object,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    options = {"vocab_size": 160, "special_tokens": ["<unk>", "</s>"], "show_progress": False} | options
    backend.train_from_iterator(TEXTS, trainer(**options))
    return wrapped(backend)


def metaspace(scheme: str, unigram: bool = False) -> PreTrainedTokenizerFast:
    before, after = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)
    if unigram:
        return trained_on_words(models.Unigram(), trainers.UnigramTrainer, before, after, unk_token="<unk>")
    return trained_on_words(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, before, after)


def wordpiece(decoder: decoders.Decoder | None = None) -> PreTrainedTokenizerFast:
    """As of BERT: lower case, `##` before what goes on, every sign by itself, no spaces."""
    model, before = models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer()
    normalizer = normalizers.BertNormalizer(lowercase=True)
    return trained_on_words(model, trainers.WordPieceTrainer, before, decoder, normalizer)


def byte_level(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    before, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 320, "initial_alphabet": alphabet}
    return trained_on_words(models.BPE(), trainers.BpeTrainer, before, decoder, **options)


def word_ends() -> PreTrainedTokenizerFast:
    """A BPE that marks the ends of words, as of the first GPT."""
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    before, after = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")
    return trained_on_words(model, trainers.BpeTrainer, before, after, end_of_word_suffix="</w>")


def words(cut: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """Whole words, and no decoder: pieces are put together with spaces."""
    model = models.WordLevel(unk_token="<unk>")
    return trained_on_words(model, trainers.WordLevelTrainer, cut, None)


def characters(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    cut = pre_tokenizers.Split("", "isolated")
    return trained_on_words(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, cut, decoder)


KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    # What the texts of the tokens of {} together are.
    "SentencePiece that strips": (sentencepiece, " {}"),
    "SentencePiece that does not strip": (lambda: sentencepiece(strip=False), " {}"),
    "SentencePiece that puts nothing before": (lambda: sentencepiece(prepend=False, strip=False), "{}"),
    "Metaspace always": (lambda: metaspace("always"), " {}"),
    "Metaspace first": (lambda: metaspace("first"), " {}"),
    "Metaspace never": (lambda: metaspace("never"), "{}"),
    "Unigram always": (lambda: metaspace("always", unigram=True), " {}"),
    "Unigram never": (lambda: metaspace("never", unigram=True), "{}"),
    "WordPiece that cleans up": (lambda: wordpiece(decoders.WordPiece(cleanup=True)), " {}"),
    "WordPiece that does not clean up": (lambda: wordpiece(decoders.WordPiece(cleanup=False)), " {}"),
    "WordPiece without a decoder": (wordpiece, " {}"),
    "bytes": (lambda: byte_level(decoders.ByteLevel()), "{}"),
    "bytes without a decoder": (lambda: byte_level(None), "{}"),
    "ends of words": (word_ends, "{} "),
    "words": (lambda: words(pre_tokenizers.Whitespace()), " {}"),
    "words with their signs": (lambda: words(pre_tokenizers.WhitespaceSplit()), " {}"),
    "characters": (lambda: characters(decoders.Fuse()), "{}"),
    "characters without a decoder": (lambda: characters(None), "{}"),
}
LOSSLESS = ("SentencePiece that strips", "SentencePiece that puts nothing before", "bytes", "bytes without a decoder")

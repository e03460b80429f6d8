"""Tokenizers: the packaged GPT-2 BPE, a byte-level BPE trained on the spot, or any Hugging Face tokenizer.

All are `PreTrainedTokenizerFast`. Text goes through the first two byte for byte: decoding what was encoded gives it
back. Others may normalise it, or keep no spaces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError, as_user_error
from cratescope.files import check_whole, read_json
from cratescope.text.offline import gpt2_files
from cratescope.zoo import ZOO, instead, packaged

EOS = "<|endoftext|>"
"""Begins and ends every document; also the padding token."""
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
LARGEST_BPE = 1_000_000
"""Entries of the largest `bpe:N`, a few times those of any tokenizer in use: room for N is taken at the start."""


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """`gpt2` (packaged; ids equal OpenAI's), `zoo/NAME` (a packaged model's), a tokenizer folder, or a hub name.

    Raises:
        UserError: no such tokenizer, not a fast one, or one without an end-of-text token to separate documents.
    """
    if str(spec) == "gpt2":
        vocabulary, merges = gpt2_files()
        return _wrap(_byte_level(models.BPE(vocab=vocabulary, merges=merges)))
    if entry := packaged(spec):
        spec = entry / "model"
    elif Path(spec).parent == Path(ZOO.name) and not Path(spec).is_dir():
        raise UserError(f"tokenizer {spec}: {instead(Path(spec))}")
    if vocabulary_size(str(spec)) is not None:
        raise UserError(f"tokenizer {spec}: has to be trained first; give it to `cratescope prepare --tokenizer`")
    if Path(spec).is_absolute() and not Path(spec).is_dir():
        raise UserError(f"tokenizer {spec}: no such folder; use `gpt2`, `bpe:N`, or a folder with tokenizer.json")
    if Path(spec).is_dir():
        check_whole(Path(spec), weights=False)
    fix = "use `gpt2`, `bpe:N`, or a folder with tokenizer.json"
    with as_user_error(f"tokenizer {spec}: cannot be loaded", fix):
        tokenizer: Any = (
            PreTrainedTokenizerFast.from_pretrained(str(spec), trust_remote_code=False)
            if _is_plain(Path(spec))
            else named_tokenizer(str(spec))
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {spec}: is not a fast tokenizer; convert it to tokenizer.json, or use `gpt2`")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {spec}: has no end-of-text token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def named_tokenizer(source: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub name, of the class that it names where tokenizer.json is of that class's kind.

    The library makes the class's own kind of model out of any tokenizer.json: of a BPE a SentencePiece, which fails, or
    a WordPiece, which gives other tokens. Then tokenizer.json is taken as it is. Raises whatever the library raises.
    """
    from transformers import AutoTokenizer  # knows every model, and takes seconds to import

    plain = functools.partial(PreTrainedTokenizerFast.from_pretrained, source, **options)
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception:  # a class may fail in any way on what is not its own
        if _file_of(source) is None:
            raise
        return plain()
    if type(found) is PreTrainedTokenizerFast or not isinstance(found, PreTrainedTokenizerFast):
        return found
    path = _file_of(source)
    return found if path is None or _same_kind(found.backend_tokenizer, Tokenizer.from_file(path)) else plain()


def _file_of(source: str) -> str | None:
    """Path of tokenizer.json on this disk, also of one fetched before; None if there is none."""
    from transformers.utils.hub import cached_file

    try:
        return cached_file(source, "tokenizer.json", local_files_only=True)
    except (OSError, ValueError):
        return None


def _same_kind(made: Tokenizer, stated: Tokenizer) -> bool:
    """Whether `made` has the kind of model that tokenizer.json states, with the same unknown token."""
    unknown = [getattr(one.model, "unk_token", None) for one in (made, stated)]
    if type(made.model) is not type(stated.model):
        return False
    return unknown[0] in (None, unknown[1]) or unknown[0] in made.get_vocab(with_added_tokens=False)


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would choose PreTrainedTokenizerFast, as for our own models; found without torch."""
    kinds = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}
    paths = {key: folder / name for name, key in kinds.items()}
    found = {key: read_json(path).get(key) for key, path in paths.items() if path.is_file()}
    ours = found.get("model_type") in (None, "crate", "gpt2")
    return ours and found.get("tokenizer_class") == PreTrainedTokenizerFast.__name__


def vocabulary_size(spec: str) -> int | None:
    """N of the tokenizer spec `bpe:N`, None for another spec. UserError: N is no number from 257 to LARGEST_BPE."""
    if not spec.startswith("bpe:"):
        return None
    match = re.fullmatch(r"bpe:0*([0-9]{1,9})", spec)
    if not match or not 257 <= int(match[1]) <= LARGEST_BPE:
        raise UserError(
            f"tokenizer {spec[:40]}: N of bpe:N is a number from 257 (256 bytes and {EOS}) to {LARGEST_BPE:,}, "
            "e.g. bpe:4096"
        )
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
    """Encode each text on all cores, adding no tokens; a special token's name in a text is ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def n_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id + 1; `len(tokenizer)` counts the entries, which are fewer where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def n_text_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id + 1 among tokens in encoded documents: no special ones except <eos> and unknown."""
    in_text = {tokenizer.eos_token_id, tokenizer.unk_token_id}
    never = _special_ids(tokenizer) - in_text
    return max(index for index in tokenizer.get_vocab().values() if index not in never) + 1


def vocabulary_strings(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """`token_strings` of every id up to the highest, computed once per tokenizer."""
    return _strings(tokenizer, len(tokenizer))


def token_strings(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands in running text, with the space before a word that begins there.

    Bytes that are not text by themselves become U+FFFD, special tokens their names. Ids that the tokenizer does not
    have (a model's padding rows) become the empty string.
    """
    known = vocabulary_strings(tokenizer)
    return [known[index] if 0 <= index < len(known) else "" for index in map(int, ids)]


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, " v"]:
    """Number of bytes of running text per token id; special tokens stand for none."""
    strings = vocabulary_strings(tokenizer)
    lengths = np.array([len(text.encode()) for text in strings])
    for piece, index in tokenizer.get_vocab().items():
        if _UNREADABLE in strings[index] and _UNREADABLE not in piece:
            # Part of a character: a byte by its name, or a byte-level piece, which has a letter for every byte.
            lengths[index] = 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece)
    lengths[list(_special_ids(tokenizer))] = 0
    return lengths


def bytes_put_before(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of bytes by which tokens exceed their text: the space that many tokenizers put before it."""
    lengths, strings = token_bytes(tokenizer), vocabulary_strings(tokenizer)
    words = [word for text in strings if (word := text.strip(" ")).isascii() and word.isalpha()][:100]
    found = zip(words, encode(tokenizer, words), strict=True)
    more = [int(lengths[ids].sum()) - len(word) for word, ids in found if ids and lengths[ids].all()]
    return max(0, min(more, default=0))


@functools.lru_cache(maxsize=4)
def _strings(tokenizer: PreTrainedTokenizerFast, _size: int) -> tuple[str, ...]:
    """The text of every id, empty where there is none; `_size` detects a tokenizer that has been extended."""
    # The library's own order differs between processes.
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    added, special = tokenizer.get_added_vocab(), _special_ids(tokenizer)
    spell = _speller(tokenizer, vocabulary)
    anchor = _anchor(spell, [piece for piece, index in vocabulary.items() if index not in special])
    strings = [""] * (max(vocabulary.values()) + 1)
    for (piece, index), text in zip(vocabulary.items(), _running(spell, anchor, vocabulary), strict=True):
        # A byte-level decoder takes the letters of an added token for bytes.
        as_it_is = index in special or (piece in added and _UNREADABLE in text)
        strings[index] = piece if as_it_is else text
    spaced = {piece: index for piece, index in vocabulary.items() if strings[index] == f" {piece}"}
    for piece in _needless_spaces(tokenizer, anchor, spaced):
        strings[vocabulary[piece]] = piece
    return tuple(strings)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _speller(tokenizer: PreTrainedTokenizerFast, pieces: Iterable[str]) -> Callable[[list[str]], str]:
    """The decoder that joins pieces; for a tokenizer without one, the decoder that matches its other parts."""
    backend = tokenizer.backend_tokenizer
    if backend.decoder is not None:
        return backend.decoder.decode
    before = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if prefix := getattr(backend.model, "continuing_subword_prefix", None):
        return decoders.WordPiece(prefix).decode
    if suffix := getattr(backend.model, "end_of_word_suffix", None):
        return decoders.BPEDecoder(suffix).decode
    if b'"ByteLevel"' in before:
        return decoders.ByteLevel().decode
    if any(piece.startswith("\u2581") for piece in pieces):
        return decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]).decode
    return "".join if not before or any(" " in piece for piece in pieces) else " ".join


def _anchor(spell: Callable[[list[str]], str], pieces: Sequence[str]) -> str:
    """A piece that does not change next to others, if possible a word of letters without a space; else empty."""

    def faults(piece: str) -> tuple[bool, ...]:
        once, twice = spell([piece]), spell([piece, piece])
        word = once.strip(" ")
        return not once, not twice.startswith(once), not (word.isascii() and word.isalpha()), twice != once * 2

    likely = sorted(pieces, key=lambda piece: (not piece.isascii(), len(piece)))[:1000]
    best = min(likely, key=faults, default="")
    return best if spell([best]) else ""


def _running(spell: Callable[[list[str]], str], anchor: str, pieces: Iterable[str]) -> Iterator[str]:
    """The text each piece adds between two anchors, since decoders strip and clean up at the ends of a text."""
    before = [anchor] if anchor else []
    left, both = spell(before), spell(before * 2)
    right = both[len(left) :]
    for piece in pieces:
        text = spell([*before, piece, *before])
        if len(text) >= len(both) and text.startswith(left) and text.endswith(right):
            yield text[len(left) : len(text) - len(right)]
        else:
            text = spell([*before, piece])
            yield text[len(left) :] if text.startswith(left) else spell([piece])


def _needless_spaces(tokenizer: PreTrainedTokenizerFast, anchor: str, spaced: dict[str, int]) -> list[str]:
    """Pieces that the tokenizer also finds right after a word without a space: punctuation, Chinese characters.

    Its decoder puts a space before them, as before words, but running text usually has none there.
    """
    pieces = list(spaced)
    found = encode(tokenizer, [anchor + piece for piece in pieces]) if pieces else []
    together = [tokenizer.convert_tokens_to_ids(anchor)]
    return [piece for piece, ids in zip(pieces, found, strict=True) if ids == [*together, spaced[piece]]]


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )

"""Loss, perplexity and bits per byte with standard errors over documents, on the run's own splits and on other text.

Letters: of document d, x_d is the sum of its losses (nats), t_d the number of its predicted tokens, b_d that of their
bytes. Loss is sum x / sum t, bits per byte sum x / (ln 2 sum b). Tokens of a document are not independent, so D
documents are the unit of every standard error; that of a ratio R = sum x / sum y is its linearisation (delta method)

    se(R) = sqrt(D / (D - 1) sum_d (x_d - R y_d)^2) / sum y

and se(exp(loss)) = exp(loss) se(loss).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cratescope.config import EvaluateConfig
from cratescope.hardware import pick_device
from cratescope.lm import harness
from cratescope.lm.data import TokenData, TokenSplit
from cratescope.lm.loss import token_losses
from cratescope.lm.texts import HubSet, find_set, identity, read
from cratescope.lm.tokenizer import encode, load_tokenizer
from cratescope.models.convert import load_folder
from cratescope.run import Run, Shape, UserError, locked, read_json, sha256, versions, write_json

# The prompts of paper section 7 (next-token examples and steering).
PROMPTS = ("They saw some boats on the", "Beijing is the capital of", "1 2 3 4 5")
SPLITS = ("validation", "heldout")
SCANNED = 1 << 20
"""Tokens of a split looked at in one go."""
_progress = partial(track, console=Console(stderr=True), transient=True)


@dataclass(frozen=True)
class Loss:
    """Mean next-token cross-entropy in nats and its standard error over crops."""

    mean: float
    standard_error: float | None
    n_tokens: int


@torch.no_grad()
def _predict(
    model: Any, tokens: Int[torch.Tensor, "b t"], labels: Int[torch.Tensor, "b t"]
) -> tuple[Float[torch.Tensor, "b t d"], Float[torch.Tensor, "b t"]]:
    """The last hidden states, and the loss (nats) of every label given the tokens of its row up to its place."""
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    losses = token_losses(hidden.flatten(0, 1), model.get_output_embeddings().weight, labels.flatten())
    return hidden, losses.view(labels.shape)


def _crop_token_losses(
    model: PreTrainedModel, crops: Int[np.ndarray, "n t"], batch_size: int, label: str | None = None
) -> Float[np.ndarray, "n t-1"]:
    was_training = model.training
    model.eval()
    starts = range(0, len(crops), batch_size)
    losses = []
    for start in _progress(starts, label) if label else starts:
        tokens = torch.from_numpy(crops[start : start + batch_size]).to(model.device)
        losses.append(_predict(model, tokens[:, :-1], tokens[:, 1:])[1].double().cpu().numpy())
    model.train(was_training)
    return np.concatenate(losses)


def crop_losses(
    model: PreTrainedModel, crops: Int[np.ndarray, "n t"], batch_size: int = 8, label: str | None = None
) -> Float[np.ndarray, " n"]:
    """Mean next-token cross-entropy (nats) of each crop; `label` shows a progress bar."""
    return _crop_token_losses(model, crops, batch_size, label).mean(1)


def mean_loss(losses: Float[np.ndarray, " n"], context: int) -> Loss:
    """Crops are the unit of this standard error, which is for the loss curves: they know of no documents."""
    error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return Loss(float(losses.mean()), error, len(losses) * (context - 1))


def ratio(x: Float[np.ndarray, " d"], y: Float[np.ndarray, " d"]) -> tuple[float, float | None]:
    """sum x / sum y over documents, and its standard error (see above); None for a single document."""
    value = float(x.sum() / y.sum())
    if len(x) < 2:
        return value, None
    squares = float(((x - value * y) ** 2).sum())
    return value, math.sqrt(len(x) / (len(x) - 1) * squares) / float(y.sum())


def measures(
    nats: Float[np.ndarray, " d"], tokens: Float[np.ndarray, " d"], n_bytes: Float[np.ndarray, " d"], where: str
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte from sums over each document, with standard errors over documents.

    Raises:
        UserError: a loss is not a number, or there are not two tokens or not a byte.
    """
    if tokens.sum() < 2 or not n_bytes.sum():
        raise UserError(f"{where}: has fewer than 2 tokens of text; give more")
    if not np.isfinite(nats).all():
        raise UserError(f"{where}: the model's loss is not a number; train again with a lower learning rate")
    loss, error = ratio(nats, tokens)
    bits, bits_error = ratio(nats / math.log(2), n_bytes)
    return {
        "n_documents": len(tokens),
        "n_tokens": int(tokens.sum()),
        "n_bytes": int(n_bytes.sum()),
        "loss": loss,
        "standard_error": error,
        **_perplexity(loss, error),
        "bits_per_byte": bits,
        "bits_per_byte_standard_error": bits_error,
    }


def _perplexity(mean: float, error: float | None) -> dict[str, float | None]:
    value = math.exp(mean) if mean < 700 else None  # beyond that it is no number of 64 bits
    return {
        "perplexity": value,
        "perplexity_standard_error": None if value is None or error is None else value * error,
    }


def evaluate_split(
    model: PreTrainedModel, split: TokenSplit, tokenizer: PreTrainedTokenizerFast, crops: int, batch_size: int
) -> dict[str, Any]:
    """Read `crops` crops of the model's context, evenly spaced; their documents are told apart by <eos>.

    A document's tokens in several crops count as one document's, and its <eos>, which has no bytes, is its last one.
    """
    context = model.config.max_position_embeddings
    tokens = split.spaced(crops, context)
    starts = np.arange(crops) * split.n_tokens // crops  # where `spaced` takes them
    losses = _crop_token_losses(model, tokens, batch_size, f"evaluate {split.name}")
    ends = _document_ends(split, tokenizer.eos_token_id)
    numbers = np.searchsorted(ends, starts[:, None] + np.arange(1, context))
    _, document = np.unique(numbers, return_inverse=True)
    document = document.ravel()
    n_bytes = token_bytes(tokenizer)[tokens[:, 1:]]
    nats, n_tokens, n_bytes = (np.bincount(document, part.ravel()) for part in (losses, np.ones_like(losses), n_bytes))
    return measures(nats, n_tokens, n_bytes, f"split {split.name}")


def _scan(split: TokenSplit) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
    for start in range(0, split.n_tokens, SCANNED):
        yield start, split.window(start, min(SCANNED, split.n_tokens - start))


def _document_ends(split: TokenSplit, eos: int) -> Int[np.ndarray, " n"]:
    """Position of every <eos>."""
    return np.concatenate([start + np.flatnonzero(tokens == eos) for start, tokens in _scan(split)])


def unigram_entropy(split: TokenSplit, vocab_size: int) -> float:
    """Entropy (nats) of the split's own token frequencies: the loss of the best predictor that knows no context."""
    counts = sum((np.bincount(tokens, minlength=vocab_size) for _, tokens in _scan(split)), np.zeros(vocab_size))
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Int[np.ndarray, " v"]:
    """How many bytes of text every token stands for; special tokens stand for none.

    A byte-level piece has a letter for every byte; other tokenizers write a space as U+2581 and a byte as `<0x0A>`.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    byte_level = "Ġ" in vocabulary
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for piece, index in vocabulary.items():
        if byte_level and piece not in added:
            lengths[index] = len(piece)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            lengths[index] = 1
        else:
            lengths[index] = len(piece.replace("\u2581", " ").encode())
    lengths[tokenizer.all_special_ids] = 0
    return lengths


@dataclass(frozen=True)
class Window:
    """Tokens of a document that fit the model; the last `scored` count, the last `word` are its last word."""

    document: int
    tokens: Int[np.ndarray, " t"]
    scored: int
    word: int


def windows(document: int, tokens: Int[np.ndarray, " n"], eos: int, context: int, word: int = 0) -> Iterator[Window]:
    """Cut a document so that each of its tokens is predicted once, from <eos> and up to `context` tokens before it.

    The last window reaches back to have a full context, as those of lm-eval's rolling log-likelihood do.
    """
    row = np.concatenate([[eos], tokens])
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        yield Window(document, row[max(0, end - context) : end + 1], end - start, word if end == len(tokens) else 0)


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    batch_size: int,
    name: str,
    last_word: bool = False,
) -> dict[str, Any]:
    """Predict every token of every text, behind an <eos>; `last_word`: say also how well the last words went.

    A batch holds at most as many tokens as `batch_size` full contexts.
    """
    context, eos = model.config.max_position_embeddings, tokenizer.eos_token_id
    ids = _encode(tokenizer, texts)
    words = _last_word_lengths(tokenizer, texts, ids) if last_word else [0] * len(ids)
    rows = [
        row
        for n, (tokens, word) in enumerate(zip(ids, words, strict=True))
        for row in windows(n, tokens, eos, context, word)
    ]
    nats, word_nats, right = np.zeros(len(ids)), np.zeros(len(ids)), np.zeros(len(ids))
    for batch in _progress(list(_batches(rows, batch_size * context)), f"evaluate {name}"):
        for row, (loss, word_loss, correct) in zip(batch, _predict_windows(model, batch, eos), strict=True):
            nats[row.document] += loss
            word_nats[row.document] += word_loss
            right[row.document] += correct
    n_tokens = np.array([len(tokens) for tokens in ids], dtype=float)
    n_bytes = np.array([len(text.encode()) for text in texts], dtype=float)
    found = measures(nats, n_tokens, n_bytes, f"--on {name}")
    return found | ({"last_word": _last_word_measures(word_nats, right)} if last_word else {})


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], batch: int = 256) -> list[np.ndarray]:
    starts = range(0, len(texts), batch)
    return [np.array(ids, np.int64) for start in starts for ids in encode(tokenizer, texts[start : start + batch])]


def _last_word_lengths(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], ids: Sequence[np.ndarray]
) -> list[int]:
    """Tokens that the last word adds to the text before it, its space among them."""
    before = _encode(tokenizer, [text[: -len(text.split()[-1])].rstrip() for text in texts])
    return [max(1, len(tokens) - len(rest)) for tokens, rest in zip(ids, before, strict=True)]


def _batches(rows: Sequence[Window], budget: int) -> Iterator[list[Window]]:
    """Windows of like length together, longest first, with at most `budget` tokens (padding included) a batch."""
    batch: list[Window] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * (len(batch[0].tokens) - 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    yield batch


@torch.no_grad()
def _predict_windows(model: Any, batch: Sequence[Window], eos: int) -> Iterator[tuple[float, float, bool]]:
    """For each window: nats of what is scored, nats of the last word, and whether all of that is the likeliest."""
    # Padding on the right changes nothing before it: the models are causal.
    padded = np.full((len(batch), len(batch[0].tokens)), eos)
    for line, row in zip(padded, batch, strict=True):
        line[: len(row.tokens)] = row.tokens
    tokens = torch.from_numpy(padded).to(model.device)
    hidden, losses = _predict(model, tokens[:, :-1], tokens[:, 1:])
    for row, states, nats, labels in zip(batch, hidden, losses.double(), tokens[:, 1:], strict=True):
        end = len(row.tokens) - 1
        scored, word = slice(end - row.scored, end), slice(end - row.word, end)
        likeliest = (states[word] @ model.get_output_embeddings().weight.t()).argmax(-1)
        right = row.word > 0 and bool((likeliest == labels[word]).all())
        yield nats[scored].sum().item(), nats[word].sum().item(), right


def _last_word_measures(nats: Float[np.ndarray, " d"], right: Float[np.ndarray, " d"]) -> dict[str, float | None]:
    """Accuracy: all tokens of the word are the likeliest. Perplexity: exp of the mean nats a word, not a token."""
    accuracy, accuracy_error = ratio(right, np.ones_like(right))
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": accuracy_error,
        **_perplexity(*ratio(nats, np.ones_like(nats))),
    }


@torch.no_grad()
def next_token_examples(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...] = PROMPTS, top: int = 5
) -> list[dict[str, Any]]:
    """For each prompt that fits the context: the `top` likeliest next tokens and a greedy continuation."""
    examples = []
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
        room = model.config.max_position_embeddings - len(ids)
        if room < 1:
            continue
        tokens = torch.tensor([ids], device=model.device)
        logits = model(tokens, use_cache=False).logits[0, -1, : len(tokenizer)].float()
        best = logits.topk(top)
        rows = zip(best.indices.tolist(), best.values.tolist(), logits.softmax(-1)[best.indices].tolist(), strict=True)
        continued = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(room, 12),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        examples.append(
            {
                "prompt": prompt,
                "top": [{"token": tokenizer.decode([i]), "probability": p, "logit": logit} for i, logit, p in rows],
                "continuation": tokenizer.decode(continued[0, len(ids) :], skip_special_tokens=True),
            }
        )
    return examples


def data_of(run: Run, data_path: Path | None) -> TokenData:
    """The data given, or the data the run was trained on; its vocabulary must be the model's."""
    manifest = run.read_manifest()
    data = TokenData.open(data_path or run.root / manifest["data"]["path"])
    if data.vocab_size != manifest["vocab_size"]:
        raise UserError(
            f"{data.path} has a vocabulary of {data.vocab_size}, {run.root} one of {manifest['vocab_size']}; "
            "give the data the run was trained on"
        )
    return data


def load_model(run: Run, device: str) -> PreTrainedModel:
    """The run's trained model, for reading."""
    model: Any = load_folder(run.trained_model())  # Any: the library's own annotation of `to` takes no device
    return model.to(pick_device(device)).eval()


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Bring a run's evaluation.json up to date with what is asked for, and return it; what is done stays.

    The validation split is always read. Its results stand at the top level, those of other sets in `sets` and those of
    lm-eval in `tasks`, by the names they were asked for. Results of other weights are dropped.

    Raises:
        UserError: no run, no data, a split is shorter than asked, or a set or task is unknown or cannot be read.
    """
    run = Run(config.run)
    data = data_of(run, config.data)
    # Two at once would each write a file without the other's results.
    with locked(run.root, "evaluate"):
        return _evaluate(config, run, data)


def _evaluate(config: EvaluateConfig, run: Run, data: TokenData) -> dict[str, Any]:
    weights = run.fingerprint()
    tokenizer = load_tokenizer(run.model.resolve())
    sets, tasks = _found(run.evaluation, weights)
    wanted = {name: _settings(config, data, weights, name) for name in ("validation", *config.on)}
    task_settings = {"model_sha256": weights, "task_folder_sha256": harness.identity(config.task_folder)}
    new_tasks = [name for name in config.task_names() if tasks.get(name, {}).get("settings") != task_settings]
    manager = harness.open_tasks(new_tasks, config.task_folder) if new_tasks else None
    open_model = cache(partial(load_model, run, config.device))
    for name, settings in wanted.items():
        if sets.get(name, {}).get("settings") != settings:
            sets[name] = {"settings": settings} | _evaluate_set(config, data, open_model(), tokenizer, name)
            _write(run.evaluation, sets, tasks)
    if new_tasks:
        results = harness.run_tasks(manager, new_tasks, open_model(), tokenizer, config.batch_size)
        for name, result in results:
            tasks[name] = {"settings": task_settings} | result
            _write(run.evaluation, sets, tasks)
    return read_json(run.evaluation)


def _found(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results by set and by task as far as they are of the same weights."""
    results: Shape = {str: {"settings?": {}}}
    shape = {"settings?": {}, "sets?": results, "tasks?": results}
    found = read_json(path, shape, "`cratescope evaluate`") if path.exists() else {}
    others, tasks = found.pop("sets", {}), found.pop("tasks", {})
    sets = {"validation": found, **others}
    ours = [
        {name: result for name, result in results.items() if result.get("settings", {}).get("model_sha256") == weights}
        for results in (sets, tasks)
    ]
    return ours[0], ours[1]


def _write(path: Path, sets: dict[str, Any], tasks: dict[str, Any]) -> None:
    others = {name: result for name, result in sets.items() if name != "validation"}
    write_json(path, sets["validation"] | {"sets": others, "tasks": tasks})


def _settings(config: EvaluateConfig, data: TokenData, weights: str, name: str) -> dict[str, Any]:
    """What the result on a set depends on."""
    if name in SPLITS:
        of_set = {"crops": config.crops, "data_sha256": sha256(data.path / "manifest.json")}
    else:
        of_set = {"max_documents": config.max_documents, **identity(find_set(name))}
    return {"on": name, "model_sha256": weights} | of_set


def _evaluate_set(
    config: EvaluateConfig, data: TokenData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str
) -> dict[str, Any]:
    if name not in SPLITS:
        found = find_set(name)
        texts = read(name, found, config.max_documents)
        last_word = isinstance(found, HubSet) and found.last_word
        return evaluate_texts(model, tokenizer, texts, config.batch_size, name, last_word)
    split = data.split(name)
    return {
        "split": name,
        "crops": config.crops,
        **evaluate_split(model, split, data.tokenizer, config.crops, config.batch_size),
        "unigram_entropy": unigram_entropy(split, data.vocab_size),
        "examples": next_token_examples(model, data.tokenizer),
        "versions": versions(),
    }

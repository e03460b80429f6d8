"""Loss, perplexity and bits per byte with standard errors over documents, on the run's own splits and on other text.

Letters: of document d, x_d is the sum of its losses (nats), t_d the number of its predicted tokens, b_d that of their
bytes. Loss is sum x / sum t, bits per byte sum x / (ln 2 sum b). Tokens of a document are not independent, so the D
documents are the unit of every standard error; that of a ratio R = sum x / sum y is its linearisation (delta method)

    se(R) = sqrt(D / (D - 1) sum_d (x_d - R y_d)^2) / sum y

and se(exp(loss)) = exp(loss) se(loss).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.files import Shape, read_json, sha256, write_json
from cratescope.lm import harness
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.head import Head, plain_pass
from cratescope.lm.load import data_of, load_model
from cratescope.locks import locked
from cratescope.models.folder import longest_context, model_config
from cratescope.models.modeling_crate import ISTA
from cratescope.progress import progress
from cratescope.run import Run, versions
from cratescope.text.sets import HubSet, find_set, identity, read
from cratescope.text.shards import TokenData, TokenSplit
from cratescope.text.tokenizer import bytes_put_before, encode, load_tokenizer, n_ids, token_bytes, token_strings

# The prompts of paper section 7 (next-token examples and steering).
PROMPTS = ("They saw some boats on the", "Beijing is the capital of", "1 2 3 4 5")
SPLITS = ("validation", "heldout")
SCANNED = 1 << 20
"""Tokens of a split looked at in one go."""
TRIED = 16
"""Tokens of the text that the model's head is tried on."""
EXPLAINED = 32
"""Crops on which codes are compared with what they encode."""
DEFAULT_LONGEST = 4096
"""Tokens in a crop of a model that reads more, unless it is said otherwise."""


def crop_losses(
    model: PreTrainedModel,
    crops: Int[np.ndarray, "n t"],
    batch_size: int = 8,
    label: str | None = None,
    head: Head | None = None,
) -> Float[np.ndarray, "n t-1"]:
    """Next-token cross-entropy (nats) of every token; `label` shows a progress bar, `head` saves its trial."""
    was_training = model.training
    model.eval()
    starts = range(0, len(crops), batch_size)
    losses = []
    for start in progress(starts, label) if label else starts:
        tokens = torch.from_numpy(crops[start : start + batch_size]).to(model.device)
        head = head or Head.of(model, tokens[:1, :TRIED])
        nats, _ = head.losses(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:], dtype=torch.bool))
        losses.append(nats.double().cpu().numpy())
    model.train(was_training)
    return np.concatenate(losses)


def mean_loss(losses: Float[np.ndarray, " n"]) -> tuple[float, float | None]:
    """Mean over crops and its standard error, for the loss curves, which do not distinguish documents."""
    error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return float(losses.mean()), error


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

    Raises UserError where a loss is not a number, or there are fewer than two tokens or no bytes.
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
    value = math.exp(mean) if mean < 700 else None  # beyond that it overflows 64 bits
    return {"perplexity": value, "perplexity_standard_error": None if value is None or error is None else value * error}


def evaluate_split(
    model: PreTrainedModel,
    split: TokenSplit,
    tokenizer: PreTrainedTokenizerFast,
    crops: int,
    batch_size: int,
    context: int,
) -> dict[str, Any]:
    """Evaluate on `crops` evenly spaced crops of `context` tokens; <eos> separates their documents.

    Tokens of a document in several crops count as one document; its <eos>, which has no bytes, is its last token.
    """
    if crops * context > split.n_tokens:
        longest = split.n_tokens // crops
        shorter = f"a --context of at most {longest}, " if longest > 1 else ""
        raise UserError(
            f"split {split.name}: its {split.n_tokens:,} tokens have no room for {crops:,} crops of {context}; give "
            f"fewer --crops, {shorter}or prepare more text"
        )
    tokens = split.spaced(crops, context)
    losses = crop_losses(model, tokens, batch_size, f"evaluate {split.name}")
    eos = tokenizer.eos_token_id
    _, document = np.unique(document_numbers(split, crops, context, eos)[:, 1:], return_inverse=True)
    document = document.ravel()
    n_bytes = token_bytes(tokenizer)[tokens[:, 1:]]
    begins = (tokens[:, :-1] == eos) & (n_bytes > 0)
    n_bytes = n_bytes - begins * bytes_put_before(tokenizer)
    nats, n_tokens, n_bytes = (np.bincount(document, part.ravel()) for part in (losses, np.ones_like(losses), n_bytes))
    return measures(nats, n_tokens, n_bytes, f"split {split.name}")


def document_numbers(split: TokenSplit, crops: int, context: int, eos: int) -> Int[np.ndarray, "n t"]:
    """Of every token of `split.spaced(crops, context)` which document of the split it is from; <eos> is its last."""
    starts = np.arange(crops) * split.n_tokens // crops  # where `spaced` takes them
    ends = np.concatenate([start + np.flatnonzero(piece == eos) for start, piece in _scan(split)])
    return np.searchsorted(ends, starts[:, None] + np.arange(context))


def _scan(split: TokenSplit) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
    for start in range(0, split.n_tokens, SCANNED):
        yield start, split.window(start, min(SCANNED, split.n_tokens - start))


def unigram_entropy(split: TokenSplit, vocab_size: int) -> float:
    """Entropy (nats) of the split's token frequencies: the loss of the best predictor that ignores context."""
    counts = sum((np.bincount(tokens, minlength=vocab_size) for _, tokens in _scan(split)), np.zeros(vocab_size))
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


@dataclass(frozen=True)
class Context:
    """Tokens of a document that fit the model; the last `scored` count, the last `word` are its last word."""

    document: int
    tokens: Int[np.ndarray, " t"]
    scored: int
    word: int


def contexts(document: int, tokens: Int[np.ndarray, " n"], eos: int, context: int, word: int = 0) -> Iterator[Context]:
    """Cut a document so that each token is predicted once, from <eos> and up to `context` tokens before it.

    The last window reaches back to fill its context, as in lm-eval's rolling log-likelihood.
    """
    row = np.concatenate([[eos], tokens])
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        yield Context(document, row[max(0, end - context) : end + 1], end - start, word if end == len(tokens) else 0)


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    batch_size: int,
    context: int,
    name: str,
    last_word: bool = False,
) -> dict[str, Any]:
    """Predict every token of every text after an <eos>; `last_word` adds measures of the last word.

    A batch holds at most as many tokens as `batch_size` full contexts.
    """
    eos = tokenizer.eos_token_id
    ids = _encode(tokenizer, texts)
    words = _last_word_lengths(tokenizer, texts, ids) if last_word else [0] * len(ids)
    each = enumerate(zip(ids, words, strict=True))
    rows = [row for n, (tokens, word) in each for row in contexts(n, tokens, eos, context, word)]
    nats, word_nats, right = np.zeros(len(ids)), np.zeros(len(ids)), np.zeros(len(ids))
    head = Head.of(model, torch.from_numpy(rows[0].tokens[None, :TRIED]).to(model.device))
    for batch in progress(list(_batches(rows, batch_size * context)), f"evaluate {name}"):
        for row, (loss, word_loss, correct) in zip(batch, _predict_contexts(head, batch, eos), strict=True):
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
    """Number of tokens that the last word, with its space, adds to the text before it."""
    before = _encode(tokenizer, [text[: -len(text.split()[-1])].rstrip() for text in texts])
    return [max(1, len(tokens) - len(rest)) for tokens, rest in zip(ids, before, strict=True)]


def _batches(rows: Sequence[Context], budget: int) -> Iterator[list[Context]]:
    """Batch windows of similar length, longest first, with at most `budget` tokens (with padding) per batch."""
    batch: list[Context] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * (len(batch[0].tokens) - 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _predict_contexts(head: Head, batch: Sequence[Context], eos: int) -> Iterator[tuple[float, float, bool]]:
    """For each window: nats of the scored tokens, nats of the last word, and whether all its tokens were likeliest."""
    # Padding on the right changes nothing before it: the models are causal.
    padded = np.full((len(batch), len(batch[0].tokens)), eos)
    words = np.zeros((len(batch), len(batch[0].tokens) - 1), dtype=bool)
    for line, word, row in zip(padded, words, batch, strict=True):
        line[: len(row.tokens)] = row.tokens
        word[len(row.tokens) - 1 - row.word : len(row.tokens) - 1] = True
    tokens, asked = (torch.from_numpy(table).to(head.model.device) for table in (padded, words))
    losses, likeliest = head.losses(tokens[:, :-1], tokens[:, 1:], asked)
    for row, nats, right in zip(batch, losses.double(), likeliest, strict=True):
        end = len(row.tokens) - 1
        scored, last = slice(end - row.scored, end), slice(end - row.word, end)
        yield nats[scored].sum().item(), nats[last].sum().item(), row.word > 0 and bool(right[last].all())


def _last_word_measures(nats: Float[np.ndarray, " d"], right: Float[np.ndarray, " d"]) -> dict[str, float | None]:
    """Accuracy: all tokens of the word are likeliest. Perplexity: exp of the mean nats per word, not per token."""
    accuracy, accuracy_error = ratio(right, np.ones_like(right))
    per_word = _perplexity(*ratio(nats, np.ones_like(nats)))
    return {"accuracy": accuracy, "accuracy_standard_error": accuracy_error, **per_word}


@torch.no_grad()
def next_token_examples(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: tuple[str, ...] = PROMPTS, top: int = 5
) -> list[dict[str, Any]]:
    """For each prompt that fits the context: the `top` likeliest next tokens and a greedy continuation."""
    had = sorted(tokenizer.get_vocab().values())
    examples = []
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
        room = min(12, (longest_context(model.config) or math.inf) - len(ids))
        if room < 1:
            continue
        logits = _next_logits(model, ids)
        known = torch.tensor([index for index in had if index < len(logits)], device=logits.device)
        best = logits[known].topk(top)
        texts = token_strings(tokenizer, known[best.indices].tolist())
        rows = zip(texts, best.values.tolist(), logits[known].softmax(-1)[best.indices].tolist(), strict=True)
        more: list[int] = []
        # Without a cache, since models have different kinds of them.
        while len(more) < room and tokenizer.eos_token_id not in more:
            more.append(int(_next_logits(model, [*ids, *more]).argmax()))
        found = [{"token": token, "probability": p, "logit": logit} for token, logit, p in rows]
        examples.append({"prompt": prompt, "top": found, "continuation": _continuation(tokenizer, ids, more)})
    return examples


def _continuation(tokenizer: PreTrainedTokenizerFast, ids: list[int], more: list[int]) -> str:
    """The text of `more` after that of `ids`: decoded by itself it can lose its first space."""
    before, whole, alone = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids, ids + more, more))
    return whole.removeprefix(before) if whole.startswith(before) else alone


def _next_logits(model: Any, ids: Sequence[int]) -> Float[torch.Tensor, " v"]:
    return plain_pass(model, torch.tensor([ids], device=model.device)).logits[0, -1].float()


@torch.no_grad()
def reconstruction(model: PreTrainedModel, crops: Int[np.ndarray, "n t"], batch_size: int = 8) -> list[float]:
    """R^2 of what each layer's codes encode by s D A, with the best number s; empty of models without a dictionary.

    1 - sum |x - s D A|^2 / sum |x - mean of x|^2 over tokens: 1 is a code of all that there is, 0 as good as the mean.
    """
    sums: dict[nn.Module, list[torch.Tensor]] = {}

    def add(module: Any, inputs: Any, _output: Any) -> None:
        x = inputs[0].flatten(0, 1)
        y = module.write(module.encode(x)).double()
        x = x.double()
        found = [(x * y).sum(), y.square().sum(), x.square().sum(), x.sum(0), x.new_tensor(len(x))]
        before = sums.get(module, [torch.zeros_like(part) for part in found])
        sums[module] = [one + more for one, more in zip(before, found, strict=True)]

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, ISTA)]
    for rows in torch.from_numpy(crops).split(batch_size) if hooks else ():
        plain_pass(model, rows.to(model.device))
    for hook in hooks:
        hook.remove()
    left = [xx - xy**2 / yy.clamp_min(1e-12) for xy, yy, xx, *_ in sums.values()]
    return [float(1 - rest / (xx - x @ x / n)) for rest, (*_, xx, x, n) in zip(left, sums.values(), strict=True)]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Add the requested evaluations to a run's evaluation.json and return it; finished ones are kept.

    The validation split is always read. Its results are at the top level, those of other sets in `sets` and those of
    lm-eval in `tasks`, by the names they were asked for. Results of other weights are dropped.

    Raises:
        UserError: no run, no data, a split is shorter than asked, a context that the model does not read or does not
            state, or a set or task is unknown or cannot be read.
    """
    run = Run(config.run)
    data = data_of(run, config.data)
    # Two processes at once would each drop the other's results.
    with locked(run.root, "evaluate"):
        return _evaluate(config, run, data)


def _evaluate(config: EvaluateConfig, run: Run, data: TokenData) -> dict[str, Any]:
    weights = run.fingerprint()
    tokenizer = load_tokenizer(run.model.resolve())
    context, of_context = context_of(config, run)
    made_with = {"model_sha256": weights, **of_context}
    sets, tasks = _found(run.evaluation, weights)
    # Older versions used a plain product for the logits of adopted models, whatever their heads do.
    of_head = {"logits": "own"} if "adopted" in run.read_manifest() else {}
    wanted = {name: made_with | of_head | _settings(config, data, name) for name in ("validation", *config.on)}
    task_settings = made_with | {"task_folder_sha256": harness.identity(config.task_folder)}
    new_tasks = [name for name in config.task_names() if tasks.get(name, {}).get("settings") != task_settings]
    manager = harness.open_tasks(new_tasks, config.task_folder) if new_tasks else None
    open_model = cache(partial(load_model, run, config.device))
    for name, settings in wanted.items():
        if sets.get(name, {}).get("settings") != settings:
            sets[name] = {"settings": settings} | _evaluate_set(config, data, open_model(), tokenizer, name, context)
            _write(run.evaluation, sets, tasks)
    if new_tasks:
        results = harness.run_tasks(manager, new_tasks, open_model(), tokenizer, config.batch_size, context)
        for name, result in results:
            tasks[name] = {"settings": task_settings} | result
            _write(run.evaluation, sets, tasks)
    return read_json(run.evaluation)


def context_of(config: EvaluateConfig, run: Run) -> tuple[int, dict[str, int]]:
    """Tokens that the model reads at once, and the same as a setting where it is not the longest that it can."""
    shape = model_config(run.trained_model())
    longest = longest_context(shape)
    if config.context is None and longest is None:
        raise UserError(
            f"{run.root}: its model ({shape.model_type}) states no longest context; say how many tokens to read at "
            "once, such as --context 1024"
        )
    context = config.context or min(longest or DEFAULT_LONGEST, DEFAULT_LONGEST)
    if not 2 <= context <= (longest or context):
        most = "" if longest is None else f", {longest}"
        raise UserError(f"--context {context}: has to be from 2 to the model's longest context{most}")
    return context, {} if context == longest else {"context": context}


def _found(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Earlier results by set and by task, if they belong to the same weights."""
    results: Shape = {str: {"settings?": {}}}
    shape = {"settings?": {}, "sets?": results, "tasks?": results}
    found = read_json(path, shape, "`cratescope evaluate`") if path.exists() else {}
    others, tasks = found.pop("sets", {}), found.pop("tasks", {})
    sets = {"validation": found, **others}

    def ours(results: dict[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in results.items() if one.get("settings", {}).get("model_sha256") == weights}

    return ours(sets), ours(tasks)


def _write(path: Path, sets: dict[str, Any], tasks: dict[str, Any]) -> None:
    others = {name: result for name, result in sets.items() if name != "validation"}
    write_json(path, sets["validation"] | {"sets": others, "tasks": tasks})


def _settings(config: EvaluateConfig, data: TokenData, name: str) -> dict[str, Any]:
    """Settings that the result on a set depends on, besides the model."""
    if name in SPLITS:
        of_set = {"crops": config.crops, "data_sha256": sha256(data.path / "manifest.json")}
    else:
        of_set = {"max_documents": config.max_documents, **identity(find_set(name))}
    return {"on": name} | of_set


def _evaluate_set(
    config: EvaluateConfig,
    data: TokenData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    context: int,
) -> dict[str, Any]:
    if name not in SPLITS:
        found = find_set(name)
        texts = read(name, found, config.max_documents)
        last_word = isinstance(found, HubSet) and found.last_word
        return evaluate_texts(model, tokenizer, texts, config.batch_size, context, name, last_word)
    split = data.split(name)
    losses = evaluate_split(model, split, data.tokenizer, config.crops, config.batch_size, context)
    explained = reconstruction(model, split.spaced(min(config.crops, EXPLAINED), context), config.batch_size)
    return {
        "split": name,
        "crops": config.crops,
        **losses,
        **({"reconstruction": explained} if explained else {}),
        "unigram_entropy": unigram_entropy(split, n_ids(data.tokenizer)),
        "examples": next_token_examples(model, data.tokenizer),
        "versions": versions(),
    }

"""Loss on held-out text with its standard error, the unigram entropy to beat, and next-token examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cratescope.config import EvaluateConfig
from cratescope.hardware import pick_device
from cratescope.lm.data import TokenData, TokenSplit
from cratescope.models.convert import load_folder
from cratescope.run import Run, UserError, read_json, sha256, versions, write_json

# The prompts of paper section 7 (next-token examples and steering).
PROMPTS = ("They saw some boats on the", "Beijing is the capital of", "1 2 3 4 5")


@dataclass(frozen=True)
class Loss:
    """Mean next-token cross-entropy in nats and its standard error over crops."""

    mean: float
    standard_error: float | None
    n_tokens: int


@torch.no_grad()
def crop_losses(
    model: PreTrainedModel, crops: Int[np.ndarray, "n t"], batch_size: int = 8, label: str | None = None
) -> Float[np.ndarray, " n"]:
    """Mean next-token cross-entropy (nats) of each crop; `label` shows a progress bar."""
    was_training = model.training
    model.eval()
    losses = []
    starts = range(0, len(crops), batch_size)
    for start in track(starts, label, console=Console(stderr=True), transient=True) if label else starts:
        tokens = torch.from_numpy(crops[start : start + batch_size]).to(model.device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        losses.append(loss.double().mean(1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(losses)


def mean_loss(losses: Float[np.ndarray, " n"], context: int) -> Loss:
    """Crops are the unit of the standard error: neighbouring tokens are not independent."""
    error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return Loss(float(losses.mean()), error, len(losses) * (context - 1))


def unigram_entropy(split: TokenSplit, vocab_size: int) -> float:
    """Entropy (nats) of the split's own token frequencies: the loss of the best predictor that knows no context."""
    counts = np.zeros(vocab_size)
    for start in range(0, split.n_tokens, 1 << 20):
        tokens = split.window(start, min(1 << 20, split.n_tokens - start))
        counts += np.bincount(tokens, minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


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
    """Write evaluation.json of a run and return it; finished work with the same settings is returned at once.

    Raises:
        UserError: no run, no data, or the split is shorter than asked.
    """
    run = Run(config.run)
    data = data_of(run, config.data)
    settings = {
        "split": config.split,
        "crops": config.crops,
        "model_sha256": run.fingerprint(),
        "data_sha256": sha256(data.path / "manifest.json"),
    }
    if run.evaluation.exists() and (found := read_json(run.evaluation)).get("settings") == settings:
        return found
    model = load_model(run, config.device)
    split = data.split(config.split)
    context = model.config.max_position_embeddings
    losses = crop_losses(model, split.spaced(config.crops, context), config.batch_size, f"evaluate {run.name}")
    loss = mean_loss(losses, context)
    if not math.isfinite(loss.mean):
        raise UserError(f"{run.root}: the model's loss is not a number; train again with a lower learning rate")
    result = {
        "settings": settings,
        "split": config.split,
        "crops": config.crops,
        "n_tokens": loss.n_tokens,
        "loss": loss.mean,
        "standard_error": loss.standard_error,
        "perplexity": math.exp(loss.mean),
        # The crops' own bytes are not stored; the split's ratio of tokens to bytes stands in for theirs.
        "bits_per_byte": loss.mean / math.log(2) * split.n_tokens / split.n_bytes,
        "unigram_entropy": unigram_entropy(split, data.vocab_size),
        "examples": next_token_examples(model, data.tokenizer),
        "versions": versions(),
    }
    write_json(run.evaluation, result)
    return result

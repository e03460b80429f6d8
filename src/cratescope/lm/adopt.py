"""Turn a model trained elsewhere into a run directory, so that every stage after training works on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cratescope.arm import Arm
from cratescope.errors import UserError, as_user_error
from cratescope.files import atomic_folder, mark_whole, write_json
from cratescope.lm.head import looks_ahead
from cratescope.locks import locked
from cratescope.models.folder import longest_context, text_config
from cratescope.run import Run, versions
from cratescope.text.shards import TokenData
from cratescope.text.tokenizer import load_tokenizer, n_text_ids

Opened = Callable[[Path], PreTrainedModel]


def is_adopted(run: Run, source: str) -> bool:
    """Whether `run` already holds the model `source`. Raises UserError if it holds another model."""
    if not run.manifest.exists():
        return False
    if run.read_manifest().get("adopted") != source:
        raise UserError(f"{run.root}: is the run of another model than {source}; give a directory of its own")
    return True


def adopt(run: Run, source: str, data: TokenData, site: str, opened: Opened) -> PreTrainedModel:
    """Copy the causal LM `source` (a folder or a hub name) and its tokenizer into `run`; `site` is its native one.

    Returns what `opened` gives, which opens the copy and checks it; nothing stays where it refuses. Another process
    that does the same is waited for.

    Raises:
        UserError: no such model, text of another tokenizer, a tokenizer with more ids than the model, or a model that
            sees later tokens.
    """
    with locked(run.root, "adopt", wait=True):
        return opened(run.trained_model()) if is_adopted(run, source) else _adopt(run, source, data, site, opened)


def _adopt(run: Run, source: str, data: TokenData, site: str, opened: Opened) -> PreTrainedModel:
    tokenizer = load_tokenizer(source)
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError(
            f"{data.path} is text of another tokenizer than {source}'s; make it with "
            f"`cratescope prepare ... --tokenizer {source}`"
        )
    model = _load(source)
    rows, needed = model.get_input_embeddings().weight.shape[0], n_text_ids(tokenizer)
    if needed > rows:
        raise UserError(
            f"model {source}: its tokenizer has {needed:,} ids and the model {rows:,} embeddings; "
            "give it the tokenizer that it was trained with"
        )
    with atomic_folder(run.model) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
        found = opened(folder)
        refuse_unless_causal(found, source)
        mark_whole(folder)
    layers = getattr(text_config(model.config), "num_hidden_layers", None)
    manifest = {
        "name": run.name,
        "adopted": source,
        "arm": Arm.adopted(source, model.config.model_type, layers, model.num_parameters(), site).row(),
        "parameters": model.num_parameters(),
        "n_layer": layers,
        "vocab_size": data.vocab_size,
        "context": longest_context(model.config),
        "data": run.data_entry(data.path),
        "versions": versions(),
    }
    write_json(run.manifest, manifest)
    return found


def _load(source: str) -> Any:
    """Load the model as it is in the checkpoint, which must contain every weight."""
    with as_user_error(f"model {source}: cannot be loaded", "give a folder or a hub name"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {source}: its checkpoint has no {missing[0]}, so it is not a whole causal language model; "
            "give one with its head"
        )
    _refuse_more_layers(model, info["unexpected_keys"], source)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Settings of sampling, of no use here, that contradict one another; transformers refuses to save them.
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _refuse_more_layers(model: Any, unexpected: Iterable[str], source: str) -> None:
    """Refuse weights of layers that the model does not have although others like them are in it."""
    known = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    if more := sorted(name for name in unexpected if re.sub(r"\d+", "N", name) in known):
        stated = getattr(text_config(model.config), "num_hidden_layers", None)
        found = 1 + max(int(number) for name in more for number in re.findall(r"\d+", name)[:1])
        what = f"states {stated} layers and its weights have {found} (such as {more[0]})"
        raise UserError(f"model {source}: its config.json {what}; mend config.json")


def refuse_unless_causal(model: Any, source: str) -> None:
    """Refuse a model in which an output before the last token depends on it, as in BERT and other encoders."""
    if looks_ahead(model, torch.arange(1, 17, device=model.device)[None]):
        raise UserError(
            f"model {source}: its tokens see later ones, so it is not a causal language model; "
            "give another (an encoder trained as a decoder has is_decoder = true in its config.json)"
        )

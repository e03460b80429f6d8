"""Make a run directory of a model that was trained elsewhere, so that every stage after training works on it."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM

from cratescope.lm.data import TokenData
from cratescope.lm.tokenizer import load_tokenizer
from cratescope.run import Run, UserError, atomic_folder, first_line, mark_whole, sha256, versions, write_json


def adopt(run: Run, source: str, data: TokenData) -> None:
    """Copy the causal LM `source` (a folder or a hub name) and its tokenizer into `run`; finished work is kept.

    Raises:
        UserError: no such model, text of another tokenizer, or `run` is that of another model.
    """
    if run.manifest.exists():
        if run.read_manifest().get("adopted") != source:
            raise UserError(f"{run.root}: is the run of another model than {source}; give a directory of its own")
        return
    tokenizer = load_tokenizer(source)
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError(
            f"{data.path} is text of another tokenizer than {source}'s; make it with "
            f"`cratescope prepare ... --tokenizer {source}`"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {source}: cannot be loaded ({first_line(error)}); give a folder or a hub name"
        ) from error
    with atomic_folder(run.model) as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
        mark_whole(folder)
    path = os.path.relpath(data.path.resolve(), run.root.resolve())
    manifest = {
        "name": run.name,
        "adopted": source,
        "family": model.config.model_type,
        "parameters": model.num_parameters(),
        "n_layer": model.config.num_hidden_layers,
        "vocab_size": data.vocab_size,
        "context": model.config.max_position_embeddings,
        "data": {"path": path, "manifest_sha256": sha256(data.path / "manifest.json")},
        "versions": versions(),
    }
    write_json(run.manifest, manifest)

"""Open a model folder or hub model: what its configuration says, and the model itself, for any causal LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cratescope.errors import UserError, as_user_error
from cratescope.files import check_whole

CONTEXT_NAMES = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length", "n_ctx"),
    *("context_length", "model_max_length"),
)
"""Names under which configurations state the longest context."""
MOST_LAYERS = 10_000
"""Making more, as a damaged config.json may ask for, takes hours before the weights are looked at."""
BEHIND_PADDING = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), 1),
    **dict.fromkeys(("camembert", "data2vec-text", "xmod"), 1),
    "prophetnet": 2,
}
"""Models that number positions from the padding token's id on, so that they read fewer tokens than they state: by that
id and so many more."""


def text_config(config: Any) -> Any:
    """The part about text: composite models nest it, and encoder-decoder configurations name both halves."""
    return config.get_text_config(decoder=True)


def longest_context(config: Any) -> int | None:
    """Tokens the model can read at once; None where its configuration states no limit (Mamba, Bloom)."""
    text = text_config(config)
    stated = (getattr(text, name, None) for name in CONTEXT_NAMES)
    longest = next((length for length in stated if isinstance(length, int) and length > 0), None)
    if longest is None or text.model_type not in BEHIND_PADDING:
        return longest
    return longest - (getattr(text, "pad_token_id", None) or 0) - BEHIND_PADDING[text.model_type]


def context_length(config: Any, wanted: int | None) -> int:
    """Tokens to read at once: as many as wanted, else the most that the model reads.

    Raises:
        UserError: the model does not state how many it reads, or reads fewer than wanted.
    """
    longest = longest_context(config)
    context = wanted or longest
    if context is None:
        raise UserError(
            f"a {config.model_type} model states no longest context; give --context, tokens to read at once"
        )
    if longest is not None and context > longest:
        raise UserError(f"context = {context} is longer than the {longest} tokens of this model")
    return context


def model_config(source: str | Path) -> Any:
    """The configuration of a folder or hub name. UserError: no such model, or a class that transformers has not."""
    with as_user_error(f"model {source}: cannot be loaded", "give a folder or a hub name"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        layers = getattr(text_config(config), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        what = f"config.json says num_hidden_layers = {layers:,}"
        raise UserError(f"model {source}: {what}; no model has as many, mend it")
    return config


def skeleton(config: Any) -> PreTrainedModel:
    """Build the model without weights, to inspect its modules: it takes no memory and almost no time.

    Raises UserError for what is no causal language model, or needs a package that is not installed.
    """
    with as_user_error(f"a {config.model_type} model cannot be made here", "give another model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_folder(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """Read a Hugging Face folder; every tensor must be there and none too many. `auto` keeps its number format."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    check_whole(folder)
    model_config(folder)
    with as_user_error(f"{folder}: cannot be loaded", "check config.json and the weights, or copy them again"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=dtype, trust_remote_code=False, local_files_only=True
        )
    model, info = loaded
    wrong = [f"{kind[:-5]} {sorted(info[kind])[0]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit config.json: {', '.join(wrong)}")
    return model

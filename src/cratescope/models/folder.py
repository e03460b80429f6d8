"""What can be known of a model from its folder alone."""

from __future__ import annotations

from transformers import PreTrainedConfig

LONGEST = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx"),
    "context_length",
)
"""Names under which configs state the longest context."""


def longest_context(config: PreTrainedConfig) -> int | None:
    """Most tokens that the model reads at once; None where its config states no limit."""
    text = config.get_text_config()
    stated = [value for name in LONGEST if isinstance(value := getattr(text, name, None), int) and value > 0]
    return stated[0] if stated else None

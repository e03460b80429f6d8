"""Configuration of the CRATE language model. Self-contained, so that it can be published beside the weights."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CrateConfig(PreTrainedConfig):
    r"""Sizes and sparse-coding settings of CRATE (paper section 2); the defaults are the paper's size B.

    Args:
        vocab_size: token embeddings; the paper pads GPT-2's 50257 to 50304.
        n_positions: longest context T.
        n_embd: width d.
        n_layer: blocks L.
        n_head: heads K; each works in a subspace of d / K dimensions.
        ista_expansion: n, so that the dictionary has h = n d atoms.
        ista_steps: t, proximal gradient steps from A_0 = 0.
        ista_step_size: eta.
        ista_lambda: lambda, the sparsity penalty.
        ista_skip: add the block's input to the ISTA output (the paper does not).
        ista_tied: decode with the encoding dictionary (the paper does).
    """

    model_type = "crate"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50304
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    ista_expansion: int = 4
    ista_steps: int = 2
    ista_step_size: float = 0.1
    ista_lambda: float = 0.1
    ista_skip: bool = False
    ista_tied: bool = True
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        """Called by `strict` when a configuration is made."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if not 1 <= self.ista_steps <= 1000:
            raise ValueError(f"ista_steps = {self.ista_steps}, but it has to be from 1 to 1000")
        if not 1 <= self.ista_expansion <= 1000:
            raise ValueError(f"ista_expansion = {self.ista_expansion}, but it has to be from 1 to 1000")
        if not (0 < self.ista_step_size < math.inf and 0 <= self.ista_lambda < math.inf):
            raise ValueError("ista_step_size has to be above 0, ista_lambda 0 or more, and both finite")

    @property
    def n_atoms(self) -> int:
        """h, the atoms of the dictionary and the neurons of a layer."""
        return self.ista_expansion * self.n_embd


__all__ = ["CrateConfig"]

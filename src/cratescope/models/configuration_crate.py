"""Configuration of the CRATE language model. Self-contained, so that it can be published beside the weights."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CrateConfig(PreTrainedConfig):
    r"""Sizes of CRATE (paper section 2) and what its blocks are; the defaults are the paper's size B.

    Fields called ista_* are of the feed-forward block, whatever it is.

    Args:
        vocab_size: token embeddings; the paper pads GPT-2's 50257 to 50304.
        n_positions: longest context T.
        n_embd: width d.
        n_layer: blocks L.
        n_head: heads K; each works in a subspace of d / K dimensions.
        attention: mssa, the paper's, in which one projection is query, key and value; or mhsa, GPT-2's with three.
        lag: mix into every query and key, by a learned share per head, that of the token before.
        bilinear: compare query and key by a learned bilinear form per head instead of the inner product; of mssa alone,
            since queries of mhsa have weights of their own.
        feed_forward: ista, the paper's; lista, ista with atoms of norm 1, a threshold per atom that training regulates,
            and a norm without gain and bias before it; or mlp, GPT-2's with ReLU.
        ista_expansion: n, so that the dictionary has h = n d atoms.
        ista_steps: t, proximal gradient steps from A_0 = 0 (not of mlp).
        ista_step_size: eta (not of mlp).
        ista_step_learned: let every block learn its own eta, from there.
        ista_lambda: lambda, the sparsity penalty, which is where the thresholds of lista start (not of mlp).
        ista_skip: add the block's input to its output (the paper does not).
        ista_tied: decode with the encoding dictionary (the paper does; mlp never does).
        ista_gain: where tied, decode with its atoms times a learned gain for each.
        density_low, density_high: share of a step's tokens below, above which an atom of lista is active too rarely,
            too often (1: never).
        homeostasis_rate: what a threshold then moves by at most after a step, at the peak of the learning rate; 0 keeps
            thresholds where they start.
        code_penalty: in training, so many times a token's ||A_t||_1 of all blocks is added to its loss (by `cratescope
            train`, which begins at 0).
        reconstruction_weight: in that penalty, how much 1/2 ||X - D A_t||^2 weighs beside ||A_t||_1 (not of mlp): with
            it, atoms also learn to be a code of what they read.
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
    attention: Literal["mssa", "mhsa"] = "mssa"
    lag: bool = False
    bilinear: bool = False
    feed_forward: Literal["ista", "lista", "mlp"] = "ista"
    ista_expansion: int = 4
    ista_steps: int = 2
    ista_step_size: float = 0.1
    ista_step_learned: bool = False
    ista_lambda: float = 0.1
    ista_skip: bool = False
    ista_tied: bool = True
    ista_gain: bool = False
    density_low: float = 0.005
    density_high: float = 1.0
    homeostasis_rate: float = 0.02
    code_penalty: float = 0.0
    reconstruction_weight: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        """Called by `strict` when a configuration is made."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it has to be 1 or more")
        if not 0 < self.layer_norm_epsilon < 1:
            raise ValueError(f"layer_norm_epsilon = {self.layer_norm_epsilon}, but it has to be above 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if not 1 <= self.ista_steps <= 1000:
            raise ValueError(f"ista_steps = {self.ista_steps}, but it has to be from 1 to 1000")
        if not 1 <= self.ista_expansion <= 1000:
            raise ValueError(f"ista_expansion = {self.ista_expansion}, but it has to be from 1 to 1000")
        if not 0 < self.ista_step_size <= 1000:
            raise ValueError(f"ista_step_size = {self.ista_step_size}, but it has to be above 0, and at most 1000")
        if not 0 <= self.ista_lambda <= 1e6:
            raise ValueError(f"ista_lambda = {self.ista_lambda}, but it has to be from 0 to 1000000")
        if self.ista_gain and not self.ista_tied:
            raise ValueError("ista_gain is of a tied decoder; set ista_tied, too")
        if not 0 < self.density_low <= self.density_high <= 1:
            both = f"density_low = {self.density_low}, density_high = {self.density_high}"
            raise ValueError(f"{both}, but the first has to be above 0, the second no less and at most 1")
        if not 0 <= self.homeostasis_rate <= 1000:
            raise ValueError(f"homeostasis_rate = {self.homeostasis_rate}, but it has to be from 0 to 1000")
        if not 0 <= self.code_penalty <= 1:
            raise ValueError(f"code_penalty = {self.code_penalty}, but it has to be from 0 to 1")
        if not 0 <= self.reconstruction_weight <= 1000:
            raise ValueError(f"reconstruction_weight = {self.reconstruction_weight}, but it has to be from 0 to 1000")
        if self.bilinear and self.attention != "mssa":
            raise ValueError("bilinear is of attention = mssa: queries of mhsa have weights of their own; leave it out")
        if self.reconstruction_weight and self.feed_forward == "mlp":
            raise ValueError("reconstruction_weight is of a dictionary, which feed_forward = mlp has not; leave it out")

    @property
    def n_atoms(self) -> int:
        """h, the atoms of the dictionary and the neurons of a layer."""
        return self.ista_expansion * self.n_embd


__all__ = ["CrateConfig"]

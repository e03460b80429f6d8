"""Cost of a model: parameters and FLOPs."""

from __future__ import annotations

from transformers import GPT2Config, PreTrainedModel

from cratescope.models import CrateConfig


def count_parameters(model: PreTrainedModel) -> int:
    """Trainable parameters without position embeddings, as in the paper's table; tied weights count once."""
    return sum(p.numel() for p in model.parameters()) - model.get_parameter("transformer.wpe.weight").numel()


def flops_per_token(config: CrateConfig | GPT2Config, context: int) -> int:
    """Floating-point operations per training token: 3 passes (forward, two backward) x 2 per multiply-add.

    Multiply-adds per token and layer: CRATE 2 d^2 (U, W) + 2 t h d (ISTA), GPT-2 4 d^2 (Q K V and output) + 2 h d,
    both + 2 T d (attention over all T tokens of the context, the masked half included); the head V d. Norms,
    activations and softmax are left out, as usual.
    """
    d = config.n_embd
    if isinstance(config, CrateConfig):
        layer = 2 * d**2 + 2 * config.ista_steps * config.n_atoms * d
    else:
        layer = 4 * d**2 + 2 * (config.n_inner or 4 * d) * d
    return 3 * 2 * (config.n_layer * (layer + 2 * context * d) + config.vocab_size * d)

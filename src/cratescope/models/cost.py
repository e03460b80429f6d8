"""What a model costs: parameters, FLOPs and bytes."""

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


def training_bytes(config: CrateConfig | GPT2Config, tokens: int, number_bytes: int = 4) -> int:
    """Peak memory (bytes) of training on `tokens` tokens per forward pass; number_bytes is 2 under bfloat16 autocast.

    Weights, gradients and AdamW's two moments in float32, 16 P; the head's gradient twice more, on its way, 8 V d; the
    rows of logits held at once, 512 V numbers; for every token and layer what the backward pass needs, CRATE
    (5 + t) d + t h numbers and GPT-2 8 d + h, of which 2 d (the residual stream) are float32 always; 4 d around the
    layers. Without the interpreter and its libraries. docs/scaling.md compares it with measurements.
    """
    d, v = config.n_embd, config.vocab_size
    if isinstance(config, CrateConfig):
        weights = 2 * d**2 + config.n_atoms * d * (1 if config.ista_tied else 2)
        kept = (3 + config.ista_steps) * d + config.ista_steps * config.n_atoms
    else:
        h = config.n_inner or 4 * d
        weights, kept = 4 * d**2 + 2 * h * d, 6 * d + h
    parameters = (v + config.n_positions) * d + config.n_layer * weights
    activations = config.n_layer * (8 * d + number_bytes * kept) + 16 * d
    copies = parameters * number_bytes if number_bytes < 4 else 0
    return 16 * parameters + copies + 8 * v * d + 512 * v * number_bytes + tokens * activations

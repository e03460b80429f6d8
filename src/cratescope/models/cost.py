"""Cost of a model: parameters, FLOPs and bytes."""

from __future__ import annotations

from transformers import GPT2Config, PreTrainedModel

from cratescope.models import CrateConfig


def count_parameters(model: PreTrainedModel) -> int:
    """Trainable parameters without position embeddings, as in the paper's table; tied weights count once."""
    return sum(p.numel() for p in model.parameters()) - model.get_parameter("transformer.wpe.weight").numel()


def flops_per_token(config: CrateConfig | GPT2Config, context: int) -> int:
    """Floating-point operations per training token: 3 passes (forward, two backward) x 2 per multiply-add.

    Multiply-adds per token and layer: MSSA 2 d^2 (U, W), GPT-2's attention 4 d^2 (Q K V and output), each + 2 T d
    (attention over all T tokens of the context, the masked half included), a bilinear form d^2 / K; ISTA 2 t h d, twice
    if it also learns to reconstruct, an MLP 2 h d; the head V d.
    Norms, activations, softmax and lag are left out, as usual.
    """
    d = config.n_embd
    if isinstance(config, CrateConfig):
        projections = (2 if config.attention == "mssa" else 4) + (1 / config.n_head if config.bilinear else 0)
        steps, h = 1 if config.feed_forward == "mlp" else config.ista_steps, config.n_atoms
        steps *= 2 if config.reconstruction_weight else 1
    else:
        projections, steps, h = 4, 1, config.n_inner or 4 * d
    layer = round(projections * d**2) + 2 * steps * h * d + 2 * context * d
    return 3 * 2 * (config.n_layer * layer + config.vocab_size * d)


def cached_bytes_per_token(config: CrateConfig | GPT2Config, number: int = 4) -> int:
    """Bytes that generation keeps of a token, with numbers of so many bytes each.

    Per layer: d of MSSA, 2 d of GPT-2's attention, 3 d of that with lag, whose queries are asked for again.
    """
    kept = 2
    if isinstance(config, CrateConfig):
        kept = 1 if config.attention == "mssa" else 2 + config.lag
    return number * config.n_layer * kept * config.n_embd

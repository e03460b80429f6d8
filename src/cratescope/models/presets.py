"""The paper's sizes (section 2, table) for CRATE and for the GPT-2 twin that differs in nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from cratescope.models import CrateConfig
from cratescope.run import UserError, last_line

GPT2_VOCABULARY = 50304
"""GPT-2's 50257 tokens padded to a multiple of 64, as in the paper."""


@dataclass(frozen=True)
class Size:
    """Width d, heads K and layers L; the hidden layer has 4 d neurons in both families."""

    n_embd: int
    n_head: int
    n_layer: int


SIZES = {
    "1l": Size(128, 4, 1),
    "2l": Size(128, 4, 2),
    "3l": Size(128, 4, 3),
    "s": Size(768, 12, 6),
    "b": Size(768, 12, 12),
}
FAMILIES = ("crate", "gpt2")
PRESETS = tuple(f"{family}-{size}" for family in FAMILIES for size in SIZES)


def preset_config(
    preset: str,
    vocab_size: int = GPT2_VOCABULARY,
    context: int = 1024,
    eos_id: int | None = 50256,
    crate: dict[str, str] | None = None,
) -> CrateConfig | GPT2Config:
    """The configuration named `preset` for a vocabulary and a longest context.

    Args:
        crate: CrateConfig fields to change, as text, such as {"ista_lambda": "0.2"}.

    Raises:
        UserError: unknown preset or field, or `crate` with a GPT-2 preset.
    """
    family, _, size = preset.partition("-")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    shape: dict[str, Any] = dataclasses.asdict(SIZES[size]) | {"vocab_size": vocab_size, "n_positions": context}
    shape |= {"bos_token_id": eos_id, "eos_token_id": eos_id}
    if family == "crate":
        try:
            return CrateConfig(**shape, **_parse_crate(crate or {}))
        except StrictDataclassError as error:
            raise UserError(f"{preset}: {last_line(error)}") from error
    if crate:
        raise UserError(f"{preset} has no CRATE fields; leave out {', '.join(crate)}")
    # Everything but attention and feed-forward block as in CRATE: no dropout, same initialisation, tied head.
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "loss_type": "ForCausalLM"}
    return GPT2Config(**shape, activation_function="relu")


def _parse_crate(fields: dict[str, str]) -> dict[str, Any]:
    """Turn text into the types of the paper's defaults."""
    defaults = CrateConfig()
    known = [name for name in vars(defaults) if name.startswith("ista_")]
    parsed: dict[str, Any] = {}
    for name, text in fields.items():
        if name not in known:
            raise UserError(f"--crate: CRATE has no field {name!r:.60}; choose from {', '.join(known)}")
        default = getattr(defaults, name)
        try:
            parsed[name] = _parse_bool(text) if isinstance(default, bool) else type(default)(text)
        except ValueError as error:
            raise UserError(f"--crate {name} = {text!r:.60} is not a {type(default).__name__}") from error
    return parsed


def _parse_bool(text: str) -> bool:
    if str(text).lower() not in ("true", "false"):
        raise ValueError(text)
    return str(text).lower() == "true"


def build(config: CrateConfig | GPT2Config, seed: int) -> PreTrainedModel:
    """Build a model with random weights that depend on `seed` alone; the caller's random state is untouched."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


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

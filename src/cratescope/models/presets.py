"""The paper's sizes (section 2, table) for CRATE, its variants, and their GPT-2 twins that differ in nothing else."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from cratescope.errors import UserError, last_line
from cratescope.models import CrateConfig

GPT2_VOCABULARY = 50304
"""GPT-2's 50257 tokens padded to a multiple of 64, as in the paper."""


SIZES = {"1l": (128, 4, 1), "2l": (128, 4, 2), "3l": (128, 4, 3), "s": (768, 12, 6), "b": (768, 12, 12)}
"""Width d, heads K and layers L; the hidden layer of the paper's families has 4 d neurons."""
_SPARSE = {
    **{"feed_forward": "lista", "ista_steps": 1, "ista_step_size": 1.0, "ista_lambda": 1.5},
    **{"ista_skip": True, "ista_tied": False, "code_penalty": 0.001},
}
_MLP = {"attention": "mhsa", "feed_forward": "mlp", "ista_skip": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "crate": {},
    "crate-lag": {"lag": True},
    "crate-h": _SPARSE | {"ista_expansion": 5},
    "crate-h-lag": _SPARSE | {"ista_expansion": 5, "lag": True},
    "gpt2": {},
    "gpt2-lag": _MLP | {"lag": True},
    "gpt2-h": _SPARSE | {"attention": "mhsa"},
    "gpt2-h-lag": _SPARSE | {"attention": "mhsa", "lag": True},
}
"""What each family changes of CrateConfig; `gpt2` alone is transformers' own class. The block of all but the two with
CRATE's feed-forward block has GPT-2's number of parameters within 1 % (docs/math.md)."""
CRATE_FIELDS = tuple(name for name in CrateConfig.__annotations__ if not hasattr(GPT2Config, name))
"""Fields that transformers' GPT-2 has not: what a variant of CRATE changes, by `--crate`."""
_OF_DICTIONARIES = {
    *("ista_steps", "ista_step_size", "ista_step_learned", "ista_lambda", "ista_tied", "ista_gain"),
    "reconstruction_weight",
}
_OF_THRESHOLDS = {"density_low", "density_high", "homeostasis_rate"}
_BOOLS = {"true": True, "false": False}
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
        UserError: unknown preset or field, one that does nothing there, or `crate` with a GPT-2 preset.
    """
    family, _, size = preset.rpartition("-")
    if preset not in PRESETS:
        names = f"a family ({', '.join(FAMILIES)}) and a size ({', '.join(SIZES)}), such as crate-2l"
        raise UserError(f"no preset {preset!r:.60}; give {names}")
    shape: dict[str, Any] = dict(zip(("n_embd", "n_head", "n_layer"), SIZES[size], strict=True))
    shape |= {"vocab_size": vocab_size, "n_positions": context, "bos_token_id": eos_id, "eos_token_id": eos_id}
    if family != "gpt2":
        try:
            config = CrateConfig(**shape, **FAMILIES[family] | _parse_crate(crate or {}))
        except StrictDataclassError as error:
            raise UserError(f"{preset}: {last_line(error)}") from error
        _refuse_idle(crate or {}, config.feed_forward)
        return config
    if crate:
        raise UserError(f"{preset} has no CRATE fields; leave out {', '.join(crate)}")
    # Everything but attention and feed-forward block as in CRATE: no dropout, same initialisation, tied head.
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "loss_type": "ForCausalLM"}
    return GPT2Config(**shape, activation_function="relu")


def _refuse_idle(fields: dict[str, str], block: str) -> None:
    """Raises UserError for a field that changes nothing where this is the feed-forward block."""
    idle = (_OF_THRESHOLDS if block != "lista" else set()) | (_OF_DICTIONARIES if block == "mlp" else set())
    for name in fields:
        if name in idle:
            raise UserError(f"--crate {name}: does nothing in a model with feed_forward = {block}; leave it out")


def _parse_crate(fields: dict[str, str]) -> dict[str, Any]:
    """Turn text into the types of the paper's defaults."""
    defaults = CrateConfig()
    parsed: dict[str, Any] = {}
    for name, text in fields.items():
        if name not in CRATE_FIELDS:
            raise UserError(f"--crate: CRATE has no field {name!r:.60}; choose from {', '.join(CRATE_FIELDS)}")
        default = getattr(defaults, name)
        try:
            parsed[name] = _BOOLS[str(text).lower()] if isinstance(default, bool) else type(default)(text)
        except (ValueError, KeyError) as error:
            raise UserError(f"--crate {name} = {text!r:.60} is not a {type(default).__name__}") from error
    return parsed


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Build a model with random weights that depend on `seed` alone; the caller's random state is untouched."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

"""What a model writes after a prompt, steered beside plain, and how far the edits move its predictions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cratescope.errors import UserError, as_user_error
from cratescope.files import write_json
from cratescope.lm.head import plain_pass
from cratescope.lm.load import load_model
from cratescope.models.folder import longest_context
from cratescope.neurons.coded import site_of
from cratescope.neurons.config import SteerConfig
from cratescope.neurons.spelled import read_edit
from cratescope.neurons.steer import Edit, in_raw_units, steered
from cratescope.run import Run
from cratescope.text.tokenizer import encode, token_strings

SHOWN = 10
"""Tokens whose logits rise or fall most."""


@dataclass(frozen=True)
class TokenChange:
    """How far the edits move the logit of one token, and its probability without and with them."""

    token: int
    text: str
    change: float
    plain: float
    steered: float


@dataclass(frozen=True)
class Continuations:
    """Text after a prompt, by the same model plain and steered.

    edits: as they were written. rises, falls: tokens whose logits change most at the last token of the prompt, the
    largest changes first. kl_prompt: KL(steered || plain) of the prediction there, in nats. kl_generated: its mean over
    the `generated` tokens of the steered text, of what either model predicts after each.
    """

    prompt: str
    edits: tuple[str, ...]
    plain: str
    steered: str
    rises: tuple[TokenChange, ...]
    falls: tuple[TokenChange, ...]
    kl_prompt: float
    kl_generated: float
    generated: int


def steer(config: SteerConfig) -> Continuations:
    """Write on after a prompt with and without the edits.

    Raises:
        UserError: an edit that cannot be read or made, an empty or too long prompt, or logits that are not finite.
    """
    run = Run(config.run)
    written = (*config.edit, *([f"{config.neuron}={config.set}"] if config.neuron else []))
    if not written:
        raise UserError("--edit: name at least one, such as 1:37=4x, or a --neuron such as 1:37")
    model = load_model(run, config.device)
    site = functools.cache(lambda name: site_of(run, name or config.site, model, replace=config.sae == "replace"))
    edits = in_raw_units(run, [read_edit(text, site) for text in written])
    ids = _prompt_ids(config, run, model)
    found = _compared(dataclasses.replace(config, edit=written), run, model, edits, ids)
    if config.json:
        write_json(config.json, dataclasses.asdict(found))
    return found


def _prompt_ids(config: SteerConfig, run: Run, model: PreTrainedModel) -> Int64[Tensor, "1 t"]:
    [ids] = encode(run.tokenizer, [config.prompt])
    longest = longest_context(model.config)
    if not ids:
        raise UserError("--prompt: has no token; give some text")
    if longest and len(ids) + config.tokens > longest:
        raise UserError(
            f"--prompt of {len(ids)} tokens and --tokens {config.tokens} are more than the {longest} tokens of this "
            "model; give fewer"
        )
    return torch.tensor([ids], device=model.device)


@torch.no_grad()
def _compared(
    config: SteerConfig, run: Run, model: PreTrainedModel, edits: Sequence[Edit], ids: Int64[Tensor, "1 t"]
) -> Continuations:
    n = ids.shape[1]
    before, after = (_logits(model, made, ids, n)[-1] for made in ([], edits))
    plain, other = (_written(config, model, made, ids) for made in ([], edits))
    q, p = (_logits(model, made, other, n)[n:].log_softmax(-1) for made in ([], edits))
    return Continuations(
        prompt=config.prompt,
        edits=config.edit,
        plain=str(run.tokenizer.decode(plain[0, n:])),
        steered=str(run.tokenizer.decode(other[0, n:])),
        rises=_most(run, before, after, largest=True),
        falls=_most(run, before, after, largest=False),
        kl_prompt=float(_kl(after.log_softmax(-1), before.log_softmax(-1))),
        kl_generated=float(_kl(p, q).mean()),
        generated=other.shape[1] - n,
    )


def _logits(
    model: PreTrainedModel, edits: Sequence[Edit], ids: Int64[Tensor, "1 t"], prompt: int
) -> Float64[Tensor, "t v"]:
    """Logits after every token, with the edits made. UserError: they are not finite."""
    with steered(model, edits, prompt):
        found = plain_pass(model, ids).logits[0].double()
    if not found.isfinite().all():
        what = "with these edits " if edits else ""
        raise UserError(f"{what}the model's logits are not finite; give smaller numbers, or another model")
    return found


def _kl(p: Float64[Tensor, "*t v"], q: Float64[Tensor, "*t v"]) -> Float64[Tensor, "*t"]:
    """KL(p || q) in nats, of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _most(
    run: Run, before: Float64[Tensor, " v"], after: Float64[Tensor, " v"], largest: bool
) -> tuple[TokenChange, ...]:
    """Tokens whose logits change most in one direction, from `before` to `after`."""
    change, plain, other = after - before, before.softmax(-1), after.softmax(-1)
    top = change.topk(min(SHOWN, len(change)), largest=largest).indices.tolist()
    strings = token_strings(run.tokenizer, top)
    return tuple(
        TokenChange(token, text, float(change[token]), float(plain[token]), float(other[token]))
        for token, text in zip(top, strings, strict=True)
    )


def _written(config: SteerConfig, model: Any, edits: Sequence[Edit], ids: Int64[Tensor, "1 t"]) -> Int64[Tensor, "1 s"]:
    """The prompt and what the model writes after it; the same seed for plain and steered text."""
    if not model.can_generate():
        raise UserError(f"a {model.config.model_type} model does not write text; give a causal language model")
    end = model.generation_config.eos_token_id
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0} if config.temperature else {}
    settings = GenerationConfig(
        **{"max_new_tokens": config.tokens, "do_sample": False} | sampling,
        **{"eos_token_id": end, "pad_token_id": end[0] if isinstance(end, list) else end},
    )
    model.generation_config = settings  # what the folder says of sampling would be filled in
    with torch.random.fork_rng(), steered(model, edits, ids.shape[1]):
        torch.manual_seed(config.seed)
        with as_user_error("no text can be written", "give smaller numbers, or fewer --tokens", RuntimeError):
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

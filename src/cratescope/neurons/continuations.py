"""What a model writes after a prompt, steered beside plain, and how far the edits move its predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

Kind = Literal["plain", "steered"]
Heard = Callable[[Kind, int, float], None]
"""Is told of a token that was written, and of its log-probability."""
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
    largest changes first; likelier: those whose probabilities rise most there. kl_prompt: KL(steered || plain) of the
    prediction there, in nats. kl_generated: its mean over the `generated` tokens of the steered text, of what either
    model predicts after each.
    """

    prompt: str
    edits: tuple[str, ...]
    plain: str
    steered: str
    rises: tuple[TokenChange, ...]
    falls: tuple[TokenChange, ...]
    likelier: tuple[TokenChange, ...]
    kl_prompt: float
    kl_generated: float
    generated: int


def steer(config: SteerConfig) -> Continuations:
    """Write on after a prompt with and without the edits.

    Raises:
        UserError: an edit that cannot be read or made, an empty or too long prompt, or logits that are not finite.
    """
    if config.neuron:
        config = dataclasses.replace(config, edit=(*config.edit, f"{config.neuron}={config.set}"), neuron=None)
    if not config.edit:
        raise UserError("--edit: name at least one, such as 1:37=4x, or a --neuron such as 1:37")
    run = Run(config.run)
    found = continuations(config, run, load_model(run, config.device))
    if config.json:
        write_json(config.json, dataclasses.asdict(found))
    return found


def continuations(config: SteerConfig, run: Run, model: PreTrainedModel, heard: Heard | None = None) -> Continuations:
    """What `run`'s model writes, plain and then steered; the model is left as it was, and so is the random generator.

    heard: is told of every token as soon as it is written; what it raises ends the writing. Errors as of `steer`.
    """
    site = functools.cache(lambda name: site_of(run, name or config.site, model, replace=config.sae == "replace"))
    edits = in_raw_units(run, [read_edit(text, site) for text in config.edit])
    return _compared(config, run, model, edits, _prompt_ids(config, run, model), heard)


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
    config: SteerConfig,
    run: Run,
    model: PreTrainedModel,
    edits: Sequence[Edit],
    ids: Int64[Tensor, "1 t"],
    heard: Heard | None,
) -> Continuations:
    n = ids.shape[1]
    before, after = (_logits(model, made, ids, n)[-1] for made in ([], edits))
    by_kind: dict[Kind, Sequence[Edit]] = {"plain": [], "steered": edits}
    written = {
        kind: _written(config, model, made, ids, heard and _Listener(functools.partial(heard, kind)))
        for kind, made in by_kind.items()
    }
    plain, other = written["plain"], written["steered"]
    q, p = (_logits(model, made, other, n)[n:].log_softmax(-1) for made in ([], edits))
    return Continuations(
        prompt=config.prompt,
        edits=config.edit,
        plain=str(run.tokenizer.decode(plain[0, n:])),
        steered=str(run.tokenizer.decode(other[0, n:])),
        rises=_most(run, before, after, after - before),
        falls=_most(run, before, after, before - after),
        likelier=_most(run, before, after, after.softmax(-1) - before.softmax(-1)),
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
    run: Run, before: Float64[Tensor, " v"], after: Float64[Tensor, " v"], by: Float64[Tensor, " v"]
) -> tuple[TokenChange, ...]:
    """The tokens of the largest `by`, with how their logits change from `before` to `after`."""
    change, plain, other = after - before, before.softmax(-1), after.softmax(-1)
    top = by.topk(min(SHOWN, len(by))).indices.tolist()
    strings = token_strings(run.tokenizer, top)
    return tuple(
        TokenChange(token, text, float(change[token]), float(plain[token]), float(other[token]))
        for token, text in zip(top, strings, strict=True)
    )


class _Listener:
    """Tells of every token that `generate` writes, with its log-probability: its processor of logits and its streamer.

    Processors of ours come before those that change the logits for drawing.
    """

    def __init__(self, heard: Callable[[int, float], None]) -> None:
        self.heard = heard
        self.predicted: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.predicted = scores[0].float().log_softmax(-1)
        return scores

    def put(self, tokens: Tensor) -> None:
        if self.predicted is not None:  # before, it is the prompt
            token = int(tokens.flatten()[-1])
            self.heard(token, float(self.predicted[token]))

    def end(self) -> None: ...


def _written(
    config: SteerConfig, model: Any, edits: Sequence[Edit], ids: Int64[Tensor, "1 t"], listener: _Listener | None
) -> Int64[Tensor, "1 s"]:
    """The prompt and what the model writes after it; the same seed for plain and steered text."""
    if not model.can_generate():
        raise UserError(f"a {model.config.model_type} model does not write text; give a causal language model")
    end = model.generation_config.eos_token_id
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0} if config.temperature else {}
    settings = GenerationConfig(
        **{"max_new_tokens": config.tokens, "do_sample": False} | sampling,
        **{"eos_token_id": end, "pad_token_id": end[0] if isinstance(end, list) else end},
    )
    listening = {"streamer": listener, "logits_processor": [listener]} if listener else {}
    with _generating(model, settings), torch.random.fork_rng(), steered(model, edits, ids.shape[1]):
        torch.manual_seed(config.seed)
        with as_user_error("no text can be written", "give smaller numbers, or fewer --tokens", RuntimeError):
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **listening)


@contextlib.contextmanager
def _generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """While open, these are the model's own settings; what its folder says of sampling would else be filled in."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own

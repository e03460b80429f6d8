"""Losses of a model's own logits in bounded memory, including what its head does besides a matrix product.

Heads have biases (Phi, GPT-J), scale their logits (Cohere, Granite) or cap them (Gemma 2), each in the code of its own
model. So whether a head is plain is found by a trial on the model, not looked up in a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional as F

from cratescope.errors import UserError
from cratescope.lm.loss import CHUNK, token_losses

Way = Literal["product", "own", "whole"]
SCALES = (0.0, 1.0, 30.0, 1e4)
"""Largest logits of the trial: biases are all there is at 0, and caps, far below what a trial on text would show at 1,
change everything at 10,000."""
EXACT, ROUNDED = 2e-5, 2e-2
"""Differences between logits, by the largest of their row, that rounding explains: of float32, of narrower formats."""
LAST_TOKENS = 3
"""Other last tokens of the trial that tells whether a model sees tokens ahead."""
UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model's own code may raise when it is run in a way that is not its own."""


@dataclass(frozen=True)
class Head:
    """The way to compute the logits of a causal model.

    way: `product`, last hidden state x weight, which never exists as a whole (loss.py); `own`, what goes into the head
    is kept, and the model's own forward pass is run on one token with a part of it put into the head; `whole`, the
    model's logits as they are, a row at a time.
    """

    model: Any
    way: Way

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: Int[torch.Tensor, "b t"]) -> Head:
        """Find the first way that reproduces the model's own logits on `tokens`, a few tokens of the text.

        Raises UserError for a model that sees the tokens that it is to predict.
        """
        if looks_ahead(model, tokens):
            raise UserError(
                f"a {model.config.model_type} model as it is configured here sees the tokens that it is to predict; "
                "give a causal language model"
            )
        own, logits = cls(model, "own"), plain_pass(model, tokens).logits
        # In another order than the text's: `losses` puts parts of several rows into the head.
        if not _holds(lambda: alike(own._logits(own._states(tokens).flip(1)), logits.flip(1))):
            return cls(model, "whole")
        return cls(model, "product") if _holds(lambda: own._is_product(tokens)) else own

    @torch.no_grad()
    def losses(
        self, tokens: Int[torch.Tensor, "b t"], labels: Int[torch.Tensor, "b t"], asked: Bool[torch.Tensor, "b t"]
    ) -> tuple[Float[torch.Tensor, "b t"], Bool[torch.Tensor, "b t"]]:
        """Nats of every label given the tokens before it in its row; where `asked`, whether it is the likeliest.

        Labels and logits are compared in float32 at least, whatever the model computes in.
        """
        if self.way == "whole" and len(tokens) > 1:
            rows = zip(tokens.split(1), labels.split(1), asked.split(1), strict=True)
            found = [self.losses(*row) for row in rows]
            return torch.cat([nats for nats, _ in found]), torch.cat([right for _, right in found])
        states = self._states(tokens)
        right = torch.zeros_like(asked)
        if asked.any():
            right[asked] = self._logits(states[asked]).argmax(-1) == labels[asked]
        if self.way == "product":
            weight = self.model.get_output_embeddings().weight
            return token_losses(states.flatten(0, 1), weight, labels.flatten()).view(labels.shape), right
        chunks = zip(states.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True)
        losses = [F.cross_entropy(_wide(self._logits(rows)), label, reduction="none") for rows, label in chunks]
        return torch.cat(losses).view(labels.shape), right

    def _states(self, tokens: Int[torch.Tensor, "b t"]) -> Float[torch.Tensor, "b t d"]:
        """The states that `_logits` turns into logits."""
        if self.way == "product":
            return plain_pass(self.model.base_model, tokens).last_hidden_state
        if self.way == "whole":
            return plain_pass(self.model, tokens).logits
        kept: list[torch.Tensor] = []

        def keep(_module: Any, inputs: Any) -> Any:
            kept.append(inputs[0])
            return (inputs[0][:, :1], *inputs[1:])  # the logits of this pass are not used

        _hooked(self.model, keep, tokens)
        (states,) = kept
        return states

    def _logits(self, states: Float[torch.Tensor, "*n d"]) -> Float[torch.Tensor, "*n v"]:
        if self.way == "whole":
            return states
        if self.way == "product":
            return states @ self.model.get_output_embeddings().weight.t()
        rows = states.reshape(1, -1, states.shape[-1])
        token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
        found = _hooked(self.model, lambda _module, inputs: (rows, *inputs[1:]), token).logits
        return found.reshape(*states.shape[:-1], -1)

    def _is_product(self, tokens: Int[torch.Tensor, "b t"]) -> bool:
        """Whether the model's logits are the last hidden states times the head's weight, and nothing else.

        False for narrow formats, where the product of loss.py rounds differently from the model.
        """
        weight = self.model.get_output_embeddings().weight
        if weight.dtype.itemsize < 4 or not alike(Head(self.model, "product")._states(tokens), self._states(tokens)):
            return False
        chance = torch.Generator().manual_seed(0)
        rows = torch.randn(4, weight.shape[1], generator=chance).to(weight)
        largest = (rows @ weight.t()).abs().max()
        if not largest > 0:
            return False
        probes = torch.cat([rows * (scale / largest) for scale in SCALES])
        return alike(self._logits(probes), probes @ weight.t())


@torch.no_grad()
def looks_ahead(model: Any, tokens: Int[torch.Tensor, "b t"]) -> bool:
    """A trial: does any output before the last token depend on it, as in BERT and other encoders?

    It has to do so for several last tokens: by itself, rounding may send one token to another expert.
    """
    last = tokens[:, -1:]
    logits = plain_pass(model, tokens).logits[:, :-1]
    for step in range(LAST_TOKENS):
        other = torch.cat([tokens[:, :-1], torch.where(last == step, LAST_TOKENS, step)], 1)
        if alike(plain_pass(model, other).logits[:, :-1], logits, 5):
            return False
    return True


def plain_pass(module: Any, tokens: Int[torch.Tensor, "b t"]) -> Any:
    """A plain forward pass; a cache would only take memory, and some models fail with it."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return module(tokens, **({"use_cache": False} if takes_any or "use_cache" in parameters else {}))


def _hooked(model: Any, hook: Callable[[Any, Any], Any], tokens: Int[torch.Tensor, "b t"]) -> Any:
    """Run a plain forward pass in which `hook` replaces the input of the head."""
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        return plain_pass(model, tokens)
    finally:
        handle.remove()


def _holds(trial: Callable[[], bool]) -> bool:
    try:
        return trial()
    except UNFIT:
        return False


def alike(one: torch.Tensor, other: torch.Tensor, times: int = 1) -> bool:
    """Whether they are equal up to a multiple of the rounding error, relative to the largest value of each row."""
    tolerance = times * (EXACT if one.dtype.itemsize >= 4 else ROUNDED)
    if one.shape != other.shape:
        return False
    one, other = _wide(one), _wide(other)
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0, one - other).abs().amax(-1)
    return bool((apart <= tolerance * other.nan_to_num(0, 0, 0).abs().amax(-1)).all())


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))

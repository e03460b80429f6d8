"""Predictions after a text whose last token has one neuron forced, of many neurons in one pass.

Only the last token differs between neurons, and in a causal model nothing before it can see it. So the tokens before
are read once, and their cache is repeated for as many rows as there are neurons: a row costs one token. Models whose
cache cannot be repeated, or does not give what a plain pass gives, read the whole text in every row: a trial tells.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.lm.head import UNFIT, alike
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.sites import Site, hooked, read_site

TRIAL_ROWS, TIMES = 3, 3
"""Neurons of the trial, and how many times the rounding error of one pass they may be off."""


@dataclass(frozen=True, eq=False)
class Read:
    """A text as it is: logits and activations at its last token, and the cache of all before it where that is used."""

    tokens: Int64[Tensor, "1 t"]
    cache: Any
    logits: Float32[Tensor, " V"]
    neurons: Float32[Tensor, " m"]


class Forced:
    """A layer's neurons at a site, to be forced at the last token of texts.

    Features of autoencoders are edited as a difference: what the autoencoder does not reconstruct stays.
    """

    def __init__(self, model: PreTrainedModel, site: Site, layer: int) -> None:
        self._model: Any = model
        self._site, self._layer = site, layer
        keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._last = {"logits_to_keep": 1} if keeps else {}
        self.cached: bool | None = None
        """Whether tokens before the last come from a cache; None before the trial."""

    @cached_property
    def _coder(self) -> Any:
        if not isinstance(self._site, CodedSite):
            return None
        return self._site.coders[self._layer].to(self._model.device)

    @cached_property
    def _read_at(self) -> Site:
        """The module that is edited: an autoencoder's decoder row is added where its input is."""
        return Site(self._site.name, self._site.pattern) if self._coder else self._site

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Read:
        """A text of at least 1 token. The first one decides, by a trial, whether caches are used."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        found = self._read(ids, bool(self.cached))
        if self.cached is None:
            self.cached = self._cache_holds(found)
            found = self._read(ids, True) if self.cached else found
        if not found.logits.isfinite().all():
            raise UserError("the model's logits are not finite; it is not usable, or needs --dtype float32")
        return found

    def _read(self, ids: Int64[Tensor, "1 t"], cached: bool) -> Read:
        cache = None
        if cached and ids.shape[1] > 1:
            cache = self._model(ids[:, :-1], use_cache=True, **self._last).past_key_values
        with read_site(self._model, self._site, [self._layer]) as seen:
            logits = self._pass(ids, cache, 1)[0]
        return Read(ids, cache, logits, seen[self._layer][0, -1].float())

    def _cache_holds(self, plain: Read) -> bool:
        """A trial on a few neurons, forced to a number that is large among them."""
        m = len(plain.neurons)
        index = torch.linspace(0, m - 1, min(TRIAL_ROWS, m)).long()
        value = (plain.neurons.abs().max() + 1).expand(len(index))
        try:
            cached = self._read(plain.tokens, True)
            return alike(self.logits(cached, index, value), self.logits(plain, index, value), TIMES)
        except UNFIT:
            return False

    @torch.no_grad()
    def logits(self, read: Read, index: Int64[Tensor, " n"], value: Float[Tensor, " n"]) -> Float32[Tensor, "n V"]:
        """Logits after the last token, in each row with one neuron set to a value there.

        Raises:
            UserError: a number beyond the range of the model's format, or logits that are not finite.
        """
        index, value = index.to(read.logits.device), value.to(read.logits.device, torch.float32)
        with self._forcing(read, index, value):
            found = self._pass(read.tokens, read.cache, len(index))
        wrong = (~found.sum(1).isfinite()).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{self._site.name}/{self._layer}:{int(index[first])} set to {float(value[first]):.4g} makes the "
                "model's logits infinite or NaN; give a smaller --strength, or --dtype float32"
            )
        return found

    @contextmanager
    def _forcing(self, read: Read, index: Int64[Tensor, " n"], value: Float[Tensor, " n"]) -> Iterator[None]:
        rows = torch.arange(len(index), device=index.device)

        def visit(_layer: int, x: Tensor) -> Tensor:
            x = x.clone()
            if self._coder:
                move = (value - read.neurons[index])[:, None] * self._coder.decoder[index]
                x[:, -1] = (x[:, -1] + move).to(x.dtype)
            else:
                x[rows, -1, index] = value.to(x.dtype)
            return x

        with hooked(self._model, self._read_at, [self._layer], visit):
            yield

    def _pass(self, ids: Int64[Tensor, "1 t"], cache: Any, n: int) -> Float32[Tensor, "n V"]:
        """Logits after the last token of n copies of a text."""
        given: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache = copy.deepcopy(cache)  # a pass makes it longer
            cache.batch_repeat_interleave(n)
            ids, given = ids[:, -1:], {"use_cache": True, "past_key_values": cache}
        return self._model(ids.expand(n, -1), **given, **self._last).logits[:, -1].float()

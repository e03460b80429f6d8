"""One edit for each row of a batch: many units, strengths and directions in one forward pass.

`steered` (neurons/steer.py) makes a list of edits in every row. Here each row has one of its own, and what it changes
may be written along another direction than the unit's, which is what a control of the same norm is. For a row whose
direction is the unit's own the two are the same.

On a fixed text nothing before the edit depends on it. So the blocks up to its layer are run once, and for every edit
the passes go on behind them (`Tail`), where a trial shows that this gives the same.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from cratescope.lm.head import UNFIT, alike
from cratescope.models.sae import SparseCoder
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.sites import Site, blocks_of, hooked

Push = Literal["set", "add"]


@dataclass(frozen=True, eq=False)
class Pushes:
    """What is done to each of b rows at one layer of a site, at every token.

    Unit `index` (b,) of the row is set to `value` (b,), or that is added to it, and the change times `along` (b, h) is
    added to the activations h of the site's module: `written` (b, d) is what this adds to the residual stream per unit.
    Where `along` is 0 nothing happens, except that a coded site that replaces the activations still does so.
    """

    site: Site
    layer: int
    index: Int64[Tensor, " b"]
    value: Float[Tensor, " b"]
    along: Float[Tensor, "b h"]
    written: Float[Tensor, "b d"]
    operation: Push = "set"

    def only(self, rows: slice | Tensor) -> Pushes:
        """Some of the rows."""
        names = ("index", "value", "along", "written")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def repeated(self, n: int) -> Pushes:
        """Each row n times, one after the other."""
        return self.only(torch.arange(len(self.index)).repeat_interleave(n))

    def applied(self, x: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """The activations x of the module after the edits."""
        change = self.change(seen(self.site, self.layer, x, self.index))
        kept = reconstructed(self.site, self.layer, x)
        return torch.addcmul(kept, change.to(x)[..., None], self.along.to(x)[:, None])

    def change(self, units: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """By how much the unit of each row changes."""
        value = self.value.to(units)[:, None]
        return value.expand_as(units) if self.operation == "add" else value - units


def seen(site: Site, layer: int, x: Float[Tensor, "b t h"], index: Int64[Tensor, " b"]) -> Float[Tensor, "b t"]:
    """Activations of one unit in each row, of the activations x of the site's module."""
    index, coder = index.to(x.device), _coder(site, layer, x)
    if coder is not None and coder.config.by_threshold:  # a feature depends on no other
        found = (
            torch.einsum("bth,bh->bt", x.float() - coder.bias, coder.encoder[index]) + coder.encoder_bias[index, None]
        )
        return found.relu() * (found > coder.threshold[index, None])
    units = x if coder is None else coder.encode(x)
    return units.gather(-1, index[:, None, None].expand(-1, x.shape[1], 1))[..., 0]


def reconstructed(site: Site, layer: int, x: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
    """What a change is added to: the activations x, or what the autoencoder makes of them if that replaces them."""
    coder = _coder(site, layer, x)
    return coder(x).to(x) if coder is not None and isinstance(site, CodedSite) and site.replace else x


def _coder(site: Site, layer: int, x: Tensor) -> SparseCoder | None:
    return site.coders[layer].to(x.device) if isinstance(site, CodedSite) else None


def module_of(site: Site) -> Site:
    """The site of the activations themselves, where `site` is that of their features."""
    return Site(site.name, site.pattern)


@contextlib.contextmanager
def pushed(model: PreTrainedModel, pushes: Pushes) -> Iterator[None]:
    """While open, every forward pass of as many rows runs with the edits made. Errors as of the site's `module`."""
    with hooked(model, module_of(pushes.site), [pushes.layer], lambda _layer, x: pushes.applied(x)):
        yield


def logits_of(model: Any, tokens: Int64[Tensor, "b t"], last: int, **given: Any) -> Any:
    """The output of a pass, with logits of the last tokens only, where the model can leave out the others."""
    parameters = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": last} if "logits_to_keep" in parameters else {}
    found = model(tokens, **keep, **given)
    found.logits = found.logits[:, -last:]
    return found


class Tail:
    """Passes over texts (c, t) with one edit each, of one layer of a site; logits are those of the `last` tokens.

    trial: edits, by which is found whether the passes can go on from behind the layer's block.
    """

    def __init__(
        self, model: PreTrainedModel, site: Site, layer: int, tokens: Int64[Tensor, "c t"], last: int, trial: Pushes
    ) -> None:
        self._model, self._site, self._layer = model, site, layer
        self._tokens, self._last = tokens, last
        self._short = False
        with contextlib.suppress(*UNFIT):
            self._activations, self._states, self._given = self._read()
            self._short = alike(self._behind(trial), self._whole(trial), 5)

    def logits(self, pushes: Pushes) -> Float[Tensor, "b c l v"]:
        """Logits of each text with each edit."""
        found = self._behind(pushes) if self._short else self._whole(pushes)
        return found.view(len(pushes.index), len(self._tokens), *found.shape[1:])

    @torch.no_grad()
    def _read(self) -> tuple[Float[Tensor, "c t h"], Float[Tensor, "c t d"], Any]:
        """The site's activations, what its block gives where no unit is changed, and that as the block gives it."""
        found: list[Any] = []

        def visit(layer: int, x: Tensor) -> Tensor:
            found.append(x)
            return reconstructed(self._site, layer, x)

        block = blocks_of(self._model)[1][self._layer]
        handle = block.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        try:
            with hooked(self._model, module_of(self._site), [self._layer], visit):
                logits_of(self._model, self._tokens, 1, use_cache=False)
        finally:
            handle.remove()
        activations, given = found
        return activations, given[0] if isinstance(given, tuple) else given, given

    @torch.no_grad()
    def _behind(self, pushes: Pushes) -> Float[Tensor, "n l v"]:
        n, c = len(pushes.index), len(self._tokens)
        rows = pushes.repeated(c)
        change = rows.change(seen(self._site, self._layer, self._activations.repeat(n, 1, 1), rows.index))
        states = self._states.repeat(n, 1, 1)
        states = torch.addcmul(states, change.to(states)[..., None], rows.written.to(states)[:, None])
        with self._resumed(states):
            return logits_of(self._model, self._tokens.repeat(n, 1), self._last, use_cache=False).logits

    @contextlib.contextmanager
    def _resumed(self, states: Float[Tensor, "n t d"]) -> Iterator[None]:
        """While open, the blocks up to the layer compute nothing, and give these states."""
        given = (states, *self._given[1:]) if isinstance(self._given, tuple) else states
        blocks: Any = blocks_of(self._model)[1][: self._layer + 1]
        for block in blocks:
            block.forward = lambda *_, **__: given
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @torch.no_grad()
    def _whole(self, pushes: Pushes) -> Float[Tensor, "n l v"]:
        n, c = len(pushes.index), len(self._tokens)
        with pushed(self._model, pushes.repeated(c)):
            return logits_of(self._model, self._tokens.repeat(n, 1), self._last, use_cache=False).logits

"""Where neurons live: a module of any Hugging Face causal LM whose output hooks read or edit.

A site is a module path with {layer} in it, such as `transformer.h.{layer}.mlp.act`; its output is (b, t, h) and its
last axis are the neurons.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cratescope.run import UserError


@dataclass(frozen=True)
class Site:
    """`name` is used for files, `pattern` is the module path with {layer}."""

    name: str
    pattern: str

    def module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The module of a layer.

        Raises:
            UserError: the layer is out of range, or no module has this path; names the nearest paths.
        """
        n_layers = model.config.num_hidden_layers
        if not 0 <= layer < n_layers:
            raise UserError(f"layer {layer} is out of range; this model has layers 0 to {n_layers - 1}")
        path = self.pattern.format(layer=layer)
        modules = dict(model.named_modules())
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
            raise UserError(f"this model has no module {path!r}; nearest: {', '.join(near) or 'none'}")
        return modules[path]


# The neurons the paper explains: CRATE's codes A_t, GPT-2's MLP activations after the ReLU.
BUILT_IN = {
    "crate": Site("codes", "transformer.h.{layer}.ista.codes"),
    "gpt2": Site("mlp", "transformer.h.{layer}.mlp.act"),
}


def site_named(name: str, kind: str) -> Site:
    """`auto` (the built-in site of this `model_type`), a built-in site's name, or a pattern with {layer}.

    Raises:
        UserError: no such site.
    """
    if "{layer}" in name:
        return Site(name.replace("{layer}", "N"), name)
    built_in = BUILT_IN.get(kind)
    if built_in is not None and name in ("auto", built_in.name):
        return built_in
    known = f"'{built_in.name}'" if built_in else "no built-in site"
    raise UserError(f"no site {name!r} for a {kind} model (it has {known}); give a module path with {{layer}} in it")


@contextlib.contextmanager
def read_site(model: PreTrainedModel, site: Site, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass leaves each layer's activations (b, t, h) in the yielded dict."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UserError(f"site {site.pattern} gives a {type(output).__name__}; name a module that gives a tensor")
        found[layer] = output

    handles = [
        site.module(model, layer).register_forward_hook(lambda module, inputs, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Intervention:
    """Force one neuron to `value` at every position (paper section 7, steering)."""

    site: Site
    layer: int
    index: int
    value: float


@contextlib.contextmanager
def intervene(model: PreTrainedModel, *interventions: Intervention) -> Iterator[None]:
    """While open, every forward pass runs with the neurons forced; the model itself is not changed.

    Raises:
        UserError: layer or index out of range (the index is known only in the forward pass).
    """

    def hook_of(force: Intervention):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if not 0 <= force.index < output.shape[-1]:
                raise UserError(f"neuron {force.index} is out of range; layer {force.layer} has {output.shape[-1]}")
            edited = output.clone()
            edited[..., force.index] = force.value
            return edited

        return hook

    handles = [force.site.module(model, force.layer).register_forward_hook(hook_of(force)) for force in interventions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

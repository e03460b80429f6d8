"""Where neurons live: a module of any Hugging Face causal LM whose activations hooks read or edit.

A site is a module path with {layer} in it, such as `transformer.h.{layer}.mlp.act`; what the module gives is (b, t, h)
and its last axis are the neurons. With `:input` behind the path it is what the module is given.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cratescope.run import UserError

INPUT = ":input"
Visit = Callable[[int, Tensor], Tensor | None]
"""Sees a layer's activations (b, t, h); a tensor it returns takes their place."""


@dataclass(frozen=True)
class Site:
    """`name` is used for files, `pattern` is the module path with {layer}, with `:input` for the module's input."""

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
        path = self.pattern.removesuffix(INPUT).replace("{layer}", str(layer))
        modules = dict(model.named_modules())
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
            raise UserError(f"this model has no module {path!r}; nearest: {', '.join(near) or 'none'}")
        return modules[path]

    def hook(self, model: PreTrainedModel, layer: int, visit: Visit) -> Any:
        """Have `visit` see this layer in every forward pass, until the handle returned is removed."""

        def on_input(module: nn.Module, inputs: tuple) -> Any:
            edited = visit(layer, self._activations(inputs))
            return None if edited is None else (edited, *inputs[1:])

        def on_output(module: nn.Module, inputs: tuple, output: Any) -> Any:
            edited = visit(layer, self._activations(output))
            if edited is None or isinstance(output, Tensor):
                return edited
            return (edited, *output[1:])

        module = self.module(model, layer)
        if self.pattern.endswith(INPUT):
            return module.register_forward_pre_hook(on_input)
        return module.register_forward_hook(on_output)

    def _activations(self, found: Any) -> Tensor:
        """The tensor itself, or the first of a tuple, such as an attention's (output, weights)."""
        if isinstance(found, tuple) and found:
            found = found[0]
        if not isinstance(found, Tensor) or found.ndim != 3:
            kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"site {self.pattern} has a {kind}; name a module with a tensor (batch, tokens, neurons)")
        return found


def _llama(layer: str) -> dict[str, str]:
    """Gated MLPs: a neuron is what the down projection is given, the activation times its gate."""
    return {"mlp": f"{layer}.mlp.down_proj{INPUT}", "attention": f"{layer}.self_attn", "residual": layer}


_CRATE, _NEOX, _LLAMA = "transformer.h.{layer}", "gpt_neox.layers.{layer}", "model.layers.{layer}"
BUILT_IN: dict[str, dict[str, str]] = {
    # The neurons the paper explains come first: CRATE's codes A_t, GPT-2's MLP activations after the ReLU.
    "crate": {
        "codes": f"{_CRATE}.ista.codes",
        "first_codes": f"{_CRATE}.ista.first_codes",
        "attention": f"{_CRATE}.mssa",
        "residual": _CRATE,
    },
    "gpt2": {"mlp": f"{_CRATE}.mlp.act", "attention": f"{_CRATE}.attn", "residual": _CRATE},
    "gpt_neox": {"mlp": f"{_NEOX}.mlp.act", "attention": f"{_NEOX}.attention", "residual": _NEOX},
    **{kind: _llama(_LLAMA) for kind in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
}
"""Module paths by `model_type` and name; the first of a model is its `auto`."""


def site_named(name: str, kind: str) -> Site:
    """`auto` (the first built-in site of this `model_type`), a built-in site's name, or a pattern with {layer}.

    Raises:
        UserError: no such site.
    """
    if "{layer}" in name:
        return Site(name.replace("{layer}", "N"), name)
    built_in = BUILT_IN.get(kind, {})
    chosen = next(iter(built_in), name) if name == "auto" else name
    if chosen in built_in:
        return Site(chosen, built_in[chosen])
    known = ", ".join(built_in) or "no built-in site"
    raise UserError(f"no site {name!r} for a {kind} model (it has {known}); give a module path with {{layer}} in it")


@contextlib.contextmanager
def hooked(model: PreTrainedModel, site: Site, layers: Sequence[int], visit: Visit) -> Iterator[None]:
    """While open, `visit` sees, and may replace, the layers' activations in every forward pass."""
    with contextlib.ExitStack() as handles:
        for layer in layers:
            handles.callback(site.hook(model, layer, visit).remove)
        yield


@contextlib.contextmanager
def read_site(model: PreTrainedModel, site: Site, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass leaves each layer's activations (b, t, h) in the yielded dict."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, activations: Tensor) -> None:
        found[layer] = activations

    with hooked(model, site, layers, keep):
        yield found


class _LastLayerError(Exception):
    """Ends a forward pass."""


@contextlib.contextmanager
def partial_pass(
    model: PreTrainedModel, site: Site, layers: Sequence[int], visit: Callable[[int, Tensor], None]
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that runs tokens (b, t) through the model up to the last of `layers`, and no further.

    `visit` sees each layer's activations as soon as they exist, while they are still in the cache.
    """
    left: set[int] = set()

    def see(layer: int, activations: Tensor) -> None:
        visit(layer, activations)
        left.discard(layer)
        if not left:
            raise _LastLayerError

    def run(tokens: Tensor) -> None:
        left.update(layers)
        with contextlib.suppress(_LastLayerError):
            model.base_model(tokens, use_cache=False)

    with hooked(model, site, layers, see):
        yield run


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

    def visit_of(force: Intervention) -> Visit:
        def visit(layer: int, activations: Tensor) -> Tensor:
            if not 0 <= force.index < activations.shape[-1]:
                raise UserError(f"neuron {force.index} is out of range; layer {layer} has {activations.shape[-1]}")
            edited = activations.clone()
            edited[..., force.index] = force.value
            return edited

        return visit

    with contextlib.ExitStack() as stack:
        for force in interventions:
            stack.enter_context(hooked(model, force.site, [force.layer], visit_of(force)))
        yield

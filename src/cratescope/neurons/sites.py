"""Sites of neurons: modules of any Hugging Face causal LM whose activations hooks read or edit.

A site is a module path with {layer} in it, such as `transformer.h.{layer}.mlp.act`; what the module gives is (b, t, h)
and its last axis are the neurons. Modules that see batch and tokens as one axis, (b t, h), are read alike, and residual
streams side by side, (b, t, n, h), are one row of neurons. With `:input` after the path it is what the module is
given, with `:neurons` what is inside of a mixture of experts.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from cratescope.errors import UserError
from cratescope.models.folder import text_config

INPUT, NEURONS = ":input", ":neurons"
Visit = Callable[[int, Tensor], Tensor | None]
"""Sees a layer's activations (b, t, h); a tensor it returns takes their place."""
CACHES = ("past_key_values", "cache_params", "state", "mems")
"""What models call the argument that holds what they remember of the tokens before these."""


@dataclass
class Given:
    """What the forward pass under way was given.

    shape: batch and tokens; empty where no tensor says so. past: tokens before these in a cache, None where the cache
    does not tell. mask: the attention mask as it came, 0 at padding.
    """

    shape: list[int] = field(default_factory=list)
    past: int | None = 0
    mask: Any = None

    def note(self, module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        """A forward pre-hook. It has to look now: the pass itself makes the cache longer."""
        names = inspect.signature(module.forward).parameters if len(inputs) > 1 else ()
        named = dict(zip(names, inputs, strict=False)) | named
        tokens = (named.get("input_ids"), named.get("inputs_embeds"), *inputs[:1])
        self.shape = next((list(each.shape[:2]) for each in tokens if isinstance(each, Tensor)), [])
        self.mask = named.get("attention_mask")
        self.past = self._past(next((named[name] for name in CACHES if named.get(name) is not None), None))

    def _past(self, cache: Any) -> int | None:
        if cache is None:
            return 0
        with contextlib.suppress(AttributeError, ValueError):  # a list, or a cache of states without a length
            return int(cache.get_seq_length())
        two = isinstance(self.mask, Tensor) and self.mask.ndim == 2 and self.shape
        return max(self.mask.shape[1] - self.shape[1], 0) if two else None

    def columns(self) -> Int64[Tensor, " t"]:
        """Places of these tokens in the rows of the whole batch: padding counts, and so do tokens in the cache.

        Raises:
            UserError: the pass does not say how many tokens are before these.
        """
        if self.past is None or not self.shape:
            raise UserError(
                "this model's cache does not say how many tokens it holds, so the places of the next ones are not "
                "known; steer all positions, or call it with use_cache=False"
            )
        return torch.arange(self.past, self.past + self.shape[1])

    def positions(self) -> Int64[Tensor, "b t"]:
        """Places of these tokens counted from the first of each row that is no padding, which has 0.

        Raises:
            UserError: as of `columns`, or a mask that does not show where padding is.
        """
        columns, mask = self.columns().expand(*self.shape), self._whole_mask()
        if mask is None and self.mask is not None:
            raise UserError(
                "the attention mask does not show which tokens are padding, as with a static cache, so positions are "
                "not known; give one of (batch, all tokens), or leave cache_implementation out"
            )
        return columns if mask is None else columns.to(mask.device) - mask.long().argmax(1, keepdim=True)

    def real(self) -> Bool[Tensor, "b t"] | None:
        """Which of these tokens are no padding; None where there is no mask that says so."""
        mask = self._whole_mask()
        return None if mask is None or self.past is None else mask[:, self.past : self.past + self.shape[1]]

    def _whole_mask(self) -> Bool[Tensor, "b s"] | None:
        """The mask, if it has an entry for each token up to these."""
        if self.past is None or not self.shape or not isinstance(self.mask, Tensor) or self.mask.ndim != 2:
            return None
        return self.mask.bool() if self.mask.shape[1] >= self.past + self.shape[1] else None


@dataclass(frozen=True)
class Site:
    """`name` is used for files, `pattern` is the module path with {layer} and perhaps `:input` or `:neurons`."""

    name: str
    pattern: str

    def path(self, layer: int | str) -> str:
        return self.pattern.removesuffix(INPUT).removesuffix(NEURONS).replace("{layer}", str(layer))

    def layers(self, model: nn.Module) -> list[int]:
        """Layers that have this site: a hybrid or mixture-of-experts model may have it in some only."""
        first, *others = map(re.escape, self.path("{layer}").split("{layer}"))
        form = re.compile(first + r"(\d+)" + r"\1".join(others))
        found = (form.fullmatch(name) for name, _ in model.named_modules(remove_duplicate=False))
        return sorted(int(match[1]) for match in found if match)

    def module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module of a layer.

        Raises:
            UserError: the layer is out of range, no module has this path (names the nearest paths), or `:neurons` are
                asked of one that is no mixture of experts.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        path, stem = self.path(layer), self.pattern.partition("{layer}")[0]
        if path in modules:
            if self.pattern.endswith(NEURONS) and not _is_experts(modules[path]):
                raise UserError(f"site {self.pattern}: {path} is no mixture of experts; leave {NEURONS} out")
            return modules[path]
        n_layers = sum(re.fullmatch(re.escape(stem) + r"\d+", name) is not None for name in modules)
        if n_layers and not 0 <= layer < n_layers:
            raise UserError(f"layer {layer} is out of range; this model has layers 0 to {n_layers - 1}")
        if some := self.layers(model):
            listed = " ".join(map(str, some))
            raise UserError(f"layer {layer} has no {path!r}; give those that have it: --layers {listed}")
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
        raise UserError(f"this model has no module {path!r}; nearest: {', '.join(near) or 'none'}")

    def hook(self, model: PreTrainedModel, layer: int, visit: Visit, given: Given) -> Any:
        """Have `visit` see this layer in every forward pass, until the handle returned is removed."""

        def edit(found: Any) -> Any:
            """Return what replaces `found`, or None to leave it unchanged."""
            first = found[0] if isinstance(found, tuple | list) and found else found
            edited = visit(layer, self._activations(first, given.shape))
            if edited is None:
                return None
            edited = edited.reshape(first.shape)
            if first is found:
                return edited
            return [edited, *found[1:]] if isinstance(found, list) else (edited, *found[1:])

        def on_input(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> Any:
            if inputs:
                edited = edit(inputs)
                return None if edited is None else (edited, named)
            name = next((name for name, value in named.items() if isinstance(value, Tensor)), "")
            edited = edit(named.get(name))
            return None if edited is None else (inputs, named | {name: edited})

        def on_experts(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            tokens, chosen = [*inputs, *named.values()][:2]
            if edit(_neurons(module, tokens.flatten(0, -2), chosen.flatten(0, -2))) is not None:
                raise UserError(f"site {self.pattern}: neurons of experts can be read only; name another module")

        module = self.module(model, layer)
        if self.pattern.endswith(NEURONS):
            return module.register_forward_pre_hook(on_experts, with_kwargs=True)
        if self.pattern.endswith(INPUT):
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(lambda _module, _inputs, output: edit(output))

    def only(self, chosen: Mapping[int, Int64[Tensor, " n"]]) -> Site:
        """The same site for reading, with only the chosen neurons of these layers and all neurons of others."""
        return SampledSite(self.name, self.pattern, self, chosen)

    def _activations(self, found: Any, shape: list[int]) -> Tensor:
        """As (b, t, h); `found` is what the module gives, or the first of a tuple such as (output, weights)."""
        if isinstance(found, Tensor) and found.is_floating_point():
            if found.ndim in (3, 4) and shape in ([], list(found.shape[:2])):
                return found.flatten(2)
            if found.ndim == 2 and shape and len(found) == shape[0] * shape[1]:
                return found.unflatten(0, shape)
        kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        of = f" for {shape[0]} x {shape[1]} tokens" if shape else ""
        raise UserError(
            f"site {self.pattern} has a {kind}{of}; name a module with a tensor (batch, tokens, neurons) of all tokens"
        )


@dataclass(frozen=True)
class SampledSite(Site):
    """Some neurons of the site `whole`, for reading: `chosen` (n,) by layer."""

    whole: Site
    chosen: Mapping[int, Int64[Tensor, " n"]]

    def layers(self, model: nn.Module) -> list[int]:
        return self.whole.layers(model)

    def module(self, model: nn.Module, layer: int) -> nn.Module:
        return self.whole.module(model, layer)

    def hook(self, model: PreTrainedModel, layer: int, visit: Visit, given: Given) -> Any:
        def see(layer: int, activations: Tensor) -> None:
            seen = activations[..., self.chosen[layer]] if layer in self.chosen else activations
            if visit(layer, seen) is not None:
                raise UserError(f"site {self.name}: a sample of its neurons can be read only; edit the whole site")

        return self.whole.hook(model, layer, see, given)


def _is_experts(module: nn.Module) -> bool:
    """Whether it is a mixture of experts as transformers writes them: all experts' weights in one tensor."""
    return hasattr(module, "_apply_gate") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def _neurons(experts: Any, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Inputs (t, experts x width) of all experts' last projections, from tokens (t, d) and chosen experts (t, k).

    Zero where a token does not go to an expert. This is computed besides the pass, since the pass itself sorts the
    tokens in ways of its own.
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weights = getattr(experts, name) if experts.is_transposed else getattr(experts, name).mT
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    n, width = len(weights), experts.down_proj.shape[1 if experts.is_transposed else 2]
    found = tokens.new_zeros(len(tokens), n, width)
    for expert in chosen.unique().tolist():
        if expert < n:  # some routers have one more, which leaves the token as it is
            rows = (chosen == expert).any(-1)
            wide = tokens[rows] @ weights[expert]
            if experts.has_bias:
                wide = wide + getattr(experts, f"{name}_bias")[expert]
            found[rows, expert] = activate(wide)
    return found.flatten(1)


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
    # Gated MLPs: neurons are the input of the down projection, the activation times its gate.
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3"),
        {"mlp": f"{_LLAMA}.mlp.down_proj{INPUT}", "attention": f"{_LLAMA}.self_attn", "residual": _LLAMA},
    ),
}
"""Module paths by `model_type` and name; the first of a model is its `auto`. Other models': `sites_of`."""

_ATTENTION, _NO_ATTENTION = re.compile(r"attn|attention"), re.compile(r"norm|dropout|residual|input|gate|cross")
_MLP = re.compile(r"mlp|ffn|ffw|ff$|feed_?forward")
_MIXER = re.compile(r"mixer|mamba")
_NOT_TEXT = re.compile(r"vision|visual|image|audio|video|speech|\.\d+(\.|$)")
"""Towers of other senses, and lists inside of a block."""
_OTHER = re.compile(
    r"attn|attention|mixer|mamba|conv|ssm|recurrent|temporal|rglru|adapter|gate(\.|$)|router|norm|hyper|"
    r"(?<!shared_)expert"
)
"""Not the MLP of a block: what mixes tokens, what sees a part of them, what chooses experts."""


def site_named(name: str, model: PreTrainedModel) -> Site:
    """`auto` (the first of the model's sites), the name of one, or a pattern with {layer}. UserError: no such site."""
    if "{layer}" in name:
        return Site(name.replace("{layer}", "N"), name)
    kind = model.config.model_type
    known = BUILT_IN.get(kind) or sites_of(model)
    chosen = next((one for one in known if one not in ("attention", "residual")), name) if name == "auto" else name
    if chosen in known:
        return Site(chosen, known[chosen])
    listed = ", ".join(known) or "no site with a name"
    near = ", ".join(_projections(model)) or "such as `transformer.h.{layer}.mlp.act`"
    raise UserError(
        f"no site {name!r} for a {kind} model (it has {listed}); "
        f"give one of these or a module path with {{layer}} in it: {near}"
    )


def sites_of(model: PreTrainedModel) -> dict[str, str]:
    """Sites by name, found in the modules' names and shapes: what holds for the most blocks.

    mlp is what the last projection of the block's MLP, or of the expert that every token goes to, is given; in
    mixtures of experts without one it is what the experts' last projections are given, which is `experts` otherwise.
    mixer is what the last projection of a state space mixer (Mamba) is given.
    """
    stem, blocks = blocks_of(model)
    if not len(blocks):
        return {}
    embeddings: Any = model.get_input_embeddings()
    hidden = getattr(text_config(model.config), "hidden_size", None) or embeddings.weight.shape[-1]
    last = _commonest([_last_projection(block, hidden) for block in blocks])
    experts = _commonest([name for block in blocks for name, part in block.named_modules() if _is_experts(part)])
    mixer = _commonest([_last_of_mixer(block, hidden) for block in blocks])
    found = {
        "mlp": last and last + INPUT,
        "experts" if last else "mlp": experts and experts + NEURONS,
        "mixer": mixer and mixer + INPUT,
        "attention": _commonest([_attention(block) for block in blocks]),
    }
    sites = {name: f"{stem}.{{layer}}.{path}" for name, path in found.items() if path}
    # XLM has a list of MLPs instead of blocks: what one gives is not the residual stream.
    return sites if _MLP.search(stem.rpartition(".")[2]) else sites | {"residual": f"{stem}.{{layer}}"}


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and modules of the text model's layers: of the lists that lie in no other list the one with most weights."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    lists = {name: part for name, part in lists.items() if not _NOT_TEXT.search(name)}
    sizes = {name: sum(weight.numel() for weight in module.parameters()) for name, module in lists.items()}
    stem = max(sizes, key=lambda name: sizes[name], default="")
    return stem, lists.get(stem, nn.ModuleList())


def _attention(block: nn.Module) -> str:
    """The outermost module of attention, the last one where a list has several; an empty string if it has none."""
    words = {name: re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2] for name, _ in block.named_modules()}
    words = {name: word for name, word in words.items() if not isinstance(block.get_submodule(name), nn.ModuleList)}
    own = [name for name, word in words.items() if _ATTENTION.search(word) and not _NO_ATTENTION.search(word)]
    depth = min((name.count(".") for name in own), default=0)
    outermost = [name for name in own if name.count(".") == depth]
    listed = [name for name in outermost if re.search(r"\.\d+$", name)]
    return next(iter([*listed[-1:], *outermost]), "")


def _linears(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> width of input and output of every projection."""
    found = {}
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            # transformers' Conv1D, a linear layer of GPT-2's time, keeps its matrix the other way round.
            out, given = weight.shape[::-1] if type(module).__name__ == "Conv1D" else weight.shape
            found[name] = (given, out)
    return found


def _last_projection(block: nn.Module, hidden: int) -> str:
    """The last projection of a block's MLP that leads back to `hidden`; an empty string if it has none."""
    linears = {name: shape for name, shape in _linears(block).items() if not _OTHER.search(_described(block, name))}
    back = [name for name, (_, width) in linears.items() if width == hidden]
    back = [name for name in back if _MLP.search(name.split(".")[0])] or back
    wide = [name for name in back if linears[name][0] != hidden]
    return next(reversed(wide or back), "")


def _last_of_mixer(block: nn.Module, hidden: int) -> str:
    """The last projection of a block's mixer of tokens that is no attention; an empty string if it has none."""
    back = [name for name, (_, width) in _linears(block).items() if width == hidden and _MIXER.search(name)]
    return next((name for name in reversed(back) if not re.search(r"attn|expert|mlp", _described(block, name))), "")


def _described(block: nn.Module, name: str) -> str:
    """The path of a projection; "mixer" is what its class says, where blocks of several kinds call them all so."""
    kind = type(block.get_submodule(name.rpartition(".")[0])).__name__.lower()
    said = next((word for word in ("mlp", "attention") if word in kind), "mixer").replace("attention", "attn")
    return name.replace("mixer", said)


def _projections(model: PreTrainedModel, n: int = 6) -> list[str]:
    """Module paths with {layer} of projections of the last block, for messages."""
    stem, blocks = blocks_of(model)
    names = list(_linears(blocks[-1])) if len(blocks) else []
    return [f"{stem}.{{layer}}.{name}" for name in names[-n:]]


def _commonest(names: Sequence[str]) -> str:
    return next((name for name, _ in Counter(filter(None, names)).most_common(1)), "")


def check_site(model: PreTrainedModel, site: Site, layers: Sequence[int], tokens: Tensor) -> dict[int, Tensor]:
    """Try the site on tokens (b, t): every layer must have it once per pass, for all tokens and in their order.

    The order is known from a second pass with other last tokens: in a causal model nothing else may change. Returns
    the activations (b, t, h) of each layer.

    Raises:
        UserError: a layer has no such module, or it is read never, several times, or not token by token.
    """
    other = tokens.clone()
    other[:, -1] = tokens[:, 0].where(tokens[:, 0] != tokens[:, -1], tokens[:, 1])
    first, second = (_seen(model, site, layers, each) for each in (tokens, other))
    for layer in layers:
        if len(first[layer]) != 1:
            often = f"{len(first[layer])} times" if first[layer] else "not"
            raise UserError(
                f"site {site.pattern} is {often} read in a pass at layer {layer}; "
                "name a module that every pass runs once, such as the block itself"
            )
        before, after = (found[layer][0][:, :-1].float().nan_to_num() for found in (first, second))
        if not torch.allclose(before, after, rtol=0.05, atol=0.05 * float(before.abs().max()) + 1e-12):
            raise UserError(
                f"site {site.pattern} does not give the tokens in the order of the text at layer {layer}; "
                "name a module outside of the experts, with a tensor (batch, tokens, neurons)"
            )
    return {layer: found[0] for layer, found in first.items()}


def site_widths(model: PreTrainedModel, site: Site, layers: Sequence[int], tokens: Tensor) -> dict[int, int]:
    """Number of neurons of each layer, seen in a pass over tokens (b, t) that `check_site` has tried."""
    return {layer: found[0].shape[-1] for layer, found in _seen(model, site, layers, tokens).items()}


def _seen(model: PreTrainedModel, site: Site, layers: Sequence[int], tokens: Tensor) -> dict[int, list[Tensor]]:
    """Activations of each layer, one entry for every time they occur in a pass up to the head."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    head = model.get_output_embeddings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked(model, site, layers, lambda layer, x: found[layer].append(x.detach().clone())))
        if head is not None:
            stack.callback(head.register_forward_pre_hook(_stop).remove)
        stack.enter_context(contextlib.suppress(_LastLayerError))
        model(tokens, use_cache=False)
    return found


def _stop(*_: Any) -> None:
    raise _LastLayerError


@contextlib.contextmanager
def noted(model: PreTrainedModel) -> Iterator[Given]:
    """While open, what is yielded tells what the forward pass under way was given."""
    given = Given()
    with contextlib.ExitStack() as handles:
        # The one in the other comes last, and some callers use only the one in it.
        for whole in dict.fromkeys((model, model.base_model)):
            handles.callback(whole.register_forward_pre_hook(given.note, with_kwargs=True).remove)
        yield given


@contextlib.contextmanager
def hooked(model: PreTrainedModel, site: Site, layers: Sequence[int], visit: Visit) -> Iterator[None]:
    """While open, `visit` sees, and may replace, the layers' activations in every forward pass."""
    with noted(model) as given, contextlib.ExitStack() as handles:
        for layer in layers:
            handles.callback(site.hook(model, layer, visit, given).remove)
        yield


@contextlib.contextmanager
def read_site(model: PreTrainedModel, site: Site, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass leaves each layer's activations (b, t, h) in the yielded dict."""
    found: dict[int, Tensor] = {}
    with hooked(model, site, layers, lambda layer, activations: found.update({layer: activations})):
        yield found


class _LastLayerError(Exception):
    """Signal that ends a forward pass early."""


@contextlib.contextmanager
def partial_pass(
    model: PreTrainedModel, site: Site, layers: Sequence[int], visit: Callable[[int, Tensor], None]
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that runs tokens (b, t) through the model up to the last of `layers`, and no further.

    `visit` sees each layer's activations as soon as they exist, while they are still in the cache.
    """
    left: set[int] = set()

    def see(layer: int, activations: Tensor) -> None:
        if layer not in left:
            often = f"is read several times in a pass at layer {layer}"
            raise UserError(f"site {site.pattern} {often}; name another module")
        visit(layer, activations)
        left.discard(layer)
        if not left:
            raise _LastLayerError

    def run(tokens: Tensor) -> None:
        left.update(layers)
        with contextlib.suppress(_LastLayerError):
            model(tokens, use_cache=False)
        if left:
            raise UserError(f"site {site.pattern} is not read in a pass at layer {min(left)}; name another module")

    with hooked(model, site, layers, see):
        yield run

"""What neurons write, read off the weights: their directions in the residual stream, and through the head.

Of a neuron with the direction w the direct logits are W_U (g * C w): C takes the mean off where the final norm does, g
is the norm's gain, W_U the head. The norm's division, by a number that depends on the whole residual stream, is left
out, and with it the bias: so these are logits per unit of activation where the stream has a root mean square of 1. This
is the logit lens (nostalgebraist 2020) of a direction, "VocabProj" of Gur-Arieh et al. 2025 (arXiv 2501.08319).

Direct is the path from the layer through the residual stream alone. In a CRATE without a skip around ISTA only the last
layer has one: what an earlier layer writes, the next one codes anew. Its direct logits are what they would be if the
layer were the last, and how much of the neuron's effect they are is measured (neurons/effects.py).

Nothing is looked up in a list of models: where a site's neurons go, and what the final norm does, are found by trials.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from cratescope.errors import UserError, first_line
from cratescope.lm.head import UNFIT, plain_pass
from cratescope.models.modeling_crate import ISTA
from cratescope.neurons.coded import CodedSite
from cratescope.neurons.sites import INPUT, NEURONS, Site, blocks_of, hooked

TRIAL_TOKENS = 4
TOLERANCE = 0.03
"""Of trials, relative to the largest value: what rounding explains even in bfloat16, and no norm in between does."""
PROBES = 8
LOGITS_AT_ONCE = 1 << 24


@torch.no_grad()
def output_directions(model: PreTrainedModel, site: Site, layer: int) -> Float32[Tensor, "m d"]:
    """What one unit of each neuron, or feature, of a layer adds to the residual stream, a neuron a row.

    CRATE's codes: the atoms, rows of D. MLPs: what the projection after the neurons has for each. Attention, residual
    and other outputs that are added as they are: the axes. Features of an autoencoder: its decoder rows, through the
    directions of what it codes.

    Raises:
        UserError: no such site or layer, or what the neurons are turned into is no product with a matrix.
    """
    module = site.module(model, layer)
    if isinstance(site, CodedSite):
        decoder = site.coders[layer].decoder.detach().to(model.device)
        return decoder @ output_directions(model, Site(site.name, site.pattern), layer)
    if (atoms := _atoms(model, site, layer)) is not None:
        return atoms.detach().float()
    stem, blocks = blocks_of(model)
    block = f"{stem}.{layer}"
    if not site.pattern.endswith(NEURONS) and site.path(layer).startswith(f"{block}.") and layer < len(blocks):
        return _tried(model, site, layer, blocks[layer])
    if site.path(layer) == block and not site.pattern.endswith(INPUT):
        return torch.eye(_hidden(model), device=model.device)
    raise UserError(f"site {site.pattern}: {_told(module)}; {_FIX}")


_FIX = "name other neurons, such as an MLP's, or a block's output"


def _told(module: nn.Module) -> str:
    return f"what a {type(module).__name__} has there is not added to the residual stream by one matrix"


def _hidden(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    embeddings: Any = model.get_input_embeddings()
    return getattr(model.config.get_text_config(decoder=True), "hidden_size", None) or embeddings.weight.shape[-1]


def _atoms(model: PreTrainedModel, site: Site, layer: int) -> Tensor | None:
    """CRATE's dictionary by which the codes are decoded, for its last codes."""
    owner, _, name = site.path(layer).rpartition(".")
    ista = dict(model.named_modules()).get(owner)
    if not isinstance(ista, ISTA) or site.pattern.endswith(INPUT) or name not in ("codes", "first_codes"):
        return None
    if name == "first_codes" and ista.t > 1:
        raise UserError(f"site {site.name}: these codes are changed once more before they are decoded; name the codes")
    return ista.decoder()


@dataclass(frozen=True)
class _Seen:
    """The last token of a pass: the site's activations (m,), and inputs and outputs of modules by path in the block.

    The block itself is "".
    """

    neurons: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _tried(model: PreTrainedModel, site: Site, layer: int, block: nn.Module) -> Float32[Tensor, "m d"]:
    """Directions of a site inside of a block, of which a trial has shown that they are what is added.

    All neurons are moved at once by random numbers. Some tensor of the block has to move by the very sum of their
    directions, and to hold something else besides, so that what is added passes no norm first.
    """
    before = _seen(model, site, layer, block)
    if _ends_in_norm(block, before):
        raise UserError(f"site {site.pattern}: the block's output is normed after it was added up; {_FIX}")
    for written, rows in _candidates(site, layer, block, before):
        move = torch.randn(len(before.neurons), generator=torch.Generator().manual_seed(0)).to(rows.device)
        # As large as the stream, so that it is not lost in rounding beside it.
        move *= before.outputs[""].abs().max().float() / (move @ rows).abs().max().clamp_min(1e-30)
        after = _seen(model, site, layer, block, move)
        if _added(before, after, written, (after.neurons - before.neurons).float() @ rows):
            return rows
    raise UserError(f"site {site.pattern}: {_told(site.module(model, layer))}; {_FIX}")


def _ends_in_norm(block: nn.Module, seen: _Seen) -> bool:
    """Whether the block gives what a norm in it gives, as in GPT of 2018."""
    output = seen.outputs[""]
    last = [name for name, one in seen.outputs.items() if name and torch.equal(one, output)]
    for module in map(block.get_submodule, last):
        with contextlib.suppress(*UNFIT):
            _parts_of(module, output[None])
            return True
    return False


def _candidates(
    site: Site, layer: int, block: nn.Module, seen: _Seen
) -> Iterator[tuple[Tensor, Float32[Tensor, "m d"]]]:
    """What the neurons may be turned into, at the last token, and the directions that would then be theirs."""
    width = len(seen.outputs[""])
    for name, given in seen.inputs.items():
        matrix = _matrix(block.get_submodule(name))
        fits = matrix is not None and matrix.shape == (len(seen.neurons), width) and name in seen.outputs
        if matrix is not None and fits and torch.equal(given, seen.neurons):
            yield seen.outputs[name], matrix.detach().float()
    if len(seen.neurons) == width and not site.pattern.endswith(INPUT):
        yield seen.neurons, torch.eye(width, device=seen.neurons.device)


def _matrix(module: nn.Module) -> Tensor | None:
    """Of a linear layer, the weights with a row per entry that it is given."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    # transformers' Conv1D, a linear layer of GPT-2's time, keeps its matrix the other way round.
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _added(before: _Seen, after: _Seen, written: Tensor, moved: Float32[Tensor, " d"]) -> bool:
    """Whether a tensor that holds more than what the neurons are turned into has moved like it."""
    if not moved.abs().max() > 0:
        return False
    found = [(name, before.inputs[name], after.inputs.get(name)) for name in before.inputs if name]
    found.append(("", before.outputs[""], after.outputs.get("")))
    for name, one, other in found:
        if other is None or one.shape != moved.shape or other.shape != moved.shape:
            continue
        apart = ((other - one).float() - moved).abs().max() / moved.abs().max()
        # A block without a skip gives what is written and nothing else.
        if apart <= TOLERANCE and (not name or not torch.allclose(one, written)):
            return True
    return False


def _seen(
    model: PreTrainedModel, site: Site, layer: int, block: nn.Module, move: Float32[Tensor, " m"] | None = None
) -> _Seen:
    """A pass over a few tokens, with the neurons of the last one moved."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    neurons: list[Tensor] = []

    def visit(_layer: int, x: Tensor) -> Tensor | None:
        if move is not None:
            x = x.clone()
            x[:, -1] += move.to(x.dtype)
        neurons.append(x[0, -1].clone())
        return x if move is not None else None

    def keep(name: str, module: nn.Module, given: Any, named: dict[str, Any], output: Any) -> None:
        for kept, values in ((inputs, (*given, *named.values())), (outputs, (output,))):
            first = next((value for value in _flat(values) if isinstance(value, Tensor)), None)
            if first is not None and first.is_floating_point() and first.ndim in (2, 3):
                kept[name] = (first[0] if first.ndim == 3 else first)[-1].clone()

    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked(model, site, [layer], visit))
        for name, module in block.named_modules():
            hook = module.register_forward_hook(
                lambda module, given, named, output, name=name: keep(name, module, given, named, output),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        plain_pass(model, _trial(model))
    if not neurons or "" not in outputs:
        raise UserError(f"site {site.pattern}: layer {layer} is not read in a pass; name another module")
    return _Seen(neurons[0], inputs, outputs)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from value[:1] if isinstance(value, tuple | list) else (value,)


def _trial(model: PreTrainedModel) -> Int[Tensor, "1 t"]:
    return torch.arange(1, 1 + TRIAL_TOKENS, device=model.device)[None]


@dataclass(frozen=True)
class Readout:
    """From directions in the residual stream to logits: the final norm, with what it divides by left out, and the head.

    head: (V, d). gain: (d,). centred: whether the norm takes off the mean.
    """

    head: Float[Tensor, "V d"]
    gain: Float32[Tensor, " d"]
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Readout:
        """Find the final norm between the last block and the head.

        Raises:
            UserError: the model has no head, or something else stands between, than one norm or nothing.
        """
        head = model.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is None:
            raise UserError(f"a {model.config.model_type} model has no head of tokens; give a causal language model")
        norm = _final_norm(model, head)
        weight: Tensor = head.weight.detach()
        if norm is None:
            return cls(weight, torch.ones(weight.shape[1], device=weight.device), False)
        try:
            gain, centred = _parts_of(norm, weight)
        except UNFIT as error:
            raise UserError(
                f"the {type(norm).__name__} before the head of this {model.config.model_type} model is neither a "
                f"LayerNorm nor an RMSNorm ({first_line(error)}), so there are no direct logits; give another model"
            ) from error
        return cls(weight, gain, centred)

    @torch.no_grad()
    def logits(self, directions: Float[Tensor, "m d"]) -> Float32[Tensor, "m V"]:
        """Direct logits in float32, whatever the model computes in."""
        rows = directions.to(self.head.device, torch.float32)
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * self.gain) @ self.head.float().T

    def blocks(self, directions: Float[Tensor, "m d"]) -> Iterator[Float32[Tensor, "b V"]]:
        """The same a few directions at a time, in their order: those of a whole layer may not fit in memory."""
        for some in directions.split(max(1, LOGITS_AT_ONCE // len(self.head))):
            yield self.logits(some)


def direct_logits(model: PreTrainedModel, directions: Float[Tensor, "m d"]) -> Float32[Tensor, "m V"]:
    """Logits per unit of each direction, where the residual stream has a root mean square of 1. Errors of `Readout`."""
    return Readout.of(model).logits(directions)


def _final_norm(model: PreTrainedModel, head: nn.Module) -> nn.Module | None:
    """The module between the last block and the head; None if there is none."""
    stem, blocks = blocks_of(model)
    if not len(blocks):
        raise UserError(f"a {model.config.model_type} model has no list of blocks; there are no direct logits of it")
    last = f"{stem}.{len(blocks) - 1}"
    given: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}

    def keep(name: str, inputs: Any, named: dict[str, Any], output: Any) -> None:
        for kept, values in ((given, (*inputs, *named.values())), (gave, (output,))):
            first = next((value for value in _flat(values) if isinstance(value, Tensor)), None)
            if first is not None and first.is_floating_point():
                kept[name] = first.reshape(-1, first.shape[-1])[-1].clone()

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda _module, inputs, named, output, name=name: keep(name, inputs, named, output), with_kwargs=True
            )
            stack.callback(hook.remove)
        plain_pass(model, _trial(model))
    read, stream = next((given[name] for name, one in model.named_modules() if one is head), None), gave.get(last)
    if read is None or stream is None:
        raise UserError(f"the head of this {model.config.model_type} model is not read in a pass; give another model")
    if torch.equal(read, stream):
        return None
    between = [
        module
        for name, module in model.named_modules()
        if not name.startswith(last) and name in gave and torch.equal(gave[name], read)
        if name in given and torch.equal(given[name], stream) and not isinstance(module, PreTrainedModel)
    ]
    if not between:
        raise UserError(
            f"between the last block and the head of this {model.config.model_type} model is more than one norm, so "
            "there are no direct logits; give another model"
        )
    return between[-1]


def _parts_of(norm: nn.Module, like: Tensor) -> tuple[Float32[Tensor, " d"], bool]:
    """A norm's gain, and whether it takes off the mean, from what it makes of random inputs.

    Raises ValueError when it does anything else.
    """
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, like.shape[1], generator=chance)
    x = x - x.mean(1, keepdim=True)
    x = (x / x.square().mean(1, keepdim=True).sqrt()).to(like.device, like.dtype)

    def odd(values: Tensor) -> Float32[Tensor, "n d"]:
        """Without the bias."""
        return (norm(values).float() - norm(-values).float()) / 2

    wide = x.float()
    gain = (odd(x) * wide).sum(0) / wide.square().sum(0)
    shifted = x + 1
    for centred in (True, False):
        rows = shifted.float() - (shifted.float().mean(1, keepdim=True) if centred else 0)
        expected = gain * rows / rows.square().mean(1, keepdim=True).sqrt()
        if ((odd(shifted) - expected).abs().max() <= TOLERANCE * expected.abs().max()).item():
            return gain, centred
    raise ValueError("it is not of that form")

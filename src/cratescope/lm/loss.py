"""Cross-entropy of a linear head that never forms the tokens x vocabulary logits, forward and backward in one sweep.

With logits L = hidden weight^T and lse_i = log sum_j exp L_ij, the loss of token i is lse_i - L_i,label, and its
gradient by the logits exp(L_ij - lse_i), less one at the label. Only CHUNK rows of that exist at a time, as
exponentials whose row sums are divided out later: three products per chunk, none of them repeated.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

CHUNK = 512
"""Rows of logits held at once: memory is CHUNK x v numbers, time hardly depends on it."""
TILE = 2048
"""Bytes of a row worked on at once: with CHUNK rows they fit the cache of a core, so exp and sums stay in it."""
SAMPLE = 128
"""Columns whose largest logit is a row's first shift."""
GPT2_NEURONS = ".mlp.act"
"""Modules of transformers' GPT-2 whose outputs are a layer's neurons; our own models' blocks sum theirs themselves."""
IGNORED = -100
"""Label of a token that has no loss, as everywhere in transformers."""


def linear_cross_entropy(
    hidden: Float[torch.Tensor, "*n d"],
    weight: Float[torch.Tensor, "v d"],
    labels: Int[torch.Tensor, " *n"],
    n_items: int | torch.Tensor | None = None,
) -> Float[torch.Tensor, ""]:
    """Sum over tokens of the cross-entropy (nats), divided by n_items: by default the tokens not ignored.

    Products are in autocast's number format where that is on, else in that of `hidden`; sums and gradients of the
    weight are in float32 at least.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    items = (targets != IGNORED).sum().clamp(min=1) if n_items is None else n_items
    grad = torch.is_grad_enabled()
    needs = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _summed(rows, weight, targets, _format(rows), *needs)[0] / items


@torch.no_grad()
def token_losses(
    hidden: Float[torch.Tensor, "n d"], weight: Float[torch.Tensor, "v d"], labels: Int[torch.Tensor, " n"]
) -> Float[torch.Tensor, " n"]:
    """Cross-entropy (nats) of every token; no gradients."""
    return _sweep(hidden, weight, labels, _format(hidden), False, False)[0]


def fuse(model: PreTrainedModel, penalty: Callable[[torch.Tensor], torch.Tensor] | None = None) -> PreTrainedModel:
    """Let `model(input_ids, labels=...)` compute its loss as above; it then returns no logits.

    For any causal language model whose head is a linear map without bias. The forward pass stays the model's own
    method, so that DDP and FSDP see every call; without labels nothing changes.

    Args:
        penalty: of the sum of a token's activations, of all neurons, mean over tokens; added to the loss of every pass.
            RuntimeError in training if there is none to add, as under checkpointing with use_reentrant=True.
    """
    plain = type(model).forward  # of whichever model is called: a copy of this one is another
    sums: list[torch.Tensor] = []

    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            sums.append(output.sum(dtype=torch.float32))

    for name, module in model.named_modules() if penalty else ():
        if hasattr(module, "sums"):
            module.sums = sums
        elif name.endswith(GPT2_NEURONS):
            module.register_forward_hook(add)

    def forward(self: Any, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any):
        if labels is None:
            return plain(self, input_ids, **kwargs)
        sums.clear()
        hidden = self.base_model(input_ids, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        weight, targets = self.get_output_embeddings().weight, labels[:, 1:]
        loss = linear_cross_entropy(hidden, weight, targets, n_items=num_items_in_batch)
        if penalty and self.training and torch.is_grad_enabled() and not sums:
            raise RuntimeError("no activations to penalise: checkpoint activations with use_reentrant=False")
        if penalty and sums:
            share = (targets != IGNORED).sum() / num_items_in_batch if num_items_in_batch is not None else 1
            loss = loss + penalty(sum(sums) / labels.numel() * share)
        return CausalLMOutput(loss=loss)

    model.forward = types.MethodType(forward, model)
    return model


def _format(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# An operator of its own, opaque to torch.compile, which would unroll the loop into thousands of operations.
@torch.library.custom_op(
    "cratescope::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, ScalarType dtype, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)",
)
def _summed(hidden, weight, labels, dtype, need_hidden, need_weight):
    """(sum of the losses, its gradient by hidden, and by weight; empty where not needed)."""
    kept = labels != IGNORED
    with torch.autocast(hidden.device.type, enabled=False):
        if kept.all():
            losses, *grads = _sweep(hidden, weight, labels, dtype, need_hidden, need_weight)
            return losses.sum(), *grads
        losses, *grads = _sweep(hidden[kept], weight, labels[kept], dtype, need_hidden, need_weight)
        grad_hidden = torch.zeros_like(hidden, dtype=_wide(dtype)) if need_hidden else grads[0]
        if need_hidden:
            grad_hidden[kept] = grads[0]
        return losses.sum(), grad_hidden, grads[1]


@_summed.register_fake
def _(hidden, weight, labels, dtype, need_hidden, need_weight):
    return hidden.new_empty((), dtype=_wide(dtype)), *_gradients(hidden, weight, dtype, need_hidden, need_weight)


def _gradients(hidden, weight, dtype, need_hidden, need_weight):
    """Allocate the gradients by hidden and by weight (zeros); empty where not needed."""
    wide = _wide(dtype)
    return (
        torch.empty_like(hidden, dtype=wide) if need_hidden else hidden.new_empty(0, dtype=wide),
        torch.zeros_like(weight, dtype=wide) if need_weight else weight.new_empty(0, dtype=wide),
    )


def _keep_gradients(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *others):
    if any(other is not None for other in others):
        raise RuntimeError("this loss has no second derivative; use F.cross_entropy of logits for it")
    grads = (
        (grad * upstream).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    )
    return *grads, None, None, None, None


_summed.register_autograd(_backward, setup_context=_keep_gradients)


def _sweep(hidden, weight, labels, dtype, need_hidden, need_weight):
    """(losses (n,), gradient of their sum by hidden, and by weight), chunk by chunk."""
    wide = _wide(dtype)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise IndexError(f"labels are from {labels.min()} to {labels.max()}, but there are {len(weight)} tokens")
    # A GPU needs no tiles: its kernels split the product themselves.
    n_columns = min(TILE // dtype.itemsize, len(weight)) if hidden.device.type == "cpu" else len(weight)
    parts = weight.to(dtype).split(n_columns)
    # Without a gradient by the weight no tile is reused, so one is enough.
    tiles = hidden.new_empty((len(parts) if need_weight else 1, min(CHUNK, len(hidden)) * n_columns), dtype=dtype)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    grad_hidden, grad_weight = _gradients(hidden, weight, dtype, need_hidden, need_weight)
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        rows, label = hidden[chunk].to(dtype), labels[chunk]
        # The largest of some logits, so that a row sums to 1 or more; it is too much only if others are far larger.
        shift = (rows @ parts[0][:SAMPLE].t()).amax(1, keepdim=True).to(wide)
        total, target, expected = _exponentials(rows, parts, label, shift, tiles, need_hidden)
        if not total.max() < min(1e30, torch.finfo(dtype).max):
            shift = torch.stack([(rows @ part.t()).amax(1, keepdim=True) for part in parts]).amax(0).to(wide)
            total, target, expected = _exponentials(rows, parts, label, shift, tiles, need_hidden)
        # Not via the log of the sum: next to a shift of 10,000, log(total) would be rounded away.
        losses[chunk] = (total.log() - target).squeeze(1)
        scale = 1 / total
        if need_hidden:
            torch.sub(expected.mul_(scale), weight[label], out=grad_hidden[chunk])
        if need_weight:
            scaled = (hidden[chunk] * scale).to(dtype)
            for tile, part in zip(tiles, grad_weight.split(n_columns), strict=True):
                _add_product(part, _matrix(tile, len(rows), len(part)).t(), scaled)
    if need_weight:
        grad_weight.index_add_(0, labels, hidden.to(wide), alpha=-1)
    return losses, grad_hidden, grad_weight


def _exponentials(rows, parts, labels, shift, tiles, need_expected):
    """Fill the tiles with E = exp(rows weight^T - shift); the shift (n, 1) is exact in the tiles' number format.

    Returns its sums and the logits at the labels less the shift, both (n, 1), and E weight (n, d) or None.
    """
    less = -shift.to(rows.dtype)
    total, target = torch.zeros_like(shift), torch.zeros_like(shift)
    expected = torch.zeros_like(rows, dtype=shift.dtype) if need_expected else None
    first = 0
    for number, part in enumerate(parts):
        tile = _matrix(tiles[number % len(tiles)], len(rows), len(part))
        # Less the shift before it is rounded: in bfloat16 the large logits, which matter, then lose least.
        torch.addmm(less, rows, part.t(), out=tile)
        inside = ((labels >= first) & (labels < first + len(part))).nonzero().squeeze(1)
        target[inside, 0] = tile[inside, labels[inside] - first].to(total.dtype)
        total += tile.exp_().sum(1, keepdim=True, dtype=total.dtype)
        if expected is not None:
            _add_product(expected, tile, part)
        first += len(part)
    return total, target, expected


def _matrix(buffer, rows, columns):
    return buffer[: rows * columns].view(rows, columns)


def _add_product(total, left, right):
    """total += left right, in one pass where the number formats allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

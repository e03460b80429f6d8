"""A cache that holds one prefix's keys and values for a whole batch without copies, and attention that reads it.

A prompt's tokens attend to the prefix and to their own prompt. Both parts are computed separately and joined by their
normalisers. For the prefix, the queries of all prompts, and of all heads that share keys, are rows of one matrix:
nothing is masked there, and nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cratescope.llm.precision import widen
from cratescope.lm.head import UNFIT
from cratescope.models.folder import longest_context

NAME = "cratescope_prefix"
EXACT, ROUNDED = 1e-3, 0.1
"""Root mean square of differences between logits, in their standard deviations, that rounding explains: of float32,
where it is under 1e-5, and of narrower formats, where SmolLM2-135M in bfloat16 has 0.04 to 0.07."""
PREFIX, PROMPT, NEXT = 6, 5, 1
"""Tokens of a trial: those that rows share at least, those of a prompt, and the first one written."""
WINDOWS = ("window", "local_attention", "chunk")
"""Parts of the names under which configs state the reach of limited attention."""
WINDOW = 1024
"""The prefix of a trial is longer than a window of up to so many tokens."""
QUERIES = 1024
"""Queries whose scores are held at once where there is no fused kernel."""


class _Layer(DynamicLayer):
    """Keys and values in the format that attention multiplies; rotating keys may have widened them (precision.py)."""

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *rest, **more)


class _Behind(_Layer):
    """Keys and values of the batch's own tokens, after those of the prefix (one row, shared)."""

    def __init__(self, prefix: DynamicLayer) -> None:
        super().__init__()
        self.prefix = prefix

    def get_seq_length(self) -> int:
        return self.prefix.get_seq_length() + super().get_seq_length()


def empty_prefix(model: Any) -> Cache:
    """An empty cache for the shared prefix."""
    return Cache(layers=[_Layer() for _ in DynamicCache(config=model.config).layers])


class SharedPrefix(Cache):
    """A cache for any number of prompts after one prefix. A model sees the prefix in it only inside `read`."""

    def __init__(self, prefix: Cache) -> None:
        super().__init__(layers=[_Behind(layer) for layer in prefix.layers if isinstance(layer, DynamicLayer)])

    @contextmanager
    def read(self) -> Iterator[None]:
        token = _CACHE.set(self)
        try:
            yield
        finally:
            _CACHE.reset(token)


_CACHE: ContextVar[SharedPrefix | None] = ContextVar("cache", default=None)


def share_prefix(model: Any, own: Float[Tensor, "t vocab"]) -> bool:
    """Give `model` the attention that reads a SharedPrefix; False if that does not reproduce `own`, its own logits.

    That is one not written against transformers' attention interface, or with sliding windows or recurrent states. The
    rest (biases, sinks, caps) is found by trying a few tokens both ways. A model in a narrow format is also widened,
    where that works.
    """
    try:
        layers = DynamicCache(config=model.config).layers
    except UNFIT:  # there are configs that it cannot read
        return False
    if not (
        model._supports_attention_backend  # noqa: SLF001 (the flag that transformers' own code reads)
        and model.config._attn_implementation == "sdpa"  # noqa: SLF001
        and layers
        and all(type(layer) is DynamicLayer for layer in layers)
    ):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    tolerance = EXACT if model.dtype == torch.float32 else ROUNDED
    model.set_attn_implementation(NAME)
    for put_back in (widen(model), lambda: model.set_attn_implementation("sdpa")):
        if _difference(model, own) <= tolerance:
            return True
        put_back()
    return False


def trial_prefix(model: Any) -> int:
    """Length of a trial's prefix, long enough to exceed common attention windows."""
    stated = model.config.get_text_config().to_dict().items()
    sizes = [size for name, size in stated if any(word in name for word in WINDOWS) and isinstance(size, int)]
    longest = longest_context(model.config) or WINDOW
    wanted = max((size for size in sizes if size <= WINDOW), default=0) + PREFIX
    return wanted if wanted + PROMPT + NEXT <= longest else PREFIX


def trial_tokens(model: Any) -> Int[Tensor, "2 t"]:
    """A few tokens from all over the vocabulary, since its first ones may be control tokens that no model has learnt.

    Both rows have the same prefix.
    """
    prefix = trial_prefix(model)
    rows = torch.arange(prefix + PROMPT + NEXT, device=model.device).repeat(2, 1)
    rows[1, prefix:] += PROMPT + NEXT
    return (rows * 7919 + 1000) % model.config.get_text_config().vocab_size


@torch.inference_mode()
def in_one_pass(model: Any) -> Float[Tensor, "2 t vocab"]:
    return model(input_ids=trial_tokens(model), use_cache=False).logits.float()


@torch.inference_mode()
def _difference(model: Any, own: Float[Tensor, "t vocab"]) -> float:
    """RMS distance from `own` of the logits of a prefix and its continuation run separately, in standard deviations."""
    begin, known = trial_prefix(model), empty_prefix(model)
    prefix, rest = trial_tokens(model)[:1].tensor_split([begin], 1)
    try:
        model(input_ids=prefix, past_key_values=known, use_cache=True)
        cache = SharedPrefix(known)
        with cache.read():
            positions = torch.arange(begin, begin + rest.shape[1], device=model.device)[None]
            mask = causal_mask(rest.shape[1], model)
            found = model(input_ids=rest, position_ids=positions, attention_mask=mask, past_key_values=cache).logits
    except UNFIT:  # such as factors of two formats
        return float("inf")
    return float(apart(found[0].float(), own[begin:]).square().mean().sqrt())


def apart(found: Float[Tensor, "n vocab"], own: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """RMS distance of logits from `own` in every row, in standard deviations of all."""
    # A model may bar entries of its vocabulary: both are -inf there.
    difference = torch.where(found == own, 0, found - own)
    return difference.square().mean(-1).sqrt() / own[own.isfinite()].std()


def causal_mask(width: int, model: Any) -> Float[Tensor, "1 1 w w"]:
    """Causal mask within a prompt, with -inf for later tokens; the prefix has no columns."""
    return torch.full((1, 1, width, width), float("-inf"), dtype=model.dtype, device=model.device).triu_(1)


def attend(
    module: Any,
    query: Float[Tensor, "n heads t p"],
    key: Float[Tensor, "n groups s p"],
    value: Float[Tensor, "n groups s p"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "n t heads p"], None]:
    """Attention of transformers' interface: PyTorch's own, unless inside `SharedPrefix.read`."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(value.dtype)
    cache = _CACHE.get()
    if cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    n, heads, t, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    out, normaliser = _attention(query, key, value, scale, attention_mask)
    prefix = cache.layers[module.layer_idx].prefix
    if prefix.get_seq_length():
        rows = query.unflatten(1, (groups, -1)).transpose(0, 1).reshape(1, groups, -1, size)
        # A CRATE model's values are its keys and not kept again.
        values = prefix.values if prefix.values.shape[-1] else prefix.keys
        seen, weight = _attention(rows, prefix.keys, values, scale)
        seen, weight = (x.view(groups, n, -1, t, *x.shape[3:]).transpose(0, 1).flatten(1, 2) for x in (seen, weight))
        out = torch.lerp(out, seen, torch.sigmoid(weight - normaliser)[..., None].to(out.dtype))
    return out.transpose(1, 2).contiguous(), None


def _attention(
    query: Float[Tensor, "n heads t p"],
    key: Float[Tensor, "n heads s p"],
    value: Float[Tensor, "n heads s p"],
    scale: float,
    mask: Float[Tensor, "_ 1 t s"] | None = None,
) -> tuple[Float[Tensor, "n heads t p"], Float[Tensor, "n heads t"]]:
    """Attention, and the logarithm of its normaliser (float32)."""
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, attn_mask=mask, scale=scale)
    found = []
    for start in range(0, query.shape[2], QUERIES):
        scores = (query[:, :, start : start + QUERIES] @ key.transpose(2, 3)).float() * scale
        if mask is not None:
            scores += mask[:, :, start : start + QUERIES]
        found.append((scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)))
    outs, normalisers = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(normalisers, 2)

"""A bfloat16 model that rounds only what it multiplies: residual stream, norms and logits stay float32.

A bfloat16 residual stream is rounded twice per layer, and a logit of 20 to the nearest eighth. Both are cheap to avoid:
nearly all of the time is spent in the matrix products inside the layers, which keep their bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PRODUCTS = (nn.Linear, Conv1D)


def widen(model: Any) -> Callable[[], None]:
    """Keep float32 between the matrix products of a model in a narrow format; return a function that undoes it.

    Embeddings, norms and the head become float32; what goes into any other product is rounded to the format of its
    weight. Attention has to round queries and keys itself (`prefix.attend` does). A model that multiplies without
    linear layers does not run that way: PyTorch refuses factors of two formats (RuntimeError). Quantised models, whose
    products choose their formats themselves, are left as they are.
    """
    narrow = model.dtype
    if narrow.itemsize >= torch.float32.itemsize or getattr(model, "is_quantized", False):
        return lambda: None
    wide = list(_wide(model))
    _cast(wide, torch.float32)
    products = [module for module in model.modules() if isinstance(module, PRODUCTS)]
    hooks = [module.register_forward_pre_hook(_rounded_to_its_weight) for module in products]

    def put_back() -> None:
        for hook in hooks:
            hook.remove()
        _cast(wide, narrow)

    return put_back


def _wide(model: Any) -> Iterator[nn.Parameter]:
    """Embeddings, the head, and vectors outside of linear layers (norms)."""
    for module in model.modules():
        whole = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        for parameter in module.parameters(recurse=False):
            if whole or (parameter.dim() == 1 and not isinstance(module, PRODUCTS)):
                yield parameter


def _cast(parameters: Sequence[nn.Parameter], format_: torch.dtype) -> None:
    # The tensor inside is exchanged, so that embeddings tied to a head stay tied.
    for parameter in parameters:
        parameter.data = parameter.data.to(format_)


def _rounded_to_its_weight(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(module.weight.dtype), *inputs[1:])

"""Merging: what the attacker sees of a layer (Eq. 1), W'_i = W + (alpha_i / r_i) B_i A_i, and of other kinds alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.bench.schema import Layer
from lowra.errors import LowraError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORDERS = ("once", "twice")


def merge_dtype(name: str) -> torch.dtype:
    """The dtype of a `merge.dtype` setting; raises LowraError listing the known ones."""
    if name not in DTYPES:
        raise LowraError(f"Unknown merge.dtype {name!r}; known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def merge(layer: Layer, dtype: torch.dtype = torch.float32, order: str = "once") -> Tensor:
    """The stack of merged weights (n, d, k), float32.

    The update is computed and added in float32, as the paper does. dtype: what the merge is then stored in;
    bfloat16 and float16 round it (a separate, labelled setting).
    order: "once" rounds the sum, W' = round(W + M). "twice" rounds the update first, W' = round(W + round(M)), as
    PEFT's `safe_merge` and every merge of 16-bit adapters do. In float32 the two are one. M is W' - W for every kind.
    Raises LowraError for an unknown order.
    """
    if order not in ORDERS:
        raise unknown("merge.order", order, ORDERS)
    d, k = layer.weight.shape
    stack = torch.empty(len(layer.loras), d, k)  # (n, d, k)
    for merged, update in zip(stack, layer.loras, strict=True):
        if order == "twice" and dtype != torch.float32:
            merged.copy_(update.difference(layer.weight, dtype)).add_(layer.weight)
        else:
            update.apply(layer.weight, out=merged)
        if dtype != torch.float32:
            merged.copy_(merged.to(dtype))
    return stack

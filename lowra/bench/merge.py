"""Merging: what the attacker sees of a layer (Eq. 1), W'_i = W + (alpha_i / r_i) B_i A_i."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.bench.schema import Layer
from lowra.errors import LowraError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_dtype(name: str) -> torch.dtype:
    """The dtype of a `merge.dtype` setting; raises LowraError listing the known ones."""
    if name not in DTYPES:
        raise LowraError(f"Unknown merge.dtype {name!r}; known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def merge(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stack of merged weights (n, d, k), float32.

    The update is computed and added in float32, as the paper does. dtype: what the merge is then stored in;
    bfloat16 and float16 round it once more (a separate, labelled setting).
    """
    d, k = layer.weight.shape
    stack = torch.empty(len(layer.loras), d, k)  # (n, d, k)
    for merged, lora in zip(stack, layer.loras, strict=True):
        torch.mm(lora.B, lora.A, out=merged)
        merged.mul_(lora.scale).add_(layer.weight)
        if dtype != torch.float32:
            merged.copy_(merged.to(dtype))
    return stack

"""Models of another base among those the attacker holds: what a folder of downloads may well contain."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowra.bench.merging import merge
from lowra.bench.schema import Layer
from lowra.errors import LowraError


def swap(
    layer: Layer,
    merged: Tensor,
    dtype: torch.dtype = torch.float32,
    order: str = "once",
    *,
    seed: int,
    count: int = 1,
) -> Tensor:
    """The stack with `count` of its models made of another base: W'_i = W_other + M_i, merged as the others were.

    W_other is W with its rows and its columns permuted: a weight of the same distribution, spectrum and grid, and as
    far from W as another pre-training would be (a squared distance of twice W's variance). The models and the
    permutations come from the seed; give every layer of a draw the same one, since a model is of one base.

    layer: with its n LoRAs; merged: (n, d, k), `merge(layer, dtype, order)`, which is not changed.
    Returns a new stack (n, d, k), float32. Raises LowraError unless two or more models keep the true base.
    """
    n = len(layer.loras)
    if not 0 <= count <= n - 2:
        raise LowraError(
            f"merge.foreign is {count}, of {n} models; expected 0 to {n - 2}, so that two at least share the true base."
        )
    if count == 0:
        return merged
    d, k = layer.weight.shape
    generator = torch.Generator().manual_seed(seed)
    strangers = torch.randperm(n, generator=generator)[:count].tolist()
    rows, columns = torch.randperm(d, generator=generator), torch.randperm(k, generator=generator)
    other = replace(layer, weight=layer.weight[rows][:, columns], loras=tuple(layer.loras[i] for i in strangers))
    stack = merged.clone()
    stack[strangers] = merge(other, dtype, order).to(stack.dtype)
    return stack

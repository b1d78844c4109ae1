"""The weight metrics: W-Error (Eq. 8) and the share of bit-exact weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowra.bench.schema import Layer

EXACT = -104 * math.log10(2)
"""log10 of float64 epsilon squared, about -31.3: what an exactly recovered layer (error 0) counts as in means."""

_CHUNK = 1 << 22  # weights per float64 chunk: a 4096 x 4096 layer never has a float64 copy


def weight_error(recovered: Tensor, weight: Tensor) -> float:
    """log10 of the mean squared difference of two (d, k) matrices, summed in float64; `EXACT` where it is 0.

    A recovery that is not finite has an infinite error.
    """
    total = 0.0
    for a, b in zip(recovered.reshape(-1).split(_CHUNK), weight.reshape(-1).split(_CHUNK), strict=True):
        total += float((a.double() - b.double()).square_().sum())
    if not math.isfinite(total):
        return math.inf
    return math.log10(total / weight.numel()) if total > 0 else EXACT


def floor_error(merged: Tensor, layer: Layer) -> float:
    """W-Error of the mean of W'_i - M_i with the true M_i: the rounding of the merges, and all that is left of it.

    A recovery that treats all weights alike cannot do better; one that weighs them by their rounding can.
    merged: (n, d, k), of the layer's LoRAs in their order. M_i is computed in float64.
    """
    total = torch.zeros(layer.weight.shape, dtype=torch.float64)
    for weight, lora in zip(merged, layer.loras, strict=True):
        total.add_(weight).addmm_(lora.B.double(), lora.A.double(), alpha=-lora.scale)
    return weight_error(total.div_(len(layer.loras)), layer.weight)


def exact_fraction(recovered: Tensor, weight: Tensor) -> float:
    """The share of weights that are the true ones bit for bit (so 0.0 and -0.0 differ).

    Nothing is rounded: a float64 answer is compared in float64, in which a float32 weight has one spelling.
    """
    same = 0
    for a, b in zip(recovered.reshape(-1).split(_CHUNK), weight.reshape(-1).split(_CHUNK), strict=True):
        if a.dtype == torch.float64:
            equal = a.contiguous().view(torch.int64) == b.double().view(torch.int64)
        else:
            equal = a.float().contiguous().view(torch.int32) == b.contiguous().view(torch.int32)
        same += int(equal.count_nonzero())
    return same / weight.numel()

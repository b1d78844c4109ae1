"""The weight metrics: W-Error (Eq. 8) and the share of bit-exact weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowra.bench.schema import Layer

EXACT = -104 * math.log10(2)
"""log10 of float64 epsilon squared, about -31.3: what an exactly recovered layer (error 0) counts as in means."""

_CHUNK = 1 << 17  # weights worked on at a time: 1 MB in float64 stays in a core's cache, a whole layer does not


def weight_error(recovered: Tensor, weight: Tensor) -> float:
    """log10 of the mean squared difference of two (d, k) matrices, summed in float64; `EXACT` where it is 0.

    A recovery that is not finite has an infinite error.
    """
    total = 0.0
    for a, b in zip(recovered.reshape(-1).split(_CHUNK), weight.reshape(-1).split(_CHUNK), strict=True):
        total += float(torch.sub(a.double(), b).square_().sum())  # a float64 `a` is the caller's own
    return _log(total, weight.numel())


def _log(squares: float, count: int) -> float:
    if not math.isfinite(squares):
        return math.inf
    return math.log10(squares / count) if squares > 0 else EXACT


def floor_error(merged: Tensor, layer: Layer) -> float:
    """W-Error of the mean of W'_i - M_i with the true M_i: the rounding of the merges, and all that is left of it.

    A recovery that treats all weights alike cannot do better; one that weighs them by their rounding can.
    merged: (n, d, k), of the layer's LoRAs in their order. M_i is computed in float64. Kinds that multiply are undone
    with their true scales and rotations.
    """
    d, k = layer.weight.shape
    if not all(lora.kind in ("lora", "rslora") for lora in layer.loras):
        total = torch.zeros(d, k, dtype=torch.float64)
        for lora, weight in zip(layer.loras, merged, strict=True):
            total += lora.undo(weight, layer.weight)
        return weight_error(total.div_(len(layer.loras)), layer.weight)
    # All updates as one product, with the scales on the B side: a pass over the block instead of one for each.
    left = torch.cat([lora.B.double() * lora.scale for lora in layer.loras], 1)  # (d, sum of ranks)
    right = torch.cat([lora.A.double() for lora in layer.loras])  # (sum of ranks, k)
    squares, rows = 0.0, max(1, 2 * _CHUNK // k)
    for start in range(0, d, rows):
        block = slice(start, start + rows)
        total = torch.mm(left[block], right).neg_()  # (rows, k)
        for weight in merged:
            total.add_(weight[block])
        squares += float(total.div_(len(layer.loras)).sub_(layer.weight[block]).square_().sum())
    return _log(squares, d * k)


def exact_fraction(recovered: Tensor, weight: Tensor) -> float:
    """The share of weights that are the true ones bit for bit (so 0.0 and -0.0 differ).

    Nothing is rounded: a float64 answer is compared in float64, in which a float32 weight has one spelling.
    """
    wide = recovered.dtype == torch.float64
    bits = np.int64 if wide else np.int32
    same = 0
    for a, b in zip(recovered.reshape(-1).split(_CHUNK), weight.reshape(-1).split(_CHUNK), strict=True):
        ours, true = (a, b.double()) if wide else (a.float(), b)
        same += int(np.count_nonzero(ours.numpy().view(bits) == true.numpy().view(bits)))
    return same / weight.numel()

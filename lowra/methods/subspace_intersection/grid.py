"""The grid of the base weights: published weights are bfloat16, float16 or float32 numbers, and nothing between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import ulp

GRIDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# An estimate counts as on a grid when the mean of cos(2 pi estimate / ulp) exceeds this. The mean is 1 on the grid, 0 off
# it, and exp(-2 (pi s / ulp)^2) on it with a normal error s; at 0.2 the error is 0.29 ulp, where rounding stops to pay.
ALIGNED = 0.2


def detect(estimate: Tensor) -> str:
    """Name of the grid that rounding the estimate (rows, k) would improve it on; fp32 where no coarser one shows.

    Looks at the larger half of the entries, whose steps are the widest. bf16 comes first because bf16 numbers of these
    sizes are fp16 numbers too.
    """
    magnitude = estimate.abs()
    large = estimate[magnitude > magnitude.median()]
    for name in ("bf16", "fp16"):
        phase = 2 * math.pi * large / ulp(large, GRIDS[name])
        if large.numel() and float(phase.cos().mean()) > ALIGNED:
            return name
    return "fp32"


def snapped(estimate: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest numbers of the grid, as float32."""
    return estimate.to(dtype).float()

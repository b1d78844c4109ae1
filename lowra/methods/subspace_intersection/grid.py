"""The grid of the base weights: published weights are bfloat16, float16 or float32 numbers, and nothing between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Estimate
from lowra.methods.subspace_intersection.noise import sampled_rows, ulp
from lowra.methods.subspace_intersection.problem import Problem

GRIDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# An estimate counts as on a grid when the mean of cos(2 pi estimate / ulp) exceeds this. The mean is 1 on the grid, 0
# off it, and exp(-2 (pi s / ulp)^2) near it with a normal error s; at 0.2 that is 0.29 ulp, where rounding stops to
# pay.
ALIGNED = 0.2


# Half-precision merges lie on their own grid, and estimates near them too, whatever the base weight did. Only if the
# estimate falls short of full alignment by less than this share of what the plain mean falls short, or hardly at all,
# is the grid taken for the base weight's. Heuristic; on merges in bfloat16 it told both kinds of base apart.
CLOSER = 0.9
NEARLY_ALL = 0.97


def alignment(estimate: Tensor, dtype: torch.dtype) -> float:
    """Mean cosine of the phase of the larger entries (rows, k) on a grid; their steps are the widest."""
    magnitude = estimate.abs()
    large = estimate[magnitude >= magnitude.mean()]
    return float((2 * math.pi * large / ulp(large, dtype)).cos().mean()) if large.numel() else 0.0


def detect(estimate: Tensor, mean: Tensor) -> str:
    """Name of the grid that rounding the estimate (rows, k) would improve it on; fp32 where no coarser one shows.

    mean: the same rows of the mean of the merged weights. bf16 comes first because bf16 numbers of these sizes are fp16
    numbers too.
    """
    for name in ("bf16", "fp16"):
        aligned = alignment(estimate, GRIDS[name])
        gained = 1 - aligned < CLOSER * (1 - alignment(mean, GRIDS[name]))
        if aligned > NEARLY_ALL or (aligned > ALIGNED and gained):
            return name
    return "fp32"


def detected(estimate: Estimate, problem: Problem) -> str:
    """The grid of the base weights, told from some rows of the estimate."""
    _, d, k = problem.merged.shape
    rows = sampled_rows(d, k, problem.merged.device)
    return detect(estimate.rows(rows), problem.mean().rows(rows))

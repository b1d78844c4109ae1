"""The grid of the base weights: published weights are bfloat16, float16 or float32 numbers, or a scale times integers.

Told from the estimate alone, and only where rounding to it moves no entry by more than the estimate may be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.noise import sampled_rows, ulp
from lowra.methods.subspace_intersection.problem import Problem

GRIDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Name of the grid of quantised weights: one scale times integers, held in float32.
INTEGERS = "scaled integers"

# An estimate counts as on a grid when the mean of cos(2 pi estimate / ulp) exceeds this. The mean is 1 on the grid, 0
# off it, and exp(-2 (pi s / ulp)^2) near it with a normal error s; at 0.2 that is 0.29 ulp, where rounding stops to
# pay.
ALIGNED = 0.2


# Half-precision merges lie on their own grid, and estimates near them too, whatever the base weight did. Only if the
# estimate falls short of full alignment by less than this share of what the plain mean falls short, or hardly at all,
# is the grid taken for the base weight's. Heuristic; on merges in bfloat16 it told both kinds of base apart.
CLOSER = 0.9
NEARLY_ALL = 0.97

# On its grid an estimate is no farther from it than from W. Beyond ten times the error predicted, in the mean square,
# it is none: few-valued weights are near many grids.
BEYOND = 10.0

# A grid of integers needs levels this many standard errors apart, and on average so many entries at each.
APART = 30.0
CROWD = 8

# Steps are told apart down to this share of the largest level: quotients multiply the errors of the levels.
FINEST = 1e-5


@dataclass(frozen=True)
class Grid:
    """Numbers that W is rounded to: those of a float format, or multiples of a step.

    name: for the records; "none" is no grid, and float64.
    """

    name: str
    step: float = 0.0

    @property
    def coarse(self) -> bool:
        """Whether it is coarser than the rounding of float32 merges, so that W comes back bit by bit."""
        return self.name not in ("fp32", "none")

    def round(self, weight: Tensor) -> Tensor:
        """The nearest numbers of the grid to (rows, k) float64, as float32."""
        if self.step:
            return (weight / self.step).round_().mul_(self.step).float()
        return weight.to(GRIDS[self.name]).float()

    def rounded(self, estimate: Estimate) -> Tensor:
        """All of an estimate on the grid, (d, k) float32; float64 where there is none."""
        if self.step:
            return self.round(estimate.dense(torch.float64))
        return estimate.dense(torch.float64 if self.name == "none" else GRIDS[self.name])


def alignment(estimate: Tensor, dtype: torch.dtype) -> float:
    """Mean cosine of the phase of the larger entries (rows, k) on a grid; their steps are the widest."""
    magnitude = estimate.abs()
    large = estimate[magnitude >= magnitude.mean()]
    return float((2 * math.pi * large / ulp(large, dtype)).cos().mean()) if large.numel() else 0.0


def detect(estimate: Tensor, mean: Tensor, error: float | None = None) -> Grid:
    """The grid that rounding the estimate (rows, k) would improve it on; fp32 where no coarser one shows.

    mean: the same rows of the mean of the merged weights. error: mean square expected of the estimate, where known.
    bf16 comes first because bf16 numbers of these sizes are fp16 numbers too.
    """

    def near(grid: Grid) -> bool:
        return error is None or float((grid.round(estimate) - estimate).square().mean()) < BEYOND * error

    for name in ("bf16", "fp16"):
        aligned = alignment(estimate, GRIDS[name])
        gained = 1 - aligned < CLOSER * (1 - alignment(mean, GRIDS[name]))
        if (aligned > NEARLY_ALL or (aligned > ALIGNED and gained)) and near(Grid(name)):
            return Grid(name)
    if error is not None:
        grid = integers(estimate, math.sqrt(error))
        if grid is not None and near(grid):
            return grid
    return Grid("fp32")


def integers(estimate: Tensor, error: float) -> Grid | None:
    """The step of a grid of multiples, from the few levels the entries (rows, k) of an estimate lie at; None if many.

    error: standard error of an entry. The step is the largest number that all levels are multiples of: Euclid's
    algorithm on the levels, then least squares over the entries.
    """
    values = estimate.flatten().sort().values
    breaks = (values.diff() > APART * error).nonzero().flatten() + 1
    if CROWD * breaks.numel() > values.numel():
        return None
    tolerance = max(APART / 2 * error, FINEST * float(values.abs().max()))
    step = 0.0
    # From the smallest level on: the step is then known well when it is held against the large multiples.
    for level in sorted(abs(float(part.median())) for part in torch.tensor_split(values, breaks.cpu())):
        step = common_step(step, level, tolerance)
    if step <= 2 * tolerance:
        return None
    multiples = (estimate / step).round()
    step = float((multiples * estimate).sum() / multiples.square().sum())
    # Scales are stored as float32 numbers, and so are their multiples.
    return Grid(INTEGERS, float(torch.tensor(step, dtype=torch.float32)))


def common_step(first: float, second: float, tolerance: float) -> float:
    """The largest number that both are multiples of, up to a tolerance."""
    while second > tolerance:
        first, second = second, abs(first - second * round(first / second))
    return first


def detected(answer: Answer, problem: Problem) -> Grid:
    """The grid of the base weights, told from some rows of the estimate."""
    _, d, k = problem.merged.shape
    rows = sampled_rows(d, k, problem.merged.device)
    error = None if answer.predicted is None else 10**answer.predicted
    return detect(answer.estimate.rows(rows), problem.mean().rows(rows), error)

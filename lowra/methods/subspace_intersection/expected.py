"""What error the returned weight should have: the certificate's prediction carried through refinement and rounding.

The certificate predicts the mean square error of the closed form, where models count as wholes. What is returned has
often been fitted again with every entry weighted by its own rounding, and rounded to the grid of the base; both only
help, how much depends on the entry: a large weight has a wide step, and is exact when its error is below half of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer
from lowra.methods.subspace_intersection.grid import GRIDS, Grid
from lowra.methods.subspace_intersection.noise import sampled_rows, ulp
from lowra.methods.subspace_intersection.problem import Problem

ENTRIES = 2**16  # looked at: each counts with its expectation, so that few tell
STEPS = 4  # wrong numbers of the grid that are told apart on either side
WIDE = 1.5  # beyond so many steps of standard error, rounding adds its own variance and nothing else
EXACT = -104 * math.log10(2)  # what a layer without errors counts as (Eq. 8)


@dataclass(frozen=True)
class Expected:
    """log10 of the mean square error of a weight, in working units; the share of exact entries, None on no grid."""

    w_error: float
    exact: float | None = None


def expected(answer: Answer, problem: Problem, grid: Grid, weight: Tensor, *, refined: bool) -> Expected | None:
    """What to expect of `weight` (d, k); None where W is not identified.

    refined: whether entries were weighted by their own rounding. What the updates gain by that is not known, and the
    least is taken: where they are small up to .08 more of the weights are exact than expected. Told from some rows. A
    normal error of variance v on a grid of step u is on average u^2 sum_m m^2 P((m - 1/2) u < |e| < (m + 1/2) u), and
    none where |e| < u / 2.
    """
    if answer.predicted is None:
        return None
    used = problem.subset([i for i, label in enumerate(problem.labels) if label not in answer.outliers])
    _, d, k = used.merged.shape
    rows = sampled_rows(d, k, used.merged.device, ENTRIES)
    spread = ulp(used.merged[:, rows], used.storage).double().square_().div_(12)  # (n, rows, k)
    shares = spread.new_tensor(used.mean().weights)[:, None, None]
    plain = (shares.square() * spread).sum(0)  # (rows, k)
    rest = max(0.0, 10**answer.predicted - float(plain.mean()))  # what the updates' errors leave, alike everywhere
    variance = plain + rest
    if refined:
        own = 1 / (1 / spread).sum(0)
        variance = own + rest * float(own.mean() / plain.mean())
    if grid.name == "none":
        return Expected(math.log10(float(variance.mean())))
    entries = weight[rows]
    step = torch.full_like(variance, grid.step) if grid.step else ulp(entries.float(), GRIDS[grid.name]).double()
    deviation = variance.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    beyond = [torch.erfc((m - 0.5) * step / (deviation * math.sqrt(2))) for m in range(1, STEPS + 2)]
    wrong = sum(m * m * (beyond[m - 1] - beyond[m]) for m in range(1, STEPS + 1))
    square = torch.where(deviation > WIDE * step, variance + step.square() / 12, step.square() * wrong)
    mean = float(square.mean())
    return Expected(max(EXACT, math.log10(mean)) if mean > 0 else EXACT, 1 - float(beyond[0].mean()))

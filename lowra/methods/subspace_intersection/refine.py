"""Weighted maximum likelihood: small weights are rounded finer than large ones, and say so.

A float's rounding error is proportional to its size: where |W| is a hundred times smaller than elsewhere, so is the
error, and those entries pin the updates down a hundred times better. The closed form treats all entries alike; here
each entry of each model counts by the inverse variance of its own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import ulp

# Sweeps of alternating least squares. The gain flattens out here; Anderson acceleration was tried and added nothing.
SWEEPS = 20

# Largest weight of an entry, over the median: entries at almost exactly zero would otherwise decide alone.
CLIP = 1e8

# Relative ridge of the regressions: keeps rows solvable whose weight falls on too few entries.
RIDGE = 1e-9


def weighted_refinement(
    stack: Tensor, estimate: Tensor, factors: Sequence[tuple[Tensor, Tensor]], storage: torch.dtype
) -> Tensor:
    """Minimise sum_i sum_ab (W'_i - W - L_i R_i^T)_ab^2 / var_iab over W and the factors, from a close start.

    var_iab = ulp(W'_iab)^2 / 12. Alternates the weighted regressions for the rows of L_i, the rows of R_i, and the
    weighted mean for W.

    stack: (n, d, k), estimate: (d, k), factors: L_i (d, r_i) and R_i (k, r_i). Returns W (d, k) float64.
    """
    precision = 1 / ulp(stack, storage).double().square_()  # (n, d, k)
    precision /= precision.median()
    precision.clamp_(max=CLIP)
    total = precision.sum(0)  # (d, k)
    weight = estimate.double()
    factors = [(left.double(), right.double()) for left, right in factors]
    for _ in range(SWEEPS):
        result = torch.zeros_like(weight)
        for i, (left, right) in enumerate(factors):
            merged = stack[i].double()
            if left.shape[1]:
                left = left + weighted_regression(merged - weight - left @ right.mT, precision[i], right)
                rest = merged - weight - left @ right.mT
                right = right + weighted_regression(rest.mT, precision[i].mT, left)
            factors[i] = (left, right)
            result += precision[i] * (merged - left @ right.mT)
        weight = result / total
    return weight


def weighted_regression(target: Tensor, precision: Tensor, basis: Tensor) -> Tensor:
    """Rows x_a (r) that minimise sum_b precision_ab (target_ab - x_a . basis_b)^2.

    One r x r system a row, with a relative ridge on its diagonal. Called for increments, so the ridge only slows
    convergence in directions that a row hardly sees, and biases nothing.

    target, precision: (d, k), basis: (k, r). Returns (d, r).
    """
    r = basis.shape[1]
    size = basis.norm(dim=0)
    basis = basis / size
    squares = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (k, r r)
    normal = (precision @ squares).view(-1, r, r)  # (d, r, r)
    normal.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE)
    moments = ((precision * target) @ basis).unsqueeze(-1)  # (d, r, 1)
    return torch.linalg.solve(normal, moments).squeeze(-1) / size

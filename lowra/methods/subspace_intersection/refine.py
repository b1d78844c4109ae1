"""Weighted maximum likelihood: small weights are rounded finer than large ones, and say so.

A float's rounding error is proportional to its size: where |W| is a hundred times smaller than elsewhere, so is the
error, and those entries pin the updates down a hundred times better. The closed form treats all entries alike; here
each entry of each model counts by the inverse variance of its own rounding.

    minimise  sum_i sum_ab P_iab (W'_i - W - L_i R_i^T)_ab^2   over W and the factors,  P_iab = 1 / ulp(W'_iab)^2

For given factors W is a weighted mean, so that only they are unknown. Gauss-Newton from the closed form, its linear
systems by conjugate gradients. Alternating least squares, which the preconditioner is one sweep of, needs thousands of
sweeps where W is weakly determined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import ulp

# Gauss-Newton steps, and iterations in each. The start is within rounding of the answer; on layers of the miniatures
# twice as many iterations gained 0.01 of W-Error.
STEPS, ITERATIONS = 3, 20

# Relative residual at which the iterations end early, in the norm of the preconditioner.
TOLERANCE = 1e-4

# Largest weight of an entry, over the median: entries at almost exactly zero would otherwise decide alone.
CLIP = 1e8

# Relative ridge of the preconditioner: keeps rows solvable whose weight falls on too few entries.
RIDGE = 1e-9

# L_i (d, r_i) and R_i (k, r_i) of each model, or changes of them.
Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Fit:
    """The weighted problem: stack and precision P (n, d, k), total (d, k) the sum of the P_i."""

    stack: Tensor
    precision: Tensor
    total: Tensor

    def mean(self, parts: Iterator[Tensor]) -> Tensor:
        """Weighted mean over the models of (d, k) each, taken one at a time."""
        result = torch.zeros_like(self.total)
        for precision, part in zip(self.precision, parts, strict=True):
            result += precision * part
        return result.div_(self.total)

    def rests(self, factors: Factors) -> Iterator[Tensor]:
        """W'_i - L_i R_i^T, (d, k) each."""
        return (merged.double() - left @ right.mT for merged, (left, right) in zip(self.stack, factors, strict=True))

    def weight(self, factors: Factors) -> Tensor:
        """The best W (d, k) for these factors."""
        return self.mean(self.rests(factors))

    def slope(self, factors: Factors) -> tuple[Factors, float]:
        """Minus half the gradient in the factors, and the objective."""
        weight = self.weight(factors)
        slopes, objective = [], 0.0
        for precision, rest, (left, right) in zip(self.precision, self.rests(factors), factors, strict=True):
            rest -= weight
            pull = precision * rest
            objective += float((pull * rest).sum())
            slopes.append((pull @ right, pull.mT @ left))
        return slopes, objective

    def curvature(self, factors: Factors, change: Factors) -> Factors:
        """The Gauss-Newton matrix times a change: half the gradient of the linearised objective."""

        def tangents() -> Iterator[Tensor]:
            pairs = zip(factors, change, strict=True)
            return (by_left @ right.mT + left @ by_right.mT for (left, right), (by_left, by_right) in pairs)

        mean = self.mean(tangents())
        # Made twice rather than kept: all of them would be as large as the stack.
        pulls = (precision * (part - mean) for precision, part in zip(self.precision, tangents(), strict=True))
        return [(pull @ right, pull.mT @ left) for pull, (left, right) in zip(pulls, factors, strict=True)]

    def blocks(self, factors: Factors) -> Factors:
        """Cholesky factors (d, r_i, r_i) and (k, r_i, r_i) of the matrix's diagonal blocks, one a row of a factor."""

        def cholesky(precision: Tensor, basis: Tensor) -> Tensor:
            r = basis.shape[1]
            squares = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (k, r r)
            normal = (precision @ squares).unflatten(1, (r, r))  # (d, r, r)
            normal.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE)
            return torch.linalg.cholesky(normal)

        pairs = []
        for precision, (left, right) in zip(self.precision, factors, strict=True):
            own = precision * (1 - precision / self.total)  # W follows by a share of the change
            pairs.append((cholesky(own, right), cholesky(own.mT, left)))
        return pairs


def weighted_refinement(stack: Tensor, factors: Sequence[tuple[Tensor, Tensor]], storage: torch.dtype) -> Tensor:
    """W (d, k) float64 of the weighted fit, from a close start.

    stack: (n, d, k) merged weights as stored in `storage`, factors: L_i (d, r_i) and R_i (k, r_i). A step that does not
    lower the objective is not taken.
    """
    precision = 1 / ulp(stack, storage).double().square_()  # (n, d, k)
    precision /= precision.median()
    precision.clamp_(max=CLIP)
    fit = Fit(stack, precision, precision.sum(0))
    current = [(left.double(), right.double()) for left, right in factors]
    slope, objective = fit.slope(current)
    for _ in range(STEPS):
        moved = added(current, gauss_newton(fit, current, slope), 1.0)
        slope, lower = fit.slope(moved)
        if not lower < objective:
            break
        current, objective = moved, lower
    return fit.weight(current)


def gauss_newton(fit: Fit, factors: Factors, slope: Factors) -> Factors:
    """The change of the factors that minimises the linearised objective, by preconditioned conjugate gradients.

    The matrix is singular: L G and -R G^T cancel for any G (r, r). The slope has no part there, nor has the solution.
    """
    blocks = fit.blocks(factors)

    def precondition(pull: Factors) -> Factors:
        solved = []
        for pair, triangles in zip(pull, blocks, strict=True):
            left, right = (
                torch.cholesky_solve(rows.unsqueeze(-1), triangle).squeeze(-1)
                for rows, triangle in zip(pair, triangles, strict=True)
            )
            solved.append((left, right))
        return solved

    change = [(torch.zeros_like(left), torch.zeros_like(right)) for left, right in factors]
    rest = slope
    direction = step = precondition(rest)
    size = first = inner(rest, step)
    for _ in range(ITERATIONS):
        if size <= TOLERANCE**2 * first:
            break
        image = fit.curvature(factors, direction)
        length = size / inner(direction, image)
        change = added(change, direction, length)
        rest = added(rest, image, -length)
        step = precondition(rest)
        before, size = size, inner(rest, step)
        direction = added(step, direction, size / before)
    return change


def added(first: Factors, second: Factors, scale: float) -> Factors:
    """A change, plus so many times another."""
    return [(a.add(c, alpha=scale), b.add(d, alpha=scale)) for (a, b), (c, d) in zip(first, second, strict=True)]


def inner(first: Factors, second: Factors) -> float:
    """Sum of products."""
    return sum(float((a * c).sum() + (b * d).sum()) for (a, b), (c, d) in zip(first, second, strict=True))

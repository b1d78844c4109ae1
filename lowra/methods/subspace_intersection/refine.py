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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

# Models are worked on together while they hold at most this many numbers in all: small layers, where calls cost more
# than arithmetic. Of large ones two float64 copies at a time are enough.
BATCH_ENTRIES = 2**17


class Factors(NamedTuple):
    """Of all models, the factors' transposes L^T (n, r, d) and R^T (n, r, k), or changes of them.

    r is the largest rank, and rows of zeros, which stay zeros, fill up the others'. Thin matrices lie down because
    batches of such are multiplied three times as fast.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        """Those of L_i (d, r_i) and R_i (k, r_i), in float64."""
        sides = zip(*pairs, strict=True)
        return cls(*(pad_sequence([part.mT.double() for part in side], batch_first=True) for side in sides))

    def plus(self, other: Factors, scale: float) -> Factors:
        """These, plus so many times the others."""
        return Factors(self.left.add(other.left, alpha=scale), self.right.add(other.right, alpha=scale))

    def inner(self, other: Factors) -> float:
        """Sum of products."""
        return float((self.left * other.left).sum() + (self.right * other.right).sum())


@dataclass(frozen=True)
class Fit:
    """The weighted problem: stack and precision P (n, d, k), total (d, k) the sum of the P_i."""

    stack: Tensor
    precision: Tensor
    total: Tensor

    def batches(self) -> Iterator[slice]:
        """The models, as many at a time as are worked on together."""
        size = max(1, BATCH_ENTRIES // self.total.numel())
        return (slice(start, start + size) for start in range(0, len(self.stack), size))

    def mean(self, parts: Iterable[Tensor]) -> Tensor:
        """Weighted mean over the models of (d, k) each, taken a batch at a time."""
        result = torch.zeros_like(self.total)
        for batch, part in zip(self.batches(), parts, strict=True):
            result += (self.precision[batch] * part).sum(0)
        return result.div_(self.total)

    def rests(self, factors: Factors) -> Iterator[Tensor]:
        """W'_i - L_i R_i^T, a batch (b, d, k) at a time."""
        for batch in self.batches():
            yield torch.baddbmm(self.stack[batch].double(), factors.left[batch].mT, factors.right[batch], alpha=-1)

    def weight(self, factors: Factors) -> Tensor:
        """The best W (d, k) for these factors."""
        return self.mean(self.rests(factors))

    def pulled(self, factors: Factors, pulls: Iterable[Tensor]) -> Factors:
        """What pulls (b, d, k) at the models' entries are for their factors: (G_i R_i)^T and (G_i^T L_i)^T."""
        sides = [
            (factors.right[batch] @ pull.mT, factors.left[batch] @ pull)
            for batch, pull in zip(self.batches(), pulls, strict=True)
        ]
        return Factors(torch.cat([left for left, _ in sides]), torch.cat([right for _, right in sides]))

    def slope(self, factors: Factors) -> tuple[Factors, float]:
        """Minus half the gradient in the factors, and the objective."""
        weight = self.weight(factors)
        objective = 0.0

        def pulls() -> Iterator[Tensor]:
            nonlocal objective
            for batch, rest in zip(self.batches(), self.rests(factors), strict=True):
                rest -= weight
                pull = self.precision[batch] * rest
                objective += float((pull * rest).sum())
                yield pull

        return self.pulled(factors, pulls()), objective

    def curvature(self, factors: Factors, change: Factors) -> Factors:
        """The Gauss-Newton matrix times a change: half the gradient of the linearised objective."""
        # L' R^T + L R'^T as one product.
        left = torch.cat([change.left, factors.left], 1)  # (n, 2 r, d)
        right = torch.cat([factors.right, change.right], 1)  # (n, 2 r, k)

        def tangents() -> Iterator[Tensor]:
            return (left[batch].mT @ right[batch] for batch in self.batches())

        batches = list(self.batches())
        # Of several batches made twice rather than kept: all of them would be as large as the stack.
        parts = list(tangents()) if len(batches) == 1 else None
        mean = self.mean(parts or tangents())
        pulls = (part.sub_(mean).mul_(self.precision[b]) for b, part in zip(batches, parts or tangents(), strict=True))
        return self.pulled(factors, pulls)

    def inverse_blocks(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Inverses (n, d, r, r) and (n, k, r, r) of the matrix's diagonal blocks, one a row of a factor."""

        def inverse(precision: Tensor, basis: Tensor) -> Tensor:  # (b, d, k), (b, r, k)
            squares = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1, 2)  # (b, r r, k)
            normal = (squares @ precision.mT).mT.unflatten(2, (basis.shape[1],) * 2)  # (b, d, r, r)
            diagonal = normal.diagonal(dim1=2, dim2=3).mul_(1 + RIDGE)
            diagonal[diagonal == 0] = 1  # a row of zeros is mapped to itself
            return torch.cholesky_inverse(torch.linalg.cholesky(normal))

        pairs = []
        for batch in self.batches():
            precision = self.precision[batch]
            own = precision * (1 - precision / self.total)  # W follows by a share of the change
            pairs.append((inverse(own, factors.right[batch]), inverse(own.mT, factors.left[batch])))
        return torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs])


def weighted_refinement(
    stack: Tensor, factors: Sequence[tuple[Tensor, Tensor]], storage: torch.dtype, excess: Sequence[float] = ()
) -> Tensor:
    """W (d, k) float64 of the weighted fit, from a close start.

    stack: (n, d, k) merged weights as stored in `storage`, factors: L_i (d, r_i) and R_i (k, r_i). excess: by model,
    the variance of what noise all its entries have alike beyond that rounding; none by default. A step that does not
    lower the objective is not taken.
    """
    squares = ulp(stack, storage).double().square_()  # (n, d, k)
    if any(excess):
        squares += 12 * squares.new_tensor(excess)[:, None, None]
    precision = 1 / squares
    precision /= precision.median()
    precision.clamp_(max=CLIP)
    fit = Fit(stack, precision, precision.sum(0))
    current = Factors.of(factors)
    slope, objective = fit.slope(current)
    for _ in range(STEPS):
        moved = current.plus(gauss_newton(fit, current, slope), 1.0)
        slope, lower = fit.slope(moved)
        if not lower < objective:
            break
        current, objective = moved, lower
    return fit.weight(current)


def gauss_newton(fit: Fit, factors: Factors, slope: Factors) -> Factors:
    """The change of the factors that minimises the linearised objective, by preconditioned conjugate gradients.

    The matrix is singular: L G and -R G^T cancel for any G (r, r). The slope has no part there, nor has the solution.
    """
    blocks = fit.inverse_blocks(factors)

    def precondition(pull: Factors) -> Factors:
        return Factors(*map(applied, blocks, pull))

    change = Factors(*map(torch.zeros_like, factors))
    rest = slope
    direction = step = precondition(rest)
    size = first = rest.inner(step)
    for _ in range(ITERATIONS):
        if size <= TOLERANCE**2 * first:
            break
        image = fit.curvature(factors, direction)
        length = size / direction.inner(image)
        change = change.plus(direction, length)
        rest = rest.plus(image, -length)
        step = precondition(rest)
        before, size = size, rest.inner(step)
        direction = step.plus(direction, size / before)
    return change


def applied(blocks: Tensor, rows: Tensor) -> Tensor:
    """Blocks (n, d, r, r) times the columns of (n, r, d)."""
    return (blocks @ rows.mT.unsqueeze(-1)).squeeze(-1).mT

"""How exact the estimate is, told without the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.ranges import Core
from lowra.methods.subspace_intersection.solve import IDENTIFIABLE, SAME, Solution, Tangents, conjugate_gradients

# Below this one the estimate holds, but its error is much above the rounding of the merges.
WELL_CONDITIONED = 1e-3

# Cores of at most this many entries get their operator's spectrum in full.
DENSE_ENTRIES = 600

# Vectors of the block inverse iteration for lambda_min, its steps, and random probes for the rest of the trace.
BLOCK, STEPS, PROBES = 2, 3, 2


@dataclass(frozen=True)
class Evidence:
    """What the data say about the estimate.

    lambda_min: smallest eigenvalue of the identifiability operator, 0 to n.
    discrepancy: largest singular value that no update explains, over its expected noise: about 1 when the model fits.
    predicted: log10 of the mean squared error expected of W before any rounding to a grid, None where W is not
        identified.
    mean_error: log10 of the mean squared error expected of the plain mean, if the updates are independent.
    edge: smallest singular value of the updates, over the level below which it would have counted as noise.
    shared_columns, shared_rows: dimensions of the column (row) space that all updates share.
    ambiguous: some updates share a direction exactly, so that another W may explain the merges by equal ranks. For
        example u v^T moves from the updates into W at no cost if u is in the column spaces of some and v in the row
        spaces of the others; no eigenvalue shows that, since the second W is far from the first.
    """

    lambda_min: float
    discrepancy: float
    predicted: float | None
    mean_error: float
    edge: float
    shared_columns: int
    shared_rows: int
    ambiguous: bool


def certify(core: Core, solution: Solution) -> Evidence:
    """Predict the error of W (first-order propagation of the rounding noise through the least squares).

    The estimate is linear in the noise to first order, W_hat - W = A^-1 sum_i w_i P_Ui E_i P_Vi, with covariance
    s^2 A^-1, s^-2 the mean of the s_i^-2. Split by the joint subspaces: inside both, the operator on the core; in the
    row space only (d - a dimensions), (sum_i w_i P_Vi)^-1; in the column space only (k - b), (sum_i w_i P_Ui)^-1;
    outside of both, the mean of n errors:

        s^2 / (d k) [c tr A^-1 + (d - a) tr (sum P_Vi)^-1 + (k - b) tr (sum P_Ui)^-1 + (d - a)(k - b) / n]

    with c = 1, or the residuals' mean square inside over that expected where it is larger: weak directions that no
    update was granted.
    """
    tangents = solution.tangents
    n, a, b = core.matrices.shape
    d, k = core.left.shape[0], core.right.shape[0]
    shared_columns, shared_rows = tangents.shared()
    variance = n / sum(noise.std**-2 for noise in core.noise)
    trace, lambda_min = (math.inf, 0.0) if shared_columns or shared_rows else trace_and_smallest(tangents, a, b)
    predicted = None
    if lambda_min >= IDENTIFIABLE:
        outside = (d - a) * float((1 / tangents.rows[0]).sum()) + (k - b) * float((1 / tangents.columns[0]).sum())
        freedom = (n - 1) * a * b - sum(r * (a + b - r) for r in tangents.ranks)
        surplus = max(1.0, solution.energy / (variance * freedom)) if freedom > 0 else 1.0
        predicted = math.log10(variance * (surplus * trace + outside + (d - a) * (k - b) / n) / (d * k))
    updates = core.matrices - core.matrices.mean(0)
    mean_error = float(updates.square().sum()) / (n * (n - 1) * d * k) + variance / n
    expected = core.matrices.new_tensor([noise.norm(a, b) for noise in core.noise])
    return Evidence(
        lambda_min,
        float((solution.tails / expected).max()),
        predicted,
        math.log10(mean_error),
        float(solution.edges.min()),
        shared_columns,
        shared_rows,
        any_shared(tangents.left) or any_shared(tangents.right),
    )


def any_shared(bases: Tensor) -> bool:
    """Whether any two of the spaces (n, m, r) have a direction in common."""
    n = bases.shape[0]
    first, second = torch.triu_indices(n, n, offset=1, device=bases.device)
    cosines = torch.linalg.svdvals(bases[first].mT @ bases[second])
    return bool((cosines > 1 - SAME).any())


def trace_and_smallest(tangents: Tangents, a: int, b: int) -> tuple[float, float]:
    """Tr A^-1 and the smallest eigenvalue of A, on matrices (a, b); infinity and a bound where W is not identified.

    Small cores: all eigenvalues. Larger ones: block inverse iteration finds the few smallest eigenvalues, which carry
    the trace where it is large, and random probes orthogonal to them the rest (Hutch++; Meyer et al. 2021).
    """
    device, dtype = tangents.left.device, tangents.left.dtype
    if a * b <= DENSE_ENTRIES:
        units = torch.eye(a * b, dtype=dtype, device=device).view(a * b, a, b)
        values = torch.linalg.eigvalsh(tangents.operator()(units).view(a * b, a * b))
        smallest = float(values[0].clamp(min=0)) if a * b else float(len(tangents.ranks))
        return (float((1 / values).sum()) if smallest > 0 else math.inf), smallest

    generator = torch.Generator().manual_seed(0)  # the certificate is part of the answer, not of the draw

    def inverse(block: Tensor) -> Tensor:  # (a b, p) -> (a b, p)
        solved = conjugate_gradients(tangents, block.mT.reshape(-1, a, b), tolerance=1e-3, iterations=100)
        return solved.view(-1, a * b).mT

    def rademacher(count: int) -> Tensor:
        signs = torch.randint(0, 2, (a * b, count), generator=generator).mul_(2).sub_(1)
        return signs.to(device, dtype)

    # The first step needs no solution: the preconditioner's inverse is a good enough stand-in for A's.
    start = rademacher(BLOCK).mT.reshape(-1, a, b) / tangents.scale()
    block = torch.linalg.qr((tangents.columns[1] @ start @ tangents.rows[1].mT).view(-1, a * b).mT).Q
    for _ in range(STEPS - 2):
        images = inverse(block)
        largest = float(images.norm(dim=0).max())
        if largest > 1 / IDENTIFIABLE:  # no eigenvalue of A^-1 is smaller, which settles it
            return math.inf, 1 / largest
        block = torch.linalg.qr(images).Q
    probes = rademacher(PROBES)
    probes = probes - block @ (block.mT @ probes)
    images = inverse(torch.cat([block, probes], 1))
    values = torch.linalg.eigvalsh(block.mT @ images[:, :BLOCK])  # Ritz values of A^-1
    rest = float((probes * images[:, BLOCK:]).sum()) / PROBES
    return float(values.sum()) + rest, float(1 / values[-1])

"""Starts: estimates of W good enough for the fit to find its way from."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.fit import Factors, qr_of
from lowra.methods.subspace_intersection.half.sites import Cells

# Columns beyond the rank in the range finder, and its power passes.
OVERSAMPLING, PASSES = 8, 2


def vote(stack: Tensor) -> Tensor:
    """The number that most models store, entry by entry; the middle one where no two agree. (n, d, k) -> (d, k).

    Where updates are below the spacing of the numbers, rounding undoes most of them. A middle between two numbers is
    left there: it is a start, not an answer.
    """
    n = len(stack)
    parts = []
    for block in stack.split(max(1, 2**18 // (n * stack.shape[2])), dim=1):
        ordered = block.sort(0).values
        best, most = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2, torch.ones_like(ordered[0])
        run = torch.ones_like(ordered[0])
        for before, here in pairwise(ordered):
            run = run * (here == before) + 1
            more = run > most
            best, most = torch.where(more, here, best), torch.where(more, run, most)
        parts.append(best)
    return torch.cat(parts)


def factored(stack: Tensor, weight: Tensor, ranks: list[int], generator: torch.Generator) -> Factors:
    """Balanced factors of the best approximations of W'_i - W of some ranks; float32."""
    lefts, rights = [], []
    for model, rank in zip(stack, ranks, strict=True):
        rest = model - weight
        columns = min(rank + OVERSAMPLING, *rest.shape)
        basis = rest @ torch.randn(rest.shape[1], columns, generator=generator).to(rest.device)
        for _ in range(PASSES):
            basis = rest @ (rest.mT @ qr_of(basis)[0])
        basis = qr_of(basis)[0]  # (d, columns)
        u, s, vh = torch.linalg.svd(basis.mT @ rest, full_matrices=False)
        root = s[:rank].clamp(min=1e-12).sqrt()
        lefts.append(basis @ (u[:, :rank] * root))
        rights.append(vh[:rank].mT * root)
    return Factors(tuple(lefts), tuple(rights))


def unexplained(cells: Cells, weight: Tensor, factors: Factors) -> float:
    """Sum of squares of W'_i - W - M_i, with best approximations M_i as `factored` makes them."""
    whole = sum(float((model * cells.scale - weight * cells.scale).square_().sum()) for model in cells.stack)
    return whole - sum(float(size.square().sum()) for size in factors.sizes())

"""Kronecker updates, W'_i = W + w1_i (x) w2_i, as LoKr's: of full rank as they stand, of rank one once rearranged.

With the layer cut into p x p' blocks of q x q' numbers, each block made a row, w1 (x) w2 becomes vec(w1) vec(w2)^T (Van
Loan and Pitsianis 1993). The merges rearranged so are merges of updates of rank one, and the closed form applies. The
shape of the blocks is not known: it is the one that leaves the differences of the merges the smallest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.noise import Noise, joined
from lowra.methods.subspace_intersection.problem import Problem
from lowra.methods.subspace_intersection.ranges import MARGINS, OVERSAMPLING, PIVOT, pivots

# Rows and columns of the rearranged difference on which its rank is looked at, for every shape. A shape is believed
# where at least two thirds of these directions are noise.
LOOK = 16

# Of these, so many are looked at first: more than the largest rank that would be believed.
GLANCE = 8

# Seed of the places looked at: a shape that shows is found, whatever the draw.
PLACES = 0


def rearranged(problem: Problem, odd: int, solve: Callable[[Problem], Answer]) -> Answer | None:
    """The answer where the updates are Kronecker products; None where no shape of blocks makes them of low rank.

    odd: a model that differs from the first by a large rank. solve: the closed form for plain merges.
    """
    shape = block_shape(problem.merged[0], problem.merged[odd], joined(problem.noise[0], problem.noise[odd]))
    if shape is None:
        return None
    d, k = problem.merged.shape[1:]
    answer = solve(replace(problem, merged=by_blocks(problem.merged, *shape), guess=OVERSAMPLING, hint=None))
    if not answer.ranks:
        return None
    estimate = Estimate.of(from_blocks(answer.estimate.dense(torch.float64), *shape, d, k))
    p, q = shape
    status = (
        f"The updates are Kronecker products (as LoKr's), of {p} x {q} blocks of {d // p} x {k // q} numbers; ranks "
        f"are numbers of products. {answer.status}"
    )
    return replace(answer, estimate=estimate, status=status, blocks=shape)


def by_blocks(matrix: Tensor, p: int, q: int) -> Tensor:
    """(..., d, k) cut into p x q blocks, each made a row: (..., p q, d k / (p q))."""
    *front, d, k = matrix.shape
    cut = matrix.reshape(*front, p, d // p, q, k // q).transpose(-3, -2)  # (..., p, q, d / p, k / q)
    return cut.reshape(*front, p * q, (d // p) * (k // q))


def from_blocks(matrix: Tensor, p: int, q: int, d: int, k: int) -> Tensor:
    """What `by_blocks` made, put back: (..., d, k)."""
    front = matrix.shape[:-2]
    return matrix.reshape(*front, p, q, d // p, k // q).transpose(-3, -2).reshape(*front, d, k)


def block_shape(first: Tensor, second: Tensor, noise: Noise) -> tuple[int, int] | None:
    """How many blocks, down and across, make the difference of two merges (d, k) of low rank; None where none do.

    noise: of the difference, which is not of low rank as it stands. A submatrix of each arrangement tells: every pair
    of divisors is tried, at the cost of a small SVD.
    """
    d, k = first.shape
    shapes = [(p, q) for p in divisors(d) for q in divisors(k) if p * q >= LOOK and (d // p) * (k // q) >= LOOK]
    shapes = [shape for shape in shapes if shape not in ((d, 1), (1, k))]  # the layer as it stands
    if not shapes:
        return None
    generator = torch.Generator().manual_seed(PLACES)
    draw = torch.rand(2, LOOK, generator=generator, dtype=torch.float64)
    p, q = torch.tensor(shapes).T[:, :, None]  # (shapes, 1) each
    high, wide = d // p, k // q  # of a block
    blocks, inside = distinct(draw[0], p * q), distinct(draw[1], high * wide)  # (shapes, LOOK)
    rows = (blocks // q * high)[:, :, None] + (inside // wide)[:, None]
    columns = (blocks % q * wide)[:, :, None] + (inside % wide)[:, None]
    flat = (rows * k + columns).to(first.device)  # (shapes, LOOK, LOOK)
    looks = second.flatten()[flat].double() - first.flatten()[flat].double()
    # A part of each tells most of them to be full, for a fraction of the time.
    every = LOOK // GLANCE
    full = (pivots(looks[:, ::every, ::every]) > PIVOT * noise.std).all(1)
    left = (~full).nonzero().flatten().tolist()
    ranks = ranks_of(looks[left], noise).tolist()
    rank, best = min(zip(ranks, left, strict=True), default=(0, 0))
    return shapes[best] if 0 < rank <= LOOK // 3 else None


def ranks_of(looks: Tensor, noise: Noise) -> Tensor:
    """How many singular values of each (shapes, a, a) stand out of the noise, (shapes,)."""
    cutoff = MARGINS[0] * noise.norm(*looks.shape[1:])
    return (torch.linalg.svdvals(looks) > cutoff).sum(1)


def distinct(draw: Tensor, count: Tensor) -> Tensor:
    """As many different whole numbers below each count (c, 1) as there are draws from [0, 1): (c, draws)."""
    return (((torch.arange(len(draw)) + draw) * count) / len(draw)).long()


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [i for i in range(1, number + 1) if number % i == 0]

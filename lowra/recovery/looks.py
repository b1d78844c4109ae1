"""What a change of full rank looks like, from two fine-tuned models alone: kinds other than LoRA leave their own marks.

Each test is a relation that holds between two models of one base whatever their training, and by chance never
(design: W'_1 and W'_2 stand for the two models, W is not known).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A relation holds when what it leaves unexplained is below this share of the difference it explains.
HOLDS = 0.02

# Rows and columns of the sub-block that tells scalings apart, columns of Gram matrices, ranks tried for DoRA.
SIDE, COLUMNS = 512, 64
RANKS = (1, 2, 4, 8, 16, 32, 64)

# A layer with more entries is not tried for Kronecker products: every block shape is a pass over it.
KRONECKER_ENTRIES = 2**24


def looks_like(first: Tensor, second: Tensor) -> str:
    """A name for how two weights (d, k) differ, when they differ by a full rank; "" where none fits.

    Tried: rows or columns scaled, (IA)^3; rows scaled on top of a low-rank change, DoRA; equal Gram matrices, OFT and
    its kin; a low-rank change after reordering by blocks, LoKr.
    """
    a, b = first.double(), second.double()
    change = float((a - b).norm())
    if change == 0:
        return ""
    for x, y, which in ((a, b, "rows"), (a.mT, b.mT, "columns")):
        ratio = (x * y).sum(1) / x.square().sum(1).clamp(min=1e-300)
        if float((y - ratio[:, None] * x).norm()) < HOLDS * change:
            return f"like (IA)^3: {which} scaled, W open up to one factor each"
    if scaled_rows(a[:SIDE, :SIDE], b[:SIDE, :SIDE]) or scaled_rows(a[:SIDE, :SIDE].mT, b[:SIDE, :SIDE].mT):
        return "like DoRA: a low-rank update with every row scaled"
    for x, y, side in ((a, b, "left"), (a.mT, b.mT, "right")):
        few = slice(0, COLUMNS)
        before, after = x.mT[few] @ x, y.mT[few] @ y  # (columns, k): parts of the Gram matrices
        scale = float(((y - x).mT[few] @ x).norm())
        if float((after - before).norm()) < HOLDS * scale:
            return f"like OFT or BOFT: a rotation from the {side}, which leaves the Gram matrix alone"
    if shape := kronecker_blocks(a - b):
        return f"like LoKr: a Kronecker product with blocks of {shape[0]} x {shape[1]}"
    return ""


def scaled_rows(first: Tensor, second: Tensor) -> bool:
    """Whether second = diag(c) (first + a low rank): the ratio of the rows by least squares off a growing space.

    Alternates between the top q right directions of second - diag(c) first and c; q doubles, six rounds each.
    """
    d, k = first.shape
    for rank in RANKS:
        if 8 * rank > min(d, k):
            break
        if rank == RANKS[0]:
            ratio = first.new_ones(d)
        for _ in range(6):
            rest = second - ratio[:, None] * first
            space = torch.linalg.svd(rest, full_matrices=False).Vh[:rank]  # (q, k)
            x, y = first - (first @ space.mT) @ space, second - (second @ space.mT) @ space
            ratio = (x * y).sum(1) / x.square().sum(1).clamp(min=1e-300)
        values = torch.linalg.svdvals(second - ratio[:, None] * first)
        # A spectrum with an edge: the rest is rounding. Full changes of any kind have none.
        if float(values[rank:].square().sum()) < (HOLDS**2) * float(values.square().sum()):
            moved = float((ratio - 1).abs().median())
            return moved > 10 * float(values[rank:].square().sum().sqrt()) / (
                math.sqrt(d) * float(first.norm(dim=1).median())
            )
    return False


def kronecker_blocks(difference: Tensor) -> tuple[int, int] | None:
    """The block shape (q, q') under which a difference becomes a matrix of rank at most two, None where none does."""
    d, k = difference.shape
    if difference.numel() > KRONECKER_ENTRIES:
        return None
    generator = torch.Generator().manual_seed(0)
    for p in _divisors(d):
        for q in _divisors(k):
            if min(p * q, d * k // (p * q)) < 4:
                continue
            blocks = difference.reshape(p, d // p, q, k // q).permute(0, 2, 1, 3).reshape(p * q, -1)
            sketch = blocks @ torch.randn(blocks.shape[1], 4, dtype=difference.dtype, generator=generator)
            values = torch.linalg.svdvals(sketch)
            if float(values[2]) < HOLDS * float(values[0]):
                return d // p, k // q
    return None


def _divisors(size: int) -> list[int]:
    return [p for p in range(2, min(size, 65)) if size % p == 0]

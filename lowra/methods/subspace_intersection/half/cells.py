"""Cells: what a number stored in half precision says of the number that was rounded to it.

A float format has `1 / eps` numbers between two powers of two. Rounding to nearest, y is stored for everything between
the midpoints to its neighbours: its cell. Just above a power of two the numbers lie twice as dense on one side, which
makes the cell of the power of two itself lopsided; below the smallest normal number the spacing stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Moves a number that is a power of two below it, and no other number of a half-precision format out of its binade.
BELOW = 1 - 2.0**-12

# Powers of two up to this, in the units of the numbers, need not be told from others: their cells are nothing.
TINY = 2.0**-60

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Grid:
    """The numbers of a float format, all multiplied by one power of two.

    eps: spacing of the numbers over their power of two. tiny: smallest normal number. Both are floats, or tensors that
    broadcast against the numbers asked about (models of several formats).
    """

    eps: float | Tensor
    tiny: float | Tensor

    def spacing(self, number: Tensor) -> Tensor:
        """Distance to the next number away from zero; float32, same shape."""
        return floored(power(number), self.tiny).mul_(self.eps)

    def nearest(self, number: Tensor) -> Tensor:
        """The nearest number of the grid, ties to even."""
        step = self.spacing(number)
        return torch.round(number / step).mul_(step)

    def neighbour(self, number: Tensor, direction: int) -> Tensor:
        """The next number of the grid above (1) or below (-1)."""
        inwards = number * direction < 0
        return number + direction * self.spacing(number * (1 - (1 - BELOW) * inwards))

    def cell(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and half width of the cells of numbers of the grid."""
        exponent = power(number)
        half = exponent.clamp(min=self.tiny).mul_(self.eps / 2)
        # A quarter of the half width at powers of two. Others lie at least two half widths above theirs.
        shift = number.abs().sub_(exponent).sub_(half, alpha=0.25).neg_().clamp_(min=0)
        if isinstance(self.tiny, Tensor) or self.tiny > TINY:
            shift.masked_fill_(exponent <= self.tiny, 0)
        half.sub_(shift)
        return shift.copysign_(number).add_(number), half


def grid_of(dtype: torch.dtype, scale: float = 1.0) -> Grid:
    """The grid of a torch dtype, its numbers multiplied by `scale`, a power of two."""
    info = torch.finfo(dtype)
    return Grid(info.eps, max(info.tiny * scale, torch.finfo(torch.float32).tiny))


def power(number: Tensor) -> Tensor:
    """The power of two at or below the magnitude of float32 numbers, 0 for zero and float32 subnormals."""
    return (number.view(torch.int32) & 0x7F800000).view(torch.float32)


def floored(number: Tensor, low: float | Tensor) -> Tensor:
    """In place: the larger of the two."""
    return number.clamp_(min=low)  # type: ignore[arg-type]


def format_of(weight: Tensor) -> torch.dtype | None:
    """The coarsest half-precision format that holds every entry of a weight (d, k) float32, None if neither does.

    bfloat16 comes first: at the sizes of weights its numbers are float16 numbers too.
    """
    for dtype in HALF:
        if all(torch.equal(block.to(dtype).to(block.dtype), block) for block in weight.split(512)):
            return dtype
    return None

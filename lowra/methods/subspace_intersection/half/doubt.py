"""Doubt: which weights that seem sure are not.

Held-out cells calibrate the updates' variances by the weights that are many. The smallest, whose cells are narrowest,
show first where the updates are less certain than that: a second look, with larger variances, finds another number or
is not sure. And what the updates of all models have wrong together moves W off the grid, a whole row or column of it,
which shows there even where every number chosen seems sure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.parts import Tile

# Probability from which a weight is called sure.
SURE = 0.999

# Deviation of the estimate, in spacings of the grid, up to which a distance from the grid tells something.
TELLING = 0.25

# Standard deviations by which a row or column further off the grid than others stands out.
OUTSTANDING = 3.0


@dataclass(frozen=True)
class SecondLook:
    """What a second sweep says against the first one's weights (d, k), and against which are certain (d, k).

    by_row, by_column: sums of chi, the distance from the grid over its variance, and counts; (2, d) and (2, k).
    """

    weight: Tensor
    certain: Tensor
    by_row: Tensor
    by_column: Tensor

    @classmethod
    def at(cls, weight: Tensor, certain: Tensor) -> SecondLook:
        """Nothing seen yet."""
        d, k = weight.shape
        return cls(weight, certain, *(torch.zeros(2, size, device=weight.device) for size in (d, k)))

    def part(self) -> SecondLook:
        """The same for some of the rows, with sums over columns of its own."""
        return replace(self, by_column=torch.zeros_like(self.by_column))

    def compare(self, tile: Tile, weight: Tensor, certain: Tensor) -> None:
        """Take in the numbers that the second sweep finds in a tile, and which it is certain of."""
        self.certain[tile] &= (weight == self.weight[tile]).logical_and_(certain)

    def count(self, tile: Tile, miss: Tensor, spread: Tensor, step: Tensor) -> None:
        """Take in the distance of a tile (rows, columns) from the numbers chosen, its variance, the spacing there."""
        rows, columns = tile
        telling = spread < (TELLING * step).square_()
        chi = miss.square_().div_(spread).mul_(telling)
        for i, values in enumerate((chi, telling)):
            self.by_row[i, rows] += values.sum(1, dtype=miss.dtype)
            self.by_column[i, columns] += values.sum(0, dtype=miss.dtype)

    def finish(self) -> None:
        """Doubt the rows and columns that are further off the grid than others by more than chance."""
        rows, columns = (_stands_out(*sums) for sums in (self.by_row, self.by_column))
        self.certain[rows] = False
        self.certain[:, columns] = False


def _stands_out(total: Tensor, count: Tensor) -> Tensor:
    mean = total / count.clamp_min(1)
    middle = mean.median()
    scatter = 1.4826 * (mean - middle).abs().median()  # the standard deviation, if they are normal
    return mean > middle + OUTSTANDING * scatter

"""What a fit knows of every entry: the cells of the models, and the normal sites that stand for them and for the grid.

Everything is in units of half the median cell (a power of two near it), so that precisions are near one, and everything
is read in tiles that fit a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.cells import HALF, Grid, grid_of
from lowra.methods.subspace_intersection.half.parts import Tile, in_parts, strips

# Entries of all models in one tile. A sweep has some twenty temporaries of that size.
TILE = 2**19

# A cell counts as no narrower than this share of the median one: a stored zero would decide alone.
NARROWEST = 1e-3

# A held-out cell is this many times as wide: it says nothing.
WIDENED = 1e4

# Precision of the median cell: 3 / half^2, with half = 1.
MEDIAN = 3.0


@dataclass(frozen=True)
class Held:
    """Cells left out of the fit, one model's at a place: model, row, column (q,), sorted by row."""

    model: Tensor
    row: Tensor
    column: Tensor

    def within(self, tile: Tile) -> Tensor:
        """Which of them lie in a tile."""
        rows, columns = tile
        low, high = torch.searchsorted(self.row, self.row.new_tensor([rows.start, rows.stop])).tolist()
        column = self.column[low:high]
        return ((column >= columns.start) & (column < columns.stop)).nonzero().squeeze(1).add_(low)


@dataclass(frozen=True)
class Cells:
    """The stored numbers of n models as cells.

    stack: (n, d, k) float32 as given. dtypes: the format of each model. scale: power of two that the stack is
    multiplied by. base: the grid W is taken to lie on, None for none. held: cells left out. twice: the update was
    rounded to the format before it was added.
    """

    stack: Tensor
    dtypes: tuple[torch.dtype, ...]
    scale: float
    base: Grid | None
    held: Held | None = None
    twice: bool = False

    @property
    def grid(self) -> Grid:
        """The grids of the models, to broadcast against (n, rows, k)."""
        grids = [grid_of(dtype, self.scale) for dtype in self.dtypes]
        if len(set(self.dtypes)) == 1:
            return grids[0]
        eps, tiny = (
            self.stack.new_tensor(values)[:, None, None]
            for values in zip(*((g.eps, g.tiny) for g in grids), strict=True)
        )
        return Grid(eps, tiny)

    @property
    def kept(self) -> torch.dtype:
        """The format that numbers of W's grid are kept in, whole layers of them."""
        base = self.base
        return torch.float32 if base is None else next(d for d in HALF if torch.finfo(d).eps == base.eps)

    def read(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Centre and half width of the cells of a tile: (n, rows, columns) each."""
        centre, half = self.grid.cell(self.stack[:, *tile] * self.scale)
        half.clamp_(min=NARROWEST)
        if self.held is not None:
            part = self.held.within(tile)
            row, column = self.held.row[part] - tile[0].start, self.held.column[part] - tile[1].start
            half[self.held.model[part], row, column] *= WIDENED
        return centre, half

    def strips(self) -> Iterator[list[Tile]]:
        """All tiles, strip by strip of rows."""
        n, d, k = self.stack.shape
        return strips((d, k), TILE // n)


@dataclass
class Sites:
    """The normal sites: precision P_i about x_i for W + M_i, weight w about c for W.

    precision: (n, d, k) bfloat16. offset: (n, d, k) float16, of x_i from the centre of its cell in half cells.
    weight: (d, k) bfloat16, centre: (d, k) float32.
    """

    precision: Tensor
    offset: Tensor
    weight: Tensor
    centre: Tensor

    def read(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """P (n, rows, columns) of a tile and the sum of P and w (rows, columns), float32."""
        precision = self.precision[:, *tile].float()
        total = self.weight[tile].float()
        for p in precision:
            total.add_(p)
        return precision, total


def plain_sites(cells: Cells, limit: float, out: Sites | None = None) -> Sites:
    """Cells as normal errors of equal variance, precisions up to a limit, nothing known of W.

    out: sites of the layer that are overwritten, so that two never take memory.
    """
    n, d, k = cells.stack.shape
    new = cells.stack.new_zeros
    if out is None:
        sites = Sites(
            new(n, d, k, dtype=torch.bfloat16),
            new(n, d, k, dtype=torch.float16),
            new(d, k, dtype=torch.bfloat16),
            new(d, k),
        )
    else:
        sites = out
        for values in (sites.offset, sites.weight, sites.centre):
            values.zero_()

    def part(strips: list[list[Tile]]) -> None:
        for tile in chain(*strips):
            _, half = cells.read(tile)
            sites.precision[:, *tile] = half.square_().reciprocal_().mul_(3).clamp_(max=limit)

    in_parts(part, cells.strips())
    return sites


def unit(stack: Tensor, dtypes: tuple[torch.dtype, ...]) -> float:
    """The power of two that makes half the median cell about one."""
    rows = torch.linspace(0, stack.shape[1] - 1, min(stack.shape[1], 256)).long()
    halves = [
        grid_of(dtype).cell(weight[rows.to(weight.device)])[1].median()
        for weight, dtype in zip(stack, dtypes, strict=True)
    ]
    middle = float(torch.stack(halves).median())
    return 2.0 ** -round(math.log2(max(middle, torch.finfo(torch.float32).tiny)))


def hold_out(
    stack: Tensor,
    generator: torch.Generator,
    share: float = 0.004,
    least: int = 600,
    most: int = 2**14,
    limit: float = 0.02,
) -> Held:
    """Choose cells to leave out: a share of all, no two at one place; more of a small layer, within a limit.

    About `most` cells tell their mean log probability to a few thousandths of a nat.
    """
    n, d, k = stack.shape
    count = max(1, int(min(max(share * n * d * k, least), most, limit * n * d * k, d * k / 2)))
    if count == most:
        place = torch.randint(d * k, (count,), generator=generator).unique()  # few of so many meet
    else:
        place = torch.randperm(d * k, generator=generator)[:count].sort().values
    model = torch.randint(n, (len(place),), generator=generator)
    device = stack.device
    return Held(model.to(device), (place // k).to(device), (place % k).to(device))

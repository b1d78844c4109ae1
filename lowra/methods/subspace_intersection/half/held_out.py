"""Held-out cells: how well does the fit predict stored numbers it has not seen?

For each cell left out, the other models give a posterior of W there; with the update of its own model that predicts
the stored number. The mean log probability compares starts. What it falls short of its own expectation tells a wrong
explanation from a right one: an explanation that fits the cells it was made from, and is false, is surprised by others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.boxes import ROOT_HALF
from lowra.methods.subspace_intersection.half.cells import Grid, grid_of
from lowra.methods.subspace_intersection.half.lattice import WIDE, around, log_posterior
from lowra.methods.subspace_intersection.half.sites import Cells

# Numbers of the grid of W on each side, and stored numbers on each side, that predictions run over.
SIDES_BASE, SIDES_STORED = 4, 6

# Least log probability of a held-out number; one wild entry is not to decide.
LEAST = -20.0


@dataclass
class Evidence:
    """Log probabilities of the held-out numbers, and what the predictions expected them to be."""

    actual: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)

    def add(self, found: tuple[Tensor, Tensor] | None) -> None:
        """Take in a block's."""
        if found is not None:
            self.actual.append(found[0])
            self.expected.append(found[1])

    @property
    def likelihood(self) -> float:
        """Mean log probability of a held-out number, in nats."""
        return float(torch.cat(self.actual).double().mean()) if self.actual else 0.0

    @property
    def deviation(self) -> float:
        """The same, less its expectation: near 0 for a right explanation, negative for a wrong one."""
        return self.likelihood - float(torch.cat(self.expected).double().mean()) if self.actual else 0.0


def evidence(
    cells: Cells, rows: slice, target: Tensor, half: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Log probability and its expectation (q,) of the held-out cells in some rows.

    target, half, variance: (n, rows, k), cells of W'_i - M_i and variance of M_i, the held-out ones widened.
    """
    assert cells.held is not None
    part = cells.held.within(rows)
    model, row, column = (values[part] for values in (cells.held.model, cells.held.row, cells.held.column))
    if not len(model):
        return None
    stored = cells.stack[model, row, column] * cells.scale  # (q,)
    local = row - rows.start
    centre, widths, spreads = (values[:, local, column] for values in (target, half, variance))  # (n, q)
    q = torch.arange(len(model), device=model.device)
    grids = [grid_of(dtype, cells.scale) for dtype in cells.dtypes]
    own = Grid(stored.new_tensor([g.eps for g in grids])[model], stored.new_tensor([g.tiny for g in grids])[model])
    # The own model's target is the centre of its cell less its update.
    update = own.cell(stored)[0] - centre[model, q]
    spread = spreads[model, q]
    precision = 1 / (widths.square() / 3 + spreads)
    total = precision.sum(0)
    what = (precision * centre).sum(0) / total
    middle = what + update
    seen = around(own, middle, SIDES_STORED)  # (s, q)
    edges_centre, edges_half = own.cell(torch.cat([seen, stored[None]]))  # (s + 1, q)
    if cells.base is None:
        broad = torch.ones_like(what, dtype=torch.bool)
        chances = torch.zeros(2 * SIDES_BASE + 1, len(q), device=what.device)
        candidates = chances
    else:
        broad = 1 / total > (WIDE * cells.base.spacing(what)) ** 2
        candidates = around(cells.base, what, SIDES_BASE)  # (g, q)
        chances = torch.softmax(log_posterior(candidates, centre, widths, spreads.sqrt()), 0)
    probability = torch.zeros_like(edges_centre)
    deviation = spread.sqrt()
    for candidate, chance in zip(candidates, chances, strict=True):
        probability += chance * mass(edges_centre - candidate - update, edges_half, deviation)
    wide = mass(edges_centre - middle, edges_half, (spread + 1 / total).sqrt())
    probability = torch.where(broad, wide, probability).clamp_(min=1e-30)
    logs = probability.log()
    expected = (probability[:-1] * logs[:-1]).sum(0)
    return logs[-1].clamp(min=LEAST), expected


def mass(distance: Tensor, half: Tensor, deviation: Tensor) -> Tensor:
    """Probability of cells at a distance from the mean of a normal distribution."""
    t, h = distance.abs() / deviation, half / deviation
    return (torch.erfc((t - h) * ROOT_HALF) - torch.erfc((t + h) * ROOT_HALF)).mul_(0.5)

"""How large the updates are, told from the smallest weights: they are rounded finely enough to show them."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.sites import Cells

# Share of the entries, those where the cells are narrowest, that small updates are measured on; and the size in cells
# up to which an update is small. (Where updates are large, cells are narrow where they cancel.)
FINEST, LARGE = 0.05, 1.0


def update_sizes(cells: Cells) -> Tensor:
    """Root mean square of each model's update (n,), in the units of the cells; float64.

    The mean square of a difference of two models is s_i^2 + s_j^2 and the rounding of both, least squares over pairs
    gives the s_i^2. Where weights are large and updates below the spacing, differences are mostly zero and sometimes a
    whole spacing; where weights are small they are the updates'.
    """
    d = cells.stack.shape[1]
    rows = torch.linspace(0, d - 1, min(d, 256)).long().to(cells.stack.device)
    centre, half = cells.grid.cell(cells.stack[:, rows] * cells.scale)
    centre, half = centre.flatten(1), half.flatten(1)
    found = separated(centre, half)
    if float(found.max()) < LARGE * 2 * float(half.double().square().mean().sqrt()):
        finest = half.amax(0).topk(max(1, int(FINEST * half.shape[1])), largest=False).indices
        found = separated(centre[:, finest], half[:, finest])
    return found


def separated(centre: Tensor, half: Tensor) -> Tensor:
    """Sizes (n,) from the centres and half widths (n, q) of cells: least squares over the pairs of models."""
    n = len(centre)
    noise = half.double().square().mean(1).cpu() / 3
    equations, squares = [], []
    for i, j in combinations(range(n), 2):
        row = torch.zeros(n, dtype=torch.float64)
        row[i] = row[j] = 1
        equations.append(row)
        squares.append(float((centre[i].double() - centre[j]).square().mean() - noise[i] - noise[j]))
    right = torch.tensor(squares, dtype=torch.float64)
    least = float(noise.min()) * 1e-2
    if n == 2:
        return (right / 2).clamp(min=least).sqrt().expand(2)
    solution = torch.linalg.lstsq(torch.stack(equations), right[:, None]).solution[:, 0]
    return solution.clamp(min=least).sqrt()

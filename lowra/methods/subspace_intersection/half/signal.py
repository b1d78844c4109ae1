"""How large the updates are, told from the smallest weights: they are rounded finely enough to show them."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.sites import Cells

# Share of the entries, those where the cells are narrowest, that sizes are measured on.
FINEST = 0.05


def update_sizes(cells: Cells) -> Tensor:
    """Root mean square of each model's update (n,), in the units of the cells; float64.

    The mean square of a difference of two models is s_i^2 + s_j^2 and the rounding of both, least squares over pairs
    gives the s_i^2. Where weights are large and updates below the spacing, differences are mostly zero and sometimes a
    whole spacing; where weights are small they are the updates'.
    """
    n, d, _ = cells.stack.shape
    rows = torch.linspace(0, d - 1, min(d, 256)).long().to(cells.stack.device)
    centre, half = cells.grid.cell(cells.stack[:, rows] * cells.scale)
    centre, half = centre.flatten(1), half.flatten(1)
    widest = half.amax(0)
    finest = widest.topk(max(1, int(FINEST * widest.numel())), largest=False).indices
    centre, noise = centre[:, finest].double(), half[:, finest].double().square().mean(1) / 3
    equations, squares = [], []
    for i, j in combinations(range(n), 2):
        row = torch.zeros(n, dtype=torch.float64)
        row[i] = row[j] = 1
        equations.append(row)
        squares.append(float((centre[i] - centre[j]).square().mean() - noise[i] - noise[j]))
    right = torch.tensor(squares, dtype=torch.float64)
    least = float(noise.min()) * 1e-2
    if n == 2:
        return (right / 2).clamp(min=least).sqrt().expand(2)
    solution = torch.linalg.lstsq(torch.stack(equations), right[:, None]).solution[:, 0]
    return solution.clamp(min=least).sqrt()

"""Lattice: the base weight is a number of its grid, and few of them fit the cells of all models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.boxes import log_probability
from lowra.methods.subspace_intersection.half.cells import BELOW, Grid

# Deviations of an update beyond which a cell is ruled out.
REACH = 4.5

# Where the estimate's deviation exceeds this many spacings the grid says nothing.
WIDE = 1.2

# A site is made where the grid adds this share to what the cells say; a fainter one would lie anywhere.
GAINED = 0.05

# Entries decoded at once, so that temporaries stay in cache.
CHUNK = 2**14

# Numbers to each side of the nearest that the posterior runs over, for intervals of at most so many spacings.
SIDES = ((1.5, 1), (2.5, 2), (math.inf, 4))


@dataclass
class Site:
    """What the grid says of W, entry by entry, as a normal site of weight w about c; and the posterior it comes from.

    best: the likeliest number. share: its probability. All the shape of the entries asked about.
    """

    mean: Tensor
    variance: Tensor
    best: Tensor
    share: Tensor
    weight: Tensor
    centre: Tensor


def around(grid: Grid, number: Tensor, sides: int) -> Tensor:
    """The number of the grid nearest to each entry (q,), and so many to each side: (2 sides + 1, q)."""
    middle = grid.nearest(number)
    above, below = [middle], [middle]
    for _ in range(sides):
        above.append(grid.neighbour(above[-1], 1))
        below.append(grid.neighbour(below[-1], -1))
    return torch.stack(below[:0:-1] + above)


def log_posterior(candidates: Tensor, centre: Tensor, half: Tensor, deviation: Tensor) -> Tensor:
    """Log of the posterior, up to a constant, of each candidate (g, q) for W.

    centre, half, deviation: (n, q), the cells of W'_i - M_i with the deviation of M_i; more dimensions broadcast.
    """
    total: Tensor | float = 0.0
    for c, h, s in zip(centre, half, deviation, strict=True):
        total = log_probability((candidates - c) / s, h / s).add_(total)
    assert isinstance(total, Tensor)
    return total


def decode(grid: Grid, centre: Tensor, half: Tensor, variance: Tensor, *, limit: float, normal: bool) -> Site:
    """The posterior of W on the grid, for entries (q,) that are not settled at a glance.

    centre, half, variance: (n, q) as in `log_posterior`. limit: largest weight of a site. normal: take the cells for
    normal errors of equal variance, where the updates are too uncertain for the difference to matter.
    """
    precision = 1 / (half.square().div_(3).add_(variance))  # (n, q)
    total = precision.sum(0)
    what = precision.mul_(centre).sum(0).div_(total)
    spread = 1 / total
    step = grid.spacing(what)
    wide = spread > (WIDE * step) ** 2
    mean, var, best = what.clone(), spread.clone(), grid.nearest(what)
    share = (step / (math.sqrt(2 * math.pi) * spread.sqrt())).clamp_(max=1)  # of the spacing around the estimate
    weight, site = torch.zeros_like(what), what.clone()
    narrow = (~wide).nonzero().squeeze(1)
    # The narrowest posteriors need the fewest numbers.
    reach = (REACH * spread[narrow].sqrt()).div_(step[narrow])
    low = -math.inf
    for high, sides in SIDES:
        chosen = narrow[(reach > low) & (reach <= high)]
        low = high
        for part in chosen.split(CHUNK):
            candidates = around(grid, what[part], sides)  # (g, p)
            if normal:
                logs = (candidates - what[part]).square_().div_(-2 * spread[part])
            else:
                logs = log_posterior(candidates, centre[:, part], half[:, part], variance[:, part].sqrt())
            chances = torch.softmax(logs, 0)
            share[part], index = chances.max(0)
            best[part] = candidates.gather(0, index[None])[0]
            mean[part] = average = (chances * candidates).sum(0)
            var[part] = scatter = (chances * (candidates - average).square_()).sum(0)
            gain = (1 / scatter - total[part]).clamp_(0, limit)  # 1 / 0 is clamped
            gain *= gain > GAINED * total[part]
            shift = (average - what[part]) / (scatter * gain)
            clamped = (gain >= limit) | ~shift.isfinite()
            weight[part] = gain
            site[part] = torch.where(clamped, average, what[part] + shift)
    return Site(mean, var, best, share, weight, site)


def settled(grid: Grid, centre: Tensor, half: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Where exactly one number of the grid lies in all cells, give or take the updates' deviations.

    centre, half, deviation: (n, rows, k). Returns the number nearest to the middle of the cells' intersection, and
    whether it is the only one: (rows, k) float32 and bool.
    """
    reach = torch.add(half, deviation, alpha=REACH)
    low = (centre - reach).amax(0)
    high = reach.add_(centre).amin(0)
    middle = (low + high).mul_(0.5)
    width = high.sub_(low).mul_(0.5)
    near = grid.nearest(middle)
    step = grid.spacing(near * BELOW)
    off = middle.sub_(near).abs_()
    return near, (off <= width) & (off + width < step)

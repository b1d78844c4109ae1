"""Rounds: fit and decode in turn until nothing moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowra.methods.subspace_intersection.half.cavity import Decoded, Sweep
from lowra.methods.subspace_intersection.half.fit import (
    LENGTHS,
    Factors,
    Quadratic,
    Variances,
    effective_variances,
    probe,
    pruned,
    slope,
)
from lowra.methods.subspace_intersection.half.sites import MEDIAN, Cells, Sites, plain_sites

# Largest precision of a site, over that of the median cell, round by round; the last holds from there on. A low one
# makes the fit well conditioned while the start is poor.
FROM_AFAR = (3.0, 3.0, 10.0, 10.0, 30.0, 30.0, 100.0, 300.0, 1000.0)
FROM_NEARBY = (30.0, 100.0, 300.0, 1000.0)

# Conjugate gradient iterations of a step, and the relative residual that ends them.
ITERATIONS, TOLERANCE = 15, 0.05

# Rounds end when the predicted share and the misfit moved by less than this twice.
STILL = 1e-3

# Rounds at most.
MOST = 20
PRUNE_FROM = 0.0


@dataclass
class Run:
    """Where some rounds ended. misfit: chi of each model. trace: (predicted, misfit, held-out likelihood) a round."""

    factors: Factors
    variances: Variances
    sites: Sites
    misfit: tuple[float, ...]
    decoded: Decoded
    rounds: int
    settled: bool
    trace: list[tuple[float, float, float]] = field(default_factory=list)


def converge(
    cells: Cells,
    factors: Factors,
    clips: Sequence[float],
    *,
    most: int = MOST,
    tolerance: float = TOLERANCE,
    good: bool = False,
    anneal: bool = True,
) -> Run:
    """Rounds from some factors. good: the start is near the answer, so that the misfit is judged at the clip.

    The clip of round t is `clips[t]`, and the last one from there on; no run ends before that.
    """
    torch.set_flush_denormal(True)
    limits = [clip * MEDIAN for clip in clips]
    sites = plain_sites(cells, limits[0])
    factors = factors.balanced()
    down = slope(cells, sites, factors)
    variances: Variances | None = None
    trace: list[tuple[float, float, float]] = []
    still = 0
    for t in range(most):
        limit, following = limits[min(t, len(limits) - 1)], limits[min(t + 1, len(limits) - 1)]
        variances = effective_variances(sites, factors.ranks, variances)
        change = Quadratic(cells, sites, factors).step(down, variances, ITERATIONS, tolerance)
        factors, misfit = searched(cells, sites, factors, change, limit if good else math.inf)
        factors = factors.balanced()
        if t >= 1 and limit >= PRUNE_FROM * limits[-1]:
            before = factors.ranks
            factors = pruned(factors, variances)
            ratio = variances.by_row.new_tensor([now / then for now, then in zip(factors.ranks, before, strict=True)])
            variances = Variances(variances.by_row * ratio[:, None], variances.by_column * ratio[:, None])
        final = t == most - 1
        loosened = max(1.0, 3 * 0.7**t) if anneal else 1.0
        decoded = Sweep(cells, sites, factors, variances, misfit, following, loosened).run(last=final)
        trace.append((decoded.predicted, max(misfit), decoded.evidence.likelihood))
        if t:
            moved = abs(trace[-1][0] - trace[-2][0])
            shifted = abs(trace[-1][1] - trace[-2][1])
            calm = moved < STILL and shifted < STILL + 5 * STILL * trace[-1][1] and loosened == 1
            still = still + 1 if calm else 0
        if still >= 2 and t >= len(limits) - 1:
            break
        if decoded.slope is not None:
            down = decoded.slope
    assert variances is not None
    return Run(factors, variances, sites, misfit, decoded, t + 1, still >= 2, trace)


def searched(
    cells: Cells, sites: Sites, factors: Factors, change: Factors, narrowest: float
) -> tuple[Factors, tuple[float, ...]]:
    """The factors moved along a change as far as the objective falls, and the misfit there."""
    sizes = factors.sizes()
    before = probe(cells, sites, factors, sizes, narrowest)
    for length in LENGTHS:
        moved = factors.moved(change, length)
        after = probe(cells, sites, moved, sizes, narrowest)
        if after.objective <= before.objective:
            return moved, after.misfit
    return factors, before.misfit

"""Rounds: fit and decode in turn until nothing moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowra.allocator import trim
from lowra.methods.subspace_intersection.half.cavity import COARSE, Decoded, Sweep
from lowra.methods.subspace_intersection.half.fit import (
    LENGTHS,
    Factors,
    Quadratic,
    Variances,
    effective_variances,
    probe,
    pruned,
    relevances,
    slope,
)
from lowra.methods.subspace_intersection.half.sites import MEDIAN, Cells, Sites, plain_sites

# Largest precision of a site, over that of the median cell, round by round; the last holds from there on. A low one
# makes the fit well conditioned while the start is poor. The second ends in fine rounds.
FROM_AFAR = (30.0, 100.0, 300.0, 1000.0)
FROM_NEARBY = (*FROM_AFAR, 3000.0)

# Fine rounds bring a tenth of the weights right that are still wrong, but only where few are, and not where an update
# hides in the rounding or leaves more than that, as its misfit shows: not all directions are found then, and what is
# decoded is firm enough as it is.
FEW_OPEN, BURIED, LEFT_OVER = 0.985, 0.6, 1.01

# Steps of a poor start before the first round, at most; they end when no update moves by more than a share of itself.
# Their linear systems are solved well: what is decoded too early is wrong, and confirms itself.
APPROACH, ARRIVED = 12, 0.02
APPROACH_ITERATIONS, APPROACH_TOLERANCE = 60, 0.01

# Conjugate gradient iterations of a step, and the relative residual that ends them.
ITERATIONS, TOLERANCE = 15, 0.05

# Rounds end when the predicted share and the misfit moved by less than this.
STILL = 1e-3

# Rounds at most.
MOST = 16

# The round, from 0, in which a run ends that leaves more over than this and predicts held-out cells worse than in its
# first.
HOPELESS, FAR_FROM_IT = 4, 1.3

# Directions are pruned from this clip on: below it, small weights cannot yet speak for the directions that only they
# see.
PRUNE_FROM = 250.0

# Entries of a layer from which a round takes so long that fetching memory anew is nothing to it.
LARGE = 2**22

# Nats by which the held-out cells must prefer one explanation to another.
SLACK = 0.01


@dataclass
class Run:
    """The round whose held-out cells were predicted best. misfit: chi of each model. rounds: how many there were.

    edge: relevance of the faintest direction kept. variances: of the updates in that round. sites: of the last one.
    settled: nothing moved at the end. trace: (predicted, misfit, held-out likelihood) of every round.
    """

    factors: Factors
    misfit: tuple[float, ...]
    decoded: Decoded
    rounds: int
    settled: bool
    edge: float
    variances: Variances
    sites: Sites
    trace: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def likelihood(self) -> float:
        """Mean log probability of the held-out cells."""
        return self.decoded.evidence.likelihood

    @property
    def deviation(self) -> float:
        """The same less its expectation."""
        return self.decoded.evidence.deviation


def converge(
    cells: Cells,
    factors: Factors,
    clips: Sequence[float],
    *,
    most: int = MOST,
    tolerance: float = TOLERANCE,
    good: bool = False,
    calm_rounds: int = 2,
    settling: int = 1,
    slack: float = SLACK,
    sites: Sites | None = None,
) -> Run:
    """Rounds from some factors. good: the start is near the answer, so that the misfit is judged at the clip.

    sites: to begin with, which are overwritten; where nothing was decoded yet, None.

    calm_rounds: how many rounds in running that move next to nothing end it. settling: first rounds, in which no
    direction is pruned, and none of which is the best where it is more than one. slack: nats by which the held-out
    cells must prefer an earlier round to a later one; infinite, the last one is handed back.

    The clip of round t is `clips[t]`, and the last one from there on, but for fine ones as `FEW_OPEN` says; no run ends
    while it rises.
    """
    torch.set_flush_denormal(True)
    limits = [clip * MEDIAN for clip in clips]
    sites = sites or plain_sites(cells, limits[0])
    factors = factors.balanced()
    down = slope(cells, sites, factors)
    variances: Variances | None = None
    trace: list[tuple[float, float, float]] = []
    best: Run | None = None
    still, loosened, limit = 0, 2.0, limits[0]
    for t in range(most):
        following = limits[min(t + 1, len(limits) - 1)]
        variances = effective_variances(sites, factors.ranks, variances)
        give_back(cells)
        change = Quadratic(cells, sites, factors).step(down, variances, ITERATIONS, tolerance)
        factors, misfit = searched(cells, sites, factors, change, limit if good else math.inf)
        del change
        give_back(cells)
        factors = factors.balanced()
        if t >= settling and limit >= PRUNE_FROM * MEDIAN:
            before = factors.ranks
            factors = pruned(factors, variances)
            ratio = variances.by_row.new_tensor([now / then for now, then in zip(factors.ranks, before, strict=True)])
            variances = Variances(variances.by_row * ratio[:, None], variances.by_column * ratio[:, None])
        if not (trace and trace[-1][0] >= FEW_OPEN and BURIED <= min(misfit) <= max(misfit) <= LEFT_OVER):
            following = min(following, COARSE * MEDIAN)
        sweep = Sweep(cells, sites, factors, variances, misfit, following, loosened)
        decoded = sweep.run(last=t == most - 1, over=best.decoded if best else None)
        loosened = decoded.evidence.factors[decoded.evidence.best]
        trace.append((decoded.predicted, max(misfit), decoded.evidence.likelihood))
        if t:
            moved, shifted = (abs(now - then) for now, then in zip(trace[-1][:2], trace[-2][:2], strict=True))
            calm = moved < STILL and shifted < STILL + 5 * STILL * trace[-1][1]
            still = still + 1 if calm else 0
        if t == settling > 1:
            best = None
        if best is None or decoded.evidence.likelihood > best.likelihood - slack:
            edge = min(float(relevance.min()) for relevance in relevances(factors, variances))
            best = Run(factors, misfit, decoded, t + 1, still >= calm_rounds, edge, variances, sites)
            decoded.settle()
        else:
            decoded.undo()
        if still >= calm_rounds and following <= limit and t >= settling:
            break
        if t == HOPELESS >= settling and trace[t][2] < trace[0][2] and max(misfit) > FAR_FROM_IT:
            break
        limit = following
        if decoded.slope is not None:
            down, decoded.slope = decoded.slope, None
    assert best is not None
    best.rounds, best.trace = t + 1, trace
    best.settled = still >= calm_rounds
    return best


def give_back(cells: Cells) -> None:
    """Give back what a step keeps for a sweep and a sweep for a step, which cannot use it, where that is much."""
    if cells.stack[0].numel() >= LARGE:
        trim()


def approached(cells: Cells, factors: Factors, clip: float) -> Factors:
    """Factors from a poor start, fitted to the cells as normal errors until they stay: nothing is decoded yet.

    What a poor start decodes confirms it, directions too many above all. Without, the fit finds the same updates from
    the vote and from the mean, at the true rank and at twice that.
    """
    limit = clip * MEDIAN
    sites = plain_sites(cells, limit)
    variances: Variances | None = None
    for _ in range(APPROACH):
        factors = before = factors.balanced()
        variances = effective_variances(sites, factors.ranks, variances)
        down = slope(cells, sites, factors)
        change = Quadratic(cells, sites, factors).step(down, variances, APPROACH_ITERATIONS, APPROACH_TOLERANCE)
        factors, _ = searched(cells, sites, factors, change, limit)
        if max(factors.distances(before)) < ARRIVED:
            break
    return factors


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

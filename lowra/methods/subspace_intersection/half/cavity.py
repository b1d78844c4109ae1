"""The sweep: one pass over the data that decodes W, renews all sites, and gives the next fit its slope.

What the other entries of its row and column say of M_ab, the entry itself left out (its cavity), is compared with the
cells: which numbers of the grid does that leave for W? Where only one, W is known there, and each cell becomes a
statement on M. With the entry's own evidence left in, every estimate would confirm itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.boxes import score_and_curvature
from lowra.methods.subspace_intersection.half.doubt import SURE, SecondLook
from lowra.methods.subspace_intersection.half.fit import Factors, Variances, force, pull, ridge, summed, weighted
from lowra.methods.subspace_intersection.half.held_out import Evidence, Question
from lowra.methods.subspace_intersection.half.lattice import REACH, Site, decode, settled
from lowra.methods.subspace_intersection.half.parts import Tile, each_part, spans
from lowra.methods.subspace_intersection.half.sites import MEDIAN, Cells, Sites

# Shares of a tile whose sites are renewed one by one: what that takes beside is many times what it is about.
SHARES = 4

# A misfit up to this is chance.
CHANCE = 1.1

# Misfit of all models above which cells are decoded as normal errors: the updates are too uncertain to tell.
ROUGH = 1.6

# W counts as known for the updates' sites where its variance is below this share of a cell's square width.
KNOWN = 0.03

# Sweeps with a larger limit than this, over the precision of the median cell, are fine: they hold the sites of what is
# known to it more firmly.
COARSE = 1000.0

# The updates' deviation is taken to be at least this share of a cell; and in fine sweeps.
SHARPEST, SHARPEST_FINE = 0.01, 0.003

# Least precision of a site, over that of its cell as a normal error.
FAINTEST = 0.02

# Largest precision of a site where W is known, over that where it is not.
CEILING = 12

# A site lies within so many half cells of the centre of its cell; the peak of the likelihood lies within one.
FURTHEST = 4.0

# Largest weight of a site for W, over the precision of the median cell; and in fine sweeps, where the updates are known
# to less than the deviation of .02 half cells that this leaves.
FIRM, FIRM_FINE = 1e3, 1e4

# Factors of the updates' variances that held-out cells may ask for.
LEAST_FACTOR, MOST_FACTOR = 1.0, 64.0


@dataclass(frozen=True)
class Replaced:
    """What a sweep found otherwise than the one before, whose weights it wrote over: few where rounds near their end.

    places: indices in the flattened tile; weight and certain: what was there.
    """

    tile: Tile
    places: Tensor
    weight: Tensor
    certain: Tensor

    @classmethod
    def by(cls, tile: Tile, weight: Tensor, certain: Tensor, number: Tensor, sure: Tensor) -> Replaced:
        """What a tile's numbers, and which are sure, replace."""
        places = (weight != number).logical_or_(certain != sure).flatten().nonzero().squeeze(1).int()
        return cls(tile, places, weight.flatten()[places], certain.flatten()[places])

    def back(self, weight: Tensor, certain: Tensor) -> None:
        """Put it back into a layer (d, k)."""
        for layer, before in ((weight, self.weight), (certain, self.certain)):
            part = layer[self.tile].flatten()
            part[self.places] = before
            layer[self.tile] = part.view(layer[self.tile].shape)


@dataclass
class Decoded:
    """What a sweep found.

    predicted: expected share of W on the bit. sure: share of weights known with probability `SURE`. square_error:
    expected mean square of the error, in the units of the cells. slope: of the fit at the new sites, None after the
    last sweep. weight (d, k), the likeliest numbers, as they are and in their own format, and certain (d, k) bool, the
    sure ones among them, are kept when asked for. written_over: what they replaced of a sweep before, None for nothing.
    """

    predicted: float = 0.0
    sure: float = 0.0
    square_error: float = 0.0
    slope: Factors | None = None
    evidence: Evidence = field(default_factory=lambda: Evidence((1.0,)))
    weight: Tensor | None = None
    certain: Tensor | None = None
    written_over: list[Replaced] | None = None

    def put(self, tile: Tile, number: Tensor, certain: Tensor) -> None:
        """Keep what was found in a tile (rows, columns)."""
        if self.weight is None or self.certain is None:
            return
        if self.written_over is not None:
            self.written_over.append(Replaced.by(tile, self.weight[tile], self.certain[tile], number, certain))
        self.weight[tile] = number
        self.certain[tile] = certain

    def undo(self) -> None:
        """Give the sweep before its weights back."""
        assert self.weight is not None
        assert self.certain is not None
        for replaced in self.written_over or ():
            replaced.back(self.weight, self.certain)
        self.settle()

    def settle(self) -> None:
        """Forget what was written over."""
        self.written_over = None


@dataclass(frozen=True)
class Sweep:
    """A pass over a layer. misfit: chi of each model. variance_factor: of the updates' variance while decoding.

    limit: largest precision of the sites made where W is not known. second: what this sweep is a second look at.
    """

    cells: Cells
    sites: Sites
    factors: Factors
    variances: Variances
    misfit: tuple[float, ...]
    limit: float
    variance_factor: float = 1.0
    second: SecondLook | None = None

    def run(self, *, keep: bool = True, last: bool = False, over: Decoded | None = None) -> Decoded:
        """Decode, and renew the sites in place. keep: hand back the weights. last: leave the sites as they are.

        over: of a sweep before, whose weights are written over, until what this one finds is settled or undone.
        """
        _, d, k = self.cells.stack.shape
        found = Decoded()
        question = None if self.cells.held is None else Question.of(self.cells)
        if over is not None:
            found.weight, found.certain, found.written_over = over.weight, over.certain, []
        elif keep:
            found.weight = self.cells.stack.new_empty(d, k, dtype=self.cells.kept)
            found.certain = self.cells.stack.new_empty(d, k, dtype=torch.bool)
        by_left = [torch.zeros_like(left) for left in self.factors.left]

        def part(strips: list[list[Tile]]) -> tuple[Decoded, list[Tensor], SecondLook | None]:
            own = Decoded(weight=found.weight, certain=found.certain, written_over=None if over is None else [])
            by_right = [torch.zeros_like(right) for right in self.factors.right]
            second = None if self.second is None else self.second.part()
            for tile in chain(*strips):
                self._tile(tile, own, question, second, by_left, by_right, last)
            return own, by_right, second

        def taken_in() -> Iterator[list[Tensor]]:
            for own, sums, second in each_part(part, self.cells.strips()):
                found.predicted += own.predicted / (d * k)
                found.sure += own.sure / (d * k)
                found.square_error += own.square_error / (d * k)
                if found.written_over is not None:
                    found.written_over += own.written_over or ()
                if second is not None and self.second is not None:
                    self.second.by_column.add_(second.by_column)
                yield sums

        by_right = summed(taken_in())
        found.evidence = Evidence(self._tried(), self.cells.base, question)
        if not last:
            ridge(self.factors.sizes(), self.factors, by_left, by_right, -1.0)
            found.slope = Factors(tuple(by_left), tuple(by_right))
        return found

    @property
    def fine(self) -> bool:
        """Whether the sites it makes are for fine rounds."""
        return self.limit > COARSE * MEDIAN

    def _tried(self) -> tuple[float, ...]:
        """Factors of the variances that held-out cells are predicted with: the one in use, others, and 1."""
        here = self.variance_factor
        return (here, *(other for other in (here / 2, here * 2) if LEAST_FACTOR <= other <= MOST_FACTOR), 1.0)

    def _tile(
        self,
        tile: Tile,
        found: Decoded,
        question: Question | None,
        second: SecondLook | None,
        by_left: list[Tensor],
        by_right: list[Tensor],
        last: bool,
    ) -> None:
        cells, sites = self.cells, self.sites
        rows, columns = tile
        centre, half = cells.read(tile)  # (n, rows, columns)
        precision, total = sites.read(tile)
        update = self.factors.updates(rows, columns)
        rest = torch.addcmul(centre, half, sites.offset[:, *tile].float()).sub_(update)
        weight = weighted(precision, rest, sites.weight[tile] * sites.centre[tile]).div_(total)
        rest.sub_(weight).mul_(precision)  # the force of its own entry on each update
        # Variances without the entry itself.
        loose = self.variances.by_row[:, rows, None] + self.variances.by_column[:, None, columns]
        shift = rest.mul_(loose)
        extra = cells.grid.spacing(update).square_().div_(12) if cells.twice else None
        added = centre.new_tensor([max(0.0, chi - CHANCE) / MEDIAN for chi in self.misfit])[:, None, None]
        if extra is not None:
            added = extra + added
        variance = (loose * self.variance_factor).add_(added)
        # Where the linear solve has not converged, heavy entries are far from their place, and the formula explodes.
        bound = variance.sqrt().mul_(REACH).add_(half)
        target = torch.minimum(shift, bound, out=shift).maximum(bound.neg_()).add_(centre).sub_(update)  # of W
        own = precision.div_(total).neg_().add_(1).mul_(sites.precision[:, *tile])
        if cells.held is not None and question is not None:
            question.put(cells.held, tile, target, half, loose, added)
        del rest, shift, bound, loose  # each of them as large as the tile of all models
        mean, known, site_weight, site_centre = self._decode(tile, target, half, variance, found, second)
        del target
        if last:
            return
        for some in spans(len(mean), math.ceil(len(mean) / SHARES)):
            part = (slice(rows.start + some.start, rows.start + some.stop), columns)
            here, half_here, update_here, spread, own_here = (
                values[:, some] for values in (centre, half, update, variance, own)
            )
            rounded = None if extra is None else extra[:, some]
            self._renew(part, here, half_here, update_here, spread, own_here, mean[some], known[some], rounded)
        sites.weight[tile] = site_weight
        sites.centre[tile] = site_centre
        pull(force(sites, tile, centre, half, update), tile, self.factors, by_left, by_right)

    def _decode(
        self,
        tile: Tile,
        target: Tensor,
        half: Tensor,
        variance: Tensor,
        found: Decoded,
        second: SecondLook | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Posterior mean of W, its variance, and its site: weight, centre; all (rows, columns)."""
        cells = self.cells
        grid = cells.base
        shape = target.shape[1:]
        if grid is None:
            precision = half.square().div_(3).add_(variance).reciprocal_()
            total = precision.sum(0)
            what = precision.mul_(target).sum(0).div_(total)
            found.put(tile, what / cells.scale, torch.zeros_like(what, dtype=torch.bool))
            return what, torch.full_like(what, math.inf), torch.zeros_like(what), what
        kept = found.weight is not None or second is not None
        near, clear = settled(grid, target, half, variance.sqrt())
        limit = (FIRM_FINE if self.fine else FIRM) * MEDIAN
        var, site_weight = torch.zeros_like(near), torch.full_like(near, limit)
        open_ = (~clear).flatten().nonzero().squeeze(1)
        share = None
        mean, site_centre, best = near, near, near
        if len(open_):
            parts = (values.flatten(1).index_select(1, open_) for values in (target, half, variance))
            part: Site = decode(grid, *parts, limit=limit, normal=min(self.misfit) > ROUGH)
            mean, site_centre = near.clone(), near.clone()
            for out, values in (
                (mean, part.mean),
                (var, part.variance),
                (site_weight, part.weight),
                (site_centre, part.centre),
            ):
                out.view(-1).index_copy_(0, open_, values)
            share = part.share
            found.square_error += float(part.variance.addcmul(miss := part.mean - part.best, miss).sum())
            if kept:
                best = near.view(-1).index_copy(0, open_, part.best).view(shape)
        if second is not None:
            precision = half.square().div_(3).add_(variance).reciprocal_()
            spread = precision.sum(0).reciprocal_()
            miss = precision.mul_(target).sum(0).mul_(spread).sub_(best)
            second.count(tile, miss, spread, grid.spacing(best))
        decided = near.numel() - len(open_)
        found.predicted += decided + (float(share.sum()) if share is not None else 0.0)
        sure = None if share is None else share >= SURE
        found.sure += decided + (int(sure.sum()) if sure is not None else 0)
        if kept:
            number = (best / cells.scale).to(cells.kept)
            certain = clear if sure is None else clear.view(-1).index_copy(0, open_, sure).view(shape)
            found.put(tile, number, certain)
            if second is not None:
                second.compare(tile, number, certain)
        return mean, var, site_weight, site_centre

    def _renew(
        self,
        tile: Tile,
        centre: Tensor,
        half: Tensor,
        update: Tensor,
        variance: Tensor,
        own: Tensor,
        mean: Tensor,
        known: Tensor,
        extra: Tensor | None,
    ) -> None:
        """New sites for the updates."""
        sites = self.sites
        square = half.square()  # a quarter of the cell's square width
        spread = variance.div_(own.mul_(variance).add_(1))  # with the entry itself
        if extra is not None:
            spread.add_(extra)
        usable = (known < 4 * KNOWN * square).logical_and_(spread < 2 * square)
        spread = torch.maximum(spread, square * (4 * (SHARPEST_FINE if self.fine else SHARPEST) ** 2))
        deviation = spread.sqrt()
        base = update + mean
        score, curvature = score_and_curvature((centre - base).div_(deviation), half / deviation)
        inverse = square.reciprocal().mul_(3)  # of the cell's variance
        precision = curvature.div_(spread)
        precision = torch.maximum(precision, inverse * FAINTEST)
        # The step is that of the true curvature: under a clipped one it would overshoot.
        shift = score.div_(deviation).div_(precision)
        known_ = usable.float()
        raw = inverse.clamp_(max=self.limit)
        if extra is not None:
            precision = precision / (1 + precision * extra)
            raw = raw / (1 + raw * extra)
        sites.precision[:, *tile] = raw.lerp_(precision.clamp_(max=CEILING * self.limit), known_)
        offset = base.add_(shift).sub_(centre).div_(half).clamp_(-FURTHEST, FURTHEST)
        sites.offset[:, *tile] = offset.mul_(known_)

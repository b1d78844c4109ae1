"""Fit: one Gauss-Newton step in the factors of all updates at once, W eliminated.

    F = sum_i P_i (x_i - W - L_i R_i^T)^2 + w (W - c)^2 + sum_j (d / S_ij) |L_ij|^2 + (k / S_ij) |R_ij|^2

sums over entries implied, W = (sum_i P_i (x_i - L_i R_i^T) + w c) / (sum_i P_i + w). The ridge is the prior of factors
whose columns have the size they were found with (automatic relevance determination): it shrinks what lies below the
noise. Factors are kept balanced, L_i^T L_i = R_i^T R_i = diag S_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.parts import Tile, each_part, in_parts, spans
from lowra.methods.subspace_intersection.half.preconditioner import Side, shared_precision
from lowra.methods.subspace_intersection.half.sites import MEDIAN, NARROWEST, Cells, Sites

# Updates below this many cells, in root mean square, show in the smallest weights alone.
FAINTEST = 0.2

# A direction j of model i is kept while S_ij^2 theta_i / (d + k) exceeds this: half the smallest size at which the
# ridge's own estimate of S_ij is stable. Of the faintest updates a fifth of it is enough: the next sweep may know more
# of the few numbers that show them. (Of larger ones directions as faint are noise, and what else is wrong fits it.)
RELEVANT, RELEVANT_OF_FAINTEST = 0.5, 0.2

# Newton steps for the effective variances: from nothing, and from those of the round before.
COLD, WARM = 12, 3

# Largest misfit of an entry in units of its cell's variance: a wrong start must not be judged by its worst entries.
MOST = 100.0

# Rows that a probe looks at, at least; an eighth of them where there are more.
PROBED = 192

# Rank from which bfloat16 products pay for the conversions.
MIXED = 48

# Steps tried along the Gauss-Newton direction: from afar the whole one often goes too far, and a third not far enough.
LENGTHS = (1.0, 0.6, 0.35, 0.2, 0.1, 0.03, 0.01)

# All rows, or all columns.
ALL = slice(None)


@dataclass(frozen=True)
class Factors:
    """L_i (d, r_i) and R_i (k, r_i) of each model; or changes of them."""

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each model."""
        return tuple(left.shape[1] for left in self.left)

    def sizes(self) -> list[Tensor]:
        """S_i (r_i,) of balanced factors."""
        return [left.square().sum(0).clamp_(min=1e-30) for left in self.left]

    def moved(self, change: Factors, length: float) -> Factors:
        """These, plus so many times a change."""
        left, right = (
            tuple(torch.add(a, b, alpha=length) for a, b in zip(here, there, strict=True))
            for here, there in ((self.left, change.left), (self.right, change.right))
        )
        return Factors(left, right)

    def dot(self, other: Factors) -> float:
        """Sum of products."""
        pairs = zip((*self.left, *self.right), (*other.left, *other.right), strict=True)
        return sum(float(torch.dot(a.flatten(), b.flatten())) for a, b in pairs)

    def distances(self, other: Factors) -> list[float]:
        """Of each update M_i from another's, |M_i - N_i| / |M_i|."""
        found = []
        for a, b, c, d in zip(self.left, self.right, other.left, other.right, strict=True):
            left, right = torch.cat([a, c], 1).double(), torch.cat([b, -d], 1).double()
            square = ((left.mT @ left) * (right.mT @ right)).sum()
            found.append(float((square.clamp(min=0) / ((a.mT @ a) * (b.mT @ b)).sum()).sqrt()))
        return found

    def updates(self, rows: slice | Tensor = ALL, columns: slice = ALL) -> Tensor:
        """M_i = L_i R_i^T of some rows and columns: (n, rows, columns)."""
        parts = [(left[rows], right[columns]) for left, right in zip(self.left, self.right, strict=True)]
        (left, right), *_ = parts
        out = left.new_empty(len(parts), left.shape[0], right.shape[0])
        for update, (left, right) in zip(out, parts, strict=True):
            torch.mm(left, right.mT, out=update)
        return out

    def balanced(self) -> Factors:
        """The same updates with L_i^T L_i = R_i^T R_i diagonal, largest first."""
        pairs = [balanced_pair(left, right) for left, right in zip(self.left, self.right, strict=True)]
        return Factors(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def balanced_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of factors in balanced form."""
    (ql, rl), (qr, rr) = qr_of(left), qr_of(right)
    u, s, vh = torch.linalg.svd(rl @ rr.mT)
    root = s.sqrt()
    return ql @ (u * root), qr @ (vh.mT * root)


def qr_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R, also of columns that all but vanish: float32 LAPACKs divide by norms that underflowed.

    Such columns come from starts that equal a model in most entries; which processor returns NaN for which is luck.
    """
    q, r = torch.linalg.qr(matrix)
    if torch.isfinite(q).all() and torch.isfinite(r).all():
        return q, r
    q, r = torch.linalg.qr(matrix.double())
    return q.to(matrix), r.to(matrix)


# ---- Effective variances --------------------------------------------------------------------------------------------


@dataclass
class Variances:
    """Effective variance of each row's and column's unknowns: by_row (n, d), by_column (n, k)."""

    by_row: Tensor
    by_column: Tensor

    def precision(self, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Effective precision of an entry, by row (d,) and by column (k,), for each model."""
        d, k = self.by_row.shape[1], self.by_column.shape[1]
        return [(r / (k * a), r / (d * b)) for r, a, b in zip(ranks, self.by_row, self.by_column, strict=True)]


def effective_variances(sites: Sites, ranks: Sequence[int], before: Variances | None) -> Variances:
    """Variances v with  sum_b own_ab v_a / (1 + own_ab v_a) = r  for each row a, and alike for columns.

    own = P (1 - P / total) is what an entry says of its own update, W following by a share. The leverages of a row add
    up to its number of unknowns: where all precisions are equal v = r / (k own), the variance of a row's fit. Rows are
    weighed by some of the columns and columns by some of the rows.
    """
    n, d, k = sites.precision.shape
    rank = max(ranks)
    across, down = (slice(None, None, max(1, size // max(256, 8 * rank))) for size in (k, d))
    by_row, by_column = (None, None) if before is None else (before.by_row, before.by_column)

    def rows(blocks: list[slice]) -> list[Tensor]:
        return [solved(sites, (part, across), ranks, 2, by_row, k) for part in blocks]

    def columns(blocks: list[slice]) -> list[Tensor]:
        return [solved(sites, (down, part), ranks, 1, by_column, d) for part in blocks]

    found = []
    for work, size, step in ((rows, d, across.step), (columns, k, down.step)):
        entries = 2**18 * size * step // (n * d * k)  # lines whose sampled entries fill a cache
        blocks = list(spans(size, max(1, entries)))
        found.append(torch.cat([part for parts in in_parts(work, blocks) for part in parts], 1))
    return Variances(*found)


def solved(
    sites: Sites, part: tuple[slice, slice], ranks: Sequence[int], along: int, start: Tensor | None, size: int
) -> Tensor:
    """The variances (n, lines) of some lines, `along` the dimension that is summed, `size` its whole length.

    start: those of all lines in the round before.
    """
    precision = sites.precision[(slice(None), *part)].float()
    total = precision.sum(0).add_(sites.weight[part])
    own = precision.mul_(1 - precision / total).clamp_(min=1e-12)  # (n, rows, columns)
    target = own.new_tensor(ranks)[:, None] * (own.shape[along] / size)  # (n, 1)
    variance = target / own.sum(along) if start is None else start[:, part[2 - along]]
    for _ in range(COLD if start is None else WARM):
        rest = torch.mul(own, variance.unsqueeze(along)).add_(1).reciprocal_()  # 1 less the leverage
        left = rest.sum(along)
        slope = left - rest.square_().sum(along)
        excess = own.shape[along] - left - target
        variance = variance * (excess / -slope).clamp_(-2, 2).exp_()
    return variance


# ---- The step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """The Gauss-Newton model of F around some factors.

    only: "left" or "right" where the factors of the other side stay. sizes: S_i, of balanced factors by default. rough:
    whether products may be rounded to bfloat16, where that is faster.
    """

    cells: Cells
    sites: Sites
    factors: Factors
    only: str = "both"
    sizes: list[Tensor] | None = None
    rough: bool = True

    def product(self, change: Factors) -> Factors:
        """The Gauss-Newton matrix times a change."""
        here = self.factors
        fast = self.rough and max(here.ranks) >= MIXED and fast_bfloat16(here.left[0].device)
        dtype = torch.bfloat16 if fast else torch.float32
        lefts = [self._joined(a, b, first=True).to(dtype) for a, b in zip(change.left, here.left, strict=True)]
        rights = [self._joined(a, b, first=False).to(dtype) for a, b in zip(here.right, change.right, strict=True)]
        factors = Factors(here.left, tuple(part.to(dtype) for part in here.right))
        by_left = [torch.zeros_like(left) for left in here.left]

        def part(strips: list[list[Tile]]) -> list[Tensor]:
            by_right = [torch.zeros_like(right) for right in here.right]
            for tile in chain(*strips):
                rows, columns = tile
                precision, total = self.sites.read(tile)
                # Model by model, which a processor's cache holds; float() of float32 is no copy.
                pairs = zip(lefts, rights, strict=True)
                tangents = [torch.mm(left[rows], right[columns].mT).float() for left, right in pairs]
                mean = weighted(precision, tangents).div_(total)
                pulls = [tangent.sub_(mean).mul_(p) for tangent, p in zip(tangents, precision, strict=True)]
                pull(pulls, tile, factors, by_left, by_right, self.only)
            return by_right

        by_right = summed(each_part(part, self.cells.strips()))
        ridge(self.sizes or here.sizes(), change, by_left, by_right, 1.0)
        return self._masked(by_left, by_right)

    def _joined(self, first_part: Tensor, second_part: Tensor, *, first: bool) -> Tensor:
        """The two factors of  dL R^T + L dR^T  side by side, or of one of the terms."""
        if self.only == "both":
            return torch.cat([first_part, second_part], 1)
        return first_part if self.only == "left" else second_part

    def _masked(self, left: list[Tensor], right: list[Tensor]) -> Factors:
        if self.only == "left":
            right = [part.zero_() for part in right]
        if self.only == "right":
            left = [part.zero_() for part in left]
        return Factors(tuple(left), tuple(right))

    def _without_idle(self, change: Factors) -> Factors:
        """A change less what leaves every update as it is: L A on one side and -R A^T on the other, for any A.

        Only the ridge sees such a change, which makes the fit's linear system next to singular. The factors are
        balanced; where those of one side stay, there is none.
        """
        if self.only != "both":
            return change
        lefts, rights = [], []
        pairs = zip(self.factors.left, self.factors.right, change.left, change.right, self.factors.sizes(), strict=True)
        for left, right, by_left, by_right, s in pairs:
            idle = (left.mT @ by_left).sub_((right.mT @ by_right).mT).div_(s + s[:, None])
            lefts.append(torch.addmm(by_left, left, idle, alpha=-1))
            rights.append(torch.addmm(by_right, right, idle.mT))
        return Factors(tuple(lefts), tuple(rights))

    def step(self, slope: Factors, variances: Variances, iterations: int, tolerance: float) -> Factors:
        """The change that minimises the model, by preconditioned conjugate gradients.

        Among changes that differ in what leaves every update as it is, one without.
        """
        slope = self._masked(list(slope.left), list(slope.right))
        here, sizes = self.factors, self.sizes or self.factors.sizes()
        lines = zip(*variances.precision(here.ranks), strict=True)
        by_side = zip(lines, shared_precision(self.sites, variances), (here.right, here.left), strict=True)
        left, right = (Side.of(torch.stack(line), shared, known, sizes) for line, shared, known in by_side)

        def precondition(rest: Factors) -> Factors:
            return self._without_idle(Factors(left.solve(rest.left), right.solve(rest.right)))

        rest = self._without_idle(slope)
        direction = precondition(rest)
        size = first = rest.dot(direction)
        change = direction.moved(direction, -1.0)
        for _ in range(iterations):
            if not size > tolerance**2 * first:
                break
            image = self.product(direction)
            length = size / direction.dot(image)
            change = change.moved(direction, length)
            rest = rest.moved(self._without_idle(image), -length)
            step = precondition(rest)
            before, size = size, rest.dot(step)
            direction = step.moved(direction, size / before)
            del image, step  # as large as the factors, each
        return change


def force(sites: Sites, tile: Tile, centre: Tensor, half: Tensor, update: Tensor) -> Tensor:
    """P_i (x_i - W - M_i) of a tile (n, rows, columns), W where it is best; overwrites `half`, cells' half widths."""
    precision, total = sites.read(tile)
    rest = half.mul_(sites.offset[:, *tile]).add_(centre).sub_(update)
    weight = weighted(precision, rest, sites.weight[tile] * sites.centre[tile]).div_(total)
    return rest.sub_(weight).mul_(precision)


def weighted(precision: Tensor, values: Iterable[Tensor], start: Tensor | None = None) -> Tensor:
    """The sum over the models of P_i (n, rows, columns) times values (rows, columns) each, added to a start, in place.

    Model by model, which reads everything once.
    """
    total = start
    for p, value in zip(precision, values, strict=True):
        total = p * value if total is None else total.addcmul_(p, value)
    assert total is not None
    return total


def pull(
    force: Iterable[Tensor],
    tile: Tile,
    factors: Factors,
    by_left: list[Tensor],
    by_right: list[Tensor],
    only: str = "both",
) -> None:
    """Add what the models' forces (rows, columns) on updates are on their factors; the right ones may be in bfloat16.

    Sums over rows are in float32, which takes no longer: a bfloat16 product has to be widened before it is added.
    """
    rows, columns = tile
    for f, left, right, by_row, by_column in zip(force, factors.left, factors.right, by_left, by_right, strict=True):
        if only != "right" and right.dtype == f.dtype:
            by_row[rows].addmm_(f, right[columns])
        elif only != "right":
            by_row[rows] += f.to(right.dtype) @ right[columns]
        if only != "left":
            by_column[columns].addmm_(f.mT, left[rows])


def summed(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The sums over parts of each of their tensors, in those of the first."""
    others = iter(parts)
    first = next(others)
    for other in others:
        for total, value in zip(first, other, strict=True):
            total.add_(value)
    return list(first)


@lru_cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type != "cpu":
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def ridge(sizes: list[Tensor], factors: Factors, by_left: list[Tensor], by_right: list[Tensor], sign: float) -> None:
    """Add the ridge's share."""
    d, k = by_left[0].shape[0], by_right[0].shape[0]
    for s, left, right, out_left, out_right in zip(sizes, factors.left, factors.right, by_left, by_right, strict=True):
        out_left.addcmul_(left, d / s, value=sign)
        out_right.addcmul_(right, k / s, value=sign)


def slope(cells: Cells, sites: Sites, factors: Factors, sizes: list[Tensor] | None = None) -> Factors:
    """Minus half the gradient of F in the factors. sizes: S_i, of balanced factors by default."""
    by_left = [torch.zeros_like(left) for left in factors.left]

    def part(strips: list[list[Tile]]) -> list[Tensor]:
        by_right = [torch.zeros_like(right) for right in factors.right]
        for tile in chain(*strips):
            centre, half = cells.read(tile)
            pull(force(sites, tile, centre, half, factors.updates(*tile)), tile, factors, by_left, by_right)
        return by_right

    by_right = summed(each_part(part, cells.strips()))
    ridge(sizes or factors.sizes(), factors, by_left, by_right, -1.0)
    return Factors(tuple(by_left), tuple(by_right))


# ---- The probe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """F at some factors, from some of the rows, and the misfit chi of each model: 1 where cells explain all."""

    objective: float
    misfit: tuple[float, ...]


def probe(cells: Cells, sites: Sites, factors: Factors, sizes: list[Tensor], narrowest: float) -> Probe:
    """Look at every few rows. narrowest: precision up to which a cell's misfit counts."""
    n, d, k = cells.stack.shape
    stride = max(1, min(8, d // PROBED))
    step = max(1, 2**18 // (n * k)) * stride

    def part(blocks: list[slice]) -> tuple[float, Tensor, float, int]:
        objective, free, count = 0.0, 0.0, 0
        squares = torch.zeros(n, dtype=torch.float64)
        for block in blocks:
            rows = slice(block.start, block.stop, stride)
            picked = torch.arange(rows.start, rows.stop, stride, device=cells.stack.device)
            centre, half = cells.grid.cell(cells.stack[:, rows] * cells.scale)
            half.clamp_(min=NARROWEST)
            precision, total = sites.read((rows, ALL))
            update = factors.updates(picked)
            x = torch.addcmul(centre, half, sites.offset[:, rows].float())
            w, c = sites.weight[rows].float(), sites.centre[rows]
            rest = x.sub_(update)
            weight = weighted(precision, rest, w * c).div_(total)
            rest.sub_(weight)
            objective += float((rest.square_().mul_(precision)).sum()) + float((weight - c).square_().mul_(w).sum())
            misfit = centre.sub_(update).sub_(weight).square_()
            variance = half.square_().div_(3)
            if cells.twice:
                variance.add_(cells.grid.spacing(update).square_().div_(12))
            misfit.mul_(variance.reciprocal_().clamp_(max=narrowest)).clamp_(max=MOST)
            # A held-out cell has next to no precision, and no misfit.
            squares += misfit.mul_(precision > MEDIAN / 1e6).sum((1, 2)).double().cpu()
            free += float((w > 0.5 * (total - w)).sum())
            count += w.numel()
        return objective, squares, free, count

    found = in_parts(part, spans(d, step))
    objectives, squared, frees, counts = zip(*found, strict=True)
    squares, free, count = torch.stack(squared).sum(0), sum(frees), sum(counts)
    objective = sum(objectives) * d * k / count
    for s, left, right in zip(sizes, factors.left, factors.right, strict=True):
        objective += float((left.square().sum(0) * (d / s)).sum() + (right.square().sum(0) * (k / s)).sum())
    factor = n / (n - 1 + free / count)
    return Probe(objective, tuple((squares / count * factor).tolist()))


def relevances(factors: Factors, variances: Variances) -> list[Tensor]:
    """S_ij^2 theta_i / (d + k) of the directions of balanced factors: their size over that of the noise in one."""
    d, k = factors.left[0].shape[0], factors.right[0].shape[0]
    return [
        s.square() * (0.5 * float(by_row.mean() + by_column.mean()) / (d + k))
        for s, (by_row, by_column) in zip(factors.sizes(), variances.precision(factors.ranks), strict=True)
    ]


def pruned(factors: Factors, variances: Variances) -> Factors:
    """Balanced factors without the directions below the noise; at least one is kept."""
    lefts, rights = [], []
    for left, right, relevance in zip(factors.left, factors.right, relevances(factors, variances), strict=True):
        square = float(left.square().sum(0).square().sum())  # of the update, whose singular values these sums are
        faintest = square < (2 * FAINTEST) ** 2 * len(left) * len(right)  # a cell is two units
        keep = (relevance > (RELEVANT_OF_FAINTEST if faintest else RELEVANT)).nonzero().squeeze(1)
        keep = keep if len(keep) else keep.new_zeros(1)
        lefts.append(left[:, keep].contiguous())
        rights.append(right[:, keep].contiguous())
    return Factors(tuple(lefts), tuple(rights))

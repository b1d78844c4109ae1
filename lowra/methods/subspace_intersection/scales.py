"""Merges whose rows (or columns) were rescaled: W'_i = diag(c_i) (W + M_i), as DoRA and (IA)^3 merge.

DoRA (Liu et al. 2024) gives every output row of W + M_i a trained norm, so that c_i is unknown for each model and row.
The relative scales rho = c_i / c_0 are found from the merges alone: row j of W'_i - rho_j W'_0 is c_ij (m_ij - m_0j)
and lies in the joint row space of two updates, so the matrix has rank 2 r for the right rho, and full rank for any
other. Divided by them all models are merges of one base, diag(c_0) W, and the closed form does the rest. One scale
per row is left, and three things can tell it (`unscaled`): models that need no scale between them, as plain LoRAs; the
grid of a half-precision base, on which a row lies for one scale only; or nothing, and W is determined up to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import ARITHMETIC, Noise, sampled_rows
from lowra.methods.subspace_intersection.ranges import MARGINS, OVERSAMPLING, row_blocks

# Rows and columns that the ratios are found on before they are refined on all; the second where no rank does.
SAMPLES = (256, 1024)

# The first rank tried, and from one to the next. (A rank that is too low is found out in three steps; one far too high
# costs more of them, and each more.)
LOWEST = 4
GROWTH = 2

# Columns of an image beyond the rank tried.
EXTRA = 4

# Where no rank does, more columns are taken only if the ratios leave less than this share of what ones would.
GAIN = 0.5

# Of a row's unit vector, this share lies in the column space when it has a direction of it for itself.
OWN = 0.9

# A gap of so many times between singular values is the rank; rows that are wrong (see `mended`) do not make one.
CLEAR = 100.0

# Of a row, this share outside of the leading directions is none.
BLIND = 1e-9

TINY = torch.finfo(torch.float64).tiny

# A row space that is known is left out where it has at most this share of a sample's directions.
AWAY = 0.25

# Steps of alternation at each rank tried: so many, and on while each leaves less than this share of what was left over
# (at the rank itself it is a tenth). At most so many in all.
ROUNDS = 3
FALLS = 0.7
AT_MOST = 40

# Rows of two fine-tunes of one base are parallel but for their updates. Of two bases they are as any two vectors are,
# with cosines of 1 / sqrt(k); half the rows have to exceed so many times that.
PARALLEL = 6.0

# A low rank explains a difference when it leaves at most so many times its noise, in the root mean square.
EXPLAINED = 2.0

# Entries that tell what is left over.
LOOK = 2**14

# The ratios are settled when no row has further to go than its ratio's standard error, which is that of an entry of the
# row times 1 / sqrt(k). On ratios that are nearly right a step leaves about this share of what it moves.
RATE = 0.1


@dataclass(frozen=True)
class Ratio:
    """What rows are multiplied by, (d,) float64, and the standard error of each.

    right: (k, r), the row space left then, outside of what was known. span: (k, c), directions it all lies in.
    """

    values: Tensor
    error: Tensor
    right: Tensor
    span: Tensor


def row_ratio(
    first: Tensor, second: Tensor, noise: Noise, generator: torch.Generator, known: Tensor | None = None
) -> Ratio | None:
    """The rho that makes `first` - diag(rho) `second`, both (d, k), of low rank; None where none does.

    noise: of the difference. known: the row space (k, r) that another model's difference to `second` has; it holds the
    update of `second`, so that outside of it there is one update left to find.

    Alternating least squares: with V the leading right singular vectors of the difference, rho_j = <x_j, y_j> /
    <x_j, x_j> on what V leaves of the rows. From the full rank at once this sticks in a share of cases; growing the
    rank from a few never did. Some rows and columns tell V, one step more the ratios of all rows. Ranks up to half of
    the sample are tried: what they leave over tells whether the answer is right. That takes some directions too many;
    the ratios are found again at the rank itself.
    """
    for size in SAMPLES:
        rows, columns = (
            torch.randperm(count, generator=generator)[:size].sort().values.to(first.device) for count in first.shape
        )
        some = first[rows].double(), second[rows].double()
        y, x = (side[:, columns] for side in some)
        aside = known if known is not None and known.shape[1] < columns.numel() * AWAY else None
        if aside is not None:
            inside = torch.linalg.qr(aside[columns]).Q
            y, x = (side.addmm(side @ inside, inside.mT, alpha=-1) for side in (y, x))
        part = _Pair.of(y, x, noise)
        cosine = part.product / (part.size * squares(part.y)).sqrt().clamp_min(TINY)
        if float(cosine.median()) < min(0.5, PARALLEL / math.sqrt(columns.numel())):
            return None
        fit = part.grown(generator)
        if not fit.explained and fit.left < ARITHMETIC * noise.std:
            noise = noise.scaled(fit.left / noise.std)
            part = replace(part, noise=noise)
            fit = part.grown(generator)
        if fit.explained:
            noise = noise.scaled(max(1.0, fit.left / noise.std))
            fit = part.mended(fit)
            basis, _ = _Pair.of(*some, noise, aside).vectors(fit.ratio, fit.image)
            whole = _Pair.of(first, second, noise, aside)
            found, right, span = whole.settled(fit.rank, basis, generator)
            if found.explained:
                error = noise.std / whole.size.sqrt().clamp_min(TINY)
                return Ratio(found.ratio, error, right, span) if bool((found.ratio > 0).all()) else None
        elif not part.gains(fit):
            break
        if size >= max(first.shape):
            break
    return None


def squares(matrix: Tensor) -> Tensor:
    """|x_j|^2 of the rows, (d,) float64."""
    blocks = (matrix[block].double() for block in row_blocks(matrix.shape[0], matrix.shape[1], torch.float64))
    return torch.cat([torch.linalg.vecdot(block, block) for block in blocks])


@dataclass(frozen=True)
class _Fit:
    """Ratios (d,) and the rank that they leave; image: (d, c), whose range the column space lies in.

    left: root mean square of what is left over; explained: whether that is noise. values: (c,), the leading singular
    values, of the columns in order.
    """

    ratio: Tensor
    rank: int
    image: Tensor
    explained: bool
    values: Tensor
    left: float


@dataclass(frozen=True)
class _Pair:
    """y and x (d, m), <x_j, x_j> and <x_j, y_j> (d,) float64, and the noise of the difference y - diag(ratio) x.

    Products with the difference are differences of products in float64, whose rounding is 2^-53 of the weights. The
    rounding of the merges is 2^-25, so that nothing is lost. looked: some rows (r,), and these of y and x as float64,
    that tell what is left over. known: (m, c) orthonormal, directions that are no part of what is looked at.
    """

    y: Tensor
    x: Tensor
    size: Tensor
    product: Tensor
    noise: Noise
    looked: tuple[Tensor, Tensor, Tensor]
    known: Tensor | None = None

    @classmethod
    def of(cls, y: Tensor, x: Tensor, noise: Noise, known: Tensor | None = None) -> _Pair:
        """Of two matrices (d, m)."""
        parts = [(torch.linalg.vecdot(b, b), torch.linalg.vecdot(a, b)) for _, a, b in row_pairs(y, x)]
        size, product = (torch.cat(part) for part in zip(*parts, strict=True))
        picked = sampled_rows(x.shape[0], x.shape[1], x.device, LOOK)
        return cls(y, x, size, product, noise, (picked, y[picked].double(), x[picked].double()), known)

    def plain(self) -> Tensor:
        """The ratios (d,) that make every row smallest."""
        return torch.where(self.size > 0, self.product / self.size.clamp_min(TINY), 1)

    def times(self, ratio: Tensor, right: Tensor) -> Tensor:
        """The difference times (m, c): (d, c)."""
        return torch.cat([a @ right - ratio[block, None] * (b @ right) for block, a, b in row_pairs(self.y, self.x)])

    def vectors(self, ratio: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Right singular vectors (m, c) and values (c,) of the difference on the range of an image (d, c)."""
        columns = torch.linalg.qr(image).Q.contiguous()
        total = columns.new_zeros(self.x.shape[1], columns.shape[1])
        for block, a, b in row_pairs(self.y, self.x):
            total.addmm_(torch.addcmul(a, ratio[block, None], b, value=-1).mT, columns[block])
        if self.known is not None:
            total.addmm_(self.known, self.known.mT @ total, alpha=-1)
        right, values, _ = torch.linalg.svd(total, full_matrices=False)
        return right, values

    def step(self, ratio: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The change (d,) of the ratios that makes each row smallest outside of the first vectors of a basis (m, c).

        Also the image (d, c) of the basis under the difference changed so.
        """
        if self.known is not None:
            skipped = self.known.shape[1]
            basis, rank = torch.cat([self.known, basis], 1), skipped + rank
        else:
            skipped = 0
        inside, outside = torch.empty(2, self.x.shape[0], basis.shape[1], dtype=basis.dtype, device=basis.device)
        for block, a, b in row_pairs(self.y, self.x):
            torch.mm(b, basis, out=inside[block])
            torch.mm(a, basis, out=outside[block])
        outside.addcmul_(ratio[:, None], inside, value=-1)
        product = self.product - ratio * self.size - torch.linalg.vecdot(inside[:, :rank], outside[:, :rank])
        free = self.size - inside[:, :rank].square().sum(1)
        # A row that lies in the basis tells nothing of its ratio.
        change = torch.where(free > BLIND * self.size, product / free.clamp_min(TINY), 0)
        return change, outside.addcmul_(change[:, None], inside, value=-1)[:, skipped:]

    def left_over(self, ratio: Tensor, basis: Tensor) -> float:
        """Root mean square, per degree of freedom, of what a basis (m, r) leaves of some rows of the difference."""
        picked, y, x = self.looked
        if self.known is not None:
            basis = torch.cat([self.known, basis], 1)
        rows = torch.addcmul(y, ratio[picked, None], x, value=-1)
        rows.addmm_(rows @ basis, basis.mT, alpha=-1)
        (d, m), rank = self.x.shape, basis.shape[1]
        return math.sqrt(float(rows.square_().mean()) / ((1 - rank / m) * (1 - rank / d)))

    def gains(self, fit: _Fit) -> bool:
        """Whether the ratios of a fit leave much less of the difference than ones, at its rank."""
        ones = torch.ones_like(fit.ratio)
        basis, _ = self.vectors(ones, fit.image)
        basis, _ = self.vectors(ones, self.times(ones, basis))
        own, _ = self.vectors(fit.ratio, fit.image)
        return self.left_over(fit.ratio, own[:, : fit.rank]) < GAIN * self.left_over(ones, basis[:, : fit.rank])

    def grown(self, generator: torch.Generator) -> _Fit:
        """The fit of the smallest rank that explains the difference; that of the largest tried if none does.

        Multiplied from a few on until it does, then narrowed down. A rank some directions too large explains it as
        well, by ratios that are wrong in as many rows. Where more directions leave as much, and that may be noise of
        float32 sums, no more are tried: the fit of fewer is handed back.
        """
        d, m = self.x.shape
        ratio, below, rank = self.plain(), 0, max(1, min(LOWEST, min(d, m) // 2))
        before: _Fit | None = None
        while before is None or 2 * rank <= min(d, m):
            columns = torch.randn(m, min(rank + EXTRA, d, m), generator=generator, dtype=torch.float64)
            fit = self.fitted(ratio, rank, self.times(ratio, columns.to(self.x.device)))
            ratio = fit.ratio
            if before is not None and FALLS * before.left < fit.left and before.left < ARITHMETIC * self.noise.std:
                return before
            if fit.explained:
                break
            before = fit
            below, rank = rank, GROWTH * rank
        else:
            return fit
        # The largest gap, of which one may be above the rank tried, is the rank. One less has to fail where it is not
        # clear.
        values = fit.values[below : rank + 1]
        gap = below + 1 + int((values[:-1] / values[1:].clamp_min(TINY)).argmax()) if len(values) > 1 else rank
        clear = bool(values[gap - below - 1] > CLEAR * values[gap - below]) if len(values) > 1 else False
        tried = min(gap, rank - 1)
        while fit.rank - below > 1 and not (clear and fit.rank == gap):
            smaller = self.fitted(fit.ratio, tried, fit.image[:, : tried + EXTRA])
            confirm = smaller.explained and fit.rank - tried > 1
            below, fit = (below, smaller) if smaller.explained else (tried, fit)
            tried = tried - 1 if confirm else (below + fit.rank) // 2
        return fit

    def fitted(self, ratio: Tensor, rank: int, image: Tensor) -> _Fit:
        """The fit at one rank, iterated until it explains the difference or falls no further."""
        left = math.inf
        last: Tensor | None = None
        for step in range(1, AT_MOST + 1):
            basis, values = self.vectors(ratio, image)
            change, image = self.step(ratio, basis, rank)
            ratio = ratio + change
            if step >= ROUNDS - 1:
                before, left = left, self.left_over(ratio, basis[:, :rank])
                if left < EXPLAINED * self.noise.std or left > FALLS * before:
                    break
            if last is None or step < ROUNDS:
                last = change
                continue
            # A row's steps shrink by a factor of its own: every other time their sum is taken at once.
            factor = change / torch.where(last == 0, 1, last)
            ratio, last = ratio + torch.where(factor.abs() < FALLS, change * factor / (1 - factor), 0), None
        return _Fit(ratio, rank, image, left < EXPLAINED * self.noise.std, values, left)

    def mended(self, fit: _Fit) -> _Fit:
        """The fit with rows found again that have a direction of its column space for themselves.

        A row whose ratio is wrong is explained by one direction more, which is its own. The others tell what it is.
        """
        basis, values = self.vectors(fit.ratio, fit.image)
        left = self.times(fit.ratio, basis[:, : fit.rank]) / values[: fit.rank].clamp_min(TINY)  # (d, r)
        own = left.square().sum(1) > OWN
        rank = fit.rank - int(own.sum())
        if rank == fit.rank or rank < 1:
            return fit
        others = _Pair.of(self.y[~own], self.x[~own], self.noise)
        found = others.fitted(fit.ratio[~own], rank, fit.image[~own])
        if not found.explained:
            return fit
        ratio = fit.ratio.clone()
        ratio[~own] = found.ratio
        basis, _ = others.vectors(found.ratio, found.image)
        change, image = self.step(ratio, basis, rank)  # exact at once: it is linear in the ratios
        mended = self.fitted(ratio + change, rank, image)
        return mended if mended.explained else fit

    def settled(self, rank: int, basis: Tensor, generator: torch.Generator) -> tuple[_Fit, Tensor, Tensor]:
        """The fit whose ratios stay, from row directions (m, c); directions above the noise that it missed are added.

        Also the row space (m, rank) that it leaves, and more than that, with what is known: see `Ratio`.
        """
        ratio = self.plain()
        change, image = self.step(ratio, basis[:, : rank + OVERSAMPLING // 2], rank)  # exact but for the basis's noise
        ratio = ratio + change
        within = self.noise.std / max(TINY, float(self.size.mean().sqrt()))
        cutoff = MARGINS[0] * self.noise.norm(*self.x.shape)
        before: Tensor | None = None
        for _ in range(AT_MOST):
            basis, values = self.vectors(ratio, image)
            change, image = self.step(ratio, basis, rank)
            ratio = ratio + change
            moved = change.abs()
            # A row's steps shrink by a factor of its own; what is left to go is their sum.
            ahead = RATE * moved if before is None else moved.square() / (before - moved).clamp_min(TINY)
            if bool((torch.minimum(moved, ahead) < within).all()):
                above = int((values > cutoff).sum())
                if above <= rank:
                    break
                rank, moved = above, torch.zeros_like(ratio)
                if above == image.shape[1] < min(self.x.shape):
                    count = min(above, min(self.x.shape) - above)
                    more = torch.randn(self.x.shape[1], count, generator=generator, dtype=torch.float64)
                    image = torch.cat([image, self.times(ratio, more.to(self.x.device))], 1)
            before = moved
        left = self.left_over(ratio, basis[:, :rank])
        fit = _Fit(ratio, rank, image, left < EXPLAINED * self.noise.std, values, left)
        # A row whose ratio is wrong would be left out of what is looked at next, and be wrong there, too.
        rows = image[:, :rank] / values[:rank].clamp_min(TINY)  # (d, r)
        own = rows[rows.square().sum(1) > OWN]
        right, span = basis[:, :rank], basis
        if len(own):
            right = right @ torch.linalg.qr(own.mT, mode="complete").Q[:, len(own) :]
        if self.known is not None:
            span = torch.cat([self.known, basis], 1)
        return fit, right, span


def row_pairs(y: Tensor, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The rows of two matrices (d, m) as float64, some at a time; the next overwrite those before."""
    if y.dtype == torch.float64:
        yield slice(None), y, x
        return
    d, m = y.shape
    blocks = row_blocks(d, m, torch.float64)
    scratch = y.new_empty(2, blocks[0].stop, m, dtype=torch.float64)
    for block in blocks:
        rows = scratch[:, : block.stop - block.start]
        yield block, rows[0].copy_(y[block]), rows[1].copy_(x[block])

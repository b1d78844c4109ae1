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

from lowra.methods.subspace_intersection.noise import Noise, sampled_rows
from lowra.methods.subspace_intersection.problem import SMALL_UPDATE
from lowra.methods.subspace_intersection.ranges import MARGINS, Difference, row_blocks

# Columns that the ratios are found on before they are refined on all; as many again times four where no rank does.
SAMPLE = 256

# From one rank tried to the next.
GROWTH = 4

# Where no rank does, more columns are taken only if the ratios leave less than this share of what ones would.
GAIN = 0.5

# Of a row's unit vector, this share lies in the column space when it has a direction of it for itself.
OWN = 0.9

# Of a row, this share outside of the leading directions is none.
BLIND = 1e-9

TINY = torch.finfo(torch.float64).tiny

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

# The ratios are settled when a step moves no row by more than this share of the rounding of its norm.
SETTLED = 0.1


@dataclass(frozen=True)
class ScaledDifference(Difference):
    """W'_a - diag(ratio) W'_b; ratio (d, 1) float64.

    In float32 the two are subtracted first, which is exact of close numbers, and what the ratio differs from 1 after.
    """

    ratio: Tensor

    def rows(self, picked: slice | Tensor) -> Tensor:
        """Some rows of the difference, (rows, k)."""
        first, second, ratio = self.first[picked], self.second[picked], self.ratio[picked]
        return self._formed(first, second, ratio, first.new_empty(first.shape, dtype=self.dtype))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, a block at a time; the next block overwrites the one before."""
        blocks = row_blocks(*self.shape, self.dtype)
        scratch = self.first.new_empty(blocks[0].stop, self.shape[1], dtype=self.dtype)
        for block in blocks:
            rows = scratch[: block.stop - block.start]
            yield block, self._formed(self.first[block], self.second[block], self.ratio[block], rows)

    @staticmethod
    def _formed(first: Tensor, second: Tensor, ratio: Tensor, out: Tensor) -> Tensor:
        if out.dtype == torch.float32:
            return torch.sub(first, second, out=out).addcmul_(second, (1 - ratio).float())
        return out.copy_(second).mul_(-ratio).add_(first)


def row_ratio(first: Tensor, second: Tensor, noise: Noise, generator: torch.Generator) -> Tensor | None:
    """The rho (d,) float64 that makes `first` - diag(rho) `second`, both (d, k), of low rank; None where none does.

    noise: of the difference. Alternating least squares: with V the leading right singular vectors of the difference,
    rho_j = <x_j, y_j> / <x_j, x_j> on what V leaves of the rows. From the full rank at once this sticks in a share of
    cases; growing the rank from 1 never did. Ranks up to half the sampled columns are tried: what they leave over tells
    whether the answer is right. That takes some directions too many; the ratios are found again at the rank itself.
    """
    for columns in (SAMPLE, GROWTH * SAMPLE):
        picked = torch.randperm(first.shape[1], generator=generator)[:columns].sort().values.to(first.device)
        y, x = first[:, picked].contiguous(), second[:, picked].contiguous()
        size, product = squares(x), (x.double() * y).sum(1)
        cosine = product / (size * squares(y)).sqrt().clamp_min(TINY)
        if float(cosine.median()) < min(0.5, PARALLEL / math.sqrt(picked.numel())):
            return None
        pair = _Pair(y, x, size, noise)
        fit = pair.grown(torch.where(size > 0, product / size.clamp_min(TINY), 1), generator)
        if fit.explained:
            whole = _Pair(first, second, squares(second), noise).settled(pair.mended(fit))
            return whole.ratio if whole.explained and bool((whole.ratio > 0).all()) else None
        if picked.numel() == first.shape[1] or not pair.gains(fit):
            break
    return None


def squares(matrix: Tensor) -> Tensor:
    """|x_j|^2 of the rows, (d,) float64."""
    return torch.cat(
        [
            matrix[block].double().square().sum(1)
            for block in row_blocks(matrix.shape[0], matrix.shape[1], torch.float64)
        ]
    )


@dataclass(frozen=True)
class _Fit:
    """Ratios (d,) and the rank that they leave; image: (d, c), whose range the column space lies in.

    explained: whether what is left over is noise. values: (c,), the leading singular values.
    """

    ratio: Tensor
    rank: int
    image: Tensor
    explained: bool
    values: Tensor


@dataclass(frozen=True)
class _Pair:
    """y and x (d, m), |x_j|^2 (d,), and the noise of y - diag(ratio) x."""

    y: Tensor
    x: Tensor
    size: Tensor
    noise: Noise

    def rest(self, ratio: Tensor) -> ScaledDifference:
        """The difference, in float32 where it is small enough beside the weights (see `problem.SMALL_UPDATE`)."""
        d, m = self.x.shape
        rows = sampled_rows(d, m, self.x.device)
        sample = ScaledDifference(self.y, self.x, torch.float64, ratio[:, None]).rows(rows)
        small = float(sample.square().mean()) < SMALL_UPDATE**2 * float(self.x[rows].double().square().mean())
        return ScaledDifference(self.y, self.x, torch.float32 if small else torch.float64, ratio[:, None])

    def gains(self, fit: _Fit) -> bool:
        """Whether the ratios of a fit leave much less of the difference than ones, at its rank."""
        plain = self.rest(torch.ones_like(fit.ratio))
        basis, _ = right_vectors(plain, fit.image)
        basis, _ = right_vectors(plain, plain.times(basis))
        scaled = self.rest(fit.ratio)
        own, _ = right_vectors(scaled, fit.image)
        return left_over(scaled, own[:, : fit.rank]) < GAIN * left_over(plain, basis[:, : fit.rank])

    def grown(self, ratio: Tensor, generator: torch.Generator) -> _Fit:
        """The fit of the smallest rank that explains the difference; that of the largest tried if none does.

        Multiplied from 1 on until it does, then narrowed down. A rank some directions too large explains it as well, by
        ratios that are wrong in as many rows.
        """
        d, m = self.x.shape
        rank = 1
        while 2 * rank <= min(d, m):
            rest = self.rest(ratio)
            columns = torch.randn(m, min(rank + 4, d, m), generator=generator)
            fit = self.fitted(ratio, rank, rest.times(columns.to(rest.dtype)))
            ratio = fit.ratio
            if fit.explained:
                break
            rank *= GROWTH
        else:
            return fit
        below, values = rank // GROWTH, fit.values[:rank]
        tried = below + 1 + int((values[below:-1] / values[below + 1 :].clamp_min(TINY)).argmax()) if rank > 2 else 1
        while fit.rank - below > 1:
            smaller = self.fitted(fit.ratio, tried, fit.image)
            below, fit = (below, smaller) if smaller.explained else (tried, fit)
            # The gap, where it is one, is confirmed by the rank below it.
            tried = fit.rank - 1 if smaller is fit and tried == fit.rank else (below + fit.rank) // 2
        return fit

    def fitted(self, ratio: Tensor, rank: int, image: Tensor) -> _Fit:
        """The fit at one rank, iterated until it explains the difference or falls no further."""
        rest = self.rest(ratio)
        left = math.inf
        for step in range(AT_MOST):
            basis, values = right_vectors(rest, image)
            change, image = self.step(rest, basis, rank)
            rest = replace(rest, ratio=rest.ratio + change[:, None])
            before, left = left, left_over(rest, basis[:, :rank])
            if left < EXPLAINED * self.noise.std or (step + 1 >= ROUNDS and left > FALLS * before):
                break
        return _Fit(rest.ratio[:, 0], rank, image, left < EXPLAINED * self.noise.std, values)

    def mended(self, fit: _Fit) -> _Fit:
        """The fit with rows found again that have a direction of its column space for themselves.

        A row whose ratio is wrong is explained by one direction more, which is its own. The others tell what it is.
        """
        rest = self.rest(fit.ratio)
        basis, values = right_vectors(rest, fit.image)
        left = rest.times(basis[:, : fit.rank]).double() / values[: fit.rank].clamp_min(TINY)  # (d, r)
        own = left.square().sum(1) > OWN
        rank = fit.rank - int(own.sum())
        if rank == fit.rank or rank < 1:
            return fit
        others = _Pair(self.y[~own], self.x[~own], self.size[~own], self.noise)
        found = others.fitted(fit.ratio[~own], rank, fit.image[~own])
        if not found.explained:
            return fit
        ratio = fit.ratio.clone()
        ratio[~own] = found.ratio
        basis, _ = right_vectors(others.rest(found.ratio), found.image)
        change, image = self.step(self.rest(ratio), basis, rank)  # exact at once: it is linear in the ratios
        mended = self.fitted(ratio + change, rank, image)
        return mended if mended.explained else fit

    def settled(self, fit: _Fit) -> _Fit:
        """The fit iterated until its ratios stay, directions above the noise that it had missed added."""
        rest, image, rank = self.rest(fit.ratio), fit.image, fit.rank
        within = SETTLED * self.noise.std / max(TINY, float(self.size.mean().sqrt()))
        cutoff = MARGINS[0] * self.noise.norm(*self.x.shape)
        for _ in range(AT_MOST):
            basis, values = right_vectors(rest, image)
            change, image = self.step(rest, basis, rank)
            rest = replace(rest, ratio=rest.ratio + change[:, None])
            if float(change.abs().max()) < within:
                above = int((values > cutoff).sum())
                if above <= rank:
                    break
                rank = above
        left = left_over(rest, basis[:, :rank])
        return _Fit(rest.ratio[:, 0], rank, image, left < EXPLAINED * self.noise.std, values)

    def step(self, rest: ScaledDifference, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The change (d,) of the ratios that makes each row smallest outside of the first vectors of a basis (m, c).

        Also the image (d, c) of the basis under the difference changed so.
        """
        basis = basis.to(rest.dtype)
        change, image = torch.empty_like(self.size), basis.new_empty(self.x.shape[0], basis.shape[1])
        for block, rows in rest.blocks():
            x = self.x[block].to(rest.dtype)
            inside, outside = x @ basis, rows @ basis
            product = (x * rows).sum(1) - (inside * outside)[:, :rank].sum(1)
            free = self.size[block] - inside[:, :rank].square().sum(1)
            # A row that lies in the basis tells nothing of its ratio.
            change[block] = torch.where(free > BLIND * self.size[block], product / free.clamp_min(TINY), 0)
            image[block] = outside - change[block, None].to(rest.dtype) * inside
        return change, image


def right_vectors(matrix: Difference, image: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (m, c) and values (c,), float64, of a matrix (d, m) on the range of an image (d, c)."""
    columns, _ = torch.linalg.qr(image.double())
    right, values, _ = torch.linalg.svd(matrix.transpose_times(columns).double(), full_matrices=False)
    return right, values


def left_over(rest: Difference, basis: Tensor) -> float:
    """Root mean square, per degree of freedom, of what a basis (m, r) leaves of some rows of a difference (d, m)."""
    d, m = rest.shape
    rows = rest.rows(sampled_rows(d, m, rest.first.device))
    basis = basis.to(rows.dtype)
    rows = rows - (rows @ basis) @ basis.mT
    rank = basis.shape[1]
    return math.sqrt(float(rows.double().square().mean()) / ((1 - rank / m) * (1 - rank / d)))

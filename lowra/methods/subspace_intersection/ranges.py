"""The small space in which everything happens: row and column spaces of the differences of merged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import Noise, joined, sampled_rows

# Bytes of the scratch in which a few rows of a difference are formed at a time: it stays in the caches, and no pass
# allocates another layer.
SCRATCH = 2**22

# Extra columns of a sketch. One refinement makes the number uncritical.
OVERSAMPLING = 16

# Up to this size (shorter side) a matrix whose rank fills half of it is given to the dense SVD.
DENSE = 1024

# A difference with more than this share of its singular values above the noise has no low rank to speak of.
FULL = 0.9

# A difference is full at once where a block of it is, of so many times the first sketch's columns: where the last
# quarter of its pivots exceed the noise so many times. Elimination amplifies the noise of a low rank some ten times.
BLOCK = 5
PIVOT = 128

# A singular value is signal above this many times the estimated norm of the noise. Where W does not look identified,
# the next margin is tried: of spectra that decay into the noise the joint bases may hold less than the ranks count, and
# what lies between two margins is too small to matter.
MARGINS = (1.1, 1.6, 2.3)

# What directions that are known leave of a difference is noise up to so many times what is expected.
WITHIN = 1.2

# Share of a singular value that the last of a quarter more has at most where they fall.
FALLING = 0.93


@dataclass(frozen=True)
class Difference:
    """W'_a - W'_b as an operator: the matrix (d, k) is never stored.

    Formed in `dtype`. float32 is enough while the updates are small beside the weights: the subtraction of close
    numbers is then exact, and the passes round relative to the small difference, not to the weights.
    """

    first: Tensor  # (d, k)
    second: Tensor  # (d, k)
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.first.shape[0], self.first.shape[1]

    def rows(self, picked: slice | Tensor) -> Tensor:
        """Some rows of the difference, (rows, k)."""
        first = self.first[picked]
        return subtract(first, self.second[picked], first.new_empty(first.shape, dtype=self.dtype))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, a block at a time; the next block overwrites the one before."""
        blocks = row_blocks(*self.shape, self.dtype)
        scratch = self.first.new_empty(blocks[0].stop, self.shape[1], dtype=self.dtype)
        for block in blocks:
            rows = scratch[: block.stop - block.start]
            yield block, subtract(self.first[block], self.second[block], rows)

    def times(self, right: Tensor) -> Tensor:
        """D R for R (k, c): (d, c)."""
        right = right.to(self.dtype)
        product = right.new_empty(self.shape[0], right.shape[1])
        for block, rows in self.blocks():
            torch.mm(rows, right, out=product[block])
        return product

    def transpose_times(self, left: Tensor) -> Tensor:
        """D^T L for L (d, c): (k, c)."""
        left = left.to(self.dtype).contiguous()  # the columns of a QR are not, which some products take badly
        total = left.new_zeros(self.shape[1], left.shape[1])
        for block, rows in self.blocks():
            total.addmm_(rows.mT, left[block])
        return total


def subtract(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """First - second in the finest of the three precisions, and into `out`."""
    return out.copy_(first).sub_(second) if out.dtype == torch.float64 else torch.sub(first, second, out=out)


def row_blocks(rows: int, columns: int, dtype: torch.dtype) -> list[slice]:
    """Slices of rows of about `SCRATCH` bytes that cover them all."""
    step = min(rows, max(1, SCRATCH // (columns * dtype.itemsize)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class RowSpace:
    """The row space of a matrix above its noise: right (k, r) orthonormal, with the singular values (r,) > cutoff.

    full: nothing of it is noise, or nothing could be told apart: the matrix is not of low rank.
    residual: root mean square of what is left of the matrix, per degree of freedom.
    """

    values: Tensor
    right: Tensor
    cutoff: float
    full: bool
    residual: float

    @property
    def rank(self) -> int:
        """Number of singular values above the noise."""
        return self.values.numel()

    @property
    def falls(self) -> bool:
        """Whether the last singular values fall, as those of updates do and those of a scaled weight do not."""
        count = self.values.numel()
        return count > 8 and float(self.values[-1]) < FALLING * float(self.values[count * 3 // 4])

    def raised(self, factor: float) -> RowSpace:
        """What remains when the noise turns out so many times as large."""
        cutoff = self.cutoff * factor
        rank = int((self.values > cutoff).sum())
        return replace(self, values=self.values[:rank], right=self.right[:, :rank], cutoff=cutoff)


def row_space(
    difference: Difference, noise: Noise, guess: int, generator: torch.Generator, doublings: int | None = None
) -> RowSpace:
    """All row directions of a difference above its noise, whatever their number.

    A randomized range finder and one projection on the range found (Halko et al. 2011, sections 4.1 and 5.1). Who works
    on with D times these rows takes the half power step that makes the extra columns uncritical. `guess` columns to
    begin with, twice as many whenever the last one is still above the noise. Instead of growing to half the layer the
    sketch is replaced by the dense SVD where the layer is small; a large one that needs more is called full, unless the
    guess was as large. doublings: after so many of them the matrix is called full for now, and before any where a block
    of it shows that they would be in vain.
    """
    d, k = difference.shape
    if doublings is not None and full_block(difference, noise, BLOCK * guess):
        empty = difference.first.new_zeros(k, 0, dtype=torch.float64)
        return RowSpace(empty[0], empty, math.inf, True, math.inf)
    half = min(d, k) // 2
    columns, crowded = min(guess, 2 * half), True
    limit = half if min(d, k) <= DENSE else max(half, columns + 1)
    hasty = doublings is not None and columns * 2**doublings < limit
    if doublings is not None and hasty:
        limit = columns * 2**doublings + 1
    while crowded and columns < limit:
        # D^T Q with Q from D itself leans to the larger singular values of the noise: d + k in the mean square, not k.
        cutoff = MARGINS[0] * noise.norm(d + k, columns)
        right, values, _ = thin_svd(projected(difference, columns, generator), cutoff)
        crowded = values.numel() == columns
        columns *= 2
    if crowded and min(d, k) <= DENSE and not hasty:
        cutoff = MARGINS[0] * noise.norm(d, k)
        right, values, _ = thin_svd(difference.rows(slice(None)).double().mT, cutoff)
        crowded = False
    full = crowded or values.numel() > FULL * min(d, k)
    return RowSpace(values, right, cutoff, full, left_over(difference, right))


def left_over(difference: Difference, right: Tensor) -> float:
    """Root mean square, per degree of freedom, of what row directions (k, r) leave of a difference."""
    (d, k), rank = difference.shape, right.shape[1]
    rows = difference.rows(sampled_rows(d, k, difference.first.device))
    basis = right.to(rows.dtype)
    rest = rows - (rows @ basis) @ basis.mT  # (rows, k)
    # The row space takes in what noise the column space has, so that as many rows are free of it.
    freedom = (1 - rank / d) * (1 - rank / k)
    return math.sqrt(float(rest.double().square().mean()) / max(freedom, 1 / (d * k)))


def row_space_within(difference: Difference, noise: Noise, span: Tensor) -> RowSpace | None:
    """The row space of a difference that should lie within orthonormal directions (k, c); None where it does not."""
    cutoff = MARGINS[0] * noise.norm(sum(difference.shape), span.shape[1])  # as in `row_space`: the span leans, too
    _, values, mix = thin_svd(difference.times(span), cutoff)
    right = span @ mix
    residual = left_over(difference, right)
    if values.numel() == span.shape[1] or residual > WITHIN * noise.std:
        return None
    return RowSpace(values, right, cutoff, False, residual)


def full_block(difference: Difference, noise: Noise, side: int) -> bool:
    """Whether a block of a difference, of so many rows and columns, is of full rank, far above the noise."""
    d, k = difference.shape
    rows, columns = (sampled_rows(size, 1, difference.first.device, min(side, d, k)) for size in (d, k))
    block = difference.first[rows][:, columns].double() - difference.second[rows][:, columns]
    last = pivots(block)[-len(block) // 4 :]
    return float(last.median()) > PIVOT * noise.std


def pivots(blocks: Tensor) -> Tensor:
    """The sizes of the pivots of square matrices (..., a, a), which tell a full rank in a fraction of an SVD's time."""
    return torch.linalg.lu_factor_ex(blocks).LU.diagonal(dim1=-2, dim2=-1).abs()  # (..., a)


def projected(difference: Difference, columns: int, generator: torch.Generator) -> Tensor:
    """D^T Q (k, p) with Q an orthonormal basis of D times p = `columns` random vectors."""
    sketch = torch.randn(difference.shape[1], columns, generator=generator).to(difference.first.device)
    return difference.transpose_times(torch.linalg.qr(difference.times(sketch)).Q)


def triplets(difference: Difference, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of D on a row space: left (d, p), values (p,), right (k, p) for orthonormal rows (k, p)."""
    left, values, mix = thin_svd(difference.times(rows))
    return left, values, rows.double() @ mix


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Full SVD of (..., d, k) as left (..., d, p), values (..., p), right (..., k, p)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.mT


def thin_svd(tall: Tensor, cutoff: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets above a cutoff of a tall matrix (d, p): left (d, r), values (r,), right (p, r), in float64.

    A float64 matrix goes through QR. A float32 one carries errors of 2^-24 of its largest singular value, and what is
    above them shows in its Gram matrix in float64, too, which is half the work. The left vectors found so are
    orthonormal only as far as the small eigenvalues are exact; a Cholesky factor makes them so.
    """
    if tall.dtype == torch.float64:
        basis, triangle = torch.linalg.qr(tall)
        left, values, right = dense_svd(triangle)
        rank = int((values > cutoff).sum())
        return basis @ left[:, :rank], values[:rank], right[:, :rank]
    tall = tall.double()
    squares, right = torch.linalg.eigh(tall.mT @ tall)
    values, right = squares.clamp(min=0).sqrt().flip(0), right.flip(1)
    rank = int((values > max(cutoff, torch.finfo(torch.float32).eps * float(values[:1].sum()))).sum())
    values, right = values[:rank], right[:, :rank]
    left = tall @ (right / values)
    triangle = torch.linalg.cholesky(left.mT @ left, upper=True)
    return torch.linalg.solve_triangular(triangle, left, upper=True, left=False), values, right


@dataclass(frozen=True)
class Core:
    """The n models seen in the joint subspaces of their differences.

    With D_i = W'_i - W'_0, left (d, a) and right (k, b) hold orthonormal bases of the column and row spaces of all D_i,
    and matrices[i] = left^T D_i right, (n, a, b) float64, the first of which is zero. An estimate X (a, b) of
    left^T (W - W'_0) right is what is left to find.

    below: (d, b) each for i >= 1, the part of D_i right outside of left. Only noise, but noise that enters the least
        squares: see `solve.lift`.
    noise: rounding of each model; weights: (n, 1, 1), its inverse variances, of mean 1. margin: see `MARGINS`.
    """

    left: Tensor
    right: Tensor
    matrices: Tensor
    below: tuple[Tensor, ...]
    noise: tuple[Noise, ...]
    weights: Tensor
    margin: float

    def cutoffs(self) -> Tensor:
        """(n,): spectral norm of each model's noise inside the core, above which a singular value is signal."""
        sizes = self.matrices.shape[1:]
        return self.matrices.new_tensor([self.margin * noise.norm(*sizes) for noise in self.noise])

    def mean(self, models: Tensor) -> Tensor:
        """Weighted mean of (n, ., .) over the models."""
        return (self.weights.to(models.dtype) * models).mean(0)


def joint_core(differences: list[Difference], rows: list[RowSpace], noise: tuple[Noise, ...], margin: float) -> Core:
    """Joint bases from the row spaces of the differences to model 0, then the core from the data itself.

    The column spaces are those of D_i times the joint rows, the half power step that `row_space` leaves to do. The core
    is computed from the merged weights, not from any factors, so that the whole noise of every model enters it: the
    least squares that follow average it out.
    """
    least = min((joined(noise[0], other) for other in noise[1:]), key=lambda level: level.std)
    right = spanned([(space.right * space.values).to(differences[0].dtype) for space in rows], least, margin)  # (k, b)
    images = [difference.times(right) for difference in differences]  # (d, b) each
    turns = [right.mT @ space.right for space in rows]  # (b, r_i) each
    left = spanned(
        [image @ turn.to(image.dtype) for image, turn in zip(images, turns, strict=True)], least, margin
    )  # (d, a)
    cores = [left.mT @ image.double() for image in images]
    below = tuple(
        image.sub_(left.to(image.dtype) @ core.to(image.dtype)) for image, core in zip(images, cores, strict=True)
    )
    precision = left.new_tensor([level.std**-2 for level in noise])
    return Core(
        left,
        right,
        torch.stack([torch.zeros_like(cores[0]), *cores]),
        below,
        noise,
        (precision / precision.mean()).view(-1, 1, 1),
        margin,
    )


def outside_columns(differences: list[Difference], left: Tensor, right: Tensor) -> list[Tensor]:
    """The part of D_i^T left outside of right, (k, a) each: to the columns what `Core.below` is to the rows."""
    images = (difference.transpose_times(left) for difference in differences)
    return [image.sub_((right @ (right.mT @ image.double())).to(image.dtype)) for image in images]


def spanned(pieces: list[Tensor], noise: Noise, margin: float) -> Tensor:
    """Orthonormal basis of the columns of all pieces (d, r_i) together, as far as they rise above the noise."""
    together = torch.cat(pieces, 1)
    return thin_svd(together, margin * noise.norm(*together.shape))[0]

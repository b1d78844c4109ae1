"""The small space in which everything happens: row and column spaces of the differences of merged weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import Noise, joined, sampled_rows

# Differences are formed a block of rows at a time, so that no pass allocates another layer.
BLOCK = 2**19

# Extra columns of a sketch. One refinement pass makes the number uncritical.
OVERSAMPLING = 16

# Up to this size (shorter side) a matrix whose rank fills half of it is given to the dense SVD.
DENSE = 1024

# A difference with more than this share of its singular values above the noise has no low rank to speak of.
FULL = 0.9

# A singular value is signal above this many times the estimated norm of the noise. Tuned: at 1.1 three models with
# spectra that decay into the noise can look unidentified, since the joint bases then hold less than the ranks count.
MARGIN = 1.25


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
        return self.first[picked].to(self.dtype) - self.second[picked].to(self.dtype)

    def blocks(self) -> list[slice]:
        """Slices that cover the rows."""
        return row_blocks(*self.shape)

    def times(self, right: Tensor) -> Tensor:
        """D R for R (k, c): (d, c)."""
        right = right.to(self.dtype)
        return torch.cat([self.rows(block) @ right for block in self.blocks()])

    def transpose_times(self, left: Tensor) -> Tensor:
        """D^T L for L (d, c): (k, c)."""
        left = left.to(self.dtype)
        total = left.new_zeros(self.shape[1], left.shape[1])
        for block in self.blocks():
            total.addmm_(self.rows(block).mT, left[block])
        return total


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of rows of about `BLOCK` entries."""
    step = max(1, BLOCK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class LowRank:
    """The part of a matrix above its noise: left (d, r) diag(values) right^T (k, r).

    full: nothing of it is noise, or nothing could be told apart: the matrix is not of low rank.
    residual: root mean square of what is left of it, per degree of freedom.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    full: bool
    residual: float

    @property
    def rank(self) -> int:
        """Number of singular values above the noise."""
        return self.values.numel()

    def above(self, cutoff: float) -> LowRank:
        """What remains when the noise turns out larger."""
        rank = int((self.values > cutoff).sum())
        return replace(self, left=self.left[:, :rank], values=self.values[:rank], right=self.right[:, :rank])


def low_rank_part(difference: Difference, noise: Noise, guess: int, generator: torch.Generator) -> LowRank:
    """All singular triplets of a difference above its noise, whatever their number.

    A randomized range finder with one refinement: project on the range, then take the range of D times the row space
    found, half a power step (Halko et al. 2011, section 4.5). `guess` columns to begin with, twice as many whenever the
    last one is still above the noise. A sketch of half the layer or more is replaced by the dense SVD where the layer
    is small; a large layer that needs one is called full, since no three updates of that rank fit into it.
    """
    d, k = difference.shape
    device = difference.first.device
    cutoff = MARGIN * noise.norm(d, k)
    columns, crowded = guess, True
    while crowded and 2 * columns < min(d, k):
        left, values, right = leading_triplets(difference, columns, generator)
        crowded = bool(values[-1] > cutoff)
        columns *= 2
    if crowded and min(d, k) <= DENSE:
        left, values, right = dense_svd(difference.rows(slice(None)).double())
        crowded = False
    rank = int((values > cutoff).sum())
    left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    picked = sampled_rows(d, k, device)[:256]
    rest = difference.rows(picked).double() - (left[picked] * values) @ right.mT  # (rows, k)
    full = crowded or rank > FULL * min(d, k)
    freedom = (1 - rank / d) * (1 - rank / k)
    return LowRank(left, values, right, full, 0.0 if full else float(rest.square().mean() / freedom) ** 0.5)


def leading_triplets(difference: Difference, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The range finder: left (d, p), values (p,), right (k, p) for p = `columns`, the last ones inexact."""
    sketch = torch.randn(difference.shape[1], columns, generator=generator).to(difference.first.device)
    basis = torch.linalg.qr(difference.times(sketch)).Q  # (d, p)
    basis = torch.linalg.qr(difference.transpose_times(basis)).Q  # (k, p)
    left, values, small = thin_svd(difference.times(basis))
    return left, values, basis.double() @ small


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Full SVD of (..., d, k) as left (..., d, p), values (..., p), right (..., k, p)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.mT


def thin_svd(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a tall matrix (d, p) in float64, by QR first: the SVD then works on p x p."""
    basis, triangle = torch.linalg.qr(tall.double())
    left, values, right = dense_svd(triangle)
    return basis @ left, values, right


@dataclass(frozen=True)
class Core:
    """The n models seen in the joint subspaces of their differences.

    With D_i = W'_i - W'_0, left (d, a) and right (k, b) hold orthonormal bases of the column and row spaces of all D_i,
    and matrices[i] = left^T D_i right, (n, a, b) float64, the first of which is zero. An estimate X (a, b) of
    left^T (W - W'_0) right is what is left to find.

    below: (n, d, b), the part of D_i right outside of left; beside: (n, k, a), that of D_i^T left outside of right.
        Only noise, but noise that enters the least squares: see `solve.lift`.
    noise: rounding of each model; weights: (n, 1, 1), its inverse variances, of mean 1.
    """

    left: Tensor
    right: Tensor
    matrices: Tensor
    below: Tensor
    beside: Tensor
    noise: tuple[Noise, ...]
    weights: Tensor

    def cutoffs(self) -> Tensor:
        """(n,): spectral norm of each model's noise inside the core, above which a singular value is signal."""
        sizes = self.matrices.shape[1:]
        return self.matrices.new_tensor([MARGIN * noise.norm(*sizes) for noise in self.noise])

    def mean(self, models: Tensor) -> Tensor:
        """Weighted mean of (n, ., .) over the models."""
        return (self.weights.to(models.dtype) * models).mean(0)


def joint_core(differences: list[Difference], factors: list[LowRank], noise: tuple[Noise, ...]) -> Core:
    """Bases from the low-rank parts of the differences to model 0, then the core from the data itself.

    The core is computed from the merged weights, not from the factors, so that the whole noise of every model enters
    it: the least squares that follow average it out.
    """
    d, k = differences[0].shape
    cutoff = MARGIN * min(joined(noise[0], other).norm(d, k) for other in noise[1:])
    left = spanned([part.left * part.values for part in factors], cutoff)  # (d, a)
    right = spanned([part.right * part.values for part in factors], cutoff)  # (k, b)
    below, beside, cores = [], [], []
    for difference in differences:
        image = difference.times(right)  # (d, b)
        cores.append(left.mT @ image.double())
        below.append(image - (left @ cores[-1]).to(image.dtype))
        image = difference.transpose_times(left)  # (k, a)
        beside.append(image - (right @ cores[-1].mT).to(image.dtype))
    precision = left.new_tensor([noise.std**-2 for noise in noise])
    return Core(
        left,
        right,
        torch.stack([torch.zeros_like(cores[0]), *cores]),
        torch.stack([torch.zeros_like(below[0]), *below]),
        torch.stack([torch.zeros_like(beside[0]), *beside]),
        noise,
        (precision / precision.mean()).view(-1, 1, 1),
    )


def spanned(pieces: list[Tensor], cutoff: float) -> Tensor:
    """Orthonormal basis of the columns of all pieces (d, r_i) together, as far as they rise above the cutoff."""
    left, values, _ = thin_svd(torch.cat(pieces, 1))
    return left[:, : int((values > cutoff).sum())]

"""Preconditioner: what a step of the fit would be if all entries were known equally well.

W follows the updates, so a change of one is partly undone by changes of the others, the more so the more of their
column or row spaces they have in common: then W can move far at hardly any cost, and conjugate gradients that know of
each update alone take hundreds of iterations to see where to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowra.methods.subspace_intersection.half.fit import Variances
    from lowra.methods.subspace_intersection.half.sites import Sites

# Rows and columns of which entries are looked at to tell how much the updates share, at least.
LOOKED_AT = 256

# Smallest eigenvalue that correlations are taken to have: along what all updates share nothing tells them from W, and
# steps would go far for nothing.
LEAST = 1e-3


@dataclass(frozen=True)
class Side:
    """The inverse of the model's block of all left factors, or of all right ones: D^-1/2 K^-1 D^-1/2 in each line.

    roots: (lines, sum of r_i), the D^-1/2 of each row or column: what it says of each direction, alone and by its own
    precision. inverse: K^-1 (sum of r_i, sum of r_i), K the correlations of the directions in a line, which are the
    same in all lines where precisions are.
    """

    roots: Tensor
    inverse: Tensor
    ranks: Sequence[int]

    @classmethod
    def of(cls, line: Tensor, shared: Tensor, known: Sequence[Tensor], sizes: Sequence[Tensor]) -> Side:
        """From the effective precisions of an entry by line, (n, lines), and between models, `shared` (n, n).

        known: the factors of the other side, (entries of a line, r_i). sizes: S_i of each.
        """
        ranks = [part.shape[1] for part in known]
        lines = line.shape[1]
        ridge = [lines / s for s in sizes]
        diagonal = [theta[:, None] * s + r for theta, s, r in zip(line, sizes, ridge, strict=True)]
        joined = torch.cat(list(known), 1).double()
        model = torch.arange(len(ranks), device=line.device).repeat_interleave(torch.tensor(ranks, device=line.device))
        gram = (joined.mT @ joined).mul_(shared[model][:, model])
        gram.diagonal().add_(torch.cat(ridge))
        root = gram.diagonal().rsqrt()
        gram.mul_(root).mul_(root[:, None]).diagonal().add_(LEAST)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return cls(torch.cat(diagonal, 1).rsqrt_(), inverse.to(line), ranks)

    def solve(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The block's inverse times changes (lines, r_i)."""
        joined = torch.cat(list(parts), 1).mul_(self.roots)
        return tuple(part.contiguous() for part in (joined @ self.inverse).mul_(self.roots).split(self.ranks, 1))


def shared_precision(sites: Sites, variances: Variances) -> tuple[Tensor, Tensor]:
    """What an entry says of two updates at once, in the mean, in a row and in a column: (n, n) float64 each.

    P_i (1 - P_i / total) on the diagonal and - P_i P_j / total beside it: W follows both. Entries that say more of an
    unknown than it needs count less, as in `effective_variances`.
    """
    _, d, k = sites.precision.shape
    some = (slice(None, None, max(1, d // LOOKED_AT)), slice(None, None, max(1, k // LOOKED_AT)))
    precision = sites.precision[(slice(None), *some)].float()  # (n, rows, columns)
    total = precision.sum(0).add_(sites.weight[some])
    own = precision * (1 - precision / total)
    found = []
    for variance in (variances.by_row[:, some[0], None], variances.by_column[:, None, some[1]]):
        worth = (own * variance).add_(1).rsqrt_()
        pair = (precision * worth / total.sqrt()).flatten(1).double()
        alone = (precision * worth.square_()).flatten(1).double().mean(1)
        found.append(torch.diag(alone) - pair @ pair.mT / pair.shape[1])
    return found[0], found[1]

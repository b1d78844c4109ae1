"""Where the row spaces, and the column spaces, of the differences intersect: there lie those of each update."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.ranges import Core, dense_svd

# With many models each is compared with this many neighbours to either side, on a ring: four partners pin a space down
# as well as fourteen do, and the number of pairs grows with n, not n^2.
NEIGHBOURS = 2

# Share of the partners whose space must hold a direction of the intersection. All would do in exact arithmetic; a
# direction near the noise, or one that two models share, drops out of single pairs.
AGREEMENT = 0.7

# Eigenvalues of a sum of projectors are not known better than this.
RESOLUTION = 1e-14


@dataclass(frozen=True)
class Pairs:
    """Column and row spaces of C_i - C_j above the noise: left and right hold (a, rank_ij) and (b, rank_ij) bases."""

    n: int
    left: dict[tuple[int, int], Tensor]
    right: dict[tuple[int, int], Tensor]

    def rank(self, i: int, j: int) -> int:
        """Rank of the difference of models i and j, r_i + r_j when they share nothing."""
        return self.left[min(i, j), max(i, j)].shape[1]

    def partners(self, i: int) -> list[int]:
        """Models that i was compared with."""
        return [j for j in range(self.n) if (min(i, j), max(i, j)) in self.left]


def pair_spaces(core: Core) -> Pairs:
    """SVDs of the differences of the cores, all pairs of few models or those of neighbours on a ring."""
    n = core.matrices.shape[0]
    chosen = [
        (i, j) for i, j in combinations(range(n), 2) if min(j - i, n - (j - i)) <= NEIGHBOURS
    ]  # every pair up to n = 5
    first, second = (torch.tensor(side, device=core.matrices.device) for side in zip(*chosen, strict=True))
    left, values, right = dense_svd(core.matrices[first] - core.matrices[second])
    cutoffs = torch.hypot(core.cutoffs()[first], core.cutoffs()[second])
    ranks = (values > cutoffs[:, None]).sum(1).tolist()
    return Pairs(
        n,
        {pair: left[p, :, : ranks[p]] for p, pair in enumerate(chosen)},
        {pair: right[p, :, : ranks[p]] for p, pair in enumerate(chosen)},
    )


def ranks_from_pairs(pairs: Pairs) -> list[int]:
    """Rank of each update from rank_ij = r_i + r_j, the median over all triangles; halves are rounded up."""
    ranks = []
    for i in range(pairs.n):
        estimates = [
            (pairs.rank(i, j) + pairs.rank(i, k) - pairs.rank(j, k)) / 2
            for j, k in combinations(pairs.partners(i), 2)
            if k in pairs.partners(j)
        ]
        ranks.append(max(0, int(statistics.median(estimates) + 0.5)))
    return ranks


def intersect(spaces: dict[tuple[int, int], Tensor], i: int, partners: list[int]) -> tuple[Tensor, Tensor]:
    """Directions of model i by how many of its partners' spaces hold them.

    For a direction v in row(M_i), v lies in row(M_i - M_j) = row(M_i) + row(M_j) for every j; other directions lie in
    few of them. So the sum of the projectors on these spaces has the eigenvalue len(partners) on row(M_i). Worked out
    inside the largest of the spaces, where the eigenproblem is small.

    Returns directions (m, p) and their shares (p,) of the partners, descending, 1 for all.
    """
    bases = sorted((spaces[min(i, j), max(i, j)] for j in partners), key=lambda basis: -basis.shape[1])
    frame = bases[0]  # (m, p)
    overlaps = [basis.mT @ frame for basis in bases[1:]]
    counts, mixes = torch.linalg.eigh(sum(overlap.mT @ overlap for overlap in overlaps))
    return frame @ mixes.flip(1), (1 + counts.flip(0)) / len(bases)


def rank_at_gap(shares: Tensor) -> int:
    """Number of directions before the largest gap of log(1 - share), among shares above `AGREEMENT`."""
    candidates = int((shares > AGREEMENT).sum())
    if candidates == 0:
        return 0
    missing = torch.log((1 - shares).clamp(min=RESOLUTION))
    # A direction in no other space ends the list, so that all candidates may belong.
    missing = torch.cat([missing, missing.new_zeros(1)])
    return 1 + int((missing[1 : candidates + 1] - missing[:candidates]).argmax())

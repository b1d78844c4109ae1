"""From known row and column spaces to W: linear least squares, then the maximum-likelihood polish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.intersection import (
    intersect,
    pair_spaces,
    rank_at_gap,
    ranks_from_pairs,
)
from lowra.methods.subspace_intersection.ranges import Core, dense_svd

# Weight of the mean in the least squares, relative to one model: enough to decide what no model determines, too
# little to touch the rest (its influence is below the rounding of float64 merges wherever lambda_min > 1e-8).
PROXIMAL = 1e-10

# Below this smallest eigenvalue of A the data do not determine W: rounding may make up such a value, and the
# prediction of the error, which is of first order, no longer holds.
IDENTIFIABLE = 1e-6

# Where columns need not be refined (see `columns_matter`): share of the layer, and smallest eigenvalue of A's column
# side, over n. On planted layers with such spaces the refinement gained 0.003 of W-Error.
SLIVER = 0.1
WELL_APART = 1 / 6

# Singular values of the updates end in a clear edge, not in the noise, when the last one is this far above the cutoff.
CLEAR_EDGE = 30.0

# Gauss-Newton steps. The linear solution starts within rounding of the optimum, and the first step does nearly all.
POLISH_STEPS = 2

# Two directions are taken for the same when their cosine is this close to 1.
SAME = 1e-5

# Gauss-Newton steps at given ranks, from solutions that are farther off.
FIT_STEPS = 4

# Share of the objective below which what a Gauss-Newton step gained calls for no other. After a gain of three percent
# the next was 5e-12; only where weak directions are nearly shared was the first gain, and the second, larger.
SETTLED = 0.05


@dataclass(frozen=True)
class Tangents:
    """Column and row spaces of the n updates, padded with zero columns to a common rank.

    The first-order conditions of the maximum-likelihood fit live here: a change Z of X leaves the residual of model i
    at P_Ui Z P_Vi with P_U = I - U U^T, P_V = I - V V^T, hence the identifiability operator
    A(Z) = sum_i w_i P_Ui Z P_Vi, whose smallest eigenvalue says whether the data determine X.

    left: (n, a, r), right: (n, b, r), ranks: per model, weights w: (n, 1, 1), of mean 1.
    """

    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]
    weights: Tensor

    def residuals(self, x: Tensor) -> Tensor:
        """P_Ui X_i P_Vi for X (n, a, b)."""
        x = x - self.left @ (self.left.mT @ x)
        return x - (x @ self.right) @ self.right.mT

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (a,) and eigenvectors (a, a) of sum_i w_i P_Ui."""
        values, vectors = torch.linalg.eigh(complement_sum(self.left, self.weights))
        return values, vectors

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (b,) and eigenvectors (b, b) of sum_i w_i P_Vi."""
        values, vectors = torch.linalg.eigh(complement_sum(self.right, self.weights))
        return values, vectors

    def operator(self) -> Callable[[Tensor], Tensor]:
        """Z (p, a, b) -> A(Z), both in the eigenvectors of `columns` and `rows`.

        There Z sum_i w_i P_Vi is a scaling, and what is left, sum_i w_i U_i U_i^T Z P_Vi, costs the same for any n (the
        spaces together fill the core once).
        """
        n, a, r = self.left.shape
        rows = self.rows[0]  # (b,)
        right = self.rows[1].mT @ self.right  # (n, b, r)
        left = self.columns[1].mT @ self.left  # (n, a, r)
        down = left.mT.reshape(n * r, a)
        up = (self.weights * left).permute(1, 0, 2).reshape(a, n * r)

        def apply(z: Tensor) -> Tensor:
            part = (down @ z).unflatten(-2, (n, r))  # (p, n, r, b)
            part = part - (part @ right) @ right.mT
            return z * rows - up @ part.flatten(-3, -2)

        return apply

    def scale(self) -> Tensor:
        """(sum w_i P_Ui) x (sum w_i P_Vi) / n in their eigenvectors, a factor for each entry of Z (a, b).

        It is A itself were one of the sides the same in all models, and carries the small eigenvalues of directions
        that are nearly shared on one side.
        """
        n = len(self.ranks)
        columns, rows = self.columns[0].clamp(min=n * PROXIMAL), self.rows[0].clamp(min=n * PROXIMAL)
        return columns[:, None] * rows / n + n * PROXIMAL

    def shared(self) -> tuple[int, int]:
        """Dimensions of the column space and of the row space that all updates have in common."""
        level = self.left.shape[0] * IDENTIFIABLE
        return int((self.columns[0] < level).sum()), int((self.rows[0] < level).sum())


@dataclass(frozen=True)
class Solution:
    """An estimate X (a, b) in the core, with the ranks and spaces its residuals C_i - X have above the noise.

    heights: (n, p) singular values of the residuals over each model's cutoff, descending; those above 1 are signal.
    tails: (n,) largest singular value of each residual beyond its rank. energy: weighted sum of squares beyond the
    ranks, the maximum-likelihood objective.
    """

    x: Tensor
    tangents: Tangents
    heights: Tensor
    tails: Tensor
    energy: float

    @property
    def edges(self) -> Tensor:
        """(n,): smallest singular value within each rank, over the cutoff it passed; infinite where the rank is 0."""
        above = torch.where(self.heights > 1, self.heights, math.inf)
        return above.amin(1) if above.numel() else above.new_full((above.shape[0],), math.inf)

    def exceeds(self, hint: int) -> bool:
        """Whether an update has clearly a larger rank than the one granted, not for what the noise may add."""
        return bool(((self.heights > CLEAR_EDGE).sum(1) > hint).any())

    def falls_short(self, hint: int) -> bool:
        """Whether all updates have a lower rank than the one granted, and one of them not for what noise may hide."""
        return max(self.tangents.ranks) < hint and bool(((self.edges > CLEAR_EDGE) & self.edges.isfinite()).any())

    @property
    def size(self) -> tuple[int, int, float]:
        """What a simpler explanation has less of: the sum of the ranks, directions of its own, then what is left over.

        Where updates share directions, weights that are far apart explain the merges by equal ranks, and what they
        leave over differs by rounding alone: the explanation that shares most is the one named.
        """
        return sum(self.tangents.ranks), -sum(self.tangents.shared()), self.energy


def complement_sum(bases: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i (I - U_i U_i^T) for bases (n, m, r), weights (n, 1, 1) of mean 1: (m, m)."""
    n, m, _ = bases.shape
    return n * torch.eye(m, dtype=bases.dtype, device=bases.device) - (weights * (bases @ bases.mT)).sum(0)


def padded(bases: list[Tensor]) -> Tensor:
    """Stack bases (m, r_i) as (n, m, max r_i), short ones filled with zero columns, which project on nothing."""
    width = max(basis.shape[1] for basis in bases)
    return torch.stack([torch.nn.functional.pad(basis, (0, width - basis.shape[1])) for basis in bases])


def least_squares(core: Core, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The X that makes the updates C_i - X vanish outside their column spaces, their row spaces, or both.

    minimise sum_i w_i (|P_Ui (C_i - X)|^2 + |(C_i - X) P_Vi|^2), one of the terms where a side is None. The normal
    equations S_U X + X S_V = sum_i w_i (P_Ui C_i + C_i P_Vi) are a Sylvester equation with symmetric
    S_U = sum_i w_i P_Ui and S_V alike, solved by two small eigen-decompositions. Written for X - mean C_i, so that what
    the data leave open stays at the mean.

    left: (n, a, r), right: (n, b, r). Returns X (a, b).
    """
    n, a, b = core.matrices.shape
    mean = core.mean(core.matrices)
    around = core.matrices - mean
    target = torch.zeros_like(mean)
    row_values, row_vectors = target.new_zeros(a), torch.eye(a, dtype=target.dtype, device=target.device)
    column_values, column_vectors = target.new_zeros(b), torch.eye(b, dtype=target.dtype, device=target.device)
    if left is not None:
        target = target + n * core.mean(around - left @ (left.mT @ around))
        row_values, row_vectors = torch.linalg.eigh(complement_sum(left, core.weights))
    if right is not None:
        target = target + n * core.mean(around - (around @ right) @ right.mT)
        column_values, column_vectors = torch.linalg.eigh(complement_sum(right, core.weights))
    scale = row_values[:, None].clamp(min=0) + column_values.clamp(min=0) + n * PROXIMAL  # (a, b)
    return mean + row_vectors @ (row_vectors.mT @ target @ column_vectors / scale) @ column_vectors.mT


def resolve(core: Core, x: Tensor) -> Solution:
    """Ranks and spaces of the updates C_i - X above the noise.

    An X that is wrong by some Z shows here: no model's update explains Z, so Z joins the spaces of all of them, where
    the identifiability operator is blind to it. A wrong X can thus have a large rank, but no certificate.
    """
    left, values, right = dense_svd(core.matrices - x)
    signal = values > core.cutoffs()[:, None]  # (n, p)
    ranks = tuple(signal.sum(1).tolist())
    bases_left = padded([basis[:, :rank] for basis, rank in zip(left, ranks, strict=True)])
    bases_right = padded([basis[:, :rank] for basis, rank in zip(right, ranks, strict=True)])
    rest = torch.where(signal, 0, values)
    energy = float((core.weights[:, 0] * rest.square()).sum())
    tangents = Tangents(bases_left, bases_right, ranks, core.weights)
    return Solution(x, tangents, values / core.cutoffs()[:, None], rest.amax(1), energy)


@dataclass(frozen=True)
class Proposal:
    """Ranks that the updates may have, left and right: the directions (m, r_i) of each, best known."""

    ranks: tuple[list[int], list[int]]
    left: Tensor
    right: Tensor

    def solutions(self, core: Core) -> Iterator[Solution]:
        """Solutions from both sides, and from one.

        Both is the rule. Where models share directions on one side, the intersections on the other side come out too
        small and their equations are wrong; that side alone, or the other, then wins the comparison.
        """
        for chosen in ((self.left, self.right), (self.left, None), (None, self.right)):
            yield resolve(core, least_squares(core, *chosen))

    def kept(self, solution: Solution) -> bool:
        """Whether a solution has the ranks proposed."""
        return list(solution.tangents.ranks) == self.ranks[0] == self.ranks[1]


def proposals(core: Core, hint: int | None) -> list[Proposal]:
    """Ranks counted in the pairs; at the largest gap of each intersection; the hint."""
    pairs = pair_spaces(core)
    sides = [[intersect(spaces, i, pairs.partners(i)) for i in range(pairs.n)] for spaces in (pairs.left, pairs.right)]
    gaps = [[rank_at_gap(shares) for _, shares in side] for side in sides]
    counted = ranks_from_pairs(pairs)
    made = []
    for ranks in [(counted, counted), (gaps[0], gaps[1]), *([([hint] * pairs.n,) * 2] if hint else [])]:
        left, right = (
            padded([directions[:, :rank] for (directions, _), rank in zip(side, side_ranks, strict=True)])
            for side, side_ranks in zip(sides, ranks, strict=True)
        )
        made.append(Proposal(ranks, left, right))
    return made


def solve(core: Core, hint: int | None, *, rough: bool = False) -> Solution:
    """The simplest X that explains all models: smallest sum of ranks, then smallest residual.

    The first solution that keeps the ranks it was proposed for is taken without trying others. W'_i itself always
    explains all models, its own update being nothing. Before an explanation of more ranks than were counted is
    believed, the counted ones are fitted; rough: it is only where others start, and they are not.
    """
    best: Solution | None = None
    proposed = proposals(core, hint)
    for proposal in proposed:
        for solution in proposal.solutions(core):
            if proposal.kept(solution):
                return solution
            if best is None or solution.size < best.size:
                best = solution
    assert best is not None
    counted = proposed[0].ranks[0]
    if not rough and sum(best.tangents.ranks) > sum(counted):
        best = min(best, *(fitted(core, start.x, counted) for start in proposed[0].solutions(core)), key=by_size)
    return best


def by_size(solution: Solution) -> tuple[int, int, float]:
    """See `Solution.size`."""
    return solution.size


def fitted(core: Core, x: Tensor, ranks: list[int]) -> Solution:
    """A solution from X with ranks held to these: Gauss-Newton on the residuals beyond them, whatever the noise."""
    for _ in range(FIT_STEPS):
        left, _, right = dense_svd(core.matrices - x)
        columns, rows = (
            padded([basis[:, :rank] for basis, rank in zip(side, ranks, strict=True)]) for side in (left, right)
        )
        tangents = Tangents(columns, rows, tuple(ranks), core.weights)
        target = (core.weights * tangents.residuals(core.matrices - x)).sum(0)
        x = x + conjugate_gradients(tangents, target.unsqueeze(0), tolerance=1e-6, iterations=60)[0]
    return resolve(core, x)


def solve_as_told(core: Core, solution: Solution, hint: int) -> Solution | None:
    """From an X with updates of larger ranks than granted to one that agrees, None if that is not to be found.

    If W + C was found for W, M_i - C has the directions of C too where M_i had none of them: C lies in the columns U
    and the rows V that all updates of too large a rank share. With D one of these updates and C = -U K V^T,
    rank(D - U K V^T) = rank(D) - rank(K) if and only if K = (V^T D^+ U)^-1. One such update leaves U and V open.
    """
    excess = [rank - hint for rank in solution.tangents.ranks]
    larger = [i for i, size in enumerate(excess) if size > 0]
    size = max(excess)
    if len(larger) < 2 or any(excess[i] != size for i in larger):
        return None
    tangents = solution.tangents
    sides = []
    for bases in (tangents.left[larger], tangents.right[larger]):
        shares, directions = torch.linalg.eigh((bases @ bases.mT).mean(0))
        if not bool((shares[-size:] > 1 - SAME).all()):
            return None
        sides.append(directions[:, -size:])
    left, right = sides  # (a, e), (b, e)
    update = core.matrices[larger[0]] - solution.x
    columns, values, rows = (part[..., : tangents.ranks[larger[0]]] for part in dense_svd(update))
    inner = right.mT @ (rows / values) @ (columns.mT @ left)  # V^T D^+ U
    if bool(torch.linalg.matrix_rank(inner) < size):
        return None
    return resolve(core, solution.x + left @ torch.linalg.solve(inner, right.mT))


def without_shared(core: Core, tangents: Tangents) -> Core:
    """The core without the directions that all updates share in their column or row spaces.

    u^T W is open for a shared column direction u: M_i - u a^T has the same rank for any a. Orthogonal to u the problem
    is one of lower rank, and may well be determined.
    """
    n = len(core.noise)
    left, right = (vectors[:, values >= n * IDENTIFIABLE] for values, vectors in (tangents.columns, tangents.rows))
    return replace(
        core,
        left=core.left @ left,
        right=core.right @ right,
        matrices=left.mT @ core.matrices @ right,
        below=tuple(part @ right.to(part.dtype) for part in core.below),
    )


def two_models(first: Tensor, second: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """A guess at left^T (W - mean W') right, (p, p), from two models, which do not determine it.

    Both W'_i - M_i agree outside of the p x p block of their difference's spaces, and in it W'_1 - M_1 = W'_2 - M_2
    has a p^2 / 2-dimensional family of solutions. Where the updates tower over the weights, W is small beside them and
    M_i is the best rank p / 2 approximation of the block; elsewhere the mean is as good a guess as any. The rule
    between the two is a heuristic: the block of W has a norm of about 2 rms(W) sqrt(p).
    """
    rank = values.numel() // 2
    blocks = torch.stack([left.mT @ w.double() @ right for w in (first, second)])  # (2, p, p)
    size = float(first.double().square().mean().sqrt())
    if rank == 0 or float(values.median()) < 2 * size * (8 * rank) ** 0.5:
        return torch.zeros_like(blocks[0])
    u, s, v = dense_svd(blocks)
    updates = (u[..., :rank] * s[:, None, :rank]) @ v[..., :rank].mT
    return -updates.mean(0)


def polish(core: Core, solution: Solution) -> Solution:
    """Gauss-Newton on the maximum-likelihood objective sum_i sum_{l > r_i} w_i sigma_l(C_i - X)^2.

    One step solves A(Z) + mu Z = sum_i w_i P_Ui (C_i - X) P_Vi; the small mu keeps what A does not see where it is. A
    step that raises the objective or the ranks is not taken.
    """
    for _ in range(POLISH_STEPS):
        tangents = solution.tangents
        target = (core.weights * tangents.residuals(core.matrices - solution.x)).sum(0)
        step = conjugate_gradients(tangents, target.unsqueeze(0), tolerance=1e-6, iterations=60)[0]
        better = resolve(core, solution.x + step)
        if better.size >= solution.size:
            break
        gain = solution.energy - better.energy
        solution = better
        if gain < SETTLED * solution.energy:
            break
    return solution


def conjugate_gradients(tangents: Tangents, target: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Solve A(Z) + mu Z = target for each of (p, a, b), to a relative residual.

    Preconditioned by `Tangents.scale`.
    """
    n = len(tangents.ranks)
    apply, scale = tangents.operator(), tangents.scale()
    columns, rows = tangents.columns[1], tangents.rows[1]

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((-2, -1), keepdim=True)

    z = torch.zeros_like(target)
    r = columns.mT @ target @ rows
    p = s = r / scale
    rs = dot(r, s)
    limit = tolerance**2 * dot(r, r)
    for _ in range(iterations):
        if bool((dot(r, r) <= limit).all()):
            break
        image = apply(p) + n * PROXIMAL * p
        alpha = rs / dot(p, image).clamp(min=torch.finfo(p.dtype).tiny)
        z = z + alpha * p
        r = r - alpha * image
        s = r / scale
        previous, rs = rs, dot(r, s)
        p = s + rs / previous.clamp(min=torch.finfo(p.dtype).tiny) * p
    return columns @ z @ rows.mT


def columns_matter(core: Core, tangents: Tangents) -> bool:
    """Whether the columns outside of right are worth another pass over the data (see `lift`).

    Independent updates leave the mean there with at most an eighth more variance than least squares, and that in a
    share a / d of the layer. It is more where column spaces are nearly shared or models of unlike rounding.
    """
    n = len(core.noise)
    d, a = core.left.shape
    levels = [noise.std for noise in core.noise]
    apart = float(tangents.columns[0].min()) > WELL_APART * n
    return a > SLIVER * d or max(levels) > 2 * min(levels) or not apart


def lift(core: Core, solution: Solution, beside: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """What W adds to the weighted mean of the merged weights, as factors (d, q) and (k, q) with q = a + b, or b.

    Inside both joint subspaces that is X less the mean of the C_i. With the spaces U_i, V_i known, the blocks inside
    only one of them are least squares too: a row outside of all column spaces, z_i = W'_i's row in the coordinates of
    right, obeys (z_i - z) P_Vi = noise, so z = sum_i w_i z_i P_Vi (sum_i w_i P_Vi)^-1 rather than the mean. Outside of
    both the mean is the best estimate.

    beside: (k, a) each for i >= 1, from `outside_columns`; without them the mean stays there too.
    """
    n = len(core.noise)
    tangents = solution.tangents
    # In the dtype of the passes: what is outside is noise, and needs few digits.
    dtype = core.below[0].dtype
    left, right = core.left.to(dtype), core.right.to(dtype)

    def refined(total: Tensor, outside: Sequence[Tensor], bases: Tensor, spectrum: tuple[Tensor, Tensor]) -> Tensor:
        """Add z less the mean of the z_i to a total (rows, m); outside: z_i (rows, m) each, bases: (n, m, r)."""
        values, vectors = spectrum
        inverse = torch.where(values > n * PROXIMAL**0.5, 1 / values, 1 / n)  # the mean, where nothing is known
        for weight, rows, basis in zip(core.weights[1:], outside, bases[1:], strict=True):
            share = weight * ((vectors - basis @ (basis.mT @ vectors)) * inverse @ vectors.mT)  # (m, m)
            share.diagonal().sub_(weight[0] / n)
            total = total.addmm_(rows, share.to(dtype))
        return total

    inner = left @ (solution.x - core.mean(core.matrices)).to(dtype)  # (d, b)
    below = refined(inner, core.below, tangents.right, tangents.rows)
    if beside is None:
        return below, right
    across = refined(torch.zeros_like(beside[0]), beside, tangents.left, tangents.columns)
    return torch.cat([below, left], 1), torch.cat([right, across], 1)

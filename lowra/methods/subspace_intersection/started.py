"""Updates that were not started at zero: PiSSA, OLoRA, and adapters that others go on from.

PiSSA (Meng et al. 2024) takes the leading part B_0 A_0 of W out of it, and trains B A from there: its siblings are
W - B_0 A_0 + B_i A_i, and the weight that explains them by the lowest ranks is W - B_0 A_0. It has a mark. A weight
that its own leading part was taken out of is singular, in as many directions as the updates have, and they are theirs.
Then only a matrix of r x r numbers between known columns and rows is open, and the mean of the updates is a fair guess
at it. OLoRA (Buyukakyuz 2024) takes the first columns of Q R = W out, and leaves half of the mark.

Updates that are much alike were trained from a common start, too. Without the mark the merges do not say whether it was
a part of W.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer, Estimate
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.problem import Problem

# Seen from some direction of the updates' columns, the weight is smaller than from others by this factor, before it is
# looked at whole. (Half for PiSSA siblings whose changes are as large as their start.)
SMALL = 0.7

# Smaller layers than this, by their shorter side, are looked at for that without any such sign, too: for singular
# values that the rounding of float32 leaves of none.
LOOKED_AT = 256
ZERO = 1e-4

# A singular value this many times smaller than the one before it is none; half as many as an update has are a mark.
# (Rounding W - B_0 A_0 to bfloat16 leaves a hundredth.)
GAP = 0.02

# Cosine between a weakest direction of W and one of the updates that is no chance, and so many times that of chance.
MET = 0.7
BY_CHANCE = 2.5

# Share of the part taken out that its rows keep, projected, where they belong there.
BOTH = 0.5

# Cosine between updates above which they are said to have had a common start. Fine-tunes by LoRA of one base on like
# data have .3 and less.
ALIKE = 0.8


def started(problem: Problem, answer: Answer, updates: Tensor) -> Answer:
    """The answer, no more certified where the updates had a start; with the part taken out put back where that shows.

    updates: (n, a, b), in coordinates in which their inner products are what they are.
    """
    missing = taken_out(answer)
    if missing is not None:
        left, right = missing
        estimate = replace(
            answer.estimate,
            left=torch.cat([answer.estimate.left, left.to(answer.estimate.left.dtype)], 1),
            right=torch.cat([answer.estimate.right, right.to(answer.estimate.right.dtype)], 1),
        )
        certificate = Certificate.UNCERTIFIED
        sentence = (
            "Not certified: the weight that explains the merges by the lowest ranks is singular in directions of the "
            "updates, as W less its own leading part is (PiSSA, OLoRA). The mean of the updates, as far as it has room "
            f"there, is put for what was taken out. Of the rest: {answer.status}"
        )
        return replace(answer, estimate=estimate, certificate=certificate, status=sentence, predicted=None)
    why = ""
    if alike(updates) > ALIKE:
        why = (
            "the updates are much alike, so that they had a common start, and the merges do not say whether it was "
            "taken out of W before"
        )
    elif min(answer.estimate.models.shape[1:]) <= LOOKED_AT and singular(answer.estimate.dense(torch.float64)):
        why = (
            "the weight found is singular, and the merges do not say whether it always was or a part of it was taken "
            "out before (PiSSA, OLoRA)"
        )
    if why:
        certificate = Certificate.SHARED
        sentence = certificate.sentence(why=why, predicted=problem.in_units(answer.predicted))
        return replace(answer, certificate=certificate, status=sentence)
    return answer


def singular(weight: Tensor) -> bool:
    """Whether a weight (d, k) has fewer directions than rows and columns that are not zero, but for rounding."""
    rows, columns = weight.norm(dim=1), weight.norm(dim=0)
    weight = weight[rows > ZERO * rows.max()][:, columns > ZERO * columns.max()]
    if not weight.numel():
        return False
    values = torch.linalg.svdvals(weight)
    return bool((values[1:] < ZERO * values[:-1]).any())


def alike(updates: Tensor) -> float:
    """Mean cosine between two of the updates (n, a, b)."""
    flat = updates.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    n = flat.shape[0]
    return float((flat.sum(0).square().sum() - n) / (n * (n - 1)))


def taken_out(answer: Answer) -> tuple[Tensor, Tensor] | None:
    """The part of W that seems to have been taken out of it, as factors (d, q) and (k, q); None where nothing does."""
    estimate = answer.estimate
    # The mean of the updates is the mean of the models less the estimate.
    columns, triangle = torch.linalg.qr(-estimate.left.double())
    rows, other = torch.linalg.qr(estimate.right.double())
    left, _, right = torch.linalg.svd(triangle @ other.mT)
    rank = max(answer.ranks, default=0)
    if not rank:
        return None
    left, right = columns @ left[:, :rank], rows @ right.mT[:, :rank]
    if min(seen_from(estimate, left), seen_from(estimate.mT, right)) > SMALL:
        return None
    dense = estimate.dense(torch.float64)
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    lowest = min(2 * rank, values.numel() - 1)
    ratios = values[-lowest:] / values[-lowest - 1 : -1].clamp_min(torch.finfo(values.dtype).tiny)
    gaps = (ratios < GAP).nonzero().flatten().tolist()
    at = gaps[0] if gaps else lowest  # the first singular value that is none
    if 2 * (lowest - at) < rank:
        # Where noise or rounding hides the zeros, the weakest directions of W are those of the updates all the same.
        wide = dense.shape[0] <= dense.shape[1]
        weakest, own = (u[:, -rank:], left) if wide else (vt[-rank:].mT, right)
        turned, overlaps, _ = torch.linalg.svd(weakest.mT @ own)
        weak = weakest @ turned[:, overlaps > max(MET, BY_CHANCE * math.sqrt(rank / min(dense.shape)))]
        if not weak.shape[1]:
            return None
        columns, rows = -estimate.left.double(), estimate.right.double()
        return (weak @ (weak.mT @ columns), rows) if wide else (columns, weak @ (weak.mT @ rows))
    kept = values.numel() - (lowest - at)  # singular values that are none are left out
    # What was taken out has its columns where W has none left, so that a projection takes much of the changes out of
    # the mean update. PiSSA's has its rows there, too.
    spread = -(estimate.left.double() - u[:, :kept] @ (u[:, :kept].mT @ estimate.left.double()))
    inner = estimate.right.double()
    both = inner - vt[:kept].mT @ (vt[:kept] @ inner)
    if float((spread @ both.mT).norm()) > BOTH * float((spread @ inner.mT).norm()):
        inner = both
    return spread, inner


def seen_from(estimate: Estimate, left: Tensor) -> float:
    """The smallest |u^T W| of unit vectors u in a space (d, r), over what it usually is in a space of that size."""
    d, k = estimate.models.shape[1:]
    total, size = torch.zeros(left.shape[1], k, dtype=torch.float64, device=left.device), 0.0
    for part in torch.arange(d, device=left.device).split(max(1, 2**19 // k)):
        weight = estimate.rows(part)
        total += left[part].mT @ weight
        size += float(weight.square().sum())
    rank = left.shape[1]
    usual = math.sqrt(size / (d * k)) * (math.sqrt(k) - math.sqrt(min(rank, k / 2)))
    return float(torch.linalg.svdvals(total)[-1]) / max(usual, torch.finfo(torch.float64).tiny)

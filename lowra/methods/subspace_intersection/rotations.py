"""Releases whose heads were rotated, W'_i = diag(R_i1, .., R_ih) (W + M_i) with orthogonal blocks.

Queries may be rotated with their keys and values with what reads them, head by head, and the model's function stays; a
publisher who does so by release hides the base from whoever compares releases. But the rotations between two releases
are found as the scales of `scales` are: block b of W'_i - R W'_0 lies in the joint row space of two updates for the
right R alone. With V the leading right singular vectors of the difference, R = polar(Y (I - V V^T) X^T) on each block
(Procrustes; Schonemann 1966), and the rank is grown. What is left open is the frame of the first release, and in that
frame the base weight of the queries belongs to the keys of that release. (Updates as large as the weights hide the
rotations of small layers: of 96 x 128, in heads of 24 rows.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.noise import Noise, joined
from lowra.methods.subspace_intersection.problem import Problem
from lowra.methods.subspace_intersection.ranges import OVERSAMPLING
from lowra.methods.subspace_intersection.scales import AT_MOST, EXPLAINED, FALLS, ROUNDS

# A step that moves no entry of a rotation by more than this share of the noise of a row is the last.
SETTLED = 0.1


def unrotated(problem: Problem, heads: int, solve: Callable[[Problem], Answer]) -> Answer | None:
    """The answer in the first model's frame, where all others are rotated against it by head; None where one is not.

    solve: the closed form for plain merges.
    """
    if problem.merged.shape[1] % heads:
        return None
    first = problem.merged[0]
    models = [first.double()]
    for model, noise in zip(problem.merged[1:], problem.noise[1:], strict=True):
        rotation = head_rotations(model, first, heads, joined(problem.noise[0], noise), problem.generator)
        if rotation is None:
            return None
        models.append((rotation.mT @ model.double().view(heads, -1, model.shape[1])).view(model.shape))
    answer = solve(replace(problem, merged=torch.stack(models)))
    status = (
        "The models differ by a rotation of each head's rows; the answer is in the frame of the first of them, whose "
        f"own rotation nothing tells. In that frame: {answer.status}"
    )
    certificate = answer.certificate
    if certificate in (Certificate.CERTIFIED, Certificate.WEAK):
        certificate = Certificate.UP_TO_ROTATION
    return replace(answer, certificate=certificate, status=status, predicted=None, scaled="heads", settled=0.0)


def head_rotations(
    first: Tensor, second: Tensor, heads: int, noise: Noise, generator: torch.Generator
) -> Tensor | None:
    """Orthogonal R (heads, d / heads, d / heads) float64 that makes first - R second of low rank; None where none does.

    first, second: (d, k). noise: of the difference. Ranks are doubled from 1 until what is left over is noise, and then
    narrowed down to the smallest that explains as much, as for `scales.row_ratio`.
    """
    d, k = first.shape
    y, x = first.double().view(heads, -1, k), second.double().view(heads, -1, k)
    limit = EXPLAINED * noise.std
    rotation, rank, explained = polar(y @ x.mT), 1, False
    while True:
        columns = torch.randn(k, rank + OVERSAMPLING, generator=generator, dtype=torch.float64).to(x.device)
        rotation, explained = alternated(y, x, rotation, rank, columns, limit)
        if explained:
            break
        rank *= 2
        if 2 * rank > min(d, k - d // heads):
            return None
    below = rank // 2
    while rank - below > 1:
        tried = (below + rank) // 2
        columns = torch.randn(k, tried + OVERSAMPLING, generator=generator, dtype=torch.float64).to(x.device)
        smaller, explained = alternated(y, x, rotation, tried, columns, limit)
        if explained:
            rotation, rank = smaller, tried
        else:
            below = tried
    columns = torch.randn(k, rank + OVERSAMPLING, generator=generator, dtype=torch.float64).to(x.device)
    return alternated(y, x, rotation, rank, columns, 0.0, SETTLED * noise.std / float(x.square().mean().sqrt()))[0]


def alternated(
    y: Tensor, x: Tensor, rotation: Tensor, rank: int, columns: Tensor, limit: float, within: float = 0.0
) -> tuple[Tensor, bool]:
    """Rotations and the leading right vectors of y - R x (heads, h, k) in turns, and whether that leaves only noise.

    columns: (k, c), a sketch to begin with. Ends when what is left over is below the limit or falls no more, or, where
    `within` is given, when a step changes the rotations by less.
    """
    k = x.shape[2]
    d = x.shape[0] * x.shape[1]
    left = math.inf
    for step in range(AT_MOST):
        rest = (y - rotation @ x).reshape(d, k)
        image, _ = torch.linalg.qr(rest @ columns)
        columns, _, _ = torch.linalg.svd(rest.mT @ image, full_matrices=False)
        basis = columns[:, :rank]
        before = rotation
        rotation = polar((y - (y @ basis) @ basis.mT) @ x.mT)
        if within and float((rotation - before).abs().max()) < within:
            break
        rest = (y - rotation @ x).reshape(d, k)
        rest = rest - (rest @ basis) @ basis.mT
        last, left = left, math.sqrt(float(rest.square().mean()) / ((1 - rank / d) * (1 - rank / k)))
        if left < limit:
            return rotation, True
        if not within and step + 1 >= ROUNDS and left > FALLS * last:
            break
    return rotation, False


def polar(matrices: Tensor) -> Tensor:
    """The orthogonal matrices (b, h, h) nearest to some."""
    left, _, right = torch.linalg.svd(matrices)
    return left @ right

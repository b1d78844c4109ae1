"""Merges with noise beyond the rounding of their format: added on purpose, by int8 or float8, by a little full tuning.

Their differences are of full rank, but the updates stand out of the bulk of singular values. The level of the noise is
read off that bulk, and the closed form is asked again with it. What the noise is, the merges do not say: where it is
the same in several releases, or no noise at all but what full fine-tuning did, the estimate keeps it. So it is never
certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.answer import Answer
from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.noise import ARITHMETIC, joined
from lowra.methods.subspace_intersection.problem import Problem
from lowra.methods.subspace_intersection.ranges import MARGINS, RowSpace

# Side of the block of a difference whose singular values tell the noise.
BLOCK = 512

# Differences that are larger than this share of the weights, noise and all, are those of models of other bases.
RELATED = 0.5

# Quantiles of the bulk that have to be those of noise, to this share.
QUANTILES = (0.2, 0.8)
LIKE_NOISE = 0.2

# At least so many times the rounding of the format: less is what the format's own estimate allows for.
BEYOND = 1.5


# From so many times the rounding of the format on, it is noise of float32 sums that fills a difference.
SEEN = 1.05


def with_arithmetic_noise(problem: Problem, part: RowSpace) -> Problem | None:
    """The problem with the noise of float32 sums, where that is what fills a difference; None elsewhere.

    part: of a model less model 0, which has no low rank above the rounding of the format. What is left of it tells
    whether it is worth looking at the bulk of singular values.
    """
    if problem.storage != torch.float32 or part.residual > 4 * ARITHMETIC * joined(*problem.noise[:2]).std:
        return None
    n = len(problem.labels)
    pairs = [(0, i) for i in range(1, n)] + ([(1, 2)] if n > 2 else [])
    found = [bulk_std(problem.merged[b], problem.merged[a]) for a, b in pairs]
    squares = [std**2 for std in found if std is not None]
    if len(squares) < len(found):
        return None
    own = (squares[0] + squares[1] - squares[-1]) / 2 if n > 2 else squares[0] / 2
    levels = [own, *(square - own for square in squares[: n - 1])]
    factors = [math.sqrt(max(1.0, level / noise.std**2)) for level, noise in zip(levels, problem.noise, strict=True)]
    if not SEEN <= max(factors) <= ARITHMETIC:
        return None
    return replace(problem, noise=tuple(noise.scaled(by) for noise, by in zip(problem.noise, factors, strict=True)))


def noisy(problem: Problem, solve: Callable[[Problem], Answer]) -> Answer | None:
    """The answer at the level of noise that the differences show; None where they show none, or no updates above it.

    solve: the closed form for plain merges.
    """
    first = problem.merged[0]
    stds = []
    for other in problem.merged[1:]:
        std = bulk_std(other, first)
        if std is None or std > RELATED * float(first.double().square().mean().sqrt()):
            return None
        stds.append(std / math.sqrt(2))
    level = max(stds)
    rounding = max(noise.std for noise in problem.noise)
    if level < BEYOND * rounding:
        return None
    noise = tuple(own.scaled(level / own.std) for own in problem.noise)
    answer = solve(replace(problem, noise=noise))
    if answer.certificate in (Certificate.NOT_IDENTIFIABLE, Certificate.LOW_SIGNAL) or answer.outliers:
        return None
    added = math.sqrt(max(0.0, level**2 - rounding**2))
    certificate = Certificate.UNCERTIFIED
    sentence = (
        f"Not certified: the merges differ by noise of {added * problem.unit:.1e} beyond the rounding of their format. "
        f"If it is independent from model to model: {answer.status}"
    )
    return replace(answer, certificate=certificate, status=certificate.sentence(sentence=sentence))


def bulk_std(first: Tensor, second: Tensor) -> float | None:
    """Standard deviation of the noise of a difference of two weights (d, k), from the singular values of a block.

    The median of the squared singular values of noise over its variance is that of the Marchenko-Pastur law (Gavish and
    Donoho 2014). What stands above its edge is signal and not counted. None where the rest is no noise: its quantiles
    are not those of the law, as of a spectrum that falls smoothly.
    """
    rows, columns = (min(BLOCK, size) for size in first.shape)
    values = torch.linalg.svdvals(first[:rows, :columns].double() - second[:rows, :columns].double())
    long, short = max(rows, columns), min(rows, columns)
    signal = 0
    for _ in range(short):
        bulk = values[signal:]
        law = marchenko_pastur((short - signal) / (long - signal), (*QUANTILES, 0.5)) * (long - signal)
        std = float(bulk.median() / law[-1].sqrt())
        above = int((values > MARGINS[0] * std * (math.sqrt(long) + math.sqrt(short))).sum())
        if above <= signal:
            break
        signal = above
        if 2 * signal > short:
            return None
    found = torch.quantile(bulk, torch.tensor(QUANTILES, dtype=bulk.dtype)) / std
    apart = (found / law[:-1].sqrt() - 1).abs().max()
    return std if float(apart) < LIKE_NOISE else None


def marchenko_pastur(ratio: float, shares: tuple[float, ...]) -> Tensor:
    """Quantiles of the eigenvalues of X^T X / m for X (m, n) of independent unit variance, ratio = n / m <= 1."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = middle - half cos(t) takes the singularities of the density at the edges out.
    t = (torch.arange(4096, dtype=torch.float64) + 0.5) * math.pi / 4096
    x = (low + high) / 2 - (high - low) / 2 * t.cos()
    mass = (t.sin() ** 2 / x).cumsum(0)
    return x[torch.searchsorted(mass, mass[-1] * torch.tensor(shares, dtype=mass.dtype)).clamp(max=4095)]

"""What is asked: the models of one layer, the size of their rounding, and how precise the passes over them must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.base import Observation
from lowra.methods.subspace_intersection.answer import Estimate
from lowra.methods.subspace_intersection.noise import Noise, joined, rounding_noise, sampled_rows, stored_as
from lowra.methods.subspace_intersection.ranges import OVERSAMPLING, Difference, RowSpace, row_space, row_space_within

# Layers of at least this many entries run their passes in float32 where the updates are small enough (see below).
LARGE = 2**19

# float32 passes err by 2^-24 of the update; with updates this much smaller than the weights that is lost in the
# rounding of the merge itself.
SMALL_UPDATE = 1 / 50

# Layers whose root mean square is 2 to a larger power than this, up or down, are worked on at a usual scale.
USUAL = 20


@dataclass(frozen=True)
class Problem:
    """The models of one layer that are worked on.

    merged: (n, d, k), noise: of each, storage: the format they are rounded to, dtype: of the passes over the data,
    guess: columns of the first sketches, hint: the rank where it was granted. labels: the models' numbers in the
    observation. unit: what 1 is in the observation's own scale (see `pose`). heads: see `SubspaceIntersection`. spans:
    for each model orthonormal directions (k, c) in which its rows less those of model 0 are known to lie, where they
    are; empty elsewhere. rough: the answer is only where another solver starts.
    """

    merged: Tensor
    noise: tuple[Noise, ...]
    labels: tuple[int, ...]
    storage: torch.dtype
    dtype: torch.dtype
    hint: int | None
    guess: int
    generator: torch.Generator
    unit: float = 1.0
    heads: int | None = None
    spans: tuple[Tensor | None, ...] = ()
    rough: bool = False

    def subset(self, chosen: list[int]) -> Problem:
        """The same for some of the models."""
        return replace(
            self,
            merged=self.merged[: len(chosen)] if chosen == list(range(len(chosen))) else self.merged[chosen],
            noise=tuple(self.noise[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            spans=tuple(self.spans[i] for i in chosen) if self.spans and chosen[0] == 0 else (),
        )

    def in_units(self, log_error: float | None) -> float | None:
        """A W-Error in the observation's own scale."""
        return None if log_error is None else log_error + 2 * math.log10(self.unit)

    def mean(self) -> Estimate:
        """The inverse-variance weighted mean of the models."""
        precision = [noise.std**-2 for noise in self.noise]
        _, d, k = self.merged.shape
        empty = self.merged.new_zeros(0, dtype=self.dtype)
        weights = [p / sum(precision) for p in precision]
        return Estimate(self.merged, weights, empty.new_zeros(d, 0), empty.new_zeros(k, 0))


def pose(observation: Observation) -> Problem:
    """Find the format of the merges, measure the rounding of each and choose the precision of the passes.

    Where squares of the rounding would leave the range of float32, the layer is taken times a power of two, which is
    exact but for numbers at the edge of that range. Weights of a usual size are not copied.
    """
    stack = observation.merged
    n, d, k = stack.shape
    storage = stored_as(stack, observation.storage)
    exponent = usual_exponent(stack)
    if exponent:
        # In two steps: the factor for the smallest float32 numbers is none itself.
        half = exponent // 2
        stack = stack * 2.0**half * 2.0 ** (exponent - half)
    size = float(stack[0, sampled_rows(d, k, stack.device)].double().square().mean())
    small = math.sqrt(largest_difference(stack)) < SMALL_UPDATE * math.sqrt(size)
    rank = observation.rank
    return Problem(
        merged=stack,
        noise=tuple(rounding_noise(weight, storage) for weight in stack),
        labels=tuple(range(n)),
        storage=storage,
        dtype=torch.float32 if d * k >= LARGE and small else torch.float64,
        hint=rank,
        guess=OVERSAMPLING + (2 * rank if rank is not None else min(d, k) // 32),
        generator=torch.Generator().manual_seed(observation.seed),
        unit=2.0**-exponent,
    )


def usual_exponent(stack: Tensor) -> int:
    """The power of two that brings weights (n, d, k) of a very unusual size to about 1; 0 for all others."""
    _, d, k = stack.shape
    rows = sampled_rows(d, k, stack.device)
    size = max(float(weight[rows].double().square().mean()) for weight in stack)
    exponent = -round(math.log2(size) / 2) if size else 0
    return exponent if abs(exponent) > USUAL else 0


def largest_difference(stack: Tensor) -> float:
    """The largest mean square of W'_i - W'_0, on some rows of the stack (n, d, k)."""
    _, d, k = stack.shape
    rows = sampled_rows(d, k, stack.device)
    first = stack[0, rows].double()
    return max(float((model[rows].double() - first).square().mean()) for model in stack[1:])


def first_parts(
    problem: Problem, count: int, known: Sequence[RowSpace] = (), doublings: int | None = None
) -> list[RowSpace]:
    """Row spaces of W'_i - W'_0 for the first `count` models after model 0, beyond those known.

    doublings: how long a low rank is looked for (see `row_space`); no further one is, once it was in vain.
    """
    parts = list(known)
    guess = problem.guess
    for i in range(len(parts) + 1, count + 1):
        guess = max([guess, *(part.rank + OVERSAMPLING // 2 for part in parts)])
        difference = Difference(problem.merged[i], problem.merged[0], problem.dtype)
        noise = joined(problem.noise[0], problem.noise[i])
        span = problem.spans[i] if problem.spans else None
        part = None if span is None else row_space_within(difference, noise, span)
        parts.append(part or row_space(difference, noise, guess, problem.generator, doublings))
        if doublings is not None and parts[-1].full:
            break
    return parts


def with_excess_noise(problem: Problem, parts: list[RowSpace]) -> tuple[Problem, list[RowSpace]]:
    """The noise corrected upwards, and the low-rank parts above it.

    What a difference leaves beyond its low rank is noise too: where it exceeds what the format explains (updates
    computed in float32, a base that was touched), the larger of the two counts.
    """
    expected = [joined(problem.noise[0], other).std for other in problem.noise[1:]]
    excess = [max(1.0, part.residual / std) for part, std in zip(parts, expected, strict=True)]
    scaled = tuple(level.scaled(x) for level, x in zip(problem.noise, [min(excess), *excess], strict=True))
    found = [joined(scaled[0], other).std for other in scaled[1:]]
    kept = [part.raised(now / before) for part, now, before in zip(parts, found, expected, strict=True)]
    return replace(problem, noise=scaled), kept

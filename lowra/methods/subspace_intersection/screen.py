"""Which of the models can be compared at all: copies add nothing, and a model of another base spoils the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.noise import Noise, joined
from lowra.methods.subspace_intersection.ranges import Difference, row_space


def distinct_models(stack: Tensor) -> list[int]:
    """Indices of the models (n, d, k) that are not exact copies of an earlier one."""
    kept: list[int] = []
    for i in range(stack.shape[0]):
        if not any(torch.equal(stack[i, 0], stack[j, 0]) and torch.equal(stack[i], stack[j]) for j in kept):
            kept.append(i)
    return kept


def same_base(
    stack: Tensor, noise: tuple[Noise, ...], guess: int, dtype: torch.dtype, generator: torch.Generator
) -> list[list[int]]:
    """Groups of models that differ from each other by low-rank updates only, the largest first.

    Two fine-tunes of one base differ by an update of rank r_i + r_j; two bases differ in every direction. A model joins
    the first group whose first member it differs from by a low rank.
    """
    groups: list[list[int]] = []
    for i in range(stack.shape[0]):
        for group in groups:
            first = group[0]
            difference = Difference(stack[first], stack[i], dtype)
            if not row_space(difference, joined(noise[first], noise[i]), guess, generator).full:
                group.append(i)
                break
        else:
            groups.append([i])
    return sorted(groups, key=lambda group: -len(group))

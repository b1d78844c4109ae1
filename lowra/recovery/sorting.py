"""Which of the models share a base at all, and which tensors tell: from samples, before the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.checkpoints.matching import EMBEDDING, Match
from lowra.checkpoints.reading import Checkpoint
from lowra.methods.subspace_intersection.kronecker import block_shape
from lowra.methods.subspace_intersection.noise import joined, rounding_noise, stored_as
from lowra.methods.subspace_intersection.ranges import OVERSAMPLING, Difference, row_space
from lowra.methods.subspace_intersection.scales import row_ratio
from lowra.recovery.tensors import Sources, check_finite, sources, strips_agree, view_of

# Tensors by which two models are compared, and the side of the block of each that is looked at.
SAMPLE = 6
BLOCK = 1024

# Two models share a base when at least this share of their matrices is identical or differs by a low rank.
SHARED = 0.5


@dataclass(frozen=True)
class Kinship:
    """How two models stand to each other. share: of matrices identical or of low-rank difference, 0 to 1.

    relative: median size of the differences over that of the weights, where they differ; 0 where nothing does.
    """

    share: float
    relative: float

    @property
    def same_base(self) -> bool:
        """Whether they share one."""
        return self.share >= SHARED

    @property
    def looks_like(self) -> str:
        """What models that do not share a base look like, as far as the size of the differences tells."""
        if self.relative > 0.5:
            return "another base model"
        if self.relative > 0.02:
            return "a base changed in every entry, as by a 4-bit round trip, or a strong full fine-tune"
        return "a full fine-tune, or a base changed in every entry, as by an 8-bit round trip"


def differing(matches: Sequence[Match], models: Sequence[Checkpoint], used: Sequence[int]) -> list[list[list[int]]]:
    """Per tensor: the models in groups that agree on its strips, by position in the command."""
    result = []
    for match in matches:
        tensor = sources(match, models, used)
        groups = strips_agree(tensor)
        result.append([[tensor.models[i] for i in group] for group in groups])
    return result


def kinship(
    matches: Sequence[Match], models: Sequence[Checkpoint], groups: Sequence[Sequence[Sequence[int]]], i: int, j: int
) -> Kinship:
    """Compare two models on a sample of the matrices in which they differ."""
    alike, apart = 0, []
    for match, parts in zip(matches, groups, strict=True):
        view = view_of(match.info.shape, match.rows)
        floating = match.info.dtype.is_floating_point
        if not floating or not view.matrix or EMBEDDING.search(match.name):
            continue
        if match.names[i] is None or match.names[j] is None:
            continue
        if any(i in part and j in part for part in parts):
            alike += 1
        else:
            apart.append(match)
    if not apart:
        return Kinship(1.0, 0.0)
    sample = [apart[round(at)] for at in torch.linspace(0, len(apart) - 1, min(SAMPLE, len(apart))).tolist()]
    low, sizes = 0, []
    for match in sample:
        tensor = sources(match, models, [i, j])
        first, second = block(tensor, match, 0), block(tensor, match, 1)
        check_finite(torch.stack([first, second]), tensor, [model.label for model in models])
        low += not full_rank(first, second, tensor.storage())
        sizes.append(math.sqrt(float((first - second).square().mean()) / max(float(first.square().mean()), 1e-45)))
    share = (alike + len(apart) * low / len(sample)) / (alike + len(apart))
    return Kinship(share, sorted(sizes)[len(sizes) // 2])


def block(tensor: Sources, match: Match, at: int) -> Tensor:
    """The upper left block of a tensor's first matrix, at most BLOCK x BLOCK, float32."""
    view = view_of(match.info.shape, match.rows)
    rows = min(view.d, BLOCK)
    piece = tensor.read(at, 0, rows * view.k)
    return piece.view(rows, view.k)[:, :BLOCK].float()


def full_rank(first: Tensor, second: Tensor, storage: torch.dtype) -> bool:
    """Whether two matrices (d, k) differ by a full rank, as far as the rounding of their format lets it be told.

    A low rank up to scales of rows or columns (DoRA, (IA)^3), or of the matrices cut into blocks (LoKr), is none.
    """
    storage = stored_as(torch.stack([first, second]), storage)
    noise = joined(rounding_noise(first, storage), rounding_noise(second, storage))
    guess = OVERSAMPLING + min(first.shape) // 32
    generator = torch.Generator().manual_seed(0)
    if not row_space(Difference(first, second, torch.float64), noise, guess, generator).full:
        return False
    if block_shape(first, second, noise) is not None:
        return False
    pairs = ((second, first), (second.mT, first.mT))
    return all(row_ratio(one, other, noise, generator) is None for one, other in pairs)


def sort_models(
    matches: Sequence[Match], models: Sequence[Checkpoint], groups: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[list[int]], dict[int, Kinship]]:
    """The models by shared base, the largest group first, and how each model left out stands to that group's first.

    A model joins the first group whose first member it shares a base with.
    """
    bases: list[list[int]] = []
    for j in range(len(models)):
        home = next((base for base in bases if kinship(matches, models, groups, base[0], j).same_base), None)
        if home is None:
            bases.append([j])
        else:
            home.append(j)
    bases.sort(key=lambda base: (-len(base), base[0]))
    out = {j: kinship(matches, models, groups, bases[0][0], j) for base in bases[1:] for j in base}
    return bases, out

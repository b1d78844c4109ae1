"""What comes out: an estimate of W, and what is known about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.certificates import Certificate
from lowra.methods.subspace_intersection.ranges import row_blocks, subtract


@dataclass(frozen=True)
class Estimate:
    """W as the weighted mean of the models plus a low-rank correction, formed row by row when it is asked for.

    models: (n, d, k), weights: n numbers that sum to 1, left: (d, q), right: (k, q); the product is taken in their
    dtype.
    """

    models: Tensor
    weights: list[float]
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Estimate:
        """A weight (d, k) that is known entry by entry."""
        d, k = weight.shape
        return cls(weight.unsqueeze(0), [1.0], weight.new_zeros(d, 0), weight.new_zeros(k, 0))

    @property
    def mT(self) -> Estimate:
        """The same of W^T."""
        return Estimate(self.models.mT, self.weights, self.right, self.left)

    def rows(self, picked: Tensor) -> Tensor:
        """Some rows, (rows, k) float64."""
        return replace(self, models=self.models[:, picked], left=self.left[picked]).dense(torch.float64)

    def row_sizes(self) -> Tensor:
        """Norms of the rows, (d,) float64."""
        d, k = self.models.shape[1:]
        rows = torch.arange(d, device=self.models.device)
        blocks = row_blocks(d, k, torch.float64)
        return torch.cat([self.rows(rows[block]).norm(dim=1) for block in blocks])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All of it (d, k): float64, or rounded to a grid and held in float32."""
        d, k = self.models.shape[1:]
        out = self.models.new_empty(d, k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        right = self.right.mT
        blocks = row_blocks(d, k, right.dtype)
        scratch = right.new_empty(2, blocks[0].stop, k)
        for block in blocks:
            rest, total = scratch[:, : block.stop - block.start]
            if out.dtype == total.dtype:
                total = out[block]
            torch.mm(self.left[block], right, out=total)
            first = self.models[0][block]
            # Summed as differences to model 0, which are small and, in float32, exact where the passes are in float32.
            for model, weight in zip(self.models[1:], self.weights[1:], strict=True):
                total.add_(subtract(model[block], first, rest), alpha=weight)
            if dtype == torch.float64:
                out[block].copy_(total).add_(first)
            else:
                total.add_(first)
                out[block].copy_(total if dtype == total.dtype else total.to(dtype))
        return out


@dataclass(frozen=True)
class Answer:
    """An estimate before any grid, with what is known about it.

    status: the certificate's sentence. ranks: of the updates, for the models used, in their order.
    predicted, lambda_min, discrepancy, edge: see `certify.Evidence`. outliers: models left out, counted from 0.
    grid: name of the one that W was rounded to. scaled: "rows" or "columns" where the models differ by scales of
    theirs, "" elsewhere; settled: the share of them whose scale is known. sure: (d, k), see `Recovery`. blocks: how
    many, down and across, where the updates are Kronecker products. noise: standard deviation of each model's, as it
    was found; empty where it was not.
    """

    estimate: Estimate
    certificate: Certificate
    status: str
    ranks: tuple[int, ...] = ()
    predicted: float | None = None
    lambda_min: float | None = None
    discrepancy: float | None = None
    edge: float = math.inf
    outliers: tuple[int, ...] = ()
    grid: str = "none"
    scaled: str = ""
    settled: float | None = None
    sure: Tensor | None = None
    blocks: tuple[int, int] | None = None
    noise: tuple[float, ...] = ()

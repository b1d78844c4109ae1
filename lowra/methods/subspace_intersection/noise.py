"""How large the rounding of a merge is: the floor that every rank and every certificate is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The rounding of a merge, by row and by column, is measured on at most about this many entries of a layer.
SAMPLE = 2**20

# Single numbers are: a quarter of a million entries fix a mean square to three tenths of a percent.
PROBE = 2**18


# Sums in float32 err, too: B A of updates as large as the weights leaves several times the rounding of the merge, and
# so does what else was computed with them. Noise of up to so many times that rounding is taken to be of this kind.
ARITHMETIC = 16.0

# What stands for the rounding of a merge that is zero, in a problem of ordinary scale: its inverse square is finite.
SILENT = 1e-30


@dataclass(frozen=True)
class Noise:
    """The rounding E of one merged weight, as a random matrix.

    std: root mean square of its entries.
    shape: its spectral norm over that of a matrix of equal variances, std (sqrt d + sqrt k). Weights of very different
        size by row or column round unevenly and stick out of the bulk; 1 when they do not.
    """

    std: float
    shape: float

    def norm(self, rows: int, columns: int) -> float:
        """Estimated spectral norm of the noise seen in subspaces of these dimensions."""
        return self.std * self.shape * (math.sqrt(rows) + math.sqrt(columns))

    def scaled(self, factor: float) -> Noise:
        """The same noise, `factor` times as large."""
        return Noise(self.std * factor, self.shape)


def joined(first: Noise, second: Noise) -> Noise:
    """The noise of the difference of two merged weights: independent, so variances add."""
    return Noise(math.hypot(first.std, second.std), max(first.shape, second.shape))


def ulp(weight: Tensor, storage: torch.dtype) -> Tensor:
    """Spacing of the numbers of `storage` around each entry of a float32 tensor, same shape.

    Masking the sign and the fraction of a float32 leaves its power of two; below the smallest normal number the
    spacing stays what it is there.
    """
    finfo = torch.finfo(storage)
    power = (weight.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_(min=finfo.tiny) * finfo.eps


def sampled_rows(rows: int, columns: int, device: torch.device, entries: int = PROBE) -> Tensor:
    """Indices of evenly spread rows, at most about so many entries (all rows of a small layer)."""
    count = min(rows, max(1, entries // columns))
    return torch.linspace(0, rows - 1, count, device=device).long()


def rounding_noise(weight: Tensor, storage: torch.dtype) -> Noise:
    """Noise of a weight (d, k) rounded to the nearest number of `storage`: uniform, variance ulp^2 / 12.

    Where an update is smaller than an ulp the errors of two merges are not independent, and this is an over-estimate;
    that errs on the safe side. The shape is the bound (largest row norm + largest column norm) of the variances for the
    spectral norm of a matrix of independent entries (Bandeira and van Handel 2016, Theorem 1.1).
    """
    d, k = weight.shape
    picked = weight[sampled_rows(d, k, weight.device, SAMPLE)]
    square = ulp(picked, storage).square_()  # (rows, k)
    by_row = square.mean(1)
    mean = float(by_row.double().mean())
    if mean == 0:
        return Noise(SILENT, 1.0)
    norm = math.sqrt(k * float(by_row.max())) + math.sqrt(d * float(square.mean(0).max()))
    return Noise(math.sqrt(mean / 12), norm / (math.sqrt(mean) * (math.sqrt(d) + math.sqrt(k))))


def stored_as(stack: Tensor, declared: torch.dtype) -> torch.dtype:
    """The coarsest float format that holds all (sampled) entries of merged weights (n, d, k), `declared` by default.

    Checkpoints merged in half precision are sometimes published as float32; their rounding is still the coarse one.
    """
    _, d, k = stack.shape
    picked = stack[:, sampled_rows(d, k, stack.device)]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(picked.to(dtype).to(picked.dtype), picked):
            return dtype
    return declared

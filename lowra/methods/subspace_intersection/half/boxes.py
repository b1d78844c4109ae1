"""Boxes: the likelihood that a value known with a normal error lies in a cell.

With z ~ N(centre - t sd, sd^2) and a cell of half width h sd around the centre, the probability is
Q(|t| - h) - Q(|t| + h), Q the upper tail of the normal distribution: accurate far outside of the cell too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROOT_HALF = math.sqrt(0.5)

# float32 tails end at about 13 deviations; from here on the logarithm goes on as that of a normal density.
FAR = 11.5

# Score and curvature go on linearly from here on, as those of a normal density about the edge of the cell.
EDGE = 6.0

# Beyond so many deviations a tail adds nothing to one that is within `EDGE`. Exponentials that underflow take ten times
# as long as others.
NOTHING = 9.0


def upper_tail(deviations: Tensor) -> Tensor:
    """Q(x) of the standard normal distribution."""
    return torch.erfc(deviations * ROOT_HALF).mul_(0.5)


def log_probability(t: Tensor, h: Tensor) -> Tensor:
    """Log of the probability of the cell, for distance |t| from its centre and half width h in deviations."""
    away = t.abs()
    outer = torch.add(away, h).clamp_(max=FAR)
    inner = away.sub_(h)
    beyond = inner.clamp(min=FAR).square_().sub_(FAR**2)
    inside = upper_tail(inner.clamp_(max=FAR)).sub_(upper_tail(outer)).clamp_(min=1e-30).log_()
    return inside.add_(beyond, alpha=-0.5)


def score_and_curvature(t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """First and minus second derivative of the log probability in the mean of z, in units of sd and of sd^2.

    t = (centre - mean) / sd with its sign; same shapes.
    """
    inner = t.abs().sub_(h)
    beyond = inner.sub(EDGE).clamp_(min=0)
    inner.sub_(beyond)
    outer = torch.add(inner, h, alpha=2).clamp_(max=NOTHING)
    inner.clamp_(min=-NOTHING)
    mass = upper_tail(inner).sub_(upper_tail(outer)).clamp_(min=1e-30).mul_(math.sqrt(2 * math.pi))
    near, far = inner.square().mul_(-0.5).exp_(), outer.square().mul_(-0.5).exp_()
    score = (near - far).div_(mass)
    curvature = outer.mul_(far).sub_(inner.mul_(near)).div_(mass).addcmul_(score, score)
    return score.add_(beyond).copysign_(t), curvature

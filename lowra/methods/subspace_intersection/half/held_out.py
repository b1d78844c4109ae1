"""Held-out cells: what an explanation is worth shows in stored numbers it has not seen.

For each cell left out, the other models give a posterior of W there; with the update of its own model that predicts
the stored number. The mean log probability compares starts. What it falls short of its own expectation tells a wrong
explanation from a right one: a false one fits the cells it was made from, and is surprised by others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.boxes import ROOT_HALF
from lowra.methods.subspace_intersection.half.cells import Grid, grid_of
from lowra.methods.subspace_intersection.half.lattice import WIDE, around, log_posterior
from lowra.methods.subspace_intersection.half.parts import Tile
from lowra.methods.subspace_intersection.half.sites import Cells, Held

# Numbers of the grid of W on each side, and stored numbers on each side, that predictions run over.
SIDES_BASE, SIDES_STORED = 4, 6

# Nats that make another variance clearly better.
CLEARLY = 0.002

# Least log probability of a held-out number; one wild entry is not to decide.
LEAST = -20.0


@dataclass(frozen=True)
class Question:
    """Held-out numbers, and what is known of their places.

    stored, model: (q,), and the grids of those models. centre, widths: (n, q) of all cells there less their updates,
    the held-out ones widened. spreads: (n, q) variances of the updates, and `rest` what is added whatever the factor.
    """

    stored: Tensor
    model: Tensor
    own: Grid
    centre: Tensor
    widths: Tensor
    spreads: Tensor
    rest: Tensor

    @classmethod
    def of(cls, cells: Cells) -> Question:
        """The held-out numbers of a layer; what is known of them is put in tile by tile."""
        assert cells.held is not None
        model = cells.held.model
        stored = cells.stack[model, cells.held.row, cells.held.column] * cells.scale  # (q,)
        grids = [grid_of(dtype, cells.scale) for dtype in cells.dtypes]
        own = Grid(stored.new_tensor([g.eps for g in grids])[model], stored.new_tensor([g.tiny for g in grids])[model])
        # One tensor for the layer: small ones, left between the temporaries of the tiles, would hold their memory.
        known = stored.new_empty(4, len(cells.stack), len(model))
        return cls(stored, model, own, *known)

    def put(self, held: Held, tile: Tile, target: Tensor, half: Tensor, variance: Tensor, rest: Tensor) -> None:
        """What a tile tells of the cells held out there.

        target, half, variance: (n, rows, columns), cells of W'_i - M_i and variance of M_i, the held-out ones widened.
        rest: what is added to the variance whatever the factor, (n, 1, 1) or (n, rows, columns).
        """
        part = held.within(tile)
        row, column = held.row[part] - tile[0].start, held.column[part] - tile[1].start
        for out, values in zip(
            (self.centre, self.widths, self.spreads, self.rest), (target, half, variance, rest), strict=True
        ):
            out[:, part] = values.expand_as(half)[:, row, column]


@dataclass
class Evidence:
    """Log probabilities of the held-out numbers, and what the predictions expected them to be, under some variances.

    factors: of the updates' variances: 1, and some around the one in use. base: the grid of W. What is expected takes a
    dozen times as long to tell as what is so, and is told only when asked for; deviations: what was, by factor.
    """

    factors: tuple[float, ...]
    base: Grid | None = None
    asked: Question | None = None
    deviations: dict[float, float] = field(default_factory=dict)

    @cached_property
    def actual(self) -> Tensor:
        """Mean log probability under each factor, (f,)."""
        return self._means(self.factors, expecting=False)[0]

    @cached_property
    def best(self) -> int:
        """Index of the factor that predicts best; 0, that of the one in use, unless another is clearly better."""
        index = int(self.actual.argmax())
        return index if float(self.actual[index] - self.actual[0]) > CLEARLY else 0

    @property
    def likelihood(self) -> float:
        """Mean log probability of a held-out number, in nats, under the best factor."""
        return float(self.actual.max())

    @property
    def deviation(self) -> float:
        """Under factor 1, the same less its expectation: near 0 for a right explanation, negative for a wrong one."""
        return self._deviation(1.0)

    @property
    def calibrated_deviation(self) -> float:
        """The same under the best factor."""
        return self._deviation(self.factors[self.best])

    def _deviation(self, factor: float) -> float:
        if factor not in self.deviations:
            actual, expected = self._means((factor,), expecting=True)
            self.deviations[factor] = float(actual - expected)
        return self.deviations[factor]

    def _means(self, factors: tuple[float, ...], *, expecting: bool) -> tuple[Tensor, Tensor]:
        """Means over the held-out numbers under some factors, (f,) each; the second is 0 unless asked for."""
        if self.asked is None:
            zero = torch.zeros(len(factors), dtype=torch.float64)
            return zero, zero
        actual, expected = predicted(self.base, self.asked, factors, expecting=expecting)
        return actual.double().mean(1), expected.double().mean(1)


def predicted(
    base: Grid | None, question: Question, factors: tuple[float, ...], *, expecting: bool
) -> tuple[Tensor, Tensor]:
    """Log probability of the stored numbers, and its expectation where asked for (else 0), (f, q) each.

    The first of the factors decides where to look.
    """
    stored, model, own, centre, widths = (
        question.stored,
        question.model,
        question.own,
        question.centre,
        question.widths,
    )
    spreads = question.spreads * centre.new_tensor(factors)[:, None, None] + question.rest  # (f, n, q)
    q = torch.arange(len(model), device=model.device)
    # The own model's target is the centre of its cell less its update.
    update = own.cell(stored)[0] - centre[model, q]
    spread = spreads[:, model, q]  # (f, q)
    precision = 1 / (widths.square() / 3 + spreads)
    total = precision.sum(1)  # (f, q)
    what = (precision * centre).sum(1) / total
    seen = stored[None]
    if expecting:
        seen = torch.cat([around(own, what[0] + update, SIDES_STORED), seen])
    edges_centre, edges_half = own.cell(seen)  # (s, q)
    middle = edges_centre - (what + update)[:, None]
    probability = mass(middle, edges_half, (spread + 1 / total).sqrt()[:, None])  # (f, s, q)
    if base is not None:
        broad = 1 / total > (WIDE * base.spacing(what)) ** 2
        candidates = around(base, what[0], SIDES_BASE)  # (g, q)
        logs = log_posterior(candidates[:, None], centre, widths, spreads.sqrt().transpose(0, 1))  # (g, f, q)
        chances = torch.softmax(logs, 0)
        narrow = torch.zeros_like(probability)
        deviation = spread.sqrt()[:, None]
        for candidate, chance in zip(candidates, chances, strict=True):
            narrow.addcmul_(chance[:, None], mass(edges_centre - candidate - update, edges_half, deviation))
        probability = torch.where(broad[:, None], probability, narrow)
    logs = probability.clamp_(min=1e-30).log()
    expected = (probability[:, :-1] * logs[:, :-1]).sum(1)
    return logs[:, -1].clamp(min=LEAST), expected


def mass(distance: Tensor, half: Tensor, deviation: Tensor) -> Tensor:
    """Probability of cells at a distance from the mean of a normal distribution."""
    t, h = distance.abs() / deviation, half / deviation
    return (torch.erfc((t - h) * ROOT_HALF) - torch.erfc((t + h) * ROOT_HALF)).mul_(0.5)

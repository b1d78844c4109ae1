"""Levels: a large layer is solved on a part of itself, and the solution carried over.

On a part of the rows and columns a round costs a fraction, and a handful of rounds at full size from there do what ten
did from afar. With the right factors known on some columns the left factors of all rows are linear least squares, and
the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from lowra.methods.subspace_intersection.half.fit import Factors, Quadratic, effective_variances, force, qr_of, slope
from lowra.methods.subspace_intersection.half.parts import Tile, in_parts
from lowra.methods.subspace_intersection.half.sites import MEDIAN, Cells, Sites, plain_sites

# Layers of at most this many entries are solved at once.
SMALL = 2**18

# Rows and columns of the part: at least so many, and so many per rank.
LEAST, PER_RANK = 384, 20

# A part larger than this share of the layer does not pay.
WORTH = 0.5

# Clip and iterations of the extensions, which are linear. At a lower clip faint directions drown in the noise.
EXTENSION_CLIP, EXTENSION_ITERATIONS, EXTENSION_TOLERANCE = 30.0, 12, 0.01


@dataclass(frozen=True)
class Part:
    """Rows and columns of a layer, indices in order."""

    rows: Tensor
    columns: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """The part of a weight (d, k) or of a stack (n, d, k)."""
        return self.columns_of(weight.index_select(-2, self.rows))

    def columns_of(self, rows: Tensor) -> Tensor:
        """The part of its rows (..., rows, k)."""
        return rows.index_select(-1, self.columns)


def choose_part(shape: tuple[int, int], rank: int, generator: torch.Generator, device: torch.device) -> Part | None:
    """Random rows and columns to begin with, None where the whole layer is as good."""
    d, k = shape
    wanted = max(LEAST, PER_RANK * rank)
    rows, columns = min(d, wanted), min(k, wanted)
    # A short side is made up for by the long one: rank (d + k) / (d k) decides.
    share = 2 / wanted
    if rows < wanted:
        columns = min(k, max(columns, math.ceil(1 / max(share - 1 / rows, 1 / k))))
    if columns < wanted:
        rows = min(d, max(rows, math.ceil(1 / max(share - 1 / columns, 1 / d))))
    if d * k <= SMALL or rows * columns > WORTH * d * k:
        return None
    picked = [
        torch.randperm(size, generator=generator)[:count].sort().values for size, count in ((d, rows), (k, columns))
    ]
    return Part(*(index.to(device) for index in picked))


def extended(cells: Cells, part: Part, factors: Factors, generator: torch.Generator) -> Factors:
    """Factors of the whole layer from those of a part."""
    _, d, k = cells.stack.shape
    ranks = factors.ranks
    lefts = factors.left
    if len(part.rows) < d:
        strip = replace(cells, stack=cells.stack.index_select(2, part.columns), held=None)
        found = one_side(
            strip, Factors(tuple(f.new_zeros(d, r) for f, r in zip(lefts, ranks, strict=True)), factors.right), "left"
        )
        lefts = found.left
    if len(part.columns) == k:
        return Factors(lefts, factors.right).balanced()
    count = min(d, max(len(part.rows), d // 2))
    rows = torch.randperm(d, generator=generator)[:count].sort().values.to(part.rows.device)
    strip = replace(cells, stack=cells.stack.index_select(1, rows), held=None)
    turned, here = [], []
    for left in lefts:
        part_left = left[rows]
        # A basis in which the known factor has orthogonal columns, as the preconditioner takes them to be.
        _, vectors = torch.linalg.eigh((part_left.mT @ part_left).double())
        turned.append(left @ vectors.to(left.dtype))
        here.append(turned[-1][rows])
    found = one_side(
        strip, Factors(tuple(here), tuple(f.new_zeros(k, r) for f, r in zip(here, ranks, strict=True))), "right"
    )
    return Factors(tuple(turned), found.right).balanced()


def one_side(cells: Cells, factors: Factors, side: str) -> Factors:
    """The factors of one side, zero on entry, by linear least squares with plain sites."""
    sites = plain_sites(cells, EXTENSION_CLIP * MEDIAN)
    known = factors.right if side == "left" else factors.left
    # The size of a direction, for the ridge and the preconditioner, is that of its known side.
    sizes = [part.square().sum(0).clamp_(min=1e-30) for part in known]
    down = slope(cells, sites, factors, sizes)
    variances = effective_variances(sites, factors.ranks, None)
    model = Quadratic(cells, sites, factors, side, sizes)
    return factors.moved(model.step(down, variances, EXTENSION_ITERATIONS, EXTENSION_TOLERANCE), 1.0)


def extra_directions(cells: Cells, sites: Sites, factors: Factors, count: int, generator: torch.Generator) -> Factors:
    """Factors with `count` more directions a model, the largest of the force that what they leave over has on them.

    A part of the layer does not see directions that the whole layer does. The force weighs every entry by the precision
    of its site: faint directions show in the smallest weights alone. A randomized range finder with half a power step
    (Halko et al. 2011).
    """
    own = [0.0] * len(cells.stack)

    def forces(strips: Iterable[list[Tile]]) -> Iterator[tuple[Tile, Tensor]]:
        for tile in chain(*strips):
            centre, half = cells.read(tile)
            yield tile, force(sites, tile, centre, half, factors.updates(*tile))

    def times(rights: Sequence[Tensor]) -> list[Tensor]:
        images = [right.new_zeros(cells.stack.shape[1], right.shape[1]) for right in rights]

        def part(strips: list[list[Tile]]) -> None:
            for (rows, columns), pulls in forces(strips):
                for image, pull, right in zip(images, pulls, rights, strict=True):
                    image[rows].addmm_(pull, right[columns])

        in_parts(part, cells.strips())
        return images

    new = cells.stack.new_empty
    k = cells.stack.shape[2]
    sketches = times([torch.randn(k, count, generator=generator).to(cells.stack.device) for _ in own])
    rights = [new(k, count).zero_() for _ in own]
    lefts = [qr_of(sketch)[0] for sketch in sketches]
    for (rows, columns), pulls in forces(cells.strips()):
        for right, part, left in zip(rights, pulls, lefts, strict=True):
            right[columns].addmm_(part.mT, left[rows])
    rights = [qr_of(right)[0] for right in rights]
    # Where the force of an entry is its precision times what is missing, so is that of a direction, in the mean.
    for tile in chain(*cells.strips()):
        precision, total = sites.read(tile)
        for i, part in enumerate(precision.sub_(precision.square().div_(total)).sum((1, 2)).tolist()):
            own[i] += part
    size = cells.stack[0].numel()
    lefts = [image.mul_(size / max(mean, 1e-30)) for image, mean in zip(times(rights), own, strict=True)]
    joined = Factors(
        tuple(torch.cat(pair, 1) for pair in zip(factors.left, lefts, strict=True)),
        tuple(torch.cat(pair, 1) for pair in zip(factors.right, rights, strict=True)),
    )
    return joined.balanced()

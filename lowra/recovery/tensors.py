"""One tensor of several models: compared in pieces, seen as matrices, read into a stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.checkpoints.matching import Match
from lowra.checkpoints.reading import Checkpoint, StoredState
from lowra.checkpoints.writing import pieces
from lowra.errors import LowraError

# A third dimension up to this is a convolution's kernel, above it a batch of matrices (experts).
KERNEL = 16

# Entries of a strip by which tensors are compared before the work, and strips per tensor.
STRIP, STRIPS = 2**12, 3


@dataclass(frozen=True)
class View:
    """A tensor as a batch of matrices: `count` of (d, k); a convolution (out, in, ...) is one, (out, in x ...)."""

    count: int
    d: int
    k: int

    @property
    def matrix(self) -> bool:
        """Whether there is a matrix to speak of: two updates of rank one fit it with room to spare."""
        return min(self.d, self.k) > 2


def view_of(shape: Sequence[int], rows: int | None = None) -> View:
    """How a tensor's shape is seen; rows: of the first dimension, where models have only so many in common.

    Three dimensions are experts (experts, d, k) unless the last is a small kernel. Which of d and k is the input does
    not matter to recovery: updates are of low rank either way.
    """
    if len(shape) < 2:
        return View(1, 1, math.prod(shape))
    if len(shape) == 3 and shape[2] > KERNEL and shape[0] > 1:
        return View(shape[0], shape[1], shape[2])
    return View(1, shape[0] if rows is None else rows, math.prod(shape[1:]))


@dataclass(frozen=True)
class Sources:
    """Where one tensor stands in the models that are used.

    models: their positions among the models of the command. states, names: for each of them; its name there.
    entries: compared, from the beginning (all, or the rows all have in common).
    """

    models: tuple[int, ...]
    states: tuple[StoredState, ...]
    names: tuple[str, ...]
    entries: int

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Stored formats, per model."""
        return tuple(state.infos[name].dtype for state, name in zip(self.states, self.names, strict=True))

    def storage(self) -> torch.dtype:
        """The coarsest of the formats: the rounding a stack of them has at worst."""
        formats = set(self.dtypes())
        for dtype in (torch.bfloat16, torch.float16):
            if dtype in formats:
                return dtype
        return torch.float32

    def only(self, kept: Sequence[int]) -> Sources:
        """The same for some of the models, by position in this object."""
        picked = [(self.models[i], self.states[i], self.names[i]) for i in kept]
        models, states, names = zip(*picked, strict=True)
        return Sources(models, states, names, self.entries)

    def read(self, at: int, start: int, stop: int) -> Tensor:
        """A piece of one model's tensor, flat, as stored."""
        return self.states[at].read(self.names[at], start, stop)

    def expect(self) -> None:
        """All of it is read next."""
        for state, name in zip(self.states, self.names, strict=True):
            state.expect(name)

    def stack(self, view: View, index: int = 0) -> Tensor:
        """Matrix `index` of every model, (n, d, k) float32, read in pieces.

        Where some are in half precision the others are rounded to it: a method is told one rounding of all, and would
        take the numbers of one that has another for those of another base.
        """
        size, storage = view.d * view.k, self.storage()
        out = torch.empty(len(self.models), view.d, view.k)
        for at in range(len(self.models)):
            flat = out[at].view(-1)
            for start, stop in pieces(size, torch.float32):
                piece = self.read(at, index * size + start, index * size + stop)
                wide = piece.is_floating_point() and piece.element_size() > storage.itemsize
                flat[start:stop].copy_(piece.to(storage) if wide else piece)
        return out


def sources(match: Match, models: Sequence[Checkpoint], used: Sequence[int]) -> Sources:
    """The models among `used` that have the tensor."""
    kept, states, names = [], [], []
    for i in used:
        name = match.names[i]
        if name is None:
            continue
        components = models[i].components
        state = components.get(match.component) or next(iter(components.values()))
        kept.append(i)
        states.append(state)
        names.append(name)
    inner = math.prod(match.info.shape[1:]) if match.info.shape else 1
    return Sources(tuple(kept), tuple(states), tuple(names), match.rows * inner)


def agreeing(tensor: Sources) -> list[list[int]]:
    """The models in groups that hold the very same numbers, by position in `tensor`; the group of the first is first.

    Formats may differ: numbers are then compared as the coarser of the two holds them. Read a piece at a time, until no
    two models agree any more; what is one place in one file is not read at all.
    """
    groups = [list(range(len(tensor.models)))]
    states, names = tensor.states, tensor.names
    linked = {i: 0 for i in groups[0][1:] if states[0].same_bytes(names[0], states[i], names[i])}
    for start, stop in pieces(tensor.entries, torch.float32):
        open_groups = [group for group in groups if any(i not in linked for i in group[1:])]
        if not open_groups:
            break
        for group in open_groups:
            leader = tensor.read(group[0], start, stop)
            parted: list[tuple[Tensor, list[int]]] = [(leader, [group[0]])]
            for i in group[1:]:
                if i in linked and group[0] == 0:
                    parted[0][1].append(i)
                    continue
                piece = tensor.read(i, start, stop)
                home = next((members for known, members in parted if same_numbers(known, piece)), None)
                if home is None:
                    parted.append((piece, [i]))
                else:
                    home.append(i)
            if len(parted) > 1:
                groups.remove(group)
                groups += [members for _, members in parted]
    return sorted(groups, key=lambda group: group[0])


def strips_agree(tensor: Sources) -> list[list[int]]:
    """The same, from a few strips of the tensor: who differs there differs, who does not probably does not."""
    step = max(STRIP, tensor.entries // STRIPS)
    starts = sorted({min(at * step, max(0, tensor.entries - STRIP)) for at in range(STRIPS + 1)})
    keys: dict[int, list[Tensor]] = {}
    groups: list[list[int]] = []
    for i in range(len(tensor.models)):
        keys[i] = [tensor.read(i, start, min(start + STRIP, tensor.entries)) for start in starts]
        home = next(
            (g for g in groups if all(same_numbers(a, b) for a, b in zip(keys[g[0]], keys[i], strict=True))), None
        )
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return groups


def same_numbers(first: Tensor, second: Tensor) -> bool:
    """Whether two flat pieces hold the same numbers, as far as the coarser format can tell. Same bits, same numbers."""
    if first.dtype == second.dtype:
        return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    if not (first.is_floating_point() and second.is_floating_point()):
        return first.dtype.is_floating_point == second.dtype.is_floating_point and torch.equal(first, second.to(first))
    coarse = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(first.to(coarse), second.to(coarse))


def check_finite(stack: Tensor, tensor: Sources, labels: Sequence[str]) -> None:
    """Raise LowraError naming the model and the tensor that hold NaN or infinity."""
    for at, weight in enumerate(stack):
        if not math.isfinite(float(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
            raise LowraError(
                f"Tensor {tensor.names[at]!r} of {labels[tensor.models[at]]} contains NaN or infinity; leave that "
                "model out, or fetch it again."
            )

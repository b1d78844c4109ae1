"""Defences against recovery: what a publisher can do to the weights of a fine-tune before they are released.

A defence is a frozen dataclass with `release(merged, place)`; a file in `conf/defence` names it with its options, as
methods are named. It is given the merged weight W'_i of a layer and returns what is published in its place. All that is
random comes from `Place.generator`, so that a release is the same whenever it is asked for. Defences that choose how a
model is trained (one frozen A, kinds of fine-tuning) are options of the builders instead.

`Rotation` and `Scaling` leave the function of the model as it was, once the layers around them are changed along; the
attacker of the benchmark sees the fine-tuned layers, and `partner` is for whoever runs the whole model.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowra.checks import Count, OneOf, Positive, check_fields
from lowra.errors import LowraError

FORMATS = ("bfloat16", "float8", "int8")

# Largest number of float8 (e4m3) and of int8: a row is scaled to it before it is rounded.
_LARGEST = {"float8": 448.0, "int8": 127.0}

# The projections of one attention, by what their names end in: what reads from whom.
_PROJECTIONS = {
    "query": re.compile(r"(query|q_proj|to_q)(\.base_layer)?(\.weight)?$"),
    "key": re.compile(r"(key|k_proj|to_k)(\.base_layer)?(\.weight)?$"),
    "value": re.compile(r"(value|v_proj|to_v)(\.base_layer)?(\.weight)?$"),
}


@dataclass(frozen=True)
class Place:
    """Which weight of which release: the layer's name, the model's number, and the seed of the defence."""

    layer: str
    model: int
    seed: int

    def generator(self, *parts: object) -> torch.Generator:
        """The generator of whatever the parts name. Give it `model` for what differs between releases, and `layer`."""
        text = "/".join(map(str, ("lowra defence", self.seed, *parts)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        return torch.Generator().manual_seed(seed)

    @property
    def own(self) -> torch.Generator:
        """A generator of this layer in this release alone."""
        return self.generator(self.layer, self.model)

    @property
    def block(self) -> str:
        """The attention that the layer belongs to: its name without the last part that tells query from value."""
        return next((p.sub("", self.layer) for p in _PROJECTIONS.values() if p.search(self.layer)), self.layer)

    @property
    def projection(self) -> str | None:
        """What the layer is to its attention: "query", "key", "value", or None."""
        return next((name for name, p in _PROJECTIONS.items() if p.search(self.layer)), None)


@runtime_checkable
class Defence(Protocol):
    """A defence: hyperparameters are its fields."""

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """What is published (d, k), float32, in place of a merged weight (d, k), which is not changed."""
        ...


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on every weight, each release its own. size: its standard deviation over the weights' rms."""

    size: Positive

    def __post_init__(self) -> None:
        check_fields(self, "defence")

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """W' + size rms(W') N(0, 1)."""
        noise = torch.randn(merged.shape, generator=place.own)
        return noise.mul_(self.size * _rms(merged)).add_(merged)


@dataclass(frozen=True)
class SharedComponent:
    """One random matrix C added to all releases of a layer.

    size: its root mean square over 1 / sqrt(k), the usual size of weights that read k numbers. rank: null for full.
    """

    size: Positive
    rank: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "defence")

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """W' + C."""
        component = _component(merged, self.rank, place.generator(place.layer))
        return component.mul_(self.size / math.sqrt(merged.shape[1])).add_(merged)


@dataclass(frozen=True)
class RankPadding:
    """A random low-rank matrix beside the update, of another rank in every release.

    least, most: ranks to choose from. size: rms over the weights'.
    """

    least: Count
    most: Count
    size: Positive

    def __post_init__(self) -> None:
        check_fields(self, "defence")
        if self.least > self.most:
            raise LowraError(f"defence.least is {self.least} and defence.most {self.most}; expected least <= most.")

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """W' + C_i with a rank of its own."""
        generator = place.own
        rank = int(torch.randint(self.least, self.most + 1, (), generator=generator))
        rank = min(rank, *merged.shape)
        return _component(merged, rank, generator).mul_(self.size * _rms(merged)).add_(merged)


@dataclass(frozen=True)
class Rounding:
    """Releases in few bits. format: bfloat16, or float8 (e4m3) or int8 with a float32 scale for each row.

    stochastic: up or down at random, so that the error is zero in the mean, instead of to the nearest.
    """

    format: Annotated[str, OneOf(FORMATS)]
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "defence")

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """The nearest number of the format, or one of the two around."""
        scale, numbers = torch.ones(merged.shape[0], 1), merged
        if largest := _LARGEST.get(self.format):
            scale = (merged.abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo().tiny)
            numbers = (merged / scale).clamp(-largest, largest)
        low = _lower(numbers, self.format)
        high = _next(low, self.format)
        share = ((numbers - low) / (high - low)).clamp(0, 1)
        chance = torch.rand(merged.shape, generator=place.own) if self.stochastic else torch.full_like(share, 0.5)
        return torch.where(share > chance, high, low).mul_(scale)


@dataclass(frozen=True)
class Rotation:
    """Rotates each head's queries with its keys, and its values with the output that reads them, by release.

    heads: of the queries. shared_by: how many of them read one key and value (4 in Mistral-7B). rope: whether positions
    are encoded by rotating queries and keys, dimension i with i + h / 2 of a head of h (RoPE, as transformers lays it
    out); they are then rotated in these planes alone, which commutes with it. Scores q k^T and the outputs of the
    attention stay what they were.
    """

    heads: Count
    shared_by: Count = 1
    rope: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "defence")
        _check_shared(self.heads, self.shared_by)

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """R W' with R block-diagonal and orthogonal, for queries, keys and values; any other layer as it is."""
        kind = place.projection
        if kind is None:
            return merged.clone()
        heads = self.heads if kind == "query" else self.heads // self.shared_by
        width = _head_width(merged.shape[0], heads, place.layer, even=self.rope)
        rotation = self._rotation(width, place, kind)
        if kind == "query":
            rotation = rotation.repeat_interleave(self.shared_by, 0)
        return (rotation @ merged.double().view(heads, -1, merged.shape[1])).view(merged.shape).float()

    def partner(self, output: Tensor, place: Place) -> Tensor:
        """What the output projection (d, k) of an attention becomes; place.layer names the value projection."""
        width = _head_width(output.shape[1], self.heads, place.layer, even=self.rope)
        rotation = self._rotation(width, place, "value").repeat_interleave(self.shared_by, 0)
        turned = output.double().view(output.shape[0], self.heads, -1).transpose(0, 1) @ rotation.mT
        return turned.transpose(0, 1).reshape(output.shape).float()

    def bias(self, bias: Tensor, place: Place) -> Tensor:
        """The bias (d,) of a layer that `release` rotates."""
        return self.release(bias[:, None], place)[:, 0]

    def _rotation(self, width: int, place: Place, kind: str) -> Tensor:
        """Orthogonal matrices (key heads, h, h), the same for queries and keys."""
        count = self.heads // self.shared_by
        generator = place.generator(place.block, "value" if kind == "value" else "scores", place.model)
        if self.rope and kind != "value":
            angle = 2 * math.pi * torch.rand(count, width // 2, generator=generator, dtype=torch.float64)
            cosine, sine = angle.cos().diag_embed(), angle.sin().diag_embed()  # (count, h / 2, h / 2)
            return torch.cat([torch.cat([cosine, -sine], 2), torch.cat([sine, cosine], 2)], 1)
        turn, triangle = torch.linalg.qr(torch.randn(count, width, width, generator=generator, dtype=torch.float64))
        return turn * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]


@dataclass(frozen=True)
class Scaling:
    """Scales each query with its key, and each value with the output that reads it, by release.

    size: standard deviation of the scales' logarithms. heads, shared_by, rope: see `Rotation`; with rope both
    dimensions of a plane are scaled alike. Without rope, and with keys for every query, heads do not matter.
    """

    size: Positive
    heads: Count = 1
    shared_by: Count = 1
    rope: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "defence")
        _check_shared(self.heads, self.shared_by)

    def release(self, merged: Tensor, place: Place) -> Tensor:
        """diag(s) W' for queries and values, diag(1 / s) W' for keys; any other layer as it is."""
        kind = place.projection
        if kind is None:
            return merged.clone()
        scale = self._scale(merged.shape[0], place, kind, shared=kind != "query")
        return (scale[:, None] * merged.double()).float()

    def partner(self, output: Tensor, place: Place) -> Tensor:
        """What the output projection (d, k) of an attention becomes; place.layer names the value projection."""
        return (output.double() / self._scale(output.shape[1], place, "value", shared=False)).float()

    def bias(self, bias: Tensor, place: Place) -> Tensor:
        """The bias (d,) of a layer that `release` scales."""
        return self.release(bias[:, None], place)[:, 0]

    def _scale(self, size: int, place: Place, kind: str, *, shared: bool) -> Tensor:
        """(size,), of the rows of keys and values (shared) or of as many heads as there are queries."""
        count = self.heads // self.shared_by
        width = _head_width(size, count if shared else self.heads, place.layer, even=self.rope)
        generator = place.generator(place.block, "value" if kind == "value" else "scores", place.model)
        planes = self.rope and kind != "value"
        draw = torch.randn(count * width // (2 if planes else 1), generator=generator, dtype=torch.float64)
        draw = draw.view(count, -1).repeat(1, 2 if planes else 1)  # (key heads, h)
        if not shared:
            draw = draw.repeat_interleave(self.shared_by, 0)
        return (-self.size * draw if kind == "key" else self.size * draw).exp().flatten()


def _check_shared(heads: int, shared_by: int) -> None:
    if heads % shared_by:
        raise LowraError(f"defence.heads is {heads}, which groups of defence.shared_by={shared_by} do not make up.")


def _head_width(size: int, heads: int, layer: str, *, even: bool) -> int:
    """The rows of a head; of planes of two where they have to be even."""
    if size % heads:
        raise LowraError(
            f"defence.heads is {heads}, which {size} rows of {layer!r} cannot be cut into; where several queries share "
            "a key and value, say how many with defence.shared_by."
        )
    if even and size // heads % 2:
        raise LowraError(f"A head of {layer!r} has {size // heads} rows; with defence.rope they come in pairs.")
    return size // heads


def applied(defence: Defence, stack: Tensor, layer: str, models: tuple[int, ...], seed: int) -> Tensor:
    """The stack (n, d, k) as it is released.

    Raises LowraError for a defence that changes a shape, or that makes a number none.
    """
    released = torch.empty_like(stack)
    for out, merged, model in zip(released, stack, models, strict=True):
        weight = defence.release(merged, Place(layer, model, seed))
        if not isinstance(weight, Tensor) or weight.shape != merged.shape:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise LowraError(
                f"Defence {type(defence).__name__} returns {found} for a weight {tuple(merged.shape)}; a release has "
                "the shape of the weight it stands for."
            )
        if not bool(torch.isfinite(weight).all()):
            raise LowraError(f"Defence {type(defence).__name__} returns NaN or infinity in layer {layer!r}.")
        out.copy_(weight)
    return released


def _rms(weight: Tensor) -> float:
    return float(weight.double().square().mean().sqrt())


def _component(like: Tensor, rank: int | None, generator: torch.Generator) -> Tensor:
    """A random matrix of the shape of another, of a rank or full, with a root mean square of about one."""
    d, k = like.shape
    if rank is None:
        return torch.randn(d, k, generator=generator)
    left, right = torch.randn(d, rank, generator=generator), torch.randn(rank, k, generator=generator)
    return (left @ right).div_(math.sqrt(rank))


_TYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def _lower(numbers: Tensor, name: str) -> Tensor:
    """The largest number of a format that is not above each number."""
    if name == "int8":
        return numbers.floor()
    near = numbers.to(_TYPES[name]).float()
    below = _step(near, name, down=True)
    return torch.where(near > numbers, below, near)


def _next(numbers: Tensor, name: str) -> Tensor:
    """The next number of a format above each of its numbers."""
    return numbers + 1 if name == "int8" else _step(numbers, name, down=False)


def _step(numbers: Tensor, name: str, *, down: bool) -> Tensor:
    """The neighbour of each number in a float format, by its bits: they count the numbers of each sign."""
    dtype = _TYPES[name]
    bits = numbers.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int8).int()
    sign = 1 << (8 * dtype.itemsize - 1)
    count = torch.where(bits < 0, -(bits + sign), bits)  # numbers in order, 0 at zero
    count = count - 1 if down else count + 1
    back = torch.where(count < 0, -count - sign, count)
    back = back.to(torch.int16 if dtype.itemsize == 2 else torch.int8)
    return back.view(dtype).float()

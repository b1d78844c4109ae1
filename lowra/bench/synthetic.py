"""`source=synthetic`: the true layer shapes of a family, with generated weights and LoRA updates.

Nothing is stored: every number is drawn from a generator seeded by what it belongs to (seed, family, layer, model), so
any layer can be made anywhere, in any order, with any of its models. Weight metrics only: there is no model to run.

Differences of merged models do not contain W, so of the base weights only the scale and the grid matter: they set the
rounding of the merge. Of the updates it is the size, the spectrum and what the models share that make recovery easy or
hard, and these are the parameters of `Family`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from lowra.bench.merging import DTYPES
from lowra.bench.schema import Layer, LayerInfo
from lowra.bench.updates import Update
from lowra.checks import Count, OneOf, Positive, Range, Seed, Share, check_fields
from lowra.errors import LowraError


@dataclass(frozen=True)
class Family:
    """What the layers of a subset look like: the entry `synthetic` of its file in conf/subset.

    name: the subset's, a part of every seed. base: the name of the pre-fine-tuning model they are modelled on.
    layers: groups of layers, see `layer_shapes`.
    grid: the format the base weights are published in (float32, bfloat16, float16). weight_rms: size of the base
        weights.
    rank, alpha: of the LoRAs. update_rms: size of an update M, the geometric middle over models.
    column_cosine, row_cosine: cosine between like singular vectors of two models' updates, on the B and the A side.
        Their product is the correlation of two updates as wholes.
    decay: smallest over largest singular value of an update; geometric in between.
    Raises LowraError for values that no layer can have.
    """

    name: str
    base: str
    layers: Sequence[Mapping[str, Any]]
    grid: Annotated[str, OneOf(tuple(DTYPES))]
    weight_rms: Positive
    rank: Count
    alpha: float
    update_rms: Positive
    column_cosine: Share
    row_cosine: Share
    decay: Annotated[float, Range(0, 1, above=True)] = 1e-2

    def __post_init__(self) -> None:
        check_fields(self, "subset.synthetic")
        smallest = min(min(d, k) for *_, d, k in self.shapes)
        if self.rank > smallest:
            raise LowraError(f"The layers of {self.name} hold ranks 1 to {smallest}; got rank={self.rank}.")

    @functools.cached_property
    def shapes(self) -> tuple[tuple[str, str, int, int], ...]:
        """(component, checkpoint key, d, k) of every layer, in the order of the network."""
        return layer_shapes(self.layers)


def layer_shapes(groups: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str, int, int], ...]:
    """Groups of layers as a config writes them, to (component, checkpoint key, d, k) of every layer.

    A group has `blocks`, names such as "model.layers.{0..31}.self_attn" whose braces stand for a range of numbers;
    `shapes`, the layers inside of each block as name: [d, k]; and `component` where the model has several (unet).
    Keys are "<block>.<name>.weight". Raises LowraError for a group that is none, or a layer named twice.
    """
    layers: list[tuple[str, str, int, int]] = []
    for group in groups:
        try:
            component = str(group.get("component") or "")
            blocks = [name for block in group["blocks"] for name in _expanded(str(block))]
            for block in blocks:
                for name, (d, k) in group["shapes"].items():
                    if not (type(d) is type(k) is int and d > 0 and k > 0):
                        raise ValueError
                    layers.append((component, f"{block}.{name}.weight", d, k))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise LowraError(
                f"subset.synthetic.layers holds {str(group)[:80]!r}; expected blocks: [NAME, ...] and shapes: "
                "{NAME: [d, k], ...}, and component: NAME where the model has several."
            ) from None
    if not layers or len({layer[:2] for layer in layers}) < len(layers):
        raise LowraError("subset.synthetic.layers names no layer, or one twice; every layer is named once.")
    return tuple(layers)


def _expanded(name: str) -> list[str]:
    """A name with a range of numbers in braces, "layers.{0..31}", as the names it stands for."""
    match = re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", name)
    if match is None:
        return [name]
    before, first, last, after = match.groups()
    return [before + str(i) + rest for i in range(int(first), int(last) + 1) for rest in _expanded(after)]


@dataclass(frozen=True)
class SyntheticTable:
    """A family's layers, generated on reading: the interface of `lowra.bench.schema.LayerTable`.

    n_models: LoRAs per layer. seed: of every number.
    norm_spread: largest over smallest size of the models' updates; each model's size is log-uniform in that range.
        Real LoRAs of one base differ by about 5 between four and by more between fifteen.
    shared_a: all models of a layer use one frozen A (the defence against recovery), instead of their own.
    """

    family: Family
    n_models: Annotated[int, Range(2)] = 15
    seed: Seed = 0
    norm_spread: Annotated[float, Range(1)] = 10.0
    shared_a: bool = False
    infos: tuple[LayerInfo, ...] = field(init=False, repr=False)
    model_names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self, "source.table")
        family = self.family
        ranks = (family.rank,) * self.n_models
        infos = tuple(LayerInfo(model, name, family.base, d, k, ranks) for model, name, d, k in family.shapes)
        object.__setattr__(self, "infos", infos)
        names = tuple(f"{family.name}-synthetic-{m:02d}" for m in range(self.n_models))
        object.__setattr__(self, "model_names", names)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Make one layer with the LoRAs asked for (positions in `model_names`; all by default)."""
        family, info = self.family, self.infos[index]
        weight = torch.randn(info.d, info.k, generator=self._generator(info.label, "weight"))  # (d, k)
        weight = weight.mul_(family.weight_rms).to(DTYPES[family.grid]).float()
        wanted = range(self.n_models) if models is None else models
        return Layer(info.model, info.name, info.pre_ft_name, weight, tuple(self._update(info, m) for m in wanted))

    def fingerprint(self) -> str:
        """A digest of the parameters, and of numbers drawn with them: a library that draws others changes it."""
        probe = torch.randn(64, generator=self._generator("probe"))
        parameters = f"{self!r}|{probe.tolist()}"
        return hashlib.sha256(parameters.encode()).hexdigest()[:16]

    def _generator(self, *parts: object) -> torch.Generator:
        """The generator of whatever the parts name, the same on every machine."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, self.family.name, *parts))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def _directions(self, size: int, cosine: float, own: torch.Generator, common: torch.Generator) -> Tensor:
        """Nearly orthonormal columns (size, r), each at the given cosine to its like in every other model."""
        rank = self.family.rank
        shared = torch.randn(size, rank, generator=common)
        single = torch.randn(size, rank, generator=own)
        return shared.mul_(math.sqrt(cosine / size)) + single.mul_(math.sqrt((1 - cosine) / size))  # (size, r)

    def _update(self, info: LayerInfo, model: int) -> Update:
        family = self.family
        d, k, rank = info.d, info.k, family.rank
        own = self._generator(info.label, "model", model)
        columns = self._directions(d, family.column_cosine, own, self._generator(info.label, "columns"))  # (d, r)
        if self.shared_a:
            own = self._generator(info.label, "shared A")
        rows = self._directions(k, family.row_cosine, own, self._generator(info.label, "rows"))  # (k, r)
        # A model trained longer or harder moves all its layers: one size a model, for every layer of it.
        exponent = float(torch.rand((), generator=self._generator("size", model))) - 0.5
        rms = family.update_rms * self.norm_spread**exponent
        values = torch.logspace(0, math.log10(family.decay), rank) if rank > 1 else torch.ones(1)  # (r,)
        values *= rms * math.sqrt(d * k) / torch.linalg.vector_norm(values) * rank / family.alpha
        return Update(self.model_names[model], rank, family.alpha, rows.mT.contiguous(), columns * values)

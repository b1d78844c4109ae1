"""`source=synthetic`: the true layer shapes of each family, with generated weights and LoRA updates.

Nothing is stored: every number is drawn from a generator seeded by what it belongs to (seed, family, layer, model), so
any layer can be made anywhere, in any order, with any of its models. Weight metrics only: there is no model to run.

Differences of merged models do not contain W, so of the base weights only the scale and the grid matter: they set the
rounding of the merge. Of the updates it is the size, the spectrum and what the models share that make recovery easy or
hard, and these are the parameters of `Family`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowra.bench.schema import Layer, LayerInfo, Lora
from lowra.errors import LowraError, unknown


@dataclass(frozen=True)
class Family:
    """What the layers of a subset look like.

    layers: (component, checkpoint key, d, k) of each. base: the pre-fine-tuning model they are modelled on.
    grid: the format the base weights are published in. weight_rms: size of the base weights.
    rank, alpha: of the LoRAs. update_rms: size of an update M, the geometric middle over models.
    column_cosine, row_cosine: cosine between like singular vectors of two models' updates, on the B and the A side.
        Their product is the correlation of two updates as wholes.
    decay: smallest over largest singular value of an update; geometric in between.
    """

    layers: tuple[tuple[str, str, int, int], ...]
    base: str
    grid: torch.dtype
    weight_rms: float
    rank: int
    alpha: float
    update_rms: float
    column_cosine: float
    row_cosine: float
    decay: float = 1e-2


def _vit_layers() -> tuple[tuple[str, str, int, int], ...]:
    """Query and value of the 12 blocks of ViT-B/16: 24 layers (Appendix D.1)."""
    return tuple(
        ("", f"vit.encoder.layer.{i}.attention.attention.{kind}.weight", 768, 768)
        for i in range(12)
        for kind in ("query", "value")
    )


def _stable_diffusion_layers() -> tuple[tuple[str, str, int, int], ...]:
    """The 192 attention-block layers of SD 1.5's UNet and the 72 of its CLIP text encoder (Appendix D.3)."""
    blocks = [(f"down_blocks.{b}.attentions.{a}", 320 * 2**b) for b in range(3) for a in range(2)]
    blocks += [("mid_block.attentions.0", 1280)]
    blocks += [(f"up_blocks.{b}.attentions.{a}", 320 * 2 ** (3 - b)) for b in (1, 2, 3) for a in range(3)]
    text_width = 768  # of the CLIP text encoder, which cross-attention (attn2) reads
    layers = []
    for block, width in blocks:
        inner = f"{block}.transformer_blocks.0"
        shapes = {f"{block}.proj_in": (width, width)}  # 1x1 convolution, as a matrix
        for attention, context in (("attn1", width), ("attn2", text_width)):
            shapes[f"{inner}.{attention}.to_q"] = (width, width)
            shapes[f"{inner}.{attention}.to_k"] = (width, context)
            shapes[f"{inner}.{attention}.to_v"] = (width, context)
            shapes[f"{inner}.{attention}.to_out.0"] = (width, width)
        shapes[f"{inner}.ff.net.0.proj"] = (8 * width, width)  # GEGLU: value and gate
        shapes[f"{inner}.ff.net.2"] = (width, 4 * width)
        shapes[f"{block}.proj_out"] = (width, width)
        layers += [("unet", f"{name}.weight", d, k) for name, (d, k) in shapes.items()]
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        for kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layers.append(("text_encoder", f"{layer}.self_attn.{kind}.weight", text_width, text_width))
        layers.append(("text_encoder", f"{layer}.mlp.fc1.weight", 4 * text_width, text_width))
        layers.append(("text_encoder", f"{layer}.mlp.fc2.weight", text_width, 4 * text_width))
    return tuple(layers)


def _mistral_layers() -> tuple[tuple[str, str, int, int], ...]:
    """Query, key, value and output of the 32 blocks of Mistral-7B: 128 layers (Appendix D.2); 8 key-value heads."""
    return tuple(
        ("", f"model.layers.{i}.self_attn.{kind}_proj.weight", d, 4096)
        for i in range(32)
        for kind, d in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096))
    )


# update_rms is the LoRA FT row of Tables 2 to 4: log10 of the mean square is -4.60, -6.92, -8.68 and -9.90.
# The product of the cosines follows from the Mean LoRA row: with n updates of correlation c the mean's error is
# (1 + (n - 1) c) / n of one model's, which gives c = 0.06, 0.05, 0.17 and 0.02. How it splits is our choice: B starts
# at zero and takes its directions from the data, which fine-tunes share, A starts at its own random numbers.
# weight_rms: from published checkpoints of ViT and SD 1.5 in order of magnitude; Mistral's from the error floor in
# Table 4 (-22.06 at n = 8 is the rounding of float32 numbers near 2e-3).
# Measured on this project's miniatures, for comparison (leading singular vectors, medians): column cosines 0.11, 0.19,
# 0.71 and 0.53, row cosines 0.13, 0.19, 0.47 and 0.18, in the order of the families below; largest over smallest update
# 2.5, 2.9, 1.3 and 1.4; decay 0.3 to 0.5 at rank 2 and 0.03 at rank 8.
# decay: four public rank-4 LoRAs of Stable Diffusion 2 fall to 0.3 at the fourth value; larger ranks go lower.
# rank and alpha: Tables 5 to 7; Stable Diffusion's rank is the one the paper finds, its alphas are not given.
FAMILIES: dict[str, Family] = {
    "vit": Family(
        layers=_vit_layers(),
        base="google/vit-base-patch16-224",
        grid=torch.float32,
        weight_rms=0.04,
        rank=16,
        alpha=16,
        update_rms=5.0e-3,
        column_cosine=0.3,
        row_cosine=0.2,
    ),
    "stable_diffusion": Family(
        layers=_stable_diffusion_layers(),
        base="runwayml/stable-diffusion-v1-5",
        grid=torch.float32,
        weight_rms=0.03,
        rank=32,
        alpha=32,
        update_rms=3.5e-4,
        column_cosine=0.25,
        row_cosine=0.2,
    ),
    "mistral_sft": Family(
        layers=_mistral_layers(),
        base="mistralai/Mistral-7B-v0.1",
        grid=torch.bfloat16,
        weight_rms=2e-3,
        rank=64,
        alpha=64,
        update_rms=4.6e-5,
        column_cosine=0.8,
        row_cosine=0.2,
    ),
    "mistral_dpo": Family(
        layers=_mistral_layers(),
        base="mistralai/Mistral-7B-v0.1",
        grid=torch.bfloat16,
        weight_rms=2e-3,
        rank=64,
        alpha=64,
        update_rms=1.1e-5,
        column_cosine=0.4,
        row_cosine=0.05,
    ),
}


@dataclass(frozen=True)
class SyntheticTable:
    """A family's layers, generated on reading: the interface of `lowra.bench.schema.LayerTable`.

    family: a key of `FAMILIES`. n_models: LoRAs per layer. seed: of every number.
    norm_spread: largest over smallest size of the models' updates; each model's size is log-uniform in that range.
        Real LoRAs of one base differ by about 5 between four and by more between fifteen.
    shared_a: all models of a layer use one frozen A (the defence against recovery), instead of their own.
    update_rms, column_cosine, row_cosine, decay: the family's, unless given (see `Family`).
    """

    family: str
    n_models: int = 15
    seed: int = 0
    norm_spread: float = 10.0
    shared_a: bool = False
    update_rms: float | None = None
    column_cosine: float | None = None
    row_cosine: float | None = None
    decay: float | None = None
    look: Family = field(init=False, repr=False)
    infos: tuple[LayerInfo, ...] = field(init=False, repr=False)
    model_names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unknown("synthetic family", self.family, FAMILIES)
        if self.n_models < 2:
            raise LowraError(f"A subset holds at least 2 models; got n_models={self.n_models}.")
        if not self.norm_spread >= 1:
            raise LowraError(f"norm_spread is largest over smallest and at least 1; got {self.norm_spread}.")
        given = {name: getattr(self, name) for name in ("update_rms", "column_cosine", "row_cosine", "decay")}
        family = replace(FAMILIES[self.family], **{name: value for name, value in given.items() if value is not None})
        if not (family.update_rms > 0 and 0 < family.decay <= 1):
            raise LowraError(
                f"update_rms is positive and decay in (0, 1]; got update_rms={family.update_rms}, decay={family.decay}."
            )
        if not (0 <= family.column_cosine <= 1 and 0 <= family.row_cosine <= 1):
            raise LowraError(
                f"Cosines are 0 to 1; got column_cosine={family.column_cosine}, row_cosine={family.row_cosine}."
            )
        object.__setattr__(self, "look", family)
        ranks = (family.rank,) * self.n_models
        infos = tuple(LayerInfo(model, name, family.base, d, k, ranks) for model, name, d, k in family.layers)
        object.__setattr__(self, "infos", infos)
        names = tuple(f"{self.family}-synthetic-{m:02d}" for m in range(self.n_models))
        object.__setattr__(self, "model_names", names)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, index: int, models: Sequence[int] | None = None) -> Layer:
        """Make one layer with the LoRAs asked for (positions in `model_names`; all by default)."""
        family, info = self.look, self.infos[index]
        weight = torch.randn(info.d, info.k, generator=self._generator(info.label, "weight"))  # (d, k)
        weight = weight.mul_(family.weight_rms).to(family.grid).float()
        wanted = range(self.n_models) if models is None else models
        return Layer(info.model, info.name, info.pre_ft_name, weight, tuple(self._lora(info, m) for m in wanted))

    def fingerprint(self) -> str:
        """A digest of the parameters, and of numbers drawn with them: a library that draws others changes it."""
        probe = torch.randn(64, generator=self._generator("probe"))
        parameters = f"{self!r}|{self.look!r}|{probe.tolist()}"
        return hashlib.sha256(parameters.encode()).hexdigest()[:16]

    def _generator(self, *parts: object) -> torch.Generator:
        """The generator of whatever the parts name, the same on every machine."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, self.family, *parts))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))

    def _directions(self, size: int, cosine: float, own: torch.Generator, common: torch.Generator) -> Tensor:
        """Nearly orthonormal columns (size, r), each at the given cosine to its like in every other model."""
        rank = self.look.rank
        shared = torch.randn(size, rank, generator=common)
        single = torch.randn(size, rank, generator=own)
        return shared.mul_(math.sqrt(cosine / size)) + single.mul_(math.sqrt((1 - cosine) / size))  # (size, r)

    def _lora(self, info: LayerInfo, model: int) -> Lora:
        family = self.look
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
        return Lora(self.model_names[model], rank, family.alpha, rows.mT.contiguous(), columns * values)

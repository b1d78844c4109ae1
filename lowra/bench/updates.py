"""What fine-tuning does to the weight of one layer: W -> W'. One class for every kind and every spelling of it.

The spellings on disk (the LoWRA-Bench schema, PEFT's adapter folders, kohya's and LyCORIS' files) all become an
`Update`. What a kind consists of stands in one table, `KINDS`; whoever merges goes through `Update.apply`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowra.errors import LowraError, unknown


@dataclass(frozen=True)
class Kind:
    """A way of fine-tuning, as `Update` holds it.

    title: its name in messages. factors: whether it has A (r, k) and B (d, r). tensors: what else it has, matrices by
    name, each with its shape in words for a (d, k) layer. one_of: whether it has one of these tensors instead of all.
    """

    title: str
    factors: bool
    tensors: Mapping[str, str] = field(default_factory=dict)
    one_of: bool = False

    def __str__(self) -> str:
        parts = ["A (r, k)", "B (d, r)"] * self.factors
        rest = [f"{name} {shape}" for name, shape in self.tensors.items()]
        return ", ".join(parts + ([" or ".join(rest)] if self.one_of else rest))


KINDS: Mapping[str, Kind] = {
    # Hu et al. 2021, W' = W + M with M = (alpha / r) B A; Kalajdzievski 2023: alpha / sqrt(r).
    "lora": Kind("LoRA", True),
    "rslora": Kind("rsLoRA", True),
    # Liu et al. 2024: the rows of W + M get the norms m, W' = diag(m / |W + M|_rows) (W + M). LyCORIS can do so with
    # columns instead.
    "dora": Kind("DoRA", True, {"magnitude": "(d, 1), or (1, k) for norms of columns"}),
    # Liu et al. 2022, (IA)^3: outputs scaled, W' = diag(c) W; or in feed-forward modules inputs, W' = W diag(c).
    "ia3": Kind("(IA)^3", False, {"scale": "(d, 1), or (1, k) for inputs"}),
    # Hyeon-Woo et al. 2022 (FedPara): W' = W + (w1_a w1_b) * (w2_a w2_b), entry by entry.
    "loha": Kind("LoHa", False, {"w1_a": "(d, r)", "w1_b": "(r, k)", "w2_a": "(d, r)", "w2_b": "(r, k)"}),
    # Edalati et al. 2022 (KronA), Yeh et al. 2024 (LyCORIS): W' = W + w1 (x) w2.
    "lokr": Kind("LoKr", False, {"w1": "(p, p')", "w2": "(q, q') with p q = d and p' q' = k"}),
    # Qiu et al. 2023: W' = W R (PEFT) or R W (LyCORIS); R is block-diagonal, its b x b blocks below one another here.
    "oft": Kind("OFT", False, {"input_blocks": "(k, b)", "output_blocks": "(d, b)"}, one_of=True),
    # Fine-tuning of the whole weight: W' = W + difference.
    "full": Kind("full fine-tuning", False, {"difference": "(d, k)"}),
}

_NONE = torch.empty(0, 0)


@dataclass(frozen=True)
class Update:
    """One update of one layer, W (d, k) -> W'.

    name: of the model it belongs to. rank: r of LoRA and its relatives; of LoHa and LoKr the largest that W' - W can
    have; 0 for kinds that limit none. alpha: as the adapter states it; factors other than A and B have their scale in
    them. A: (r, k) float32. B: (d, r) float32; both (0, 0) for kinds without. kind: of `KINDS`, which says with
    formulas and papers what each is. tensors: what else the kind has, float32 matrices by the names in `KINDS`.

    What other methods make is one of these: VeRA, PiSSA, OLoRA and MiCA end as plain LoRA (of rank 2r where W's own
    part is taken out first: `less`).

    Raises LowraError for a rank or an alpha that no update can have, and tensors that are not the kind's.
    """

    name: str
    rank: int
    alpha: float
    A: Tensor = _NONE
    B: Tensor = _NONE
    kind: str = "lora"
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of update", self.kind, KINDS)
        whose = f"LoRA {self.name!r}"
        if self.factors:
            check_alpha(self.alpha, check_rank(self.rank, f"The rank of {whose}"), f"The alpha of {whose}")
        known = KINDS[self.kind]
        fits = len(self.tensors) == 1 if known.one_of else set(self.tensors) == set(known.tensors)
        if not fits or not set(self.tensors) <= set(known.tensors):
            raise LowraError(
                f"The {known.title} update {self.name!r} holds {_listed(self.tensors) or 'no tensors'} beside A and B; "
                f"expected {known}."
            )

    @classmethod
    def of(cls, name: str, kind: str, tensors: Mapping[str, Tensor], rank: int = 0) -> Update:
        """An update of a kind without A and B."""
        return cls(name, rank, rank, kind=kind, tensors=tensors)

    @property
    def factors(self) -> bool:
        """Whether there are A and B."""
        return KINDS[self.kind].factors

    @property
    def adds(self) -> bool:
        """Whether W' - W is the same for every W: `delta`."""
        return self.kind not in ("dora", "ia3", "oft")

    @property
    def lora_alpha(self) -> float:
        """The alpha of plain LoRA that says the same: lora_alpha / r is the scale, whatever the kind."""
        return self.alpha * math.sqrt(self.rank) if self.kind == "rslora" else self.alpha

    @property
    def scale(self) -> float:
        """The factor on B A; 1 for kinds without."""
        return self.lora_alpha / self.rank if self.factors else 1.0

    @property
    def idle(self) -> bool:
        """Whether it changes nothing whatever W is, as an adapter that was never trained."""
        if self.kind == "ia3":
            return bool((self.tensors["scale"] == 1).all())
        if self.kind == "oft":
            blocks = _blocks(next(iter(self.tensors.values())))
            return torch.equal(blocks, torch.eye(blocks.shape[1]).expand_as(blocks))
        if self.kind == "dora":
            return False  # magnitudes change the weight as well
        parts = [self.A, self.B] if self.factors else list(self.tensors.values())
        return self.scale == 0 or not all(part.any() for part in parts)

    def limit(self, d: int, k: int) -> int:
        """The rank an attacker can be told for a (d, k) layer: of M, or the smaller side where none is fixed."""
        return self.rank if self.factors else min(self.rank or d, d, k)

    def misfit(self, d: int, k: int) -> str | None:
        """What is wrong with it for a (d, k) layer, as the end of a sentence; None where it fits."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if self.factors and (self.B.shape[:1] + self.A.shape[1:] != (d, k) or self.A.shape[0] != self.B.shape[1]):
            return f"by a {self.B.shape[0]} x {self.A.shape[1]} matrix"
        if any(len(shape) != 2 for shape in shapes.values()) or not self._fits(d, k):
            return f"with {_listed(self.tensors)}, where {KINDS[self.kind].title} has {KINDS[self.kind]}"
        return None

    def _fits(self, d: int, k: int) -> bool:
        """Whether the tensors, all matrices, are those of a (d, k) layer."""
        shape = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        match self.kind:
            case "dora" | "ia3":
                return next(iter(shape.values())) in ((d, 1), (1, k))
            case "loha":
                ranks = [(shape[f"w{i}_a"][1], shape[f"w{i}_b"][0]) for i in (1, 2)]
                sides = [(shape[f"w{i}_a"][0], shape[f"w{i}_b"][1]) for i in (1, 2)]
                return all(a == b for a, b in ranks) and sides == [(d, k)] * 2
            case "lokr":
                (p, p_), (q, q_) = shape["w1"], shape["w2"]
                return (p * q, p_ * q_) == (d, k)
            case "oft":
                ((name, (rows, size)),) = shape.items()
                return rows == (k if name == "input_blocks" else d) and rows % size == 0
            case "full":
                return shape["difference"] == (d, k)
        return True

    # ---- What it does -------------------------------------------------------------------------------------------

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The part that is added, M (d, k): W' - W for most kinds, scale B A before the norms are set for DoRA.

        It is computed in float32, as the paper does, or in float64 where `dtype` says so, then rounded to `dtype`.
        Raises LowraError for kinds that only multiply.
        """
        at = torch.float64 if dtype == torch.float64 else torch.float32
        if self.factors:
            return (self.B.to(at) @ self.A.to(at)).mul_(self.scale).to(dtype)  # (d, k)
        parts = {name: tensor.to(at) for name, tensor in self.tensors.items()}
        match self.kind:
            case "loha":
                made = (parts["w1_a"] @ parts["w1_b"]).mul_(parts["w2_a"] @ parts["w2_b"])
            case "lokr":
                made = torch.kron(parts["w1"], parts["w2"])
            case "full":
                made = parts["difference"].clone()  # a caller may add to it in place
            case _:
                raise LowraError(f"{KINDS[self.kind].title} multiplies the weight and adds nothing to it.")
        return made.to(dtype)

    def difference(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' - W (d, k) for the weight W (d, k), computed in float32 (float64 where `dtype` says so), then rounded."""
        if self.adds:
            return self.delta(dtype)
        wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return self.apply(wide).sub_(wide).to(dtype)

    def apply(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The fine-tuned weight W' (d, k) from the weight W (d, k) before; written into `out` if given.

        In float32, as whoever merges does, unless W is float64.
        """
        wide = weight.dtype == torch.float64
        if self.kind in ("lora", "rslora") and not wide:
            update = torch.mm(self.B, self.A, out=out)
            return (update if self.scale == 1 else update.mul_(self.scale)).add_(weight)
        weight = weight if wide else weight.float()
        if self.kind == "ia3":
            merged = weight * self._part("scale", weight)
        elif self.kind == "oft":
            merged = self._rotated(weight)
        else:
            merged = self.delta(weight.dtype).add_(weight)
            if self.kind == "dora":
                merged.mul_(self._rescaling(merged))
        return merged if out is None else out.copy_(merged)

    def undo(self, merged: Tensor, weight: Tensor) -> Tensor:
        """W (d, k) float64 again from a W' (d, k), rounded somehow: all of the update is known, M and scales.

        weight: the true W, for the scales that depend on it (DoRA's).
        """
        merged = merged.double()
        if self.kind == "ia3":
            return merged / self._part("scale", merged)
        if self.kind == "oft":
            return self._rotated(merged, back=True)
        moved = self.delta(torch.float64)
        if self.kind == "dora":
            merged = merged / self._rescaling(weight.double() + moved)
        return merged - moved

    def less(self, a: Tensor, b: Tensor) -> Update:
        """The update that takes scale b a out of W and then adds itself: a plain LoRA, of rank r more.

        a: (r, k), b: (d, r). PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) train so from W's own parts.
        """
        return lora(self.name, torch.cat([self.A, a]), torch.cat([self.B, -b], 1), self.scale)

    @property
    def T(self) -> Update:
        """The same update of the transposed layer, for weights stored as (in, out)."""
        swap = {"w1_a": "w1_b", "w1_b": "w1_a", "w2_a": "w2_b", "w2_b": "w2_a"}
        swap |= {"input_blocks": "output_blocks", "output_blocks": "input_blocks"}
        turn = lambda x: _blocks(x).mT.reshape(x.shape) if self.kind == "oft" else x.mT.contiguous()  # noqa: E731
        tensors = {swap.get(name, name): turn(tensor) for name, tensor in self.tensors.items()}
        return replace(self, A=self.B.mT.contiguous(), B=self.A.mT.contiguous(), tensors=tensors)

    def _part(self, name: str, like: Tensor) -> Tensor:
        return self.tensors[name].to(like.dtype)

    def _rescaling(self, moved: Tensor) -> Tensor:
        """DoRA's factors on the rows (d, 1), or columns (1, k), of W + M."""
        magnitude = self._part("magnitude", moved)
        return magnitude / moved.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)

    def _rotated(self, weight: Tensor, back: bool = False) -> Tensor:
        """W R or R W, or with the inverse of R."""
        ((name, stored),) = self.tensors.items()
        blocks = _blocks(stored.to(weight.dtype))  # (n, b, b)
        blocks = torch.linalg.inv(blocks) if back else blocks
        n, size, _ = blocks.shape
        d, k = weight.shape
        if name == "input_blocks":
            return torch.einsum("dnb,nbc->dnc", weight.reshape(d, n, size), blocks).reshape(d, k)
        return (blocks @ weight.reshape(n, size, k)).reshape(d, k)


def lora(name: str, a: Tensor, b: Tensor, scale: float = 1.0) -> Update:
    """The plain LoRA W' = W + scale b a of factors a (r, k) and b (d, r).

    Where r is larger than a side of the layer, as VeRA's may be, the factors are multiplied out to that side's length.
    """
    d, k = b.shape[0], a.shape[1]
    if a.shape[0] > min(d, k):
        a, b = (b @ a, torch.eye(d)) if d <= k else (torch.eye(k), b @ a)
    return Update(name, a.shape[0], scale * a.shape[0], a.contiguous(), b.contiguous())


def _blocks(stacked: Tensor) -> Tensor:
    """Square blocks (n, b, b), stored below one another as (n b, b)."""
    return stacked.reshape(-1, stacked.shape[1], stacked.shape[1])


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def check_rank(value: object, what: str) -> int:
    """A stored rank as a whole number; raises LowraError, beginning with `what`, when it is none or below 1."""
    number = _number(value)
    if number is None or not number.is_integer() or number < 1:
        raise LowraError(f"{what} is {_shown(value)}; expected a whole number, 1 or more.")
    return int(number)


def check_alpha(value: object, rank: int, what: str) -> float:
    """A stored alpha as a number; raises LowraError, beginning with `what`, when float32 cannot hold alpha / r."""
    number = _number(value)
    if number is None or not abs(number) / rank <= torch.finfo(torch.float32).max:
        raise LowraError(f"{what} is {_shown(value)}; expected a finite number (the rank itself for a scale of 1).")
    return number


def _number(value: object) -> float | None:
    """A real number as a float; None for anything else, and for what no float holds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _shown(value: object) -> str:
    """A value in a message: what it is, not all of it."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

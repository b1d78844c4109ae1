"""What fine-tuning does to the weight of one layer: W -> W'. One class for every spelling of it.

The spellings on disk (the LoWRA-Bench schema, PEFT's adapter folders, kohya's files) all become an `Update`.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.errors import LowraError, unknown

KINDS = ("lora", "rslora")


@dataclass(frozen=True)
class Update:
    """One low-rank update of one layer, W' = W + scale B A.

    name: of the model it belongs to. rank: r. alpha: as the adapter states it. A: (r, k) float32. B: (d, r) float32.
    kind: "lora", scale alpha / r (Hu et al. 2021), or "rslora", scale alpha / sqrt(r) (Kalajdzievski 2023).

    DoRA (Liu et al. 2024) is not read yet. It fits here as a third kind with a field `magnitude` (d,): its `apply`
    rescales the rows of W + M to these norms, and `delta`, the part added before, stays as it is. Whoever merges goes
    through `apply` and knows nothing of kinds.

    Raises LowraError for a rank or an alpha that no update can have.
    """

    name: str
    rank: int
    alpha: float
    A: Tensor
    B: Tensor
    kind: str = "lora"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of update", self.kind, KINDS)
        whose = f"LoRA {self.name!r}"
        check_alpha(self.alpha, check_rank(self.rank, f"The rank of {whose}"), f"The alpha of {whose}")

    @property
    def lora_alpha(self) -> float:
        """The alpha of plain LoRA that says the same: lora_alpha / r is the scale, whatever the kind."""
        return self.alpha * math.sqrt(self.rank) if self.kind == "rslora" else self.alpha

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.lora_alpha / self.rank

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update M = scale B A, (d, k).

        It is computed in float32, as the paper does, or in float64 where `dtype` says so, then rounded to `dtype`.
        """
        at = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.B.to(at) @ self.A.to(at)).mul_(self.scale).to(dtype)  # (d, k)

    def apply(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The fine-tuned weight W' (d, k), float32, from the weight W (d, k) before; written into `out` if given."""
        update = torch.mm(self.B, self.A, out=out)
        return (update if self.scale == 1 else update.mul_(self.scale)).add_(weight)


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

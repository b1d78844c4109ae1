"""What a recovery method is: the attacker's side of the benchmark.

A method sees an `Observation` and returns a `Recovery`. The true weight, the LoRA factors and the names of models
and layers live on the judge's side (`lowra.bench`, `lowra.metrics`) and never cross this boundary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowra.errors import LowraError

Stat = float | int | str | bool | None


@dataclass(frozen=True)
class Observation:
    """All an attacker has of one layer.

    merged: (n, d, k) float32, the merged weights W'_i = W + (alpha_i / r_i) B_i A_i of n fine-tuned models.
    rank: the LoRA rank where the setting grants it, else None.
    seed: for methods that draw random numbers; the same for every method of a draw and layer.
    storage: dtype the published W'_i were stored in before they were read into float32 (their rounding grid).
        The attacker sees it in the checkpoint file's header.
    watch: where the judge looks over an iterative method's shoulder: a method that keeps a history shows it its W
        (d, k) once per entry. It gives nothing back.
    """

    merged: Tensor
    rank: int | None = None
    seed: int = 0
    storage: torch.dtype = torch.float32
    watch: Callable[[Tensor], None] | None = field(default=None, compare=False, repr=False)


@dataclass
class Recovery:
    """What a method returns for one layer.

    candidates: (c, d, k), float32 or float64; the scores are averaged over the c candidates (most methods have one).
    status: "ok", or the method's own sentence on how far its answer can be trusted.
    stats: scalars that become columns `stat_<key>` of `layers.parquet`; a key's values are of one type in all layers.
    history: per-step numbers (one dict a step) for methods that keep them when asked.
    sure: (d, k) bool, the weights that the method holds for exact beyond reasonable doubt, where it can tell.
    """

    candidates: Tensor
    status: str = "ok"
    stats: dict[str, Stat] = field(default_factory=dict)
    history: list[dict[str, float]] | None = None
    sure: Tensor | None = None


@runtime_checkable
class Method(Protocol):
    """A recovery method: hyperparameters are its fields, run state is local to `recover`.

    Implementations are frozen dataclasses in a module named as their config key. `pretty` is the name in tables,
    `reference` where the method is described. Setting `needs_rank = True` makes the run fail early, not in the
    middle, when the setting does not grant the rank.

    A method may also have `recover_batch(observations)`, a list of what `recover` gives for each, bit for bit, where it
    is faster to recover several layers of one draw, shape and granted rank at once. Small layers are given to it so.
    """

    @property
    def pretty(self) -> str:
        """Name in tables and legends."""
        ...

    @property
    def reference(self) -> str:
        """Where the method is described."""
        ...

    @property
    def needs_rank(self) -> bool:
        """Whether it cannot work without `Observation.rank`."""
        ...

    def recover(self, observation: Observation) -> Recovery:
        """Estimate the shared pre-fine-tuning weight of one layer."""
        ...


@dataclass(frozen=True)
class FunctionMethod:
    """A plain function of the stack `(n, d, k)` made into a method.

    The function may also ask for `rank`, `seed` or `storage` by naming a parameter so; what a `functools.partial` has
    fixed already stays as it is. It returns `(d, k)`, or `(c, d, k)` for several candidates.
    """

    function: Callable[..., Tensor]
    pretty: str
    reference: str = ""
    needs_rank: bool = False

    def recover(self, observation: Observation) -> Recovery:
        """Call the function with what it asks for."""
        granted = {"rank": observation.rank, "seed": observation.seed, "storage": observation.storage}
        wanted = _asked(self.function)
        weight = self.function(observation.merged, **{k: v for k, v in granted.items() if k in wanted})
        if not isinstance(weight, Tensor):
            raise TypeError(f"returned a {type(weight).__name__}; expected a tensor (d, k) or (candidates, d, k)")
        return Recovery(weight if weight.ndim == 3 else weight.unsqueeze(0))  # (c, d, k)


@dataclass(frozen=True)
class ObjectMethod:
    """An object with `recover(observation)` that lacks some of a method's names, given them."""

    target: Any
    pretty: str
    reference: str = ""
    needs_rank: bool = False

    def recover(self, observation: Observation) -> Recovery:
        """The object's own."""
        return self.target.recover(observation)  # type: ignore[no-any-return]

    @property
    def recover_batch(self) -> Callable[[Sequence[Observation]], list[Recovery]]:
        """The object's own; raises AttributeError where it has none."""
        return self.target.recover_batch  # type: ignore[no-any-return]


GRANTED = ("rank", "seed", "storage")


def as_method(target: Any, name: str) -> Method:
    """Turn what a config's `_target_` made into a `Method`, or say in one sentence why it is none.

    Accepts an object with `recover(observation)`, or a callable of the stack (`_partial_: true` in the config).
    """
    if callable(getattr(target, "recover", None)):
        _bind(target.recover, name, "the observation", {})
        if all(hasattr(target, attribute) for attribute in ("pretty", "reference", "needs_rank")):
            return _named(target, name)
        pretty, reference = getattr(target, "pretty", name), getattr(target, "reference", "")
        return _named(ObjectMethod(target, pretty, reference, getattr(target, "needs_rank", False)), name)
    if callable(target):
        _signature(target, name)
        asked = _asked(target)
        _bind(target, name, "the stack (n, d, k)", dict.fromkeys(asked))
        bare = target
        while isinstance(bare, functools.partial):
            bare = bare.func
        needs = "rank" in asked and asked["rank"].default is inspect.Parameter.empty
        return _named(FunctionMethod(target, getattr(bare, "pretty", name), needs_rank=needs), name)
    raise LowraError(
        f"Method {name!r} is a {type(target).__name__}; expected an object with recover(observation), "
        "or a function of the stack (n, d, k) given with `_partial_: true`."
    )


def _named(method: Method, name: str) -> Method:
    """The method, what it says of itself checked."""
    for key, kind, expected in (
        ("pretty", str, "a text"),
        ("reference", str, "a text"),
        ("needs_rank", bool, "True or False"),
    ):
        if not isinstance(value := getattr(method, key), kind):
            raise LowraError(f"Method {name!r}: {key} is a {type(value).__name__}; expected {expected}.")
    return method


def _signature(function: Callable[..., Any], name: str) -> inspect.Signature:
    """What a function asks for; raises LowraError for functions of C, which do not say."""
    try:
        return inspect.signature(function)
    except ValueError as error:
        raise LowraError(
            f"Method {name!r}: {error}. Give a function of your own, `def mine(stack): ...`, that calls it."
        ) from None


def _asked(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters among `GRANTED` that a function names and that no partial has fixed."""
    fixed: set[str] = set()
    bare = function
    while isinstance(bare, functools.partial):
        fixed |= set(bare.keywords)
        bare = bare.func
    parameters = inspect.signature(function).parameters
    return {name: parameters[name] for name in GRANTED if name in parameters and name not in fixed}


def _bind(function: Callable[..., Any], name: str, first: str, granted: dict[str, None]) -> None:
    """Raise LowraError when a function cannot be called with `first` and what it is granted."""
    signature = _signature(function, name)
    if not signature.parameters:
        raise LowraError(f"Method {name!r} takes no argument; a method takes {first} first.")
    try:
        signature.bind(None, **granted)
    except TypeError as error:
        raise LowraError(
            f"Method {name!r} cannot be called with {first}: {error}. Beside it a function may ask for "
            f"{', '.join(GRANTED)}; anything else needs a default, or a value in the method's config."
        ) from None


def check_observation(observation: Observation) -> None:
    """Refuse a stack no method can work on, with the reason.

    Raises LowraError for fewer than two models, non-floating or non-finite weights, or a rank above min(d, k).
    """
    merged = observation.merged
    if merged.ndim != 3:
        raise LowraError(f"A stack of merged weights has shape (n, d, k); got {tuple(merged.shape)}.")
    if not merged.is_floating_point():
        raise LowraError(
            f"The merged weights are {merged.dtype}; expected floating point (dequantise quantised weights first)."
        )
    n, d, k = merged.shape
    if n < 2:
        raise LowraError(f"Recovery compares models and needs at least 2; got {n}.")
    # A sum is finite only if every term is (sums of weights do not overflow), and unlike isfinite it makes no copies.
    if not all(math.isfinite(float(weight.sum(dtype=torch.float32))) for weight in merged):
        raise LowraError("The merged weights contain NaN or infinity; check the files they were read from.")
    if observation.rank is not None and not 1 <= observation.rank <= min(d, k):
        raise LowraError(f"Rank {observation.rank} does not fit a {d} x {k} layer; expected 1 to {min(d, k)}.")


def check_recovery(recovery: Any, shape: torch.Size | tuple[int, int]) -> Tensor:
    """The candidates of what a method returned, detached on the CPU. Raises TypeError or ValueError with the reason.

    shape: (d, k), expected of each candidate.
    """
    if not isinstance(recovery, Recovery):
        raise TypeError(f"recover returned a {type(recovery).__name__}; expected a Recovery")
    candidates = recovery.candidates
    if not isinstance(candidates, Tensor):
        raise TypeError(f"candidates is a {type(candidates).__name__}; expected a tensor (candidates, d, k)")
    if candidates.layout != torch.strided or candidates.is_quantized or not candidates.is_floating_point():
        raise TypeError(
            f"candidates is a {candidates.layout} tensor of {candidates.dtype}; expected a dense one of real "
            "floating-point numbers"
        )
    if candidates.ndim != 3 or tuple(candidates.shape[1:]) != tuple(shape) or not len(candidates):
        raise ValueError(
            f"returned shape {tuple(candidates.shape)}; expected (candidates, {shape[0]}, {shape[1]}) "
            "with at least one candidate"
        )
    if not isinstance(recovery.status, str):
        raise TypeError(f"status is a {type(recovery.status).__name__}; expected a sentence")
    _check_numbers(recovery.stats, "stats", text=True)
    if recovery.history is not None:
        if not isinstance(recovery.history, list | tuple):
            raise TypeError(
                f"history is a {type(recovery.history).__name__}; expected a list with a dict for each step"
            )
        for step in recovery.history:
            _check_numbers(step, "a step of history", text=False)
    return candidates.detach().cpu()


def _check_numbers(values: Any, what: str, *, text: bool) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} is a {type(values).__name__}; expected a dict of numbers")
    kinds = (bool, int, float, str, type(None)) if text else (bool, int, float)
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, kinds):
            raise TypeError(f"{what} holds {name!r}: {type(value).__name__}; expected plain numbers under names")

"""For authors of methods: `check_method(my_method)` tries the contract that the benchmark relies on.

from lowra.testing import check_method
check_method(my_method)  # a function of the stack (n, d, k), or an object with recover(observation)
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowra.errors import LowraError
from lowra.methods import Method, Observation, Recovery, as_method, check_recovery
from lowra.metrics.weight_error import weight_error

SHAPE = (48, 40)
RANK = 2
MODELS = 4


def planted(n: int = MODELS, *, transposed: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight (d, k) and the stack (n, d, k) of its merges with n random updates of rank 2, stored in a dtype."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * 0.04
    weight = weight.to(dtype).float()
    stack = []
    for _ in range(n):
        left, right = (torch.randn(size, RANK, generator=generator) for size in SHAPE)  # (d, r), (k, r)
        stack.append((weight + 0.01 * left @ right.mT).to(dtype).float())
    merged = torch.stack(stack)  # (n, d, k)
    return (weight.mT.contiguous(), merged.mT.contiguous()) if transposed else (weight, merged)


class ContractError(AssertionError):
    """What a method does not keep, a line each."""


def check_method(
    method: Any, *, order_tolerance: float = 0.5, transposes: bool = False, known: Mapping[str, str] | None = None
) -> Method:
    """Try the contract of a method; raises `ContractError` listing all that it does not keep.

    method: a function of the stack (n, d, k), or an object with `recover(observation)`. order_tolerance: by how much
    the W-Error (log10) may change with the order of the models. transposes: whether the method claims to recover W^T
    from transposed merges. known: checks that are known to fail, with the reason; they must fail.
    Returns the method as the benchmark uses it.
    """
    try:
        made = as_method(method, getattr(method, "__name__", type(method).__name__))
    except LowraError as error:
        raise ContractError(str(error)) from None
    expected = dict(known or {})
    wrong = []
    checks = _checks(made, order_tolerance, transposes)
    for name, check in checks:
        try:
            check()
        except Exception as error:
            text = " ".join(f"{error if isinstance(error, AssertionError) else repr(error)}".split())
            if name not in expected:
                wrong.append(f"{name}: {text}")
            expected.pop(name, None)
    wrong += [f"{name}: known to fail ({reason}), and does not" for name, reason in expected.items()]
    if wrong:
        raise ContractError(f"{made.pretty} does not keep the contract of a method:\n" + "\n".join(wrong))
    return made


def _checks(method: Method, order_tolerance: float, transposes: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and checks, each a function that raises."""
    weight, stack = planted()
    rank = RANK
    seen: dict[str, set[str]] = {}

    def recover(observation: Observation) -> Tensor:
        recovery = method.recover(observation)
        candidates = check_recovery(recovery, observation.merged.shape[1:])
        _note(recovery, seen)
        return candidates

    def answers() -> None:
        candidates = recover(Observation(stack.clone(), rank))
        if candidates.dtype not in (torch.float32, torch.float64):
            raise AssertionError(f"answers in {candidates.dtype}; expected float32 or float64")
        if not bool(torch.isfinite(candidates).all()):
            raise AssertionError("the answer holds NaN or infinity")

    def hands_off() -> None:
        merged = stack.clone()
        recover(Observation(merged, rank))
        if not torch.equal(merged, stack) or merged._version:
            raise AssertionError("writes into observation.merged; work on a clone")

    def unknown_rank() -> None:
        if not method.needs_rank:
            recover(Observation(stack.clone(), None))

    def two_models() -> None:
        try:
            recover(Observation(stack[:2].clone(), rank))
        except LowraError:
            pass  # a refusal in a sentence
        except Exception as error:
            raise AssertionError(f"two models end in {error!r}; expected an answer, or a LowraError") from None

    def determinism() -> None:
        first, second = (recover(Observation(stack.clone(), rank, seed=7)) for _ in range(2))
        if not torch.equal(first, second):
            raise AssertionError("the same seed gives another answer")

    def own_random_numbers() -> None:
        torch.manual_seed(123)
        before = torch.get_rng_state()
        recover(Observation(stack.clone(), rank, seed=7))
        if not torch.equal(before, torch.get_rng_state()):
            raise AssertionError("draws from the global generator; use observation.seed")

    def order() -> None:
        errors = []
        for chosen in (stack, stack.flip(0)):
            candidates = recover(Observation(chosen.clone(), rank))
            errors.append(sum(weight_error(candidate, weight) for candidate in candidates) / len(candidates))
        if not abs(errors[0] - errors[1]) <= order_tolerance:
            raise AssertionError(
                f"W-Error {errors[0]:.3f} becomes {errors[1]:.3f} with the models in reverse order; allowed are "
                f"{order_tolerance}"
            )

    def types() -> None:
        for storage in (torch.float32, torch.bfloat16):
            _, other = planted(dtype=storage)
            for n in (MODELS, 3):
                for known in {rank, rank if method.needs_rank else None}:
                    recover(Observation(other[:n].clone(), known, storage=storage))
        mixed = {name: kinds for name, kinds in seen.items() if len(kinds - {"NoneType"}) > 1}
        if mixed:
            name, kinds = next(iter(mixed.items()))
            raise AssertionError(f"statistic {name!r} is {' and '.join(sorted(kinds))}; one type (or None) is expected")

    def sent() -> None:
        again = pickle.loads(pickle.dumps(method))
        candidates = check_recovery(again.recover(Observation(stack.clone(), rank)), weight.shape)
        if not torch.equal(candidates, recover(Observation(stack.clone(), rank))):
            raise AssertionError("a pickled copy, as worker processes get, gives another answer")

    def transpose() -> None:
        turned, turned_stack = planted(transposed=True)
        candidates = recover(Observation(turned_stack, rank))
        straight = weight_error(recover(Observation(stack.clone(), rank))[0], weight)
        error = weight_error(candidates[0], turned)
        if not (math.isfinite(error) and abs(error - straight) <= order_tolerance):
            raise AssertionError(f"W-Error {straight:.3f} becomes {error:.3f} with the layer transposed")

    def together() -> None:
        batch = getattr(method, "recover_batch", None)
        if batch is None:
            return
        layers = [Observation(stack * scale, rank, seed=seed) for seed, scale in enumerate((1.0, 0.5, 2.0))]
        recoveries = batch([replace(layer, merged=layer.merged.clone()) for layer in layers])
        if len(recoveries) != len(layers):
            raise AssertionError(f"recover_batch returned {len(recoveries)} recoveries of {len(layers)} layers")
        for layer, recovery in zip(layers, recoveries, strict=True):
            if not torch.equal(check_recovery(recovery, weight.shape), recover(layer)):
                raise AssertionError("recover_batch gives another answer than recover")

    checks = [
        answers,
        hands_off,
        unknown_rank,
        two_models,
        determinism,
        own_random_numbers,
        order,
        types,
        sent,
        together,
    ]
    yield from ((check.__name__, check) for check in [*checks, *([transpose] if transposes else [])])


def _note(recovery: Recovery, seen: dict[str, set[str]]) -> None:
    for name, value in recovery.stats.items():
        seen.setdefault(name, set()).add(type(value).__name__)


__all__ = ["ContractError", "check_method", "planted"]

"""The contract's checks find what they look for, and every shipped method keeps it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lowra.methods import Observation, Recovery
from lowra.paths import conf_dir, register_resolvers
from lowra.testing import ContractError, check_method

SHIPPED = sorted(path.stem for path in (conf_dir() / "methods").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_method_keeps_the_contract(name: str) -> None:
    register_resolvers()
    cfg = OmegaConf.create({"subset": {"steps": 100}})
    cfg["method"] = OmegaConf.load(conf_dir() / "methods" / f"{name}.yaml")
    # The exact method uses Spectral DeTuning for bfloat16 merges, whose path depends on the order of its random draws.
    check_method(instantiate(cfg.method), transposes=True)


def mean(stack: torch.Tensor) -> torch.Tensor:
    return stack.mean(0)


def test_a_function_that_keeps_it() -> None:
    assert check_method(mean).pretty == "mean"


class Counted:
    """Answers differently every time."""

    def __init__(self) -> None:
        self.calls = 0

    def recover(self, observation: Observation) -> Recovery:
        self.calls += 1
        return Recovery(observation.merged.mean(0, keepdim=True) + self.calls, stats={"calls": self.calls})


def writes(stack: torch.Tensor) -> torch.Tensor:
    return stack.mul_(2).mean(0)


def first(stack: torch.Tensor) -> torch.Tensor:
    return stack[0] * 3 if len(stack) > 2 else stack[0]


def complex_answer(stack: torch.Tensor) -> torch.Tensor:
    return stack.mean(0).to(torch.complex64)


def flat(stack: torch.Tensor) -> torch.Tensor:
    return stack.mean(0).flatten()


def draws(stack: torch.Tensor) -> torch.Tensor:
    return stack.mean(0) + torch.randn(stack.shape[1:])


def lost_with_two(stack: torch.Tensor) -> torch.Tensor:
    return stack[[0, 1, 2]].mean(0)


def median_of_first(stack: torch.Tensor) -> torch.Tensor:
    return stack[0] + 10 * (stack[0] - stack[-1]).abs().max() * (stack[0, 0, 0] > stack[-1, 0, 0])


def needs_more(stack: torch.Tensor, strength: float) -> torch.Tensor:
    return stack.mean(0) * strength


class MixedStats:
    """A statistic that is a number or a word."""

    def recover(self, observation: Observation) -> Recovery:
        value: Any = 1.5 if len(observation.merged) == 3 else "many"
        return Recovery(observation.merged.mean(0, keepdim=True), stats={"x": value})


class OtherTogether:
    """Answers otherwise for several layers at once."""

    def recover(self, observation: Observation) -> Recovery:
        return Recovery(observation.merged.mean(0, keepdim=True))

    def recover_batch(self, observations: list[Observation]) -> list[Recovery]:
        return [Recovery(each.merged.mean(0, keepdim=True) * (1 + 1e-6 * i)) for i, each in enumerate(observations)]


class FewerTogether(OtherTogether):
    """Loses a layer where there are several."""

    def recover_batch(self, observations: list[Observation]) -> list[Recovery]:
        return super().recover_batch(observations)[1:]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (OtherTogether(), "together: recover_batch gives another answer than recover"),
        (FewerTogether(), "together: recover_batch returned 2 recoveries of 3 layers"),
        (Counted(), "determinism: the same seed gives another answer"),
        (writes, r"hands_off: writes into observation\.merged"),
        (complex_answer, "answers: .*complex64; expected a dense one of real"),
        (flat, r"answers: .*expected \(candidates, 48, 40\)"),
        (draws, "own_random_numbers: draws from the global generator"),
        (lost_with_two, "two_models: two models end in IndexError"),
        (median_of_first, "order: W-Error .* with the models in reverse order"),
        (needs_more, "cannot be called with the stack .*strength"),
        (MixedStats(), "types: statistic 'x' is float and str"),
        (lambda stack: stack.mean(0), "sent: "),
        (5, "is a int; expected an object with recover"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__) if not isinstance(value, str) else "",
)
def test_what_is_not_kept_is_named(method: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_method(method)


def test_known_failures_are_declared_and_must_fail() -> None:
    check_method(functools.partial(lost_with_two), known={"two_models": "needs three"})
    with pytest.raises(ContractError, match=r"two_models: known to fail \(needs three\), and does not"):
        check_method(mean, known={"two_models": "needs three"})

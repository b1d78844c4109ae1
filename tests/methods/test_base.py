"""What every method gets and gives: the shared checks, and functions made into methods."""

import functools

import pytest
import torch

from lowra.errors import LowraError
from lowra.methods.base import FunctionMethod, Method, Observation, as_method, check_observation
from lowra.methods.lora_ft import LoraFT
from lowra.methods.mean_lora import MeanLora
from lowra.methods.spectral_detuning import SpectralDeTuning

STACK = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))  # (n, d, k)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (Observation(STACK[0]), r"shape \(n, d, k\); got \(6, 5\)"),
        (Observation(STACK[:1]), "at least 2; got 1"),
        (Observation((STACK * 10).to(torch.int8)), "torch.int8; expected floating point"),
        (Observation(torch.full((3, 6, 5), torch.nan)), "NaN or infinity"),
        (Observation(torch.where(STACK > 1, torch.inf, STACK)), "NaN or infinity"),
        (Observation(STACK, rank=6), "Rank 6 does not fit a 6 x 5 layer; expected 1 to 5"),
        (Observation(STACK, rank=0), "Rank 0 does not fit"),
    ],
)
@pytest.mark.parametrize(
    "method", [check_observation, LoraFT().recover, MeanLora().recover, SpectralDeTuning().recover]
)
def test_stacks_no_method_can_work_on(method, observation, message):
    with pytest.raises(LowraError, match=message):
        method(observation)


@pytest.mark.parametrize("method", [LoraFT(), MeanLora(), SpectralDeTuning()])
def test_the_papers_methods_are_methods(method):
    assert isinstance(method, Method)
    assert as_method(method, "key") is method
    assert method.pretty
    assert "Horwitz" in method.reference


def test_a_function_of_the_stack_becomes_a_method():
    method = as_method(lambda stack: stack.median(0).values, "median")
    recovery = method.recover(Observation(STACK, rank=2))
    assert (method.pretty, method.needs_rank) == ("median", False)
    assert torch.equal(recovery.candidates, STACK.median(0).values.unsqueeze(0))


def test_a_function_is_given_what_it_names():
    def method(stack, rank, seed=0, *, storage=None):
        return stack * rank + seed + (storage is torch.bfloat16)

    wrapped = as_method(functools.partial(method), "scaled")
    assert isinstance(wrapped, FunctionMethod)
    assert wrapped.needs_rank
    recovery = wrapped.recover(Observation(STACK, rank=2, seed=5, storage=torch.bfloat16))
    assert torch.equal(recovery.candidates, STACK * 2 + 6)


def test_a_method_without_names_gets_its_key_as_name():
    class Bare:
        def recover(self, observation):
            raise NotImplementedError

    method = as_method(Bare(), "bare")
    assert (method.pretty, method.reference, method.needs_rank) == ("bare", "", False)


def test_targets_that_are_no_methods():
    with pytest.raises(LowraError, match="'five' is a int; expected an object with recover"):
        as_method(5, "five")
    with pytest.raises(LowraError, match="'empty' takes no argument"):
        as_method(lambda: None, "empty")
    with pytest.raises(LowraError, match=r"'largest': no signature found for builtin.*Give a function of your own"):
        as_method(max, "largest")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("pretty", 5, "pretty is a int; expected a text"), ("needs_rank", "no", "needs_rank is a str; expected True or")],
)
def test_what_a_method_says_of_itself_is_checked(attribute, value, message):
    target = type("Mine", (), {"recover": lambda self, observation: None, attribute: value})()
    with pytest.raises(LowraError, match=f"Method 'mine': {message}"):
        as_method(target, "mine")

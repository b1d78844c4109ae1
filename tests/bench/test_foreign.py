"""One model of another base among those an attacker holds."""

from __future__ import annotations

import pytest
import torch

from lowra.bench.foreign import swap
from lowra.bench.merging import merge
from lowra.bench.schema import Layer
from lowra.bench.updates import Update
from lowra.errors import LowraError
from lowra.methods import Observation
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.metrics.weight_error import weight_error


@pytest.fixture
def layer() -> Layer:
    """Six models of rank 2 on a 48 x 40 layer."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(48, 40, generator=generator)
    loras = tuple(
        Update(
            f"m{i}",
            2,
            2.0,
            0.1 * torch.randn(2, 40, generator=generator),
            0.1 * torch.randn(48, 2, generator=generator),
        )
        for i in range(6)
    )
    return Layer("", "query", "query", weight, loras)


@pytest.mark.parametrize(("dtype", "order"), [(torch.float32, "once"), (torch.bfloat16, "twice")])
def test_one_model_has_another_base_and_its_own_update(layer: Layer, dtype: torch.dtype, order: str) -> None:
    merged = merge(layer, dtype, order)
    before = merged.clone()
    stack = swap(layer, merged, dtype, order, seed=3)
    assert torch.equal(merged, before)
    (stranger,) = [i for i in range(6) if not torch.equal(stack[i], merged[i])]
    other = stack[stranger] - layer.loras[stranger].delta()
    # The weights of W in another order: to the rounding of the merge, 2^-9 of a weight in bfloat16.
    assert torch.allclose(other.flatten().sort().values, layer.weight.flatten().sort().values, atol=3e-3)
    assert (other - layer.weight).std() > layer.weight.std()


def test_a_seed_is_one_choice_of_model_for_every_layer(layer: Layer) -> None:
    merged = merge(layer)
    assert torch.equal(swap(layer, merged, seed=5), swap(layer, merged, seed=5))
    chosen = {int((swap(layer, merged, seed=s) != merged).flatten(1).any(1).nonzero()) for s in range(20)}
    assert len(chosen) > 2


def test_the_exact_method_names_the_stranger_and_the_mean_is_lost(layer: Layer) -> None:
    stack = swap(layer, merge(layer), seed=1)
    recovery = SubspaceIntersection().recover(Observation(stack))
    assert weight_error(recovery.candidates[0], layer.weight) < -15
    assert weight_error(stack.mean(0), layer.weight) > -5


def test_two_models_at_least_keep_their_base(layer: Layer) -> None:
    merged = merge(layer)
    assert swap(layer, merged, seed=0, count=0) is merged
    with pytest.raises(LowraError, match=r"merge\.foreign is 5, of 6 models; expected 0 to 4"):
        swap(layer, merged, seed=0, count=5)

"""Defences: what they release, and that those which claim so leave the function of a model alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowra.bench.defences import (
    Noise,
    Place,
    RankPadding,
    Rotation,
    Rounding,
    Scaling,
    SharedComponent,
    applied,
)
from lowra.errors import LowraError

PLACE = Place("blocks.0.attention.query.weight", 0, 0)


def weight(d: int = 48, k: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def rms(matrix: Tensor) -> float:
    return float(matrix.double().square().mean().sqrt())


@pytest.mark.parametrize(
    "defence",
    [Noise(0.01), SharedComponent(0.1), RankPadding(2, 5, 0.1), Rounding("int8", True), Rotation(4), Scaling(1)],
)
def test_a_release_is_its_own_and_repeatable(defence) -> None:
    merged = weight()
    before = merged.clone()
    first = defence.release(merged, PLACE)
    assert torch.equal(merged, before)
    assert torch.equal(first, defence.release(merged, PLACE))
    assert not torch.equal(first, merged)
    other = defence.release(merged, Place(PLACE.layer, 1, 0))
    assert torch.equal(first, other) == isinstance(defence, SharedComponent)
    assert not torch.equal(first, defence.release(merged, Place(PLACE.layer, 0, 1)))  # another seed


def test_sizes() -> None:
    merged = weight(200, 300)
    # Means of 60000 normal numbers, to within five standard errors.
    assert rms(Noise(0.01).release(merged, PLACE) - merged) == pytest.approx(0.01 * rms(merged), rel=0.015)
    shared = SharedComponent(0.1).release(merged, PLACE) - merged
    assert rms(shared) == pytest.approx(0.1 / math.sqrt(300), rel=0.015)
    low = SharedComponent(0.1, rank=3).release(merged, PLACE).double() - merged.double()
    assert int((torch.linalg.svdvals(low) > 1e-4).sum()) == 3
    ranks = set()
    for model in range(20):
        added = RankPadding(2, 5, 0.1).release(merged, Place(PLACE.layer, model, 0)).double() - merged.double()
        ranks.add(int((torch.linalg.svdvals(added) > 1e-4).sum()))
    assert ranks == {2, 3, 4, 5}


def numbers_of(name: str) -> Tensor:
    """All finite numbers of a format, in order."""
    if name == "int8":
        return torch.arange(-127.0, 128.0)
    dtype, bits = {"bfloat16": (torch.bfloat16, torch.int16), "float8": (torch.float8_e4m3fn, torch.int8)}[name]
    every = torch.arange(2 ** (8 * dtype.itemsize)).to(bits).view(dtype).float()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("name", ["bfloat16", "float8", "int8"])
def test_rounding_is_to_the_nearest_number_of_the_format(name: str) -> None:
    merged = weight()
    merged[0] = 0
    released = Rounding(name).release(merged, PLACE)
    largest = {"bfloat16": None, "float8": 448.0, "int8": 127.0}[name]
    scale = 1.0 if largest is None else (merged.abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo().tiny)
    grid = numbers_of(name)
    asked = merged / scale
    at = torch.searchsorted(grid, asked.contiguous()).clamp(1, len(grid) - 1)
    nearest = torch.minimum((asked - grid[at - 1]).abs(), (grid[at] - asked).abs())
    assert torch.allclose((released / scale - asked).abs(), nearest, atol=1e-6 * float(asked.abs().max()))
    if name == "bfloat16":
        assert torch.equal(released, merged.bfloat16().float())


@pytest.mark.parametrize("name", ["bfloat16", "float8", "int8"])
def test_stochastic_rounding_is_right_in_the_mean(name: str) -> None:
    merged = weight(20, 30)
    releases = torch.stack([Rounding(name, True).release(merged, Place("a", m, 0)) for m in range(2000)]).double()
    most = merged.abs().amax(1, keepdim=True)
    step = {"bfloat16": merged.abs() / 128, "float8": merged.abs() / 8 + most / 448 / 512, "int8": most / 127}[name]
    # Never but to one of the two numbers around, and right in the mean: six standard errors in 600 numbers, a dozen
    # rare events of 2000, and the rounding of the scale.
    assert bool(((releases - merged.double()).abs().amax(0) < step * (1 + 1e-5)).all())
    allowed = 6 * releases.std(0) / math.sqrt(2000) + 12 / 2000 * step + 2e-7 * most
    assert bool(((releases.mean(0) - merged.double()).abs() < allowed).all())


class Attention(nn.Module):
    """Multi-head attention as vision transformers have it, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("defence", [Rotation(4), Scaling(0.5)])
def test_the_function_is_left_alone(defence) -> None:
    torch.manual_seed(0)
    model = Attention(32, 4)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        before = model(x)
        for name in ("query", "key", "value"):
            layer = getattr(model, name)
            place = Place(f"blocks.0.{name}.weight", 3, 0)
            layer.weight.copy_(defence.release(layer.weight, place))
            layer.bias.copy_(defence.bias(layer.bias, place))
        halfway = model(x)
        model.out.weight.copy_(defence.partner(model.out.weight, Place("blocks.0.value.weight", 3, 0)))
        after = model(x)
    assert not torch.allclose(before, halfway, atol=1e-3)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)  # float32


@pytest.mark.parametrize(
    "defence",
    [Rotation(4, shared_by=2, rope=True), Scaling(0.5, heads=4, shared_by=2, rope=True), Rotation(4, rope=True)],
)
def test_the_function_of_a_model_with_rope_is_left_alone(defence) -> None:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 4 // defence.shared_by, "num_hidden_layers": 2}
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(vocab_size=50, hidden_size=32, intermediate_size=16, **shape)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config)
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        before = model(tokens).logits
        for block in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(block.self_attn, name).weight
                weight.copy_(5 * weight)  # scores that matter
        strong = model(tokens).logits
        for i, block in enumerate(model.model.layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(block.self_attn, name).weight
                weight.copy_(defence.release(weight, Place(f"layers.{i}.self_attn.{name}.weight", 3, 0)))
        halfway = model(tokens).logits
        for i, block in enumerate(model.model.layers):
            output = block.self_attn.o_proj.weight
            output.copy_(defence.partner(output, Place(f"layers.{i}.self_attn.v_proj.weight", 3, 0)))
        after = model(tokens).logits
    assert not torch.allclose(before, strong, atol=1e-3)
    assert not torch.allclose(strong, halfway, atol=1e-3)
    torch.testing.assert_close(after, strong, atol=1e-5, rtol=1e-5)  # float32


def test_only_planes_are_turned_under_rope() -> None:
    merged = weight()
    turned = Rotation(4, rope=True).release(merged, PLACE).view(4, 2, 6, 64).double()
    original = merged.view(4, 2, 6, 64).double()
    torch.testing.assert_close(turned.square().sum(1), original.square().sum(1), atol=1e-6, rtol=0)
    assert not torch.allclose(turned, original, atol=1e-3)


def test_rotations_are_orthogonal_within_heads() -> None:
    merged = weight()
    turned = Rotation(4).release(merged, PLACE).view(4, 12, 64).double()
    original = merged.view(4, 12, 64).double()
    torch.testing.assert_close(turned.mT @ turned, original.mT @ original, atol=1e-6, rtol=0)
    other = Place("blocks.0.output.dense.weight", 0, 0)
    assert torch.equal(Rotation(4).release(merged, other), merged)


class Cut:
    def release(self, merged: Tensor, place: Place) -> Tensor:
        return merged[:-1]


class Broken:
    def release(self, merged: Tensor, place: Place) -> Tensor:
        return merged / 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise(0), "defence.size"),
        (lambda: Rounding("int4"), "int8"),
        (lambda: RankPadding(5, 2, 0.1), "least <= most"),
        (lambda: Rotation(5).release(weight(), PLACE), "heads is 5"),
        (lambda: Rotation(4, shared_by=3), "shared_by=3"),
        (lambda: Scaling(0.1, heads=16, rope=True).release(weight(), PLACE), "in pairs"),
        (lambda: applied(Cut(), weight()[None], "a", (0,), 0), "the shape of the weight"),
        (lambda: applied(Broken(), weight()[None], "a", (0,), 0), "NaN or infinity"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(LowraError, match=message):
        make()

from __future__ import annotations

import pytest
import torch
from conftest import planted_kinds, planted_layers

from lowra.bench.merging import ORDERS, merge, merge_dtype
from lowra.errors import LowraError


def test_merge_is_weight_plus_scaled_product() -> None:
    (layer,) = planted_layers(layers=1, ranks=(2, 3))
    stack = merge(layer)
    assert stack.shape == (6, 40, 24)
    for merged, lora in zip(stack, layer.loras, strict=True):
        exact = layer.weight.double() + (lora.alpha / lora.rank) * lora.B.double() @ lora.A.double()
        # Values are below 1, so one float32 rounding is below 2^-24; a product of rank 3 and a sum make a few.
        assert (merged.double() - exact).abs().max() < 2**-22
        assert torch.allclose(lora.delta(), merged - layer.weight, atol=2**-22)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_coarser_merge_lies_on_its_grid(name: str) -> None:
    (layer,) = planted_layers(layers=1)
    dtype = merge_dtype(name)
    stack = merge(layer, dtype)
    assert stack.dtype == torch.float32
    assert torch.equal(stack, stack.to(dtype).float())
    assert not torch.equal(stack, merge(layer))


def test_unknown_dtype() -> None:
    with pytest.raises(LowraError, match=r"Unknown merge\.dtype 'int8'; known: float32, bfloat16, float16"):
        merge_dtype("int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_twice_is_what_16_bit_adapters_do(dtype: torch.dtype) -> None:
    (layer,) = planted_layers(layers=1)
    stack = merge(layer, dtype, "twice")
    for merged, update in zip(stack, layer.loras, strict=True):
        rounded = (update.scale * (update.B @ update.A)).to(dtype)
        assert torch.equal(merged, (layer.weight + rounded.float()).to(dtype).float())
    assert not torch.equal(stack, merge(layer, dtype, "once"))


def test_in_float32_the_order_does_not_matter() -> None:
    (layer,) = planted_layers(layers=1)
    assert torch.equal(merge(layer, order="twice"), merge(layer, order="once"))
    assert ORDERS == ("once", "twice")
    with pytest.raises(LowraError, match=r"Unknown merge\.order 'thrice'; known: once, twice"):
        merge(layer, order="thrice")


def test_every_kind_rounds_once_or_twice() -> None:
    (layer,) = planted_kinds(layers=1)
    plain, once, twice = merge(layer), merge(layer, torch.bfloat16), merge(layer, torch.bfloat16, "twice")
    for i, update in enumerate(layer.loras):
        assert torch.equal(plain[i], update.apply(layer.weight))
        assert torch.equal(once[i], plain[i].bfloat16().float())
        change = update.delta() if update.adds else plain[i] - layer.weight
        assert torch.equal(twice[i], (layer.weight + change.bfloat16().float()).bfloat16().float())
    assert torch.equal(merge(layer, order="twice"), plain)
